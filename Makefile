# Every target sets up what it needs in .venv (OpenMMLab's in .venv-openmmlab) and runs there.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
PIP := $(VENV)/bin/pip install --disable-pip-version-check -q -c $(VENV)/constraints.txt
# What is installed as "torch": another version or index line for those who want one. Its names are not constrained.
TORCH ?= torch torchvision
FREE := $(if $(filter file,$(origin TORCH)),,torch torchvision triton setuptools $(subst ",,$(TORCH)))
SOURCES := $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \))
PYTHONS := $(shell find kdops integrations -name '*.py')
# OpenMMLab's environment, and a wheel of mmcv for it: without one, mmcv is built from source.
MMVENV := .venv-openmmlab
MMCV_WHEEL ?=
# Arguments for the program behind a target: make demo ARGS="--epochs 4"
ARGS ?=
# Processes that share the tests: one for each core, 8 at most.
WORKERS := -n auto --maxprocesses 8 --dist worksteal
# How long make fuzz runs.
SECONDS ?= 600

.PHONY: demo test test-ptx test-openmmlab fuzz bench lint clean help

help:
	@echo "make demo            distil a real detector and write a report      (ARGS=--help lists the options)"
	@echo "make test            run the tests                                  (ARGS is given to pytest)"
	@echo "make fuzz            random calls against the reference (SECONDS=600, ARGS=\"--seed 1\"); misses go to runs/fuzz"
	@echo "make test-ptx        all kernels as PTX on every architecture       (ARGS=\"--architectures 90 --seeds 3\", pytest's too)"
	@echo "make bench           measure, and write the CSV, the table, the plots"
	@echo "make test-openmmlab  run the tests on MMRazor, MMYOLO and MMDetection (MMCV_WHEEL=path: a built mmcv)"
	@echo "make lint            ruff"

demo: $(VENV)/.ready
	$(VENV)/bin/python -m kdops.integrations.pytorch.demo $(ARGS)

test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest $(WORKERS) $(ARGS)

test-ptx: $(VENV)/.ready
	PYTHONPATH=tests $(VENV)/bin/python -m ptx.long $(ARGS)

test-openmmlab: $(MMVENV)/.ready
	$(MMVENV)/bin/pytest -c tests/openmmlab/pytest.ini tests/openmmlab $(ARGS)

fuzz: $(VENV)/.ready
	PYTHONPATH=. $(VENV)/bin/python tests/fuzz.py --seconds $(SECONDS) $(ARGS)

bench: $(VENV)/.ready
	$(VENV)/bin/python -m benchmarks.run $(ARGS)
	$(VENV)/bin/python -m benchmarks.report --readme

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .

$(VENV)/.packages: constraints.txt
	$(PYTHON) -m venv $(VENV)
	echo '$(FREE)' | tr ' ' '\n' | sed -nE 's/^([A-Za-z][A-Za-z0-9_.-]*).*/^\1==/p' | grep -vif - constraints.txt \
		> $(VENV)/constraints.txt
	$(PIP) -U pip "setuptools>=77" wheel ninja
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/.ready: $(VENV)/.packages pyproject.toml setup.py $(SOURCES)
	$(PIP) --no-build-isolation -e ".[demo,test]" $(TORCH)
	@touch $@

$(MMVENV)/.ready: tests/openmmlab/setup.sh integrations/requirements-openmmlab.txt pyproject.toml setup.py $(SOURCES) $(PYTHONS)
	PYTHON=$(PYTHON) bash tests/openmmlab/setup.sh $(MMVENV) "$(MMCV_WHEEL)"
	@touch $@

clean:
	rm -rf build dist *.egg-info kdops/*.so .venv .venv-openmmlab
