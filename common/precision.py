"""Processors that have no instructions for a 16-bit dtype: torch computes with it all the same, many times slower."""

import torch

WORDS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# torch's names of them, on x86 and on ARM; oneDNN, asked alone, says that it supports bf16 wherever there is AVX-512
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "sve_bf16")


def warn_if_slow(dtype: torch.dtype, device: torch.device, instead: str) -> str:
    """A line for people if products of `dtype` are slow on `device`, else an empty text.

    On a CPU with AVX2 alone (many laptops; AMD before Zen 4) bf16 products take about a hundred times as long as fp32
    ones, on one with AVX-512 but without its bf16 (Intel's Skylake to Ice Lake, some virtual machines) five times. GPUs
    before Ampere (T4, V100) compute bf16 in fp32, without their tensor cores.

    Args:
        dtype: what is multiplied: bfloat16, float16 or float32.
        device: a CPU or a GPU; nothing is said of others.
        instead: the option that chooses a faster dtype on it, for the line.
    """
    if dtype not in WORDS or is_fast(dtype, device):
        return ""
    name = "this processor" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return f"warning: {name} has no instructions for {WORDS[dtype]}, which makes it many times slower: use {instead}"


def is_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device multiplies a 16-bit dtype at least as fast as fp32; True where that is not known."""
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        if dtype == torch.float16:
            return torch.ops.mkldnn._is_mkldnn_fp16_supported()
        has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {"bf16": True}
        return torch.ops.mkldnn._is_mkldnn_bf16_supported() and any(has.get(name) for name in BF16_INSTRUCTIONS)
    if device.type == "cuda" and dtype == torch.bfloat16:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True
