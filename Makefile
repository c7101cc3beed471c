PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test commit-checks lint type imports pytest format clean

# Fresh environments with the tested versions. PyTorch on a line of its own, as only it may come from another index
$(VENV)/examples: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(PIP_INSTALL) torch $(TORCH_INDEX)
	$(PIP_INSTALL) --editable ".[examples]"
	touch $@

$(VENV)/tests: $(VENV)/examples
	$(PIP_INSTALL) --editable ".[tests]"
	touch $@

demo: $(VENV)/examples
	$(BIN)/python examples/quickstart.py

test: commit-checks

commit-checks: lint type imports pytest

lint type imports pytest format: $(VENV)/tests

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type:
	$(BIN)/mypy

imports:
	$(BIN)/lint-imports

pytest:
	$(BIN)/pytest --numprocesses 2 --dist loadfile

clean:
	rm -rf $(VENV) logs .mypy_cache .pytest_cache .ruff_cache
