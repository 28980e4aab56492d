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
import functools
import itertools
import random
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_INTEGER_OF = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
# statistics per parameter: its entries, those kept, those with a gradient other than 0 and the sum of squares of their
# gradients, and the same two after masking
COUNTS = ("entries", "kept", "nonzero", "energy", "nonzero_kept", "energy_kept")

_DIGIT_BITS = 16  # a histogram has at most 2**16 bins; a key of 31 bits takes two passes
_SORT_BELOW = 1 << 16  # entries; on a CPU kthvalue beats two histograms there, and is as exact
_SHARDED_BUCKET = 16  # matrices whose histograms (0.5 MiB each) share a collective
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
    x = torch.arange(e.grad.numel(), dtype=torch.int32, device=e.grad.device)
    x.add_(e.offset & low31).bitwise_and_(low31)
    for r, odd in enumerate((0x2C1B3C6D, 0x297A2D39, 0x7FEB352D)):  # int32 products wrap: their low 31 bits are right
        x.bitwise_xor_(_mix64(e.seed + r) & low31).mul_(odd).bitwise_and_(low31)
        x.bitwise_xor_(x >> 15)
    return x


SCORES: dict[str, Callable[[Entries], Tensor]] = {"gmt": score_gmt, "rmt": score_rmt}


def rules() -> tuple[str, ...]:
    """The words for a rule: `none` (plain SFT), `hft`, `grad_square` (masks fixed by a calibration), and SCORES."""
    return "none", "hft", "grad_square", *SCORES


def masks_entries(rule: str) -> bool:
    """Whether a rule masks single entries, so that keep_ratio and its companions have a meaning for it."""
    return rule == "grad_square" or rule in SCORES


# ---------------------------------------------------------------------------------------------------------------------
# The mask of one tensor
# ---------------------------------------------------------------------------------------------------------------------


def keep_count(n: int, keep_ratio: float) -> int:
    """How many of n entries are kept: k = max(1, round(keep_ratio * n))."""
    return max(1, round(keep_ratio * n))


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

    def keys() -> Iterator[Tensor]:
        for matrix in _split("", scores, scores, scores.shape, 0):
            for _, chunk in _row_chunks(matrix.grad):
                yield magnitude_keys(chunk.reshape(-1))

    dtype = magnitude_keys(scores.reshape(-1)[:0]).dtype
    return _is_kept(scores, _kth_largest_key(keys, scores.numel(), k, dtype, scores.device))


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


# ---------------------------------------------------------------------------------------------------------------------
# The masks of a model
# ---------------------------------------------------------------------------------------------------------------------


class Masker:
    """Masks the gradients of a model in place, once per optimizer step.

    Args:
        named_parameters: `model.named_parameters()`, taken after the model is wrapped for training (Accelerate's
            `prepare`, DDP); a tied weight is counted once. Parameters that need no gradient are never touched.
        rule: a word of rules(). `none` masks nothing, and neither does `hft`, which works by `freeze_half`.
            `grad_square` needs calibrate() and fix_masks() before its first step.
        keep_ratio: fraction of entries kept, in (0, 1]; the paper's mask ratio is 1 - keep_ratio.
        scope: `tensor`, one threshold per matrix (the paper's), or `model`, one over all masked entries.
        exclude: fnmatch patterns of parameter names that are not masked, e.g. `*embed_tokens*`.
        mask_vectors: mask tensors of fewer than two dimensions (norms, biases) too.
        seed: seeds the random rules.
    Raises:
        ValueError: an argument has no meaning, or a pattern of `exclude` matches no parameter.

    What "masked" means under AdamW is a choice. `mask_gradients` is `masked_weights: momentum`: the optimizer sees
    M * G, so the moments of a masked entry decay, and still move its weight. `step` is `masked_weights: frozen`: where
    M = 0 nothing changes at this step.

    A Masker hooks into nothing: between the calls it does nothing, so that saving and loading go on undisturbed.
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
        if masks_entries(rule) and not (keep_ratio is not None and 0 < keep_ratio <= 1):
            raise ValueError(f"rule {rule} needs a keep_ratio in (0, 1]; got {keep_ratio}")
        if not masks_entries(rule) and keep_ratio is not None:
            raise ValueError(f"keep_ratio has no meaning for rule {rule}; got {keep_ratio}")
        if scope not in ("tensor", "model"):
            raise ValueError(f"scope must be tensor or model; got {scope!r}")
        self.rule, self.keep_ratio, self.scope, self.seed = rule, keep_ratio, scope, seed
        parameters = _without_wrappers(dict(named_parameters))
        self.eligible = _eligible(parameters, exclude, mask_vectors)
        self.total_entries = sum(p.numel() for p in parameters.values())
        self._squares: dict[str, Tensor] = {}  # grad_square, while it is calibrated: sums of squared gradients
        self._fixed: dict[str, Tensor] = {}  # grad_square, from then on: its masks as bits, of this process's part
        self._last: dict[str, Tensor] = {}  # the masks, as bits, of the last call with jaccard=True

    @torch.no_grad()
    def mask_gradients(
        self, step: int, *, stats: bool = False, jaccard: bool = False, check_finite: bool = True
    ) -> dict[str, Any] | None:
        """Zero the gradient entries that the rule does not keep. Parameters without a gradient are skipped.

        Gradients that FSDP2 shards (DTensors, Shard(0), also with replicas) get the mask of the whole matrix, from
        all-reduced counts; every process of the mesh has to make the call.

        Args:
            step: the optimizer step, from 0: the random rules draw anew at each.
            stats: return the statistics below; costs two reads of the gradients and one wait for the device.
            jaccard: with stats, compare the masks with those of the last such call; keeps a bit per entry.
            check_finite: raise on a non-finite gradient, at the price of one read and one wait for the device. A loop
                that has tested the gradient norm turns it off.
        Returns:
            None, or kept_fraction (of all eligible entries), kept_nonzero_fraction (of those with a gradient other
            than 0), energy_kept (share of the squared norm of the eligible gradients; None where gradients of frozen
            weights are not known), mask_jaccard (intersection over union; None at first, absent without jaccard), and
            tensors: {parameter name: its COUNTS}, from which the same can be had for any group of them.
        Raises:
            ValueError: a gradient is not finite (the parameter is named), sparse, or laid out in another way; or
                grad_square has no masks yet.
        """
        return self._mask(step, stats, jaccard, check_finite)[0]

    @torch.no_grad()
    def step(
        self, optimizer: torch.optim.Optimizer, step: int, *, stats=False, jaccard=False, check_finite=True
    ) -> dict[str, Any] | None:
        """`masked_weights: frozen`: mask, and update so that where M = 0 weight, moments and decay stay as they are.

        Call it instead of mask_gradients and optimizer.step(). The optimizer steps one parameter at a time; what it did
        to masked entries is taken back, at the price of a copy of that parameter's weight and moments, and of a bit per
        entry. Selected entries get exactly the optimizer's update. Adam counts steps per tensor: its bias correction
        for an entry that is first selected at a late step is that of the late step, so that such an entry moves by up
        to (1 - beta1) / sqrt(1 - beta2), about 3 times the learning rate. Quantised (uint8) moments share block scales
        and are not taken back: of 8-bit optimizers only the weights are frozen.

        Args, Returns and Raises: as mask_gradients; the optimizer may be any torch one whose state is tensors of the
        weight's shape. Parameters that are not eligible are updated as always.
        """
        statistics, masks = self._mask(step, stats, jaccard, check_finite, keep_bits=True)
        mask_of = {id(self.eligible[name]): bits for name, bits in masks.items()}
        for p in _one_by_one(optimizer):
            if id(p) in mask_of:
                _step_where(optimizer, p, mask_of[id(p)])
            elif p.grad is not None:
                optimizer.step()
        return statistics

    @property
    def needs_calibration(self) -> bool:
        """Whether calibrate() and fix_masks() have to come before the first step."""
        return self.rule == "grad_square" and not self._fixed

    @torch.no_grad()
    def calibrate(self) -> None:
        """grad_square: add the squares of the gradients that are there now to their sums. Take no optimizer step.

        The selection of FISH masks (arXiv 2111.09839), but with the squared gradients of whole batches, where Fisher
        information has those of single examples.
        """
        for name, p in self.eligible.items():
            if p.grad is not None:
                wide = p.grad if p.grad.dtype == torch.float64 else p.grad.float()
                self._squares[name] = self._squares.get(name, 0) + wide.square()

    @torch.no_grad()
    def fix_masks(self) -> None:
        """grad_square: choose the masks of all steps by the sums, and forget the sums.

        Raises:
            ValueError: nothing was calibrated, or a sum is not finite.
        """
        if not self._squares:
            raise ValueError("grad_square: there is nothing to choose by; call calibrate() after backward() first")
        matrices, all_reduce = _matrices(self._squares, self.eligible)
        _raise_if_not_finite(matrices, all_reduce)
        parts = {name: [torch.zeros(0, dtype=torch.bool, device=_here(x).device)] for name, x in self._squares.items()}
        for m, _, mask in _select(matrices, all_reduce, score_gmt, self.keep_ratio, self.scope, self.seed):
            parts[m.name].append(mask.flatten())
        self._fixed = {name: _pack(torch.cat(masks)) for name, masks in parts.items()}
        self._squares = {}

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs: grad_square's masks, per parameter, as bits (uint8, on the CPU); else nothing.

        The masks are those of whole tensors, also under sharding, where every process has to make the call.
        """
        return {name: _gathered_bits(bits, self.eligible[name].detach()) for name, bits in self._fixed.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over masks of state_dict(), whatever number of processes it was made on.

        Raises:
            ValueError: they are those of other parameters.
        """
        for name, bits in state.items():
            p = self.eligible.get(name)
            if p is None or bits.numel() != -(-p.numel() // 8):
                raise ValueError(f"the masks in the checkpoint do not fit the parameter {name}")
            self._fixed[name] = _bits_of_this_process(bits, p.detach())

    def summary(self) -> str:
        """What is masked, for people: eligible tensors grouped by shape, and their share of all parameters."""
        by_shape: dict[tuple, list[str]] = defaultdict(list)
        for name, p in self.eligible.items():
            by_shape[tuple(p.shape)].append(name)
        share = sum(p.numel() for p in self.eligible.values()) / max(self.total_entries, 1)
        kept = f", keep_ratio {self.keep_ratio}, scope {self.scope}" if masks_entries(self.rule) else ""
        lines = [f"rule {self.rule}{kept}: {len(self.eligible)} tensors, {share:.1%} of all parameters, are maskable"]
        for shape, names in by_shape.items():
            frozen = sum(not self.eligible[n].requires_grad for n in names)
            kinds = sorted({re.sub(r"\.\d+\.", ".*.", n) for n in names})
            lines.append(
                f"  {len(names):4d} x {'x'.join(map(str, shape)):<14} {', '.join(kinds)}"
                + (f"  ({frozen} frozen)" if frozen else "")
            )
        return "\n".join(lines)

    def _mask(
        self, step: int, stats: bool, jaccard: bool, check_finite: bool, keep_bits: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
        """(mask_gradients' statistics, the masks as bits where keep_bits or jaccard asks for them)."""
        if not (masks_entries(self.rule) or stats or jaccard or check_finite):
            return None, {}
        grads = {name: p.grad for name, p in self.eligible.items() if p.grad is not None}
        matrices, all_reduce = _matrices(grads, self.eligible)
        if check_finite and matrices:
            _raise_if_not_finite(matrices, all_reduce)
        counts, bits = {}, {}
        for name, chunks in itertools.groupby(self._masks(matrices, all_reduce, step), key=lambda c: c[0].name):
            flat = []
            for _, g, mask in chunks:
                before = _nonzero_and_energy(g) if stats else None
                g.mul_(mask)
                if stats:
                    now = torch.stack([mask.sum().double(), *before, *_nonzero_and_energy(g)])
                    counts[name] = counts.get(name, 0) + now
                if keep_bits or jaccard:
                    flat.append(mask.flatten())
            if flat:
                bits[name] = _pack(torch.cat(flat))
        overlap = None
        if jaccard:
            overlap, self._last = _overlap(bits, self._last), bits
        return _statistics(self.eligible, counts, overlap, jaccard, all_reduce) if stats else None, bits

    def _masks(self, matrices: list["_Matrix"], all_reduce: "_AllReduce", step: int) -> Iterator["_MaskedChunk"]:
        """The masks of this step."""
        if self.rule in SCORES:
            return _select(matrices, all_reduce, SCORES[self.rule], self.keep_ratio, self.scope, self.seed, step)
        if self.needs_calibration:
            raise ValueError("grad_square has no masks yet: calibrate() and fix_masks() come before the first step")
        return _masks_from_bits(matrices, self._fixed if self.rule == "grad_square" else None)


# ---------------------------------------------------------------------------------------------------------------------
# Which parameters a model's Masker looks at
# ---------------------------------------------------------------------------------------------------------------------


def _without_wrappers(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The parameters under the names that they have in the model itself, so that random rules draw alike."""
    for wrapper in ("module.", "_orig_mod.", "module."):  # DDP, torch.compile, in either order
        if all(name.startswith(wrapper) for name in parameters):
            parameters = {name.removeprefix(wrapper): p for name, p in parameters.items()}
    return parameters


def _eligible(
    parameters: dict[str, nn.Parameter], exclude: Iterable[str], mask_vectors: bool
) -> dict[str, nn.Parameter]:
    """The parameters that are masked: matrices, and vectors on request, whose names no pattern excludes."""
    if isinstance(exclude, str):
        raise ValueError(f"exclude must be a list of patterns, got the text {exclude!r}")
    exclude = tuple(exclude)
    for pattern in exclude:
        if not fnmatch.filter(parameters, pattern):
            raise ValueError(f"exclude pattern {pattern!r} matches none of the {len(parameters)} parameters")
    return {
        name: p
        for name, p in parameters.items()
        if (p.dim() >= 2 or mask_vectors) and not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)
    }


# ---------------------------------------------------------------------------------------------------------------------
# Matrices, chunks of them, and the parts of them that this process holds
# ---------------------------------------------------------------------------------------------------------------------


_AllReduce = Callable[[Tensor], object] | None  # sums over the processes that hold the other parts, in place


class _Matrix(NamedTuple):
    """One matrix, or, under sharding, this process's rows of it (maybe none)."""

    name: str  # of the parameter
    offset: int  # place of the first of these entries in the whole tensor
    start: int  # and in the part of the tensor that this process holds
    numel: int  # entries of the whole matrix
    grad: Tensor  # (rows, columns)
    weight: Tensor  # (rows, columns)


def _matrices(tensors: dict[str, Tensor], weights: dict[str, nn.Parameter]) -> tuple[list[_Matrix], _AllReduce]:
    """This process's parts of the tensors (gradients, or of their layout), by matrix; the sum over other parts.

    Raises:
        ValueError: a tensor is sparse, or laid out in a way that is not supported.
    """
    matrices, groups = [], {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        if tensor.layout != torch.strided:
            raise ValueError(f"the gradient of {name} is sparse: not supported, a mask needs the whole matrix")
        grad, weight, first_row, group = _local(name, tensor, weights[name].detach())
        groups[group] = name
        matrices += _split(name, grad, weight, tensor.shape, first_row)
    if len(groups) > 1:
        raise ValueError(f"gradients are sharded in {len(groups)} different ways, e.g. {', '.join(groups.values())}")
    group = next(iter(groups), None)
    return matrices, (lambda t: torch.distributed.all_reduce(t, group=group)) if group is not None else None


def _here(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _local(name: str, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, int, object]:
    """(gradient, weight, index of the first row, process group of the shards or None) of what this process holds.

    FSDP2 cuts dimension 0 as torch.chunk does, and may hold replicas of the shards on other dimensions of the mesh.
    """
    if not hasattr(grad, "to_local"):
        return grad, weight, 0, None
    from torch.distributed.tensor import Replicate, Shard

    dims = [i for i, placement in enumerate(grad.placements) if not isinstance(placement, Replicate)]
    if len(dims) > 1 or any(type(grad.placements[i]) is not Shard or grad.placements[i].dim != 0 for i in dims):
        raise ValueError(f"the gradient of {name} is laid out as {grad.placements}: only FSDP2's Shard(0) is supported")
    if not dims:
        return grad.to_local(), weight.to_local(), 0, None
    (dim,) = dims
    rows = -(-grad.shape[0] // grad.device_mesh.size(dim))  # of every process but the last ones
    first_row = min(rows * grad.device_mesh.get_local_rank(dim), grad.shape[0])
    return grad.to_local(), weight.to_local(), first_row, grad.device_mesh.get_group(dim)


def _split(name: str, grad: Tensor, weight: Tensor, shape: torch.Size, first_row: int) -> Iterator[_Matrix]:
    """The matrices of a tensor: itself, a vector as a column, each of a stack for more than two dimensions.

    A sharded stack yields all of its matrices on every process, without rows where another process holds them.
    """
    if len(shape) <= 2:
        columns = shape[1] if len(shape) == 2 else 1
        yield _Matrix(name, first_row * columns, 0, shape.numel(), grad.view(-1, columns), weight.view(-1, columns))
        return
    numel, per_row = shape[-2:].numel(), shape[1:-2].numel()
    nothing = [(grad.new_empty(0, shape[-1]), weight.new_empty(0, shape[-1]))] * per_row
    for row in range(shape[0]):
        here = row - first_row
        is_here = 0 <= here < grad.shape[0]
        parts = zip(_unstack(grad[here]), _unstack(weight[here]), strict=True) if is_here else nothing
        for i, (g, w) in enumerate(parts):
            yield _Matrix(name, (row * per_row + i) * numel, max(0, here * per_row + i) * numel, numel, g, w)


def _unstack(tensor: Tensor) -> Iterator[Tensor]:
    """The 2-D views of a tensor of two or more dimensions."""
    if tensor.dim() > 2:
        for part in tensor:
            yield from _unstack(part)
    else:
        yield tensor


def _row_chunks(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(offset of the first entry, some whole rows): views, whatever the strides."""
    rows = max(1, _CHUNK.get(matrix.device.type, 1 << 18) // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], rows):
        yield start * matrix.shape[1], matrix[start : start + rows]


# ---------------------------------------------------------------------------------------------------------------------
# Which entries are kept: thresholds of matrices, exactly and in chunks
# ---------------------------------------------------------------------------------------------------------------------


def _is_kept(scores: Tensor, threshold: Tensor) -> Tensor:
    """bool, shape of scores. A floating-point score of 0 (a gradient of 0) is never kept, even where T is 0."""
    return magnitude_keys(scores) >= (threshold.clamp(min=1) if scores.is_floating_point() else threshold)


_MaskedChunk = tuple[_Matrix, Tensor, Tensor]  # (matrix, a chunk of its gradient as a view, that chunk's mask)


def _select(
    matrices: list[_Matrix],
    all_reduce: _AllReduce,
    score: Callable[[Entries], Tensor],
    keep_ratio: float,
    scope: str,
    seed: int,
    step: int = 0,
) -> Iterator[_MaskedChunk]:
    """Choose the entries with the largest scores; yields in the order of `matrices`."""
    if not matrices:
        return
    # one histogram, or one collective, for matrices whose keys have different widths would mix up their digits
    if (scope == "model" or all_reduce) and len(dtypes := {m.grad.dtype for m in matrices}) > 1:
        raise ValueError(f"with scope model or shards all gradients must have one dtype, got {dtypes}")
    units = [matrices] if scope == "model" else [[m] for m in matrices]  # each has one threshold
    scored = functools.partial(_scored, score=score, seed=seed, step=step)
    for unit, threshold in _thresholds(units, all_reduce, score, scored, keep_ratio):
        for m in unit:
            for g, scores in scored(m):
                yield m, g, _is_kept(scores, threshold).view_as(g)


def _scored(m: _Matrix, score: Callable[[Entries], Tensor], seed: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(a chunk of the gradient, a view; its scores, flat)."""
    seed = _mix64(_mix64(_mix64(seed) ^ step) ^ zlib.crc32(m.name.encode()))
    for (offset, g), (_, w) in zip(_row_chunks(m.grad), _row_chunks(m.weight), strict=True):
        yield g, score(Entries(g.reshape(-1), w.reshape(-1), m.offset + offset, seed))


def _thresholds(
    units: list[list[_Matrix]],
    all_reduce: _AllReduce,
    score: Callable[[Entries], Tensor],
    scored: Callable[[_Matrix], Iterator[tuple[Tensor, Tensor]]],
    keep_ratio: float,
) -> Iterator[tuple[list[_Matrix], Tensor]]:
    """(the matrices that share a threshold, the threshold as a key)."""

    def keys(unit: list[_Matrix]) -> Iterator[Tensor]:
        for m in unit:
            for _, scores in scored(m):
                yield magnitude_keys(scores)

    size = 1 if all_reduce is None else _SHARDED_BUCKET  # together they share a collective
    for bucket in (units[i : i + size] for i in range(0, len(units), size)):
        numbers = [sum(m.numel for m in unit) for unit in bucket]
        ks = [keep_count(n, keep_ratio) for n in numbers]
        sources = [functools.partial(keys, unit) for unit in bucket]
        head = bucket[0][0]
        dtype = magnitude_keys(score(Entries(head.grad[:0].reshape(-1), head.weight[:0].reshape(-1), 0, 0))).dtype
        if all_reduce is None:
            found = [_kth_largest_key(sources[0], numbers[0], ks[0], dtype, head.grad.device)]
        else:
            found = kth_largest_keys(sources, ks, dtype, head.grad.device, all_reduce)
        yield from zip(bucket, found, strict=True)


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


def kth_largest_keys(
    sources: list[Callable[[], Iterable[Tensor]]],
    ks: list[int],
    dtype: torch.dtype,
    device: torch.device,
    all_reduce: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """For each of several sets of keys its k-th largest, exactly: radix selection from the highest 16-bit digit down.

    Counts add: over chunks, and, by all_reduce, over the shards of a matrix. So a process needs only its own part.

    Args:
        sources: functions; each call goes through this process's keys of one set once, in 1-D chunks.
        ks: 1 <= k <= number of keys of the set, over all processes.
        dtype: integer dtype of the keys, which are >= 0.
        all_reduce: sums an int64 tensor over the processes that hold the other parts, in place; None: there are none.
    Returns:
        (len(ks),) int64 on `device`, found without waiting for it. One all_reduce a digit serves all the sets.
    """
    k = torch.tensor(ks, device=device)
    prefix = torch.zeros_like(k)  # the digits found so far
    top = torch.iinfo(dtype).bits - _DIGIT_BITS
    for shift in range(top, -1, -_DIGIT_BITS):
        counts = torch.zeros(len(ks), 1 << _DIGIT_BITS, dtype=torch.int64, device=device)
        for row, source, p in zip(counts, sources, prefix, strict=True):
            for keys in source():
                row += _histogram(keys, shift, None if shift == top else p)
        if all_reduce:
            all_reduce(counts)
        # how many have this digit or a larger one: the k-th largest has the last digit for which that is enough
        at_or_above = counts.flip(1).cumsum(1).flip(1)
        digit = (at_or_above >= k.unsqueeze(1)).sum(1, keepdim=True) - 1
        k = k - (at_or_above.gather(1, digit) - counts.gather(1, digit)).squeeze(1)  # rank among those that share it
        prefix = (prefix << _DIGIT_BITS) | digit.squeeze(1)
    return prefix


def _kth_largest_key(source: Callable[[], Iterable[Tensor]], n: int, k: int, dtype: torch.dtype, device) -> Tensor:
    """The k-th largest of n keys of this process, by the faster of two exact ways."""
    if n < _SORT_BELOW and device.type == "cpu":
        return torch.cat(list(source())).kthvalue(n - k + 1).values
    return kth_largest_keys([source], [k], dtype, device)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer's step where M = 1 alone
# ---------------------------------------------------------------------------------------------------------------------


def _one_by_one(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """The optimizer's parameters; while one is given out, the optimizer holds it alone."""
    groups = [(group, group["params"]) for group in optimizer.param_groups]
    try:
        for group, _ in groups:
            group["params"] = []
        for group, parameters in groups:
            for p in parameters:
                group["params"] = [p]
                yield p
            group["params"] = []
    finally:
        for group, parameters in groups:
            group["params"] = parameters


def _step_where(optimizer: torch.optim.Optimizer, p: nn.Parameter, mask: Tensor) -> None:
    """Step an optimizer that holds one parameter; undo it where the mask, as bits, is False."""
    moments = lambda: {  # noqa: E731
        name: _here(t)
        for name, t in optimizer.state[p].items()
        if isinstance(t, Tensor) and t.shape == p.shape and t.is_floating_point()
    }
    weight = _here(p.data)
    before = {name: t.clone() for name, t in moments().items()}
    weight_before = weight.clone()
    optimizer.step()
    keep = _unpack(mask, 0, weight.numel()).view_as(weight)
    weight.copy_(torch.where(keep, weight, weight_before))
    for name, t in moments().items():
        t.copy_(torch.where(keep, t, before.get(name, torch.zeros_like(t))))  # before the first step moments are 0


# ---------------------------------------------------------------------------------------------------------------------
# Masks as bits
# ---------------------------------------------------------------------------------------------------------------------


def _pack(mask: Tensor) -> Tensor:
    """(ceil(n / 8),) uint8 of a flat bool mask of n entries: entry i is bit i % 8 of byte i // 8."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def _unpack(bits: Tensor, start: int, stop: int) -> Tensor:
    """Entries start to stop (not included) of a packed mask, bool."""
    some = bits[start // 8 : -(-stop // 8)].unsqueeze(1)
    flat = (some >> torch.arange(8, dtype=torch.uint8, device=bits.device)).bitwise_and_(1).bool().view(-1)
    return flat[start % 8 : start % 8 + stop - start]


def _masks_from_bits(matrices: list[_Matrix], bits: dict[str, Tensor] | None) -> Iterator[_MaskedChunk]:
    """Masks that are held as bits; without bits all is kept; of a parameter that has none in `bits`, nothing is."""
    for m in matrices:
        held = None if bits is None else bits.get(m.name)
        for offset, g in _row_chunks(m.grad):
            if held is None:
                yield m, g, torch.full_like(g, bits is None, dtype=torch.bool)
            else:
                yield m, g, _unpack(held, m.start + offset, m.start + offset + g.numel()).view_as(g)


def _gathered_bits(bits: Tensor, p: Tensor) -> Tensor:
    """The mask of the whole tensor `p`, as bits on the CPU, from those of this process's part of it."""
    mask = _unpack(bits, 0, _here(p).numel()).view_as(_here(p))
    if hasattr(p, "to_local"):
        mask = type(p).from_local(mask, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()).full_tensor()
    return _pack(mask.flatten()).cpu()


def _bits_of_this_process(bits: Tensor, p: Tensor) -> Tensor:
    """The mask of this process's part of `p`, as bits, from those of the whole tensor."""
    _, here, first_row, _ = _local("", p, p)
    first = first_row * (p.numel() // p.shape[0])
    return _pack(_unpack(bits.to(here.device), first, first + here.numel()))


# ---------------------------------------------------------------------------------------------------------------------
# Statistics and checks
# ---------------------------------------------------------------------------------------------------------------------


def _nonzero_and_energy(grad: Tensor) -> Tensor:
    """(2,) fp64: number of entries other than 0, and sum of squares."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(grad, dtype=wide).double()
    return torch.stack([grad.count_nonzero().double(), norm.square()])


def _overlap(bits: dict[str, Tensor], last: dict[str, Tensor]) -> Tensor | None:
    """(2,) fp64: entries that are in both of two masks, and in either; None where there is nothing to compare."""
    both = [(bits[name], last[name]) for name in bits if name in last]
    counts = [torch.stack([_unpack(x, 0, 8 * x.numel()).sum() for x in (a & b, a | b)]) for a, b in both]
    return torch.stack(counts).sum(0).double() if counts else None


def _statistics(
    eligible: dict[str, nn.Parameter],
    counts: dict[str, Tensor],
    overlap: Tensor | None,
    jaccard: bool,
    all_reduce: _AllReduce,
) -> dict[str, Any]:
    """mask_gradients' return value, of the whole tensors: one all_reduce, one wait for the device."""
    device = next((t.device for t in counts.values()), "cpu")
    none = torch.zeros(len(COUNTS) - 1, dtype=torch.float64, device=device)
    table = torch.stack([*(counts.get(name, none) for name in eligible), none])
    table[-1, :2] = 0 if overlap is None else overlap
    if all_reduce:
        all_reduce(table)
    *rows, (intersection, union, *_) = table.tolist()
    tensors = {
        name: dict(zip(COUNTS, [p.numel(), *row], strict=True))
        for (name, p), row in zip(eligible.items(), rows, strict=True)
    }
    entries, kept, nonzero, energy, nonzero_kept, energy_kept = (
        sum(t[key] for t in tensors.values()) for key in COUNTS
    )
    some_frozen = any(not p.requires_grad for p in eligible.values())
    statistics = {
        "kept_fraction": kept / max(entries, 1),
        "kept_nonzero_fraction": nonzero_kept / max(nonzero, 1),
        "energy_kept": None if some_frozen else energy_kept / energy if energy else 1.0,
        "tensors": tensors,
    }
    if jaccard:
        statistics["mask_jaccard"] = intersection / union if union else None
    return statistics


def _raise_if_not_finite(matrices: list[_Matrix], all_reduce: _AllReduce) -> None:
    norms = [torch.linalg.vector_norm(m.grad, ord=float("inf")) if m.grad.numel() else None for m in matrices]
    is_bad = torch.stack(  # a NaN stays one in this norm
        [
            torch.zeros((), device=m.grad.device) if x is None else (~x.isfinite()).float()
            for m, x in zip(matrices, norms, strict=True)
        ]
    )
    if all_reduce:
        all_reduce(is_bad)
    if is_bad.any():
        bad = [m.name for m, flag in zip(matrices, is_bad.tolist(), strict=True) if flag]
        raise ValueError(f"non-finite gradient in {bad[0]} ({len(bad)} of {len(matrices)} matrices): skip this step")


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
