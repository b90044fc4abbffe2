PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-fla lint figures clean

demo: $(VENV)/.installed
	$(BIN)/python -m tops.cpu.kda

test: $(VENV)/.installed
	$(BIN)/python -m pytest

test-fla: $(VENV)-fla/.installed
	$(VENV)-fla/bin/python -m pytest tests/fla

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

figures: $(VENV)/.installed
	$(BIN)/python docs/draw_triangle.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,dev]'
	touch $@

# TORCH=torch takes the newest build; the pinned one has a CPU build on the development machines.
TORCH ?= torch==2.13.0
$(VENV)-fla/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-fla
	$(VENV)-fla/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' --editable '.[test,fla]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-fla .venv-newest
