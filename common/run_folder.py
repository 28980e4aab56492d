"""What a run leaves on disk besides checkpoints: who may write there, run.json, its log."""

import contextlib
import fcntl
import json
import math
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from common.config import TrainConfig
from common.errors import UserError, one_line

RUN, METRICS, MASKS, REFERENCE = "run.json", "metrics.jsonl", "masks.jsonl", "reference.safetensors"
LOCK = ".lock"
LEFT_BY_A_FAILED_START = (LOCK, f"{RUN}.aside")


def check_writable(folder: Path) -> None:
    """Raise UserError where a folder cannot be made or written to. Reads only."""
    nearest_parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest_parent.is_dir():
        raise UserError(f"output_dir {folder}: {nearest_parent} is a file, expected a folder")
    if not os.access(nearest_parent, os.W_OK):
        raise UserError(f"output_dir {folder}: {nearest_parent} is not writable")


def check_output_dir(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise UserError where a new or resumed run may not use this folder. Reads only: every process gets one answer."""
    check_writable(folder)
    has_run = (folder / RUN).exists()
    if resume and not has_run:
        raise UserError(f"resume: {folder} holds no run; leave out --resume to start one")
    if has_run and not (resume or overwrite):
        raise UserError(f"output_dir {folder} already holds a run: go on with it (--resume) or delete it (--overwrite)")
    if not has_run and folder.exists() and any(p.name not in LEFT_BY_A_FAILED_START for p in folder.iterdir()):
        raise UserError(f"output_dir {folder} is not empty and holds no run ({RUN}): choose another folder")


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder for this process, so that two runs never write into it at once. Call it on the main process only.

    Raises:
        UserError: another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        f = open(folder / LOCK, "a+")  # noqa: SIM115  closed below
    except OSError as e:
        raise UserError(f"output_dir {folder}: cannot be made: {e.strerror}") from None
    with f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            raise UserError(f"output_dir {folder} is in use by {f.read().strip() or 'another process'}") from None
        except OSError as e:  # some file systems of clusters have no locks
            print(f"warning: {folder} cannot be locked ({e.strerror}): see that no second run writes into it")
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()}")
        f.flush()
        os.fsync(f.fileno())
        yield


def refuse_separate_folders(folder: Path, accelerator: Accelerator, patience: float = 60) -> None:
    """Raise UserError, on every process, where one does not see the lock that the main process has just taken.

    Each machine would keep its part of a checkpoint, or of the answers, to itself, and nobody could read the whole.

    Args:
        patience: seconds; a network's file system may show a new file late.
    """
    seen = torch.tensor([_checksum(folder / LOCK)], device=accelerator.device)
    written, deadline = broadcast(seen).item(), time.monotonic() + patience
    while _checksum(folder / LOCK) != written and time.monotonic() < deadline:
        time.sleep(0.5)
    apart = torch.tensor([float(_checksum(folder / LOCK) != written)], device=accelerator.device)
    if accelerator.reduce(apart, "sum") > 0:
        raise UserError(
            f"output_dir {folder} is not one folder for all processes: it has to be on a file system that all machines "
            "share"
        )


def _checksum(file: Path) -> int:
    try:
        return zlib.crc32(file.read_bytes())
    except OSError:
        return -1


def clear(folder: Path) -> None:
    """Delete what a run made in its folder. run.json, by which it is known as a run's, stays until it is replaced.

    Raises:
        UserError: the folder holds no run, or is a link, a home, the root or the working folder.
    """
    if not (folder / RUN).exists():
        return
    if folder.is_symlink() or folder.resolve() in (Path("/"), Path.home().resolve(), Path.cwd().resolve()):
        raise UserError(f"overwrite: {folder} is a link, a home, the root or the working folder: delete it by hand")
    for name in ("checkpoints", "final", "adapter"):
        deleted = folder / f".deleted_{name}"
        shutil.rmtree(deleted, ignore_errors=True)
        if (folder / name).exists():
            (folder / name).rename(deleted)  # at once: what is half deleted would look like a damaged checkpoint
            shutil.rmtree(deleted, ignore_errors=True)
    for name in (METRICS, MASKS, REFERENCE):
        (folder / name).unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is either the old or the new one, whatever happens.

    Raises:
        UserError: it cannot be written: no space, for example.
    """
    aside = path.with_name(path.name + ".aside")
    try:
        with open(aside, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        aside.replace(path)
    except OSError as e:
        raise UserError(f"{path} cannot be written: {e.strerror}") from None


def write_json(path: Path, content: Any) -> None:
    """write_whole, as JSON."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that a run left.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: missing or damaged ({one_line(e)}); choose another output_dir") from None


def environment() -> dict[str, Any]:
    """Command, commit, package versions and hardware, without tokens and home paths."""
    packages = ("torch", "accelerate", "transformers", "datasets", "tokenizers", "numpy")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": redact(" ".join(sys.argv)),
        "git_commit": _git_commit(),
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}},
        "hardware": {"machine": platform.machine(), "cpu_count": os.cpu_count(), "gpu": gpu},
    }


def redact(text: str) -> str:
    """Access tokens and the home folder taken out."""
    return re.sub(r"\bhf_\w{8,}", "hf_***", text).replace(str(Path.home()), "~")


def _git_commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        how = {"capture_output": True, "text": True, "timeout": 10, "check": False}
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **how)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], **how)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown: git is not there"
    if commit.returncode:
        return "none: not a git checkout"
    return commit.stdout.strip() + (" with uncommitted changes" if changed.stdout.strip() else "")


def differences(old: dict, new: dict, names: list[str]) -> list[str]:
    """`name: old -> new` for the names whose values differ."""
    return [f"{n}: {old.get(n)!r} -> {new.get(n)!r}" for n in names if old.get(n) != new.get(n)]


class Log:
    """The log of a run, on disk as soon as it is written: a line per logged step, on the main process.

    metrics.jsonl always; masks.jsonl, what is kept of each tensor; and Accelerate's trackers, if any are configured.

    Attributes:
        last: the last line of metrics.jsonl; on the other processes {} at first, then the same.
    """

    def __init__(self, folder: Path, start_step: int, accelerator: Accelerator, config: TrainConfig):
        self.accelerator = accelerator
        self.files, self.last = {}, {}
        if not accelerator.is_main_process:
            return
        for name in (METRICS, MASKS):
            _forget_after(folder / name, start_step)
            if name == METRICS or config.log_masks_every:
                self.files[name] = open(folder / name, "a", buffering=1)  # noqa: SIM115  as long as the run
        if lines := (folder / METRICS).read_text().splitlines():
            self.last = json.loads(lines[-1])
        if config.trackers:
            simple = {k: v if isinstance(v, (int, float)) else redact(str(v)) for k, v in asdict(config).items()}
            os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "wandb" / "cache"))  # else below the home folder
            try:
                accelerator.init_trackers("gmt", simple, init_kwargs={"wandb": {"dir": str(folder)}})
            except Exception as e:  # each has errors of its own: no account, no network, ...
                raise UserError(f"trackers: {' '.join(config.trackers)}: {one_line(e)}") from e

    def write(self, line: dict[str, Any]) -> None:
        """Log the numbers of a step, without those of single tensors.

        One that is not finite is written as null, since JSON has no NaN.
        """
        finite = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v  # noqa: E731
        line = self.last = {k: finite(v) for k, v in line.items() if k != "tensors"}
        self._append(METRICS, line)
        if self.accelerator.is_main_process and self.accelerator.trackers:
            numbers = {k: v for k, v in line.items() if isinstance(v, (int, float))}
            self.accelerator.log({**numbers, **{f"seconds/{k}": v for k, v in line["seconds"].items()}}, line["step"])

    def write_masks(self, step: int, stats: dict[str, Any]) -> None:
        """Log what is kept of each tensor after so many steps: the statistics of Masker.mask_gradients.

        With what may be in them: update_share_masked, see training/updates.py.
        """
        shares = {"update_share_masked": stats["update_share_masked"]} if "update_share_masked" in stats else {}
        line = {"step": step, "jaccard": stats.get("mask_jaccard"), **shares, "tensors": stats["tensors"]}
        self._append(MASKS, line)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        if file := self.files.get(name):
            try:
                file.write(json.dumps(line) + "\n")
            except OSError as e:
                raise UserError(f"{file.name} cannot be written: {e.strerror}") from None


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines of later steps, and one that a crash has cut: a resumed run does these steps again."""
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        write_whole(path, b"".join(line for line in lines if _step(line) <= step))


def _step(line: bytes) -> float:
    """The step of a line of a log; infinity where the line is damaged, by a crash for example."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return math.inf
