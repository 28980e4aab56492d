"""The plan of --dry_run is what a run then holds and does: pytest tests/test_plan.py"""

import re

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model, python
from transformers import AutoConfig, AutoModelForCausalLM

import gmt
import train
from common.config import TrainConfig, UserError, parse
from training import losses, plan

KINDS = {
    "fp32": {},
    "hft": {"rule": "hft"},
    "bf16 masters": {"master_dtype": "bfloat16", "mixed_precision": "bf16"},
    "8 bit": {"optimizer": "adamw_8bit"},
    "fp64": {"master_dtype": "float64"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_weights_gradients_and_optimizer_are_those_of_a_run(tmp_path, train_args, monkeypatch, kind):
    made, grads = [], {}
    prepare, unscale = Accelerator.prepare, Accelerator.unscale_gradients
    monkeypatch.setattr(Accelerator, "prepare", lambda self, *a: made.append(prepare(self, *a)) or made[-1])

    def look(self, *args):
        grads.update({n: p.grad.nbytes for n, p in made[0][0].named_parameters() if p.grad is not None})
        unscale(self, *args)

    monkeypatch.setattr(Accelerator, "unscale_gradients", look)
    words = [f"--{k}={v}" for k, v in KINDS[kind].items()]
    args = train_args(tmp_path / "run", "--max_steps", "2", *words)
    train.main(args)
    ((model, optimizer),) = made
    tensors = {}  # distinct storages: 8-bit AdamW shares its two maps between all weights
    for state in optimizer.optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                tensors[value.data_ptr()] = value.nbytes
    held = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(grads.values()),
        "optimizer": sum(tensors.values()),
    }
    config = parse(TrainConfig, args)
    model = plan.on_meta(config, AutoConfig.from_pretrained(config.model))
    if config.rule == "hft":
        gmt.freeze_half(model, config.seed, "sft")
    assert plan.tensor_bytes(config, model.parameters(), 1, False) == held


@pytest.mark.parametrize("rule", ["gmt", "sift", "mofo", "lift", "grad_square"])
def test_bytes_of_masks(rule):
    """Bits where masks are held, against those that a masker then has; copies by what masked_weights takes back."""
    model = torch.nn.ModuleList([torch.nn.Linear(64, 48, bias=False), torch.nn.Linear(48, 64, bias=False)])
    masker = gmt.Masker(model.named_parameters(), rule, 0.3)
    held = plan.mask_bytes(masker, 1, False)
    if rule == "grad_square":
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        masker.calibrate()
        assert held["sums of squares"] == sum(x.nbytes for x in masker._squares.values())
        masker.fix_masks()
    if rule in ("sift", "grad_square"):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        masker.mask_gradients(0)
        assert held["masks"] == sum(bits.nbytes for bits in masker.state_dict()["masks"].values())
    largest = 48 * 64 * 4
    copies = {"mofo": largest, "lift": 3 * largest}.get(rule)
    assert held.get(f"{masker.masked_weights}'s copies") == copies
    assert ("masks" in held) == (rule != "gmt")
    assert plan.mask_bytes(masker, 4, True).get("masks", 0) == held.get("masks", 0) // 4


def test_bytes_under_fsdp2_are_the_largest_shard():
    config = TrainConfig(model="m", dataset=["d"], output_dir="o", rule="none")
    p = torch.nn.Parameter(torch.zeros(10, 3))
    held = plan.tensor_bytes(config, [p], 4, True)  # torch.chunk: 3, 3, 3, 1 rows
    assert held == {"weights": 36, "gradients": 36, "optimizer": 76}


@pytest.mark.parametrize("chunk", [0, 40])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_saves(model_dir, checkpointing, chunk, monkeypatch):
    """What a real forward pass saves, but of a checkpointed part its inputs; and the most that one such part saves."""
    config = TrainConfig(
        model="m", dataset=["d"], output_dir="o", rule="none", mixed_precision="fp32", loss_chunk=chunk,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).train()
    losses.attach_loss(model, chunk)
    weights = {p.data_ptr() for p in model.parameters()}
    saved, most = {}, [0]

    def hooks(tensors):
        def keep(t):
            if t.untyped_storage().data_ptr() not in weights:
                tensors[t.untyped_storage().data_ptr()] = t
            return t

        return torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)

    def part(function, *args):
        saved.update({a.untyped_storage().data_ptr(): a for a in args if isinstance(a, torch.Tensor)})
        inside = {}
        with hooks(inside):
            out = function(*args)
        alive.append(inside)
        most.append(sum(t.untyped_storage().nbytes() for at, t in inside.items() if at not in saved))
        return out

    def chunks(head, hidden, targets, chunk):
        size = chunk or 100
        parts = [(hidden[i : i + size], targets[i : i + size]) for i in range(0, 100, size)]
        return torch.cat([part(lambda h, t: token_losses(head, h, t), *p) for p in parts])

    alive, token_losses = [], losses.token_losses
    monkeypatch.setattr(losses, "token_losses", chunks)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        for layer in plan.layers(model):
            layer._gradient_checkpointing_func = part
    ids, at = torch.zeros((3, 50), dtype=torch.long), torch.arange(100)
    with hooks(saved):
        model(input_ids=ids, positions=at, targets=at)
    assert len(most) == 1 + (3 if chunk else 1) + 2 * checkpointing
    real = sum(t.untyped_storage().nbytes() for t in saved.values()) + max(most)
    planned = plan.activation_bytes(config, AutoConfig.from_pretrained(model_dir), 3, 50, 100)
    assert abs(planned / real - 1) < 0.03, (planned, real)


def test_checkpointing_and_chunks_save_memory(model_dir):
    """And a packed row's mask costs some."""
    big = AutoConfig.from_pretrained(model_dir, num_hidden_layers=8, vocab_size=5000)
    base = {"model": "m", "dataset": ["d"], "output_dir": "o", "rule": "none", "loss_chunk": 0}
    plain, chunked, both = (
        plan.activation_bytes(TrainConfig(**base | more), big, 4, 100, 300)
        for more in ({}, {"loss_chunk": 50}, {"loss_chunk": 50, "gradient_checkpointing": True})
    )
    # logits in 16 bits, and their logarithms of probabilities in 32: of 250 tokens fewer
    assert (plain - chunked) / (250 * 5000 * (2 + 4)) == pytest.approx(1, abs=0.35) and both < 0.6 * chunked
    packed = plan.activation_bytes(TrainConfig(**base), big, 4, 100, 300, packed=True)
    assert packed - plain == 4 * 100 * 100


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_that_torch_counts(tmp_path, tied):
    from torch.utils.flop_counter import FlopCounterMode

    folder = make_model(tmp_path, tie_word_embeddings=tied, num_key_value_heads=4)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.zeros((2, 64), dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    # eager attention computes both halves of the causal square
    both_halves = plan.flops_per_token(model, 2 * 64) * ids.numel()
    assert abs(counter.get_total_flops() / both_halves - 1) < 0.02


def test_dry_run_prints_the_plan_and_makes_nothing(tmp_path, train_args, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_trainable_model", lambda *a: 1 / 0)  # no weights
    args = train_args(tmp_path / "run", "--rule", "gmt", "--keep_ratio", "0.3", "--save_every", "5", "--dry_run")
    train.main(args)
    text = capsys.readouterr().out
    assert "parameters: 32,096, 32,096 of them trained" in text and "16 tensors, 99.5% of all parameters" in text
    assert "70 examples, 14,895 tokens, 2,921 of them trained; 0 cut to max_length 512, 0 left out" in text
    assert "steps: 10 of 16 examples (5 an epoch), on 1 process(es)" in text
    assert re.search(r"2 \+ 1 checkpoints of 0.00 GiB", text) and not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "4")
    train.main(args)
    assert "on 4 process(es), each with the whole model" in capsys.readouterr().out
    with pytest.raises(UserError, match="global_batch_size 3, 4 processes"):
        train.main([*args, "--global_batch_size", "3"])


def test_dry_run_refuses_with_exit_code_2(tmp_path, train_args):
    args = train_args(tmp_path / "run", "--rule", "gmt", "--keep_ratio", "0.3", "--exclude", "nothing", "--dry_run")
    done = python("train.py", *args)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("train.py: error: exclude pattern 'nothing' matches none of the 21")
