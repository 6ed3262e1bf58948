# Every target does its own set-up in .venv; a machine needs Python >= 3.11 and, for speed, a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)

.PHONY: setup demo test test-sanitize test-peers bench lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make setup   install thrifty and its tools into $(VENV)"
	@echo "make demo    train, pack and run a small ternary model (five minutes of training at most, and a minute or two around it)"
	@echo "make test    run the tests"
	@echo "make test-sanitize   run the native ops under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make test-peers   install llama.cpp and litespark (compiled for minutes), and check and time the runtime beside them"
	@echo "make bench   time every kernel and the runtime beside what the machine could do at best"
	@echo "make lint    formatters, linters and the type checker"
	@echo "make format  apply the formatters"

setup: $(VENV)/.installed

$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/thrifty demo

# Keras takes its backend when it is imported, so its tests run once in a process for each.
KERAS_TESTS := tests/contracts/test_keras.py tests/keras

test: setup
	$(BIN)/python -m pytest --cov --cov-report= $(addprefix --ignore=,$(KERAS_TESTS))
	for backend in torch jax tensorflow; do for tests in $(KERAS_TESTS); do \
		echo "== KERAS_BACKEND=$$backend $$tests"; \
		KERAS_BACKEND=$$backend $(BIN)/python -m pytest --cov --cov-append --cov-report= $$tests || exit 1; \
	done; done
	$(BIN)/python -m coverage report

test-sanitize: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/sanitize.py

test-peers: $(VENV)/.peers
	$(BIN)/python -m pytest -m peers tests/benchmarks tests/checkpoint
	$(BIN)/python benchmarks/runtime_vs_peers.py --shape demo --rounds 3

$(VENV)/.peers: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,peers]'
	touch $@

bench: setup
	for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	find csrc tests \( -name '*.cpp' -o -name '*.hpp' -o -name '*.h' \) -print0 | xargs -0 $(BIN)/clang-format --dry-run --Werror
	$(BIN)/pyright

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	find csrc tests \( -name '*.cpp' -o -name '*.hpp' -o -name '*.h' \) -print0 | xargs -0 $(BIN)/clang-format -i

clean:
	rm -rf $(VENV) build dist
