"""bf16 on processors without instructions for it: the same up to rounding, at the speed of fp32."""

import contextlib
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from common.precision import is_fast

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
PRODUCTS = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, ATTENTION,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    # in inference mode, where these are not taken apart
    aten.linear.default, aten.matmul.default, aten.scaled_dot_product_attention.default,
}  # fmt: skip


class ByFp32(TorchDispatchMode):
    """Products of bf16 tensors are taken of fp32 copies, which hold the same numbers, and rounded to bf16.

    That is what bf16 instructions do: they sum in fp32. Without them torch's own products take a hundred times as long.
    Attention is more exact than torch's own, which rounds its probabilities to bf16 on the way.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        out = func(*_cast(args, torch.bfloat16, torch.float32), **_cast(kwargs, torch.bfloat16, torch.float32))
        if func == ATTENTION:  # its second output, log-sum-exp, is in fp32 by itself
            return _cast(out[0], torch.float32, torch.bfloat16), out[1]
        return _cast(out, torch.float32, torch.bfloat16)


def _cast(values: Any, old: torch.dtype, new: torch.dtype) -> Any:
    """The values with the tensors of one dtype in another."""
    return tree_map_only(torch.Tensor, lambda x: x.to(new) if x.dtype == old else x, values)


def fast_bf16() -> contextlib.AbstractContextManager:
    """Within it, products of bf16 tensors take no longer than those of fp32 ones."""
    return contextlib.nullcontext() if is_fast(torch.bfloat16, torch.device("cpu")) else ByFp32()
