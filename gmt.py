"""Gradient-Mask Tuning (GMT; Li et al., AAAI 2025, arXiv 2406.15330): the method, in one file that imports torch alone.

At optimizer step t let G be the accumulated gradient of one weight matrix of n entries. GMT hands the optimizer M * G:

    k    = max(1, round(keep_ratio * n))
    T    = the k-th largest |G_ij| of the whole matrix
    M_ij = 1  if |G_ij| >= T and G_ij != 0,  else 0            (ties at T are all kept)

In your own loop, between clipping and the optimizer's step, once per optimizer step (not per micro-batch):

    masker = gmt.Masker(model.named_parameters(), rule="gmt", keep_ratio=0.2)
    ...
    masker.mask_gradients(step)
    optimizer.step()

T is found exactly, by counting instead of sorting: with the sign bit cleared, the integer order of IEEE bit patterns
is the order of magnitudes, so a histogram of the bits finds T in one pass for 16-bit floats, two for fp32, four for
fp64, in chunks, so that temporary memory does not grow with the matrix.

To add a rule: write a function from `Entries` to scores (the k entries of a matrix with the largest |score| are kept)
and enter it in SCORES. RMT (random masks) is written that way; HFT (Half Fine-Tuning) freezes whole matrices before
the optimizer is built, see `freeze_half`.
"""

import fnmatch
import random
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

_INTEGER_OF = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
_DIGIT_BITS = 16  # a histogram has at most 2**16 bins; a key of 31 bits takes two passes
_SORT_BELOW = 1 << 16  # entries; on a CPU kthvalue beats two histograms there, and is as exact
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}  # entries per chunk: the CPU's cache; enough work for a GPU


# ---------------------------------------------------------------------------------------------------------------------
# Rules: which entries of a matrix are kept at this step
# ---------------------------------------------------------------------------------------------------------------------


class Entries(NamedTuple):
    """A flat run of a matrix's entries: what a rule sees. A large matrix is shown chunk by chunk."""

    grad: Tensor  # (m,) the accumulated gradient, in its own dtype
    weight: Tensor  # (m,) the weights
    offset: int  # place of the first entry in the whole tensor, row-major
    seed: int  # a hash of (seed, step, parameter name): the same on every rank


def score_gmt(e: Entries) -> Tensor:
    """|G|: the paper's rule. The magnitude is taken by the selection."""
    return e.grad


def score_rmt(e: Entries) -> Tensor:
    """Uniform random integers, no two the same within 2**31 entries, so that exactly k are kept.

    A counter-based hash of (seed, step, name, offset): no generator state to save, and an entry's number depends
    neither on the chunk nor on the rank that asks for it. Each round (xor a key, multiply by an odd number, fold the
    high bits down) maps 31 bits onto 31 bits one to one.
    """
    low31 = (1 << 31) - 1
    x = torch.arange(e.offset, e.offset + e.grad.numel(), device=e.grad.device) & low31
    for r, odd in enumerate((0x2C1B3C6D, 0x297A2D39, 0x7FEB352D)):
        x = ((x ^ (_mix64(e.seed + r) & low31)) * odd) & low31
        x ^= x >> 15
    return x.to(torch.int32)


SCORES: dict[str, Callable[[Entries], Tensor]] = {"gmt": score_gmt, "rmt": score_rmt}


def rules() -> tuple[str, ...]:
    """The words for a rule: `none` (plain SFT), `hft`, and the scores above."""
    return "none", "hft", *SCORES


# ---------------------------------------------------------------------------------------------------------------------
# Exact selection by counting
# ---------------------------------------------------------------------------------------------------------------------


def keep_count(n: int, keep_ratio: float) -> int:
    """How many of n entries are kept: k = max(1, round(keep_ratio * n))."""
    return max(1, round(keep_ratio * n))


def magnitude_keys(scores: Tensor) -> Tensor:
    """Integers in the order of |scores|: IEEE bits without the sign; non-negative integers are their own keys.

    Args:
        scores: any shape; bf16, fp16, fp32, fp64 or a signed integer dtype with values >= 0.
    Returns:
        int16, int32 or int64, same shape. Infinity is the largest finite key + 1, NaN lies above it.
    """
    if not scores.is_floating_point():
        return scores
    bits = scores.view(_INTEGER_OF[scores.dtype])
    return bits & torch.iinfo(bits.dtype).max


def _histogram(keys: Tensor, shift: int, prefix: Tensor | None) -> Tensor:
    """Counts (2**16,) int64 of the 16-bit digit at `shift`, over the keys whose higher bits equal `prefix`."""
    bins = 1 << _DIGIT_BITS
    digit = (keys >> shift) & (bins - 1)
    inside = None if prefix is None else (keys >> (shift + _DIGIT_BITS)) == prefix
    # On a GPU bincount and boolean indexing wait for the host; histc does not, and skips what is out of range. Its
    # fp32 counts are exact up to 2**24, the size of a chunk. torch calls it nondeterministic, though a count is not.
    if keys.device.type == "cpu" or torch.are_deterministic_algorithms_enabled():
        return torch.bincount(digit if inside is None else digit[inside], minlength=bins)
    digit = digit if inside is None else torch.where(inside, digit, -1)
    return torch.histc(digit.float(), bins=bins, min=0, max=bins).long()


def kth_largest_key(chunks: Callable[[], Iterable[Tensor]], k: int) -> Tensor:
    """The k-th largest of non-negative integer keys, exactly: radix selection from the highest 16-bit digit down.

    Args:
        chunks: a function; each call goes through all the keys once, in non-empty 1-D chunks of one int dtype.
        k: 1 <= k <= number of keys.
    Returns:
        0-d int64 on the keys' device, found without waiting for the device.
    """
    prefix = None  # the digits found so far
    digits_done = 0
    while True:
        digits_done += 1
        counts = 0
        for keys in chunks():
            shift = 8 * keys.element_size() - _DIGIT_BITS * digits_done
            counts = counts + _histogram(keys, shift, prefix)
        # how many have this digit or a larger one: the k-th largest has the last digit for which that is enough
        at_or_above = counts.flip(0).cumsum(0).flip(0)
        digit = (at_or_above >= k).sum() - 1
        k = k - (at_or_above[digit] - counts[digit])  # its rank among the keys that share its digits so far
        prefix = digit if prefix is None else (prefix << _DIGIT_BITS) | digit
        if shift == 0:
            return prefix


def _threshold(chunks: Callable[[], Iterable[Tensor]], n: int, k: int) -> Tensor:
    """The k-th largest of n keys, by the faster of two exact ways."""
    if n < _SORT_BELOW and (keys := torch.cat(list(chunks()))).device.type == "cpu":
        return keys.kthvalue(n - k + 1).values
    return kth_largest_key(chunks, k)


def _is_kept(scores: Tensor, threshold: Tensor) -> Tensor:
    """bool, shape of scores. A floating-point score of 0 (a gradient of 0) is never kept, even where T is 0."""
    return magnitude_keys(scores) >= (threshold.clamp(min=1) if scores.is_floating_point() else threshold)


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """The mask M of one tensor: True where |score| is among the k largest and not 0; ties at the threshold are kept.

    Args:
        scores: any shape and strides; bf16, fp16, fp32, fp64 without NaN, or integers >= 0.
        k: how many to keep, 1 <= k <= scores.numel(); an empty tensor gives an empty mask.
    Returns:
        bool tensor of the same shape.
    Raises:
        ValueError: k is out of range.
    """
    if scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if not 1 <= k <= scores.numel():
        raise ValueError(f"k must be between 1 and the {scores.numel()} entries of the tensor, got {k}")
    chunks = lambda: (magnitude_keys(c.reshape(-1)) for m in _matrices(scores) for _, c in _row_chunks(m))  # noqa: E731
    return _is_kept(scores, _threshold(chunks, scores.numel(), k))


# ---------------------------------------------------------------------------------------------------------------------
# The driver: masks the gradients of a model
# ---------------------------------------------------------------------------------------------------------------------


class Masker:
    """Masks the gradients of a model in place, once per optimizer step.

    Args:
        named_parameters: `model.named_parameters()`, taken after the model is wrapped for training (Accelerate's
            `prepare`, DDP); a tied weight is counted once. Parameters that need no gradient are never touched.
        rule: a word of rules(). `none` masks nothing, and neither does `hft`, which works by `freeze_half`.
        keep_ratio: fraction of entries kept, in (0, 1]; the paper's mask ratio is 1 - keep_ratio.
        scope: `tensor`, one threshold per matrix (the paper's), or `model`, one over all masked entries.
        exclude: fnmatch patterns of parameter names that are not masked, e.g. `*embed_tokens*`.
        mask_vectors: mask tensors of fewer than two dimensions (norms, biases) too.
        seed: seeds the random rules.
    Raises:
        ValueError: an argument has no meaning, or a pattern of `exclude` matches no parameter.

    What zeroing a gradient means under AdamW (`masked_weights: momentum`): the moments of a masked entry decay, and
    still move its weight.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        rule: str = "gmt",
        keep_ratio: float | None = None,
        *,
        scope: str = "tensor",
        exclude: Iterable[str] = (),
        mask_vectors: bool = False,
        seed: int = 0,
    ):
        if rule not in rules():
            raise ValueError(f"rule must be one of {', '.join(rules())}; got {rule!r}")
        if rule in SCORES and not (keep_ratio is not None and 0 < keep_ratio <= 1):
            raise ValueError(f"rule {rule} needs a keep_ratio in (0, 1]; got {keep_ratio}")
        if rule not in SCORES and keep_ratio is not None:
            raise ValueError(f"keep_ratio has no meaning for rule {rule}; got {keep_ratio}")
        if scope not in ("tensor", "model"):
            raise ValueError(f"scope must be tensor or model; got {scope!r}")
        self.rule, self.keep_ratio, self.scope, self.seed = rule, keep_ratio, scope, seed
        parameters = dict(named_parameters)
        for wrapper in ("module.", "_orig_mod.", "module."):  # DDP, torch.compile, in either order
            if all(name.startswith(wrapper) for name in parameters):
                parameters = {name.removeprefix(wrapper): p for name, p in parameters.items()}
        if isinstance(exclude, str):
            raise ValueError(f"exclude must be a list of patterns, got the text {exclude!r}")
        exclude = tuple(exclude)
        for pattern in exclude:
            if not fnmatch.filter(parameters, pattern):
                raise ValueError(f"exclude pattern {pattern!r} matches none of the {len(parameters)} parameters")
        excluded = lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)  # noqa: E731
        self.eligible = {n: p for n, p in parameters.items() if (p.dim() >= 2 or mask_vectors) and not excluded(n)}
        self.total_entries = sum(p.numel() for p in parameters.values())

    @torch.no_grad()
    def mask_gradients(self, step: int, *, stats: bool = False, check_finite: bool = True) -> dict[str, float] | None:
        """Zero the gradient entries that the rule does not keep. Parameters without a gradient are skipped.

        Args:
            step: the optimizer step, from 0: the random rules draw anew at each.
            stats: return the statistics below; costs two reads of the gradients and one wait for the device.
            check_finite: raise on a non-finite gradient, at the price of one read and one wait for the device. A loop
                that has tested the gradient norm turns it off.
        Returns:
            None, or kept_fraction (of all eligible entries), kept_nonzero_fraction (of those with a gradient other
            than 0), energy_kept (share of the squared norm of the eligible gradients; None where gradients of frozen
            weights are not known).
        Raises:
            ValueError: a gradient is not finite (the parameter is named), sparse, or sharded.
        """
        grads = {n: p.grad for n, p in self.eligible.items() if p.grad is not None and p.grad.numel()}
        for name, grad in grads.items():
            if grad.layout != torch.strided or hasattr(grad, "to_local"):
                kind = "sharded" if hasattr(grad, "to_local") else "sparse"
                raise ValueError(f"the gradient of {name} is {kind}: not supported, a mask needs the whole matrix")
        if check_finite and grads:
            _raise_if_not_finite(grads)

        before = _totals(grads.values()) if stats else None
        kept = None
        if self.rule in SCORES and grads:
            kept = sum(self._mask_group(group, step, count=stats) for group in self._groups(grads))
        if not stats:
            return None
        if kept is None:  # nothing is masked: what has a gradient is kept
            kept = sum(g.numel() for g in grads.values())
        eligible = sum(p.numel() for p in self.eligible.values())
        (nonzero, energy), (nonzero_after, energy_after) = (t.tolist() for t in (before, _totals(grads.values())))
        some_frozen = any(not p.requires_grad for p in self.eligible.values())
        return {
            "kept_fraction": float(kept) / max(eligible, 1),
            "kept_nonzero_fraction": nonzero_after / max(nonzero, 1),
            "energy_kept": None if some_frozen else energy_after / energy if energy else 1.0,
        }

    def _groups(self, grads: dict[str, Tensor]) -> Iterator[list[tuple[str, int, Tensor, Tensor]]]:
        """The sets of matrices that share a threshold: lists of (name, offset in the tensor, gradient, weight)."""
        matrices = [
            (name, i * g.numel(), g, w)
            for name, grad in grads.items()
            for i, (g, w) in enumerate(zip(_matrices(grad), _matrices(self.eligible[name]), strict=True))
        ]
        if self.scope == "model" and len(dtypes := {g.dtype for g in grads.values()}) > 1:
            raise ValueError(f"scope model compares entries of all matrices: their gradients have dtypes {dtypes}")
        yield from [matrices] if self.scope == "model" else ([m] for m in matrices)

    def _mask_group(self, group: list[tuple[str, int, Tensor, Tensor]], step: int, count: bool) -> Tensor | int:
        def scored() -> Iterator[tuple[Tensor, Tensor]]:  # (a chunk of a gradient, its scores), of all the matrices
            for name, base, grad, weight in group:
                seed = _mix64(_mix64(_mix64(self.seed) ^ step) ^ zlib.crc32(name.encode()))
                for (offset, g), (_, w) in zip(_row_chunks(grad), _row_chunks(weight), strict=True):
                    yield g, SCORES[self.rule](Entries(g.reshape(-1), w.reshape(-1), base + offset, seed))

        n = sum(grad.numel() for _, _, grad, _ in group)
        threshold = _threshold(lambda: (magnitude_keys(s) for _, s in scored()), n, keep_count(n, self.keep_ratio))
        kept = 0
        for g, scores in scored():
            mask = _is_kept(scores, threshold).view_as(g)
            g.mul_(mask)
            if count:
                kept = kept + mask.sum()
        return kept

    def summary(self) -> str:
        """What is masked, for people: eligible tensors grouped by shape, and their share of all parameters."""
        by_shape: dict[tuple, list[str]] = defaultdict(list)
        for name, p in self.eligible.items():
            by_shape[tuple(p.shape)].append(name)
        share = sum(p.numel() for p in self.eligible.values()) / max(self.total_entries, 1)
        kept = f", keep_ratio {self.keep_ratio}, scope {self.scope}" if self.rule in SCORES else ""
        lines = [f"rule {self.rule}{kept}: {len(self.eligible)} tensors, {share:.1%} of all parameters, are maskable"]
        for shape, names in by_shape.items():
            frozen = sum(not self.eligible[n].requires_grad for n in names)
            kinds = sorted({re.sub(r"\.\d+\.", ".*.", n) for n in names})
            lines.append(
                f"  {len(names):4d} x {'x'.join(map(str, shape)):<14} {', '.join(kinds)}"
                + (f"  ({frozen} frozen)" if frozen else "")
            )
        return "\n".join(lines)


def _matrices(tensor: Tensor) -> Iterator[Tensor]:
    """2-D views: a tensor of more dimensions is a stack of matrices, one of fewer is a column."""
    if tensor.dim() > 2:
        for part in tensor:
            yield from _matrices(part)
    else:
        yield tensor if tensor.dim() == 2 else tensor.reshape(-1, 1)


def _row_chunks(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(offset of the first entry, some whole rows): views, whatever the strides."""
    rows = max(1, _CHUNK.get(matrix.device.type, 1 << 18) // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], rows):
        yield start * matrix.shape[1], matrix[start : start + rows]


def _totals(grads: Iterable[Tensor]) -> Tensor:
    """(2,) fp64: number of entries other than 0, and sum of squares."""
    wide = lambda t: torch.float64 if t.dtype == torch.float64 else torch.float32  # noqa: E731
    parts = [
        torch.stack([g.count_nonzero().double(), torch.linalg.vector_norm(g, dtype=wide(g)).double().square()])
        for g in grads
    ]
    return torch.stack(parts).sum(0) if parts else torch.zeros(2, dtype=torch.float64)


def _raise_if_not_finite(grads: dict[str, Tensor]) -> None:
    largest = {name: torch.linalg.vector_norm(g, ord=float("inf")) for name, g in grads.items()}  # NaN stays NaN
    if not torch.stack([m.double() for m in largest.values()]).isfinite().all():
        bad = [name for name, m in largest.items() if not m.isfinite()]
        raise ValueError(f"non-finite gradient in {bad[0]} ({len(bad)} of {len(grads)} tensors): skip this step")


def _mix64(x: int) -> int:
    """splitmix64: a well-mixed 64-bit hash of an integer."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


# ---------------------------------------------------------------------------------------------------------------------
# HFT: whole matrices frozen from the start
# ---------------------------------------------------------------------------------------------------------------------


def freeze_half(model: nn.Module, seed: int, stage: str = "sft") -> list[str]:
    """Half Fine-Tuning (arXiv 2404.18466), category-level: freeze about half of every layer, chosen at random.

    In every layer 2 of the 4 attention matrices are frozen; of the 3 feed-forward matrices 1 in a random half of the
    layers and 2 in the others (with an odd number of layers, the extra one trains 2); half of the norms. Biases go
    with their matrix; final norm, embeddings and head are trained. Call it before the optimizer is built: frozen
    weights then cost no gradient and no optimizer state.

    Args:
        model: a decoder with separate matrices, layers in a ModuleList (names like `model.layers.3.mlp.up_proj`).
        seed, stage: the choice is a function of both: a new training stage (SFT, then DPO) draws anew.
    Returns:
        Names of the parameters whose requires_grad was set to False, in model order.
    Raises:
        ValueError: a layer does not have 4 attention and 3 feed-forward matrices (fused or stacked weights).
    """
    parameters = dict(model.named_parameters())
    layers: dict[str, dict[str, list[str]]] = defaultdict(lambda: {"attention": [], "feed-forward": [], "norm": []})
    for name, p in parameters.items():
        found = re.match(r"(.*?\.\d+)\.(.+)\.weight$", name)  # a layer, then the path of a module in it
        if not found:
            continue
        layer, path = found.groups()
        if p.dim() >= 2 and re.search(r"att(n|ention)", path):
            layers[layer]["attention"].append(name)
        elif p.dim() >= 2 and re.search(r"mlp|ffn|feed_forward", path):
            layers[layer]["feed-forward"].append(name)
        elif p.dim() == 1 and "." not in path:  # norms of the layer itself, not those of queries and keys
            layers[layer]["norm"].append(name)
    for layer, kinds in layers.items():
        got = {kind: len(kinds[kind]) for kind in ("attention", "feed-forward")}
        if got != {"attention": 4, "feed-forward": 3} or any(parameters[n].dim() > 2 for n in kinds["feed-forward"]):
            raise ValueError(f"hft needs 4 attention and 3 feed-forward matrices per layer; {layer} has {got}")
    if not layers:
        raise ValueError("hft found no decoder layers: it looks for names like model.layers.0.self_attn.q_proj.weight")

    rng = random.Random(f"hft {seed} {stage}")
    train_two = set(rng.sample(sorted(layers), (len(layers) + 1) // 2))
    frozen = set()
    for layer, kinds in layers.items():
        frozen.update(rng.sample(kinds["attention"], 2))
        frozen.update(rng.sample(kinds["feed-forward"], 1 if layer in train_two else 2))
        frozen.update(rng.sample(kinds["norm"], len(kinds["norm"]) // 2))
    frozen |= {name.removesuffix("weight") + "bias" for name in frozen} & set(parameters)
    for name in frozen:
        parameters[name].requires_grad_(False)
    return [name for name in parameters if name in frozen]
