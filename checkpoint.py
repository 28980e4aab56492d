"""Checkpoints: written aside, made durable, then put in place by one rename; resume; retention."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from config import UserError

COMPLETED, PROGRESS = "COMPLETED", "progress.json"


def save(accelerator: Accelerator, folder: Path, progress: dict[str, Any], keep: int) -> None:
    """Save the state of all processes as folder/step_000123 (progress["step"]); keep the latest `keep` checkpoints.

    Raises:
        UserError: the save failed (no space, say). Earlier checkpoints are as they were.
    """
    target = folder / f"step_{progress['step']:06d}"

    def write(aside: Path) -> None:
        accelerator.save_state(str(aside))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (aside / PROGRESS).write_text(json.dumps(progress))

    _put_in_place(accelerator, target, folder, write, f"checkpoint {target}")
    if accelerator.is_main_process:
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def save_model(accelerator: Accelerator, folder: Path, model, tokenizer) -> None:
    """Save model and tokenizer with save_pretrained as `folder`, for from_pretrained to load.

    Raises:
        UserError: the save failed.
    """

    def write(aside: Path) -> None:
        if accelerator.is_main_process:
            accelerator.unwrap_model(model).save_pretrained(aside)
            tokenizer.save_pretrained(aside)

    _put_in_place(accelerator, folder, folder.with_name("checkpoints"), write, f"model {folder}")


def _put_in_place(
    accelerator: Accelerator, target: Path, checkpoints: Path, write: Callable[[Path], None], what: str
) -> None:
    aside = target.with_name(f".aside_{target.name}")
    try:
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        accelerator.wait_for_everyone()
        write(aside)
        if accelerator.is_main_process:
            _seal(aside)
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
            _fsync(target.parent)
        accelerator.wait_for_everyone()
    except Exception as e:  # torch, safetensors and the system each have their own word for a full disk
        shutil.rmtree(aside, ignore_errors=True)
        earlier = complete(checkpoints)
        free = shutil.disk_usage(target.parent if target.parent.exists() else "/").free / 2**30
        raise UserError(
            f"{what} could not be saved: {' '.join(str(e).split())[:200]} ({free:.2f} GiB free there). "
            + (
                f"The last good checkpoint is {earlier[-1]}: make room and --resume"
                if earlier
                else "There is no earlier one"
            )
        ) from e


def _seal(folder: Path) -> None:
    """Make the files durable and list their sizes in COMPLETED."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files:
        _fsync(path)
    (folder / COMPLETED).write_text(json.dumps({str(p.relative_to(folder)): p.stat().st_size for p in files}, indent=1))
    _fsync(folder / COMPLETED)
    _fsync(folder)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_complete(folder: Path) -> bool:
    """Whether every file that COMPLETED lists is there in its full size."""
    try:
        sizes = json.loads((folder / COMPLETED).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted((p for p in folder.glob("step_*") if is_complete(p)), key=lambda p: int(p.name.split("_")[1]))


def latest(folder: Path) -> Path:
    """The newest complete checkpoint.

    Raises:
        UserError: there is none.
    """
    if not (found := complete(folder)):
        damaged = ", ".join(p.name for p in folder.glob("step_*"))
        raise UserError(
            f"resume: no complete checkpoint in {folder}"
            + (f" (incomplete: {damaged})" if damaged else "")
            + "; start again with --overwrite"
        )
    return found[-1]


def load(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """Restore model, optimizer and scaler of the prepared objects from a checkpoint; returns its progress.

    Raises:
        UserError: a file is damaged or does not fit the model.
    """
    try:
        accelerator.load_state(str(folder))
        return json.loads((folder / PROGRESS).read_text())
    except Exception as e:
        raise UserError(f"checkpoint {folder} cannot be loaded: {' '.join(str(e).split())[:300]}") from e
