# Everything runs in .venv, which these targets set up by themselves: `make demo` on a machine with make,
# CPython 3.11 or 3.12 and a package index is enough.

DEMO_JOB ?= examples/payments/job.py
DEMO     ?= run $(DEMO_JOB) --fresh
BENCH    ?= tests/benchmarks
VENV     ?= .venv
# Empty: the first of python3.12, python3.11, python3 that fits. Otherwise the one to use.
PYTHON   ?=
# Words for pytest, e.g. make test ARGS="-k kafka -x".
ARGS     ?=

BIN   := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test thorough check bench chaos chaos-kafka venv clean

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "  PYTHON=python3.12 chooses the interpreter, ARGS='-k name' goes to pytest"

demo: venv ## simulate card payments, learn to spot fraud, show how well
	@$(BIN)/millrace $(DEMO)

test: venv ## run all tests, doctests and documents
	@$(BIN)/python -m pytest $(ARGS)

thorough: venv ## run the tests of more variants and crashes that `make test` leaves out
	@$(BIN)/python -m pytest -m thorough $(ARGS)

check: venv ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: venv ## measure speed against a hand-written loop
	@$(BIN)/python -m $(subst /,.,$(BENCH)) $(ARGS)

chaos: venv ## kill runs again and again and compare with undisturbed ones
	@$(BIN)/python -m tests.chaos $(ARGS)

chaos-kafka: venv ## kill jobs between topics, and their broker, and look for each record
	@$(BIN)/python -m tests.integration.chaos $(ARGS)

clean: ## remove .venv and caches
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The venv is good as long as pyproject.toml, this directory and the interpreter asked for are the same.
venv:
	@{ echo 'dir $(CURDIR), python $(PYTHON)'; cat pyproject.toml; } | cmp -s - $(READY) || { $(find_python); $(make_venv); }

# Sets $$python. A name on the PATH may be a shim of another tool that fails when run: so each is run.
define find_python
python=; seen=; bare=; \
for name in $(or $(PYTHON),python3.12 python3.11 python3); do \
    version=$$("$$name" -c 'import platform as p; \
        print("" if p.python_implementation() == "CPython" else p.python_implementation() + " ", \
        p.python_version(), sep="")' 2>/dev/null) || continue; \
    case "$$version" in \
        3.11.*|3.12.*) ;; \
        *) seen="$$name is $$version"; continue ;; \
    esac; \
    if "$$name" -c 'import ensurepip, venv' 2>/dev/null; then python=$$name; break; fi; \
    bare=$${bare:-$$name}; \
done; \
if [ -z "$$python" ]; then \
    if [ -n "$$bare" ]; then \
        echo "millrace needs Python's venv module; $$bare has none. Hint: apt-get install $$bare-venv, or PYTHON=path/to/another/python" >&2; \
    else \
        echo "millrace needs CPython 3.11 or 3.12; $${seen:-$(or $(PYTHON),python3) does not run}. Hint: make $(or $(firstword $(MAKECMDGOALS)),test) PYTHON=/path/to/python3.12" >&2; \
    fi; \
    exit 1; \
fi
endef

define make_venv
echo "Setting up $(VENV) with $$("$$python" --version) (once, about a minute) ..." >&2; \
rm -rf $(VENV) && "$$python" -m venv $(VENV) \
    && $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,parquet]' \
    && { echo 'dir $(CURDIR), python $(PYTHON)'; cat pyproject.toml; } > $(READY) \
    || { echo "millrace could not set up $(VENV); the lines above say why. Hint: is the package index reachable?" >&2; exit 1; }
endef
