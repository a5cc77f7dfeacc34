#!/usr/bin/env bash
# Lint, formatting and the test suite, a test process for each core. Arguments go to pytest.
#
#   bash scripts/test.sh            everything, and five deliberate breakages that must be noticed
#   bash scripts/test.sh --quick    before each commit: without what starts programs or takes long,
#                                   and one case of each test
#   bash scripts/test.sh --torch 2.10.0    --quick with that PyTorch, in .venv-torch-2.10.0: so is a
#                                          version tried before requirements.txt promises it

version=""
if [ "${1:-}" = --torch ]; then
    version="${2:?a version is missing: --torch 2.10.0}"
    shift 2
    set -- --quick "$@"
fi
source "$(dirname "$0")/environment.sh" requirements-dev.txt ${version:+"$version"}

ruff check
ruff format --check
# A module stays in one process, which makes its fixtures once; conftest.py puts the longest first.
# Large pages: small networks take new memory more than they compute in it.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --maxprocesses 4 \
    --dist loadfile --no-loadscope-reorder "$@"
