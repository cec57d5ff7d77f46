# Everything runs in .venv, which any target makes first. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime
STAMP := $(VENV)/.installed
# files in the order of tests/conftest.py, which has the longest first
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
ASSETS := fastdiff/assets

# the model of the runs NAME-autoencoder and NAME-STAGE, with their configs and logs
define ship
	mkdir -p $(ASSETS)/$(1)
	cp runs/$(1)-$(2)/model/* $(ASSETS)/$(1)/
	for stage in autoencoder $(2); do \
	  cp runs/$(1)-$$stage/config.json $(ASSETS)/$(1)/$$stage-run.json; \
	  cp runs/$(1)-$$stage/log.jsonl $(ASSETS)/$(1)/$$stage-log.jsonl; \
	done
endef

.PHONY: help venv build demo test test-avx2 faults durations check lint types format docs links bench wheel install-check weights clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

# the package and what it needs, compiled: enough to use it
$(RUNTIME): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 10) <= v < (3, 14) else f"Python 3.10 to 3.13 is needed, got {v.major}.{v.minor}; name one: make PYTHON=python3.12")'
	@echo "installing PyTorch and fastdiff into $(VENV) and compiling its kernels: one to two minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	@# Python compiles what is imported, when it is: pip would compile all of torch, one file after the other.
	@# A path and not an import hook: type checkers find the package in the user's files too
	@$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e . --config-settings editable_mode=compat
	@$(BIN)/python -c 'from fastdiff.kernels.compiled import describe; b = describe(); print("compiled for this CPU:", b.get("isa") or b["missing"]); print("CUDA kernels:", b.get("cuda_architectures") or b.get("without_cuda", "none"))'
	@touch $@

# and what tests, training and the documentation need; the package itself is not built again
$(STAMP): $(RUNTIME)
	@echo "installing what tests, training and the documentation need"
	@$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt 'fastdiff[dev]'
	@# not into site-packages: diffusers and transformers change their ways where they find it
	@$(BIN)/python -m pip install --quiet --no-compile --no-deps -c constraints.txt --target $(VENV)/kernels-library --upgrade kernels
	@# only its sampling.py is imported; what the package needs, torchvision among it, is not installed
	@$(BIN)/python -m pip install --quiet --no-compile --no-deps -c constraints.txt --target $(VENV)/k-diffusion --upgrade k-diffusion
	@# many processes will start at once, and perhaps where bytecode is not written; exit 1: a template that is not Python
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true
	@touch $@

venv: $(STAMP) ## make .venv with what constraints.txt pins

build: $(STAMP) ## compile csrc/ again, what has changed of it
	$(BIN)/python setup.py --quiet build_ext --inplace

demo: $(RUNTIME) ## sample a labelled sheet of digits from the shipped weights into out/
	$(BIN)/fastdiff sample --out out/demo

test: $(STAMP) ## pass the tests, a process per core
	$(PYTEST)

test-avx2: $(STAMP) ## pass the tests that compute on this CPU once more, with AVX2 alone
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) -m numeric

check: $(STAMP) ## lint, types and the fast tests of what changed, within a minute
	$(BIN)/python -m tests.support.check

lint: $(STAMP) ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy
	$(BIN)/mypy

format: $(STAMP) ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## build the site into build/docs/html; a warning fails it (Python 3.11 and later)
	$(BIN)/python -m sphinx -b html -d build/docs/doctrees --fresh-env --fail-on-warning --keep-going --quiet docs build/docs/html

links: $(STAMP) ## check the links of the site that lead elsewhere; needs the network
	$(BIN)/python -m sphinx -b linkcheck -d build/docs/doctrees --quiet docs build/docs/links

faults: $(STAMP) ## plant small faults in a copy, one at a time: do the tests notice?
	$(BIN)/python -m tests.faults

durations: $(STAMP) ## what tests cost, in one process: make durations WHAT=tests/kernels
	$(BIN)/python -m pytest $(or $(WHAT),tests)

bench: $(STAMP) ## time every op and the whole pipeline on this machine
	$(BIN)/python -m pytest benchmarks

wheel: $(STAMP) ## build the wheel and the sdist into dist/
	$(BIN)/python -m build --outdir dist .

install-check: $(STAMP) ## install in fresh environments: no compiler, CPU only, nvcc, from an sdist
	$(BIN)/python -m tests.install_check

weights: $(STAMP) ## train the shipped weights anew (under an hour on two cores) and measure them
	$(BIN)/fastdiff train autoencoder --preset digits-autoencoder
	$(BIN)/fastdiff train diffusion --preset digits-diffusion
	$(call ship,digits,diffusion)
	$(BIN)/fastdiff evaluate --out docs
	cp docs/results.json $(ASSETS)/digits/evaluation.json

clean: ## remove what make and the tools made (not runs/ and out/)
	rm -rf $(VENV) build dist kernels/_native.* *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
