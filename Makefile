# Two commands do everything on a fresh machine: `make demo` and `make test`. Both are safe to run twice.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help demo test test-all lint wheel-check install lock clean

# The first Python that is 3.11 or newer; override with `make PYTHON=/path/to/python3.11 ...`
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest

help:
	@echo "make demo      install, reconstruct a real CT slice, say where to look"
	@echo "make test      lint, tests, and a check of the built wheel"
	@echo "make test-all  the same with slow and real-data tests"
	@echo "make lint      ruff, codespell, mypy"

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "deft_med needs Python 3.11 or newer and found none: install it, or say make PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual environment: install its venv package (Debian: apt install python3-venv)"; exit 2; }
	@echo "installing into $(VENV): minutes the first time, once"
	@$(PIP) install --quiet "$$(grep '^torch==' requirements.lock)" "$$(grep '^setuptools==' requirements.lock)"
	@$(PIP) install --quiet -r requirements.lock
	@$(PIP) install --quiet --no-deps --no-build-isolation --config-settings editable_mode=compat -e .  # found from any folder, also the one above
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	@$(BIN)/python -m deft_med.reconstruct --example ct --out demo --overwrite
	@echo "Look at demo/report.html (a browser) or demo/report.png; the DICOM series is in demo/dicom"

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/codespell
	@$(BIN)/mypy

test: lint
	@$(PYTEST)
	@$(MAKE) --no-print-directory wheel-check

test-all: lint
	@$(PYTEST) -m "not gpu"
	@$(MAKE) --no-print-directory wheel-check

# The wheel, installed alone in a second environment that borrows the first one's libraries, runs the example from elsewhere.
wheel-check: $(STAMP)
	@rm -rf build
	@$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	@$(BIN)/python -m venv --without-pip build/env
	@$(PIP) --python build/env/bin/python install --quiet --no-deps build/wheel/deft_med-*.whl
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > "$$(build/env/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/borrowed.pth"
	@root="$$PWD"; elsewhere="$$(mktemp -d)"; trap 'rm -rf "$$elsewhere"' EXIT; cd "$$elsewhere"; \
	"$$root/build/env/bin/python" -c 'import deft_med, operators; assert "build/env" in deft_med.__file__ and "build/env" in operators.__file__, deft_med.__file__'; \
	"$$root/build/env/bin/python" -m deft_med.reconstruct --example ct --method fbp --out example --quiet; test -s example/report.html
	@echo "wheel: built, installed in a second environment, and the example ran from another folder"

# Write requirements.lock from what is installed now.
lock:
	@{ head -n 1 requirements.lock; $(PIP) freeze --all --exclude-editable | grep -v -E '^(pip|wheel|deft)' | sed -E 's/\+cpu//; s/^(nvidia-[^ ]+)$$/\1 ; platform_system == "Linux"/' | sort -f; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

clean:
	@rm -rf build demo .pytest_cache .ruff_cache .mypy_cache *.egg-info
