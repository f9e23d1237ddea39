# Every target makes what it needs: on a bare machine `make lm` creates .venv, installs and trains.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install -qq --disable-pip-version-check --no-compile

.DEFAULT_GOAL := help
.PHONY: help install lm classification test check test-all matrix results lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(VENV)/.installed ## the recipes and their dependencies, into .venv

lm: $(VENV)/.installed ## train a small language model on real text; prints its loss and a sample
	@$(PY) recipes/lm/train.py fit

classification: $(VENV)/.installed ## train a small image classifier; prints its accuracy
	@$(PY) recipes/classification/train.py fit

test: $(VENV)/.installed-dev ## the whole test suite
	@$(PY) -m pytest

check: $(VENV)/.installed-dev ## lint, format and types, the same as CI
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m pyright --pythonpath $(PY)

test-all: $(VENV)/.installed-dev ## every case of exact resume, equivalence and faults that the suite leaves out; goes on where it was stopped (long)
	@$(PY) -m pytest -m matrix --ignore=tests/test_matrix.py -n4 --dist=load --go-on

matrix: $(VENV)/.installed-dev ## every recipe x strategy x precision; renders docs/compatibility.md (long)
	@$(PY) -m pytest -m "" tests/test_matrix.py -k test_cell -n2 --dist=load
	@$(PY) -m tests.test_matrix

results: $(VENV)/.installed-dev ## measure the recipes with three seeds where numbers are stale; renders recipes/README.md (long)
	@$(PY) benchmarks/results.py

# torch and the CUDA packages it pulls in stay out: which build is right depends on the machine. pip-compile loses
# the marker of an extra, and deepspeed and megatron-core install on Linux only.
# A version younger than two weeks is not taken: malware is mostly found within days. pip knows ages since 26.
lock: $(VENV)/.installed-dev ## renew requirements.lock
	@$(PIP_INSTALL) 'pip>=26,<27'
	@before=$$($(PY) -c 'import datetime as d; print(f"{d.datetime.now(d.UTC) - d.timedelta(14):%Y-%m-%dT%H:%M:%SZ}")'); \
	CUSTOM_COMPILE_COMMAND="make lock" $(PY) -m piptools compile --quiet --upgrade --all-extras \
	  --uploaded-prior-to $$before --generate-hashes --allow-unsafe --strip-extras --resolver=backtracking \
	  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options \
	  --output-file - pyproject.toml > $(VENV)/requirements.lock
	@awk '/^[a-z]/ {keep = !/^(torch|triton|nvidia-[^ ]*|cuda-[^ ]*)==/} \
	  {sub(/^(deepspeed|megatron-core)==[^ ]+/, "& ; sys_platform == \"linux\"")} keep || /^#/' \
	  $(VENV)/requirements.lock > requirements.lock

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed-dev: EXTRA := [dev,optim,deepspeed,megatron,ray]
$(VENV)/.installed $(VENV)/.installed-dev: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and \
	  "Python 3.11 to 3.13 is needed, $(PYTHON) is %d.%d: try make PYTHON=python3.13 ..." % sys.version_info[:2])'
	@echo "Installing into $(VENV), one to two minutes ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --editable ".$(EXTRA)"
	@# On all cores, unlike pip, and without what is rarely imported; templates do not compile.
	@$(PY) -m compileall -qq -j 0 -x '/(tests|transformers/models)/' $(VENV)/lib || true
	@touch $(VENV)/.installed $@
