"""Time and memory of masking one matrix, against topk, kthvalue, sort and a bare read; and how time grows.

python scripts/bench/mask.py --json outputs/bench_mask.json
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2]))
import gmt
from scripts.bench import measure as bench


class LargestTemporary(TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aliases = any(r.alias_info is not None for r in func._schema.returns)  # a view, or in place
        for t in (out if isinstance(out, (tuple, list)) else [out]) if not aliases else []:
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.nbytes)
        return out


def parameter(shape: tuple[int, ...], dtype: torch.dtype) -> torch.nn.Parameter:
    g = torch.Generator(bench.device()).manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=bench.device()))
    p.grad = torch.empty_like(p)
    for rows in p.grad.split(1024):  # without an fp32 copy of it all
        rows.copy_(torch.randn(rows.shape, generator=g, device=rows.device))
    return p


def ways(p: torch.nn.Parameter, g: torch.Tensor, keep_ratio: float) -> dict[str, Callable]:
    """Ways to mask p.grad, which holds a copy of g before each."""
    k, masked = gmt.keep_count(g.numel(), keep_ratio), p.grad
    masker = gmt.Masker([("w", p)], "gmt", keep_ratio)
    random = gmt.Masker([("w", p)], "rmt", keep_ratio)

    def by_threshold(threshold):
        torch.mul(g, g.abs() >= threshold, out=masked)

    return {
        "gmt": lambda: masker.mask_gradients(0, check_finite=False),
        "rmt": lambda: random.mask_gradients(0, check_finite=False),
        "topk": lambda: masked.zero_().view(-1).index_copy_(0, i := g.abs().view(-1).topk(k).indices, g.view(-1)[i]),
        "kthvalue": lambda: by_threshold(g.abs().view(-1).kthvalue(g.numel() - k + 1).values),
        "sort": lambda: by_threshold(g.abs().view(-1).sort().values[-k]),
        "abs().sum()": lambda: g.abs().sum(),
        "read": lambda: torch.linalg.vector_norm(g, ord=1),
    }


def growth_row(n: int, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, Any]:
    """gmt's time and largest temporary tensor on a matrix of about n entries."""
    p = parameter((max(1, n // 1000), 1000), dtype)
    g, masker = p.grad.clone(), gmt.Masker([("w", p)], "gmt", args.keep_ratio)

    def mask():
        masker.mask_gradients(0, check_finite=False)

    ms = 1000 * statistics.median(bench.interleaved({"": mask}, args.repeats, lambda: p.grad.copy_(g))[""])
    p.grad.copy_(g)
    with LargestTemporary() as largest:
        mask()
    row = {"entries": n, "dtype": str(dtype)[6:], "ms": ms, "ns an entry": 1e6 * ms / n}
    return row | {"largest temporary, MiB": largest.bytes / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 11008), help="of the matrix")
    parser.add_argument("--keep_ratio", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--growth", type=int, nargs="*", default=(10**5, 10**6, 10**7, 10**8), help="entries")
    parser.add_argument("--json", default="", help="write the results to this file")
    args = parser.parse_args()
    rows, growth = [], []
    for dtype in (torch.bfloat16, torch.float32):
        p = parameter(args.shape, dtype)
        g = p.grad.clone()
        times = bench.interleaved(ways(p, g, args.keep_ratio), args.repeats, lambda p=p, g=g: p.grad.copy_(g))
        gmt_time = statistics.median(times["gmt"])
        for name, values in times.items():
            ms = 1000 * statistics.median(values)
            rows.append({"way": name, "dtype": str(dtype)[6:], "ms": ms, "times gmt's": ms / 1000 / gmt_time})
        growth += [growth_row(n, dtype, args) for n in args.growth]
    print(f"masking {args.shape[0]} x {args.shape[1]}, keep_ratio {args.keep_ratio}, on {bench.hardware()}")
    bench.show(rows)
    print("\nhow gmt's time grows")
    bench.show(growth)
    bench.write(args.json, {"settings": vars(args), "ways": rows, "growth": growth})


if __name__ == "__main__":
    main()
