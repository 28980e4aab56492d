# Sourced by reproduce_math.sh, reproduce_code.sh and reproduce_general.sh: for each base model and rule train, score, report.
#
# Variables, with their defaults:
#   MODELS, RULES, SEEDS    what is run, e.g. MODELS=mistral_7b RULES="none gmt" SEEDS="0 1 2"; a model is a configs/ file's
#   KEEP_RATIO=0.2          of gmt, rmt and drop (a choice of ours: the paper's value is not known to us)
#   NPROC, ACCELERATE_CONFIG  processes (all GPUs of the machine), and how they are used: one of configs/accelerate/
#                           (fsdp2.yaml, for one process single_gpu.yaml)
#   OUT=outputs/reproduce_...   the results: OUT/MODEL/RULE_seedS/{final,eval}, OUT/MODEL/{base,drop_seedS},
#                           OUT/MODEL/{report.md,report.csv,loss.png}; logs in OUT/logs
#   DATA_DIR                local copies of the benchmarks (laid out as in docs/evaluation.md); empty: the Hub
#   HUB_DIR                 what scripts/download.py has fetched: its models and datasets (of benchmarks it prints what to set);
#                           empty: the Hub
#   TASKS, EVAL_ARGS        what is scored; more words for eval.py, e.g. EVAL_ARGS="--limit 100"
#   RETAINED                what should be kept, scored too, and drawn against the first of TASKS: "mmlu text_loss" in math and
#                           code, and empty (RETAINED=) nothing. text_loss=FILE takes texts of your own; else they are
#                           HUB_DIR/text_loss.jsonl of scripts/download.py, Wikipedia of the Hub, or TyDiQA's of DATA_DIR
#   DPO_ARGS                more words for DPO's trainings (reproduce_general.sh)
#   DRY_RUN=1               plan the trainings that are left, of the first seed, on the real model and data, and stop;
#                           without a GPU say for how many: NPROC=8
#   REDUCED=1               the whole of it on a CPU in minutes, offline: small random models of the same architectures, a
#                           few rows and items, two steps; its scores mean nothing
# Arguments go to train.py, but for DPO's trainings: bash scripts/reproduce_math.sh --learning_rate 1e-5
# The script itself sets: RESULTS (OUT's default is outputs/RESULTS), FAMILY (of configs/), PROMPTS (prompt_format of
# fine-tuned models, or empty), WITH_DPO (or empty).

for name in OUT DATA_DIR HUB_DIR; do # setup.sh changes the folder
    [ -z "${!name:-}" ] || { path=$(realpath -m "${!name}"); printf -v "$name" '%s' "$path"; }
done
[ ! -f "${ACCELERATE_CONFIG:-}" ] || ACCELERATE_CONFIG=$(realpath "$ACCELERATE_CONFIG")
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
source scripts/reproduce/stages.sh

refuse() { echo "$(basename "$0"): error: $*" >&2; exit 2; }

for name in REDUCED DRY_RUN; do case ${!name:-} in '' | 1) ;; *) refuse "$name=${!name}: 1, or not set" ;; esac; done
OUT=${OUT:-outputs/$RESULTS}
RULES=${RULES:-none rmt hft gmt drop} SEEDS=${SEEDS:-0} KEEP_RATIO=${KEEP_RATIO:-0.2}
DATA_DIR=${DATA_DIR:-} HUB_DIR=${HUB_DIR:-} REDUCED=${REDUCED:-} RETAINED=${RETAINED-}
read -ra eval_args <<<"${EVAL_ARGS:-}"
read -ra dpo_args <<<"${DPO_ARGS:-}"
train_args=()

# --- what can be refused before anything runs ----------------------------------------------------------------------------
for model in $MODELS; do
    [ -f "configs/${FAMILY}_$model.yaml" ] ||
        refuse "MODELS: unknown word '$model'; known: $(ls configs | sed -n "s/^${FAMILY}_\(.*\)\.yaml$/\1/p" | paste -sd ' ')"
done
for rule in $RULES; do
    case $rule in drop) [[ " $RULES " = *" none "* ]] || refuse "RULES: drop is of the model of rule none: add it" ;; esac
done
for seed in $SEEDS; do [[ $seed =~ ^[0-9]+$ ]] || refuse "SEEDS: expected whole numbers, got '$seed'"; done
[[ $KEEP_RATIO =~ ^[0-9.eE-]+$ ]] || refuse "KEEP_RATIO: expected a number in (0, 1], got '$KEEP_RATIO'"
for word in $RETAINED; do
    [[ " $TASKS " != *" ${word%%=*} "* ]] || refuse "RETAINED: ${word%%=*} is one of TASKS already: leave it out of one of them"
done
for name in DATA_DIR HUB_DIR; do
    [ -z "${!name}" ] || [ -d "${!name}" ] || refuse "$name=${!name}: no such folder"
done
mkdir -p "$OUT/logs" 2>/dev/null && [ -w "$OUT" ] || refuse "OUT=$OUT: cannot be made or written to"
ours="this script sets it for each run, by its variables (another model: a file of its own in configs/)"
for word; do # what folders are named by, and scoring and drop go by
    case ${word%%=*} in --output[-_]dir | --model | --rule | --seed | --keep[-_]ratio) refuse "${word%%=*}: $ours" ;; esac
done
for word in ${dpo_args[@]+"${dpo_args[@]}"}; do
    case ${word%%=*} in --output[-_]dir | --model | --rule | --seed) refuse "DPO_ARGS: ${word%%=*}: $ours" ;; esac
done
for word in ${eval_args[@]+"${eval_args[@]}"}; do
    case ${word%%=*} in --output[-_]dir | --model | --tasks) refuse "EVAL_ARGS: ${word%%=*}: $ours" ;; esac
done
for pair in ${MISSPELT:-MODEL:MODELS RULE:RULES SEED:SEEDS}; do # else days of the defaults
    name=${pair%:*} right=${pair#*:}
    given=$(declare -p "$right" 2>/dev/null) || true # exported: by the caller
    [ -z "${!name:-}" ] || [[ $given = "declare -x"* ]] || refuse "$name=${!name}: the variable is called $right"
done

# --- the hardware, or the reduced world ----------------------------------------------------------------------------------
if [ -n "$REDUCED" ]; then
    export HF_HUB_OFFLINE=1
    NPROC=${NPROC:-1} ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-configs/accelerate/cpu.yaml}
    HUB_DIR=$OUT/reduced
    DATA_DIR=${DATA_DIR:-$OUT/reduced/benchmarks}
    train_args=(--max_steps 2 --global_batch_size 4 --mixed_precision fp32)
    eval_args=(--limit 2 --dtype float32 ${eval_args[@]+"${eval_args[@]}"})
else
    NPROC=${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count())')}
    [ "$NPROC" != 0 ] || refuse "no GPU here; REDUCED=1 tries everything on a CPU, NPROC=N and ACCELERATE_CONFIG say otherwise"
    if [ "$NPROC" = 1 ]; then hardware=single_gpu; else hardware=fsdp2; fi
    ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-configs/accelerate/$hardware.yaml}
fi
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || refuse "NPROC: expected a number of processes, got '$NPROC'"
[ -f "$ACCELERATE_CONFIG" ] || refuse "ACCELERATE_CONFIG=$ACCELERATE_CONFIG: no such file"
texts='' # of text_loss, where scripts/download.py has fetched them
[ ! -f "$HUB_DIR/text_loss.jsonl" ] || texts=$HUB_DIR/text_loss.jsonl
drawn=() # words for scripts/report.py: what was learnt against what was retained
[ -z "$RETAINED" ] || drawn=(--new "${TASKS%% *}" --retained $RETAINED)
launch=(accelerate launch --config_file "$ACCELERATE_CONFIG" --num_processes "$NPROC")
# The launcher of several processes would answer Ctrl-C itself, and give the training too little time to save.
[ "$NPROC" = 1 ] || launch=(setsid "${launch[@]}")

# --- the parts ------------------------------------------------------------------------------------------------------------

setting() { sed -n "s/^$2: *\([^ #]*\).*/\1/p" "$1"; } # setting FILE KEY: its value in a YAML of configs/

here() { # here KIND NAME: the local copy of a model or dataset of the Hub, if HUB_DIR has it
    if [ -n "$HUB_DIR" ] && [ -d "$HUB_DIR/$1/$2" ]; then echo "$HUB_DIR/$1/$2"; else echo "$2"; fi
}

words_of() { # words_of CONFIG RULE SEED: the words of a training, in the array `words`, without model and output_dir
    words=(--config "$1" --dataset "$(here datasets "$(setting "$1" dataset)")" --rule "$2" --seed "$3")
    case $2 in none | hft) ;; *) words+=(--keep_ratio "$KEEP_RATIO") ;; esac
    words+=(${train_args[@]+"${train_args[@]}"})
}

train_and_tidy() { # train_and_tidy RUN ARGS...: of a finished run its checkpoints are not needed any more
    train_run "$@"
    rm -rf "$1/checkpoints"
}

evaluate() { # evaluate MODEL FOLDER FORMAT TASKS: scores in FOLDER/eval, of prompts in a format (empty: each task's own)
    local words=() task tasks=() name=${2#"$OUT"/}/eval${3:+_$3}
    [ -z "$DATA_DIR" ] || words=(--data_dir "$DATA_DIR")
    [ -z "$3" ] || words+=(--prompt_format "$3")
    words+=(${eval_args[@]+"${eval_args[@]}"})
    for task in $4; do
        case $task in
            text_loss) tasks+=("$task${texts:+=$texts}") ;;
            bbh) if [ -n "$DATA_DIR" ]; then tasks+=(bbh); else
                score "${name}_bbh" "$1" "$2/eval" --tasks bbh --data_dir "$OUT/bbh" ${words[@]+"${words[@]}"}
            fi ;;
            *) tasks+=("$task") ;;
        esac
    done
    [ ${#tasks[@]} = 0 ] || score "$name" "$1" "$2/eval" --tasks "${tasks[@]}" ${words[@]+"${words[@]}"}
}

fetch_bbh() { # the Hub has BBH's questions, and not its prompts
    [[ -z $DATA_DIR && -z ${DRY_RUN:-} && " $TASKS $RETAINED " = *" bbh "* ]] || return 0
    [ ! -f "$OUT/bbh/bbh/cot-prompts/word_sorting.txt" ] || return 0
    rm -rf "$OUT/bbh"
    git clone -q --depth 1 https://github.com/suzgunmirac/BIG-Bench-Hard "$OUT/bbh/bbh" ||
        refuse "BBH's prompts could not be fetched: set DATA_DIR to a folder of all benchmarks (docs/evaluation.md), or TASKS without bbh"
}

plan() { # plan RUN ARGS...: one more training for the stage plan, in the array `planned`
    local run=$1
    shift
    [ ! -f "$run/final/COMPLETED" ] || return 0
    resume_words "$run"
    planned+=(train.py "$@" --output_dir "$run" ${more[@]+"${more[@]}"} --)
    more=()
}

words_of_drop() { # words_of_drop MODEL BASE SEED: of scripts/merge.py, in the array `words`
    words=(scripts/merge.py drop --base "$2" --tuned "$OUT/$1/none_seed$3/final")
    words+=(--output_dir "$OUT/$1/drop_seed$3/final" --keep_ratio "$KEEP_RATIO")
}

run_plans() { # what train.py and merge.py would refuse comes out before the first training; memory, disk, steps are told
    if [ ${#planned[@]} != 0 ]; then
        export WORLD_SIZE=$NPROC # for these alone: a launcher sets its own
        if grep -q '^distributed_type: FSDP' "$ACCELERATE_CONFIG"; then export ACCELERATE_USE_FSDP=true FSDP_VERSION=2; fi
        stage plan "" scripts/reproduce/dry_runs.py "${planned[@]}"
        unset WORLD_SIZE ACCELERATE_USE_FSDP FSDP_VERSION
    fi
    if [ -n "${DRY_RUN:-}" ]; then
        [ ${#planned[@]} != 0 ] || echo "nothing is left to train"
        exit 0
    fi
}

plan_all() { # the trainings of all models, with the first seed
    local model config base rule seed planned=() words
    read -r seed _ <<<"$SEEDS"
    for model in $MODELS; do
        config=configs/${FAMILY}_$model.yaml
        base=$(here models "$(setting "$config" model)")
        for rule in "${rules[@]}"; do
            words_of "$config" "$rule" "$seed"
            plan "$OUT/$model/${rule}_seed$seed" "${words[@]}" --model "$base" "$@"
        done
        if [[ " $RULES " = *" drop "* ]] && [ ! -f "$OUT/$model/drop_seed$seed/final/drop.json" ]; then
            words_of_drop "$model" "$base" "$seed"
            planned+=("${words[@]}" --)
        fi
        [ -n "$WITH_DPO" ] || continue
        words_of "configs/dpo_$model.yaml" "${rules[0]}" "$seed"
        plan "$OUT/$model/${rules[0]}_dpo_seed$seed" "${words[@]}" --model "$base" ${dpo_args[@]+"${dpo_args[@]}"}
    done
    run_plans
}

one_model() { # one_model MODEL ARGS...: all that is run of a base model, and its report
    local model=$1 config=configs/${FAMILY}_$1.yaml base rule seed run tuned folders=() words
    shift
    base=$(here models "$(setting "$config" model)")
    evaluate "$base" "$OUT/$model/base" "" "$TASKS $RETAINED"
    [ -z "$PROMPTS" ] || evaluate "$base" "$OUT/$model/base" "$PROMPTS" "$TASKS"
    for seed in $SEEDS; do
        for rule in "${rules[@]}"; do
            run=$OUT/$model/${rule}_seed$seed
            words_of "$config" "$rule" "$seed"
            train_and_tidy "$run" "${words[@]}" --model "$base" "$@"
            evaluate "$run/final" "$run" "$PROMPTS" "$TASKS $RETAINED"
            folders+=("$run/eval")
        done
        if [[ " $RULES " = *" drop "* ]]; then
            run=$OUT/$model/drop_seed$seed
            words_of_drop "$model" "$base" "$seed"
            stage "$model/drop_seed$seed/drop" "$run/final/drop.json" "${words[@]}"
            evaluate "$run/final" "$run" "$PROMPTS" "$TASKS $RETAINED"
            folders+=("$run/eval")
        fi
        [ -n "$WITH_DPO" ] || continue
        for rule in "${rules[@]}"; do
            run=$OUT/$model/${rule}_dpo_seed$seed tuned=$OUT/$model/${rule}_seed$seed/final
            words_of "configs/dpo_$model.yaml" "$rule" "$seed"
            train_and_tidy "$run" "${words[@]}" --model "$tuned" ${dpo_args[@]+"${dpo_args[@]}"}
            evaluate "$run/final" "$run" "$PROMPTS" "$TASKS $RETAINED"
            folders+=("$run/eval")
        done
    done
    stage "$model/report" "" scripts/report.py "${folders[@]}" "$OUT/$model/base/eval" \
        --out "$OUT/$model/report.md" --csv "$OUT/$model/report.csv" --figures "$OUT/$model" ${drawn[@]+"${drawn[@]}"}
}

prepare() { # what is needed before the first plan
    fetch_bbh
    [ -z "$REDUCED" ] || stage reduced "$OUT/reduced/COMPLETED" scripts/reproduce/reduced.py "$OUT/reduced"
}

reproduce() { # everything; its arguments go to train.py
    local model rule
    rules=()
    for rule in $RULES; do [ "$rule" = drop ] || rules+=("$rule"); done
    prepare
    plan_all "$@"
    for model in $MODELS; do one_model "$model" "$@"; done
}
