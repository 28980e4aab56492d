"""Mask tuning (R-AMT; Zheng et al., ICCV 2023, arXiv 2307.15049): which weights stay is learnt, the weights are not.

    W' = M * W,   M_ij = 1 if S_ij > 0, else 0,    S_ij = 0.005 at first, so that M = 1
    dL/dS = W * dL/dW'                             straight through the threshold

The scores S take the place of the weights in the optimizer; all else of a run is as it was. The final model is M * W.
R-AMT's own code starts at 0.01 and has its threshold at 0.005. Only the distance matters to Adam, and the sign of a
score is what survives when FSDP2 gathers it in bf16.

Left out is R-AMT's gradient dropout, which drops an entry's gradient at random where it disagrees with the gradient of
KL(the model without masks || with masks), the general knowledge. For an LLM that is a forward pass more, a second
backward pass through the distributions over the vocabulary, which losses.py never builds, and a second gradient.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import gmt
from common.config import TrainConfig
from common.errors import user_errors

INITIAL_SCORE = 0.005  # about 60 of Adam's steps at R-AMT's learning rate of 8e-5 away from the threshold
_SCORE = re.compile(r"parametrizations\.(\w+)\.original0$")


class _StraightThrough(torch.autograd.Function):
    """M * W, whose gradient by the score is what it would be by M."""

    @staticmethod
    def forward(ctx, score: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = score.dtype
        return weight * (score > 0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad.to(ctx.dtype) * weight, None


class _Mask(nn.Module):
    """Parametrizes a weight by its score, original0, and itself, original1."""

    def forward(self, score: Tensor, weight: Tensor) -> Tensor:
        return _StraightThrough.apply(score, weight)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(weight.dtype, torch.float32)  # in 16 bits most of Adam's steps would round away
        return torch.full_like(weight, INITIAL_SCORE, dtype=wide), weight


def add(config: TrainConfig, model: nn.Module, log: Callable[[str], object] = lambda text: None) -> None:
    """Freeze a transformers model, and give the matrices of its layers scores, which are trained in their place.

    Embeddings and head, which may be tied, are left alone, as are matrices that a pattern of config.exclude names.
    Call it before the optimizer is built. A model on the meta device stays there.

    Raises:
        UserError: a pattern of `exclude` matches no parameter.
    """
    with user_errors():
        eligible = gmt.Masker(model.named_parameters(), "none", exclude=config.exclude).eligible
    chosen = {id(p) for p in eligible.values()}
    ends = {id(model.get_output_embeddings()), *(id(m) for m in model.modules() if isinstance(m, nn.Embedding))}
    model.requires_grad_(False)
    entries = 0
    for module in [m for m in model.modules() if id(m) not in ends]:
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) in chosen:
                parametrize.register_parametrization(module, name, _Mask())
                module.parametrizations[name].original0.requires_grad_(True)
                entries += weight.numel()
    log(f"mask_tuning learns the masks of {entries:,} weights, and changes none of them")


def fold(model: nn.Module, log: Callable[[str], object] = lambda text: None) -> None:
    """Put M * W in the place of scores and weights, and tell how many are masked; other models stay as they are.

    Afterwards the model is an ordinary one. Under FSDP2 every process has to make the call.
    """
    if not (counts := count(model)):
        return
    for module in [m for m in model.modules() if parametrize.is_parametrized(m)]:
        for name in list(module.parametrizations):
            parametrize.remove_parametrizations(module, name)
    entries, kept = (sum(c[key] for c in counts.values()) for key in ("entries", "kept"))
    log(f"the final model has {entries - kept:,} of {entries:,} weights masked ({1 - kept / entries:.2%})")


@torch.no_grad()
def count(model: nn.Module) -> dict[str, dict[str, int]]:
    """{weight's name: {"entries": its entries, "kept": those with M = 1}} of the weights that have scores."""
    if not (scores := _scores(model)):
        return {}
    kept = torch.stack([(s > 0).sum() for s in scores.values()])
    kept = kept.full_tensor() if hasattr(kept, "full_tensor") else kept  # FSDP2
    return {n: {"entries": s.numel(), "kept": k} for (n, s), k in zip(scores.items(), kept.tolist(), strict=True)}


def _scores(model: nn.Module) -> dict[str, nn.Parameter]:
    """The scores, by their weights' names."""
    return {_SCORE.sub(r"\1", name): p for name, p in model.named_parameters() if _SCORE.search(name)}


class Masks(gmt.Masker):
    """Stands where the other rules have their Masker: gradients of scores are not masked, what is masked is counted."""

    def __init__(self, model: nn.Module):
        super().__init__(model.named_parameters(), "none")
        self.model = model

    def mask_gradients(self, step: int, *, stats: bool = False, **unused: Any) -> dict[str, Any] | None:
        """None, or with stats: masked_entries and masked_fraction in this step's forward pass, and tensors, see count.

        Every process has to make the call.
        """
        if not stats:
            return None
        tensors = count(self.model)
        entries, kept = (sum(c[key] for c in tensors.values()) for key in ("entries", "kept"))
        return {"masked_entries": entries - kept, "masked_fraction": 1 - kept / entries, "tensors": tensors}

    def summary(self) -> str:
        """What has scores, for people."""
        scores = _scores(self.model)
        entries = sum(p.numel() for p in scores.values())
        kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in scores})
        return f"rule mask_tuning: {len(scores)} matrices of {entries:,} weights have scores: {', '.join(kinds)}"
