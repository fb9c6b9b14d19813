# make             lists the targets
# make quickstart  trains a distilled detector, also from a fresh clone
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.14.1 torchvision==0.29.1
TESTS  ?= tests

PY    := $(VENV)/bin/python
PIP   := PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 $(PY) -m pip install
# A step writes its stamp file at its end. After an interruption, `make` repeats only that step.
STAMP := $(VENV)/.fgbg_kd
LINTED := fgbg_kd tools tests docs setup.py

.PHONY: help setup analysis yolox test test-fast lint docs quickstart trees clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20
	@echo "  VENV=path uses the environment at that path and keeps its torch and Detectron2."
	@echo "  PYTHON=python3.x uses another Python."

setup: $(STAMP)-package  ## create .venv with torch, Detectron2 and this package

analysis: $(STAMP)-analysis  ## run setup, and install tidecv for the kinds of errors (tools/compare.py --errors)

yolox: $(STAMP)-yolox  ## run setup, and install pixeltable-yolox for the detector YOLOX

test: analysis yolox  ## run all tests (TESTS=tests/test_x.py runs some)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal $(TESTS)

test-fast: analysis yolox  ## run the fast tests (under one minute)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal -m "not slow" $(TESTS)

lint: setup  ## check style (ruff) and the types of the core (mypy)
	$(PY) -m ruff check $(LINTED)
	$(PY) -m ruff format --check $(LINTED)
	$(PY) -m mypy

docs: $(STAMP)-docs  ## build the site into build/docs (a warning is an error)
	$(PY) -m sphinx -W --keep-going -b html docs build/docs

quickstart: setup  ## train a teacher, a plain and a distilled student on composed images of digits
	$(PY) tools/quickstart.py digits

trees: setup  ## train the same three detectors on aerial photos of trees
	$(PY) tools/quickstart.py trees

clean:  ## remove caches and build leftovers (keeps .venv and output)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis docs/api
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(STAMP)-venv:
	@p=$(PYTHON); [ ! -x $(PY) ] || p=$(PY); \
	command -v $$p >/dev/null || { echo "$$p: not found; name a Python >= 3.10: make PYTHON=python3.11"; exit 1; }; \
	$$p -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit( \
	f"{sys.executable} is Python {v[0]}.{v[1]}; fgbg_kd needs 3.10 or newer: make PYTHON=python3.11")'
	[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	@touch $@

# An installed torch that works is kept, whatever its version.
$(STAMP)-torch: $(STAMP)-venv
	@$(PY) -c 'import torch, torchvision, importlib.metadata as m; m.version("torchvision")' 2>/dev/null \
	|| { echo "installing $(TORCH) (several GB with CUDA)"; $(PIP) $(TORCH); }
	@$(PIP) -q setuptools wheel ninja
	@touch $@

$(STAMP)-detectron2: $(STAMP)-torch tools/install_detectron2.py
	$(PY) tools/install_detectron2.py
	@touch $@

$(STAMP)-package: $(STAMP)-detectron2 setup.py
	@extras=dev; $(PY) -c 'import cv2' 2>/dev/null || extras=dev,opencv; \
	echo "installing fgbg_kd[$$extras]"; $(PIP) -q --no-build-isolation -e ".[$$extras]"
	@touch $@

$(STAMP)-docs: $(STAMP)-package
	@echo "installing fgbg_kd[docs]"; $(PIP) -q --no-build-isolation -e ".[docs]"
	@touch $@

# --no-deps: tidecv requires opencv-python, which would overwrite the installed OpenCV.
$(STAMP)-analysis: $(STAMP)-package
	@$(PIP) -q --no-build-isolation -e ".[analysis]" && $(PIP) -q --no-deps tidecv==1.0.1
	@touch $@

# --no-deps: pixeltable-yolox requires opencv-python, which would overwrite the installed OpenCV.
$(STAMP)-yolox: $(STAMP)-package
	@$(PIP) -q --no-build-isolation -e ".[yolox]" && $(PIP) -q --no-deps pixeltable-yolox==0.4.3
	@touch $@
