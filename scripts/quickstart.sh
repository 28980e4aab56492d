#!/usr/bin/env bash
# The main job on a small scale, offline, on a CPU, in minutes: a base model is trained from scratch on old skills, then
# fine-tuned on a new one with each rule, and everything is scored. What is there is reused; a call that was cut goes on.
#
#   bash scripts/quickstart.sh           results in outputs/quickstart
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export HF_HUB_OFFLINE=1
out=outputs/quickstart
launch() { accelerate launch --config_file configs/accelerate/cpu.yaml "$@"; }

# finished RUN: its final model is complete. train RUN ARGS...: start it, or go on with it.
finished() { [ -f "$1/final/COMPLETED" ]; }
train() {
    local run=$1; shift
    if finished "$run"; then echo "== $run is there"; return; fi
    echo "== training $run"
    if [ "$run" = $out/base ]; then rm -rf $out/{none,rmt,hft,gmt}; fi # they were fine-tuned from another base
    if compgen -G "$run/checkpoints/step_*/COMPLETED" >/dev/null; then
        launch train.py "$@" --output_dir "$run" --resume
    elif [ -f "$run/run.json" ]; then
        launch train.py "$@" --output_dir "$run" --overwrite
    else
        launch train.py "$@" --output_dir "$run"
    fi
}
score() { # score MODEL DIR: completions of this very model are kept
    if [ "$2/scores.json" -nt "$1/COMPLETED" ]; then echo "== $2 is there"; return; fi
    echo "== scoring $1"
    launch eval.py --config configs/quickstart_eval.yaml --model "$1" --output_dir "$2" --overwrite # of another model
}

if [ ! -f $out/random_model/COMPLETED ]; then
    echo "== generating problems and a random model"
    python scripts/quickstart_data.py $out
fi
train $out/base --config configs/quickstart_base.yaml
score $out/base/final $out/base_eval
while read -r rule rate ratio; do
    train "$out/$rule" --config configs/quickstart.yaml --rule "$rule" --learning_rate "$rate" ${ratio:+--keep_ratio "$ratio"}
    score "$out/$rule/final" "$out/${rule}_eval"
done < <(grep -v '^#' configs/quickstart_rates.txt)
python scripts/quickstart_report.py $out
