"""The loop, on one process: pytest tests/test_train.py"""

import dataclasses
import itertools
import json
import math
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model, read_metrics, same, weights, write_rows
from safetensors.torch import load_file
from test_losses import slow_loss
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from worker import exact_norm

import gmt
import train
from common import run_folder, sources, templates
from common.config import TrainConfig, parse
from common.errors import Interrupted, UserError
from training import checkpoint, data, steps
from training.loading import load_data
from training.masking import build_masker, freeze

RULES = {
    "none": ["--rule", "none"],
    "gmt": ["--rule", "gmt", "--keep_ratio", "0.3"],
    "rmt": ["--rule", "rmt", "--keep_ratio", "0.3"],
    "hft": ["--rule", "hft"],
    "gmt frozen": ["--rule", "gmt", "--keep_ratio", "0.3", "--masked_weights", "frozen"],
    "grad_square": ["--rule", "grad_square", "--keep_ratio", "0.3", "--calibration_steps", "2"],
    "shira": ["--rule", "shira", "--keep_ratio", "0.3"],
    "gasdu every 4": ["--rule", "gasdu", "--keep_ratio", "0.3", "--refresh_every", "4"],
    "mofo": ["--rule", "mofo", "--keep_ratio", "0.3"],
    "lift every 4": ["--rule", "lift", "--keep_ratio", "0.3", "--refresh_every", "4", "--lift_rank", "4"],
    "gmt 8 bit": ["--rule", "gmt", "--keep_ratio", "0.3", "--optimizer", "adamw_8bit"],
    "gmt paged 8 bit": ["--rule", "gmt", "--keep_ratio", "0.3", "--optimizer", "paged_adamw_8bit"],
    "gmt bf16": ["--rule", "gmt", "--keep_ratio", "0.3", "--master_dtype", "bfloat16", "--mixed_precision", "bf16"],
}


# --- what a run is ---------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_the_readme_says(tmp_path, train_args):
    line = train.main(train_args(tmp_path / "run", *RULES["gmt"], "--eval_rows", "6", "--save_every", "2"))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["config"]["keep_ratio"] == 0.3 and run["data"]["examples"] == 64
    assert set(run) >= {"config", "data", "command", "git_commit", "versions", "hardware", "processes"}
    metrics = read_metrics(tmp_path / "run")
    assert [m["step"] for m in metrics] == list(range(1, 9))
    assert metrics[-1]["epoch"] == 2 and math.isfinite(metrics[-1]["eval_loss"]) and metrics[-2]["eval_loss"] is None
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.2  # it learns
    assert all(0.2 < m["kept_fraction"] < 0.301 and 0.9 < m["energy_kept"] < 1 for m in metrics)  # unseen bytes: 0
    assert all(0 < m["grad_norm_kept"] < m["grad_norm"] for m in metrics)
    assert set(line["seconds"]) == {"data", "forward_backward", "mask", "optimizer"}
    assert [p.name for p in checkpoint.complete(tmp_path / "run" / "checkpoints")] == ["step_000006", "step_000008"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert model.dtype == torch.float32 and model.num_parameters() > 30_000


def test_a_generation_config_that_transformers_would_not_save(tmp_path, train_args):
    model = make_model(tmp_path / "model")
    path = model / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.6, "do_sample": False}))
    train.main(train_args(tmp_path / "run", "--model", str(model), "--max_steps", "1"))
    assert json.loads((tmp_path / "run" / "final" / "generation_config.json").read_text())["temperature"] == 0.6


def test_first_step_is_masked_adamw_on_the_token_mean_loss(tmp_path, train_args, model_dir, rows_file):
    """One step of the loop against a slow one: one example at a time, sort, textbook AdamW."""
    args = train_args(tmp_path / "run", *RULES["gmt"], "--max_steps", "1", "--master_dtype", "float64")
    args += ["--weight_decay", "0.1", "--max_grad_norm", "0.5"]
    line = train.main(args)

    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    rows = sources.load_rows(str(rows_file), ("query", "response"))
    examples = data.tokenise(rows, AutoTokenizer.from_pretrained(model_dir), "metamath", 512)
    total, count = 0.0, 0
    for i in data.step_examples(70, 16, 0, 0).tolist():
        ids = torch.tensor([examples.rows[i]["input_ids"]])
        log_p = model(ids).logits[0].log_softmax(-1)
        for t, label in enumerate(examples.rows[i]["labels"]):
            if label != -100:
                total, count = total - log_p[t - 1, label], count + 1
    (total / count).backward()
    assert line["loss"] == pytest.approx((total / count).item(), rel=1e-9)
    norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-9)
    trained = weights(tmp_path / "run")
    for name, p in model.named_parameters():
        g = p.grad * (0.5 / norm)
        if p.dim() == 2:
            g = g * (g.abs() >= g.abs().flatten().sort(descending=True).values[round(0.3 * g.numel()) - 1])
        m, v = 0.1 * g / (1 - 0.9), 0.001 * g.square() / (1 - 0.999)
        decay = 1e-3 * 0.1 if p.dim() == 2 else 0
        expected = p * (1 - decay) - 1e-3 * m / (v.sqrt() + 1e-8)
        assert torch.allclose(trained[name], expected.detach(), rtol=0, atol=1e-8), name


@pytest.mark.parametrize("rule", ["gmt", "rmt"])
def test_keep_ratio_one_is_sft_bit_for_bit(tmp_path, train_args, rule):
    train.main(train_args(tmp_path / "none"))
    train.main(train_args(tmp_path / rule, "--rule", rule, "--keep_ratio", "1.0"))
    assert same(weights(tmp_path / "none"), weights(tmp_path / rule))


def test_keep_ratio_one_is_sft_up_to_unseen_embeddings_when_frozen(tmp_path, train_args, model_dir):
    """Frozen entries do not move at all: rows of bytes that no example has are as in the base, and all else learns."""
    train.main(train_args(tmp_path / "run", *RULES["gmt frozen"], "--weight_decay", "0.1"))
    before, after = load_file(model_dir / "model.safetensors"), weights(tmp_path / "run")
    moved = (after["model.embed_tokens.weight"] != before["model.embed_tokens.weight"]).any(1)
    assert 20 < moved.sum() < 100 and not moved[2]
    assert all((after[n] != before[n]).any() for n in after)


def test_hft_leaves_frozen_weights_alone(tmp_path, train_args, model_dir):
    train.main(train_args(tmp_path / "run", *RULES["hft"]))
    before, after = load_file(model_dir / "model.safetensors"), weights(tmp_path / "run")
    frozen = gmt.freeze_half(AutoModelForCausalLM.from_pretrained(model_dir), 0, "sft")
    assert {n for n in before if torch.equal(before[n], after[n])} == set(frozen)


# --- splits of a step ------------------------------------------------------------------------------------------------

SPLITS = {
    "32x1": ["--per_device_batch_size", "1"],
    "8x4": ["--per_device_batch_size", "4"],
    "1x32": ["--micro_batch_tokens", "100000", "--packing", "off"],
    "by tokens": ["--micro_batch_tokens", "700", "--packing", "off"],
    "packed": ["--micro_batch_tokens", "700", "--packing", "on"],
    "chunked": ["--per_device_batch_size", "8", "--loss_chunk", "50"],
    "checkpointed": ["--micro_batch_tokens", "2000", "--gradient_checkpointing", "true", "--packing", "off"],
}


def test_gradients_of_any_split_agree_in_fp32(tmp_path, train_args, monkeypatch):
    seen = {}
    mask_gradients = gmt.Masker.mask_gradients

    def keep(self, step, **kwargs):
        seen[split] = torch.cat([p.grad.flatten() for p in self.eligible.values()])
        return mask_gradients(self, step, **kwargs)

    monkeypatch.setattr(gmt.Masker, "mask_gradients", keep)
    shapes = []
    collate = steps.collate
    monkeypatch.setattr(steps, "collate", lambda *a: shapes.append([len(row) for row in a[1]]) or collate(*a))
    for split, words in SPLITS.items():
        shapes.clear()
        more = ["--global_batch_size", "32", "--max_steps", "1", "--max_length", "512", *words]
        more += ["--max_grad_norm", "0"]  # clipping would hide a wrong scale
        train.main(train_args(tmp_path / split.replace(" ", "_"), *more))
        expected = {"32x1": [[1]] * 32, "8x4": [[1] * 4] * 8, "1x32": [[1] * 32]}
        assert split not in expected or shapes == expected[split]
        assert (max(n for rows in shapes for n in rows) > 1) == (split == "packed")
    scale = seen["32x1"].norm()
    for split, grads in seen.items():
        assert (grads - seen["32x1"]).norm() / scale < 1e-6, split


@pytest.mark.parametrize("rule", ["none", "gmt"])
def test_whole_runs_of_any_split_agree_in_fp64(tmp_path, train_args, rule, monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    runs = []
    for i, words in enumerate(SPLITS.values()):
        more = ["--global_batch_size", "32", "--master_dtype", "float64", *RULES[rule], *words]
        train.main(train_args(tmp_path / str(i), *more))
        runs.append(weights(tmp_path / str(i)))
    for run in runs[1:]:
        assert max((run[n] - runs[0][n]).abs().max() for n in run) < 1e-9


# --- resume ----------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    pass


def crash_after(monkeypatch, step):
    write = run_folder.Log.write

    def write_and_crash(self, line):
        write(self, line)
        if line["step"] == step:
            raise Crash

    monkeypatch.setattr(run_folder.Log, "write", write_and_crash)


@pytest.mark.parametrize("rule", [r for r in RULES if r == "gmt" or r not in gmt.RULES])  # the others: test_presets.py
def test_resume_is_bitwise(tmp_path, train_args, rows_file, rule, monkeypatch):
    """Cut in the middle of the second epoch, between two checkpoints; the same losses, masks and weights come out."""
    words = [
        *RULES[rule],
        "--save_every",
        "2",
        "--eval_rows",
        "5",
        "--warmup_ratio",
        "0.2",
        "--dataset",
        f"{rows_file}:69",
    ]
    train.main(train_args(tmp_path / "whole", *words))
    with monkeypatch.context() as m, pytest.raises(Crash):
        crash_after(m, 7)
        train.main(train_args(tmp_path / "cut", *words))
    assert [line["step"] for line in read_metrics(tmp_path / "cut")] == list(range(1, 8))
    train.main(train_args(tmp_path / "cut", *words, "--resume"))
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    run = json.loads((tmp_path / "cut" / "run.json").read_text())
    assert [r["step"] for r in run["resumed"]] == [6]


def test_resume_with_dropout_is_bitwise(tmp_path, train_args, monkeypatch):
    model = str(make_model(tmp_path / "model", attention_dropout=0.3))
    words = ["--model", model, "--save_every", "3"]
    train.main(train_args(tmp_path / "whole", *words))
    train.main(train_args(tmp_path / "other_seed", *words, "--seed", "1"))
    with monkeypatch.context() as m, pytest.raises(Crash):
        crash_after(m, 5)
        train.main(train_args(tmp_path / "cut", *words))
    # the generator's state that Accelerate restores plays no part: dropout is a function of (seed, step, process)
    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda *a: (load(*a), torch.manual_seed(99))[0])
    train.main(train_args(tmp_path / "cut", *words, "--resume"))
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "other_seed"))


def test_resume_refuses_another_run_and_lists_the_differences(tmp_path, train_args, rows_file):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(rows_file.read_bytes())
    words = [*train_args(tmp_path / "run"), "--dataset", str(rows), "--save_every", "3"]
    train.main(words)
    for p in (tmp_path / "run" / "final").iterdir():
        p.unlink()
    with pytest.raises(UserError, match=r"learning_rate: 0.001 -> 0.01; seed: 0 -> 3 "):
        train.main([*words, "--resume", "--learning_rate", "1e-2", "--seed", "3"])
    write_rows(rows, [{"query": "q", "response": "r"}] * 70)
    with pytest.raises(UserError, match=r"holds: fingerprint: '\w+' -> '\w+' \(--resume_changed goes on\)"):
        train.main([*words, "--resume"])
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(UserError, match="holds: learning_rate"):
        train.main([*words, "--resume", "--dry_run", "--learning_rate", "1e-2"])
    train.main([*words, "--resume", "--dry_run"])
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    run = json.loads(before)
    run["versions"]["torch"] = "0.0"
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    with pytest.raises(UserError, match=r"torch: '0\.0' -> "):
        train.main([*words, "--resume"])
    (tmp_path / "run" / "run.json").write_bytes(before)
    train.main([*words, "--resume", "--resume_changed"])
    assert read_metrics(tmp_path / "run")[-1]["step"] == 10


def test_resume_changed_means_the_new_settings(tmp_path, train_args, monkeypatch):
    with monkeypatch.context() as m, pytest.raises(Crash):
        crash_after(m, 5)
        train.main(train_args(tmp_path / "run", "--save_every", "4"))
    changed = ["--save_every", "4", "--resume", "--resume_changed", "--weight_decay", "0.5", "--adam_beta1", "0.5"]
    seen, distribute = [], steps.distribute

    def look(config, examples, ids, packed, accelerator):
        seen.append(accelerator._optimizers[0].param_groups[0].copy())
        return distribute(config, examples, ids, packed, accelerator)

    with monkeypatch.context() as m, pytest.raises(Crash):
        m.setattr(steps, "distribute", look)
        crash_after(m, 9)
        train.main(train_args(tmp_path / "run", *changed))
    assert {(g["weight_decay"], g["betas"]) for g in seen} == {(0.5, (0.5, 0.999))} and len(seen) == 5
    with pytest.raises(UserError, match=r"weight_decay: 0.5 -> 0.0; adam_beta1: 0.5 -> 0.9"):
        train.main(train_args(tmp_path / "run", "--save_every", "4", "--resume"))  # it is the changed run now
    with pytest.raises(UserError, match="the checkpoint is of step 8, this run ends after 5"):
        train.main(train_args(tmp_path / "run", *changed, "--epochs", "1"))


def test_resume_of_a_finished_run_does_nothing(tmp_path, train_args):
    train.main(train_args(tmp_path / "run", "--save_every", "3"))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert train.main(train_args(tmp_path / "run", "--save_every", "3", "--resume")) == {}
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="epochs: 2 -> 9"):
        train.main(train_args(tmp_path / "run", "--resume", "--epochs", "9"))


@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, train_args, monkeypatch, damage, capsys):
    with monkeypatch.context() as m, pytest.raises(Crash):
        crash_after(m, 9)
        train.main(train_args(tmp_path / "run", "--save_every", "2"))
    checkpoints = tmp_path / "run" / "checkpoints"
    newest = checkpoints / "step_000008" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    if damage == "changed":
        content[-1] ^= 1  # one bit of one weight
    newest.write_bytes(content[:-1] if damage == "cut" else content)
    if damage == "missing":
        newest.unlink()
    assert checkpoint.latest(Accelerator(cpu=True), checkpoints).name == "step_000006"
    assert "passing over the checkpoint step_000008: model.safetensors is missing, cut or changed" in (
        capsys.readouterr().out
    )
    (checkpoints / "step_000006" / "COMPLETED").unlink()
    with pytest.raises(UserError, match=r"no complete checkpoint .*model.safetensors is .*; step_000006: COMPLETED is"):
        train.main(train_args(tmp_path / "run", "--save_every", "2", "--resume"))


@pytest.mark.parametrize("what", ["checkpoint", "model"])
def test_a_failed_save_leaves_the_previous_checkpoint(tmp_path, train_args, what, monkeypatch):
    """The disk is full in the second half of a save."""
    from accelerate import Accelerator

    save_state = Accelerator.save_state

    def full(self, folder, **kwargs):
        save_state(self, folder, **kwargs)
        if "step_000004" in folder:
            raise OSError(28, "No space left on device")

    if what == "checkpoint":
        monkeypatch.setattr(Accelerator, "save_state", full)
    else:
        monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", lambda *a, **k: 1 / 0)
    with pytest.raises(UserError, match=r"could not be saved: .* The last good checkpoint is .*make room and --resume"):
        train.main(train_args(tmp_path / "run", "--save_every", "2"))
    monkeypatch.undo()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [p.name for p in checkpoints.iterdir()][-1:] and not list(checkpoints.glob(".aside*"))
    assert not (tmp_path / "run" / "final").exists()
    train.main(train_args(tmp_path / "whole"))
    train.main(train_args(tmp_path / "run", "--save_every", "2", "--resume"))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


# --- non-finite steps ------------------------------------------------------------------------------------------------


def bad_steps(monkeypatch, is_bad) -> list[int]:
    """Let the backward passes whose numbers `is_bad` says, from 1, give a gradient that is not finite; counts them."""
    backward, calls = train.backward, []

    def sometimes_nan(model, *args):
        calls.append(1)
        loss = backward(model, *args)
        if is_bad(len(calls)):
            next(model.parameters()).grad[0, 0] = math.nan
        return loss

    monkeypatch.setattr(train, "backward", sometimes_nan)
    return calls


def test_a_non_finite_step_is_skipped_and_counted(tmp_path, train_args, monkeypatch):
    bad_steps(monkeypatch, lambda n: n == 3)
    # the skipped step is in the log although it is not one of the logged ones
    train.main(train_args(tmp_path / "run", *RULES["gmt"], "--micro_batch_tokens", "100000", "--log_every", "2"))
    metrics = read_metrics(tmp_path / "run")
    assert [(m["step"], m["skipped_steps"]) for m in metrics] == [(2, 0), (3, 1), (4, 1), (6, 1), (8, 1), (10, 1)]
    assert sorted(metrics[1]["skipped_examples"]) == sorted(data.step_examples(70, 16, 0, 2).tolist())
    assert all(math.isfinite(w.sum()) for w in weights(tmp_path / "run").values())
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_training_stops_at_bad_steps_with_a_checkpoint_from_before(tmp_path, train_args, monkeypatch):
    words = [*RULES["gmt"], "--micro_batch_tokens", "100000", "--save_every", "1"]  # one call a step
    with monkeypatch.context() as m:
        calls = bad_steps(m, lambda n: n >= 5)
        with pytest.raises(UserError, match=r"3 steps in a row .* up to step 7 .* before is .*step_000004; look at"):
            train.main(train_args(tmp_path / "run", *words, "--max_skipped_steps", "3"))
        assert [len(m.get("skipped_examples", [])) for m in read_metrics(tmp_path / "run")] == [0] * 4 + [6, 16, 16]
        calls[:] = [1] * 5
        with pytest.raises(UserError, match="2 steps in a row .* no step was taken before"):
            train.main(train_args(tmp_path / "none", *words, "--max_skipped_steps", "2"))
        with pytest.raises(UserError, match="none of the 10 steps had a finite gradient"):
            train.main(train_args(tmp_path / "all", *words, "--max_skipped_steps", "0"))
    # the checkpoint holds the state of an undisturbed run after its fourth step
    train.main(train_args(tmp_path / "run", *words, "--max_skipped_steps", "3", "--resume"))
    train.main(train_args(tmp_path / "whole", *words, "--max_skipped_steps", "3"))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    numbers = [
        [{k: m[k] for k in ("step", "tokens", "loss")} for m in read_metrics(tmp_path / n)] for n in ("run", "whole")
    ]
    assert numbers[0] == numbers[1]  # no token is counted twice


def test_bad_steps_apart_are_not_in_a_row(tmp_path, train_args, monkeypatch):
    bad_steps(monkeypatch, lambda n: n % 2 == 0)
    words = ["--micro_batch_tokens", "100000", "--max_skipped_steps", "2", "--max_steps", "7"]
    assert train.main(train_args(tmp_path / "run", *words))["skipped_steps"] == 3


def test_a_signal_among_bad_steps_saves_the_last_good_one(tmp_path, train_args, monkeypatch):
    """Which the resumed run goes on from: the rows of bad steps are trained on after all."""
    words = ["--micro_batch_tokens", "100000", "--save_every", "2", "--max_steps", "5"]
    save, saves = checkpoint.save, []
    with monkeypatch.context() as m, pytest.raises(Interrupted, match="saved step 2 of 5; the same command with --res"):
        bad_steps(m, lambda n: n == 3 and signal.raise_signal(signal.SIGUSR1) is None)
        m.setattr(checkpoint, "save", lambda *a: saves.append(a) or save(*a))
        train.main(train_args(tmp_path / "run", *words))
    assert len(saves) == 1  # what is there is not written again, and never missing meanwhile
    line = train.main(train_args(tmp_path / "run", *words, "--resume"))
    whole = train.main(train_args(tmp_path / "whole", *words))
    assert (line["skipped_steps"], line["tokens"]) == (0, whole["tokens"])
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_signal_before_the_first_good_step_saves_nothing(tmp_path, train_args, monkeypatch):
    words = ["--micro_batch_tokens", "100000", "--max_steps", "2"]
    with monkeypatch.context() as m, pytest.raises(Interrupted, match="nothing is saved, no step was taken; the same"):
        bad_steps(m, lambda n: n == 1 and signal.raise_signal(signal.SIGUSR1) is None)
        train.main(train_args(tmp_path / "run", *words))
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))
    assert train.main(train_args(tmp_path / "run", *words, "--resume"))["skipped_steps"] == 0


def test_a_due_checkpoint_waits_for_a_good_step(tmp_path, train_args, monkeypatch):
    bad_steps(monkeypatch, lambda n: n == 2)
    words = ["--micro_batch_tokens", "100000", "--save_every", "2", "--max_steps", "3"]
    train.main(train_args(tmp_path / "run", *words))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_000003"]


def test_a_line_of_an_evaluation_is_whole(tmp_path, train_args):
    """Also where it is none of the logged ones: what masking keeps is measured."""
    words = [*RULES["gmt"], "--eval_rows", "5", "--eval_every", "2", "--log_every", "100", "--max_steps", "4"]
    train.main(train_args(tmp_path / "run", *words))
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [2, 4]
    for line in read_metrics(tmp_path / "run"):
        assert line["grad_norm_kept"] < line["grad_norm"] and line["kept_fraction"] < 0.5, line["step"]


def test_the_evaluation_loss_is_that_of_rows_that_are_not_trained_on(tmp_path, train_args):
    """Per trained token, in nats, without dropout, which goes on in training."""
    model = str(make_model(tmp_path / "m", attention_dropout=0.5))
    words = ["--model", model, "--eval_rows", "6", "--max_steps", "3"]
    args = train_args(tmp_path / "a", *words, "--master_dtype", "float64")
    line = train.main(args)
    _, rest, held_out = load_data(parse(TrainConfig, args))
    assert len(held_out) == 6 and not ids_of(rest) & ids_of(held_out)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "final", dtype=torch.float64).eval()
    expected = float(slow_loss(final, held_out, range(6))) / held_out.trained.sum()
    assert line["eval_loss"] == pytest.approx(expected, rel=1e-6)
    train.main(train_args(tmp_path / "b", *words))
    train.main(train_args(tmp_path / "c", *words, "--eval_every", "1"))
    assert same(weights(tmp_path / "b"), weights(tmp_path / "c"))


def ids_of(examples):
    return {tuple(row["input_ids"]) for row in examples.rows}


def test_the_seed_reaches_masks_and_frozen_halves(tmp_path, train_args, model_dir):
    config = parse(TrainConfig, train_args(tmp_path, "--rule", "rmt", "--keep_ratio", "0.3", "--seed", "7"))
    model, other = (AutoModelForCausalLM.from_pretrained(model_dir) for _ in range(2))
    assert build_masker(config, model).seed == 7
    freeze(parse(TrainConfig, train_args(tmp_path, "--rule", "hft", "--seed", "7")), model)
    frozen = gmt.freeze_half(other, 7, "sft")
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == frozen
    assert frozen != gmt.freeze_half(AutoModelForCausalLM.from_pretrained(model_dir), 0, "sft")


def test_dropout_is_another_at_each_step_and_process(train_args, tmp_path):
    config = parse(TrainConfig, train_args(tmp_path, "--rule", "none"))
    _, examples, _ = load_data(config)
    config = dataclasses.replace(config, micro_batch_tokens=2048)
    seeds = set()
    for step, process in itertools.product(range(3), range(2)):
        accelerator = SimpleNamespace(process_index=process, num_processes=2, device="cpu")
        steps.step_batches(config, examples, False, accelerator, step)
        seeds.add(torch.initial_seed())
    assert len(seeds) == 6


def test_checkpoints_by_the_clock(tmp_path, train_args, monkeypatch):
    """Steps of 40 seconds, a checkpoint each 2 minutes."""
    now, real = [0.0], train.step_batches
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(train, "step_batches", lambda *a: now.__setitem__(0, now[0] + 40) or real(*a))
    train.main(train_args(tmp_path / "run", "--save_every_minutes", "2", "--keep_checkpoints", "9"))
    assert [p.name for p in checkpoint.complete(tmp_path / "run" / "checkpoints")] == [
        "step_000003", "step_000006", "step_000009",
    ]  # fmt: skip


def test_a_run_that_is_resumed_at_its_end_knows_its_last_step(tmp_path, train_args):
    words = train_args(tmp_path / "run", "--save_every", "3", "--max_steps", "3")
    last = train.main(words)
    shutil.rmtree(tmp_path / "run" / "final")
    assert train.main([*words, "--resume"]) == last
    assert "- steps: 3 of 16 examples" in (tmp_path / "run" / "final" / "README.md").read_text()


def test_resume_changed_over_a_finished_run_is_refused(tmp_path, train_args):
    words = train_args(tmp_path / "run", "--max_steps", "2")
    train.main(words)
    with pytest.raises(UserError, match=r"finished with other settings: max_steps: 2 -> 4; choose another output_dir"):
        train.main([*words, "--max_steps", "4", "--resume", "--resume_changed"])
    assert train.main([*words, "--resume", "--resume_changed"]) == {}


def test_axes_of_the_rules_reach_the_training(tmp_path, train_args):
    """A key of an axis makes one rule of the other, to the bit."""

    def run(name, *words):
        train.main(train_args(tmp_path / name, "--keep_ratio", "0.3", "--max_steps", "5", *words))
        return weights(tmp_path / name)

    shira = run("shira", "--rule", "shira")
    assert same(run("a", "--rule", "gmt", "--score", "random", "--refresh_every", "0"), shira)
    assert not same(run("b", "--rule", "rmt"), shira)
    mofo = run("mofo", "--rule", "mofo")
    assert same(run("c", "--rule", "gmt", "--score", "moment", "--masked_weights", "update"), mofo)
    lift = run("lift", "--rule", "lift")
    assert not same(run("d", "--rule", "lift", "--lift_rank", "2"), lift)


@pytest.mark.parametrize("masked_weights", ["momentum", "frozen"])
def test_clip_after_masking(tmp_path, train_args, masked_weights, monkeypatch):
    """The optimizer sees the norm max_grad_norm, of what masking leaves; the logged norms are those before clipping."""
    seen = []
    words = ["--rule", "gmt", "--keep_ratio", "0.01", "--masked_weights", masked_weights, "--max_grad_norm", "1e-3"]

    def norm(masker):
        grads = [p.grad for p in masker.parameters if p.grad is not None]
        return torch.stack([g.norm() for g in grads]).norm().item()

    after_masking = steps.Clipping.after_masking

    def look(self):
        after_masking(self)
        seen.append(norm(self))

    monkeypatch.setattr(steps.Clipping, "after_masking", look)
    for clip in ("before", "after"):
        train.main(train_args(tmp_path / clip, *words, "--clip", clip, "--max_steps", "2"))
    assert max(seen[:2]) < 0.9e-3 and seen[2:] == pytest.approx([1e-3, 1e-3], rel=1e-2)
    before, after = (read_metrics(tmp_path / clip)[0] for clip in ("before", "after"))
    assert after["grad_norm"] == before["grad_norm"]
    assert after["grad_norm_kept"] == pytest.approx(before["grad_norm_kept"], rel=1e-5)


def test_grad_square_counts_its_calibration_steps(tmp_path, train_args, monkeypatch):
    """The squares of exactly the first steps' gradients, at the initial weights, before the first of all steps."""
    calibrate, seen = gmt.Masker.calibrate, []

    def look(self):
        seen.append({n: p.grad.clone() for n, p in self.eligible.items()})
        calibrate(self)

    monkeypatch.setattr(gmt.Masker, "calibrate", look)
    line = train.main(
        train_args(tmp_path / "run", *RULES["grad_square"], "--calibration_steps", "3", "--max_steps", "4")
    )
    assert len(seen) == 3 and line["step"] == 4
    before, after = train_weights(tmp_path)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
        sums = sum(s[name].square() for s in seen)
        threshold = sums.flatten().sort().values[-round(0.3 * sums.numel())]
        # not a single entry outside the mask has moved, over all steps: AdamW's moments are 0 there
        assert torch.equal(after[name] != before[name], sums >= threshold)


def train_weights(tmp_path):
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    return load_file(f"{run['config']['model']}/model.safetensors"), weights(tmp_path / "run")


def test_masks_are_logged_per_tensor(tmp_path, train_args):
    words = [*RULES["gmt"], "--log_masks_every", "3"]
    train.main(train_args(tmp_path / "run", *words, "--mask_jaccard", "true"))
    lines = [json.loads(x) for x in (tmp_path / "run" / "masks.jsonl").read_text().splitlines()]
    metrics = read_metrics(tmp_path / "run")
    assert [x["step"] for x in lines] == [3, 6, 9] and lines[0]["jaccard"] is None and 0.05 < lines[1]["jaccard"] < 0.9
    for line in lines:
        tensors = line["tensors"].values()
        assert sum(t["kept"] for t in tensors) / sum(t["entries"] for t in tensors) == pytest.approx(
            metrics[line["step"] - 1]["kept_fraction"]
        )
        assert line["tensors"]["model.layers.0.mlp.up_proj.weight"]["kept"] == round(0.3 * 48 * 32)
    assert "tensors" not in metrics[2]
    train.main(train_args(tmp_path / "other", *words))
    lines = [json.loads(x) for x in (tmp_path / "other" / "masks.jsonl").read_text().splitlines()]
    assert [x["jaccard"] for x in lines] == [None] * 3


def test_trackers(tmp_path, train_args):
    """Accelerate's trackers get every logged number."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.main(train_args(tmp_path / "run", "--trackers", "tensorboard", "--max_steps", "2"))
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*.0")
    log = EventAccumulator(str(events)).Reload()
    losses = [m["loss"] for m in read_metrics(tmp_path / "run")]
    assert [e.value for e in log.Scalars("loss")] == pytest.approx(losses)


# --- every key does something ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory, model_dir, rows_file):
    folder = tmp_path_factory.mktemp("plain") / "run"
    args = {"model": str(model_dir), "dataset": str(rows_file), "output_dir": str(folder), **PLAIN}
    train.main([f"--{k}={v}" for k, v in args.items()])
    return args, weights(folder), read_metrics(folder)


PLAIN = {
    "rule": "gmt", "keep_ratio": 0.5, "epochs": 1, "global_batch_size": 16, "learning_rate": 1e-3,
    "mixed_precision": "fp32", "max_length": 256,
}  # fmt: skip

# key -> settings that must change the final weights
CHANGE_WEIGHTS = {
    "max_length": {"max_length": 200},
    "overlong": {"max_length": 215, "overlong": "drop"},
    "eval_rows": {"eval_rows": 10},
    "train_on_prompt": {"train_on_prompt": "true"},
    "shuffle": {"shuffle": "false"},
    "rule": {"rule": "rmt"},
    "keep_ratio": {"keep_ratio": 0.1},
    "scope": {"scope": "model"},
    "score": {"score": "weight"},
    "refresh_every": {"refresh_every": 0},
    "masked_weights": {"masked_weights": "frozen"},
    "exclude": {"exclude": "*proj*"},
    "mask_vectors": {"mask_vectors": "true"},
    "optimizer": {"optimizer": "adamw_8bit"},
    "learning_rate": {"learning_rate": 2e-3},
    "lr_schedule": {"lr_schedule": "linear"},
    "warmup_ratio": {"warmup_ratio": 0.5},
    "warmup_steps": {"warmup_steps": 2},
    "weight_decay": {"weight_decay": 0.5},
    "adam_beta1": {"adam_beta1": 0.5},
    "adam_beta2": {"adam_beta2": 0.9},
    "adam_epsilon": {"adam_epsilon": 1e-3},
    "max_grad_norm": {"max_grad_norm": 0.01, "adam_epsilon": 1e-3},
    "epochs": {"epochs": 2},
    "max_steps": {"max_steps": 3},
    "global_batch_size": {"global_batch_size": 20},
    "seed": {"seed": 1},
    "mixed_precision": {"mixed_precision": "bf16"},
    "master_dtype": {"master_dtype": "float64"},
}
# keys whose effect another test, named here, shows
SHOWN_BY = {
    "model": "test_keys_that_name_things",
    "dataset": "test_keys_that_name_things",
    "tokenizer": "test_keys_that_name_things",
    "template": "test_keys_that_name_things",
    "output_dir": "test_keys_that_name_things",
    "tokenise_processes": "test_data.py: test_tokenising_on_processes_gives_the_same_examples",
    "dataset_split": "test_data.py: test_hub_datasets_are_asked_for_by_id_and_split",
    "per_device_batch_size": "test_gradients_of_any_split_agree_in_fp32",
    "micro_batch_tokens": "test_gradients_of_any_split_agree_in_fp32",
    "objective": "test_dpo.py",
    "beta": "test_dpo.py: test_keys_of_dpo_change_the_training",
    "length_normalised": "test_dpo.py: test_keys_of_dpo_change_the_training",
    "train_only": "test_peft_benchmark.py: test_only_the_named_weights_are_trained",
    "adapter": "test_lora.py",
    "lora_rank": "test_lora.py: test_two_steps_are_those_of_a_slow_twin",
    "lora_alpha": "test_lora.py: test_two_steps_are_those_of_a_slow_twin",
    "lora_targets": "test_lora.py: test_only_the_targets_change_by_a_matrix_of_low_rank",
    "lora_dropout": "test_lora.py: test_dropout_changes_the_training",
    "decay_ratio": "test_schedule.py: test_wsd_is_that_of_transformers",
    "decay_shape": "test_schedule.py: test_wsd_is_that_of_transformers",
    "power_a": "test_schedule.py: test_power_is_that_of_its_paper",
    "power_b": "test_schedule.py: test_power_is_that_of_its_paper",
    "zo_epsilon": "test_zeroth_order.py: test_the_keys_change_the_training",
    "subzero_rank": "test_zeroth_order.py: test_the_keys_change_the_training",
    "subzero_refresh_every": "test_zeroth_order.py: test_the_keys_change_the_training",
    "packing": "test_losses.py: test_packing_is_chosen_refused_or_left",
    "loss_chunk": "test_losses.py: test_keys_reach_the_model",
    "attention": "test_losses.py: test_keys_reach_the_model",
    "gradient_checkpointing": "test_losses.py: test_keys_reach_the_model",
    "compile": "test_losses.py: test_keys_reach_the_model",
    "deterministic": "test_keys_of_the_run",
    "dry_run": "test_plan.py: test_dry_run_prints_the_plan_and_makes_nothing",
    "lift_rank": "test_axes_of_the_rules_reach_the_training",
    "clip": "test_clip_after_masking",
    "calibration_steps": "test_grad_square_counts_its_calibration_steps",
    "save_every_minutes": "test_keys_of_the_run",
    "log_masks_every": "test_masks_are_logged_per_tensor",
    "mask_jaccard": "test_masks_are_logged_per_tensor",
    "mask_update_share": "test_updates.py: test_a_run_logs_it",
    "max_skipped_steps": "test_training_stops_at_bad_steps_with_a_checkpoint_from_before",
    "trackers": "test_trackers",
    "resume": "test_resume_is_bitwise",
    "resume_changed": "test_resume_refuses_another_run_and_lists_the_differences",
    "overwrite": "test_keys_of_the_run",
    "save_every": "test_keys_of_the_run",
    "keep_checkpoints": "test_keys_of_the_run",
    "log_every": "test_keys_of_the_run",
    "eval_every": "test_keys_of_the_run",
}


def test_every_key_is_listed():
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    assert names == CHANGE_WEIGHTS.keys() | SHOWN_BY.keys() and not CHANGE_WEIGHTS.keys() & SHOWN_BY.keys()


@pytest.mark.parametrize("key", CHANGE_WEIGHTS)
def test_key_changes_the_training(key, tmp_path, plain_run):
    args, plain, _ = plain_run
    settings = {**args, **CHANGE_WEIGHTS[key], "output_dir": tmp_path / "run"}
    train.main([f"--{k}={v}" for k, v in settings.items()])
    baseline = plain
    if key == "max_grad_norm":  # AdamW hides a scale, unless epsilon is large: compare at the same epsilon
        train.main([f"--{k}={v}" for k, v in {**settings, "max_grad_norm": 0, "output_dir": tmp_path / "no"}.items()])
        baseline = weights(tmp_path / "no")
    if key == "overlong":  # at the same max_length
        train.main(
            [f"--{k}={v}" for k, v in {**settings, "overlong": "truncate", "output_dir": tmp_path / "no"}.items()]
        )
        baseline = weights(tmp_path / "no")
    assert not same(weights(tmp_path / "run"), baseline)


def test_the_same_settings_give_the_same_weights(tmp_path, plain_run):
    """Without this the test above could not fail."""
    args, plain, metrics = plain_run
    train.main([f"--{k}={v}" for k, v in {**args, "output_dir": tmp_path / "run"}.items()])
    assert same(weights(tmp_path / "run"), plain) and read_metrics(tmp_path / "run") == metrics


def test_keys_that_name_things(tmp_path, plain_run, monkeypatch, rows_file):
    args, plain, _ = plain_run
    other_rows = write_rows(tmp_path / "r.jsonl", [{"query": f"{i}", "response": f"{i}"} for i in range(30)])
    shouting = templates.Pair(("query", "response"), lambda row: (row["query"].upper(), row["response"]))
    monkeypatch.setitem(templates.TEMPLATES, "shouting", shouting)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args["model"])
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.eos_token = "<pad>"
    tokenizer.save_pretrained(tmp_path / "tok")
    for key, value in {
        "model": make_model(tmp_path / "model", seed=1),
        "dataset": other_rows,
        "template": "shouting",
        "tokenizer": tmp_path / "tok",
    }.items():
        train.main([f"--{k}={v}" for k, v in {**args, key: value, "output_dir": tmp_path / "runs" / key}.items()])
        assert not same(weights(tmp_path / "runs" / key), plain), key


def test_keys_of_the_run(tmp_path, plain_run, monkeypatch):
    args, _, _ = plain_run

    def run(**settings):
        train.main([f"--{k}={v}" for k, v in {**args, "output_dir": tmp_path / "run", **settings}.items()])
        lines = read_metrics(tmp_path / "run")
        saved = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("*"))
        return [m["step"] for m in lines], [m["step"] for m in lines if m["eval_loss"] is not None], saved

    assert run() == ([1, 2, 3, 4, 5], [], [])
    with pytest.raises(UserError, match="already holds a run"):
        run()
    checkpoints = ["step_000001", "step_000002", "step_000003", "step_000004", "step_000005"]
    assert run(overwrite="true", save_every=1)[2] == checkpoints[3:]
    assert run(overwrite="true", save_every=1, keep_checkpoints=4)[2] == checkpoints[1:]
    assert run(overwrite="true", save_every_minutes=1e-9)[2] == checkpoints[3:]
    assert run(overwrite="true", save_every_minutes=60)[2] == []
    assert run(overwrite="true", log_every=2)[0] == [2, 4, 5]
    assert run(overwrite="true", eval_rows=5, eval_every=2)[1] == [2, 4, 5]
    was_deterministic = []
    monkeypatch.setattr(
        steps, "distribute", lambda *a, real=steps.distribute: was_deterministic.append(DETERMINISTIC()) or real(*a)
    )
    run(overwrite="true")
    run(overwrite="true", deterministic="true")
    assert was_deterministic == [False] * 5 + [True] * 5
    torch.use_deterministic_algorithms(False)


DETERMINISTIC = torch.are_deterministic_algorithms_enabled
