"""What is measured on the real model before training: that its loss is its own, and that packing is safe."""

import unittest.mock

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import TrainConfig
from common.errors import UserError
from common.precision import warn_if_no_gpu, warn_if_slow
from training import backend
from training.data import Examples, collate
from training.losses import attach_loss, evaluating
from training.plan import wants_packing

LEAST_LOSS = 1e-2  # nats per token


class _Hidden:
    """The output of a model's layers: hidden states, and None where something else is asked for."""

    def __init__(self, states: Tensor):
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return self.last_hidden_state


def changes_logits(model: nn.Module) -> bool:
    """Whether a model without weights does something to its logits, behind the head, that attach_loss does not know.

    A head of eight tokens takes the place of its own, and random hidden states that of its layers' output. False where
    this cannot be told: check_loss looks at the real model. The model is not to be used afterwards.
    """
    generator = torch.Generator().manual_seed(0)
    head = model.get_output_embeddings()
    hidden = torch.randn(1, 3, head.in_features, generator=generator)
    inputs, positions, targets = torch.zeros(1, 3, dtype=torch.int64), torch.arange(3), torch.tensor([1, 2, 3])
    small = nn.Linear(head.in_features, 8, bias=head.bias is not None)
    small.weight.data.normal_(generator=generator)
    try:
        model.set_output_embeddings(small)
        with torch.no_grad(), unittest.mock.patch.object(model.base_model, "forward", lambda *a, **k: _Hidden(hidden)):
            theirs = F.cross_entropy(model(input_ids=inputs).logits[0], targets, reduction="none")
            attach_loss(model, 0)
            ours = model(input_ids=inputs, positions=positions, targets=targets)
    except Exception:  # a model that is put together in another way
        return False
    return distance(ours, theirs) > 1e-4


def check_loss(config: TrainConfig, model: nn.Module, examples: Examples, accelerator: Accelerator) -> None:
    """Raise UserError where losses.attach_loss is not the cross-entropy of the model's own logits.

    This is the case when a model does something to its logits, behind the head, that attach_loss does not know.
    """
    shortest = [[int(examples.lengths.argmin())]]
    batch = collate(examples, shortest, accelerator.device)
    with evaluating(model):
        ours = model(**batch)
        logits = model(input_ids=batch["input_ids"]).logits.flatten(0, 1)[batch["positions"]]
    if logits.dtype != torch.float64:
        logits = logits.float()
    theirs = F.cross_entropy(logits, batch["targets"], reduction="none")
    if backend.any_process(distance(ours, theirs) > _rounding(config), accelerator):
        raise UserError(
            f"model {config.model} ({model_type(model)}) does something to its logits that losses.attach_loss does not "
            f"know: its loss is {theirs.mean():.4f}, that of attach_loss {ours.mean():.4f}"
        )


def packing_leaks(config: TrainConfig, model: nn.Module, examples: Examples, accelerator: Accelerator) -> str:
    """Why the model must not be given packed rows; "" where it may.

    Looked at are the losses of the second of two examples in one row: they must not depend on what the first one says,
    and must be those of that example in a row of its own.
    """
    if len(examples) < 2:
        return "there is one example"
    first, second = np.argsort(examples.lengths, kind="stable")[len(examples) // 2 - 1 :][:2].tolist()

    def second_losses(rows: list[list[int]], reverse: int = 0) -> Tensor:
        batch = collate(examples, rows, accelerator.device, packed=True)
        batch["input_ids"][:, :reverse] = batch["input_ids"][:, :reverse].flip(1)
        return model(**batch)[-int(examples.trained[second]) :]

    with evaluating(model):
        together = second_losses([[first, second]])
        other = second_losses([[first, second]], reverse=int(examples.lengths[first]))
        apart = second_losses([[second]])
    if backend.any_process(distance(together, other) > 1e-5, accelerator):
        return f"{model_type(model)} lets an example see the one before it, with attention {config.attention}"
    if backend.any_process(distance(together, apart) > _rounding(config), accelerator):
        return f"{model_type(model)} gives an example other losses in a packed row than apart"
    return ""


def decide_packing(config: TrainConfig, model: nn.Module, examples: Examples, accelerator: Accelerator) -> bool:
    """Whether rows are packed.

    Raises:
        UserError: `packing: on`, and the model must not be given packed rows.
    """
    if not wants_packing(config):
        return False
    reason = packing_leaks(config, model, examples, accelerator)
    if reason and config.packing == "on":
        raise UserError(f"packing on: {reason}; use packing auto or off")
    if reason:
        accelerator.print(f"not packed: {reason}")
    return not reason


def check_model(config: TrainConfig, model: nn.Module, examples: Examples, accelerator: Accelerator) -> bool:
    """check_loss, then decide_packing: whether rows are packed."""
    check_loss(config, model, examples, accelerator)
    return decide_packing(config, model, examples, accelerator)


def warnings(config: TrainConfig, device: torch.device) -> list[str]:
    """Lines for people: no GPU is found, or `device` has no instructions for the dtype of a run's products."""
    weights = getattr(torch, config.master_dtype)  # what is multiplied without autocast
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": weights}[config.mixed_precision]
    instead = "--mixed_precision fp32" if device.type == "cpu" else "--mixed_precision fp16 or fp32"
    if weights == torch.bfloat16:
        instead += " and --master_dtype float32"
    return list(filter(None, (warn_if_no_gpu(device), warn_if_slow(dtype, device, instead))))


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| of losses; NaN where either is.

    Losses are taken for at least LEAST_LOSS each: those of text that a model knows by heart are smaller than rounding.
    """
    return float((a - b).norm() / b.norm().clamp(min=LEAST_LOSS * len(b) ** 0.5))


def model_type(model: nn.Module) -> str:
    return f"model type {getattr(model, 'module', model).config.model_type}"


def _rounding(config: TrainConfig) -> float:
    """How far losses of the same tokens, computed in two ways, may lie apart."""
    return 1e-4 if config.mixed_precision == "fp32" and config.master_dtype != "bfloat16" else 2e-2
