#!/usr/bin/env bash
# How scores depend on keep_ratio: one configuration with rule gmt at several, and the curve.
#
#   CONFIG=configs/math_mistral_7b.yaml KEEP_RATIOS="0.05 0.2 1.0" bash scripts/sweep_keep_ratio.sh
#
# Results: OUT/gmt_RATIO_seedS/{final,eval}, OUT/{report.md,sweep.csv,sweep.png}. KEEP_RATIOS and CONFIG apart, variables
# and arguments are those of scripts/reproduce/reproduce.sh: SEEDS, NPROC, ACCELERATE_CONFIG, OUT, DATA_DIR, TASKS, REDUCED, ...
set -euo pipefail
for name in MODELS RULES RULE KEEP_RATIO; do
    [ -z "${!name:-}" ] || { echo "$(basename "$0"): error: $name: CONFIG, KEEP_RATIOS and SEEDS say what is run" >&2; exit 2; }
done
MISSPELT="MODEL:CONFIG SEED:SEEDS"
CONFIG=${CONFIG:-configs/math_mistral_7b.yaml} KEEP_RATIOS=${KEEP_RATIOS:-0.05 0.1 0.2 0.4 0.6 0.8 1.0}
[ ! -f "$CONFIG" ] || CONFIG=$(realpath "$CONFIG")
RESULTS=sweep_$(basename "$CONFIG" .yaml) FAMILY=sweep MODELS='' WITH_DPO=''
case $(basename "$CONFIG") in
    code_*) PROMPTS=magicoder TASKS=${TASKS:-code} ;;
    general_* | dpo_*) PROMPTS=tulu TASKS=${TASKS:-mmlu gsm8k_8shot bbh tydiqa truthfulqa humaneval_pass10} ;;
    *) PROMPTS='' TASKS=${TASKS:-math} ;;
esac
source "$(dirname "$0")/reproduce/reproduce.sh"

sweep() {
    local base seed planned=() words folders=() run
    [ -f "$CONFIG" ] || refuse "CONFIG=$CONFIG: no such file"
    prepare
    base=$(here models "$(setting "$CONFIG" model)")
    read -r seed _ <<<"$SEEDS"
    for KEEP_RATIO in $KEEP_RATIOS; do
        words_of "$CONFIG" gmt "$seed"
        plan "$OUT/gmt_${KEEP_RATIO}_seed$seed" "${words[@]}" --model "$base" "$@"
    done
    run_plans
    for KEEP_RATIO in $KEEP_RATIOS; do
        for seed in $SEEDS; do
            run=$OUT/gmt_${KEEP_RATIO}_seed$seed
            words_of "$CONFIG" gmt "$seed"
            train_and_tidy "$run" "${words[@]}" --model "$base" "$@"
            evaluate "$run/final" "$run" "$PROMPTS" "$TASKS $RETAINED"
            folders+=("$run/eval")
        done
    done
    stage report "" scripts/report.py --sweep "${folders[@]}" --csv "$OUT/sweep.csv" --out "$OUT/report.md"
}

sweep "$@"
