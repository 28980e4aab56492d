"""scripts/slurm.sh with stand-ins for Slurm and the launcher, and configs/accelerate as train.py sees them."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT

from common.config import TrainConfig
from common.errors import UserError
from training import backend

STAND_INS = {
    # one task on each of two machines; signals are handed on
    "srun": """
        trap 'kill -USR1 $tasks' USR1
        while [[ $1 == --* ]]; do echo "$1" >>"$OUT/words_of_srun"; shift; done
        for machine in 0 1; do SLURM_NODEID=$machine "$@" & tasks="${tasks:-} $!"; done
        for task in $tasks; do while kill -0 $task 2>/dev/null; do wait $task; code=$?; done; done
        exit $code""",
    "scontrol": """
        if [ "$1" = show ]; then printf 'first\\nsecond\\n'; else echo "$@" >>"$OUT/requeued"; fi""",
    # a launcher that a USR1 would kill, with a training process that lives until it gets one
    "accelerate": """
        echo "$@" >"$OUT/launched.$SLURM_NODEID"
        [ -z "${ENDS:-}" ] || exit 0
        bash -c 'trap "echo saved >$OUT/saved.$SLURM_NODEID; exit 138" USR1; touch "$OUT/ready.$SLURM_NODEID"
                 for i in $(seq 200); do sleep 0.1; done' &
        wait $! || exit 1""",
}


def submit(tmp_path: Path, *args: str, **env: str) -> subprocess.Popen:
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "x[1-2]", "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4"}
    slurm["SLURM_CPUS_ON_NODE"] = "64"
    return subprocess.Popen(
        ["bash", "scripts/slurm.sh", *args],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path), **slurm, **env},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_signal_reaches_the_training_processes_and_the_job_is_queued_again(tmp_path):
    job = submit(tmp_path, "--config", "configs/math_mistral_7b.yaml")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not all((tmp_path / f"ready.{i}").exists() for i in (0, 1)):
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    _, err = job.communicate(timeout=30)
    assert all((tmp_path / f"saved.{i}").exists() for i in (0, 1)), err
    assert job.returncode == 1 and (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert (tmp_path / "words_of_srun").read_text() == "--kill-on-bad-exit=1\n--cpus-per-task=64\n"
    for machine in (0, 1):
        words = (tmp_path / f"launched.{machine}").read_text()
        for expected in (
            "launch --config_file configs/accelerate/fsdp2_multinode.yaml",
            f"--num_machines 2 --num_processes 8 --machine_rank {machine} --main_process_ip first",
            "--parallelism_config_dp_replicate_size 2 --parallelism_config_dp_shard_size 4",
            "train.py --config configs/math_mistral_7b.yaml\n",
        ):
            assert expected in words
        args = launch_command_parser().parse_args(words.split()[1:])  # the real launcher knows all of these words
        assert args.machine_rank == machine and args.parallelism_config_dp_shard_size == 4


@pytest.mark.parametrize("form", ["--output_dir {}", "--output_dir={}", ""])
@pytest.mark.parametrize("begun", [True, False])
def test_a_job_that_ends_is_not_queued_again_and_one_that_was_goes_on_if_it_had_begun(tmp_path, form, begun):
    if begun:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.json").touch()
    words = ["--max_steps", "3", *form.format(tmp_path / "run").split()]
    job = submit(tmp_path, *words, SLURM_RESTART_COUNT="1", ENDS="1")
    _, err = job.communicate(timeout=30)
    assert job.returncode == 0, err
    resume = ["--resume"] if begun or not form else []  # without the word, the YAML file names the folder
    assert (tmp_path / "launched.0").read_text().endswith(" ".join(["train.py", *words, *resume]) + "\n")
    assert not (tmp_path / "requeued").exists()


def test_one_copy_over_all_machines(tmp_path):
    job = submit(tmp_path, "--max_steps", "3", ENDS="1", SHARD="8")
    _, err = job.communicate(timeout=30)
    assert job.returncode == 0, err
    words = (tmp_path / "launched.1").read_text()
    assert "--parallelism_config_dp_replicate_size 1 --parallelism_config_dp_shard_size 8" in words


@pytest.mark.parametrize("shard", ["3", "0", "16", "x"])
def test_shards_that_do_not_divide_the_gpus_are_refused_at_once(tmp_path, shard):
    job = submit(tmp_path, ENDS="1", SHARD=shard)
    _, err = job.communicate(timeout=30)
    assert (
        job.returncode == 2
        and err == f"slurm.sh: error: SHARD={shard}: expected a divisor of 8, the number of all GPUs\n"
    )


@pytest.mark.parametrize("word", ["--overwrite", "--overwrite=true"])
def test_overwrite_is_refused_at_once(tmp_path, word):
    """A job that is queued again gets --resume, which excludes it."""
    job = submit(tmp_path, word, ENDS="1")
    _, err = job.communicate(timeout=30)
    assert (
        job.returncode == 2
        and err.startswith("slurm.sh: error: with --overwrite a job that is")
        and err.count("\n") == 1
    )
    assert not (tmp_path / "launched.0").exists()


@pytest.mark.parametrize("name", ["single_gpu", "ddp", "fsdp2", "fsdp2_multinode"])
def test_accelerate_configurations(name, monkeypatch):
    """What `accelerate launch` makes of each file passes train.py's checks; edited to FSDP1, it is refused."""
    args = launch_command_parser().parse_args(["--config_file", f"configs/accelerate/{name}.yaml", "train.py"])
    args.nondefault = []
    monkeypatch.chdir(ROOT)
    args, *_ = _validate_launch_command(args)
    for key, value in prepare_multi_gpu_env(args).items():
        if key.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_")):
            monkeypatch.setenv(key, value)
    config = TrainConfig(model="m", dataset="d", output_dir="o", rule="gmt", keep_ratio=0.2)
    backend.check_supported(config)
    processes = {"single_gpu": 1, "ddp": 8, "fsdp2": 8, "fsdp2_multinode": 16}[name]
    assert (args.num_processes, backend.is_sharded()) == (processes, "fsdp2" in name)
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"  # the experiment's own key decides
    if backend.is_sharded():
        assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
        monkeypatch.setenv("FSDP_VERSION", "1")
        with pytest.raises(UserError, match="set fsdp_version: 2"):
            backend.check_supported(config)
