# Everything runs in .venv, which the first target to need it makes. PYTHON chooses the interpreter:
#   make test PYTHON=python3.12
PYTHON ?= python3
TORCH := torch==2.13.0
TRITON := triton==3.7.1; sys_platform == 'linux'
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help install check test bench kernel-report gpu-check lint format clean

help:
	@echo "make install   .venv with fastattn (editable) and everything its tests need"
	@echo "make check     style, and the tests that need no kernels; three minutes on two cores"
	@echo "make test      run the tests; those that need a GPU are skipped without one; ONLY=ops for a part"
	@echo "make bench     run the quick benchmarks on this machine and print the tables"
	@echo "make kernel-report   compile the GPU kernels, without a GPU, and hold them to their budgets"
	@echo "make gpu-check OUT=folder   test and benchmark on a GPU, in less than nine minutes; ONLY=op,op"
	@echo "make lint      ruff check and ruff format --check"
	@echo "make format    let ruff put imports and formatting right"
	@echo "make clean     remove .venv and whatever was built"

install: $(STAMP)

test: $(STAMP)
	$(BIN)/python -m tests $(ONLY)

check: lint
	$(BIN)/python -m tests --plain ops layers models packaging/test_docs.py packaging/test_structure.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks --quick

kernel-report: $(STAMP)
	$(BIN)/python -m tests.kernels.compiled

# In .venv if that is there, else with a torch that PYTHON brings, and then nothing is installed.
gpu-check:
	@if [ -z "$(OUT)" ]; then \
		echo "fastattn: say where to: make gpu-check OUT=folder [ONLY=attention,layer_norm]" >&2; \
		exit 2; \
	fi; \
	if [ ! -e $(STAMP) ] && $(PYTHON) -c "import torch" 2>/dev/null; then \
		python="$(PYTHON)"; \
	else \
		$(MAKE) install && python=$(BIN)/python || exit 1; \
	fi; \
	$$python -m benchmarks.gpu_check "$(OUT)" $(if $(ONLY),--only $(ONLY))

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf .venv build dist *.egg-info fastattn/_C.* fastattn/_build_status.txt

# A torch that is already there (as GPU machines bring it) is used, not replaced. Without a network
# fastattn alone is installed, and what its tests need must be there too.
$(STAMP): $(BIN)/python pyproject.toml setup.py $(wildcard csrc/*)
	@if $(BIN)/python -c "import torch" 2>/dev/null; then \
		echo "fastattn: using the torch that is installed"; \
	else \
		echo "fastattn: installing $(TORCH)"; \
		$(BIN)/python -m pip install "$(TORCH)" "$(TRITON)" || { \
			echo "fastattn: no torch here, and pip could not install $(TORCH);" \
				"connect to a package index, or set PYTHON to an interpreter that has torch >= 2.10"; \
			exit 1; \
		}; \
	fi
	@$(BIN)/python -m pip install -e ".[test]" || { \
		echo "fastattn: pip could not fetch what the tests need;" \
			"installing fastattn alone, with the packages that are already here"; \
		$(BIN)/python -m pip install -e . --no-build-isolation --no-deps; \
	}
	@touch $@

# Python < 3.12 puts an old setuptools into .venv, which would hide the one of the system.
$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { \
		echo "fastattn: needs Python 3.10 or newer, but PYTHON=$(PYTHON) is" \
			"$$($(PYTHON) --version 2>&1)"; \
		exit 1; \
	}
	@$(PYTHON) -c "import venv, ensurepip" 2>/dev/null || { \
		echo "fastattn: $(PYTHON) cannot make virtual environments;" \
			"install its venv module (python3-venv on Debian and Ubuntu)"; \
		exit 1; \
	}
	@if $(PYTHON) -c "$$USABLE_TORCH" 2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages .venv && \
		$(BIN)/python -m pip uninstall --quiet --yes setuptools; \
	else \
		$(PYTHON) -m venv .venv; \
	fi

# Whether a virtual environment made with system packages would find a torch that is new enough. One
# made from within a virtual environment would not: it sees what is below that, not what is in it.
define USABLE_TORCH
import sys, torch
usable = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
sys.exit(not usable or sys.prefix != sys.base_prefix)
endef
export USABLE_TORCH
