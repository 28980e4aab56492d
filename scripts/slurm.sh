#!/usr/bin/env bash
#SBATCH --job-name=gmt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
# A training over Slurm's machines: sbatch scripts/slurm.sh --config configs/math_mistral_7b.yaml --output_dir outputs/x
# Arguments go to train.py. Submit it from the repository's root, in an environment that has requirements.txt.
# Five minutes before the time is up Slurm sends USR1: train.py saves and ends, the job is queued again and goes on.
# (A machine that fails also has the job queued again: save_every or save_every_minutes says how much that costs.)
set -euo pipefail

wait_for() { # wait for a process to its end: a trapped signal ends `wait` early; the exit code is put into $code
    while true; do
        code=0
        wait "$1" || code=$?
        kill -0 "$1" 2>/dev/null || return 0
    done
}

run_has_begun() { # a job that ended while it loaded has written nothing yet: train.py would refuse --resume
    local word before='' output_dir=''
    for word in "$@"; do
        case $word in --output_dir=*) output_dir=${word#*=} ;; esac
        if [ "$before" = --output_dir ]; then output_dir=$word; fi
        before=$word
    done
    [ -z "$output_dir" ] || [ -e "$output_dir/run.json" ] # if the YAML file names it: most likely
}

if [ "${1:-}" = --this-machine ]; then # what srun starts once on each machine
    shift
    # The launcher hands no signal on, and would die of this one: its children, the training processes, get it.
    trap 'pkill -USR1 -P "$launcher" || true' USR1
    gpus="${SLURM_GPUS_ON_NODE:-8}"
    accelerate launch --config_file configs/accelerate/fsdp2_multinode.yaml \
        --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * gpus)) --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$MAIN_ADDRESS" --main_process_port "${MAIN_PORT:-29500}" \
        --parallelism_config_dp_replicate_size "$SLURM_NNODES" --parallelism_config_dp_shard_size "$gpus" \
        train.py "$@" &
    launcher=$!
    wait_for "$launcher"
    exit "$code"
fi

cd "${SLURM_SUBMIT_DIR:-$PWD}"
machines="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
export MAIN_ADDRESS="${machines%%$'\n'*}"
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && run_has_begun "$@"; then set -- "$@" --resume; fi

stopped=
trap 'stopped=1; kill -USR1 "$steps" 2>/dev/null || true' USR1 # srun hands it on to the machines
srun bash scripts/slurm.sh --this-machine "$@" &
steps=$!
wait_for "$steps"
if [ -n "$stopped" ] && [ "$code" != 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
