"""gmt_triton.py against gmt.py in Triton's interpreter: test_triton.py runs it, with TRITON_INTERPRET=1."""

import functools
import json
import random
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import torchrun

import gmt
import gmt_triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def keys(unit: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([gmt.magnitude_keys(t.reshape(-1)).long() for t in unit])


def check(units: list[list[torch.Tensor]], ks: list[int]) -> None:
    """Thresholds are the k-th largest by sorting, masked gradients those of gmt.py's mask, to the bit."""
    found = gmt_triton.kth_largest_keys(units, ks, [keys(unit).numel() for unit in units])
    expected = [keys(unit).sort(descending=True).values[k - 1].clamp(min=1) for unit, k in zip(units, ks, strict=True)]
    assert found.tolist() == [int(t) for t in expected]
    masked = []
    for unit, k in zip(units, ks, strict=True):
        kept = gmt.topk_mask(torch.cat([t.reshape(-1) for t in unit]), k).split([t.numel() for t in unit])
        masked.append([torch.where(m.view_as(t), t, 0) for m, t in zip(kept, unit, strict=True)])
    gmt_triton.mask_(units, found)
    for unit, wanted in zip(units, masked, strict=True):
        for ours, theirs in zip(unit, wanted, strict=True):
            integer = torch.int16 if ours.element_size() == 2 else torch.int32
            assert torch.equal(ours.contiguous().view(integer), theirs.contiguous().view(integer))


@by_dtype
@pytest.mark.parametrize("n", [1, 2, 100, 4095, 4096, 4097, 3 * 4096 + 1])
def test_sizes_and_numbers_kept(n, dtype):
    for k in {1, max(1, n // 100), max(1, n // 5), n}:
        check([[normal(n, dtype=dtype)]], [k])


def test_many_units_are_done_some_at_a_time(monkeypatch):
    monkeypatch.setattr(gmt_triton, "_MOST_UNITS", 2)
    kinds = [DTYPES[i] for i in (0, 2, 0, 0, 2, 0, 0)]
    check([[normal(50 + i, dtype=dtype, seed=i)] for i, dtype in enumerate(kinds)], [5 + i for i in range(7)])


@by_dtype
@pytest.mark.parametrize("keep_ratio", [0.001, 0.2, 0.9])
def test_ties_zeros_and_wide_ranges(keep_ratio, dtype):
    n, k = 9000, gmt.keep_count(9000, keep_ratio)
    x = normal(n, dtype=dtype)
    few = torch.randint(-3, 4, (n,), generator=torch.Generator().manual_seed(1)).to(dtype)
    sparse = torch.where(normal(n, dtype=torch.float32, seed=2) > 1.3, x, 0)
    for g in (few, torch.ones_like(x), -x.sign(), sparse, -sparse, torch.zeros_like(x), x * x * x * x * 1e-4):
        check([[g]], [k])


@by_dtype
def test_infinity_and_the_smallest_numbers(dtype):
    tiny = torch.tensor([0x0001, 0x0002, 0x0001], dtype=torch.int16 if dtype != torch.float32 else torch.int32)
    g = torch.cat([tiny.view(dtype), torch.tensor([float("inf"), -float("inf"), 0.0, -0.0, 1.0], dtype=dtype)])
    for k in range(1, len(g) + 1):
        check([[g.clone()]], [k])


@by_dtype
def test_many_matrices_of_all_sizes_at_once(dtype):
    rng = random.Random(0)
    units = [[normal(rng.choice([1, 7, 130]), rng.choice([1, 64, 77]), dtype=dtype, seed=i)] for i in range(12)]
    check(units, [gmt.keep_count(unit[0].numel(), 0.2) for unit in units])


@by_dtype
def test_one_threshold_over_several_tensors(dtype):
    """scope: model, with tensors of very different scales, one of them empty here."""
    unit = [normal(60, 70, dtype=dtype) * 100, normal(0, 70, dtype=dtype), normal(9001, dtype=dtype, seed=1)]
    check([unit], [gmt.keep_count(13201, 0.3)])


def test_dtypes_side_by_side():
    units = [[normal(50, 60, dtype=dtype)] for dtype in (*DTYPES, torch.bfloat16)]
    check(units, [600] * 4)


@by_dtype
def test_views(dtype):
    """Not contiguous; and contiguous where no 16-byte boundary is."""
    whole = normal(70, 90, dtype=dtype)
    before = whole.clone()
    check([[whole.t()]], [1000])
    assert not torch.equal(whole, before)  # the original was masked, and no copy of it
    check([[whole[:, 3:40]]], [100])
    check([[normal(5001, dtype=dtype)[1:]]], [700])


@by_dtype
@pytest.mark.parametrize("where", ["too low", "too high", "everything", "the largest alone"])
def test_it_is_exact_whatever_the_sample_says(where, dtype, monkeypatch):
    largest = (1 << gmt_triton._KEY_BITS[dtype]) - 1
    g = normal(6000, dtype=dtype)
    median = int(keys([g]).median())
    bracket = {
        "too low": (1, median // 2),
        "too high": (largest - 5, largest - 5),
        "everything": (1, largest),
        "the largest alone": (largest, largest),
    }[where]
    low, high = (torch.tensor([bound, bound]) for bound in bracket)
    monkeypatch.setattr(gmt_triton, "_sampled_brackets", lambda *_: (low, high))
    check([[g], [torch.zeros_like(g).index_fill_(0, torch.arange(9), 2.0)]], [1200, 300])


@by_dtype
def test_the_usual_case_takes_two_reads_of_16_bits_and_three_of_32(dtype, monkeypatch):
    """The bytes per entry that the module states: how many counting passes have something to count."""
    brackets = []

    class Spy:
        def __getitem__(self, grid):
            def call(columns, matrices, bracket, *args, **kwargs):
                brackets.append(bracket.clone())
                return kernel[grid](columns, matrices, bracket, *args, **kwargs)

            return call

    kernel = gmt_triton._count_kernel
    monkeypatch.setattr(gmt_triton, "_count_kernel", Spy())
    check([[normal(300, 300, dtype=dtype) * 1e-3]], [18000])
    reading = [int(low) <= int(high) for low, high, _ in brackets]
    passes = 2 if dtype == torch.float32 else 1
    assert reading == [True] * passes + [False] * (len(brackets) - passes)
    first = brackets[0][1] - brackets[0][0]
    assert first < (1 << 22 if passes == 2 else 1 << 11)


def masker(dtype: torch.dtype, **settings) -> gmt.Masker:
    shapes = {"a": (40, 50), "b": (7, 600), "stack": (3, 20, 30), "none": (5, 5)}
    parameters = {n: torch.nn.Parameter(normal(*s, dtype=dtype, seed=9)) for n, s in shapes.items()}
    for i, name in enumerate(("a", "b", "stack")):
        parameters[name].grad = normal(*shapes[name], dtype=dtype, seed=i)
    return gmt.Masker(parameters.items(), "gmt", 0.2, **settings)


def gradients(m: gmt.Masker) -> list[torch.Tensor]:
    return [p.grad for p in m.eligible.values() if p.grad is not None]


@by_dtype
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("stats", [False, True])
def test_gmt_uses_it_and_masks_the_same(stats, scope, dtype, monkeypatch):
    calls = []
    for name in ("kth_largest_keys", "mask_"):
        original = getattr(gmt_triton, name)
        monkeypatch.setattr(gmt_triton, name, lambda *a, o=original, n=name: calls.append(n) or o(*a))
    ours, plain = masker(dtype, scope=scope), masker(dtype, scope=scope)
    gmt_triton.is_usable(gradients(ours))  # tries a kernel, once
    calls.clear()
    found = ours.mask_gradients(0, stats=stats)
    assert calls == (["kth_largest_keys"] if stats else ["kth_largest_keys", "mask_"])
    monkeypatch.setattr(gmt, "_kernels", lambda: None)
    assert plain.mask_gradients(0, stats=stats) == found
    assert len(calls) <= 2  # the plain way is another
    for a, b in zip(gradients(ours), gradients(plain), strict=True):
        assert torch.equal(a, b)


@by_dtype
def test_gmt_frozen_masks_the_same(dtype, monkeypatch):
    ours, plain = masker(dtype, masked_weights="frozen"), masker(dtype, masked_weights="frozen")
    for m in (ours, plain):
        if m is plain:
            monkeypatch.setattr(gmt, "_kernels", lambda: None)
        m.step(torch.optim.AdamW(m.eligible.values()), 0)
    for a, b in zip(ours.eligible.values(), plain.eligible.values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("settings", [{"rule": "rmt"}, {"refresh_every": 2}, {"score": "weight"}], ids=str)
def test_gmt_uses_it_for_the_gradients_of_this_step_alone(settings, monkeypatch):
    monkeypatch.setattr(gmt_triton, "_runs_on", lambda *_: True)
    monkeypatch.setattr(gmt_triton, "mask_", lambda *_: pytest.fail("masked at once"))
    masked = []
    for _ in range(2):
        p = torch.nn.Parameter(normal(30, 30, dtype=torch.float32))
        p.grad = p.detach().flip(0)
        gmt.Masker([("w", p)], **{"rule": "gmt", "keep_ratio": 0.2, **settings}).mask_gradients(0)
        masked.append(p.grad)
        monkeypatch.setattr(gmt, "_kernels", lambda: None)
    assert torch.equal(*masked)


def test_a_kernel_that_does_not_run_is_not_used(monkeypatch):
    def broken(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(gmt_triton, "mask_", broken)
    gmt_triton._runs_on.cache_clear()
    m = masker(torch.float32)
    with pytest.warns(UserWarning, match="Triton does not run on cpu for torch.float32, .*: Failed to find C compiler"):
        m.mask_gradients(0)
    gmt_triton._runs_on.cache_clear()
    assert 0.2 <= gradients(m)[0].count_nonzero() / 2000 < 0.21


def test_what_it_serves_for():
    fp32 = torch.zeros(2)
    assert gmt_triton.is_usable([fp32, fp32.bfloat16(), fp32.half()])
    assert not gmt_triton.is_usable([fp32, fp32.double()])
    assert not gmt_triton.is_usable([fp32, fp32.to("meta")])
    assert not gmt_triton.is_usable([])


def test_shards(tmp_path):
    """Two processes, each with some rows, one of them without rows of the second matrix: the whole matrices' keys."""
    done = torchrun(2, "tests/triton_interpreted.py", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("0", "1"):
        found = json.loads((tmp_path / name).read_text())
        assert found == {str(d): [_expected(x) for x in _matrices(d)] for d in DTYPES}


def _matrices(dtype: torch.dtype) -> list[torch.Tensor]:
    return [normal(90, 80, dtype=dtype), normal(1, 300, dtype=dtype, seed=1) * 1e-3]


def _expected(matrix: torch.Tensor) -> int:
    return int(keys([matrix]).sort(descending=True).values[gmt.keep_count(matrix.numel(), 0.2) - 1])


def _shard(folder: str) -> None:
    """What one of the processes does: its rows are those of torch.chunk."""
    dist.init_process_group("gloo")
    found = {}
    for dtype in DTYPES:
        matrices = _matrices(dtype)
        parts = [[m.chunk(2)[dist.get_rank()] if dist.get_rank() < len(m) else m[:0]] for m in matrices]
        numbers = [m.numel() for m in matrices]
        ks = [gmt.keep_count(n, 0.2) for n in numbers]
        all_reduce = functools.partial(dist.all_reduce)
        found[str(dtype)] = gmt_triton.kth_largest_keys(parts, ks, numbers, all_reduce).tolist()
    with open(f"{folder}/{dist.get_rank()}", "w") as f:
        json.dump(found, f)
    dist.destroy_process_group()


if __name__ == "__main__":
    _shard(sys.argv[1])
