"""Checkpoints: written aside, made durable, then put in place by one rename; verified, resumed from, retained."""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from common.config import UserError
from common.run_folder import CARD

COMPLETED, PROGRESS = "COMPLETED", "progress.json"


def save(accelerator: Accelerator, folder: Path, progress: dict[str, Any], keep: int) -> None:
    """Save the state of all processes as folder/step_000123 (progress["step"]); keep the latest `keep` checkpoints.

    Under FSDP2 every process writes its shards, which any number of processes can load again.

    Raises:
        UserError: the save failed (no space, say). Earlier checkpoints are as they were.
    """
    target = folder / f"step_{progress['step']:06d}"

    def write(aside: Path) -> None:
        accelerator.save_state(str(aside))
        if accelerator.is_main_process:
            (aside / PROGRESS).write_text(json.dumps(progress))

    _put_in_place(accelerator, target, folder, write, f"checkpoint {target}")
    if accelerator.is_main_process:
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def save_model(accelerator: Accelerator, folder: Path, model, tokenizer, card: str) -> None:
    """Save model, tokenizer and model card with save_pretrained as `folder`, for from_pretrained to load.

    Under FSDP2 the weights are gathered tensor by tensor into the main process's CPU memory.

    Raises:
        UserError: the save failed.
    """

    def write(aside: Path) -> None:
        weights = accelerator.get_state_dict(model) if accelerator.is_fsdp2 else None
        if accelerator.is_main_process:
            accelerator.unwrap_model(model).save_pretrained(aside, state_dict=weights)
            tokenizer.save_pretrained(aside)
            (aside / CARD).write_text(card, encoding="utf-8")

    _put_in_place(accelerator, folder, folder.with_name("checkpoints"), write, f"model {folder}")


def _put_in_place(
    accelerator: Accelerator, target: Path, checkpoints: Path, write: Callable[[Path], None], what: str
) -> None:
    aside = target.with_name(f".aside_{target.name}")

    def make_room() -> None:
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def commit() -> None:
        if accelerator.is_main_process:
            _seal(aside)
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
            _fsync(target.parent)

    try:
        _together(accelerator, make_room)
        _together(accelerator, lambda: write(aside))
        _together(accelerator, commit)
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


def _together(accelerator: Accelerator, action: Callable[[], None]) -> None:
    """Do something on every process; where it fails on one, all raise, instead of waiting for that one."""
    error = None
    try:
        action()
    except Exception as e:
        error = e
    failed = torch.tensor(float(error is not None), device=accelerator.device)
    if accelerator.reduce(failed, "sum") > 0:
        raise error or RuntimeError("another process failed")


def _seal(folder: Path) -> None:
    """Make the files durable and list their sizes and checksums in COMPLETED."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CARD)  # eval.py adds scores to the card
    with ThreadPoolExecutor() as threads:
        checksums = list(threads.map(_checksum, files))
    for path in files:
        _fsync(path)
    content = {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "crc32": c}
        for p, c in zip(files, checksums, strict=True)
    }
    (folder / COMPLETED).write_text(json.dumps(content, indent=1))
    _fsync(folder / COMPLETED)
    _fsync(folder)


def _checksum(path: Path) -> int:
    """CRC-32 of a file: finds what a disk or a copy has changed, at the speed of reading."""
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_complete(folder: Path) -> bool:
    """Whether every file that COMPLETED lists is there in its full size."""
    return damaged_file(folder, read=False) is None


def damaged_file(folder: Path, read: bool = True) -> str | None:
    """The first file of a checkpoint that is missing, cut or (with `read`) changed; None where all are whole."""
    try:
        content = json.loads((folder / COMPLETED).read_text())
    except (OSError, ValueError):
        return COMPLETED
    for name, expected in content.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            return name
        if read and _checksum(path) != expected["crc32"]:
            return name
    return None


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted((p for p in folder.glob("step_*") if is_complete(p)), key=lambda p: int(p.name.split("_")[1]))


def latest(accelerator: Accelerator, folder: Path) -> Path:
    """The newest checkpoint whose files are what they were when it was saved. The main process reads them all.

    Raises:
        UserError: there is none.
    """
    damaged, found = [], None
    if accelerator.is_main_process:
        for path in sorted(folder.glob("step_*"), key=lambda p: -int(p.name.split("_")[1])):
            if (file := damaged_file(path)) is None:
                found = path
                break
            damaged.append(f"{path.name}: {file} is missing, cut or changed")
            accelerator.print(f"passing over the checkpoint {damaged[-1]}")
    found, damaged = broadcast_object_list([found, damaged])
    if found is None:
        raise UserError(
            f"resume: no complete checkpoint in {folder}"
            + (f" ({'; '.join(damaged)})" if damaged else "")
            + "; start again with --overwrite"
        )
    return found


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
