"""Training losses, as free functions on tensors."""

import torch
from torch import Tensor
from torch.nn import functional as F

from data import IGNORE


def sum_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of next-token cross-entropies over the trained tokens, in nats.

    A sum, not a mean: the loop divides by the trained tokens of the whole optimizer step, over all its micro-batches
    and processes, so that every token weighs the same however the step is split.

    Args:
        logits: (batch, length, vocabulary), any floating dtype; 16-bit ones are widened to fp32 here.
        labels: (batch, length) int64, aligned with the inputs: they are shifted here, once. data.IGNORE is not trained.
    Returns:
        0-d tensor, fp32 (fp64 for fp64 logits); 0 where nothing is trained.
    """
    logits, targets = logits[:, :-1], labels[:, 1:]
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
