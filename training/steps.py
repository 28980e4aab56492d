"""What an optimizer step computes: micro-batches, their gradients and their norm; and the evaluation loss."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from common.config import ZEROTH_ORDER, TrainConfig
from training import backend, plan
from training.data import Examples, collate, step_examples
from training.losses import evaluating
from training.objectives import Objective


class MicroBatch(NamedTuple):
    """The input of one forward pass."""

    inputs: dict[str, Tensor | int]  # of the model, see data.collate
    ids: list[int]  # the examples, in their order in it


class Batches(NamedTuple):
    """What one process computes of an optimizer step, and the step's numbers over all processes."""

    ids: np.ndarray  # the step's examples
    tokens: int  # their tokens
    trained: int  # and those of them that are trained
    micro: list[MicroBatch]  # this process's share
    step: int


def step_batches(config: TrainConfig, examples: Examples, packed: bool, accelerator: Accelerator, step: int) -> Batches:
    """This process's micro-batches of optimizer step `step`. Seeds dropout for them."""
    # dropout is a function of (seed, step, process): there is no generator state to save or restore
    torch.manual_seed(((config.seed * 1_000_003 + step) * 100_003 + accelerator.process_index) % 2**63)
    ids = step_examples(len(examples), config.global_batch_size, config.seed, step, config.shuffle)
    micro = list(distribute(config, examples, ids, packed, accelerator))
    return Batches(ids, int(examples.lengths[ids].sum()), int(examples.trained[ids].sum()), micro, step)


def distribute(
    config: TrainConfig, examples: Examples, ids: np.ndarray, packed: bool, accelerator: Accelerator
) -> Iterator[MicroBatch]:
    """This process's micro-batches of the examples `ids`."""
    shares = plan.distribute(config, examples, ids, packed, accelerator.num_processes)
    for rows in shares[accelerator.process_index]:
        yield MicroBatch(collate(examples, rows, accelerator.device, packed), [i for row in rows for i in row])


def backward(model: nn.Module, batches: Batches, objective: Objective, accelerator: Accelerator) -> Tensor:
    """Accumulate the gradient of the step's loss; returns this process's sums of the loss and of the metrics, fp64.

    DDP reduces gradients once, after the last micro-batch. FSDP2 does after each, so that no process ever holds all
    of them. A weight that the step does not use has gradient 0, on every backend.
    """
    sharded = accelerator.distributed_type == DistributedType.FSDP
    sums = torch.zeros(1 + len(objective.metrics), dtype=torch.float64, device=accelerator.device)
    count = objective.count(batches.ids)
    for i, batch in enumerate(batches.micro):
        reduce_now = sharded or i + 1 == len(batches.micro)
        with contextlib.nullcontext() if reduce_now else accelerator.no_sync(model):
            loss, metrics = objective(model(**batch.inputs), batch.ids)
            sums += torch.stack([x.detach().double() for x in (loss, *metrics)])
            # DDP and FSDP2 average over the processes: undo that, since `count` already counts all of them
            accelerator.backward(loss * (accelerator.num_processes / count))
    for p in model.parameters():
        if p.requires_grad and p.grad is None:  # the step has no use for it: 0, as DDP's buckets have it
            p.grad = torch.zeros_like(p)
    return sums


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The L2 norm of all gradients together, a scalar; a DTensor where FSDP2 shards them.

    Of 16-bit gradients it is fp32: in 16 bits it would have three digits. No gradient outlives the call: a list of them
    that a training loop keeps would hold their memory through the next forward and backward pass.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if any(g.dtype in (torch.bfloat16, torch.float16) for g in grads):
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]
        return torch.linalg.vector_norm(torch.stack(norms))
    return torch.nn.utils.get_total_norm(grads)


def clip(parameters: list[nn.Parameter], max_norm: float) -> tuple[float, float]:
    """Clip the gradients to an L2 norm of max_norm; 0, and gradients that are not finite, leave them as they are.

    Returns:
        The norm before, and the factor by which the gradients were multiplied.
    """
    norm = gradient_norm(parameters)
    value = to_float(norm)
    if not max_norm or not math.isfinite(value):
        return value, 1.0
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return value, min(1.0, max_norm / (value + 1e-6))


class Clipping:
    """Clips the gradient as the keys max_grad_norm and clip say, and knows its norm without that."""

    def __init__(self, config: TrainConfig, model: nn.Module):
        self.parameters, self.factor = [p for p in model.parameters() if p.requires_grad], 1.0
        self.max_norms = {"before": 0.0, "after": 0.0, config.clip: config.max_grad_norm}

    def before_masking(self) -> float:
        """Clip by the whole norm, so that the mask is the only difference between the rules; returns the norm."""
        norm, self.factor = clip(self.parameters, self.max_norms["before"])
        return norm

    def after_masking(self) -> None:
        """Clip by the norm of what masking leaves, so that a rule that keeps little is not clipped for the rest."""
        if self.max_norms["after"]:
            _, self.factor = clip(self.parameters, self.max_norms["after"])

    def norms(self, before_masking: float, measure: bool) -> dict[str, float]:
        """What is logged: the norm before masking, and that which the gradients would have now without clipping.

        The second is the first where it is not to be measured.
        """
        kept = to_float(gradient_norm(self.parameters)) / self.factor if measure else before_masking
        return {"grad_norm": before_masking, "grad_norm_kept": kept}


def gradient(
    config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer, backward: Callable[..., Tensor]
) -> tuple[Callable[..., Tensor], Any]:
    """(what computes a step's gradient and returns its sums, what clips the gradient and knows its norms).

    A zeroth-order optimizer is both by itself, see zeroth_order.py.
    """
    if config.optimizer in ZEROTH_ORDER:
        return optimizer.estimate, optimizer
    return backward, Clipping(config, model)


def to_float(norm: Tensor) -> float:
    """The value of a norm, also of sharded gradients."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def zero_gradients(optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
    """Let go of the gradients; under DDP, where they lie in its buckets, set them to 0.

    Gradients that are gone would come back beside the buckets in the first micro-batch, and be held twice.
    """
    optimizer.zero_grad(set_to_none=accelerator.distributed_type not in backend.DDP)


def scaler_warms_up(accelerator: Accelerator, progress: dict[str, Any]) -> bool:
    """Whether fp16's gradient scaler is still looking for a scale: a step without finite gradients is not a bad one.

    It begins with a scale that is too large on purpose, and halves it until the first step has finite gradients. At a
    scale of 1 or less it is not the scale that is to blame.
    """
    before_the_first = progress["step"] == progress["skipped_steps"]
    return accelerator.scaler is not None and before_the_first and accelerator.scaler.get_scale() >= 1


def evaluation(
    config: TrainConfig,
    model: nn.Module,
    held_out: Examples,
    packed: bool,
    objective: Objective,
    accelerator: Accelerator,
) -> dict[str, float | None]:
    """The objective's loss and metrics on the held-out examples, named eval_loss and so on.

    The loss of SFT is the mean cross-entropy per trained token, in nats. All are None where no examples are held out.
    """
    names = [f"eval_{name}" for name in ("loss", *objective.metrics)]
    if not len(held_out):
        return dict.fromkeys(names)
    model = accelerator.unwrap_model(model)
    totals = torch.zeros(len(names), dtype=torch.float64, device=accelerator.device)
    with evaluating(model):
        for batch in distribute(config, held_out, np.arange(len(held_out)), packed, accelerator):
            loss, metrics = objective(model(**batch.inputs), batch.ids)
            totals += torch.stack([loss, *metrics])
    means = accelerator.reduce(totals, "sum") / objective.count(np.arange(len(held_out)))
    return dict(zip(names, means.tolist(), strict=True))
