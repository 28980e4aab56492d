#!/usr/bin/env bash
# The real GSM8K files through training and scoring, offline, on a CPU, with a small random model (its score is about 0).
#
#   bash scripts/gsm8k_from_scratch.sh DIR     # DIR/gsm8k/train.jsonl[.gz] and DIR/gsm8k/test.jsonl
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: bash scripts/gsm8k_from_scratch.sh DIR, where DIR/gsm8k holds train and test" >&2; exit 2; }
data=$(realpath "$1"); shift
source "$(dirname "$0")/setup.sh"
export HF_HUB_OFFLINE=1
out=outputs/gsm8k_from_scratch
phase() { local start=$SECONDS; echo "== $1"; shift; "$@"; echo "== took $((SECONDS - start)) s"; }

phase "rows" python scripts/quickstart/gsm8k_to_metamath.py "$data" $out/train.jsonl
phase "model" python scripts/quickstart/make_model.py $out/train.jsonl $out/random_model
phase "training" accelerate launch --config_file configs/accelerate/cpu.yaml \
    train.py --config configs/gsm8k_from_scratch.yaml --overwrite "$@"
phase "scoring" accelerate launch --config_file configs/accelerate/cpu.yaml \
    eval.py --model $out/run/final --tasks gsm8k --data_dir "$data" --output_dir $out/eval --dtype float32 --overwrite
