#!/usr/bin/env bash
# DPO on the quickstart's fine-tuned model, a minute on 2 cores: bash scripts/quickstart_dpo.sh   (runs quickstart.sh first)
set -euo pipefail
bash "$(dirname "$0")/quickstart.sh"
source "$(dirname "$0")/setup.sh"
python scripts/quickstart/dpo.py outputs/quickstart
