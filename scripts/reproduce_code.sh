#!/usr/bin/env bash
# Magicoder-Evol-Instruct-110K, scored on HumanEval(+) and MBPP(+): every base model and rule; and on what should be retained.
#
#   bash scripts/reproduce_code.sh               variables and arguments: scripts/reproduce/reproduce.sh
#   REDUCED=1 bash scripts/reproduce_code.sh     all stages on a CPU, offline, in minutes
set -euo pipefail
RESULTS=reproduce_code FAMILY=code PROMPTS=magicoder WITH_DPO=''
MODELS=${MODELS:-mistral_7b deepseek_coder_6.7b} TASKS=${TASKS:-code}
RETAINED=${RETAINED-mmlu text_loss}
source "$(dirname "$0")/reproduce/reproduce.sh"
reproduce "$@"
