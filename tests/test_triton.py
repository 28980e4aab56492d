"""The Triton kernels: equal to gmt.py in Triton's interpreter; compiled for a GPU that is not there; on one that is."""

import sys

import pytest
import torch
from conftest import ROOT, python

import gmt

pytest.importorskip("triton")

COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import gmt_triton

def compiled(kernel, pointers, **constants):
    types = {n: pointers.get(n, "constexpr" if n in constants else "i32") for n in kernel.arg_names}
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=places)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

for bits, key_bits in ((tl.int16, 15), (tl.int32, 31)):
    shared = {"BITS": bits, "LARGEST": (1 << key_bits) - 1, "BLOCK": gmt_triton._BLOCK, "ALIGNED": True}
    pointers = {"columns": "*i64", "brackets": "*i32", "above": "*i64", "bins": "*i32", "thresholds": "*i64"}
    count = compiled(gmt_triton._count_kernel, pointers, BINS=2048, COPIES=32, **shared)
    mask = compiled(gmt_triton._mask_kernel, pointers, **shared)
    shared.pop("ALIGNED")
    compiled(gmt_triton._gather_kernel, {**pointers, "matrix": "*i64", "place": "*i64", "keys": "*i32"}, **shared)
    print(count.count("ld.global.v4"), mask.count("ld.global.v4"), mask.count("st.global.v4"))
"""


@pytest.mark.slow  # Triton's interpreter takes a minute
def test_equal_to_the_plain_path_in_the_interpreter():
    """A process of its own: the interpreter is chosen when triton is imported, for all kernels of the process."""
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_interpreted.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_it_compiles_for_hopper_with_accesses_of_16_bytes(tmp_path):
    done = python("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=str(ROOT), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr[-3000:]
    per_thread = 4096 // 128 * 2 // 16  # of a block of 16-bit entries, 128 threads
    assert done.stdout.splitlines() == [f"{n} {n} {n}" for n in (per_thread, 2 * per_thread)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_does_not_serve():
    done = python("-c", "import torch, gmt_triton; print(gmt_triton.is_usable([torch.zeros(2)]))", TRITON_INTERPRET="0")
    assert done.stdout.split() == ["False"]


@pytest.mark.parametrize("text", ["import triton\ntriton.what_older_ones_lack", "raise OSError('no libcuda')"])
def test_with_a_triton_that_is_too_old_or_damaged_gmt_does_without(tmp_path, monkeypatch, text):
    (tmp_path / "gmt_triton.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gmt_triton", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    gmt._kernels.cache_clear()
    assert gmt._kernels() is None
    gmt._kernels.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_on_a_gpu_equal_to_a_cpu(dtype):
    import gmt_triton

    g = torch.randn(3000, 4001, generator=torch.Generator().manual_seed(0)).to(dtype)
    k = gmt.keep_count(g.numel(), 0.2)
    masked = torch.where(gmt.topk_mask(g, k), g, 0)
    there = g.cuda()
    gmt_triton.mask_([[there]], gmt_triton.kth_largest_keys([[there]], [k], [g.numel()]))
    assert torch.equal(there.cpu(), masked)
