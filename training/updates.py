"""How much of an optimizer step falls on the weights that its masks leave out.

Where masked_weights is `momentum`, as the paper has it, a masked weight has gradient 0 at this step, and AdamW moves it
all the same, by the momentum of earlier steps that kept it.
"""

import torch
from accelerate import Accelerator
from torch import Tensor

import gmt


@torch.no_grad()
def copies(masker: gmt.Masker) -> dict[str, Tensor]:
    """{parameter name: a copy of what this process holds of it}, of the maskable tensors that have a gradient."""
    return {name: _here(p).clone() for name, p in masker.eligible.items() if p.grad is not None}


@torch.no_grad()
def share_of_masked(before: dict[str, Tensor], masker: gmt.Masker, accelerator: Accelerator) -> float | None:
    """The share of the squared norm of an update that lies in entries whose gradient is 0, over all maskable tensors.

    Call it between optimizer.step() and zero_grad(), on every process.

    Args:
        before: copies() from before the step; used up, to hold no second set of tensors.
    Returns:
        A number in [0, 1]; None where nothing has moved.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)  # of masked entries, of all
    for name in list(before):
        p, update = masker.eligible[name], before.pop(name)
        whole = _square(update.sub_(_here(p)))
        sums += torch.stack([_square(update.mul_(_here(p.grad) == 0)), whole])
    masked, whole = accelerator.reduce(sums, "sum").tolist()  # replicas count alike in both
    return masked / whole if whole else None


def _square(tensor: Tensor) -> Tensor:
    """The squared L2 norm, fp64."""
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(tensor, dtype=wide).double().square()


def _here(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
