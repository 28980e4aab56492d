"""The shell scripts, run whole: pytest tests/test_scripts.py -m slow"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, python, write_rows


@pytest.fixture
def clone(tmp_path) -> Path:
    """What git knows of the repository (or what is new in it), without outputs, in a folder with a space in it."""
    folder = tmp_path / "a clone"
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def start(folder: Path, *words: str) -> subprocess.Popen:
    """Start a script in the environment of this test, called from elsewhere, in a process group of its own."""
    env = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env.pop("HF_HUB_OFFLINE", None)
    env.pop("OMP_NUM_THREADS", None)  # as a user's: training the quickstart's base amplifies another rounding
    log = open(folder / "log.txt", "a")  # noqa: SIM115  belongs to the process
    command = ["bash", str(folder / words[0]), *words[1:]]
    return subprocess.Popen(command, cwd="/", env=env, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.slow
def test_quickstart_is_cut_goes_on_and_is_reused(clone):
    out = clone / "outputs" / "quickstart"
    for moment in ("base/checkpoints/step_000200/COMPLETED", "none/checkpoints/step_000080/COMPLETED"):
        process = start(clone, "scripts/quickstart.sh")
        deadline = time.time() + 900
        while not (out / moment).exists() and time.time() < deadline:
            assert process.poll() is None, (clone / "log.txt").read_text()[-3000:]
            time.sleep(0.05)
        assert (out / moment).exists(), f"not there after 900 s: {moment}"
        time.sleep(1)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "none" / "final").exists()
    assert start(clone, "scripts/quickstart.sh").wait(timeout=1800) == 0, (clone / "log.txt").read_text()[-3000:]
    assert json.loads((out / "base" / "run.json").read_text())["resumed"]
    assert json.loads((out / "none" / "run.json").read_text())["resumed"]
    (clone / "log.txt").unlink()
    assert start(clone, "scripts/quickstart.sh").wait(timeout=300) == 0
    log = (clone / "log.txt").read_text()
    assert log.count("is there") == 10 and "training" not in log
    rows = dict(re.findall(r"^\| ([\w ()]+) \| (.*) \|$", (out / "quickstart.md").read_text(), re.MULTILINE))
    assert rows.keys() == {"rule", "base model", "none (SFT)", "rmt", "hft", "gmt"}
    new, old = (
        [float(cells.split(" | ")[i].split("%")[0]) for n, cells in rows.items() if n != "rule"] for i in (1, 2)
    )
    assert new[0] < 20 and old[0] > 80 and min(new[1:]) > 50 and min(old[1:]) > 20 and max(old[1:]) < 80
    assert (out / "quickstart.png").read_bytes()[:4] == b"\x89PNG"

    # DPO on top of it: the margin grows, and the accuracy does not fall
    assert start(clone, "scripts/quickstart_dpo.sh").wait(timeout=600) == 0, (clone / "log.txt").read_text()[-3000:]
    found = re.findall(r"^\| (none|gmt) \| ([\d.| %-]+) \|$", (clone / "log.txt").read_text(), re.MULTILINE)
    assert [rule for rule, _ in found] == ["none", "gmt"]
    for _, cells in found:
        first, last, right, before, after = (float(cell.strip(" %")) for cell in cells.split("|"))
        assert first == 0 and last > 0.5 and right > 75 and before > 50 and after >= before, cells


REAL = os.environ.get("GMT_DATA_DIR", "")


@pytest.mark.slow
@pytest.mark.skipif(not (Path(REAL) / "gsm8k").is_dir() or not REAL, reason="GMT_DATA_DIR names no folder with gsm8k/")
def test_the_real_gsm8k_goes_through_whole(clone):
    words = ("scripts/gsm8k_from_scratch.sh", REAL, "--max_steps", "40")  # the time goes into scoring
    assert start(clone, *words).wait(timeout=1800) == 0, (clone / "log.txt").read_text()[-3000:]
    out = clone / "outputs" / "gsm8k_from_scratch"
    assert (out / "train.jsonl").read_text().count("\n") == 7473
    run = json.loads((out / "run" / "run.json").read_text())
    assert run["data"]["examples"] == 7273  # 200 are held out, none is lost
    (scores,) = json.loads((out / "eval" / "scores.json").read_text()).values()
    assert scores["n"] == 1319 and 0 <= scores["score"] < 0.1
    print((clone / "log.txt").read_text()[-2000:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report.py"], "one argument is needed"),
        (["data.py"], "one argument is needed"),
        (["report.py", "/no/such"], "/no/such has no scores of base, none, rmt, hft, gmt: bash scripts/quickstart.sh"),
        (["dpo.py", "/no/such"], "/no/such has no scores of base, none, rmt, hft, gmt: bash scripts/quickstart.sh"),
    ],
)
def test_the_quickstarts_parts_say_what_they_need(words, message):
    done = python(f"scripts/quickstart/{words[0]}", *words[1:])
    assert done.returncode == 2 and done.stderr.startswith(f"{words[0]}: error: {message}"), done.stderr


@pytest.mark.parametrize(("environment", "own"), [("base", False), ("mine", True), ("", False)])
def test_condas_base_is_no_environment_of_ones_own(tmp_path, environment, own):
    """setup.sh with stand-ins for .venv and python."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    (tmp_path / "requirements.txt").touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("echo .venv\n")
    for path in (tmp_path / ".venv" / "bin" / "python", tmp_path / "bin" / "python"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\necho {tmp_path}\n")
        path.chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "CONDA_DEFAULT_ENV": environment, "CONDA_PREFIX": "/conda"}
    done = subprocess.run(["bash", "scripts/setup.sh"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and (".venv" not in done.stdout.splitlines()) == own, done.stdout + done.stderr


def test_quickstart_tune_takes_the_best_rate_of_each_rule(tmp_path, monkeypatch, capsys):
    """With stand-ins for training and scoring, whose words are parsed; at the third rate the two skills are best."""
    from common.config import EvalConfig, TrainConfig, parse
    from scripts.quickstart import tune

    (tmp_path / "data").mkdir()
    (tmp_path / "configs").mkdir()
    skills = ["sort"] * 10 + ["add"] * 10
    write_rows(tmp_path / "data" / "validation.jsonl", [{"skill": skill} for skill in skills])
    trained = []

    def score(words: list[str]) -> None:
        config = parse(EvalConfig, words)
        rate = [float(r) for r in tune.RATES].index(trained[-1].learning_rate)
        new, old = ((2, 9), (4, 8), (6, 7), (9, 2), (10, 0))[rate]  # harmonic means 3.3, 5.3, 6.5, 3.3, 0
        right = {*range(new), *range(10, 10 + old)}
        out = Path(config.output_dir)
        out.mkdir(parents=True)
        lines = [{"id": i, "correct": i in right} for i in range(20)]
        write_rows(out / "gsm8k.metamath.jsonl", lines)

    monkeypatch.setattr(tune.train, "main", lambda words: trained.append(parse(TrainConfig, words)))
    monkeypatch.setattr(tune.evaluation, "main", score)
    monkeypatch.setattr(tune, "ROOT", tmp_path)
    tune.main(tmp_path)
    assert len(trained) == 4 * 5 and {c.rule for c in trained} == {"none", "rmt", "hft", "gmt"}
    assert (tmp_path / "configs" / "quickstart_rates.txt").read_text().splitlines()[1:] == [
        "none 1e-4", "rmt 1e-4 0.2", "hft 1e-4", "gmt 1e-4 0.2",
    ]  # fmt: skip


def test_gsm8k_rows_in_metamaths_schema(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    answer = "She has 1000+200=<<1000+200=1200>>1,200 figs.\n#### 1,200"
    write_rows(tmp_path / "gsm8k" / "train.jsonl", [{"question": "How many?", "answer": answer}])
    assert python("scripts/quickstart/gsm8k_to_metamath.py", str(tmp_path), str(tmp_path / "out.jsonl")).returncode == 0
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {
        "type": "GSM_AnsAug",
        "query": "How many?",
        "original_question": "How many?",
        "response": "She has 1000+200=1,200 figs.\n#### 1,200\nThe answer is: 1200",
    }
    done = python("scripts/quickstart/gsm8k_to_metamath.py", "/no/such", "out.jsonl")
    assert done.returncode == 2 and "no train.jsonl or train.jsonl.gz in /no/such/gsm8k" in done.stderr


def test_make_model_has_a_byte_fall_back(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = write_rows(tmp_path / "rows.jsonl", [{"query": "Tom has 34 figs.", "response": "34 is 34."}] * 20)
    assert python("scripts/quickstart/make_model.py", str(rows), str(tmp_path / "model")).returncode == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in ("Tom has 34 figs.\n\n  two  spaces", "never seen: ß 数 😀 ▁"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text.replace("▁", " ")
    assert tokenizer.unk_token_id not in tokenizer("數😀")["input_ids"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.max_position_embeddings == 2048
