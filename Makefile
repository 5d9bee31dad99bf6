# `make serve` and `make test` do all set-up themselves; the second time they start at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: serve test check format bench clean

$(VENV)/.serve: pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar on -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/.serve
	$(BIN)/python -m pip install --quiet --progress-bar on -c constraints.txt -e '.[test]'
	touch $@

serve: $(VENV)/.serve  ## serve the embedded model, with the console, on http://127.0.0.1:8000
	$(BIN)/quire serve $(ARGS)

test: $(VENV)/.test check  ## every test
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.test  ## what CI checks before the tests
	$(BIN)/ruff check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix --quiet .

bench: $(VENV)/.test  ## Quire beside the engines of ARGS="--peers DIR", results under benchmarks/results
	$(BIN)/python -m benchmarks.engines $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info
