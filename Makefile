# SPDX-License-Identifier: GPL-2.0-or-later
#
# The one door to the project. On a Debian machine with Python 3.11 and make, each target first installs what it lacks
# (Debian packages with apt-get, as root or through sudo; Python packages into .venv), asks nothing, and then runs.
#
# make run      what this is about: a hypervisor in a hypervisor, three levels on one modelled processor
# make test     everything that must hold: lint type layers docs guests unit hdl
# make unit     the Python tests alone; PYTEST_ARGS="-k paging" is passed on
# make hdl      the hardware description against the model, and the proofs
# make hostile  10,000 hostile programs; HOSTILE_ARGS="--first 5000 --minimize" is passed on
# make bench    speed and memory, as ratios against other emulators when they are installed
# make golden   regenerate the recorded traces; read the difference before committing it
# make wheel    dist/*.whl with the guest images inside
# make clean    forget everything that was built; the virtual environment stays

PYTHON      ?= python3
VENV        ?= .venv
PYTEST_ARGS ?=
HOSTILE_ARGS ?=
BIN         := $(VENV)/bin
export DEBIAN_FRONTEND := noninteractive
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: run test lint type layers unit docs hdl hostile bench golden wheel guests clean format

run: $(VENV)/.installed guests
	$(BIN)/vtx run nested

test: lint type layers docs unit hdl

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(VENV)/.installed-test
	$(BIN)/mypy

layers: $(VENV)/.installed-test
	$(BIN)/lint-imports --no-logo

unit: $(VENV)/.installed-test $(VENV)/.debian-bochs guests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

hdl: $(VENV)/.installed-test $(VENV)/.debian-hdl
	$(BIN)/python -m pytest hdl_tests

hostile: $(VENV)/.installed-test guests
	$(BIN)/python tests/hostile $(HOSTILE_ARGS)

bench: $(VENV)/.installed guests
	$(BIN)/vtx bench

golden: $(VENV)/.installed-test guests
	$(BIN)/python -m pytest tests/golden --update-golden

wheel: $(VENV)/.installed guests
	rm -rf build
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

guests: $(VENV)/.debian
	$(MAKE) --silent --no-print-directory -C guests install

clean:
	$(MAKE) --silent --no-print-directory -C guests clean
	rm -rf build dist docs/_build vtx/images hdl_tests/sim_build

# ---- what the targets need. A stamp in .venv says that a step was done and is newer than what it depends on.

# $(call debian,TEST,PACKAGES): install Debian packages unless the shell command TEST succeeds.
AS_ROOT = $$(test "$$(id -u)" = 0 || echo sudo --preserve-env=DEBIAN_FRONTEND)
debian = $(1) >/dev/null 2>&1 || { $(AS_ROOT) apt-get -q update && $(AS_ROOT) apt-get -q -y install --no-install-recommends $(2); }

HAS_VENV    := $(PYTHON) -c 'import ensurepip, venv'
HAS_HEADERS := $(PYTHON) -c 'import os, sysconfig; os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))'
HAS_GCC     := echo 'int main(void) { return 0; }' | gcc -x c -o /dev/null -

$(VENV)/.debian:
	@$(call debian,$(HAS_VENV),python3-venv)
	@$(call debian,$(HAS_HEADERS),python3-dev)
	@$(call debian,$(HAS_GCC),gcc libc6-dev)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.debian-hdl: | $(VENV)/.debian
	@$(call debian,command -v iverilog,iverilog)
	@touch $@

# Tests that compare with Bochs skip where it cannot be had.
$(VENV)/.debian-bochs: | $(VENV)/.debian
	-@$(call debian,command -v bochs,bochs bochs-term)
	@touch $@

PACKAGE := pyproject.toml setup.py vtx/engine/_blockclock.c

$(VENV)/.installed: $(PACKAGE) | $(VENV)/.debian
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: $(PACKAGE) hdl_tests/requirements.txt | $(VENV)/.debian
	$(BIN)/pip install --quiet --editable '.[test]' --requirement hdl_tests/requirements.txt
	@touch $(VENV)/.installed $@

$(VENV)/.installed-docs: $(PACKAGE) | $(VENV)/.debian
	$(BIN)/pip install --quiet --editable '.[docs]'
	@touch $(VENV)/.installed $@
