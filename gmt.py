"""Gradient-Mask Tuning (GMT; Li et al., AAAI 2025, arXiv 2406.15330): the method, in a file that needs torch and numpy.

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
is the order of magnitudes. Histograms of the bits find T in one reading for 16-bit floats, two for fp32, four for fp64.
On a CPU one reading serves for all: a random sample gives a bracket around T, what lies above it is
counted, and T is found among the few entries inside. All of it goes in chunks, so that temporary memory hardly grows
with the matrix. On a GPU gmt_triton.py does it, if it is there.

GMT is one of a family of rules, which differ in what is large (the score), in when masks are chosen (refresh_every) and
in what happens where M = 0 (masked_weights): see RULES. To add a rule, write a function from `Entries` to scores (the k
entries of a matrix with the largest |score| are kept) and enter it in SCORES; its word is then a rule. HFT (Half
Fine-Tuning) freezes whole matrices before the optimizer is built, see `freeze_half`.

The file, from top to bottom: the rules, the mask of one tensor (`topk_mask`), the masks of a model (`Masker`); then the
machinery, which a new rule does not touch, and HFT.
"""

import fnmatch
import functools
import itertools
import os
import random
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# statistics per parameter: its entries, those kept, those with a gradient other than 0 and the sum of squares of their
# gradients, and the same two after masking
COUNTS = ("entries", "kept", "nonzero", "energy", "nonzero_kept", "energy_kept")


# ---------------------------------------------------------------------------------------------------------------------
# Rules: which entries of a matrix are kept at this step
# ---------------------------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """One method on its three axes."""

    score: str  # what is large, a word of scores(); "": no entries are masked
    refresh_every: int  # masks are chosen anew every N steps and kept in between; 0: once, at the first step
    masked_weights: str  # what happens where M = 0, a word of MASKED_WEIGHTS
    source: str


RULES = {
    "none": Rule("", 1, "momentum", "plain supervised fine-tuning"),
    "hft": Rule("", 1, "momentum", "HFT, arXiv 2404.18466: half of the matrices are frozen, see freeze_half"),
    "gmt": Rule("gradient", 1, "momentum", "GMT, arXiv 2406.15330"),
    "rmt": Rule("random", 1, "momentum", "the random masks that GMT is compared with"),
    "sift": Rule("gradient", 0, "momentum", "SIFT, ICML 2024: the largest gradients of the first step"),
    "gasdu": Rule("gradient", 50, "momentum", "GASDU: the largest gradients of every 50th step"),
    "shira": Rule("random", 0, "momentum", "SHiRA: a fixed random mask"),
    "super_tuning": Rule("weight", 0, "momentum", "Super-Tuning, arXiv 2607.09287: the largest weights"),
    "mofo": Rule("moment", 1, "update", "MoFO, TMLR 2025, arXiv 2407.20999: the largest first moments of Adam"),
    "lift": Rule("low_rank", 200, "frozen", "LIFT, ICML 2025: the largest entries of the rank-r part of W"),
    "grad_square": Rule("squared_gradients", 0, "momentum", "FISH, arXiv 2111.09839, by gradients of batches"),
}
# momentum: the optimizer sees M * G, so that the moments of a masked entry decay, and still move its weight;
# frozen: weight and moments stay as they are; update: the moments see all of G, the weight stays as it is.
# Where the weight stays, it does not decay either.
MASKED_WEIGHTS = ("momentum", "frozen", "update")


class Entries(NamedTuple):
    """A flat run of a matrix's entries: what a score sees. A large matrix is shown chunk by chunk."""

    grad: Tensor  # (m,) the accumulated gradient, in its own dtype
    weight: Tensor  # (m,) the weights
    offset: int  # place of the first entry in the whole tensor, row-major
    seed: int  # a hash of (seed, step, parameter name): the same on every rank
    moment: Callable[[], Tensor] | None = None  # gives (m,) Adam's first moment after this step


def score_gradient(e: Entries) -> Tensor:
    """|G|: the paper's score. The magnitude is taken by the selection."""
    return e.grad


def score_random(e: Entries) -> Tensor:
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


def score_weight(e: Entries) -> Tensor:
    """|w|."""
    return e.weight


def score_weight_gradient(e: Entries) -> Tensor:
    """|w * G|: what setting the weight to 0 would change of the loss, to first order."""
    return e.weight * e.grad


def score_moment(e: Entries) -> Tensor:
    """|m|, m = beta1 * m + (1 - beta1) * G: Adam's first moment after this step."""
    return e.moment()


SCORES: dict[str, Callable[[Entries], Tensor]] = {
    "gradient": score_gradient,
    "random": score_random,
    "weight": score_weight,
    "weight_gradient": score_weight_gradient,
    "moment": score_moment,
    "squared_gradients": score_gradient,  # of the sums of G**2 that Masker.calibrate makes
}
# Where the gradient is finite, these are numbers; every other score is checked.
_ALWAYS_NUMBERS = (score_gradient, score_random, score_weight, score_weight_gradient, score_moment)


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

    matrices = list(_split("", scores, scores, scores.shape, 0))
    return _is_kept(scores, _kth_largest_key(matrices, _Scorer(score_gradient, {"": 0}), k))


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
        score, refresh_every, masked_weights: override the rule's own axes, see RULES.
        scope: `tensor`, one threshold per matrix (the paper's), or `model`, one over all masked entries.
        exclude: fnmatch patterns of parameter names that are not masked, e.g. `*embed_tokens*`.
        mask_vectors: mask tensors of fewer than two dimensions (norms, biases) too.
        lift_rank: rank of the part of W that score `low_rank` looks at.
        seed: seeds the random rules.
    Raises:
        ValueError: an argument has no meaning, or a pattern of `exclude` matches no parameter.

    Between refreshes masks are kept, as a bit per entry; they belong into a checkpoint, see state_dict.
    A Masker hooks into nothing: between the calls it does nothing, so that saving and loading go on undisturbed.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        rule: str = "gmt",
        keep_ratio: float | None = None,
        *,
        score: str | None = None,
        refresh_every: int | None = None,
        masked_weights: str | None = None,
        scope: str = "tensor",
        exclude: Iterable[str] = (),
        mask_vectors: bool = False,
        lift_rank: int = 64,
        seed: int = 0,
    ):
        self.score, self.refresh_every, self.masked_weights, _ = rule_of(rule, score, refresh_every, masked_weights)
        if self.score and not (keep_ratio is not None and 0 < keep_ratio <= 1):
            raise ValueError(f"rule {rule} needs a keep_ratio in (0, 1]; got {keep_ratio}")
        if not self.score and keep_ratio is not None:
            raise ValueError(f"keep_ratio has no meaning for rule {rule}; got {keep_ratio}")
        if scope not in ("tensor", "model"):
            raise ValueError(f"scope must be tensor or model; got {scope!r}")
        if self.score == "low_rank" and scope == "model":
            raise ValueError("score low_rank looks at one matrix at a time: scope must be tensor")
        if lift_rank < 1:
            raise ValueError(f"lift_rank must be at least 1, got {lift_rank}")
        self.rule, self.keep_ratio, self.scope, self.lift_rank, self.seed = rule, keep_ratio, scope, lift_rank, seed
        parameters = _without_wrappers(dict(named_parameters))
        self.eligible = _eligible(parameters, exclude, mask_vectors)
        self.total_entries = sum(p.numel() for p in parameters.values())
        self._squares: dict[str, Tensor] = {}  # while it is calibrated: sums of squared gradients
        self._held: dict[str, Tensor] = {}  # masks that serve for more than a step: bits of this process's part
        self._chosen_at = 0  # the step at which they were chosen
        self._last: dict[str, Tensor] = {}  # the masks, as bits, of the last call with jaccard=True

    @torch.no_grad()
    def mask_gradients(
        self,
        step: int,
        *,
        optimizer: Optimizer | None = None,
        stats: bool = False,
        jaccard: bool = False,
        check_finite: bool = True,
    ) -> dict[str, Any] | None:
        """Zero the gradient entries that the rule does not keep. Parameters without a gradient are skipped.

        Gradients that FSDP2 shards (DTensors, Shard(0), also with replicas) get the mask of the whole matrix, from
        all-reduced counts; every process of the mesh has to make the call.

        Args:
            step: the optimizer step, from 0: the random rules draw anew at each.
            optimizer: torch's Adam or AdamW, before its step, where the score is `moment`; unused elsewhere.
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
            ValueError: a gradient is not finite (the parameter is named), sparse, or laid out in another way;
                grad_square has no masks yet; or masked_weights is not `momentum`, see step().
        """
        if self.masked_weights != "momentum":
            raise ValueError(f"masked_weights {self.masked_weights} owns the optimizer's step: call step() instead")
        return self._mask(step, optimizer, stats, jaccard, check_finite)[0]

    @torch.no_grad()
    def step(
        self,
        optimizer: Optimizer,
        step: int,
        *,
        stats: bool = False,
        jaccard: bool = False,
        check_finite: bool = True,
        after_masking: Callable[[], object] | None = None,
    ) -> dict[str, Any] | None:
        """Mask and take the optimizer's step, for any `masked_weights`: instead of mask_gradients and optimizer.step().

        `momentum` is those two calls. For `frozen` and `update` the optimizer steps one parameter at a time; what it
        did where M = 0 is taken back, at the price of a bit per entry and a copy of that parameter's weight, for
        `frozen` of its moments too. Entries with M = 1 get exactly the optimizer's update. Adam counts steps per
        tensor: under `frozen` its bias correction for an entry that is first selected at a late step is that of the
        late step, so that such an entry moves by up to (1 - beta1) / sqrt(1 - beta2), about 3 times the learning rate.
        Quantised (uint8) moments share block scales and are not taken back: of 8-bit optimizers only the weights are.

        Args, Returns and Raises: as mask_gradients; the optimizer may be any torch one whose state is tensors of the
        weight's shape. Parameters that are not eligible are updated as always. after_masking is called between the two,
        to clip what is left of the gradient, say; under `update` p.grad is not masked.
        """
        takes_back = self.masked_weights != "momentum"
        statistics, masks = self._mask(step, optimizer, stats, jaccard, check_finite, keep_bits=takes_back)
        if after_masking:
            after_masking()
        if not takes_back:
            optimizer.step()
            return statistics
        mask_of = {id(self.eligible[name]): bits for name, bits in masks.items()}
        for p in _one_by_one(optimizer):
            if id(p) in mask_of:
                _step_where(optimizer, p, mask_of[id(p)], self.masked_weights == "frozen")
            elif p.grad is not None:
                optimizer.step()
        return statistics

    @property
    def needs_calibration(self) -> bool:
        """Whether calibrate() and fix_masks() have to come before the first step."""
        return self.score == "squared_gradients" and not self._held

    @torch.no_grad()
    def calibrate(self) -> None:
        """Score squared_gradients: add the squares of the gradients that are there now to their sums.

        Take no optimizer step. The selection of FISH masks (arXiv 2111.09839), but with the squared gradients of whole
        batches, where Fisher information has those of single examples.
        """
        for name, p in self.eligible.items():
            if p.grad is not None:
                wide = p.grad if p.grad.dtype == torch.float64 else p.grad.float()
                self._squares[name] = self._squares.get(name, 0) + wide.square()

    @torch.no_grad()
    def fix_masks(self) -> None:
        """Score squared_gradients: choose the masks of all steps by the sums, and forget the sums.

        Raises:
            ValueError: nothing was calibrated, or a sum is not finite.
        """
        if not self._squares:
            raise ValueError("squared_gradients: nothing to choose by; call calibrate() after backward() first")
        selection = self._selection(self._squares, 0, None)
        _raise_if_not_finite(selection)
        self._held = _bits(_select(selection))
        self._squares = {}

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: {"chosen_at": step, "masks": {parameter name: bits (uint8, on the CPU)}}.

        Masks that serve for one step alone are not in it. The others are those of whole tensors, also under sharding,
        where every process has to make the call.
        """
        masks = {name: _gathered_bits(bits, self.eligible[name].detach()) for name, bits in self._held.items()}
        return {"chosen_at": self._chosen_at, "masks": masks}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the masks of state_dict(), whatever number of processes it was made on.

        Raises:
            ValueError: they are those of other parameters.
        """
        held = {}
        for name, bits in state["masks"].items():
            p = self.eligible.get(name)
            if p is None or bits.numel() != -(-p.numel() // 8):
                raise ValueError(f"the masks in the checkpoint do not fit the parameter {name}")
            held[name] = _bits_of_this_process(bits, p.detach())
        self._held, self._chosen_at = held, state["chosen_at"]

    def summary(self) -> str:
        """What is masked, for people: eligible tensors grouped by shape, and their share of all parameters."""
        return _summary(self)

    def _mask(
        self,
        step: int,
        optimizer: Optimizer | None,
        stats: bool,
        jaccard: bool,
        check_finite: bool,
        keep_bits: bool = False,
    ) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
        """(mask_gradients' statistics, the masks as bits where keep_bits or jaccard asks for them)."""
        if not (self.score or stats or jaccard or check_finite):
            return None, {}
        grads = {name: p.grad for name, p in self.eligible.items() if p.grad is not None}
        selection = self._selection(grads, step, optimizer)
        if check_finite:
            _raise_if_not_finite(selection)
        if self.score == "gradient" and self.refresh_every == 1 and not (stats or jaccard or keep_bits):
            _zero_all_but_largest(selection)
            return None, {}
        counts, bits, overlap = {}, {}, None
        # under `update` the moments see the whole gradient
        chunks = _multiply(self._masks(selection, step), self.masked_weights != "update", counts if stats else None)
        if keep_bits or jaccard:
            bits = _bits(chunks)
        else:
            for _ in chunks:  # each is masked as it comes
                pass
        if jaccard:
            overlap, self._last = _overlap(bits, self._last), bits
        return _statistics(self.eligible, counts, overlap, jaccard, selection.all_reduce) if stats else None, bits

    def _selection(self, tensors: dict[str, Tensor], step: int, optimizer: Optimizer | None) -> "_Selection":
        """What masks are chosen from at this step: the gradients, or tensors of their layout."""
        seeds = {name: _parameter_seed(self.seed, step, name) for name in self.eligible}
        scorer = _Scorer(SCORES.get(self.score), seeds, _first_moments(optimizer, self.eligible))
        return _Selection(*_matrices(tensors, self.eligible), scorer, self.keep_ratio, self.scope)

    def _masks(self, selection: "_Selection", step: int) -> Iterator["_MaskedChunk"]:
        """The masks of this step: chosen now, or held since an earlier step."""
        if not self.score:
            return _masks_from_bits(selection.matrices, None)
        if self.needs_calibration:
            raise ValueError(f"rule {self.rule} has no masks: calibrate() and fix_masks() come before the first step")
        if self.refresh_every == 1 and self.score != "low_rank":
            return _select(selection)
        if self.score != "squared_gradients":
            if 0 < self.refresh_every <= step - self._chosen_at:
                self._held = {}
            if not self._held:
                self._chosen_at = step
            # all of them; afterwards, those that have a gradient for the first time
            new = [m for m in selection.matrices if m.name not in self._held]
            if self.score == "low_rank":
                parameters = {m.name: self.eligible[m.name] for m in new}
                self._held |= _low_rank_bits(parameters, self.lift_rank, self.keep_ratio, self.seed)
            else:
                self._held |= _bits(_select(selection._replace(matrices=new)))
        return _masks_from_bits(selection.matrices, self._held)


# ---------------------------------------------------------------------------------------------------------------------
# The words of a configuration, and the parameters that they mean
# ---------------------------------------------------------------------------------------------------------------------


def scores() -> tuple[str, ...]:
    """The words for a score: SCORES, and `low_rank`, for which whole matrices are needed: see low_rank_part."""
    return *SCORES, "low_rank"


def rules() -> tuple[str, ...]:
    """The words for a rule: RULES, and the scores that none of them uses, chosen at each step."""
    used = {rule.score for rule in RULES.values()}
    return *RULES, *(score for score in SCORES if score not in used)


def rule_of(
    word: str, score: str | None = None, refresh_every: int | None = None, masked_weights: str | None = None
) -> Rule:
    """The axes of a rule, each overridden by an argument that is not None.

    Raises:
        ValueError: a word is unknown, or the axes do not go together.
    """
    if word not in rules():
        raise ValueError(f"rule must be one of {', '.join(rules())}; got {word!r}")
    rule = RULES.get(word) or Rule(word, 1, "momentum", "")
    axes = {"score": score, "refresh_every": refresh_every, "masked_weights": masked_weights}
    given = {axis: value for axis, value in axes.items() if value is not None}
    if given and not rule.score:
        raise ValueError(f"{next(iter(given))} has no meaning for rule {word}, which masks no entries")
    rule = rule._replace(**given)
    if rule.score and rule.score not in scores():
        raise ValueError(f"score must be one of {', '.join(scores())}; got {rule.score!r}")
    if rule.masked_weights not in MASKED_WEIGHTS:
        raise ValueError(f"masked_weights must be one of {', '.join(MASKED_WEIGHTS)}; got {rule.masked_weights!r}")
    if rule.refresh_every < 0:
        raise ValueError(f"refresh_every must be at least 0, got {rule.refresh_every}")
    if rule.score == "squared_gradients" and rule.refresh_every:
        raise ValueError(
            f"score squared_gradients is chosen once, after the calibration: refresh_every must be 0, "
            f"got {rule.refresh_every}"
        )
    return rule


def masks_entries(rule: str) -> bool:
    """Whether a rule masks single entries, so that keep_ratio and its companions have a meaning for it."""
    return bool(rule_of(rule).score)


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

_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}  # entries per chunk: the CPU's cache; enough work for a GPU
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
    """(offset of the first entry, some whole rows): views, whatever the strides; one empty chunk of no rows."""
    rows = max(1, _CHUNK.get(matrix.device.type, 1 << 18) // max(1, matrix.shape[1]))
    for start in range(0, max(1, matrix.shape[0]), rows):
        yield start * matrix.shape[1], matrix[start : start + rows]


# ---------------------------------------------------------------------------------------------------------------------
# Which entries of all matrices are kept
# ---------------------------------------------------------------------------------------------------------------------

_MaskedChunk = tuple[_Matrix, Tensor, Tensor]  # (matrix, a chunk of its gradient as a view, that chunk's mask)


class _Scorer(NamedTuple):
    """Gives the scores of a matrix's entries."""

    score: Callable[[Entries], Tensor]
    seeds: dict[str, int]  # per parameter
    moment_of: Callable[[str, slice | Tensor, Tensor], Tensor] | None = None  # see _first_moments

    def chunks(self, m: _Matrix) -> Iterator[tuple[Tensor, Tensor]]:
        """(a chunk of the gradient, a view; its scores, flat); at least one chunk, maybe empty."""
        for (offset, g), (_, w) in zip(_row_chunks(m.grad), _row_chunks(m.weight), strict=True):
            start = m.start + offset
            places = slice(start, start + g.numel())
            yield g, self._scores(m, m.offset + offset, places, g.reshape(-1), w.reshape(-1))

    def keys(self, unit: list[_Matrix]) -> Iterator[Tensor]:
        """The magnitudes of the scores of some matrices, in flat chunks."""
        for m in unit:
            for _, scores in self.chunks(m):
                yield magnitude_keys(scores)

    def key_dtype(self, m: _Matrix) -> torch.dtype:
        """That of a matrix's keys: from its first row."""
        return next(self.keys([m._replace(grad=m.grad[:1], weight=m.weight[:1])])).dtype

    def sample(self, m: _Matrix, count: int) -> Tensor:
        """(count,) scores of entries that are drawn at random; those of a random score are of other entries."""
        places = _draws(count, m.grad.device).long().mul_(m.grad.numel()).bitwise_right_shift_(31)
        grad = m.grad.take(places)
        # |G| has no use for the weights, which lie far apart in memory
        weight = grad if self.score is score_gradient else m.weight.take(places)
        return self._scores(m, m.offset, m.start + places, grad, weight)

    def _scores(self, m: _Matrix, offset: int, places: slice | Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        moment = functools.partial(self.moment_of, m.name, places, grad) if self.moment_of else None
        scores = self.score(Entries(grad, weight, offset, self.seeds[m.name], moment))
        if self.score not in _ALWAYS_NUMBERS and scores.isnan().any():  # a NaN would count as the largest
            raise ValueError(f"the score of {m.name} has entries that are NaN: guard its divisions and its roots")
        return scores


@functools.lru_cache(maxsize=64)  # models have few shapes of matrices
def _draws(count: int, device: torch.device) -> Tensor:
    """(count,) int32, random numbers below 2**31, the same ones always; sorted, since memory is read faster so."""
    nothing = torch.empty(count, device=device)
    return score_random(Entries(nothing, nothing, 0, 0)).sort().values


class _Selection(NamedTuple):
    """What masks are chosen from, and how."""

    matrices: list[_Matrix]
    all_reduce: _AllReduce
    scorer: _Scorer
    keep_ratio: float
    scope: str

    def units(self) -> list[list[_Matrix]]:
        """The matrices that share a threshold."""
        # one histogram, or one collective, for matrices whose keys have different widths would mix up their digits
        dtypes = {m.grad.dtype for m in self.matrices}
        if (self.scope == "model" or self.all_reduce) and len(dtypes) > 1:
            raise ValueError(f"with scope model or shards all gradients must have one dtype, got {dtypes}")
        return [self.matrices] if self.scope == "model" and self.matrices else [[m] for m in self.matrices]


def _select(selection: _Selection) -> Iterator[_MaskedChunk]:
    """Choose the entries with the largest scores; yields in the order of the matrices."""
    for m, threshold in _thresholds(selection):
        for g, scores in selection.scorer.chunks(m):
            yield m, g, _is_kept(scores, threshold).view_as(g)


def _zero_all_but_largest(selection: _Selection) -> None:
    """GMT's mask, in place: as _select by the gradient and a multiplication, but written in one pass."""
    if kernels := _kernels_for(selection.matrices):
        matrices, thresholds = zip(*_thresholds(selection), strict=True)
        kernels.mask_([[m.grad] for m in matrices], torch.stack(thresholds))
        return
    for m, threshold in _thresholds(selection):
        for _, g in _row_chunks(m.grad):
            _zero_below_(g, threshold)


def _multiply(
    chunks: Iterator[_MaskedChunk], in_place: bool, counts: dict[str, Tensor] | None
) -> Iterator[_MaskedChunk]:
    """Hand chunks on as their gradients are masked; in `counts` sum up COUNTS, without entries, per parameter."""
    for m, g, mask in chunks:
        before = None if counts is None else _nonzero_and_energy(g)
        masked = g.mul_(mask) if in_place else None if counts is None else g * mask
        if counts is not None:
            now = torch.stack([mask.sum().double(), *before, *_nonzero_and_energy(masked)])
            counts[m.name] = counts.get(m.name, 0) + now
        yield m, g, mask


def _is_kept(scores: Tensor, threshold: Tensor) -> Tensor:
    """bool, shape of scores. A floating-point score of 0 (a gradient of 0) is never kept, even where T is 0."""
    return magnitude_keys(scores) >= (threshold.clamp(min=1) if scores.is_floating_point() else threshold)


def _zero_below_(g: Tensor, threshold: Tensor) -> None:
    """Set to 0, in place, the entries whose key is below the threshold."""
    if g.device.type == "cpu":  # in one pass: hardshrink sets to 0 what is not above a number, here the one below T
        below = (threshold.clamp(min=1) - 1).to(_INTEGER_OF[g.dtype]).view(g.dtype)
        torch.ops.aten.hardshrink.out(g, below.item(), out=g)
    else:
        g.mul_(_is_kept(g, threshold))


def _first_moments(
    optimizer: Optimizer | None, parameters: dict[str, nn.Parameter]
) -> Callable[[str, slice | Tensor, Tensor], Tensor]:
    """A function (name, places of the entries in this process's part, their gradients) -> their first moments in Adam
    after this step, computed as torch's AdamW does."""
    beta1 = {
        id(p): group.get("betas", (None,))[0]
        for group in (optimizer.param_groups if optimizer else ())
        for p in group["params"]
    }

    def moment(name: str, places: slice | Tensor, grad: Tensor) -> Tensor:
        if optimizer is None:
            raise ValueError("score moment needs the optimizer: mask_gradients(step, optimizer=optimizer)")
        p = parameters[name]
        state = optimizer.state.get(p, {})
        if beta1.get(id(p)) is None or (state and "exp_avg" not in state):
            raise ValueError(f"score moment needs torch's Adam or AdamW, got {type(optimizer).__name__}")
        held = _here(state["exp_avg"]).reshape(-1)[places] if state else torch.zeros_like(grad)
        return torch.lerp(held, grad, 1 - beta1[id(p)])

    return moment


# ---------------------------------------------------------------------------------------------------------------------
# LIFT's score, of whole matrices
# ---------------------------------------------------------------------------------------------------------------------


def low_rank_part(matrix: Tensor, rank: int, seed: int = 0) -> Tensor:
    """The part of a matrix that its `rank` largest singular values make: what LIFT takes for important is large in it.

    Exact for small matrices. For larger ones the randomised SVD of Halko, Martinsson and Tropp (SIAM Review 2011) with
    two power iterations: seven products with matrices of up to rank + 10 columns instead of a full decomposition.

    Args:
        matrix: (m, n) floating point.
        rank: at least 1.
        seed: of the random test matrix, which depends on nothing else.
    Returns:
        (m, n) fp32, or fp64 for an fp64 matrix.
    """
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    columns = rank + 10
    if min(wide.shape) <= rank:
        return wide
    if min(wide.shape) <= 4 * columns:
        basis, small = None, wide
    else:
        numbers = score_random(Entries(wide.new_empty(wide.shape[1] * columns), wide, 0, seed))
        basis = torch.linalg.qr(wide @ (numbers.to(wide.dtype) / 2**30 - 1).view(-1, columns)).Q
        for _ in range(2):
            basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ basis).Q).Q
        small = basis.T @ wide
    u, values, v = torch.linalg.svd(small, full_matrices=False)
    left = u[:, :rank] * values[:rank]
    return (left if basis is None else basis @ left) @ v[:rank]


def _low_rank_bits(parameters: dict[str, nn.Parameter], rank: int, keep_ratio: float, seed: int) -> dict[str, Tensor]:
    """The masks of the largest entries of the rank-r parts of W, as bits per parameter, of this process's part.

    Every process gathers one whole parameter at a time, and comes to the same mask.
    """
    bits = {}
    for name, p in parameters.items():
        whole = p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()
        masks = []
        for m in _split(name, whole, whole, whole.shape, 0):
            part = low_rank_part(m.weight, rank, _parameter_seed(seed, m.offset, name))
            masks.append(topk_mask(part, keep_count(m.numel, keep_ratio)).flatten())
        bits[name] = _bits_of_this_process(_pack(torch.cat(masks)), p.detach())
    return bits


# ---------------------------------------------------------------------------------------------------------------------
# Thresholds: the k-th largest score, exactly and in chunks
# ---------------------------------------------------------------------------------------------------------------------

_INTEGER_OF = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
_DIGIT_BITS = 16  # a histogram has at most 2**16 bins; a key of 31 bits takes two readings
_SORT_BELOW = 1 << 16  # entries; on a CPU kthvalue is fastest there, and as exact
_SAMPLE = 1 << 16  # entries at most that are drawn to guess a threshold
_SHARED_BINS = 1 << 20  # of the histograms (8 bytes a bin) that share a collective


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


def _thresholds(s: _Selection) -> Iterator[tuple[_Matrix, Tensor]]:
    """(matrix, the threshold of its scores as a key), in the order of the matrices."""
    units = s.units()
    numbers = [sum(m.numel for m in unit) for unit in units]
    ks = [keep_count(n, s.keep_ratio) for n in numbers]
    if s.scorer.score is score_gradient and (kernels := _kernels_for(s.matrices)):
        found = kernels.kth_largest_keys([[m.grad for m in unit] for unit in units], ks, numbers, s.all_reduce)
    elif s.all_reduce is None:
        found = (_kth_largest_key(unit, s.scorer, k) for unit, k in zip(units, ks, strict=True))
    else:
        found = _kth_largest_keys_of_shards(units, ks, s.scorer, s.all_reduce)
    for unit, threshold in zip(units, found, strict=True):
        for m in unit:
            yield m, threshold


@functools.cache
def _kernels() -> Any:
    """The module gmt_triton; None where it is not beside this file, or Triton (3.4 or newer) or a GPU is missing."""
    if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    try:
        import gmt_triton
    except Exception:  # missing, too old, or damaged
        return None
    return gmt_triton


def _kernels_for(matrices: list[_Matrix]) -> Any:
    """gmt_triton if it serves for these gradients, else None: the same on all processes that share them."""
    kernels = _kernels()
    return kernels if kernels and kernels.is_usable(m.grad for m in matrices) else None


def _kth_largest_keys_of_shards(
    units: list[list[_Matrix]], ks: list[int], scorer: _Scorer, all_reduce: _AllReduce
) -> Iterator[Tensor]:
    """The k-th largest key of each unit, from this process's parts; some of them at a time share a collective."""
    some = _SHARED_BINS >> _DIGIT_BITS
    for i in range(0, len(units), some):
        bucket = units[i : i + some]
        sources = [functools.partial(scorer.keys, unit) for unit in bucket]
        dtype, device = scorer.key_dtype(bucket[0][0]), bucket[0][0].grad.device
        yield from kth_largest_keys(sources, ks[i : i + some], dtype, device, all_reduce)


def _digits(bits: int) -> Iterator[tuple[int, int]]:
    """(shift, width) of the digits of a key of so many bits, from the highest."""
    while bits:
        width = min(bits, _DIGIT_BITS)
        bits -= width
        yield bits, width


def _histogram(keys: Tensor, shift: int, width: int, prefix: Tensor | None) -> Tensor:
    """Counts (2**width,) int64 of the digit at `shift`, over the keys whose higher bits equal `prefix`.

    On a GPU a digit of 0 is not counted: of many zeros each would wait for the one before at the same address.
    """
    bins = 1 << width
    digit = (keys >> shift) & (bins - 1)
    inside = None if prefix is None else (keys >> (shift + width)) == prefix
    # On a GPU bincount and boolean indexing wait for the host; histc does not, and skips what is out of range. Its
    # fp32 counts are exact up to 2**24, the size of a chunk. torch calls it nondeterministic, though a count is not.
    if keys.device.type == "cpu" or torch.are_deterministic_algorithms_enabled():
        return torch.bincount(digit if inside is None else digit[inside], minlength=bins)
    digit = digit if inside is None else torch.where(inside, digit, 0)
    counts = torch.histc(digit.float(), bins=bins, min=0.5, max=bins + 0.5).long()  # a power of 2: nothing is rounded
    return counts.roll(1)  # the last, of a digit that there is not, is 0


def kth_largest_keys(
    sources: list[Callable[[], Iterable[Tensor]]],
    ks: list[int],
    dtype: torch.dtype,
    device: torch.device,
    all_reduce: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """For each of several sets of keys its k-th largest, exactly: radix selection from the highest digit down.

    Counts add: over chunks, and, by all_reduce, over the shards of a matrix. So a process needs only its own part.

    Args:
        sources: functions; each call goes through this process's keys of one set once, in 1-D chunks.
        ks: 1 <= k <= number of keys of the set, over all processes.
        dtype: integer dtype of the keys, which are >= 0.
        all_reduce: sums an int64 tensor over the processes that hold the other parts, in place; None: there are none.
    Returns:
        (len(ks),) int64 on `device`, found without waiting for it. One all_reduce a digit serves all the sets.
    """
    k = torch.stack([torch.full((), k, dtype=torch.int64, device=device) for k in ks])  # without waiting for a copy
    prefix = torch.zeros_like(k)  # the digits found so far
    bits = torch.iinfo(dtype).bits - 1
    for shift, width in _digits(bits):
        counts = torch.zeros(len(ks), 1 << width, dtype=torch.int64, device=device)
        for row, source, p in zip(counts, sources, prefix, strict=True):
            for keys in source():
                row += _histogram(keys, shift, width, None if shift + width == bits else p)
        if all_reduce:
            all_reduce(counts)
        # how many have this digit or a larger one: the k-th largest has the last digit for which that is enough, or 0
        at_or_above = counts.flip(1).cumsum(1).flip(1)
        digit = ((at_or_above >= k.unsqueeze(1)).sum(1, keepdim=True) - 1).clamp(min=0)
        k = k - (at_or_above.gather(1, digit) - counts.gather(1, digit)).squeeze(1)  # rank among those that share it
        prefix = (prefix << width) | digit.squeeze(1)
    return prefix


def _kth_largest_key(unit: list[_Matrix], scorer: _Scorer, k: int) -> Tensor:
    """The k-th largest key of matrices that this process has whole, by the fastest of three exact ways.

    On a CPU: few keys are sorted in part; for many one reading serves, without a histogram's 65,536 bins.
    """
    n = sum(m.numel for m in unit)
    device = unit[0].grad.device
    if device.type == "cpu" and n < _SORT_BELOW:
        return torch.cat(list(scorer.keys(unit))).kthvalue(n - k + 1).values
    if device.type == "cpu":
        drawn = min(_SAMPLE, n // 512 + 4096)
        sample = [magnitude_keys(scorer.sample(m, -(-drawn * m.numel // n))) for m in unit]
        found = _kth_in_bracket(scorer.keys(unit), *_bracket(torch.cat(sample), k / n), k, n)
        if found is not None:
            return found
    return kth_largest_keys([functools.partial(scorer.keys, unit)], [k], scorer.key_dtype(unit[0]), device)[0]


def _bracket(sample: Tensor, share: float) -> tuple[int, int]:
    """(low, high): between them, both included, the key is that is exceeded by `share` of all, nearly always."""
    s = sample.numel()
    spread = 3 * (s * share * (1 - share)) ** 0.5 + 1  # three standard deviations of the rank
    first, last = int(share * s - spread), int(share * s + spread) + 1  # ranks from the largest
    ranks = s - min(max(last, 1), s), s - min(max(first, 1), s)  # from the smallest, as places
    low, high = (int(x) for x in np.partition(sample.numpy(), ranks)[list(ranks)])
    return low if last <= s else 0, high if first >= 1 else torch.iinfo(sample.dtype).max


def _kth_in_bracket(chunks: Iterable[Tensor], low: int, high: int, k: int, n: int) -> Tensor | None:
    """The k-th largest of n keys, in one reading; None where it is not in the bracket, or too many are.

    By numpy, whose comparisons, and search for the few that are inside, are several times faster than torch's on a CPU.
    """
    exceed, inside, held = 0, [], 0  # keys above the bracket; those inside, and their number
    for keys in (chunk.numpy() for chunk in chunks):
        above, at_or_above = keys > high, keys >= low
        exceed += np.count_nonzero(above)
        if low == high:  # of one key they are but counted
            held += np.count_nonzero(at_or_above) - np.count_nonzero(above)
            continue
        inside.append(keys[np.flatnonzero(above ^ at_or_above)])
        held += inside[-1].size
        if held > n // 8 + _SORT_BELOW:  # many equal keys
            return None
    place = held - (k - exceed)  # from the smallest
    if not 0 <= place < held:
        return None
    return torch.tensor(low if low == high else int(np.partition(np.concatenate(inside), place)[place]))


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer's step where M = 1 alone
# ---------------------------------------------------------------------------------------------------------------------


def _one_by_one(optimizer: Optimizer) -> Iterator[nn.Parameter]:
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


def _step_where(optimizer: Optimizer, p: nn.Parameter, mask: Tensor, moments_too: bool) -> None:
    """Step an optimizer that holds one parameter; take back its weight, and moments, where the mask, as bits, is 0."""

    def tensors() -> dict[str, Tensor]:
        state = optimizer.state.get(p, {}) if moments_too else {}
        moments = {
            name: _here(t)
            for name, t in state.items()
            if isinstance(t, Tensor) and t.shape == p.shape and t.is_floating_point()
        }
        return {"": _here(p.data), **moments}

    before = {name: t.clone() for name, t in tensors().items()}
    optimizer.step()
    keep = _unpack(mask, 0, before[""].numel()).view_as(before[""])
    for name, t in tensors().items():
        if name in before:
            torch.where(keep, t, before[name], out=t)
        else:  # before the first step moments are 0
            t.mul_(keep)


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


def _bits(chunks: Iterator[_MaskedChunk]) -> dict[str, Tensor]:
    """Masks as bits: per parameter, of the part that this process holds. One parameter's are bools at a time."""
    return {
        name: _pack(torch.cat([mask.flatten() for _, _, mask in group]))
        for name, group in itertools.groupby(chunks, key=lambda chunk: chunk[0].name)
    }


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
# Summary, statistics and checks
# ---------------------------------------------------------------------------------------------------------------------


def _summary(masker: Masker) -> str:
    by_shape: dict[tuple, list[str]] = defaultdict(list)
    for name, p in masker.eligible.items():
        by_shape[tuple(p.shape)].append(name)
    share = sum(p.numel() for p in masker.eligible.values()) / max(masker.total_entries, 1)
    kept, unused = "", "; nothing is masked"
    if masker.score:
        unused = ""
        when = {0: "once", 1: "at each step"}.get(masker.refresh_every, f"every {masker.refresh_every} steps")
        kept = f" (score {masker.score}, chosen {when}, masked_weights {masker.masked_weights})"
        kept += f", keep_ratio {masker.keep_ratio}, scope {masker.scope}"
    lines = [
        f"rule {masker.rule}{kept}: {len(masker.eligible)} tensors, {share:.1%} of all parameters, are maskable{unused}"
    ]
    for shape, names in by_shape.items():
        frozen = sum(not masker.eligible[n].requires_grad for n in names)
        kinds = ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", n) for n in names}))
        lines.append(
            f"  {len(names):4d} x {'x'.join(map(str, shape)):<14} {kinds}" + f"  ({frozen} frozen)" * (frozen > 0)
        )
    return "\n".join(lines)


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


def _raise_if_not_finite(selection: _Selection) -> None:
    """Name the first matrix with an entry that is not finite, on every process."""
    matrices, all_reduce = selection.matrices, selection.all_reduce
    if not matrices:
        return
    norms = [  # a NaN stays one in this norm
        torch.linalg.vector_norm(m.grad, ord=float("inf")) if m.grad.numel() else m.grad.new_zeros(()) for m in matrices
    ]
    is_bad = torch.stack([~norm.isfinite() for norm in norms]).float()
    if all_reduce:
        all_reduce(is_bad)
    if is_bad.any():
        bad = [m.name for m, flag in zip(matrices, is_bad.tolist(), strict=True) if flag]
        raise ValueError(f"non-finite gradient in {bad[0]} ({len(bad)} of {len(matrices)} matrices): skip this step")


def _parameter_seed(seed: int, step: int, name: str) -> int:
    """A hash of the three: the same on every process."""
    return _mix64(_mix64(_mix64(seed) ^ step) ^ zlib.crc32(name.encode()))


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
