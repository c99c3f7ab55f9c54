# Two commands: `make lab` to read and run the workbook, `make test` to test all of it. Both set up first.
# On the command line: make PYTHON=python3.12 lab · make test ARGS='-k wheel'

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
LIVE ?= _live
PY := $(VENV)/bin/python

# figures are saved as what they are, and .ci/figures.py adds a picture: not as HTML, which would hold them once more and
# fetch plotly.js from a foreign host; this environment's own kernel, not one from ~
export PLOTLY_RENDERER := plotly_mimetype
export JUPYTER_PREFER_ENV_PATH := 1
# what fastai's import says of itself on today's torch and pandas, and nobody who runs a notebook can change
export PYTHONWARNINGS := ignore:`torch.jit.script` is deprecated:FutureWarning,ignore:The 'mode.chained_assignment' option:Warning
export PATH := $(abspath $(VENV))/bin:$(PATH)
# uv installs no bytecode. Where this is set, Python would compile PyTorch anew at each import: 15 seconds, not 5
unexport PYTHONDONTWRITEBYTECODE

TOUR := nbs/tutorials/tour.ipynb
ROOT := $(shell [ "$$(id -u)" != 0 ] || echo --allow-root)

.DEFAULT_GOAL := help
.PHONY: help set-up lab test check demo bench export docs docs-check live lint wheel clean

help: ## this list
	@echo "noisyseg: train a segmentation network under weight noise, and see what the noise costs"
	@echo
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-11s %s\n", $$1, $$2 }'

set-up: ## the virtual environment (.venv), with pinned dependencies; the others call it
	@PYTHON="$(PYTHON)" VENV="$(VENV)" .ci/set-up

lab: set-up ## open JupyterLab on the tour
	NOISYSEG_DATA="$${NOISYSEG_DATA:-$$($(PY) tests/real_data.py)}" $(PY) -m jupyterlab --ServerApp.ip=127.0.0.1 --ServerApp.root_dir="$(CURDIR)" $(ROOT) $(TOUR)

# processes of one thread each: two torch programs of two threads on two cores stand in each other's way. One more than there
# are cores, for many tests wait: for a browser, for Ray, for a process that ends
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n $$($(PY) -c 'import os; print(min(os.cpu_count() + 1, 4))') \
	--dist loadgroup --no-loadscope-reorder
test: set-up ## run everything: the notebooks, tests/, and that code, README and site fit the notebooks
	@$(PYTEST) $(ARGS)

check: set-up ## what one runs while working: all that is quick, in under two minutes; no browser, no Ray, no notebooks
	@$(PYTEST) -m 'not browser and not ray and not kill and not slow' $(ARGS)

demo: set-up ## the tour without a browser, in under 5 minutes; leaves noisyseg-report.html
	@$(PY) -m noisyseg.show.demo

bench: set-up ## measured costs beside the plain way and beside peers: one table, also for the page nbs/benchmarks.ipynb; all of it: ARGS=--full
	@$(PY) tests/bench.py $(ARGS)

export: set-up ## after editing notebooks: write modules and README from them, clean them, draw their figures
	$(VENV)/bin/nbdev-export
	$(VENV)/bin/nbdev-clean
	@$(PY) .ci/derive.py
	@$(PY) .ci/figures.py

docs: set-up ## build the site into _docs/ (needs quarto)
	@command -v quarto >/dev/null || { echo "make docs needs the program quarto: get it from https://quarto.org/docs/get-started and"; \
		echo "run this again. 'make docs-check' tests the site's sources without it."; exit 1; }
	$(PY) .ci/pages.py

docs-check: set-up ## test what can be tested of the site and README without quarto; and _docs/, if it is built
	@$(PY) -m pytest tests/test_tooling_docs.py tests/test_tooling_site.py $(ARGS)
	@[ ! -d _docs ] || $(PY) .ci/check_site.py _docs

live: set-up ## the pages that run networks in a browser, into _live/ (needs npm); elsewhere: make live LIVE=folder
	@$(PY) .ci/live.py $(LIVE)

lint: set-up ## ruff over notebooks, modules and tests
	$(PY) -m ruff check

wheel: set-up ## wheel and source archive into dist/
	$(PY) -m build

clean: ## remove what builds and tests left; .venv stays
	rm -rf build dist *.egg-info _proc _docs _live .pytest_cache .ruff_cache .hypothesis test-screenshots
	find . -path "./$(VENV)" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
	find nbs -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +
