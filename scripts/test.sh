#!/usr/bin/env bash
# Lint, formatting and the whole test suite, a test process for each core. Arguments go to pytest.

source "$(dirname "$0")/environment.sh" requirements-dev.txt

ruff check
ruff format --check
OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --maxprocesses 4 "$@"
