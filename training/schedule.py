"""The learning rate of each step."""

import math

import torch

from common.config import TrainConfig


def lr_factor(config: TrainConfig, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) over its peak, as in transformers.get_scheduler.

    So the first step of a warm-up has learning rate 0, and the last step of a decay has one step's worth left.
    """
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.lr_schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress if config.lr_schedule == "linear" else 1.0


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr
