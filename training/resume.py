"""Where a run starts and goes on: run.json, the latest checkpoint, and the one from before a run of bad steps."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator

from common import run_folder
from common.config import FREE_TO_CHANGE, TrainConfig
from common.errors import UserError
from common.hub import identity
from training import checkpoint
from training.data import Examples


def about_settings(config: TrainConfig) -> dict[str, Any]:
    """What is known of a run before its data are loaded: configuration, versions, hardware, and DPO's reference.

    A resumed run of DPO needs the reference once more, which is the model as it was when training began. Of a Hub model
    that is not on this machine yet, nothing is known.
    """
    reference, files = {}, identity(config.model)
    if config.objective == "dpo" and files:
        reference = {"reference": {"model_files": hashlib.sha256(repr(files).encode()).hexdigest()[:16]}}
    return {"config": asdict(config), **reference, **run_folder.environment()}


def describe(config: TrainConfig, examples: Examples, held_out: Examples, accelerator: Accelerator) -> dict[str, Any]:
    """What run.json says of a run: configuration, data, versions and hardware."""
    return {
        **about_settings(config),
        "data": {"examples": len(examples), "fingerprint": examples.fingerprint(), "held_out": held_out.fingerprint()},
        "processes": accelerator.num_processes,
    }


def recorded(folder: Path) -> dict[str, Any]:
    """What run.json says of the run in `folder`, as it was last resumed."""
    old = run_folder.read_json(folder / run_folder.RUN)
    return old.get("resumed", [old])[-1]


def refuse_changes(config: TrainConfig, folder: Path, new: dict[str, Any]) -> None:
    """Raise UserError where the run in `folder`, as it was last resumed, is not the one that `new` describes.

    Only what both of them say of configuration, data, reference and versions is compared, so that a call before the
    data are loaded can go without them. What is left to the run, which then keeps to its choice, is no change.
    """
    old = recorded(folder)
    changed = [change for part in ("config", "data", "reference", "versions") for change in _changes(part, old, new)]
    if changed and not config.resume_changed:
        raise UserError(f"resume: not the run that {folder} holds: {'; '.join(changed)} (--resume_changed goes on)")


def _changes(part: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs in a part of two descriptions of runs, of what makes a difference."""
    if part not in old:
        return []
    names = [name for name in new.get(part, {}) if name not in FREE_TO_CHANGE]
    names = [name for name in names if (name, new[part][name]) != ("micro_batch_tokens", 0)]
    return run_folder.differences(old[part], new.get(part, {}), names)


def open_folder(
    config: TrainConfig,
    folder: Path,
    description: dict[str, Any],
    total_steps: int,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> dict[str, Any] | None:
    """Write run.json, or compare it and load the latest checkpoint.

    Returns:
        The progress so far: step, tokens, skipped_steps; None where the run that is to be resumed is finished.
    Raises:
        UserError: the folder holds another run, or a checkpoint of a step beyond total_steps.
    """
    progress = {"step": 0, "tokens": 0, "skipped_steps": 0}
    if config.resume:
        refuse_changes(config, folder, description)
        if checkpoint.is_finished(accelerator, folder / "final"):
            parts = "config", "data", "reference"
            if changed := [change for part in parts for change in _changes(part, recorded(folder), description)]:
                raise UserError(
                    f"resume_changed: this run is finished with other settings: {'; '.join(changed)}; choose another "
                    f"output_dir, or delete {folder / 'final'} to go on from the latest checkpoint (or step 0)"
                )
            accelerator.print(f"this run is finished: {folder / 'final'} is there")
            return None
        source = checkpoint.latest(accelerator, folder / "checkpoints")
        if source:
            progress = _load(source, optimizer, accelerator)
        accelerator.print(f"resumed from {source}" if source else f"{folder} holds no checkpoint: starting at step 0")
        if progress["step"] > total_steps:
            raise UserError(f"resume: the checkpoint is of step {progress['step']}, this run ends after {total_steps}")
        old = run_folder.read_json(folder / run_folder.RUN)
        description = {**old, "resumed": [*old.get("resumed", []), {"step": progress["step"], **description}]}
    accelerator.wait_for_everyone()  # all have read what is now written or deleted
    if accelerator.is_main_process:
        if config.overwrite:
            run_folder.clear(folder)
        if config.resume:
            checkpoint.clean(folder / "checkpoints", source, config.keep_checkpoints)
        run_folder.write_json(folder / run_folder.RUN, description)
    accelerator.wait_for_everyone()
    return progress


def _load(source: Path, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> dict[str, Any]:
    configured = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    progress = checkpoint.load(accelerator, source)
    for group, hyperparameters in zip(optimizer.param_groups, configured, strict=True):
        group.update(hyperparameters)  # those of this configuration, should it have been changed
    return progress


def stop_at_bad_steps(
    config: TrainConfig, folder: Path, progress: dict[str, Any], good: dict[str, Any], accelerator: Accelerator
) -> NoReturn:
    """Save the state from before a run of skipped steps, with the progress `good`, and end the run with a UserError."""
    saved = "no step was taken before"
    if good["step"] > good["skipped_steps"]:
        checkpoint.save(accelerator, folder / "checkpoints", good, config.keep_checkpoints)
        saved = f"the state from before is {folder / 'checkpoints'}/step_{good['step']:06d}"
    raise UserError(
        f"{progress['step'] - good['step']} steps in a row had a non-finite gradient, up to step {progress['step']} "
        f"(max_skipped_steps): {saved}; look at their rows, listed in {folder / run_folder.METRICS}, "
        f"lower learning_rate, or change mixed_precision"
    )


def refuse_untrained(progress: dict[str, Any]) -> None:
    """Raise UserError at the end of a run none of whose steps had a finite gradient."""
    if progress["skipped_steps"] == progress["step"]:
        raise UserError(
            f"none of the {progress['step']} steps had a finite gradient: nothing was trained, nothing is saved"
        )
