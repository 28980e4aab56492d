"""Who is told that a 16-bit dtype is slow on the device, and what helps: pytest tests/test_precision.py"""

import json
import types

import pytest
import torch
from conftest import write_rows

import eval as evaluation
import train
from common import precision
from common.config import TrainConfig
from training import checks

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def without_16_bits(monkeypatch):
    """A processor with AVX2 alone, and a T4."""
    slow = types.SimpleNamespace(
        _is_mkldnn_bf16_supported=lambda: False,
        _is_mkldnn_fp16_supported=lambda: False,
    )
    monkeypatch.setattr(torch.ops, "mkldnn", slow)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")


@pytest.fixture
def capabilities(monkeypatch):
    """What a processor with AVX-512 has: a dictionary to fill; oneDNN supports bf16 on it, and here fp16."""
    takes_all = types.SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True, _is_mkldnn_fp16_supported=lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", takes_all)
    found = {"avx2": True, "avx512_f": True, "avx512_bw": True, "avx512_bf16": False, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    return found


def test_the_line_names_device_dtype_and_what_to_use(without_16_bits):
    line = precision.warn_if_slow(torch.bfloat16, CPU, "--x fp32")
    assert line.startswith("warning: this processor has no instructions for bf16") and line.endswith("use --x fp32")
    assert "fp16" in precision.warn_if_slow(torch.float16, CPU, "--x fp32")
    assert "Tesla T4 has no instructions for bf16" in precision.warn_if_slow(torch.bfloat16, GPU, "--x fp16")
    assert not precision.warn_if_slow(torch.float16, GPU, "") and not precision.warn_if_slow(torch.float32, CPU, "")
    assert not precision.warn_if_slow(torch.bfloat16, torch.device("mps"), "")  # not known


def test_a_run_without_the_gpu_that_torch_is_built_for_is_named(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert precision.warn_if_no_gpu(CPU).startswith("warning: torch finds no GPU") and not precision.warn_if_no_gpu(GPU)
    config = TrainConfig(model="m", dataset=["d"], output_dir="o", rule="none", mixed_precision="fp32")
    assert checks.warnings(config, CPU) == [precision.warn_if_no_gpu(CPU)]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert not precision.warn_if_no_gpu(CPU)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not precision.warn_if_no_gpu(CPU)


def test_avx512_without_its_bf16_is_slow_too(capabilities):
    assert "bf16" in precision.warn_if_slow(torch.bfloat16, CPU, "")
    assert not any(precision.warn_if_slow(dtype, CPU, "") for dtype in (torch.float16, torch.float32))


@pytest.mark.parametrize("name", precision.BF16_INSTRUCTIONS)
def test_nothing_is_said_of_a_fast_processor(name, capabilities):
    capabilities[name] = True
    assert not any(precision.warn_if_slow(dtype, CPU, "") for dtype in (torch.bfloat16, torch.float16, torch.float32))


def test_nothing_is_said_where_torch_cannot_tell(capabilities, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not precision.warn_if_slow(torch.bfloat16, CPU, "")


@pytest.mark.parametrize("words, expected", [
    (["--mixed_precision", "bf16"], "use --mixed_precision fp32\n"),
    (["--mixed_precision", "bf16", "--master_dtype", "bfloat16"], "fp32 and --master_dtype float32\n"),
    (["--mixed_precision", "fp32", "--master_dtype", "bfloat16"], "fp32 and --master_dtype float32\n"),
    (["--mixed_precision", "fp32"], ""),
])  # fmt: skip
def test_training_says_it_once(words, expected, without_16_bits, tmp_path, train_args, capsys):
    train.main([*train_args(tmp_path / "run"), *words, "--max_steps", "1", "--epochs", "1"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "no instructions" in line]
    assert len(lines) == bool(expected) and "".join(f"{line}\n" for line in lines).endswith(expected)


@pytest.mark.parametrize("dtype, lines", [("bfloat16", 1), ("float32", 0)])
def test_scoring_says_it_once(dtype, lines, without_16_bits, tmp_path, model_dir, capsys):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "some words"}) + "\n")
    words = ["--model", str(model_dir), "--tasks", f"text_loss={tmp_path / 'texts.jsonl'}", "--dtype", dtype]
    evaluation.main([*words, "--output_dir", str(tmp_path / "eval")])
    assert (
        capsys.readouterr().out.count("no instructions for bf16, which makes it many times slower: use --dtype")
        == lines
    )


def test_attention_is_not_cudnns_in_training_and_scoring(train_args, model_dir, tmp_path):
    """Its backward pass may give NaN on an H100, and generation would build a plan for each new length."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    train.main(train_args(tmp_path / "run", "--max_steps", "1"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    rows = write_rows(tmp_path / "items.jsonl", [{"question": "q", "answer": "#### 1"}])
    words = [f"--model={model_dir}", f"--tasks=gsm8k={rows}", f"--output_dir={tmp_path / 'eval'}"]
    evaluation.main(words)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
