"""Checkpoints: written aside, made durable, then put in place by one rename; verified, resumed from, retained."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from common import integrity
from common.errors import UserError, one_line
from common.hub import save_tokenizer
from common.model_card import CARD
from training import backend, lora, mask_tuning

PROGRESS = "progress.json"
_NAME, _ASIDE = re.compile("step_([0-9]+)"), ".aside_"


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
        clean(folder, target, keep)
    accelerator.wait_for_everyone()


def save_model(accelerator: Accelerator, folder: Path, model, tokenizer, card: str, adapter=None) -> None:
    """Save model, tokenizer and model card with save_pretrained as `folder`, for from_pretrained to load.

    Under FSDP2 the weights are gathered tensor by tensor into the main process's CPU memory. Masks that were learnt are
    multiplied into their weights first.

    Args:
        adapter: what lora.add returned. It is saved beside `folder`, as adapter/, and then merged into `model`.
    Raises:
        UserError: the save failed.
    """
    checkpoints = folder.with_name("checkpoints")

    def write_adapter(aside: Path) -> None:
        lora.save(adapter, aside, accelerator.is_main_process)

    def write(aside: Path) -> None:
        weights = accelerator.get_state_dict(model) if accelerator.is_fsdp2 else None
        for config, name, rate in getattr(accelerator.unwrap_model(model), "dropout_rates", ()):  # DPO's: see loading
            setattr(config, name, rate)
        if accelerator.is_main_process:
            accelerator.unwrap_model(model).save_pretrained(aside, state_dict=weights)
            save_tokenizer(tokenizer, aside)
            (aside / CARD).write_text(card, encoding="utf-8")

    if adapter is not None:
        beside = folder.with_name("adapter")
        _put_in_place(accelerator, beside, checkpoints, write_adapter, f"adapter {beside}")
        lora.merge(adapter)
    mask_tuning.fold(accelerator.unwrap_model(model), accelerator.print)
    _put_in_place(accelerator, folder, checkpoints, write, f"model {folder}")


def _put_in_place(
    accelerator: Accelerator, target: Path, checkpoints: Path, write: Callable[[Path], None], what: str
) -> None:
    aside = target.with_name(f"{_ASIDE}{target.name}")

    def make_room() -> None:
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def commit() -> None:
        if accelerator.is_main_process:
            integrity.seal(aside, leave_out=[CARD])  # eval.py adds scores to the card
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
            aside.rename(target)
            integrity.fsync(target.parent)

    try:
        _together(accelerator, make_room)
        _together(accelerator, lambda: write(aside))
        _together(accelerator, commit)
    except Exception as e:  # torch, safetensors and the system each have their own word for a full disk
        shutil.rmtree(aside, ignore_errors=True)
        earlier = complete(checkpoints)
        free = shutil.disk_usage(target.parent if target.parent.exists() else "/").free / 2**30
        raise UserError(
            f"{what} could not be saved: {one_line(e, 200)} ({free:.2f} GiB free there). "
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
    if backend.any_process(error is not None, accelerator):
        raise error or RuntimeError("another process failed")


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return [p for p in _numbered(folder) if integrity.is_complete(p)]


def _numbered(folder: Path) -> list[Path]:
    """The folders step_NUMBER in a folder, oldest first, whatever is in them."""
    return sorted((p for p in folder.glob("step_*") if _NAME.fullmatch(p.name) and p.is_dir()), key=_step)


def _step(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def clean(folder: Path, newest: Path | None, keep: int) -> None:
    """Delete what saves that were cut have left, and all but the latest `keep` checkpoints up to `newest`.

    Later ones than `newest` were passed over as damaged; they are replaced, or deleted, as the run advances.
    """
    for path in folder.glob(f"{_ASIDE}*"):
        shutil.rmtree(path)
    kept = [p for p in complete(folder) if newest and _step(p) <= _step(newest)][-keep:]
    for path in _numbered(folder):
        if kept and _step(path) < _step(kept[0]):
            shutil.rmtree(path)


def is_finished(accelerator: Accelerator, final: Path) -> bool:
    """Whether the final model of a run is there, as it was saved. The main process reports a damaged one."""
    finished = False
    if accelerator.is_main_process and final.exists():
        file = integrity.damaged_file(final)
        finished = file is None
        if not finished:
            accelerator.print(f"passing over the model {final}: {file} is missing, cut or changed")
    return broadcast_object_list([finished])[0]


def latest(accelerator: Accelerator, folder: Path) -> Path | None:
    """The newest checkpoint whose files are what they were when it was saved; None where nothing was ever saved.

    The main process reads them all, and reports what it skips.

    Raises:
        UserError: what was saved, checkpoints or the final model beside them, is damaged.
    """
    damaged, found = [], None
    if accelerator.is_main_process:
        for path in sorted(folder.glob("[!.]*")):
            if not (_NAME.fullmatch(path.name) and path.is_dir()):
                accelerator.print(f"passing over {path}: not a checkpoint, which is a folder named step_NUMBER")
        for path in reversed(_numbered(folder)):
            if (file := integrity.damaged_file(path)) is None:
                found = path
                break
            damaged.append(f"{path.name}: {file} is missing, cut or changed")
            accelerator.print(f"passing over the checkpoint {damaged[-1]}")
        final = folder.with_name("final")
        if found is None and final.exists():  # damaged, or it would have been the end of the run
            damaged.append(f"final: {integrity.damaged_file(final)} is missing, cut or changed")
    found, damaged = broadcast_object_list([found, damaged])
    if found is None and damaged:
        raise UserError(
            f"resume: no complete checkpoint in {folder} ({'; '.join(damaged)}); start again with --overwrite"
        )
    return found


def load(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """Restore model, optimizer and scaler of the prepared objects from a checkpoint; returns its progress.

    Raises:
        UserError: a file is damaged or does not fit the model.
    """
    try:
        # Under DDP all would be read onto the GPU, where there is no room for a second copy.
        accelerator.load_state(str(folder), map_location="cpu")
        return json.loads((folder / PROGRESS).read_text())
    except Exception as e:
        raise UserError(f"checkpoint {folder} cannot be loaded: {one_line(e)}") from e
