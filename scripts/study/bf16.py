"""bf16 on processors without instructions for it: the same values up to the order of sums, at the speed of fp32."""

import contextlib
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.precision import is_fast

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}  # fmt: skip


class ByFp32(TorchDispatchMode):
    """Products of bf16 tensors are taken of fp32 copies, which hold the same numbers, and rounded to bf16.

    That is what bf16 instructions do: they sum in fp32. Without them torch's own products take a hundred times as long.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.bfloat16(), func(*args, **kwargs))


def fast_bf16() -> contextlib.AbstractContextManager:
    """Within it, products of bf16 tensors take no longer than those of fp32 ones."""
    return contextlib.nullcontext() if is_fast(torch.bfloat16, torch.device("cpu")) else ByFp32()
