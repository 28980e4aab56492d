"""What can be refused before the weights are loaded."""

from pathlib import Path

from torch import nn

import gmt
from common import run_folder
from common.config import TrainConfig
from common.errors import UserError
from common.hub import is_local
from common.launch import check_launch, world_size
from common.sources import data_files, split_cap
from training import backend, plan, resume


def check_paths(config: TrainConfig) -> None:
    """Raise UserError for paths and settings that cannot work; every process comes to the same answer."""
    folder = Path(config.output_dir)
    run_folder.check_output_dir(folder, config.resume, config.overwrite)
    if config.resume:
        resume.refuse_changes(config, folder, resume.about_settings(config))
    datasets = [split_cap(source)[0] for source in config.dataset]
    for source in datasets:
        data_files(source, config.dataset_split)
    for name, path in [("model", config.model), ("tokenizer", config.tokenizer), *(("dataset", d) for d in datasets)]:
        inside = Path(path).expanduser().resolve().is_relative_to(folder.resolve())
        if config.overwrite and path and inside:
            raise UserError(f"overwrite would delete {name} {path}: choose another output_dir")
    for name in ("model", "tokenizer"):
        path = getattr(config, name)
        if path and is_local(path) and not Path(path).is_dir():
            raise UserError(f"{name} {path}: no such folder (a Hub model is written owner/name)")
    backend.check_supported(config)
    if not config.dry_run:  # a plan is made for as many processes as WORLD_SIZE says
        check_launch()
    check_batches(config, None, world_size())


def check_batches(config: TrainConfig, num_examples: int | None, processes: int) -> None:
    """Raise UserError where the batch arithmetic cannot work out; num_examples is None where it is not known yet."""
    numbers = f"global_batch_size {config.global_batch_size}, {processes} processes"
    if config.global_batch_size < processes:
        raise UserError(f"{numbers}: some processes would never get an example; raise global_batch_size")
    if config.per_device_batch_size * processes > config.global_batch_size:
        raise UserError(
            f"{numbers}, per_device_batch_size {config.per_device_batch_size}: one forward pass on every process takes "
            f"{config.per_device_batch_size * processes} examples, more than a step has"
        )
    if num_examples is not None and num_examples < config.global_batch_size:
        raise UserError(
            f"{numbers}, {num_examples} examples: a step would be larger than the data; lower global_batch_size"
        )


def check_memory(config: TrainConfig, model: nn.Module, masker: gmt.Masker, processes: int) -> None:
    """Raise UserError where a step cannot fit on this process's GPU. Without a GPU nothing is refused.

    Counted is what is there for certain at a step: weights, gradients, optimizer state, masks and copies for masking.
    The plan's activations are an estimate, about which it warns.

    Args:
        model: on the meta device, with what is frozen frozen; masker: its masks.
    """
    card = backend.card_bytes()
    if card is None:
        return
    held = plan.certain_bytes(config, model, masker, processes)
    needed = plan.most_at_once(held)
    if needed > card:
        parts = ", ".join(f"{part} {n / 2**30:.1f}" for part, n in held.items() if n)
        raise UserError(
            f"{config.model} needs {needed / 2**30:.1f} GiB a GPU before the first activation ({parts}), and this one "
            f"has {card / 2**30:.1f} GiB: {plan.ways_to_save(config, certain=True)}"
        )
