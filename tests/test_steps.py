"""One optimizer step's gradients: their norm, their memory, fp16's scaler: pytest tests/test_steps.py"""

import math
import os
import weakref

import pytest
import torch
from conftest import read_metrics
from torch import nn

import train
from common.errors import UserError
from training import backend, steps


def with_gradients(*grads):
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g
    return parameters


def test_the_norm_of_bf16_gradients_has_more_than_three_digits():
    torch.manual_seed(0)
    parameters = with_gradients(*(torch.randn(40, n).bfloat16() for n in (3, 7, 50)))
    exact = math.sqrt(sum(p.grad.double().square().sum().item() for p in parameters))
    assert steps.to_float(steps.gradient_norm(parameters)) == pytest.approx(exact, rel=1e-6)
    norm, factor = steps.clip(parameters, 0.5)
    assert norm == pytest.approx(exact, rel=1e-6) and factor == pytest.approx(0.5 / exact, rel=1e-5)
    assert steps.to_float(steps.gradient_norm(parameters)) == pytest.approx(0.5, rel=1e-3)
    assert parameters[0].grad.dtype == torch.bfloat16


def test_clipping_leaves_small_gradients_and_those_that_are_not_finite():
    parameters = with_gradients(torch.tensor([3.0, 4.0]))
    assert steps.clip(parameters, 5.1) == (5.0, 1.0) and steps.clip(parameters, 0) == (5.0, 1.0)
    assert parameters[0].grad.tolist() == [3.0, 4.0]
    norm, factor = steps.clip(with_gradients(torch.tensor([math.nan, 1.0])), 0.1)
    assert math.isnan(norm) and factor == 1.0


def test_no_gradient_lives_through_the_next_forward_pass(tmp_path, train_args, monkeypatch):
    """One copy of all gradients is as much memory as the weights."""
    old, alive = [], []
    backward, clip = steps.backward, steps.clip

    def look(*args):
        alive.append(sum(ref() is not None for ref in old))
        return backward(*args)

    def remember(parameters, *args):
        old[:] = [weakref.ref(p.grad) for p in parameters]
        return clip(parameters, *args)

    monkeypatch.setattr(train, "backward", look)
    monkeypatch.setattr(steps, "clip", remember)
    train.main(train_args(tmp_path / "run", "--rule", "gmt", "--keep_ratio", "0.3", "--max_steps", "4"))
    assert alive == [0] * 4 and len(old) == 21


def test_deterministic_reaches_flash_attention(tmp_path, train_args, monkeypatch):
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    seen, step_batches = [], steps.step_batches
    look = lambda *args: seen.append(os.environ.get("FLASH_ATTENTION_DETERMINISTIC")) or step_batches(*args)  # noqa: E731
    monkeypatch.setattr(train, "step_batches", look)
    train.main(train_args(tmp_path / "a", "--max_steps", "1"))
    train.main(train_args(tmp_path / "b", "--max_steps", "1", "--deterministic", "true"))
    torch.use_deterministic_algorithms(False)
    assert seen == [None, "1"]
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "0")  # what the run has set goes with the test


# --- fp16's scaler, on a CPU -----------------------------------------------------------------------------------------


@pytest.fixture
def scaled(monkeypatch):
    """A gradient scaler in the loop, as under fp16 on a GPU: gradients beyond fp16's largest number become infinite."""
    scales = []

    def overflow(model, *args):
        sums = steps.backward(model, *args)
        for p in model.parameters():
            p.grad.masked_fill_(p.grad.abs() > torch.finfo(torch.float16).max, math.inf)
        return sums

    def build(config, build=backend.build_accelerator):
        accelerator = build(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=1000)
        unscale = lambda: [accelerator.scaler.unscale_(o.optimizer) for o in accelerator._optimizers]  # noqa: E731
        monkeypatch.setattr(accelerator, "unscale_gradients", unscale)
        scales.append(accelerator.scaler)
        return accelerator

    monkeypatch.setattr(backend, "build_accelerator", build)
    monkeypatch.setattr(train, "backward", overflow)
    return scales


def test_the_scalers_search_for_a_scale_costs_no_step_and_no_example(tmp_path, train_args, scaled, monkeypatch):
    words = ["--max_skipped_steps", "2", "--rule", "gmt", "--keep_ratio", "0.3"]
    seen, step_batches = [], steps.step_batches
    look = lambda *args: seen.append(args[-1]) or step_batches(*args)  # noqa: E731
    monkeypatch.setattr(train, "step_batches", look)
    train.main(train_args(tmp_path / "scaled", *words))
    assert seen[:4] == [0] * 4 and seen[-9:] == list(range(1, 10)) and scaled[-1].get_scale() < 2.0**23
    metrics = read_metrics(tmp_path / "scaled")
    assert [m["step"] for m in metrics] == list(range(1, 11)) and metrics[-1]["skipped_steps"] == 0
    monkeypatch.undo()
    train.main(train_args(tmp_path / "plain", *words))
    for a, b in zip(metrics, read_metrics(tmp_path / "plain"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["tokens"] == b["tokens"]


def test_a_gradient_that_no_scale_makes_finite_is_a_bad_step(tmp_path, train_args, scaled, monkeypatch):
    backward, calls = steps.backward, []

    def spoil(model, *args):
        calls.append(1)
        sums = backward(model, *args)
        next(model.parameters()).grad[0, 0] = math.nan
        return sums

    monkeypatch.setattr(train, "backward", spoil)
    with pytest.raises(UserError, match="2 steps in a row had a non-finite gradient, up to step 2"):
        train.main(train_args(tmp_path / "run", "--max_skipped_steps", "2"))
    assert scaled[-1].get_scale() < 1 and 27 <= len(calls) <= 30
