#!/usr/bin/env bash
# Lint, formatting and the whole test suite. Arguments go to pytest.

source "$(dirname "$0")/environment.sh" requirements-dev.txt

ruff check
ruff format --check
python -m pytest "$@"
