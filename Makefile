# Every target but clean and gpu-check first installs what it needs into .venv (scripts/install.sh), with PYTHON as its interpreter.
PYTHON ?= python3
export PYTHON

.PHONY: demo test test-slow gpu-check lint docs install clean

demo: install
	.venv/bin/python -m scripts.demo

test: lint
	.venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile

test-slow: install
	.venv/bin/python -m pytest -m slow

# not after install: a bundle for a machine without a network takes its place
gpu-check:
	@scripts/gpu_check.sh

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

docs: install
	.venv/bin/python -m benchmarks.quality_picture docs/results/quality.json
	.venv/bin/mkdocs build --strict

install:
	scripts/install.sh

clean:
	rm -rf .venv demo-output bench-output site build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
