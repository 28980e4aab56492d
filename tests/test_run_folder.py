"""What a run leaves in its folder besides checkpoints and the model: pytest tests/test_run_folder.py"""

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest
from accelerate import Accelerator
from conftest import ROOT, read_metrics, write_rows

from common import run_folder
from common.config import TrainConfig
from common.errors import UserError


def wandb_records(log: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    record, at = b"", 7
    while at + 7 <= len(log):
        if 32768 - at % 32768 < 7:  # no room for the head of a part: padding
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", log, at)
        record += log[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a record in one part, or the last part of one
            yield record
            record = b""


def test_wandb_offline_stays_in_the_run_folder(tmp_path, train_args):
    """Its own file holds every logged number; nothing is written elsewhere, no connection is tried."""
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    home, cwd = tmp_path / "home", tmp_path / "cwd"
    home.mkdir()
    cwd.mkdir()
    words = train_args(tmp_path / "run", "--trackers", "wandb", "--max_steps", "2")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        ours = {"WANDB_MODE": "offline", "WANDB_BASE_URL": address, "HTTP_PROXY": address, "HTTPS_PROXY": address}
        env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "XDG_"))}
        env |= {**ours, "HOME": str(home), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *words],
            cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert not list(cwd.iterdir()) and not list(home.rglob("*wandb*"))
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    logged, settings = [], {}
    for content in wandb_records(path.read_bytes()):
        record = Record.FromString(content)
        if record.WhichOneof("record_type") == "history":
            logged.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
        for item in record.config.update:
            settings[item.key] = json.loads(item.value_json)
    assert [line["loss"] for line in logged] == [m["loss"] for m in read_metrics(tmp_path / "run")]
    assert all("seconds/optimizer" in line for line in logged) and settings["learning_rate"] == 1e-3


def test_a_tracker_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    config = TrainConfig(model="m", dataset=["d"], output_dir=str(tmp_path), rule="none", trackers=["tensorboard"])

    def no_account(*args, **kwargs):
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setattr(Accelerator, "init_trackers", no_account)
    with pytest.raises(UserError, match="trackers: tensorboard: no API key configured"):
        run_folder.Log(tmp_path, 0, Accelerator(cpu=True), config)


def test_a_log_forgets_later_steps_and_damaged_lines(tmp_path):
    config = TrainConfig(model="m", dataset=["d"], output_dir=str(tmp_path), rule="none")
    path = write_rows(tmp_path / "metrics.jsonl", [{"step": 1}, {"step": 2}, {"step": 3}])
    damaged = [
        b"null\n",
        b"[1]\n",
        b'{"step": null}\n',
        b'{"step": "x"}\n',
        b'{"step": Infinity}\n',
        b'{"st\xff": 1}\n',
    ]
    path.write_bytes(path.read_bytes() + b"".join(damaged) + b'{"step": 2, "los')
    run_folder.Log(tmp_path, 2, Accelerator(cpu=True), config)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("content", ["null", "3", "[]", "{", '"text"'])
def test_a_damaged_json_file_is_one_line(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match="run.json: missing or damaged"):
        run_folder.read_json(tmp_path / "run.json")


def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    run_folder.write_json(path, {"score": 1})
    with open(path) as old:  # who is reading it goes on reading the old one
        run_folder.write_json(path, {"score": 2})
        assert json.load(old) == {"score": 1} and run_folder.read_json(path) == {"score": 2}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"scores.json cannot be written: No space left on device"):
        run_folder.write_json(path, {"score": 3})
    assert run_folder.read_json(path) == {"score": 2}
