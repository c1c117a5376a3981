# `make demo` and `make test` each make their own environment on a bare machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
OUT ?= demo

.PHONY: demo test test-slow lint clean

demo: $(READY)
	$(BIN)/fairseq-vqem run recipes/sample-en-de/recipe.yaml --out $(OUT)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m slow tests

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/fairseq-vqem tables --check

# torch first: with a torch in place, nothing else pulls another one.
$(READY): requirements.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and "Python 3.11 or 3.12 is needed: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info
