#!/usr/bin/env bash
# Tulu V2, then DPO on UltraFeedback, scored on MMLU, GSM8K, BBH, TyDiQA, TruthfulQA and HumanEval: every base model and rule.
#
#   bash scripts/reproduce_general.sh               variables and arguments: scripts/reproduce/reproduce.sh
#   REDUCED=1 bash scripts/reproduce_general.sh     all stages on a CPU, offline, in minutes
set -euo pipefail
RESULTS=reproduce_general FAMILY=general PROMPTS=tulu WITH_DPO=1
MODELS=${MODELS:-llama2_7b llama2_13b} TASKS=${TASKS:-mmlu gsm8k_8shot bbh tydiqa truthfulqa humaneval_pass10}
source "$(dirname "$0")/reproduce/reproduce.sh"
reproduce "$@"
