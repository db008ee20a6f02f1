# Everything runs in a virtual environment of its own, made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: quickstart test test-fast check style docs clean

quickstart: $(VENV)/.ready
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The unit layer alone, to run while writing.
test-fast: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/unit

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

style: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.ready
	$(BIN)/sphinx-build -W --keep-going docs docs/_build

# torch comes first and alone: another order or spelling may pull in a build for another kind of machine.
$(VENV)/.ready: pyproject.toml requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -r requirements-dev.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) .cache outputs build dist docs/_build *.egg-info .pytest_cache .ruff_cache .mypy_cache
