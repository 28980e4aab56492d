"""GMT's selection on a GPU: the thresholds and masks of gmt.py in Triton kernels, for all matrices in a few launches.

gmt.py runs without this file. It imports it where there is a GPU; is_usable says whether it serves for the gradients,
and then

    thresholds = gmt_triton.kth_largest_keys(units, ks, numbers, all_reduce)
    gmt_triton.mask_(units, thresholds)  # in place: G becomes M * G

do what counting and multiplying chunk by chunk do: units are the matrices that share a threshold (with `scope: model`
all of them), ks how many entries of each unit are kept, of numbers. Nothing waits for the device. Both can be used
alone: the thresholds are in the order of gmt.magnitude_keys.

How: a bracket around the k-th largest magnitude is taken from a random sample of each unit. A counting pass finds how
many magnitudes lie above the bracket, and a histogram of 2**11 bins of those inside it; the bin that holds the k-th
largest is the next bracket, until it is one magnitude wide. A sample can mislead, but then the counts show that the
bracket missed, and the next one is all that lies on that side of it. So the result is exact, whatever was drawn. The
number of passes is fixed, so that the host need not know; those of a unit that is done read nothing.

Gradients are most of the traffic. Bytes per entry, where the sample's bracket holds the k-th largest and is at most
2**11 magnitudes wide for 16-bit floats (16 powers of two), 2**22 for fp32 (half of one):

                          reads    writes    bytes per entry
    bf16, fp16                2         1                  6
    fp32                      3         1                 16
    at most, 16 bits          4         1                 10
    at most, fp32             5         1                 24

Only what lies inside the bracket, some hundredths of the entries, adds to a histogram in memory; zeros never do.
(tl.histogram is not used: for 2**11 bins it takes 64 population counts an entry.) Many equal gradients would all add
to one address, so there are _COPIES of each histogram.
"""

import functools
import warnings
from collections.abc import Callable, Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

_KEY_BITS = {torch.bfloat16: 15, torch.float16: 15, torch.float32: 31}
_DIGIT_BITS = 11  # of a pass: a histogram has 2**11 bins
_COPIES = 32  # of each histogram: an entry of a copy counts fewer than 2**31
_SAMPLE = 8192  # entries drawn of each unit
_DEVIATIONS = 4.0  # standard deviations of the sample's rank on both sides of the bracket
_BLOCK = 4096  # entries that a program reads at once
_MOST_PROGRAMS = 1024  # per matrix: enough to fill a GPU with one
_MOST_UNITS = 1024  # at once: their histograms take 256 MiB
_INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernels run on a CPU, slowly

Units = list[list[Tensor]]


def is_usable(gradients: Iterable[Tensor]) -> bool:
    """Whether the kernels serve for these tensors: bf16, fp16 or fp32, all on one GPU where a kernel can be run."""
    gradients = list(gradients)
    devices = {g.device for g in gradients}
    if len(devices) != 1 or not all(g.dtype in _KEY_BITS for g in gradients):
        return False
    device = devices.pop()
    serves = device.type == "cuda" or (_INTERPRETED and device.type == "cpu")
    return serves and all(_runs_on(device, dtype) for dtype in sorted({g.dtype for g in gradients}, key=str))


@functools.cache
def _runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Try the kernels: Triton also needs a C compiler, and a GPU that it knows. Warns where they do not run."""
    try:
        units = [[torch.ones(1, dtype=dtype, device=device)] for _ in range(2)]  # of one, other kernels are compiled
        mask_(units, kth_largest_keys(units, [1, 1], [1, 1]))
        return True
    except Exception as e:  # whatever it is, torch's own operations do the same
        warnings.warn(f"Triton does not run on {device} for {dtype}, masks are made without it: {e}", stacklevel=2)
        return False


def kth_largest_keys(
    units: Units, ks: list[int], numbers: list[int], all_reduce: Callable[[Tensor], object] | None = None
) -> Tensor:
    """For each unit the k-th largest magnitude of its gradients, as a key (see gmt.magnitude_keys), but at least 1.

    Args:
        units: this process's parts of the gradients that share a threshold; tensors of one dtype in each unit. A part
            may be empty, but no unit is without tensors.
        ks: 1 <= k <= numbers.
        numbers: entries of each unit, over all processes.
        all_reduce: sums an int64 tensor over the processes that hold the other parts, in place; None: there are none.
            It is called as often on every process: for the brackets and in each pass.
    Returns:
        (len(units),) int64, on the gradients' device. 1, the least magnitude, where k entries are not nonzero.
    """
    keys = torch.empty(len(units), dtype=torch.int64, device=units[0][0].device)
    for dtype in _KEY_BITS:
        of_dtype = [i for i, unit in enumerate(units) if unit[0].dtype == dtype]
        for first in range(0, len(of_dtype), _MOST_UNITS):
            some = of_dtype[first : first + _MOST_UNITS]
            found = _select([units[i] for i in some], [ks[i] for i in some], [numbers[i] for i in some], all_reduce)
            keys[_on(keys.device, some)] = found
    return keys


def mask_(units: Units, thresholds: Tensor) -> None:
    """Set to 0 in place the entries whose magnitude's key is below their unit's threshold, of kth_largest_keys."""
    for dtype, bits in _KEY_BITS.items():
        some = [i for i, unit in enumerate(units) if unit[0].dtype == dtype]
        if not some:
            continue
        table = _Table([units[i] for i in some])
        with torch.cuda.device_of(thresholds):
            _mask_kernel[table.grid](
                table.columns, len(table.tensors), thresholds[_on(thresholds.device, some)], **table.constants(bits)
            )
        for original, copy in table.copied:
            original.copy_(copy)


class _Table:
    """Where the matrices of some units lie, for a kernel that reads all of them; they have one dtype."""

    def __init__(self, units: Units):
        given = [tensor for unit in units for tensor in unit]
        self.tensors = [tensor.contiguous() for tensor in given]  # kept, so that the addresses stay good
        self.copied = [(g, t) for g, t in zip(given, self.tensors, strict=True) if g is not t]
        self.numels = [t.numel() for t in self.tensors]
        unit_of = [i for i, unit in enumerate(units) for _ in unit]
        # (3, matrices) int64: address, entries, unit
        self.columns = _on(given[0].device, [[t.data_ptr() for t in self.tensors], self.numels, unit_of])
        programs = min(_MOST_PROGRAMS, max(1, triton.cdiv(max(self.numels), _BLOCK)))
        self.grid = (len(self.tensors), programs)

    def constants(self, key_bits: int) -> dict:
        """What the kernels that go through the matrices are compiled for."""
        aligned = all(t.data_ptr() % 16 == 0 for t in self.tensors)
        bits = tl.int16 if key_bits == 15 else tl.int32
        return {"BITS": bits, "LARGEST": (1 << key_bits) - 1, "ALIGNED": aligned, "BLOCK": _BLOCK}


def _on(device: torch.device, numbers: list) -> Tensor:
    """Integers on a device, copied there without waiting for it."""
    tensor = torch.tensor(numbers, dtype=torch.int64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _select(units: Units, ks: list[int], numbers: list[int], all_reduce) -> Tensor:
    """kth_largest_keys of units that have one dtype."""
    table, key_bits = _Table(units), _KEY_BITS[units[0][0].dtype]
    largest, device = (1 << key_bits) - 1, table.columns.device
    k = _on(device, ks)
    low, high = _sampled_brackets(table, units, ks, numbers, all_reduce)
    # A pass of a wrong bracket, then as many as digits make a key.
    for _ in range(1 + -(-key_bits // _DIGIT_BITS)):
        # inside a bracket of up to 2**11 keys each has its bin; of a wider one, 2**shift share it
        shift = (torch.frexp((high - low).double()).exponent.long() - _DIGIT_BITS).clamp(min=0)
        bins = torch.zeros(len(units), _COPIES, 1 << _DIGIT_BITS, dtype=torch.int32, device=device)
        above = torch.zeros(len(units), 1, dtype=torch.int64, device=device)
        with torch.cuda.device_of(low):
            _count_kernel[table.grid](
                table.columns, len(table.tensors), torch.stack([low, high, shift]).int(), len(units), above, bins,
                BINS=1 << _DIGIT_BITS, COPIES=_COPIES, **table.constants(key_bits),
            )  # fmt: skip
        counts = torch.cat([bins.sum(1), above], 1)
        if all_reduce:
            all_reduce(counts)
        above = counts[:, -1]
        at_or_above = counts.flip(1).cumsum(1).flip(1)[:, :-1]  # of each bin's first key
        bin_of_k = (at_or_above >= k.unsqueeze(1)).sum(1) - 1  # -1: the k-th largest is below the bracket
        first = low + (bin_of_k << shift)
        last = torch.minimum(first + (1 << shift) - 1, high)
        done, too_low, too_high = low > high, above >= k, bin_of_k < 0
        is_found = ~too_low & ~too_high & (shift == 0)
        new_low = torch.where(too_low, high + 1, torch.where(too_high, 1, first))
        new_high = torch.where(too_low, largest, torch.where(too_high, low - 1, torch.where(is_found, first - 1, last)))
        # a unit that is done keeps the bracket [key, key - 1], which no entry is in
        low, high = torch.where(done, low, new_low), torch.where(done, high, new_high)
    return low


def _sampled_brackets(
    table: _Table, units: Units, ks: list[int], numbers: list[int], all_reduce
) -> tuple[Tensor, Tensor]:
    """Keys (units,) int64 between which, both included, the k-th largest probably is: from some of the entries."""
    device, dtype = table.columns.device, table.tensors[0].dtype
    here = [sum(t.numel() for t in unit) for unit in units]
    # entries drawn at random from all of a unit's, one after the other; a fixed stride could meet the same columns
    generator = torch.Generator(device).manual_seed(0)
    share = torch.rand(len(units), _SAMPLE, dtype=torch.float64, device=device, generator=generator)
    ends = table.columns[1].cumsum(0)
    of_unit = _on(device, here).unsqueeze(1)
    before = of_unit.cumsum(0) - of_unit
    place = (before + torch.minimum((share * of_unit).long(), of_unit - 1)).clamp(min=0)
    matrix = torch.searchsorted(ends, place, right=True).clamp(max=len(table.tensors) - 1)
    place = place - (ends - table.columns[1])[matrix]
    keys = torch.zeros(len(units), _SAMPLE, dtype=torch.int32, device=device)
    with torch.cuda.device_of(keys):
        _gather_kernel[(triton.cdiv(keys.numel(), 1024),)](
            table.columns, len(table.tensors), matrix, place, keys, keys.numel(),
            BITS=tl.int16 if dtype != torch.float32 else tl.int32, LARGEST=(1 << _KEY_BITS[dtype]) - 1, BLOCK=1024,
        )  # fmt: skip
    falling = keys.sort(1, descending=True).values
    ranks = []
    for k, n in zip(ks, numbers, strict=True):
        around, spread = k / n * _SAMPLE, _DEVIATIONS * (_SAMPLE * k / n * (1 - k / n)) ** 0.5
        ranks.append([int(around - spread) - 1, int(around + spread) + 1])
    ranks = _on(device, ranks)
    bounds = falling.gather(1, ranks.clamp(0, _SAMPLE - 1)).long()
    high = torch.where(ranks[:, 0] < 0, (1 << _KEY_BITS[dtype]) - 1, bounds[:, 0]).clamp(min=1)
    low = torch.where(ranks[:, 1] >= _SAMPLE, 1, bounds[:, 1]).clamp(min=1)
    if all_reduce:  # the mean over the processes that hold entries: all of them count in the same brackets
        counted = torch.stack([low, high, torch.ones_like(low)]) * (of_unit.squeeze(1) > 0)
        all_reduce(counted)
        low, high = counted[:2] // counted[2].clamp(min=1)
    return low, torch.maximum(low, high)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. Program (i, j) takes every num_programs(1)-th block of matrix i, from block j on.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _gather_kernel(
    columns, matrices, matrix, place, keys, n, BITS: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr
):
    """keys[i] (int32) = the magnitude of entry place[i] of matrix matrix[i]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    which = tl.load(matrix + at, mask=at < n, other=0)
    is_there = (at < n) & (tl.load(columns + matrices + which) > 0)
    address = tl.load(columns + which).to(tl.pointer_type(BITS))
    bits = tl.load(address + tl.load(place + at, mask=is_there, other=0), mask=is_there, other=0)
    tl.store(keys + at, bits.to(tl.int32) & LARGEST, mask=at < n)


@triton.jit
def _entries(columns, matrix, BITS: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a matrix's entries lie."""
    entries = tl.load(columns + matrix).to(tl.pointer_type(BITS))
    if ALIGNED:  # so that loads and stores are of 16 bytes
        entries = tl.multiple_of(entries, 16)
    return entries


@triton.jit
def _kept(bits, threshold, LARGEST: tl.constexpr):
    """The entries, as bits, with 0 for those whose magnitude is below the threshold."""
    return tl.where((bits.to(tl.int32) & LARGEST) >= threshold, bits, 0)


@triton.jit
def _tally(bits, low, high, shift, histogram, LARGEST: tl.constexpr):
    """Count the magnitudes inside the bracket in the histogram; int32 1 for each that is above it."""
    key = bits.to(tl.int32) & LARGEST
    is_inside = (key >= low) & (key <= high)
    bin = tl.where(is_inside, (key - low) >> shift, 0)
    tl.atomic_add(histogram + bin, 1, mask=is_inside, sem="relaxed")
    return (key > high).to(tl.int32)


@triton.jit
def _count_kernel(
    columns,
    matrices,
    brackets,
    units,
    above,
    bins,
    BINS: tl.constexpr,
    COPIES: tl.constexpr,
    BITS: tl.constexpr,
    LARGEST: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per unit: how many magnitudes are above its bracket (int64), and a histogram (int32) of those inside it."""
    matrix, program, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    n = tl.load(columns + matrices + matrix)
    unit = tl.load(columns + 2 * matrices + matrix)
    low = tl.load(brackets + unit)  # at least 1: zeros are never inside
    high = tl.load(brackets + units + unit)
    shift = tl.load(brackets + 2 * units + unit)
    if (low <= high) & (program * BLOCK < n):
        entries = _entries(columns, matrix, BITS, ALIGNED)
        histogram = bins + (unit * COPIES + (matrix + program) % COPIES) * BINS
        lane = tl.arange(0, BLOCK)
        larger = tl.zeros([BLOCK], tl.int32)
        blocks = n // BLOCK
        for block in range(program, blocks, programs):
            larger += _tally(tl.load(entries + block * BLOCK + lane), low, high, shift, histogram, LARGEST)
        if blocks % programs == program:  # the last, incomplete block
            rest = blocks * BLOCK + lane
            bits = tl.load(entries + rest, mask=rest < n, other=0)
            larger += _tally(bits, low, high, shift, histogram, LARGEST)
        tl.atomic_add(above + unit, tl.sum(larger).to(tl.int64), sem="relaxed")


@triton.jit
def _mask_kernel(
    columns,
    matrices,
    thresholds,
    BITS: tl.constexpr,
    LARGEST: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Set the entries whose magnitude is below their unit's threshold to 0."""
    matrix, program, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    n = tl.load(columns + matrices + matrix)
    threshold = tl.load(thresholds + tl.load(columns + 2 * matrices + matrix)).to(tl.int32)
    entries = _entries(columns, matrix, BITS, ALIGNED)
    lane = tl.arange(0, BLOCK)
    blocks = n // BLOCK
    for block in range(program, blocks, programs):
        bits = tl.load(entries + block * BLOCK + lane)
        tl.store(entries + block * BLOCK + lane, _kept(bits, threshold, LARGEST))
    if blocks % programs == program:
        rest = blocks * BLOCK + lane
        bits = tl.load(entries + rest, mask=rest < n, other=0)
        tl.store(entries + rest, _kept(bits, threshold, LARGEST), mask=rest < n)
