"""Checkpoints and the final model: what is damaged, incomplete or not theirs. pytest tests/test_checkpoint.py"""

import shutil
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import write_rows
from safetensors.torch import load_file

import eval as evaluation
import train
from common import integrity, run_folder
from common.errors import UserError
from training import checkpoint


class Crash(BaseException):
    """Nothing in the run catches it."""


@pytest.fixture
def cut_run(monkeypatch):
    """cut_run(WORDS, 5): train.py, killed in its fifth step."""

    def start(words: list[str], step: int) -> None:
        def write_and_crash(log, line, write=run_folder.Log.write):
            write(log, line)
            if line["step"] == step:
                raise Crash

        with monkeypatch.context() as m, pytest.raises(Crash):
            m.setattr(run_folder.Log, "write", write_and_crash)
            train.main(words)

    return start


def flip_a_bit(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same_model(run: Path, other: Path) -> None:
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (run, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("save_every", ["0", "4"])
def test_a_run_killed_before_its_first_checkpoint_begins_at_step_0(tmp_path, train_args, cut_run, capsys, save_every):
    words = train_args(tmp_path / "run", "--save_every", save_every)
    cut_run(words, 3)
    (tmp_path / "run" / "checkpoints" / ".aside_step_000004").mkdir(parents=True)  # the kill was in the first save
    train.main([*words, "--resume"])
    assert f"{tmp_path / 'run'} holds no checkpoint: starting at step 0" in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoints" / ".aside_step_000004").exists()
    train.main(train_args(tmp_path / "whole"))
    assert_same_model(tmp_path / "run", tmp_path / "whole")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 10 and run_folder.read_json(tmp_path / "run" / "run.json")["resumed"][0]["step"] == 0


def test_a_folder_without_a_run_is_not_resumed(tmp_path, train_args):
    with pytest.raises(UserError, match="run holds no run; leave out --resume to start one"):
        train.main(train_args(tmp_path / "run", "--resume"))


def test_a_resumed_run_deletes_what_the_kill_left(tmp_path, train_args, cut_run):
    words = train_args(tmp_path / "run", "--save_every", "2", "--keep_checkpoints", "2")
    cut_run(words, 7)
    folder = tmp_path / "run" / "checkpoints"
    assert names(folder) == ["step_000004", "step_000006"]
    shutil.copytree(folder / "step_000004", folder / "step_000002")  # the kill was between a save and its clean-up
    (folder / ".aside_step_000008").mkdir()
    cut_run([*words, "--resume"], 7)  # before its next save
    assert names(folder) == ["step_000004", "step_000006"]


def test_a_damaged_checkpoint_never_takes_the_place_of_a_sound_one(tmp_path, train_args, cut_run):
    """A newer checkpoint that was passed over is not counted among those that are kept."""
    words = train_args(tmp_path / "run", "--save_every", "4", "--keep_checkpoints", "1")
    cut_run(words, 5)
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "step_000004", folder / "step_000007")
    flip_a_bit(folder / "step_000007" / "model.safetensors")
    cut_run([*words, "--resume", "--save_every", "1"], 7)
    assert names(folder) == ["step_000006", "step_000007"]
    train.main([*words, "--resume", "--save_every", "3"])
    assert names(folder) == ["step_000009"]


SHAPES = {
    "null": b"null", "number": b"3", "list": b"[1]", "empty": b"{}", "no entry": b'{"model.safetensors": null}',
    "no size": b'{"model.safetensors": {"bytez": 1, "crc32": 2}}', "not text": b"\xff", "cut": b'{"model',
}  # fmt: skip


@pytest.mark.parametrize("content", SHAPES.values(), ids=SHAPES)
def test_a_damaged_list_is_noticed(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    integrity.seal(tmp_path)
    assert integrity.damaged_file(tmp_path) is None
    (tmp_path / "COMPLETED").write_bytes(content)
    assert integrity.damaged_file(tmp_path) == "COMPLETED"


def test_a_damaged_list_is_passed_over(tmp_path, train_args, cut_run, capsys):
    words = train_args(tmp_path / "run", "--save_every", "2")
    cut_run(words, 5)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step_000004" / "COMPLETED").write_bytes(SHAPES["null"])
    train.main([*words, "--resume"])
    out = capsys.readouterr().out
    assert "passing over the checkpoint step_000004: COMPLETED is missing, cut or changed" in out
    assert f"resumed from {folder / 'step_000002'}" in out


def test_any_flipped_bit_is_found(tmp_path):
    (tmp_path / "a").write_bytes(b"some bytes")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b").write_bytes(b"others")
    integrity.seal(tmp_path, leave_out=["README.md"])
    for path in (tmp_path / "a", tmp_path / "folder" / "b", tmp_path / "COMPLETED"):
        sound = path.read_bytes()
        for position in range(len(sound)):
            if path.name == "COMPLETED" and sound[position : position + 1] in b" \n":
                continue  # a space says nothing
            flip_a_bit(path, position)
            assert integrity.damaged_file(tmp_path) is not None, (path, position)
            path.write_bytes(sound)
    (tmp_path / "README.md").write_text("may change")
    assert integrity.damaged_file(tmp_path) is None


def test_other_things_beside_the_checkpoints_are_passed_over(tmp_path, train_args, cut_run, capsys):
    words = train_args(tmp_path / "run", "--save_every", "1", "--keep_checkpoints", "1")
    cut_run(words, 3)
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "step_000002", folder / "step_backup")
    (folder / "notes.txt").write_text("mine")
    (folder / "step_000009").write_text("a file")
    train.main([*words, "--resume"])
    out = capsys.readouterr().out
    for name in ("step_backup", "notes.txt", "step_000009"):
        assert f"passing over {folder / name}: not a checkpoint" in out
    assert f"resumed from {folder / 'step_000002'}" in out
    assert names(folder) == ["notes.txt", "step_000010", "step_backup"]


def test_a_flipped_bit_in_the_final_model_is_noticed(tmp_path, train_args, capsys):
    words = train_args(tmp_path / "run", "--save_every", "8")
    train.main(words)
    final = tmp_path / "run" / "final"
    sound = (final / "model.safetensors").read_bytes()
    flip_a_bit(final / "model.safetensors")
    train.main([*words, "--resume"])  # is made again from the last checkpoint
    out = capsys.readouterr().out
    assert "passing over the model " in out and "final: model.safetensors is missing, cut or changed" in out
    assert (final / "model.safetensors").read_bytes() == sound and "finished" not in out
    assert train.main([*words, "--resume"]) == {} and "this run is finished" in capsys.readouterr().out
    flip_a_bit(final / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match=r"no complete checkpoint .*\(final: model.safetensors is .*--overwrite"):
        train.main([*words, "--resume"])  # never trains the whole again without being told to


def test_eval_notices_a_flipped_bit(tmp_path, train_args):
    train.main(train_args(tmp_path / "run", "--max_steps", "1"))
    final = tmp_path / "run" / "final"
    items = write_rows(tmp_path / "items.jsonl", [{"question": "1+1?", "answer": "#### 2"}])
    words = ["--model", str(final), "--tasks", f"gsm8k={items}", "--dtype", "float32", "--output_dir"]
    flip_a_bit(final / "model.safetensors")
    with pytest.raises(UserError, match=r"model .*final: model.safetensors is missing, cut or changed since .*delete"):
        evaluation.main([*words, str(tmp_path / "eval")])
    (final / "COMPLETED").unlink()  # a changed model, or one of another program, is scored all the same
    assert evaluation.main([*words, str(tmp_path / "eval")])["gsm8k.metamath"]["n"] == 1


def test_paged_moments_are_paged_after_a_resume(tmp_path, train_args, cut_run, monkeypatch):
    """A CPU cannot page. In the place of what makes a paged buffer, and of what moves it alone, there are stand-ins."""
    from bitsandbytes import functional
    from bitsandbytes.optim.optimizer import Optimizer8bit

    pages, moved = [], []

    def get_state_buffer(self, p, dtype=torch.float32):
        buffer = torch.zeros_like(p, dtype=dtype)
        if self.is_paged and p.numel() >= 4096:
            buffer.is_paged = True
            pages.append(buffer)
        return buffer

    def prefetch(tensor):
        assert any(tensor is page for page in pages), "not a paged buffer"
        moved.append(tensor)

    monkeypatch.setattr(Optimizer8bit, "get_state_buffer", get_state_buffer)
    monkeypatch.setattr(functional, "prefetch_tensor", prefetch)
    words = [*train_args(tmp_path / "run", "--save_every", "2"), "--optimizer", "paged_adamw_8bit"]
    cut_run(words, 5)
    assert len(pages) == 4 and len(moved) == 5 * 4  # two moments each of the embedding and the head
    pages.clear(), moved.clear()
    train.main([*words, "--resume"])
    assert len(pages) == 4 and len(moved) == 6 * 4
    train.main([*train_args(tmp_path / "whole"), "--optimizer", "paged_adamw_8bit"])
    assert_same_model(tmp_path / "run", tmp_path / "whole")


def test_checkpoints_are_not_read_onto_the_gpu(tmp_path):
    """Where Accelerate itself chooses, under DDP, they are: beside the weights and moments that are there."""
    (tmp_path / "progress.json").write_text("{}")
    calls = []
    accelerator = SimpleNamespace(load_state=lambda folder, **more: calls.append(more))
    assert checkpoint.load(accelerator, tmp_path) == {} and calls == [{"map_location": "cpu"}]


@pytest.mark.gpu
def test_paged_moments_are_paged_after_a_load():
    from common.config import TrainConfig
    from training.backend import build_optimizer

    settings = {"model": "m", "dataset": ["d"], "output_dir": "o", "rule": "none", "optimizer": "paged_adamw_8bit"}
    layers = [torch.nn.Linear(400, 400, device="cuda") for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    first, second = optimizers = [build_optimizer(TrainConfig(**settings), layer) for layer in layers]
    for step in range(4):
        for layer, optimizer in zip(layers, optimizers, strict=True):
            layer.weight.grad = torch.full_like(layer.weight, step + 1.0)
            layer.bias.grad = torch.ones_like(layer.bias)
            optimizer.step()
        second.load_state_dict(first.state_dict())
    assert second.state[layers[1].weight]["state1"].is_paged
    assert torch.equal(layers[0].weight, layers[1].weight)


def test_overwriting_never_leaves_half_of_a_checkpoint(tmp_path, train_args, cut_run, monkeypatch):
    words = train_args(tmp_path / "run", "--save_every", "2")
    cut_run(words, 5)

    def killed(*args, **kwargs):
        raise Crash

    with monkeypatch.context() as m, pytest.raises(Crash):
        m.setattr(shutil, "rmtree", lambda path, **kwargs: killed() if Path(path).exists() else None)
        run_folder.clear(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    train.main([*words, "--resume"])
    assert checkpoint.complete(tmp_path / "run" / "checkpoints")
    train.main([*words, "--overwrite"])
    assert not list((tmp_path / "run").glob(".deleted*"))


def test_a_folder_that_is_not_the_main_process_s_is_refused(tmp_path, monkeypatch):
    """On a network's file system the file may come late, and be an older one at first."""
    here, there = tmp_path / ".lock", b"of the main process"
    monkeypatch.setattr(run_folder, "broadcast", lambda seen: torch.tensor([zlib.crc32(there)]))
    alone = SimpleNamespace(device="cpu", reduce=lambda flag, how: flag)
    for content in (None, b"of an older run"):
        if content:
            here.write_bytes(content)
        with pytest.raises(UserError, match="is not one folder for all processes"):
            run_folder.refuse_separate_folders(tmp_path, alone, patience=0)
    late = threading.Timer(0.3, lambda: here.write_bytes(there))
    late.start()
    run_folder.refuse_separate_folders(tmp_path, alone, patience=60)
    late.join()
