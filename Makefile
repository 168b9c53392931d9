# Everything is set up on first use: `make demo` and `make test` work in a fresh checkout.

VENV ?= .venv
NP ?= 2
FRAMEWORK ?= torch
demo_torch := examples/gpt_torch/train_hvdlm.py
demo_keras := examples/bigru_keras/train_hvdlm.py

# The first Python that is new enough. A shim (pyenv) may be there for a version that is not: it has to run.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && { echo $$python; break; }; done)

.PHONY: help setup demo test test-image test-lab lint clean

help:
	@echo "make demo       train a small GPT on 2 workers (FRAMEWORK=keras: a bidirectional GRU; NP=4: four workers)"
	@echo "make test       lint, types and tests"
	@echo "make test-lab   tests on several (virtual) hosts; needs root"
	@echo "make test-image builds the container image and runs the demo in two containers; needs root, about 5 minutes"
	@echo "make lint       lint and types"
	@echo "make setup      only the set-up"
	@echo "make clean      remove the set-up and what runs left; built wheels stay in ~/.cache/hvdlm"

setup:
	@test -n "$(PYTHON)" || { echo "no Python 3.10 or later: sudo apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) hvdlm/build/bootstrap.py --venv $(VENV)

demo: setup
	@test -n "$(demo_$(FRAMEWORK))" || { echo "FRAMEWORK=$(FRAMEWORK): allowed are torch and keras" >&2; exit 1; }
	$(VENV)/bin/hvdlm run -np $(NP) --compression fp16 --partition hash $(demo_$(FRAMEWORK))

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: lint
	$(VENV)/bin/python -m pytest

# Exit code 5 is pytest's for "nothing to run".
test-lab: setup
	@test "$$(id -u)" = 0 || { echo "make test-lab needs root: sudo make test-lab" >&2; exit 1; }
	@command -v ip >/dev/null && command -v ssh >/dev/null && test -x /usr/sbin/sshd \
		&& command -v slurmctld >/dev/null && command -v munged >/dev/null \
		|| { apt-get update -qq && apt-get install -y -qq --no-install-recommends \
			iproute2 openssh-client openssh-server slurm-wlm munge; }
	@test -x $(VENV)/mpich/bin/mpiexec || $(VENV)/bin/python -m pip install -q --prefix $(abspath $(VENV))/mpich mpich
	TEST_SPARK_MASTER='local-cluster[2,1,1024]' $(VENV)/bin/python -m pytest -m lab || test $$? = 5

test-image: setup
	@test "$$(id -u)" = 0 || { echo "make test-image needs root: sudo make test-image" >&2; exit 1; }
	@command -v buildah >/dev/null && command -v debootstrap >/dev/null && command -v ip >/dev/null && test -x /usr/sbin/sshd \
		|| { apt-get update -qq && apt-get install -y -qq --no-install-recommends \
			buildah debootstrap iproute2 openssh-client openssh-server; }
	$(VENV)/bin/python -m pytest -m image

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache hvdlm-runs
	find hvdlm tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
