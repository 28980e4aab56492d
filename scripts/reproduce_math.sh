#!/usr/bin/env bash
# MetaMathQA, scored on GSM8K and MATH: every base model and rule; and on what should be retained.
#
#   bash scripts/reproduce_math.sh               variables and arguments: scripts/reproduce/reproduce.sh
#   REDUCED=1 bash scripts/reproduce_math.sh     all stages on a CPU, offline, in minutes
set -euo pipefail
RESULTS=reproduce_math FAMILY=math PROMPTS='' WITH_DPO=''
MODELS=${MODELS:-mistral_7b llama3_8b} TASKS=${TASKS:-math}
RETAINED=${RETAINED-mmlu text_loss}
source "$(dirname "$0")/reproduce/reproduce.sh"
reproduce "$@"
