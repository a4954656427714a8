#!/usr/bin/env bash
# Install what the tests need, then lint and test: bash scripts/check.sh [pytest arguments]
#
# Example: bash scripts/check.sh tests/test_config.py -x
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
case "${1:-}" in -h | --help) sed -n '2,/^set/{/^#/p}' "$0" | cut -c3-; exit 0 ;; esac
REQUIREMENTS=requirements-dev.txt source scripts/env.sh
python -m ruff check .
python -m ruff format --check .
# A process of one thread on each core: threads that wait for each other would take longer.
export OMP_NUM_THREADS=1
exec python -m pytest -n auto --dist loadfile "$@"
