#!/usr/bin/env bash
#SBATCH --job-name=gmt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
# A training over Slurm's machines: sbatch scripts/slurm.sh --config configs/math_mistral_7b.yaml --output_dir outputs/x
# Arguments go to train.py. Submit it from the repository's root, in an environment that has requirements.txt; output_dir has
# to be on a file system that the machines share. Weights, gradients and moments are cut within a machine and copied between
# them; SHARD=16 sbatch ... cuts them over 16 GPUs.
# Fifteen minutes before the time is up Slurm sends USR1: train.py saves and ends, the job is queued again and goes on. A
# checkpoint takes 12 bytes a parameter, and is written and read once in that time: 13B, 156 GB, need 0.35 GB a second.
# A machine that fails also has the job queued again, and preemption where the cluster does so: save_every or
# save_every_minutes says how much that costs. After scancel, submit it again with --resume.
set -euo pipefail

for word in "$@"; do
    case $word in --overwrite*)
        echo "slurm.sh: error: with --overwrite a job that is queued again could not go on: delete the output_dir instead" >&2
        exit 2
        ;;
    esac
done

gpus="${SLURM_GPUS_ON_NODE:-8}"
processes=$((${SLURM_NNODES:-1} * gpus)) shard="${SHARD:-$gpus}"
if ! [[ $shard =~ ^[1-9][0-9]*$ ]] || [ $((processes % shard)) != 0 ]; then
    echo "slurm.sh: error: SHARD=$shard: expected a divisor of $processes, the number of all GPUs" >&2
    exit 2
fi

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
    accelerate launch --config_file configs/accelerate/fsdp2_multinode.yaml \
        --num_machines "$SLURM_NNODES" --num_processes "$processes" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$MAIN_ADDRESS" --main_process_port "${MAIN_PORT:-29500}" \
        --parallelism_config_dp_replicate_size $((processes / shard)) --parallelism_config_dp_shard_size "$shard" \
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
# Without the first word the other machines would wait for hours for one that has failed; the second gives each all cores.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" bash scripts/slurm.sh --this-machine "$@" &
steps=$!
wait_for "$steps"
if [ -n "$stopped" ] && [ "$code" != 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
