"""The learning rate of each step."""

import math

import torch

from common.config import TrainConfig

# The way down to 0: the share of it that is behind, in [0, 1) -> the rate over the one that it began with. The first
# three are those of transformers' get_wsd_schedule. The last one is a whole time constant of exp(-x), moved so that it
# ends at 0, as in IBM's dolomite-engine, the code of the Power Scheduler's authors.
DECAYS = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    "1-sqrt": lambda x: 1.0 - math.sqrt(x),
    "exponential": lambda x: (math.exp(1.0 - x) - 1.0) / (math.e - 1.0),
}


def lr_factor(config: TrainConfig, step: int, total_steps: int, tokens_per_step: float) -> float:
    """The learning rate of optimizer step `step` (from 0) over config.learning_rate.

    A linear warm-up, a plateau, a way down to 0. `wsd` (MiniCPM, arXiv 2404.06395, eq. 1) has all three; `constant` no
    way down, `cosine` and `linear` no plateau; `power` (arXiv 2408.13359, eq. 8) has a plateau that falls with the
    tokens so far. As in transformers.get_scheduler, the first step of a warm-up has rate 0, and the last step of a
    decay has one step's worth left.

    It is a function of the step alone, so that a resumed run, and one on another number of processes, has the same
    rates.

    Args:
        tokens_per_step: of a step of the run, on average; for `power`.
    """
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    if config.lr_schedule in ("wsd", "power"):
        shape, decay = config.decay_shape, math.ceil(config.decay_ratio * total_steps)
    else:
        shape, decay = config.lr_schedule, 0 if config.lr_schedule == "constant" else total_steps
    decay_start = max(warmup, total_steps - decay)
    if step < warmup:
        return step / warmup * _plateau(config, warmup * tokens_per_step)
    if step < decay_start:
        return _plateau(config, step * tokens_per_step)
    progress = (step - decay_start) / (total_steps - decay_start)
    return DECAYS[shape](progress) * _plateau(config, decay_start * tokens_per_step)


def _plateau(config: TrainConfig, tokens: float) -> float:
    """What the rate is between warm-up and decay, after so many tokens: under `power` min(eta_max, beta a n^b)."""
    if config.lr_schedule != "power" or not tokens:  # n^b is infinite at 0
        return 1.0
    rate = config.global_batch_size * config.power_a * tokens**config.power_b
    return min(1.0, float(rate / config.learning_rate))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr
