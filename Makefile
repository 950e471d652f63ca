# Needs Python 3.11 or newer, make, and a package index; everything else is installed into .venv.
#   make test         all checks and tests        make check    lint, types, floors
#   make demo         real models read a page     make bench    the table of measured results
#   make docs         the generated pages         make clean    remove what these made
# Choose the interpreter with PYTHON=python3.12, add extras with EXTRAS=test,check,bench,torch.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test,check,bench
PYTEST_ARGS ?=
WORKERS ?= 2
BENCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
comma := ,
# One stamp per set of extras, so that another set installs what it adds.
INSTALLED := $(VENV)/installed-$(subst $(comma),-,$(EXTRAS))

# Byte code is kept, whatever the environment says: the tests start a hundred processes of Python.
export PYTHONDONTWRITEBYTECODE :=

.DELETE_ON_ERROR:
.PHONY: test tests check ruff mypy lint-imports demo bench docs constraints clean install

# mypy needs one core for as long as it takes: the tests begin beside it.
test: install
	$(MAKE) --jobs=4 check tests

tests: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

check: ruff mypy lint-imports

ruff: install
	$(BIN)/ruff check .

mypy lint-imports: install
	$(BIN)/$@

demo: install
	$(BIN)/vivace demo

bench: install
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

docs: install
	$(BIN)/python docs/generate.py

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vivace needs Python 3.11 or newer; say which one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# A fresh environment with every extra, at the newest versions that pyproject.toml allows.
constraints:
	$(PYTHON) -m venv --clear build/constraints
	build/constraints/bin/python -m pip install --quiet --editable '.[test,check,bench,demo,torch,llama]'
	printf '%s\n' '# The versions that the tests ran with; `make constraints` renews them from a fresh environment with every extra.' > constraints.txt
	build/constraints/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' >> constraints.txt

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find src tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +
