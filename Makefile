# make test | test-legacy | demo | bench | docs | docs-serve | lint | clean: each sets up .venv itself at the first call and reuses it afterwards.
# PYTHON=/path/to/python3 chooses the interpreter of a new .venv; Python 3.11 or newer.

MINIMUM := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,\
	$(if $(filter yes,$(shell $(name) -c '$(MINIMUM)' 2>/dev/null && echo yes)),$(name))))
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := .venv/.ready
# A worker for each core; the tests of a file share what they set up.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile
# The last release of SpikingJelly before 2.0, which most published code uses: beside the other, chosen by PYTHONPATH.
LEGACY_VERSION := 0.0.0.0.14
LEGACY := .venv/spikingjelly-$(LEGACY_VERSION)
LEGACY_OPS := kernel multistep operators reference surrogate

# Neither the tests nor the demonstration may ask a model hub for anything.
export HF_HUB_OFFLINE := 1

.DELETE_ON_ERROR:
.PHONY: test test-legacy demo bench docs docs-serve lint clean

test: lint
	$(PYTEST)
	$(MAKE) test-legacy

# What touches SpikingJelly, once more with its old release; the report's header names the versions.
test-legacy: $(LEGACY)/.ready
	PYTHONPATH=$(CURDIR)/$(LEGACY) $(PYTEST) tests/neurons $(LEGACY_OPS:%=tests/ops/test_%.py) tests/interop \
		tests/examples/test_digits.py

demo: $(READY)
	$(BIN)/python examples/mar/train.py --preset demo output_dir=runs/demo

# The neurons against their peers: single calls, then everything that docs/benchmarks.md shows (ten minutes, no other load).
bench: .venv/.ready-bench
	THP_MEM_ALLOC_ENABLE=1 $(BIN)/python -m pytest benchmarks/test_neurons.py --benchmark-columns=median,iqr,rounds
	$(BIN)/python benchmarks/compare.py --output runs/comparison.json

# The site, in site/, with its notebooks executed (two minutes); docs-serve shows it at a local address and follows changes.
# The theme prints a notice about another project's plans unless it is told not to.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1
docs: $(READY)
	$(BIN)/mkdocs build --strict

docs-serve: $(READY)
	SPIKELM_EXECUTE_NOTEBOOKS=false $(BIN)/mkdocs serve

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first and pinned, so that no other package chooses it; spikingjelly last and alone, because its own
# requirements would replace torch (docs/install.md). The stamp is written when everything is in place.
$(READY): setup.cfg pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c '$(MINIMUM)' 2>/dev/null || { echo "error: no Python 3.11 or newer with venv and pip was found \
	(tried: $(or $(PYTHON),python3 python3.13 python3.12 python3.11)); install one or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[hf,test,docs]'
	$(PIP) install -c constraints.txt --no-deps spikingjelly
	@touch $@

.venv/.ready-bench: $(READY)
	$(PIP) install -c constraints.txt -e '.[bench]'
	@touch $@

$(LEGACY)/.ready: | $(READY)
	$(PIP) install --no-deps --upgrade --target $(LEGACY) spikingjelly==$(LEGACY_VERSION)
	@touch $@
