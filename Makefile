# Every target makes .venv and installs what it needs the first time, and again when the pins below change.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
VERSIONS ?= 5.1.0 5.17.0
JOBS ?= 2
COMPILED := $(wildcard tests/kernels/compile_*.py)

.PHONY: help demo test test-all test-transformers check format kernels kernels-interpreted families bench bench-peers bench-gpu clean
.DELETE_ON_ERROR:

help:
	@echo "make demo         trace one prompt on the embedded model and draw it into out/demo"
	@echo "make test         the quick tests: run them while you work"
	@echo "make test-all     every test: also kills, launchers, browsers, notebooks and every model family"
	@echo "make test-transformers VERSIONS='5.1.0 5.17.0'  the quick tests with other versions of transformers"
	@echo "make check        ruff and pyright"
	@echo "make format       let ruff rewrite what it can"
	@echo "make kernels      the GPU kernels without a GPU: interpreted, and compiled for sm_80 and sm_90"
	@echo "make families     every engine on every causal type of transformers, into docs/families.md (for the night)"
	@echo "make bench        measure this machine"
	@echo "make bench-peers  compare with other tools"
	@echo "make bench-gpu    test and measure this machine's GPU in nine minutes; PYTHON has torch, nothing is installed"
	@echo "make clean        remove .venv, caches and out/"
	@echo 'ARGS="..." is passed on, e.g. make test ARGS="-k cli -x"'

# With all that the README goes on to use.
demo: $(VENV)/.with-cpu,report
	$(BIN)/fasttrace demo $(ARGS)

# Two processes: the tests set the number of threads of a product to 1.
test: $(VENV)/.with-test
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) $(ARGS)

test-all: $(VENV)/.with-docs
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

# What is not installed beside the other transformers is taken from .venv.
test-transformers: $(foreach version,$(VERSIONS),build/transformers-$(version)/.done)
	for python in $(patsubst %/.done,%/bin/python,$^); do $$python -m pytest -m "not slow" $(ARGS) || exit 1; done

build/transformers-%/.done: $(VENV)/.with-test
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check transformers==$*
	$(BIN)/python -c 'import sysconfig; print("\n".join([sysconfig.get_path("purelib"), "$(CURDIR)", "$(CURDIR)/kernels"]))' \
		> $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth
	touch $@

check: $(VENV)/.with-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.with-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The interpreter is chosen when triton is imported, so interpreting and compiling are processes of their own.
kernels: $(VENV)/.with-kernels
	$(MAKE) --no-print-directory --output-sync=target -j2 $(patsubst tests/kernels/%.py,kernels-%,$(COMPILED)) kernels-interpreted

kernels-interpreted: $(VENV)/.with-kernels
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q --confcutdir=tests/kernels tests/kernels/interpreter_*.py $(ARGS)

kernels-compile_%: tests/kernels/compile_%.py $(VENV)/.with-kernels
	$(BIN)/python -m pytest -q -s --confcutdir=tests/kernels $< $(ARGS)

families: $(VENV)/.with-test
	$(BIN)/python -m bench.families --out docs/families.md $(ARGS)

bench: $(VENV)/.with-bench
	$(BIN)/python -m bench.run $(ARGS)

bench-peers: $(VENV)/.with-peers
	$(BIN)/python -m bench.peers $(ARGS)

# Without .venv: a GPU machine has the torch that fits its driver, and often no package index.
bench-gpu:
	PYTHON="$(PYTHON)" bash bench/gpu.sh $(ARGS)

clean:
	rm -rf $(VENV) out build dist .pytest_cache .ruff_cache .hypothesis .benchmarks

$(VENV)/.with-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing fasttrace[$*] into $(VENV) (the first time takes a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$*]" -c constraints.txt
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, found " + sys.version.split()[0] + ": name another one, make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv $(VENV)
