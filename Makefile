# Every target does its own set-up: see tools/dev/setup.sh for what that is.
# PYTHON=/path/to/python3 chooses the interpreter, PYTEST_ARGS="..." adds to pytest's command line.

SHELL := /bin/bash
VENV := .venv
PACKAGES = $(wildcard unionfs layerstore runtime tools/__init__.py bench)

.PHONY: help demo test lint bench clean

help:
	@echo 'make demo    stack two directories, write through the mount, show what each one holds'
	@echo 'make test    run all tests (root and /dev/fuse are needed for the mounted ones)'
	@echo 'make lint    ruff and mypy alone'
	@echo 'make bench   compare with the kernel and with other union file systems'
	@echo 'make clean   remove what the other targets made in this folder'

demo:
	@tools/dev/setup.sh demo
	@tools/demo.sh $(VENV)/bin/mica-fuse

test:
	@tools/dev/setup.sh test
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint:
	@tools/dev/setup.sh lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --strict $(patsubst %/__init__.py,%,$(PACKAGES))

bench:
	@tools/dev/setup.sh bench
	$(VENV)/bin/python -m bench $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
