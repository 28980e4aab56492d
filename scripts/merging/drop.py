"""One-off drop: mask the task vector (tuned minus base weights) of a finished model, the post-hoc baseline of GMT.

`--by random --rescale ratio` is DARE (arXiv 2311.03099), `--by magnitude --drop_largest 0.01` Model Breadcrumbs
(arXiv 2312.06795).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import gmt
from common import model_card
from common.config import key, parse
from common.errors import UserError
from scripts.merging import folders


@dataclass
class DropConfig:
    """Keys of scripts/merge.py drop."""

    base: str = key(help="folder or Hub id of the base model")
    tuned: str = key(help="folder of the fine-tuned model, of the same tensors")
    output_dir: str = key(help="folder of the result; new or empty")
    keep_ratio: float = key(help="fraction of a matrix's task vector that is kept, in (0, 1]")
    by: Literal["magnitude", "random"] = key("magnitude", "keep the largest entries, or random ones")
    drop_largest: float = key(0.0, "drop this fraction of the largest entries too, in [0, 1 - keep_ratio]")
    rescale: Literal["none", "ratio", "l1"] = key(
        "none", "multiply what is kept by 1 / keep_ratio (DARE), or so that the sum of magnitudes stays (mergekit)"
    )
    mask_vectors: bool = key(False, "drop from 1-D tensors (norms, biases) too; else they stay as tuned")
    exclude: list[str] = key([], "patterns of tensor names that stay as tuned, e.g. '*embed_tokens*'")
    seed: int = key(0, "of --by random")
    dry_run: bool = key(False, "check the settings and the base model alone; `tuned` need not be there yet")

    def __post_init__(self):
        """Raise UserError where keys contradict each other or are out of range."""
        if not 0 < self.keep_ratio <= 1:
            raise UserError(f"keep_ratio must be in (0, 1], got {self.keep_ratio}")
        if not 0 <= self.drop_largest <= 1 - self.keep_ratio + 1e-9:
            raise UserError(f"drop_largest must be in [0, 1 - keep_ratio], got {self.drop_largest}")
        if self.drop_largest and self.by == "random":
            raise UserError("drop_largest has no meaning with by random")

    @property
    def source(self) -> str:
        """The paper that these settings are of."""
        if self.by == "random" and self.rescale == "ratio":
            return "DARE (Yu et al., 2024, arXiv 2311.03099)"
        if self.drop_largest:
            return "Model Breadcrumbs (Davari and Belilovsky, 2024, arXiv 2312.06795)"
        return "one-off drop, the baseline of GMT (Li et al., 2025, arXiv 2406.15330)"


def drop_delta(
    base: Tensor,
    tuned: Tensor,
    keep_ratio: float,
    by: str = "magnitude",
    *,
    rescale: str = "none",
    drop_largest: float = 0.0,
    name: str = "",
    seed: int = 0,
) -> Tensor:
    """base + M * (tuned - base), for one tensor; a tensor of more than two dimensions is a stack of matrices.

    Of n entries the largest round(drop_largest * n) are dropped; of the others the round(keep_ratio * n) largest are
    kept (ties too), or as many random ones.

    Args:
        base, tuned: same shape, any floating dtype.
        keep_ratio, by, rescale, drop_largest: as in DropConfig.
        name, seed: by random, the choice is a function of both.
    Returns:
        tensor of tuned's shape and dtype. Without rescaling a kept entry is exactly the tuned one.
    """
    delta = nn.Parameter(torch.empty_like(tuned, dtype=torch.float32), requires_grad=False)
    delta.grad = tuned.float() - base.float()

    def keep_top(ratio: float) -> Tensor:
        """The task vector with all but a fraction of each matrix set to 0."""
        rule = {"magnitude": "gmt", "random": "rmt"}[by]
        gmt.Masker([(name, delta)], rule, ratio, mask_vectors=True, seed=seed).mask_gradients(0)
        return delta.grad

    whole = delta.grad
    if drop_largest:
        delta.grad = whole.clone()
        largest = keep_top(drop_largest)
        delta.grad = whole.clone()
        kept = keep_top(min(1.0, keep_ratio + drop_largest)).masked_fill_(largest != 0, 0)
    else:
        delta.grad = whole.clone()
        kept = keep_top(keep_ratio)
    if rescale == "none":
        return torch.where(kept != 0, tuned, base.to(tuned.dtype))
    scale = 1 / keep_ratio
    if rescale == "l1":
        dims = (-2, -1) if kept.dim() >= 2 else (-1,)
        scale = whole.abs().sum(dims, keepdim=True) / kept.abs().sum(dims, keepdim=True).clamp(min=1e-30)
    return (base.float() + kept * scale).to(tuned.dtype)


def main(argv: list[str]) -> None:
    """Write the folder config.output_dir: the tuned model's files, with the dropped weights."""
    config = parse(DropConfig, argv)
    out = Path(config.output_dir)
    folders.check_output(out)
    base = folders.Model(config.base, "base", is_read_alone=True)
    tuned = None if config.dry_run else folders.Model(config.tuned, "tuned")
    names = tuned.files.keys() if tuned else base.saved_names
    if missing := sorted(names - base.files.keys()):
        raise UserError(
            f"base {config.base} has no tensor {missing[0]} ({len(missing)} missing): not the tuned one's base, or "
            "saved under other names: load it with from_pretrained, save it with save_pretrained, and take that"
        )
    shapes, of_base = (tuned or base).shapes(), base.shapes()
    if other := [n for n in sorted(names) if shapes[n] != of_base[n]]:
        raise UserError(f"{other[0]} is {of_base[other[0]]} in base, {shapes[other[0]]} in tuned")
    tensors = {n: nn.Parameter(torch.empty(shapes[n], device="meta")) for n in sorted(names)}
    try:  # checks `exclude`, and finds the tensors that are masked
        masker = gmt.Masker(
            tensors.items(), "gmt", config.keep_ratio, exclude=config.exclude, mask_vectors=config.mask_vectors
        )
    except ValueError as e:
        raise UserError(str(e)) from None
    told = f"{len(masker.eligible)} of {len(tensors)} tensors"
    if config.dry_run:
        print(f"{told} would keep {config.keep_ratio} of their task vector")
        return

    masked = set(masker.eligible)

    def value(name: str) -> Tensor:
        if name not in masked:
            return tuned.read(name)
        return drop_delta(
            base.read(name), tuned.read(name), config.keep_ratio, config.by,
            rescale=config.rescale, drop_largest=config.drop_largest, name=name, seed=config.seed,
        )  # fmt: skip

    parts = [(config.base, "base"), (config.tuned, "fine-tuned")]
    card = model_card.make_merged("drop", config.source, parts, vars(config))
    folders.write(out, tuned, value, card, "drop", vars(config))
    print(f"saved {out}: {told} keep {config.keep_ratio} of their task vector")
