#!/usr/bin/env bash
# Set up everything, then lint and tests. Arguments go to pytest: bash scripts/test.sh -m slow; ... tests/test_gmt.py
set -euo pipefail
[ -z "${GMT_DATA_DIR:-}" ] || GMT_DATA_DIR=$(realpath "$GMT_DATA_DIR") # setup.sh changes the folder
MORE_REQUIREMENTS=requirements-dev.txt source "$(dirname "$0")/setup.sh"
bash scripts/install_sandbox.sh
ruff check .
ruff format --check -q . || { echo "run: ruff format ." >&2; exit 1; }
# Two tests at a time. Threads that wait for others sleep: spinning, those of one process would keep the other's from the
# cores, and make both some 40 times slower.
export OMP_WAIT_POLICY=passive
exec python -m pytest -q -rs --durations=10 -n 2 --dist worksteal "$@"
