#!/usr/bin/env bash
# Set up everything, then lint and tests. Arguments go to pytest: bash scripts/test.sh -m slow; ... tests/test_gmt.py
set -euo pipefail
MORE_REQUIREMENTS=requirements-dev.txt source "$(dirname "$0")/setup.sh"
bash scripts/install_sandbox.sh
ruff check .
ruff format --check -q . || { echo "run: ruff format ." >&2; exit 1; }
exec python -m pytest -q -rs -n 2 --dist worksteal "$@" # two tests at a time
