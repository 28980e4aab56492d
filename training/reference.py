"""DPO's reference: the log-probabilities of all answers under the model that training begins with, computed once.

They are kept in the run's folder, so that a resumed run need not compute them again, and no second model is ever in
memory.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from common import run_folder
from common.config import TrainConfig
from common.hub import identity
from training import backend
from training.data import Examples, steps_per_epoch
from training.losses import evaluating
from training.objectives import DPO, SFT, Objective, sequence_logps
from training.steps import distribute, step_batches


class Objectives(NamedTuple):
    """What is minimised, and the same on the held-out examples."""

    training: Objective
    held_out: Objective
    save: Callable[[Path], None]  # writes into the run's folder what a resumed run then need not compute again


def build_objectives(
    config: TrainConfig,
    model: nn.Module,
    examples: Examples,
    held_out: Examples,
    packed: bool,
    accelerator: Accelerator,
) -> Objectives:
    """The objectives of a run. For DPO, `model` is the reference: call it before a checkpoint is loaded."""
    if config.objective == "sft":
        return Objectives(SFT(examples), SFT(held_out), lambda folder: None)
    fingerprint = compute_fingerprint(config, [examples, held_out], packed)
    path = Path(config.output_dir) / run_folder.REFERENCE
    logps = load(path, fingerprint, accelerator) if config.resume else None
    if logps is None:
        accelerator.print("computing the reference's log-probabilities")
        epoch = range(steps_per_epoch(len(examples), config.global_batch_size))
        training = (m for step in epoch for m in step_batches(config, examples, packed, accelerator, step).micro)
        evaluation = distribute(config, held_out, np.arange(len(held_out)), packed, accelerator)
        logps = compute(model, [(examples, training), (held_out, evaluation)], accelerator)

    def save_logps(folder: Path) -> None:
        if accelerator.is_main_process:
            save(folder / run_folder.REFERENCE, logps, fingerprint)

    splits = zip((examples, held_out), logps, strict=True)
    return Objectives(*(DPO(*split, config.beta, config.length_normalised) for split in splits), save_logps)


def compute_fingerprint(config: TrainConfig, parts: list[Examples], packed: bool) -> str:
    """A hash of what the log-probabilities depend on: the data, the model, how it computes."""
    how = [getattr(config, key) for key in ("model", "master_dtype", "mixed_precision", "attention", "seed")]
    everything = [[part.fingerprint() for part in parts], identity(config.model), how, packed]
    return hashlib.sha256(repr(everything).encode()).hexdigest()


def compute(model: nn.Module, parts: list[tuple[Examples, Iterable[Any]]], accelerator: Accelerator) -> list[Tensor]:
    """Log-probabilities under the model as it is now, without dropout: (n, 2) fp64 on the CPU for each of `parts`.

    Args:
        parts: examples, and this process's micro-batches of them (inputs, ids); over all processes each example once.
            In the micro-batches of training, policy and reference agree to the last bit before the first step.
    """
    out = []
    number = sum(len(examples) for examples, _ in parts)
    bar = tqdm(total=number, desc="reference", unit="pair", disable=not accelerator.is_main_process)
    with bar, evaluating(model):
        for examples, micro_batches in parts:
            logps = torch.zeros(len(examples), 2, dtype=torch.float64, device=accelerator.device)
            for batch in micro_batches:
                tokens = torch.from_numpy(examples.sequence_trained[batch.ids].reshape(-1, 2))
                logps[batch.ids] = sequence_logps(model(**batch.inputs), tokens)
                bar.update(len(batch.ids) * accelerator.num_processes)  # about: the others compute theirs
            out.append(accelerator.reduce(logps, "sum").cpu())
    return out


def save(path: Path, logps: list[Tensor], fingerprint: str) -> None:
    """Write what compute returned so that the file is either complete or not there."""
    content = safetensors.torch.save({str(i): part for i, part in enumerate(logps)}, {"fingerprint": fingerprint})
    run_folder.write_whole(path, content)


def load(path: Path, fingerprint: str, accelerator: Accelerator) -> list[Tensor] | None:
    """What `save` wrote; None, on every process, where any of them finds none of this fingerprint."""
    found = None
    try:
        with safe_open(path, "pt") as f:
            if (f.metadata() or {}).get("fingerprint") == fingerprint:
                found = [f.get_tensor(str(i)) for i in range(len(f.keys()))]
    except (OSError, SafetensorError):
        pass
    return None if backend.any_process(found is None, accelerator) else found
