#!/usr/bin/env bash
# Measure the GPU of this machine, and check that the method runs right on it, in at most ten minutes: results/gpu.json.
# bash scripts/gpu_check.sh --tiny does all of it at its smallest on a CPU. Installs nothing: it takes what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ] && [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
exec "$(command -v python || command -v python3)" scripts/bench/gpu_check.py "$@"
