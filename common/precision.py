"""What is slow, or wrong, without a word: 16-bit dtypes on some processors, no GPU, cuDNN's attention."""

import torch
from accelerate.utils import parse_flag_from_env

WORDS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# torch's names of them, on x86 and on ARM; oneDNN, asked alone, says that it supports bf16 wherever there is AVX-512
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "sve_bf16")


def warn_if_no_gpu(device: torch.device) -> str:
    """A line for people if a torch that is built for GPUs runs on a CPU, and nobody has asked for that; else empty."""
    built_for = torch.version.cuda or torch.version.hip
    if device.type != "cpu" or not built_for or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return ""
    return (
        "warning: torch finds no GPU (driver, container, CUDA_VISIBLE_DEVICES?), and all is computed on the CPU; "
        "ACCELERATE_USE_CPU=true says that this is meant"
    )


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


def avoid_cudnn_attention() -> None:
    """Have scaled_dot_product_attention choose among its other kernels, in this process.

    From torch 2.11 on it prefers cuDNN's on an H100 or H200. With a mask, that one's backward pass can give NaN
    gradients (pytorch issue 196678, trl issue 7181); and it builds a plan for every new shape, which generation meets
    at every token (pytorch pull request 190388).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
