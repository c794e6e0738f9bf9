# make demo      a picture by a gang of two
# make check     linters, and what is quick of what starts neither Ray nor other processes: for the inner loop
# make test      every test that needs neither a GPU nor minutes of training
# make test-browser  the page in Chromium, which must be there; SCREENSHOTS=docs/images keeps pictures of it
# make test-all  every test that needs no GPU, with torchao too, which takes its time to be imported
# make gpu       what one NVIDIA GPU shows, in stages (STAGE=2 for one of them, DRY=1 on a CPU)
# make lint      ruff, mypy and import-linter      make clean     what this file made
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest $(PYTEST_ARGS)
FIRST := not (gpu or slow or ray or distributed or sweep or browser)

export RAY_USAGE_STATS_ENABLED ?= 0
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

.PHONY: demo check test test-browser chromium test-all gpu lint clean
.DEFAULT_GOAL := demo

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "distriray needs Python 3.11 or newer; use make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/distriray generate "a lake at dusk, snowy mountains" --gang-size 2 --compare --out out/lake.png

check: lint
	$(PYTEST) -n 2 -m "$(FIRST)"

test: $(STAMP)
	$(PYTEST) -n 2 -m "not (gpu or slow or ray or browser)"
	$(PYTEST) -m "ray and not (gpu or slow or browser)"

chromium:
	@test -x "$(CHROMIUM)" || { echo 'make test-browser needs Chromium: apt-get install chromium, or make test-browser CHROMIUM=/path/to/it' >&2; exit 2; }

# Chromium is the system's own; what drives it comes from the registry.
test-browser: chromium $(STAMP)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[browser]'
	CHROMIUM="$(CHROMIUM)" $(PYTEST) -m browser tests/browser

test-all: test
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[quantize]'
	$(PYTEST) -n 2 tests/unit/test_quantized.py
	$(PYTEST) -m "slow and not gpu"

# The machine's own Python, where torch and CuPy fit its driver.
gpu:
	$(if $(DRY),$(BIN)/python,$(PYTHON)) -m bench.gpu $(if $(STAGE),--stage $(STAGE)) $(if $(DRY),--dry)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) out build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
