"""The learning rate of each step: pytest tests/test_schedule.py"""

import math

import pytest
import torch
from conftest import read_metrics
from safetensors.torch import load_file
from transformers import get_scheduler, get_wsd_schedule

import train
from common.config import TrainConfig
from training.schedule import lr_factor

STEPS, RATE = 40, 1e-3


def rates(schedule, tokens_per_step=0.0, peak=RATE, **keys):
    """Of each step of a run."""
    names = {"model": "m", "dataset": ["d"], "output_dir": "o", "rule": "none"}
    config = TrainConfig(**names, learning_rate=peak, lr_schedule=schedule, **keys)
    return [peak * lr_factor(config, step, STEPS, tokens_per_step) for step in range(STEPS)]


def rates_of_transformers(make, *args, **kwargs):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    scheduler, found = make(optimizer, *args, **kwargs), []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [{"warmup_ratio": 0.06}, {"warmup_steps": 3}, {}], ids=str)
def test_schedules_are_those_of_transformers(schedule, warmup):
    name = "constant_with_warmup" if schedule == "constant" else schedule
    steps = 3 if warmup else 0  # 0.06 * 40 steps, rounded up
    expected = rates_of_transformers(lambda optimizer: get_scheduler(name, optimizer, steps, STEPS))
    assert rates(schedule, **warmup) == pytest.approx(expected, rel=1e-12)
    last = {"cosine": 0.5 * (1 + math.cos(math.pi * 36 / 37)), "linear": 1 / 37, "constant": 1}[schedule]
    assert not warmup or expected[-1] == pytest.approx(RATE * last)


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("decay", [0.0, 0.1, 0.24, 0.9])
def test_wsd_is_that_of_transformers(shape, decay):
    steps = math.ceil(decay * STEPS)
    expected = rates_of_transformers(get_wsd_schedule, 4, steps, STEPS, decay_type=shape)
    assert rates("wsd", warmup_steps=4, decay_ratio=decay, decay_shape=shape) == pytest.approx(expected, rel=1e-12)


def test_wsd_by_its_equation():
    """MiniCPM, eq. 1, with a decay that ends at 0 after exactly one time constant."""
    found = rates("wsd", warmup_ratio=0.2, decay_ratio=0.3)
    for s, rate in enumerate(found):
        if s < 8:
            expected = s / 8 * RATE
        elif s < 28:
            expected = RATE
        else:
            ended = math.exp(-1)
            expected = RATE * (math.exp(-(s - 28) / 12) - ended) / (1 - ended)
        assert rate == pytest.approx(expected, rel=1e-12), s
    assert found[28] == RATE > found[29] > found[39] > 0
    # a warm-up given in steps may reach into the decay, which then has what is left
    assert rates("wsd", warmup_steps=35, decay_ratio=0.5, decay_shape="linear")[35:] == pytest.approx(
        [RATE * (1 - i / 5) for i in range(5)]
    )


def by_paper(eta_max, beta, a, b, n, n_warmup, n_decay, total):
    """The Power Scheduler's equations 7 and 8, with a linear decay; all of them in tokens."""

    def eta_power(n):
        return min(eta_max, beta * a * n**b) if n else eta_max

    if n < n_warmup:
        return n / n_warmup * eta_power(n_warmup)
    if n <= total - n_decay:
        return eta_power(n)
    return (total - n) / n_decay * eta_power(total - n_decay)


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("peak", [1e-3, 4e-4])  # is no bound after step 4; after step 15
def test_power_is_that_of_its_paper(warmup, peak):
    words = {"decay_ratio": 0.2, "decay_shape": "linear", "power_a": 0.002, "power_b": -0.6, "global_batch_size": 64}
    found = rates("power", 1000.0, peak, warmup_steps=warmup, **words)
    tokens = [1000.0 * step for step in range(STEPS)]
    expected = [by_paper(peak, 64, 0.002, -0.6, n, 1000.0 * warmup, 8000.0, 40000.0) for n in tokens]
    assert found == pytest.approx(expected, rel=1e-12)
    assert (found[14] == peak) == (peak == 4e-4) and peak > found[16] > found[31] > found[32] > found[39] > 0


class Crash(Exception):
    """Raised where a run is to be cut."""


def test_a_run_has_these_rates_also_where_it_is_resumed_in_the_decay(tmp_path, train_args, monkeypatch):
    words = [
        "--lr_schedule", "power", "--power_a", "0.003", "--power_b", "-0.5", "--warmup_steps", "2",
        "--decay_ratio", "0.5", "--decay_shape", "linear", "--save_every", "7", "--global_batch_size", "14",
    ]  # fmt: skip
    train.main(train_args(tmp_path / "whole", *words))
    lines = read_metrics(tmp_path / "whole")
    assert len(lines) == 10 and lines[4]["tokens"] * 2 == lines[9]["tokens"]  # after each of two epochs
    n = lines[4]["tokens"] / 5
    expected = [by_paper(1e-3, 14, 0.003, -0.5, n * step, n * 2, n * 5, n * 10) for step in range(10)]
    assert [line["lr"] for line in lines] == pytest.approx(expected, rel=1e-12) and expected[2] < 1e-3

    write = train.run_folder.Log.write

    def write_and_crash(self, line):
        write(self, line)
        if line["step"] == 8:
            raise Crash

    with monkeypatch.context() as m, pytest.raises(Crash):
        m.setattr(train.run_folder.Log, "write", write_and_crash)
        train.main(train_args(tmp_path / "cut", *words))
    train.main(train_args(tmp_path / "cut", *words, "--resume"))
    assert read_metrics(tmp_path / "cut") == lines
    cut, whole = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(cut[name], t) for name, t in whole.items())
