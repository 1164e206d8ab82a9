# make book: set up, run the main job, build the book.  make test: set up, run the tests.
PYTHON ?= python3
VENV ?= .venv
PROFILE ?= quick
JOBS ?= 2
# more optional dependencies, e.g. EXTRAS=,peers for the cross-checks with bm3d (non-commercial licence) and aspire (GPL)
EXTRAS ?=
BOOK_TABLES ?= zhang2024 tang2022
# `make book` runs one structure, and every method once; committed records fill the rest of the tables.
# `make book ALL=1` runs everything (about three times as long).
ALL ?=
# the Python of an offline GPU node, and what it has beside torch (HAVE= collects everything but torch)
PY ?= 3.12
HAVE ?= numpy scipy matplotlib
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: book test lab setup lint wheelhouse clean

book: $(READY)
ifeq ($(ALL),)
	@$(BIN)/cryobench run zhang2024 --specimen channel --profile $(PROFILE) --jobs $(JOBS)
	@$(BIN)/cryobench run tang2022 --specimen channel --method gan gan-perceptual bilateral gaussian lowpass mean --profile $(PROFILE) --jobs $(JOBS)
else
	@$(BIN)/cryobench run $(BOOK_TABLES) --profile $(PROFILE) --jobs $(JOBS)
endif
	@$(BIN)/cryobench table $(BOOK_TABLES) --profile $(PROFILE)
	@$(BIN)/cryobench book --profile $(PROFILE)

# two files at a time, one thread each: networks this small gain nothing from a second one
test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lab: $(READY)
	@$(BIN)/jupyter lab notebooks

setup: $(READY)

# An NVIDIA GPU gets the CUDA build of torch. Elsewhere the small CPU build is tried first: pip finds it where a
# package index or folder with it is configured (see README), else it falls back to the default build.
$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once; a few minutes) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)
	@torch=$$(grep '^torch==' constraints.txt); \
	if ! command -v nvidia-smi >/dev/null 2>&1 && [ "$$(uname -s)" = Linux ]; then \
	  $(BIN)/python -m pip install -q "$$torch+cpu" 2>/dev/null || $(BIN)/python -m pip install -q "$$torch"; \
	else $(BIN)/python -m pip install -q "$$torch"; fi
	@$(BIN)/python -m pip install -q -c constraints.txt -e ".[book,lab,test,dev$(EXTRAS)]"
	@touch $@

lint: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# for tools/full_run.sh on a node without a network
wheelhouse: $(READY)
	@$(BIN)/python tools/wheelhouse.py wheelhouse --python $(PY) --have $(HAVE)

clean:
	rm -rf $(VENV) book/_build results/*/quick results/*/smoke
