# Everything runs in .venv, which the first command makes. `make help` lists what there is.
PYTHON ?= python3
TEXT ?=
LIGER ?=
FAKE ?=
ARGS ?=
NOX_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc python -name '*.cpp' -o -name '*.h' -o -name '*.cu*' -o -name '*.py')
CXX_FILES = $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
SANITIZED := build/sanitize/site
# The options of CMakeLists.txt, for kernels that are run without Python: of the instruction set $(1), as kernels_$(2).
ALONE = -std=c++17 -Wall -Wextra -Werror -Wno-psabi -ffp-contract=fast -fno-math-errno -fno-trapping-math \
  -DFASTLOSS_ISA=$(1) -DFASTLOSS_ISA_NAME='"$(1)"' csrc/cpu/rows.cpp tests/kernels_alone.cpp -o build/kernels_$(2)
ON_AVX2 := on-avx2-avx512 on-avx2-avx512_bf16

.PHONY: help demo train-tp test test-all test-fake-gpu sanitize lint format bench bench-quick \
  gpu gpu-dry gpu-traffic versions docs wheel aarch64 avx512 $(ON_AVX2) \
  clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: $(VENV)/.demo  ## train a small language model twice, with torch's loss and with ours (TEXT=path: on your text)
	$(BIN)/python examples/train_lm.py $(if $(TEXT),--text "$(TEXT)")

train-tp: $(VENV)/.demo  ## the same model where two processes share its vocabulary, beside one that has it all
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2 examples/train_tp.py

test: $(VENV)/.test  ## the tests (not the ones that need minutes or many gigabytes)
	$(BIN)/python -m pytest -m "not slow" -n logical --dist worksteal $(PYTEST_ARGS)

test-fake-gpu: $(VENV)/.test  ## the tests of GPUs (pytest -m gpu), on a fake one that has the CPU's memory
	FASTLOSS_FAKE_GPU=1 $(BIN)/python -m pytest -m "gpu and not slow" -n logical --dist worksteal $(PYTEST_ARGS)

test-all: $(VENV)/.test  ## all tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

sanitize: $(VENV)/.test  ## the native tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps --upgrade --target $(SANITIZED) -C cmake.define.FASTLOSS_SANITIZE=ON \
	  -C cmake.define.FASTLOSS_CUDA=OFF -C build-dir=build/sanitize/objects .
	PYTHONPATH=$(SANITIZED) LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc $(BIN)/python -m pytest -q tests/test_native.py tests/test_numerics.py \
	  tests/test_losses.py tests/test_matmul.py tests/test_head.py tests/test_any_cut.py::test_parts_that_merge_natively \
	  -m "not slow" -k "not reference and not cuda"

lint: $(VENV)/.dev  ## ruff, clang-format, clang-tidy, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/clang-tidy --quiet csrc/bindings.cpp csrc/cpu/*.cpp -- -std=c++17 -Wall -Wextra -Wno-psabi \
	  $$($(BIN)/python -m pybind11 --includes | sed 's/-I/-isystem /g') -DFASTLOSS_ISA=baseline -DFASTLOSS_ISA_NAME='""' \
	  -DFASTLOSS_COMPILER='""' -DFASTLOSS_COMPILED_ISAS='""' -DFASTLOSS_VERSION='""'
	$(BIN)/mypy

format: $(VENV)/.dev  ## what lint would complain about, mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(VENV)/.test  ## the whole benchmark table: about five minutes
	$(BIN)/python -m pytest --benchmark

bench-quick: $(VENV)/.test  ## a smoke run of the benchmarks
	$(BIN)/python -m pytest --benchmark --quick

gpu:  ## all that a GPU should tell, offline, with the Python that has torch (ARGS="--minutes 9"; FAKE=1: a dry run)
	$(PYTHON) benchmarks/gpu_acceptance.py $(if $(FAKE),--fake) $(ARGS)

gpu-dry:  ## the same as a dry run, on the fake device of the tests
	$(MAKE) gpu FAKE=1

gpu-traffic: $(VENV)/.test  ## count what the GPU kernels execute and move, without a GPU (LIGER=folder: beside Liger's)
	$(BIN)/python studies/gpu_traffic.py $(if $(LIGER),--liger "$(LIGER)")

versions: $(VENV)/.dev  ## the core of the tests on the oldest and the newest Python, torch and Triton (NOX_ARGS="-R --envdir DIR")
	$(BIN)/nox $(NOX_ARGS)

docs: $(VENV)/.dev  ## the generated part of README.md
	$(BIN)/python docs/feature_table.py README.md

wheel: $(VENV)/.build  ## a wheel in dist/
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps -w dist .

aarch64:  ## the CPU kernels for NEON, compiled and run (needs g++-aarch64-linux-gnu and qemu-user)
	mkdir -p build
	aarch64-linux-gnu-g++ -O3 -static $(call ALONE,baseline,aarch64)
	qemu-aarch64 build/kernels_aarch64

avx512: $(ON_AVX2)  ## the CPU kernels for AVX-512, compiled and run with AVX2 (needs libsimde-dev)

$(ON_AVX2): on-avx2-%:
	mkdir -p build
	$(CXX) -O1 -mavx2 -mfma -mf16c -include tests/avx512_on_avx2.h -DEMULATED_$* $(call ALONE,$*,$*)
	build/kernels_$*

clean:  ## builds, caches and outputs; not .venv
	rm -rf build dist out .pytest_cache .hypothesis .ruff_cache .mypy_cache

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "fastloss needs Python 3.10 or newer; \
	$(PYTHON) is $$($(PYTHON) --version). Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || command -v c++ >/dev/null || { echo "fastloss needs a C++ compiler to build \
	its kernels: apt install g++, dnf install gcc-c++, or xcode-select --install" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# What builds the package lives in .venv, not in a new environment for each build: paths stay the same, and only what
# changed is compiled again.
$(VENV)/.build: $(VENV)/.venv
	$(BIN)/python -m pip install -q "scikit-build-core>=0.10" "pybind11>=2.13" cmake ninja
	touch $@

# One stamp per extra: installed again when a source changes.
$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: $(VENV)/.build constraints.txt $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt ".[$*]"
	touch $@
