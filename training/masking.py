"""The selection rules of gmt.py, set up from a run's configuration."""

import fnmatch
from collections.abc import Callable
from typing import Any

from torch import nn

import gmt
from common.config import MASK_TUNING, ZEROTH_ORDER, TrainConfig
from common.errors import UserError, user_errors
from training import lora, mask_tuning, zeroth_order


def freeze(config: TrainConfig, model: nn.Module, log: Callable[[str], object] = lambda text: None) -> Any:
    """Freeze what rule hft, an adapter or train_only does not train. Call it before the optimizer is built.

    So does mask_tuning, which puts scores into the model beside the weights that it freezes.

    Returns:
        The adapter that is trained in their place, see lora.add; None where there is none.
    Raises:
        UserError: hft does not know the model's layers, the adapter's targets are not in the model, or a pattern of
            train_only or `exclude` matches no parameter.
    """
    if config.adapter:
        return lora.add(config, model, log)
    if config.train_only:
        trained = train_only(config.train_only, model)
        log(f"train_only: {len(trained)} tensors are trained: {', '.join(trained)}")
        return None
    if config.rule == MASK_TUNING:
        mask_tuning.add(config, model, log)
    if config.rule != "hft":
        return None
    with user_errors():
        frozen = gmt.freeze_half(model, config.seed, config.objective)
    log(f"hft freezes {len(frozen)} tensors: {', '.join(frozen)}")
    return None


def train_only(patterns: list[str], model: nn.Module) -> list[str]:
    """Freeze the parameters whose names match none of the patterns; returns the names of the others, in model order.

    Raises:
        UserError: a pattern matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"train_only: {pattern!r} matches no parameter; the first one here is {names[0]}")
    trained = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    for name, p in model.named_parameters():
        p.requires_grad_(name in trained)
    return trained


def build_masker(config: TrainConfig, model: nn.Module) -> gmt.Masker:
    """The Masker of a run. Call it after `accelerator.prepare`, which may replace parameters.

    Raises:
        UserError: a pattern of `exclude` matches no parameter.
    """
    if config.rule == MASK_TUNING:
        return mask_tuning.Masks(model)
    if config.optimizer in ZEROTH_ORDER:
        return zeroth_order.NoMasks(config.optimizer, model)
    with user_errors():
        return gmt.Masker(
            model.named_parameters(),
            config.rule,
            config.keep_ratio,
            score=config.score or None,
            refresh_every=config.refresh_every,
            masked_weights=config.masked_weights or None,
            scope=config.scope,
            exclude=config.exclude,
            mask_vectors=config.mask_vectors,
            lift_rank=config.lift_rank,
            seed=config.seed,
        )


def calibrate(
    config: TrainConfig,
    masker: gmt.Masker,
    accumulate: Callable[[int], object],
    zero_gradients: Callable[[], None],
) -> None:
    """Choose the masks of grad_square from the first steps' gradients; no optimizer step is taken.

    Nothing happens for the other rules, nor where a checkpoint has brought the masks.

    Args:
        accumulate: accumulates the gradients of a step, given its number; zero_gradients lets go of them.
    Raises:
        UserError: masks cannot be chosen from these gradients.
    """
    if not masker.needs_calibration:
        return
    for step in range(config.calibration_steps):
        accumulate(step)
        masker.calibrate()
        zero_gradients()
    with user_errors():
        masker.fix_masks()
