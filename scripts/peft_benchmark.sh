#!/usr/bin/env bash
# peft's MetaMathQA benchmark (method_comparison/MetaMathQA): our rules on Llama-3.2-3B by its letter, among its published rows.
#
#   bash scripts/peft_benchmark.sh               on one GPU of 80 GB
#   DRY_RUN=1 bash scripts/peft_benchmark.sh     the plan: commands, memory, hours, disk; nothing is needed for it (or --dry_run)
#   REDUCED=1 bash scripts/peft_benchmark.sh     all stages on a CPU, offline, in minutes
#
# RUNS chooses among: none (SFT, fp32 masters), none_bf16 (SFT as the benchmark's: bf16 weights and moments), rmt, gmt,
# gmt_frozen, mofo, shira and lora (as the benchmark's own). KEEP_RATIO, SEEDS, OUT, DATA_DIR, HUB_DIR, EVAL_ARGS and
# arguments, which go to train.py: as in scripts/reproduce/reproduce.sh. A seed changes nothing where nothing is random, since
# the benchmark does not shuffle: more SEEDS of none, gmt and mofo show the noise of the GPU alone. The model is gated: log in
# by `hf auth login`. Results: OUT/RUN_seedS/{final,eval}, OUT/base, OUT/{report.md,benchmark.md,benchmark.csv}.
# Other learning rates, whatever they are chosen by: RUNS="none gmt" OUT=outputs/peft_2e-5 with `--learning_rate 2e-5`.
set -euo pipefail
for name in MODELS MODEL RULES RULE; do
    [ -z "${!name:-}" ] || { echo "$(basename "$0"): error: $name: RUNS and SEEDS say what is run" >&2; exit 2; }
done
MISSPELT="RUN:RUNS SEED:SEEDS"
CONFIG=configs/peft_llama3.2_3b.yaml
RUNS=${RUNS:-none none_bf16 rmt gmt gmt_frozen mofo shira lora}
RESULTS=peft_benchmark FAMILY=peft MODELS='' RULES=none PROMPTS='' WITH_DPO='' TASKS=gsm8k_peft RETAINED=text_loss
args=()
for word; do if [ "$word" = --dry_run ]; then DRY_RUN=1; else args+=("$word"); fi; done
if [ -n "${DRY_RUN:-}" ]; then
    NPROC=1 OUT=$(mktemp -d) # nothing is run, and nothing stays
    trap 'rm -rf "$OUT"' EXIT
fi
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0} # one GPU: other numbers of processes round otherwise
[ -n "${REDUCED:-}" ] || ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-configs/accelerate/single_gpu.yaml}
source "$(dirname "$0")/reproduce/reproduce.sh"

words_of_run() { # words_of_run RUN SEED: of a training, in the array `words`, without model and output_dir
    local bf16=(--master_dtype bfloat16 --mixed_precision fp32) # all of it is computed in bf16, without autocast
    words=(--config "$CONFIG" --dataset "$OUT/rows.jsonl" --seed "$2")
    case $1 in
        none) words+=(--rule none) ;;
        none_bf16) words+=(--rule none "${bf16[@]}") ;;
        rmt | gmt | mofo) words+=(--rule "$1" --keep_ratio "$KEEP_RATIO") ;;
        gmt_frozen) words+=(--rule gmt --masked_weights frozen --keep_ratio "$KEEP_RATIO") ;;
        # its SHiRA trains r (n + m) of n m weights of each matrix with r = 32: 9,175,040 in all. Its decay is of the change.
        # What is clipped is its trained values alone: the gradient after masking.
        shira) words+=(--rule shira --train_only '*q_proj.weight' '*v_proj.weight' --keep_ratio 0.02604 --clip after
            --learning_rate 3e-4 --weight_decay 0) ;;
        lora) words+=(--rule none --adapter lora --lora_rank 32 --lora_alpha 64 --lora_targets q_proj v_proj
            "${bf16[@]}" --learning_rate 1e-4 --weight_decay 0.1) ;;
        *) refuse "RUNS: unknown word '$1'; known: none none_bf16 rmt gmt gmt_frozen mofo shira lora" ;;
    esac
    words+=(${train_args[@]+"${train_args[@]}"})
}

benchmark() { # its arguments go to train.py
    local base dataset run seed folder planned=() words folders=() few=()
    for run in $RUNS; do words_of_run "$run" 0; done # refuses unknown ones
    if [ -n "${DRY_RUN:-}" ]; then
        for run in $RUNS; do
            words_of_run "$run" 0
            planned+=("$run" "${words[@]//"$OUT"/outputs/$RESULTS}" "$@" --output_dir "outputs/$RESULTS/${run}_seed0" --)
        done
        python scripts/peft_benchmark/plan.py "${planned[@]}"
        return
    fi
    prepare
    [ -z "$REDUCED" ] || few=(--rows 12)
    base=$(here models "$(setting "$CONFIG" model)")
    dataset=$(setting "$CONFIG" dataset)
    dataset=$(here datasets "${dataset%:*}")
    stage rows "$OUT/rows.jsonl" scripts/peft_benchmark/rows.py --dataset "$dataset" --tokenizer "$base" \
        --output "$OUT/rows.jsonl" ${few[@]+"${few[@]}"}
    read -r seed _ <<<"$SEEDS"
    for run in $RUNS; do
        words_of_run "$run" "$seed"
        plan "$OUT/${run}_seed$seed" "${words[@]}" --model "$base" "$@"
    done
    run_plans
    evaluate "$base" "$OUT/base" "" "$RETAINED"
    for seed in $SEEDS; do
        for run in $RUNS; do
            folder=$OUT/${run}_seed$seed
            words_of_run "$run" "$seed"
            train_and_tidy "$folder" "${words[@]}" --model "$base" "$@"
            evaluate "$folder/final" "$folder" "" "$TASKS $RETAINED"
            folders+=("$folder/eval")
        done
    done
    stage report "" scripts/report.py "${folders[@]}" "$OUT/base/eval" --out "$OUT/report.md" --csv "$OUT/report.csv" \
        --figures "$OUT" "${drawn[@]}"
    stage benchmark "" scripts/peft_benchmark/report.py "${folders[@]}" "$OUT/base/eval" --out "$OUT"
}

benchmark ${args[@]+"${args[@]}"}
