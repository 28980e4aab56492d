"""Each preset of gmt.RULES through train.py: its plan, splits of a step, resume, DDP and FSDP2.

pytest tests/test_presets.py -m "slow or not slow"

Their equations are in test_gmt.py, their masks on shards in sharding_worker.py, their cost in scripts/bench/step.py.
"""

import pytest
import torch
from conftest import read_metrics, weights
from test_distributed import run
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from worker import exact_norm, load_with_unused_weight

import gmt
import train
from common import run_folder
from scripts.bench import step as bench
from training import plan


def words(rule: str) -> list[str]:
    """A rule, and the keys that it asks for."""
    keep = ["--keep_ratio", "0.3"] if gmt.masks_entries(rule) else []
    return ["--rule", rule, *keep, *(["--calibration_steps", "2"] if rule == "grad_square" else [])]


def settings(rule: str) -> list[str]:
    """Five steps in fp64. Where masks are kept for more than one step they are for two, saved between them."""
    more = ["--master_dtype", "float64", "--weight_decay", "0.1", "--max_steps", "5", "--save_every", "3"]
    more += ["--lr_schedule", "constant", *(["--lift_rank", "4"] if rule == "lift" else [])]
    more += ["--refresh_every", "2"] if gmt.RULES[rule].refresh_every > 1 else []
    return [*words(rule), *more]


def assert_near(folder, expected):
    """The same weights and losses up to rounding, the same numbers of kept entries."""
    ours, theirs = weights(folder), weights(expected)
    assert ours.keys() == theirs.keys()
    assert max((ours[n] - w).abs().max() for n, w in theirs.items()) < 1e-9, folder
    for a, b in zip(read_metrics(folder), read_metrics(expected), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-9)
        assert a["kept_fraction"] == b["kept_fraction"], folder


@pytest.fixture
def exact(monkeypatch):
    """Training in this process as worker.py does it in others."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    monkeypatch.setattr(train, "load_trainable_model", load_with_unused_weight)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, train_args):
    """A folder with a run of every preset: one process, never cut, with the usual micro-batches."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", exact_norm)
        patch.setattr(train, "load_trainable_model", load_with_unused_weight)
        for rule in gmt.RULES:
            train.main(train_args(folder / rule, *settings(rule)))
    return folder


def test_the_dry_run_of_every_preset_names_its_axes(tmp_path, train_args, capsys, monkeypatch):
    monkeypatch.setattr(plan, "activation_bytes", lambda *args: 0)  # half a second; the same for all rules
    for rule, (score, refresh_every, masked_weights, _) in gmt.RULES.items():
        train.main(train_args(tmp_path / rule, *words(rule), "--dry_run"))
        text = capsys.readouterr().out
        when = {0: "once", 1: "at each step"}.get(refresh_every, f"every {refresh_every} steps")
        axes = f" (score {score}, chosen {when}, masked_weights {masked_weights}), keep_ratio 0.3, scope tensor"
        assert f"\nrule {rule}{axes if score else ''}: 16 tensors, " in text
        assert "GiB  together" in text


def test_the_benchmark_of_a_step_has_every_preset():
    assert {rule for rule, _, _ in bench.WAYS.values()} == gmt.RULES.keys()


def test_a_weight_that_no_step_uses_decays(tmp_path, train_args, exact):
    """Its gradient is 0, not missing: on one process as in DDP's buckets, see below."""
    train.main(train_args(tmp_path / "run", *settings("gmt"), "--max_steps", "2"))
    assert weights(tmp_path / "run")["unused"].flatten().tolist() == pytest.approx([(1 - 1e-3 * 0.1) ** 2] * 20)


@pytest.mark.slow
def test_every_preset_resumes_bitwise_in_the_middle_of_an_interval(whole, tmp_path, train_args, exact, monkeypatch):
    write = run_folder.Log.write

    def crash(self, line):
        write(self, line)
        if line["step"] == 4:
            raise KeyboardInterrupt

    for rule in gmt.RULES:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(run_folder.Log, "write", crash)
            train.main(train_args(tmp_path / rule, *settings(rule)))
        train.main(train_args(tmp_path / rule, *settings(rule), "--resume"))
        assert read_metrics(tmp_path / rule) == read_metrics(whole / rule)
        ours, theirs = weights(tmp_path / rule), weights(whole / rule)
        assert all(torch.equal(ours[n], w) for n, w in theirs.items()), rule


@pytest.mark.slow
@pytest.mark.parametrize("worker", ["worker", "fsdp_worker"])
def test_every_preset_trains_alike_on_2_processes(whole, tmp_path, train_args, worker):
    """Under DDP and FSDP2, in micro-batches of another size, one preset after the other in the same processes."""
    more = ["--per_device_batch_size", "3"]
    _, *runs = [word for rule in gmt.RULES for word in ("+", *train_args(tmp_path / rule, *settings(rule), *more))]
    done = run(2, runs, worker, UNUSED="1")
    assert done.returncode == 0, done.stderr[-3000:]
    for rule in gmt.RULES:
        assert_near(tmp_path / rule, whole / rule)
