"""scripts/reproduce_*.sh, sweep_keep_ratio.sh: with stand-ins for programs, and (slow) whole in the reduced world."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, needs_sandbox, python

from common.config import TrainConfig, parse
from scripts.reproduce.reduced import SHAPES
from training import plan

STAND_INS = {
    # Python: what the scripts ask it, and the programs, which leave what the real ones would leave
    "python": """
        case "$1 ${2:-}" in
            *device_count*) echo "${GPUS:-0}"; exit ;;
            "-c "*) echo "$WORK"; exit ;;
            "-m pip") exit ;;
        esac
        echo "$*" >>"$WORK/calls"
        [[ " ${FAILS:-} " != *" $1 "* ]] || { echo "a line before"; echo "train.py: error: this is wrong"; exit 2; }
        out=$(sed 's/.*--output_dir \\([^ ]*\\).*/\\1/' <<<"$*")
        case $1 in
            scripts/reproduce/reduced.py) mkdir -p "$2"; touch "$2/COMPLETED" ;;
            scripts/reproduce/dry_runs.py) echo "$WORLD_SIZE ${ACCELERATE_USE_FSDP:-no}" >"$WORK/planned_for" ;;
            scripts/merge.py) mkdir -p "$out"; touch "$out/drop.json" ;;
        esac""",
    # the launcher: it would die of a signal, and turns every failure into exit code 1
    "accelerate": """
        echo "$*" >>"$WORK/calls"
        out=$(sed 's/.*--output_dir \\([^ ]*\\).*/\\1/' <<<"$*")
        if [[ "$*" = *" eval.py "* ]]; then mkdir -p "$out"; touch "$out/scores.json"; exit; fi
        mkdir -p "$out/checkpoints/step_000001"; echo "{}" >"$out/run.json"
        case "$out" in
            */${BREAKS:-nothing}) # a bar of one process stands when another one fails
                echo "example 0: 'foo.py: error: in the data'"; printf 'train:   0%%|  | 0/9\\rtrain:  44%%|## | 4/9'
                echo "train.py: error: no room"; echo "CalledProcessError: of the launcher"; exit 1 ;;
            */${WAITS:-nothing})
                bash -c 'trap "touch $0/checkpoints/step_000001/COMPLETED; exit 138" USR1; touch "$0/ready"
                    for i in $(seq 300); do sleep 0.1; done' "$out" &
                wait $! || exit 1 ;;
        esac
        mkdir -p "$out/final"; touch "$out/final/COMPLETED"; echo trained""",
    "git": """
        mkdir -p "${@: -1}/cot-prompts"; touch "${@: -1}/cot-prompts/word_sorting.txt" """,
}


@pytest.fixture
def run(tmp_path):
    """run("math", "--flag", NAME=value): a script with stand-ins for its programs; its results are in tmp_path/out."""
    for name, text in STAND_INS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\nset -u\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".gmt-requirements.txt").write_text(
        (ROOT / "requirements.txt").read_text()
    )  # setup.sh: all is installed

    def start(script: str, *args: str, **variables: str) -> subprocess.Popen:
        ours = "MODELS RULES RUNS SEEDS DATA_DIR HUB_DIR REDUCED TASKS RETAINED EVAL_ARGS DPO_ARGS KEEP_RATIO"
        ours += " ACCELERATE_CONFIG DRY_RUN"
        env = {k: v for k, v in os.environ.items() if k not in ours.split()}
        env |= {"PATH": f"{tmp_path / 'bin'}:{env['PATH']}", "WORK": str(tmp_path), "VIRTUAL_ENV": "x"}
        env |= {"OUT": str(tmp_path / "out"), "NPROC": "1", **variables}
        return subprocess.Popen(
            ["bash", str(ROOT / "scripts" / script), *args],
            cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    return start


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def calls(folder: Path) -> list[str]:
    """The programs that were started since the last look."""
    path = folder / "calls"
    lines = path.read_text().replace(str(folder / "out"), "OUT").splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def stages(out: str) -> list[str]:
    return [line[3:] for line in out.splitlines() if line.startswith("== ") and "took" not in line]


def test_every_rule_is_trained_and_scored_once(run, tmp_path):
    """The stages and the words of their programs; called again, all is there; other settings are refused."""
    words = {"MODELS": "mistral_7b", "SEEDS": "0 1", "KEEP_RATIO": "0.3", "NPROC": "1", "DATA_DIR": str(tmp_path)}
    code, out, err = finish(run("reproduce_math.sh", "--learning_rate", "1e-5", EVAL_ARGS="--limit 7", **words))
    assert code == 0, err
    expected = ["plan", "mistral_7b/base/eval"]
    for seed in (0, 1):
        for rule in ("none", "rmt", "hft", "gmt", "drop"):
            kind = "drop" if rule == "drop" else "train"
            expected += [f"mistral_7b/{rule}_seed{seed}/{what}" for what in (kind, "eval")]
    assert stages(out) == [*expected, "mistral_7b/report"]
    done = calls(tmp_path)
    launcher = "launch --config_file configs/accelerate/single_gpu.yaml --num_processes 1"
    tuned = "OUT/mistral_7b/{}_seed0"
    start = f"{launcher} train.py --config configs/math_mistral_7b.yaml --dataset meta-math/MetaMathQA --rule"
    end = "--model mistralai/Mistral-7B-v0.1 --learning_rate 1e-5 --output_dir"
    assert f"{start} none --seed 0 {end} {tuned.format('none')}" in done
    assert f"{start} rmt --seed 0 --keep_ratio 0.3 {end} {tuned.format('rmt')}" in done
    assert f"{start} hft --seed 0 {end} {tuned.format('hft')}" in done
    assert f"{start} gmt --seed 1 --keep_ratio 0.3 {end} OUT/mistral_7b/gmt_seed1" in done
    assert (
        f"scripts/merge.py drop --base mistralai/Mistral-7B-v0.1 --tuned {tuned.format('none')}/final "
        f"--output_dir {tuned.format('drop')}/final --keep_ratio 0.3"
    ) in done
    scored = f"--tasks math mmlu text_loss --data_dir {tmp_path} --limit 7 --overwrite"
    for model, folder in (("mistralai/Mistral-7B-v0.1", "base"), ("OUT/mistral_7b/drop_seed1/final", "drop_seed1")):
        where = f"OUT/mistral_7b/{folder}/eval"
        assert f"{launcher} eval.py --model {model} --output_dir {where} {scored}" in done
    runs = [f"{rule}_seed{seed}" for seed in (0, 1) for rule in ("none", "rmt", "hft", "gmt", "drop")]
    folders = " ".join(f"OUT/mistral_7b/{name}/eval" for name in [*runs, "base"])
    written = "--out {0}/report.md --csv {0}/report.csv --figures {0}".format("OUT/mistral_7b")
    written += " --new math --retained mmlu text_loss"
    assert done[-1] == f"scripts/report.py {folders} {written}"
    planned = next(line for line in done if line.startswith("scripts/reproduce/dry_runs.py")).split(" -- ")
    assert len(planned) == 5 and "train.py" in planned[2] and "--rule hft" in planned[2]
    assert planned[4].startswith(
        "scripts/merge.py drop --base mistralai/Mistral-7B-v0.1 --tuned OUT/mistral_7b/none_seed0/f"
    )
    assert (tmp_path / "planned_for").read_text() == "1 no\n"
    assert not list((tmp_path / "out").rglob("checkpoints"))

    code, out, err = finish(run("reproduce_math.sh", "--learning_rate", "1e-5", EVAL_ARGS="--limit 7", **words))
    assert code == 0 and stages(out) == [f"{s} is there" for s in expected[1:]] + ["mistral_7b/report"], err
    assert [line.split()[0] for line in calls(tmp_path)] == ["scripts/report.py"]
    # another number of processes is no other result; another learning rate is
    code, out, err = finish(run("reproduce_math.sh", "--learning_rate", "2e-5", EVAL_ARGS="--limit 7", **words))
    assert code == 2 and "none_seed0/train: error: " in err and "is the result of another command" in err
    assert "set another OUT, give that command again, or delete both" in err
    assert "out/mistral_7b/none_seed0 is the result" in err  # with its run.json, not final/ alone


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGTERM, "1"), (signal.SIGINT, "1"), (signal.SIGTERM, "2")])
def test_a_signal_reaches_the_training_and_the_same_call_goes_on(run, tmp_path, number, processes):
    words = {"MODELS": "mistral_7b", "RULES": "none", "NPROC": processes}
    process = run("reproduce_math.sh", WAITS="none_seed0", **words)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out/mistral_7b/none_seed0/ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C: all of the terminal's processes get it
    else:
        process.send_signal(number)
    code, out, err = finish(process)
    assert code == 128 + number, err
    assert f"stopped by {number.name}: the same call goes on" in err and "none_seed0/eval" not in out
    assert (tmp_path / "out/mistral_7b/none_seed0/checkpoints/step_000001/COMPLETED").exists()
    calls(tmp_path)
    code, out, err = finish(run("reproduce_math.sh", **words))
    assert code == 0, err
    plan, train, *_ = calls(tmp_path)
    assert "--resume --" in plan and train.endswith("--resume") and "mistral_7b/base/eval is there" in out


def test_a_run_that_was_cut_before_its_first_checkpoint_is_resumed(run, tmp_path):
    words = {"MODELS": "mistral_7b", "RULES": "none"}
    process = run("reproduce_math.sh", WAITS="none_seed0", **words)
    while not (tmp_path / "out/mistral_7b/none_seed0/ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    calls(tmp_path)
    assert finish(run("reproduce_math.sh", **words))[0] == 0
    assert calls(tmp_path)[1].endswith("--resume")  # which begins at step 0 where there is no checkpoint


def test_a_stage_that_fails_stops_with_its_name_and_log(run, tmp_path):
    words = {"MODELS": "mistral_7b", "RULES": "none gmt"}
    code, out, err = finish(run("reproduce_math.sh", BREAKS="gmt_seed0", **words))
    log = tmp_path / "out/logs/mistral_7b/gmt_seed0/train.log"
    assert code == 2  # as of the program itself, which the launcher hides
    assert err.splitlines()[-2:] == [
        "train.py: error: no room",
        f"stage mistral_7b/gmt_seed0/train failed (exit code 2); its log: {log}",
    ]
    assert "of the launcher" in log.read_text() and "report" not in out
    calls(tmp_path)
    code, out, err = finish(run("reproduce_math.sh", FAILS="scripts/report.py", **words))
    assert code == 2 and "none_seed0/train is there" in out and "stage mistral_7b/report failed" in err
    assert "none_seed0" not in (again := calls(tmp_path))[1] and again[1].endswith("--resume")


def test_an_error_is_a_line_of_its_own_while_a_bar_stands():
    code = (
        "import tqdm; from common.errors import UserError, run_main\n"
        "def main():\n"
        "    bar = tqdm.tqdm(total=9); bar.update(4)\n"
        "    raise UserError('no room')\n"
        "run_main(main, 'train.py')"
    )
    done = python("-c", code)
    assert done.returncode == 2 and "train.py: error: no room" in re.split("[\r\n]", done.stderr)


def test_plans_name_the_program_that_refuses(tmp_path, train_args):
    """merge.py would refuse a base without safetensors files only after days of training."""
    words = train_args(tmp_path / "run")
    dropped = [
        "scripts/merge.py", "drop", "--base", str(tmp_path), "--tuned", "no/such",
        "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    plans = ["train.py", *words, "--", *dropped, "--keep_ratio", "0.2", "--"]
    done = python("scripts/reproduce/dry_runs.py", *plans)
    assert done.returncode == 2 and "\n--- python scripts/merge.py drop " in done.stdout
    assert f"merge.py: error: base {tmp_path}: no folder with a model's weights" in done.stderr
    plans[plans.index(str(tmp_path))] = words[1]  # the model
    assert python("scripts/reproduce/dry_runs.py", *plans).returncode == 0
    done = python("scripts/reproduce/dry_runs.py", "train.py", *words, "--learning_rate", "-1", "--", *plans)
    assert done.returncode == 2 and "train.py: error: learning_rate" in done.stderr and "merge.py" not in done.stdout


def test_general_goes_on_with_dpo_from_the_same_rules_model(run, tmp_path):
    words = {"MODELS": "llama2_7b", "RULES": "none gmt", "DPO_ARGS": "--beta 0.3"}
    code, _, err = finish(run("reproduce_general.sh", "--max_steps", "5", **words))
    assert code == 0, err
    done = calls(tmp_path)
    (dpo,) = (line for line in done if "gmt_dpo_seed0" in line and " train.py " in line)
    assert dpo.endswith(
        "train.py --config configs/dpo_llama2_7b.yaml --dataset HuggingFaceH4/ultrafeedback_binarized --rule gmt "
        "--seed 0 --keep_ratio 0.2 --model OUT/llama2_7b/gmt_seed0/final --beta 0.3 "
        "--output_dir OUT/llama2_7b/gmt_dpo_seed0"
    )
    (bbh,) = (line for line in done if "gmt_dpo_seed0/eval" in line and "--tasks bbh" in line)
    assert bbh.endswith("--tasks bbh --data_dir OUT/bbh --prompt_format tulu --overwrite")
    (others,) = (line for line in done if "gmt_dpo_seed0/eval --tasks mmlu" in line)
    assert others.endswith(
        "--tasks mmlu gsm8k_8shot tydiqa truthfulqa humaneval_pass10 --prompt_format tulu --overwrite"
    )
    assert (
        sum("base/eval" in line and " eval.py " in line for line in done) == 4
    )  # both in its own format and in tulu's
    reported = [f"OUT/llama2_7b/{name}_seed0/eval" for name in ("none", "gmt", "none_dpo", "gmt_dpo")]
    assert done[-1].split()[1:6] == [*reported, "OUT/llama2_7b/base/eval"]
    # scores of a model that was trained again are not taken for the new one's
    model = tmp_path / "out/llama2_7b/gmt_seed0/final/COMPLETED"
    os.utime(model, (model.stat().st_atime, model.stat().st_mtime + 5))
    code, _, err = finish(run("reproduce_general.sh", "--max_steps", "5", **words))
    assert code == 2 and "gmt_seed0/eval_tulu_bbh: error: " in err and "or of other inputs" in err
    planned = next(line for line in done if line.startswith("scripts/reproduce/dry_runs.py")).split(" -- ")
    assert len(planned) == 3 and "--model meta-llama/Llama-2-7b-hf --beta 0.3" in planned[2]


def test_the_reduced_world_and_a_folder_of_downloads(run, tmp_path):
    assert finish(run("reproduce_code.sh", REDUCED="1", MODELS="mistral_7b", RULES="none"))[0] == 0
    done = calls(tmp_path)
    assert done[0] == "scripts/reproduce/reduced.py OUT/reduced"
    assert any(
        "--config_file configs/accelerate/cpu.yaml" in line and "--limit 2 --dtype float32" in line for line in done
    )
    assert any("--max_steps 2 --global_batch_size 4" in line for line in done)
    hub = tmp_path / "hub"
    (hub / "models/mistralai/Mistral-7B-v0.1").mkdir(parents=True)  # the dataset is not there: of the Hub's cache
    words = {"MODELS": "mistral_7b", "RULES": "none", "HUB_DIR": "hub", "OUT": "elsewhere", "NPROC": "4"}
    assert finish(run("reproduce_code.sh", **words))[0] == 0
    (training,) = (line for line in calls(tmp_path) if line.startswith("launch") and " train.py " in line)
    assert f"--model {hub}/models/mistralai/Mistral-7B-v0.1 " in training and "--dataset ise-uiuc/" in training
    assert f"--output_dir {tmp_path}/elsewhere/mistral_7b/none_seed0" in training and "--num_processes 4" in training
    assert (tmp_path / "planned_for").read_text() == "4 true\n"


def scorings(done: list[str]) -> dict[str, str]:
    """The words of --tasks, and what follows them, of each call of eval.py, by its output_dir."""
    lines = [line.partition(" eval.py ")[2] for line in done if " eval.py " in line]
    return {line.partition(" --tasks ")[0].split()[-1]: line.partition(" --tasks ")[2] for line in lines}


def test_what_is_retained_is_scored_once_of_the_base_model(run, tmp_path):
    """Of the tuned models in the prompts' format, too; other tasks and texts, or none, as the variable says."""
    words = {"MODELS": "mistral_7b", "RULES": "none"}
    assert finish(run("reproduce_code.sh", **words))[0] == 0
    done = calls(tmp_path)
    of_base = [line.partition(" --tasks ")[2] for line in done if "base/eval" in line and " eval.py " in line]
    assert of_base == ["code mmlu text_loss --overwrite", "code --prompt_format magicoder --overwrite"]
    tuned = "code mmlu text_loss --prompt_format magicoder --overwrite"
    assert scorings(done)["OUT/mistral_7b/none_seed0/eval"] == tuned
    assert done[-1].endswith(" --new code --retained mmlu text_loss")
    words |= {"OUT": "elsewhere", "RETAINED": "bbh text_loss=mine.jsonl", "TASKS": "gsm8k=a.jsonl"}
    assert finish(run("reproduce_math.sh", **words))[0] == 0
    done = calls(tmp_path)
    assert [line.partition(" --tasks ")[2] for line in done if "none_seed0/eval" in line and " eval.py " in line] == [
        f"bbh --data_dir {tmp_path}/elsewhere/bbh --overwrite", "gsm8k=a.jsonl text_loss=mine.jsonl --overwrite",
    ]  # fmt: skip
    assert done[-1].endswith(" --new gsm8k=a.jsonl --retained bbh text_loss=mine.jsonl")
    assert finish(run("reproduce_math.sh", **{**words, "OUT": "third", "RETAINED": "", "TASKS": ""}))[0] == 0
    done = calls(tmp_path)
    assert set(scorings(done).values()) == {"math --overwrite"} and "--new" not in done[-1]


def test_texts_that_were_downloaded_are_taken(run, tmp_path):
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "text_loss.jsonl").touch()
    words = {"MODELS": "mistral_7b", "RULES": "none", "HUB_DIR": str(hub)}
    assert finish(run("reproduce_math.sh", **words))[0] == 0
    scored = f"math mmlu text_loss={hub}/text_loss.jsonl"
    assert set(scorings(calls(tmp_path)).values()) == {f"{scored} --overwrite"}
    copies = tmp_path / "benchmarks"  # which have texts of their own
    copies.mkdir()
    assert finish(run("reproduce_math.sh", **words, OUT="b", DATA_DIR=str(copies)))[0] == 0
    assert set(scorings(calls(tmp_path)).values()) == {f"{scored} --data_dir {copies} --overwrite"}


@pytest.mark.parametrize("script", ["reproduce_math.sh", "reproduce_general.sh", "sweep_keep_ratio.sh"])
def test_a_dry_run_plans_what_is_left_and_stops(run, tmp_path, script):
    code, out, err = finish(run(script, DRY_RUN="1"))
    assert code == 0 and stages(out) == ["plan"], err
    assert [line.split()[0] for line in calls(tmp_path)] == ["scripts/reproduce/dry_runs.py"]
    assert not (tmp_path / "out" / "bbh").exists()  # no benchmark is needed
    if script == "reproduce_math.sh":
        for model in ("mistral_7b", "llama3_8b"):
            for rule in ("none", "gmt"):
                (tmp_path / "out" / model / f"{rule}_seed0" / "final").mkdir(parents=True)
                (tmp_path / "out" / model / f"{rule}_seed0" / "final" / "COMPLETED").touch()
        code, out, _ = finish(run(script, DRY_RUN="1", RULES="none gmt"))
        assert code == 0 and out.splitlines()[-1] == "nothing is left to train" and calls(tmp_path) == []


def test_pefts_benchmark_run_by_run(run, tmp_path):
    """Rows, plan, base model, each run's training and scores, tables; called again, what is done is passed over."""
    words = {"RUNS": "none gmt_frozen lora", "KEEP_RATIO": "0.3"}
    code, out, err = finish(run("peft_benchmark.sh", "--max_grad_norm", "2", BREAKS="lora_seed0", **words))
    assert code == 2 and "stage lora_seed0/train failed" in err
    assert scorings(calls(tmp_path))["OUT/base/eval"] == "text_loss --overwrite"
    (tmp_path / "out/rows.jsonl").touch()  # which the stand-in has not made
    code, out, err = finish(run("peft_benchmark.sh", "--max_grad_norm", "2", **words))
    assert code == 0, err
    there = [
        "rows",
        "base/eval",
        *(f"{run}_seed0/{part}" for run in ("none", "gmt_frozen") for part in ("train", "eval")),
    ]
    there = [f"{stage} is there" for stage in there]
    assert stages(out) == [
        there[0], "plan", *there[1:], "lora_seed0/train", "lora_seed0/eval", "report", "benchmark"
    ]  # fmt: skip
    done = calls(tmp_path)
    model = "meta-llama/Llama-3.2-3B"
    launcher = "launch --config_file configs/accelerate/single_gpu.yaml --num_processes 1"
    assert (
        f"{launcher} train.py --config configs/peft_llama3.2_3b.yaml --dataset OUT/rows.jsonl --seed 0 --rule none "
        "--adapter lora --lora_rank 32 --lora_alpha 64 --lora_targets q_proj v_proj --master_dtype bfloat16 "
        f"--mixed_precision fp32 --learning_rate 1e-4 --weight_decay 0.1 --model {model} --max_grad_norm 2 "
        "--output_dir OUT/lora_seed0 --resume"
    ) in done
    assert scorings(done) == {"OUT/lora_seed0/eval": "gsm8k_peft text_loss --overwrite"}
    folders = " ".join(f"OUT/{name}/eval" for name in ("none_seed0", "gmt_frozen_seed0", "lora_seed0", "base"))
    assert done[-1] == f"scripts/peft_benchmark/report.py {folders} --out OUT"
    assert "--new gsm8k_peft --retained text_loss" in done[-2]
    made = (tmp_path / "out/logs/rows.done").read_text()
    assert made.startswith("scripts/peft_benchmark/rows.py --dataset meta-math/MetaMathQA --tokenizer " + model)


def test_sweep(run, tmp_path):
    config = tmp_path / "code_mine.yaml"
    config.write_text((ROOT / "configs/code_mistral_7b.yaml").read_text())
    words = {"CONFIG": "code_mine.yaml", "KEEP_RATIOS": "0.1 1.0"}
    code, _, err = finish(run("sweep_keep_ratio.sh", **words))
    assert code == 0, err
    done = calls(tmp_path)
    trained = [line for line in done if line.startswith("launch") and " train.py " in line]
    assert [line.split("--keep_ratio ")[1].split()[0] for line in trained] == ["0.1", "1.0"]
    assert all("--rule gmt" in line and "ise-uiuc/Magicoder-Evol-Instruct-110K" in line for line in trained)
    folders = "OUT/gmt_0.1_seed0/eval OUT/gmt_1.0_seed0/eval"
    assert done[-1] == f"scripts/report.py --sweep {folders} --csv OUT/sweep.csv --out OUT/report.md"
    config.write_text(config.read_text() + "seed: 3\n")
    code, _, err = finish(run("sweep_keep_ratio.sh", **words))
    assert code == 2 and "gmt_0.1_seed0/train: error: " in err and "of another command or of other inputs" in err
    code, _, err = finish(run("sweep_keep_ratio.sh", CONFIG="configs/no.yaml"))
    assert code == 2 and err == "sweep_keep_ratio.sh: error: CONFIG=configs/no.yaml: no such file\n"


@pytest.mark.parametrize(
    ("args", "variables", "message"),
    [
        ([], {"MODELS": "mistral"}, "MODELS: unknown word 'mistral'; known: llama3.2_1b llama3_8b mistral_7b "),
        ([], {"RULES": "gmt drop"}, "RULES: drop is of the model of rule none: add it"),
        ([], {"SEEDS": "0 x"}, "SEEDS: expected whole numbers, got 'x'"),
        ([], {"KEEP_RATIO": "a fifth"}, "KEEP_RATIO: expected a number in (0, 1], got 'a fifth'"),
        ([], {"NPROC": ""}, "no GPU here; REDUCED=1 tries everything on a CPU"),
        ([], {"NPROC": "two"}, "NPROC: expected a number of processes, got 'two'"),
        ([], {"DATA_DIR": "/no/such"}, "DATA_DIR=/no/such: no such folder"),
        ([], {"HUB_DIR": "/no/such"}, "HUB_DIR=/no/such: no such folder"),
        ([], {"ACCELERATE_CONFIG": "no.yaml"}, "ACCELERATE_CONFIG=no.yaml: no such file"),
        ([], {"OUT": "/proc/version/x"}, "OUT=/proc/version/x: cannot be made or written to"),
        ([], {"RETAINED": "mmlu gsm8k", "TASKS": "gsm8k"}, "RETAINED: gsm8k is one of TASKS already: leave it out"),
        (["--output_dir", "x"], {}, "--output_dir: this script sets it for each run"),
        (["--output-dir=x"], {}, "--output-dir: this script sets it for each run"),
        (["--model", "x"], {}, "--model: this script sets it for each run"),
        (["--learning_rate", "1", "--seed=5"], {}, "--seed: this script sets it for each run"),
        ([], {"DPO_ARGS": "--keep_ratio 0.4 --rule none"}, "DPO_ARGS: --rule: this script sets it for each run"),
        ([], {"EVAL_ARGS": "--limit 5 --model x"}, "EVAL_ARGS: --model: this script sets it for each run"),
        ([], {"MODEL": "mistral_7b"}, "MODEL=mistral_7b: the variable is called MODELS"),
        ([], {"SEED": "1", "MODEL": "x", "MODELS": "mistral_7b"}, "SEED=1: the variable is called SEEDS"),
        ([], {"REDUCED": "0"}, "REDUCED=0: 1, or not set"),
    ],
)
def test_refusals(run, tmp_path, args, variables, message):
    code, out, err = finish(run("reproduce_math.sh", *args, **variables))
    assert code == 2 and err.startswith(f"reproduce_math.sh: error: {message}") and err.count("\n") == 1 and not out
    assert not calls(tmp_path)


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("sweep_keep_ratio.sh", {"RULES": "mofo"}, "RULES: CONFIG, KEEP_RATIOS and SEEDS say what is run"),
        ("sweep_keep_ratio.sh", {"KEEP_RATIO": "0.1"}, "KEEP_RATIO: CONFIG, KEEP_RATIOS and SEEDS say what is run"),
        ("sweep_keep_ratio.sh", {"MODEL": "x"}, "MODEL=x: the variable is called CONFIG"),
        ("sweep_keep_ratio.sh", {"RULE": "mofo"}, "RULE: CONFIG, KEEP_RATIOS and SEEDS say what is run"),
        ("peft_benchmark.sh", {"RULE": "gmt"}, "RULE: RUNS and SEEDS say what is run"),
        ("peft_benchmark.sh", {"RUN": "gmt"}, "RUN=gmt: the variable is called RUNS"),
        ("peft_benchmark.sh", {"MODELS": "x"}, "MODELS: RUNS and SEEDS say what is run"),
    ],
)
def test_variables_of_other_scripts_are_refused(run, tmp_path, script, variables, message):
    code, out, err = finish(run(script, **variables))
    assert code == 2 and err == f"{script}: error: {message}\n" and not out and not calls(tmp_path)


def test_mistakes_that_train_py_finds_come_out_before_anything_runs(run, tmp_path):
    code, _, err = finish(run("reproduce_math.sh", FAILS="scripts/reproduce/dry_runs.py"))
    assert code == 2 and "train.py: error: this is wrong" in err and "stage plan failed (exit code 2)" in err
    assert [line.split()[0] for line in calls(tmp_path)] == ["scripts/reproduce/dry_runs.py"]


# --- whole, in the reduced world: nothing is replaced ----------------------------------------------------------------


def start(tmp_path: Path, script: str, *args: str, **variables: str) -> subprocess.Popen:
    """A script with REDUCED=1; what it says is in tmp_path/said."""
    env = {**os.environ, "REDUCED": "1", "OUT": str(tmp_path / "out"), "OMP_NUM_THREADS": "1", **variables}
    env |= {"VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    said = open(tmp_path / "said", "w")  # noqa: SIM115  belongs to the process
    command = ["bash", str(ROOT / "scripts" / script), *args]
    return subprocess.Popen(command, cwd=tmp_path, env=env, stdout=said, stderr=said, start_new_session=True)


def whole(tmp_path: Path, script: str, *args: str, **variables: str) -> str:
    """What a script says that ends well."""
    code = start(tmp_path, script, *args, **variables).wait(timeout=2400)
    said = (tmp_path / "said").read_text()
    assert code == 0, said[-3000:]
    return said


def wait_until(process: subprocess.Popen, tmp_path: Path, path: str) -> None:
    deadline = time.monotonic() + 1500
    while not (tmp_path / "out" / path).exists():
        said = (tmp_path / "said").read_text()
        assert process.poll() is None and time.monotonic() < deadline, f"not there: {path}\n{said[-3000:]}"
        time.sleep(0.05)


@pytest.mark.slow
def test_math_whole_and_cut(tmp_path):
    """Every rule; SIGTERM in a training, SIGKILL at a checkpoint, SIGINT in a scoring; then all is there."""
    out, args = tmp_path / "out/mistral_7b", ("--max_steps", "40", "--save_every", "10")
    words = {"MODELS": "mistral_7b"}
    process = start(tmp_path, "reproduce_math.sh", *args, **words)
    wait_until(process, tmp_path, "mistral_7b/none_seed0/checkpoints/step_000010/COMPLETED")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 143 and "stopped by SIGTERM" in (tmp_path / "said").read_text()
    assert not (out / "none_seed0/final").exists()
    process = start(tmp_path, "reproduce_math.sh", *args, **words)
    wait_until(process, tmp_path, "mistral_7b/rmt_seed0/checkpoints/step_000020/COMPLETED")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process = start(tmp_path, "reproduce_math.sh", *args, **words)
    wait_until(process, tmp_path, "mistral_7b/gmt_seed0/eval/gsm8k.metamath.parts")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=300) == 130
    said = whole(tmp_path, "reproduce_math.sh", *args, **words)
    for rule in ("none", "rmt", "hft", "gmt"):
        run = json.loads((out / f"{rule}_seed0/run.json").read_text())
        assert ("resumed" in run) == (rule in ("none", "rmt")) and run["config"]["rule"] == rule
        steps = [json.loads(line)["step"] for line in (out / f"{rule}_seed0/metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 41))
    report = (out / "report.md").read_text()
    assert report in said and not list(out.rglob("checkpoints"))
    for name in ("none_seed0", "rmt_seed0", "hft_seed0", "gmt_seed0", "drop_seed0", "base"):
        assert f"\n| {name} |" in report
        assert set(json.loads((out / name / "eval/scores.json").read_text())) == {
            "gsm8k.metamath", "hendrycks_math.metamath", "mmlu.open_instruct", "text_loss.peft",
        }  # fmt: skip
    assert "# Published scores" in report and "MetaMath-Mistral-7B" in report
    assert (out / "report.csv").read_text().count("\n") == 1 + 6 * 6 and (out / "loss.png").exists()
    assert (out / "forgetting.png").exists() and "shown is the rise against the base model" in report
    *again, last = stages(whole(tmp_path, "reproduce_math.sh", *args, **words))
    assert last == "mistral_7b/report" and all(stage.endswith(" is there") for stage in again)
    assert len(again) == 1 + 1 + 5 * 2  # the world, the base model, five rules


@pytest.mark.slow
def test_sweep_whole(tmp_path):
    whole(tmp_path, "sweep_keep_ratio.sh", KEEP_RATIOS="0.2 1.0", TASKS="gsm8k")
    table = (tmp_path / "out/sweep.csv").read_text().splitlines()
    columns = table[0].split(",")
    assert [line.split(",")[columns.index("keep_ratio")] for line in table[1:]] == ["0.2", "0.2", "1.0", "1.0"]
    assert (tmp_path / "out/sweep.png").exists() and "gmt_0.2" in (tmp_path / "out/report.md").read_text()


@needs_sandbox
@pytest.mark.slow
def test_code_whole(tmp_path):
    said = whole(tmp_path, "reproduce_code.sh", MODELS="deepseek_coder_6.7b", RULES="none gmt drop")
    out = tmp_path / "out/deepseek_coder_6.7b"
    assert set(json.loads((out / "base/eval/scores.json").read_text())) == {
        *(f"{task}.evalplus{format}" for task in ("humaneval_plus", "mbpp_plus") for format in ("", ".magicoder")),
        "mmlu.open_instruct", "text_loss.peft",
    }  # fmt: skip
    assert (out / "forgetting.png").exists()
    assert (out / "report.md").read_text() in said and "DeepSeek-Coder-6.7B" in said


@needs_sandbox
@pytest.mark.slow
def test_general_whole(tmp_path):
    """SFT, DPO from that rule's model, and all six benchmarks."""
    said = whole(tmp_path, "reproduce_general.sh", MODELS="llama2_13b", RULES="hft gmt")
    out = tmp_path / "out/llama2_13b"
    for rule in ("hft", "gmt"):
        run = json.loads((out / f"{rule}_dpo_seed0/run.json").read_text())["config"]
        assert run["model"] == str(out / f"{rule}_seed0/final")
        assert (run["rule"], run["objective"], run["template"]) == (rule, "dpo", "tulu")
    report = (out / "report.md").read_text()
    assert report in said and "Tulu-2-DPO-13B" in report
    tasks = ("mmlu", "gsm8k_8shot", "bbh", "tydiqa", "truthfulqa")
    for name in ("hft_seed0", "gmt_seed0", "hft_dpo_seed0", "gmt_dpo_seed0", "base"):
        scores = json.loads((out / name / "eval/scores.json").read_text())
        own = {f"{task}.open_instruct" for task in tasks} if name == "base" else set()
        assert set(scores) == own | {f"{task}.open_instruct.tulu" for task in tasks} | {
            "humaneval_pass10.open_instruct"
        }


# --- what docs/reproduce.md says of the real runs --------------------------------------------------------------------

SIZES = {  # rows, of the data cards
    "meta-math/MetaMathQA": 395_000,
    "ise-uiuc/Magicoder-Evol-Instruct-110K": 111_183,
    "allenai/tulu-v2-sft-mixture": 326_154,
    "HuggingFaceH4/ultrafeedback_binarized": 61_135,
}
SCRIPTS = {
    "reproduce_math.sh": ["math_mistral_7b", "math_llama3_8b"],
    "reproduce_code.sh": ["code_mistral_7b", "code_deepseek_coder_6.7b"],
    "reproduce_general.sh": ["general_llama2_7b", "general_llama2_13b", "dpo_llama2_7b", "dpo_llama2_13b"],
}
GIB = 2**30


def memory(config, model, gpus: int) -> str:
    """Of a GPU under FSDP2, if every example has max_length tokens, and a forward pass the most that a run chooses."""
    if gpus > config.global_batch_size:
        return "refused"
    per_example = 1 + (config.objective == "dpo")
    most = config.micro_batch_tokens or plan.CHOICES[0]
    rows = min(config.global_batch_size // gpus, most // config.max_length // per_example)
    rows *= per_example
    held = plan.tensor_bytes(config, model.parameters(), gpus)
    held["gathered"] = plan.gathered_bytes(config, model)
    held["activations"] = plan.activation_bytes(
        config, model.config, rows, config.max_length, rows * (config.max_length - 1)
    )
    return f"{sum(held.values()) / GIB:.0f} GiB"


@pytest.fixture(scope="module")
def plans() -> dict[str, dict[str, float]]:
    """What --dry_run says of each configuration under FSDP2, if every example has max_length tokens."""
    found = {}
    for name in (name for names in SCRIPTS.values() for name in names):
        config = parse(TrainConfig, ["--config", str(ROOT / "configs" / f"{name}.yaml")])
        cls, shape = SHAPES[config.model]
        architecture, per_example = cls(**shape), 1 + (config.objective == "dpo")
        model = plan.on_meta(config, architecture)
        whole = plan.tensor_bytes(config, model.parameters(), 1)
        n = SIZES[config.dataset[0]]
        tokens = n * per_example * config.max_length
        flops = config.epochs * tokens * plan.flops_per_token(model, config.max_length)
        if config.objective == "dpo":
            flops += tokens * plan.flops_per_token(model, config.max_length, forward_only=True)
        found[name] = {
            "rows": n,
            "steps": config.epochs * math.ceil(n / config.global_batch_size),
            "memory": " | ".join(memory(config, model, gpus) for gpus in (8, 64)),
            "hours": flops / (0.4 * plan.PEAK_FLOPS["A100"]) / 3600,
            "final": whole["weights"] / GIB,
            "checkpoint": (whole["weights"] + whole["optimizer"]) / GIB,
            "kept": config.keep_checkpoints + 1,
        }
    return found


@pytest.mark.slow
def test_the_documents_table_of_plans(plans):
    page = (ROOT / "docs" / "reproduce.md").read_text()
    for name, p in plans.items():
        row = (
            f"| {name} | {p['rows']:,} | {p['steps']:,} | {p['memory']} | {p['hours']:.0f} | "
            f"{p['final']:.0f} GiB | {p['checkpoint']:.0f} GiB |"
        )
        print(row)
        assert row in page
    for script, names in SCRIPTS.items():
        # all finals of the first model; of the second those that are there at its last training, and checkpoints
        first, second = (plans[name] for name in names[:2])
        models = 5 + 4 * (len(names) > 2)  # none, rmt, hft, gmt, drop, and DPO of the first four
        trained_last = models - 1 if len(names) > 2 else models - 2  # drop comes after gmt, but before DPO
        most = models * first["final"] + (trained_last + 1) * second["final"] + second["kept"] * second["checkpoint"]
        print(script, most)
        assert f"{script} {most:,.0f} GiB" in page.replace("`", "").replace("\n", " ")
