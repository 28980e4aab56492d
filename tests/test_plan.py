"""The plan of --dry_run is what a run then holds and does: pytest tests/test_plan.py"""

import functools
import gzip
import json
import re
import shutil
import weakref
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from conftest import DATA, make_model, needs_data, python, same, weights
from datasets import Dataset
from test_architectures import ARCHITECTURES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MixtralConfig, MixtralForCausalLM

import gmt
import train
from common.config import TrainConfig, parse
from common.errors import UserError
from common.hub import load_weights
from training import backend, loading, losses, plan, updates
from training.data import Examples, step_examples, steps_per_epoch
from training.masking import build_masker

SMALL = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
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
    assert plan.tensor_bytes(config, model.parameters(), 1) == held


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and still there, and the most of them at once."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in given | self.known:
                self.known.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def gone(self, key, size):
        self.known.discard(key)
        self.now -= size


LOW_RANK = {"rule": "lift", "refresh_every": 2, "masked_weights": "momentum", "lift_rank": 4}
MASKING = {
    "gmt": {"rule": "gmt"},
    "gmt, compared": {"rule": "gmt", "mask_jaccard": True, "log_masks_every": 1},
    "gmt, update measured": {"rule": "gmt", "mask_update_share": True, "log_masks_every": 1},
    "sift": {"rule": "sift"},
    "gasdu": {"rule": "gasdu", "refresh_every": 2},
    "mofo": {"rule": "mofo"},
    "frozen": {"rule": "gmt", "masked_weights": "frozen"},
    "frozen, compared": {"rule": "gmt", "masked_weights": "frozen", "mask_jaccard": True, "log_masks_every": 1},
    "frozen, 8 bit": {"rule": "gmt", "masked_weights": "frozen", "optimizer": "adamw_8bit"},
    "lift": {"rule": "lift"},
    "low rank": LOW_RANK,
    "low rank, bf16": {**LOW_RANK, "master_dtype": "bfloat16"},
    "low rank, fp64": {**LOW_RANK, "master_dtype": "float64", "mixed_precision": "fp32"},
}


def matrices(config):
    """Two matrices of 240,000 and 72,000 entries with gradients, and what masks them, in small chunks."""
    torch.manual_seed(0)
    model = torch.nn.ModuleList([torch.nn.Linear(400, 600, bias=False), torch.nn.Linear(300, 240, bias=False)])
    model.to(getattr(torch, config.master_dtype))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model, build_masker(config, model)


@pytest.mark.parametrize("kind", MASKING)
def test_bytes_of_masks_are_those_of_a_step(kind, monkeypatch):
    """The most that three steps hold beside weights and gradients, in bytes of tensors."""
    monkeypatch.setitem(gmt._CHUNK, "cpu", 1 << 12)
    config = TrainConfig(model="m", dataset=["d"], output_dir="o", keep_ratio=0.3, **MASKING[kind])
    model, masker = matrices(config)
    optimizer = backend.build_optimizer(config, model)
    gradients = [p.grad.clone() for p in model.parameters()]
    with LiveBytes() as live:
        for step in range(3):
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad.copy_(gradient)
            if config.mask_update_share:
                masker.mask_gradients(step)
                before = updates.copies(masker)
                optimizer.step()
                updates.share_of_masked(before, masker, Accelerator(cpu=True))
            else:
                masker.step(optimizer, step, stats=config.mask_jaccard, jaccard=config.mask_jaccard)
    held = plan.held_bytes(config, model, masker, 1)
    planned = plan.most_at_once(held | {"weights": 0, "gradients": 0})
    assert abs(planned - live.peak) < 240_000, (planned, live.peak, held)
    assert masker.refresh_every == 1 or held["masks"] >= sum(b.nbytes for b in masker.state_dict()["masks"].values())
    quarter = plan.mask_bytes(config, masker, 4)
    assert quarter.get("masks", 0) == pytest.approx(held.get("masks", 0) / 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_bytes_of_a_calibration(dtype):
    config = TrainConfig(
        model="m", dataset=["d"], output_dir="o", rule="grad_square", keep_ratio=0.3, calibration_steps=2,
        master_dtype=dtype, mixed_precision="bf16" if dtype == "bfloat16" else "fp32",
    )  # fmt: skip
    _, masker = matrices(config)
    with LiveBytes() as live:
        for _ in range(2):
            masker.calibrate()
    held = plan.mask_bytes(config, masker, 1)
    assert held["calibration"] == pytest.approx(live.peak, rel=0.02)
    assert plan.most_at_once(held | {"weights": 1, "gradients": 1, "optimizer": 5}) == 2 + held["calibration"]


def test_bytes_under_fsdp2_are_the_largest_shard():
    config = TrainConfig(model="m", dataset=["d"], output_dir="o", rule="none")
    p = torch.nn.Parameter(torch.zeros(10, 3))
    held = plan.tensor_bytes(config, [p], 4)  # torch.chunk: 3, 3, 3, 1 rows
    assert held == {"weights": 36, "gradients": 36, "optimizer": 76}


@pytest.mark.parametrize("tied", [False, True])
def test_what_fsdp2_gathers(tied):
    """Of layers of 8,768 entries in fp32: the one computed twice, the one before, gradients of the one behind. With a
    large head: it and its gradients twice, and the last layer."""
    config = TrainConfig(model="m", dataset=["d"], output_dir="o", rule="none", mixed_precision="fp32")
    layer = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32
    for vocabulary, most in ((100, 4 * 4 * layer), (1_000, 4 * layer + 8 * (32 * 1_000 + 32))):
        words = SMALL | {"num_hidden_layers": 3, "vocab_size": vocabulary, "tie_word_embeddings": tied}
        assert plan.gathered_bytes(config, plan.on_meta(config, LlamaConfig(**words))) == most


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


def test_layers_are_checkpointed_by_older_versions_of_transformers_too():
    class Older:
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
            self.words = gradient_checkpointing_kwargs

    plan.checkpoint_layers(older := Older())
    assert older.words == {"use_reentrant": False}


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


@pytest.mark.parametrize("kind", ["dense", "tied", "experts"])
def test_flops_are_those_that_torch_counts(tmp_path, kind):
    if kind == "experts":  # 2 of 8 a token
        experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8}
        model = MixtralForCausalLM(MixtralConfig(**SMALL, **experts, attn_implementation="eager"))
        model.set_experts_implementation("eager")
        assert plan.experts(model.config) == (2, 8)
    else:
        folder = make_model(tmp_path, tie_word_embeddings=kind == "tied", num_key_value_heads=4)
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        assert plan.experts(model.config) is None
    ids = torch.zeros((2, 64), dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    # eager attention computes both halves of the causal square
    both_halves = plan.flops_per_token(model, 2 * 64) * ids.numel()
    assert abs(counter.get_total_flops() / both_halves - 1) < 0.02
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    both_halves = plan.flops_per_token(model, 2 * 64, forward_only=True) * ids.numel()
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


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def test_a_plan_for_64_gpus(tmp_path, train_args, capsys, monkeypatch):
    """WORLD_SIZE=64 python train.py --dry_run ..., with two more variables under FSDP2."""
    args = train_args(
        tmp_path / "run", "--rule", "gmt", "--keep_ratio", "0.3", "--global_batch_size", "64", "--dry_run"
    )

    def plan_of(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        train.main(args)
        return capsys.readouterr().out

    ddp = plan_of(WORLD_SIZE="64")
    assert "on 64 process(es), each with the whole model" in ddp
    assert re.search(r"memory of the machine while weights are read: 0.00 GiB in each process", ddp)
    fsdp2 = plan_of(**FSDP2)
    assert "on FSDP2 over 64 processes; about 1.0 forward passes of at most 2,048 tokens a step and process" in fsdp2
    assert "in the first process of all, next to none in the others" in fsdp2
    assert "in each process" in plan_of(FSDP_CPU_RAM_EFFICIENT_LOADING="false")
    hybrid = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8"}
    assert "on FSDP2 over 64 processes in groups of 8; " in plan_of(**hybrid)
    assert backend.shards(64) == 8


@pytest.mark.parametrize("sharded", [False, True])
def test_what_cannot_fit_on_the_card_is_refused(tmp_path, train_args, monkeypatch, capsys, sharded):
    """By weights, gradients and optimizer state, of fp32: 16 bytes a parameter; in a run before weights are read."""
    args = train_args(tmp_path / "run", "--dry_run")
    needed = 16 * 32_096 + 4 * 21  # and 21 counts of steps
    if sharded:
        for name, value in {**FSDP2, "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        config = parse(TrainConfig, args)
        model = plan.on_meta(config, AutoConfig.from_pretrained(config.model))
        needed = sum(plan.tensor_bytes(config, model.parameters(), 2).values())
    monkeypatch.setattr(backend, "card_bytes", lambda: needed - 1)
    with pytest.raises(UserError, match=r"needs 0.0 GiB a GPU .*weights 0.0, gradients 0.0, optimizer 0.0") as refused:
        train.main(args)
    ways = "use more GPUs or" if sharded else "configs/accelerate/fsdp2.yaml, --optimizer adamw_8bit or"
    assert f"{ways} --adapter lora" in str(refused.value) and "\n" not in str(refused.value)
    assert "at once (activations" in capsys.readouterr().out  # the plan, first
    monkeypatch.setattr(backend, "card_bytes", lambda: needed)
    train.main(args)
    said = capsys.readouterr().out
    assert "on this GPU" in said and "warning: it may not fit on this GPU: use --gradient_checkpointing true" in said
    monkeypatch.setattr(backend, "card_bytes", lambda: 10**9)
    train.main(args)
    assert "warning: it may not fit" not in capsys.readouterr().out
    if not sharded:
        monkeypatch.setattr(backend, "card_bytes", lambda: needed - 1)
        monkeypatch.setattr(loading, "load_weights", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(UserError, match="before the first activation"):
            train.main(args[:-1])
        monkeypatch.setattr(backend, "card_bytes", lambda: needed)
        with pytest.raises(ZeroDivisionError):
            train.main(args[:-1])


def test_the_card_is_that_of_the_process(monkeypatch):
    assert torch.cuda.is_available() or backend.card_bytes() is None
    cards = [Mock(total_memory=24), Mock(total_memory=80)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: cards[i])
    assert backend.card_bytes() == 24
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert backend.card_bytes() == 80
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert backend.card_bytes() is None


# --- tokens of a forward pass, where they are left to the run ---------------------------------------------------------

LEFT = ["--rule", "gmt", "--keep_ratio", "0.3", "--max_length", "32", "--global_batch_size", "16"]
LEFT += ["--micro_batch_tokens", "0"]


def settled(args, card, monkeypatch):
    """What a run chooses on a GPU with so many bytes; None: on a CPU."""
    monkeypatch.setattr(backend, "card_bytes", lambda: card)
    config = parse(TrainConfig, args)
    tokenizer, examples, _ = loading.load_data(config)
    return loading.settle_batches(config, tokenizer, examples)


def test_a_run_takes_the_most_tokens_that_the_card_holds(tmp_path, run_args, monkeypatch):
    args = run_args(tmp_path / "run", *LEFT)
    choices = (160, 96, 48)
    monkeypatch.setattr(plan, "CHOICES", choices)
    monkeypatch.setattr(plan, "ON_CPU", 128)

    def needed(tokens):
        config = parse(TrainConfig, [*args, "--micro_batch_tokens", str(tokens)])
        tokenizer, examples, _ = loading.load_data(config)
        model, masker = loading.on_paper(config, tokenizer, examples)
        first = plan.first_steps(config, examples, 1)
        assert all(step.share.tokens.max() <= tokens for step in first)
        held = plan.held_bytes(config, model, masker, 1) | plan.passing_bytes(config, model, examples, first)
        return plan.most_at_once(held)

    sizes = [needed(tokens) for tokens in choices]
    assert sizes == sorted(set(sizes), reverse=True)
    for tokens, size in zip(choices, sizes, strict=True):
        assert settled(args, size / 0.9 + 1, monkeypatch).micro_batch_tokens == tokens
    assert settled(args, sizes[-1], monkeypatch).micro_batch_tokens == 32  # one example, whatever comes
    assert settled(args, None, monkeypatch).micro_batch_tokens == 128
    assert settled([*args, "--micro_batch_tokens", "77"], sizes[0], monkeypatch).micro_batch_tokens == 77
    monkeypatch.setattr(plan, "ON_CPU", 8)
    assert settled(args, None, monkeypatch).micro_batch_tokens == 32


def test_a_resumed_run_keeps_its_choice_on_another_machine(tmp_path, run_args, monkeypatch):
    monkeypatch.setattr(plan, "ON_CPU", 64)
    words = [*LEFT, "--save_every", "2"]
    train.main(run_args(tmp_path / "whole", *words))
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["config"]["micro_batch_tokens"] == 64
    cut = tmp_path / "cut"
    train.main(run_args(cut, *words))
    shutil.rmtree(cut / "final"), shutil.rmtree(cut / "checkpoints" / "step_000004")
    monkeypatch.setattr(plan, "ON_CPU", 512)
    train.main([*run_args(cut, *words), "--resume"])
    last = json.loads((cut / "run.json").read_text())["resumed"][-1]
    assert (last["step"], last["config"]["micro_batch_tokens"]) == (2, 64)
    assert same(weights(tmp_path / "whole"), weights(cut))
    with pytest.raises(UserError, match="micro_batch_tokens: 64 -> 128"):
        train.main([*run_args(cut, *words), "--resume", "--micro_batch_tokens", "128"])


def test_dry_run_refuses_with_exit_code_2(tmp_path, train_args):
    args = train_args(tmp_path / "run", "--rule", "gmt", "--keep_ratio", "0.3", "--exclude", "nothing", "--dry_run")
    done = python("train.py", *args)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("train.py: error: exclude pattern 'nothing' matches none of the 21")


# --- dealing at size --------------------------------------------------------------------------------------------------


def examples_of(lengths, trained):
    """Examples of these numbers of tokens, without any: dealing needs no more."""
    rows = Dataset.from_dict({"input_ids": [[]] * len(lengths)})
    return Examples(rows, np.array(lengths)[:, None], np.array(trained)[:, None])


@functools.cache
def gsm8k():
    """GSM8K's training problems, in letters / 4, which is about their tokens."""
    with gzip.open(DATA / "gsm8k" / "train.jsonl.gz", "rt") as f:
        rows = [json.loads(line) for line in f]
    answers = np.array([len(row["answer"]) // 4 + 1 for row in rows])
    return examples_of(np.array([len(row["question"]) // 4 for row in rows]) + answers + 40, answers)


@functools.cache
def long_tailed():
    """Log-normal lengths, as of conversations: a median of 300 tokens, some of the longest allowed."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(np.exp(rng.normal(5.7, 1.1, 8_000)).astype(int) + 16, 4096)
    return examples_of(lengths, np.maximum(1, (lengths * rng.uniform(0.05, 0.95, len(lengths))).astype(int)))


@pytest.mark.parametrize("processes", [8, 64])
@pytest.mark.parametrize("data", [pytest.param(gsm8k, marks=needs_data("gsm8k/train.jsonl.gz")), long_tailed])
@pytest.mark.parametrize("packing", [False, True])
def test_many_processes_run_in_step(data, processes, packing):
    """Each has as many forward passes, no example is lost or doubled, and little time is spent waiting."""
    examples = data()
    config = TrainConfig(
        model="m", dataset=["d"], output_dir="o", rule="none", global_batch_size=128, micro_batch_tokens=8192,
        max_length=4096,
    )  # fmt: skip
    config.attention = "flash_attention_2" if packing else "sdpa"  # which need not be installed for this
    idle, passes = {True: [], False: []}, []
    for step in [*range(10), steps_per_epoch(len(examples), 128) - 1]:  # the last one is short
        ids = step_examples(len(examples), 128, 0, step)
        shares = plan.distribute(config, examples, ids, packing, processes)
        assert len(shares) == processes and len({len(process) for process in shares}) == 1
        dealt = [i for process in shares for micro in process for row in micro for i in row]
        assert sorted(dealt) == sorted(ids.tolist())
        share = plan.share_of(examples, shares, packing)
        real = sum(examples.lengths[ids])
        assert share.tokens.shape == (processes, len(shares[0])) and share.tokens.sum() >= real
        most = max(8192, examples.lengths.max())
        assert share.tokens.max() <= most
        passes.append(len(shares[0]))
        for together, waits in idle.items():
            waits.append(plan.idle_share(share, together))
    print(f"{np.mean(passes):.1f} passes, waiting: FSDP2 {np.mean(idle[True]):.1%}, DDP {np.mean(idle[False]):.1%}")
    assert np.mean(idle[False]) <= np.mean(idle[True]) < IDLE[data.__name__, processes]


# On 64 processes a step has two examples for each, and lasts as long as its longest one.
IDLE = {("gsm8k", 8): 0.08, ("gsm8k", 64): 0.35, ("long_tailed", 8): 0.15, ("long_tailed", 64): 0.8}


def test_the_idle_share_is_the_time_of_waiting():
    share = plan.Share(np.array([[1, 1], [1, 1]]), np.array([[10, 2], [4, 8]]))
    assert plan.idle_share(share, together=True) == pytest.approx(1 - 24 / (2 * 18))
    assert plan.idle_share(share, together=False) == 0


def test_a_forward_pass_calls_the_same_modules_whatever_is_in_it(model_dir):
    """Also one without an example, and one of many chunks of the loss: FSDP2's collectives are these calls."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).train()
    losses.attach_loss(model, 7)
    calls = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *args, name=name: calls.append(name))
        module.register_full_backward_pre_hook(lambda *args, name=name: calls.append(f"back {name}"))
    found = []
    for n, length in ((0, 2), (1, 5), (40, 30)):
        batch = {"input_ids": torch.zeros((2, length), dtype=torch.long)}
        batch["positions"] = batch["targets"] = torch.zeros(n, dtype=torch.long)
        calls.clear()
        model(**batch).sum().backward()
        found.append(list(calls))
    assert "back lm_head" in found[0] and found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", ["tied: Qwen2", "experts: Mixtral", "two windows: Gemma 3's text", "Conv1D: GPT-2"])
def test_a_model_without_values_is_the_same_but_for_them(tmp_path, name):
    """What the other processes build under FSDP2: names, shapes, ties, buffers; its parameters take no memory."""
    kind, settings, *_ = ARCHITECTURES[name]
    AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings)).save_pretrained(tmp_path)
    whole, empty = (load_weights(str(tmp_path), dtype=torch.float32, values=values) for values in (True, False))
    parameters = [dict(model.named_parameters(remove_duplicate=False)) for model in (whole, empty)]
    assert [(n, p.shape, p.dtype) for n, p in parameters[0].items()] == [
        (n, p.shape, p.dtype) for n, p in parameters[1].items()
    ]
    ties = [[[n for n in named if named[n] is p] for p in named.values()] for named in parameters]
    assert ties[0] == ties[1] and sum(p.untyped_storage().nbytes() for p in empty.parameters()) < 1000
    addresses = {p.data_ptr() for p in empty.parameters()}
    assert 0 not in addresses and len(addresses) == len(list(empty.parameters()))
    buffers = [dict(model.named_buffers()) for model in (whole, empty)]
    assert buffers[0].keys() == buffers[1].keys()
    assert all(torch.equal(value, buffers[1][n]) and value.device.type == "cpu" for n, value in buffers[0].items())
    assert str(whole.generation_config) == str(empty.generation_config)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200 NVL", 835e12), ("Tesla T4", None)],
)
def test_peak_flops_by_the_cards_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert plan.peak_flops(torch.device("cuda")) == peak and plan.peak_flops(torch.device("cpu")) is None
