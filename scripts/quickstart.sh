#!/usr/bin/env bash
# The main job on a small scale, offline, on a CPU, in minutes: a base model is trained from scratch on old skills, then
# fine-tuned on a new one with each rule, and everything is scored. What is there is reused; a call that was cut goes on.
#
#   bash scripts/quickstart.sh           results in outputs/quickstart
set -euo pipefail
source "$(dirname "$0")/setup.sh"
source scripts/reproduce/stages.sh
export HF_HUB_OFFLINE=1
OUT=outputs/quickstart
launch=(accelerate launch --config_file configs/accelerate/cpu.yaml)
evaluation=(--config configs/quickstart_eval.yaml)

if [ ! -f $OUT/random_model/COMPLETED ]; then stage data "" scripts/quickstart/data.py $OUT; fi
if [ ! -f $OUT/base/final/COMPLETED ]; then rm -rf $OUT/{none,rmt,hft,gmt}{,_eval}; fi # of another base
train_run $OUT/base --config configs/quickstart_base.yaml
score base_eval $OUT/base/final $OUT/base_eval "${evaluation[@]}"
while read -r rule rate ratio; do
    train_run "$OUT/$rule" --config configs/quickstart.yaml --rule "$rule" --learning_rate "$rate" ${ratio:+--keep_ratio "$ratio"}
    score "${rule}_eval" "$OUT/$rule/final" "$OUT/${rule}_eval" "${evaluation[@]}"
done < <(grep -v '^#' configs/quickstart_rates.txt)
stage report "" scripts/quickstart/report.py $OUT
