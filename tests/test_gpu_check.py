"""scripts/gpu_check.sh: all parts on a CPU, what is missing, what takes too long."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from scripts.bench import gpu_check

WITHOUT = """
import importlib.util, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(name)

MISSING = {  # all that torch, transformers and accelerate do not bring
    "antlr4", "bitsandbytes", "datasets", "evaluate", "google", "math_verify", "matplotlib", "pandas", "peft",
    "pyarrow", "scipy", "sentencepiece", "sklearn", "triton", "trl",
}
find_spec = importlib.util.find_spec
sys.meta_path.insert(0, Missing())
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in MISSING else find_spec(name)
"""


def run(tmp_path: Path, *words: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """The finished command, and its lines."""
    done = subprocess.run(
        [
            "bash",
            "scripts/gpu_check.sh",
            *words,
            "--json",
            str(tmp_path / "x.json"),
            "--lines",
            str(tmp_path / "lines"),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = tmp_path / "lines"
    return done, [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []


def test_some_parts(tmp_path):
    done, lines = run(tmp_path, "--tiny", "--parts", "card", "equal")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "x.json").read_text())["lines"] == lines
    copy, product = [line for line in lines if line["part"] == "card"]
    assert copy["value"] > 0 and copy["unit"] == "GB/s"
    assert product["value"] > 0 and product["unit"] == "TFLOP/s"
    assert {line["holds"] for line in lines if "holds" in line} == {True}
    assert "bf16 product of 256 x 256" in done.stdout.split("\n\n")[-1]  # the table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_in_one_line(tmp_path):
    done, lines = run(tmp_path)
    assert done.returncode == 2 and lines == []
    assert done.stderr.startswith("gpu_check.py: error: there is no GPU") and done.stderr.count("\n") == 1


def test_a_part_that_takes_too_long_is_cut_and_what_it_found_stays(tmp_path):
    lines = tmp_path / "lines"
    gpu_check.Report(lines, "resume").value("found before", 1.5, "ms")
    gpu_check.run_part("resume", 0.5, lines, tiny=True)
    first, second = map(json.loads, lines.read_text().splitlines())
    assert first == {"part": "resume", "what": "found before", "value": 1.5, "unit": "ms"}
    assert second["failed"].startswith("cut after")


def test_no_part_begins_when_the_time_is_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "STARTED", gpu_check.STARTED - 10 * gpu_check.ALL_SECONDS)
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *args: None)
    lines, result = tmp_path / "lines", tmp_path / "x.json"
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--tiny", "--lines", str(lines), "--json", str(result)])
    gpu_check.main()
    found = json.loads(result.read_text())["lines"]
    assert [line["part"] for line in found] == list(gpu_check.PARTS)
    assert all(line["left_out"].endswith("seconds are over") for line in found)
    assert "seconds are over" in capsys.readouterr().out


def command_of(process: str) -> bytes:
    """The words of a process, each ended by a zero byte; nothing if it has just ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_a_cut_leaves_lines_and_table_and_no_process(tmp_path):
    lines, result = tmp_path / "lines", tmp_path / "x.json"
    words = ["--tiny", "--parts", "card", "resume", "--lines", lines, "--json", result]
    command = ["bash", "scripts/gpu_check.sh", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    of_part, until = [], time.monotonic() + 120
    while not of_part and time.monotonic() < until:  # until the second part runs
        time.sleep(0.1)
        of_part = [child for child in children.read_text().split() if b"resume" in command_of(child).split(b"\0")]
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert [line["part"] for line in json.loads(result.read_text())["lines"]] == ["card", "card"]
    assert "TFLOP/s" in process.stdout.read().split("\n\n")[-1]
    until = time.monotonic() + 10  # what has been killed may take a moment to end
    while any(map(command_of, of_part)) and time.monotonic() < until:
        time.sleep(0.1)
    assert of_part and not any(map(command_of, of_part))


def test_a_failure_is_told_and_makes_the_exit_code_1(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT.replace('"evaluate"', '"evaluation"'))
    done, lines = run(tmp_path, "--tiny", "--parts", "generate", "card", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert [line["part"] for line in lines] == ["generate", "card", "card"]  # the next part goes on
    assert "evaluation" in lines[0]["failed"]
    assert "FAILED" in done.stdout


@pytest.mark.slow
def test_all_parts(tmp_path):
    done, lines = run(tmp_path, "--tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(dict.fromkeys(line["part"] for line in lines)) == list(gpu_check.PARTS)
    assert all(line["holds"] for line in lines if "holds" in line)
    left_out = {line["part"] for line in lines if "left_out" in line}
    assert left_out <= {"step_1b", "step_8b", "fp16", "equal"} or torch.cuda.is_available()


@pytest.mark.slow
def test_what_is_missing_costs_only_what_needs_it(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    parts = ("mask", "step_8b", "trl", "frozen", "fsdp2", "generate", "equal")
    done, lines = run(tmp_path, "--tiny", "--parts", *parts, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    reasons = {line["part"]: line["left_out"] for line in lines if "left_out" in line}
    assert reasons["trl"] == "trl and datasets missing"
    assert "bitsandbytes" in next(x["left_out"] for x in lines if x["what"] == "8-bit AdamW")
    assert {line["part"] for line in lines if "value" in line or "holds" in line} == {*parts} - {"trl"}
