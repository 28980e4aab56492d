"""The loss inside the model, and the checks before training: pytest tests/test_losses.py"""

import functools
import itertools
import math

import pytest
import torch
from conftest import make_model, write_rows
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers import modeling_flash_attention_utils as flash_attention
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask
from transformers.models.llama.modeling_llama import LlamaModel

import train
from common import sources
from common.config import TrainConfig, parse
from common.errors import UserError
from training import checks, data, loading, losses, plan


@pytest.fixture(scope="module")
def examples(tmp_path_factory, model_dir):
    rows = [{"prompt": "ab" * (i % 5 + 1), "response": "xyz"[: i % 3 + 1] * (i % 4 + 1)} for i in range(12)]
    path = write_rows(tmp_path_factory.mktemp("r") / "r.jsonl", rows)
    rows = sources.load_rows(str(path), ("prompt", "response"))
    return data.tokenise(rows, AutoTokenizer.from_pretrained(model_dir), "prompt_response", 64)


def slow_loss(model, examples, ids):
    """One example at a time, all logits, log_softmax."""
    total = 0.0
    for i in ids:
        row = examples.rows[i]
        log_p = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        total = total - sum(log_p[t - 1, label] for t, label in enumerate(row["labels"]) if label != -100)
    return total


def gemma():
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.05, pad_token_id=2, sliding_window=8,
        )
    )  # fmt: skip


def gpt2():
    sizes = {"vocab_size": 259, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0))


def llama(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(make_model(folder, **kwargs), dtype=torch.float32)


@pytest.mark.parametrize("kind", ["untied", "tied", "softcapped", "gpt2"])
@pytest.mark.parametrize("chunk", [0, 1, 7, 1000])
def test_loss_and_gradient_are_those_of_all_logits(tmp_path, examples, kind, chunk):
    torch.manual_seed(0)
    make = {"softcapped": gemma, "gpt2": gpt2}.get(kind) or (
        lambda: llama(tmp_path, tie_word_embeddings=kind == "tied")
    )
    model = make().eval()
    ids = [3, 7, 8, 11]
    slow = slow_loss(model, examples, ids)
    slow.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    losses.attach_loss(model, chunk)
    ours = model(**data.collate(examples, [[i] for i in ids]))
    assert ours.shape == (int(examples.trained[ids].sum()),) and ours.dtype == torch.float32
    ours.sum().backward()
    assert ours.sum().item() == pytest.approx(slow.item(), rel=1e-6)
    for name, p in model.named_parameters():
        assert (p.grad - expected[name]).norm() <= 1e-6 * expected[name].norm() + 1e-12, name


def test_a_batch_without_trained_tokens_has_a_loss_and_gradients_of_zero(examples, tmp_path):
    """The processes that have no micro-batch take part in the sum of gradients."""
    for chunk in (0, 4):
        model = llama(tmp_path)
        losses.attach_loss(model, chunk)
        loss = model(**data.collate(examples, [])).sum()
        loss.backward()
        assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(("chunk", "most"), [(0, 100), (16, 16), (30, 30)])
def test_no_more_than_a_chunk_of_logits_is_made_at_once(chunk, most):
    """And the last chunk's are not made twice; 16-bit logits are widened."""
    made = []
    weight = torch.randn(50, 8, dtype=torch.bfloat16, requires_grad=True)

    def head(hidden):
        made.append(len(hidden))
        return F.linear(hidden, weight)

    hidden, targets = torch.randn(100, 8, dtype=torch.bfloat16, requires_grad=True), torch.randint(0, 50, (100,))
    out = losses.token_losses(head, hidden, targets, chunk)
    assert out.dtype == torch.float32 and max(made) == most and sum(made) == 100
    whole = F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")
    assert torch.allclose(out, whole, rtol=1e-6)
    out.sum().backward()
    last = 100 if not chunk else 100 % chunk or chunk
    assert max(made) == most and sum(made) == 200 - last
    assert losses.token_losses(lambda h: h.double() @ weight.double().T, hidden, targets, 9).dtype == torch.float64


def config(folder="o", **more):
    return TrainConfig(**{"model": "m", "dataset": ["d"], "output_dir": folder, "rule": "none", **more})


@pytest.fixture
def accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True)


FP32 = {"mixed_precision": "fp32"}


def test_a_model_that_scales_its_logits_otherwise_is_refused(examples, accelerator):
    torch.manual_seed(0)
    model = CohereForCausalLM(
        CohereConfig(
            vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, logit_scale=0.0625, pad_token_id=2,
        )
    )  # fmt: skip
    losses.attach_loss(model, 4)
    with pytest.raises(UserError, match=r"model m \(model type cohere\) does something to its logits that .* its loss"):
        checks.check_loss(config(**FP32), model, examples, accelerator)
    model = gemma()
    losses.attach_loss(model, 4)
    checks.check_loss(config(**FP32), model, examples, accelerator)
    assert model.training  # as it was found


def test_losses_smaller_than_rounding_are_no_difference():
    """Those of a text that the model knows by heart: a last digit is 1.2e-7, and none is infinitely far from 0."""
    by_heart = torch.tensor([1e-5, 0.0, 2e-5])
    assert checks.distance(by_heart + 1.2e-7, by_heart) < 1e-4 and checks.distance(by_heart, 0 * by_heart) < 1e-2
    assert checks.distance(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.001])) > 1e-4
    assert math.isnan(checks.distance(torch.tensor([math.nan]), torch.tensor([1.0])))


# --- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("gpt2", "eager"), ("gemma", "eager")],
)
def test_a_packed_rows_losses_and_gradients_are_those_of_its_examples(tmp_path, examples, kind, attention):
    torch.manual_seed(0)
    model = {"llama": lambda: llama(tmp_path), "gemma": gemma, "gpt2": gpt2}[kind]().double().eval()
    model.set_attn_implementation(attention)
    losses.attach_loss(model, 5)
    found = {}
    for name, rows, packed in (
        ("apart", [[i] for i in (3, 7, 8, 11)], False),
        ("packed", [[3, 7], [8, 11]], True),
        ("one row", [[3, 7, 8, 11]], True),
    ):
        model.zero_grad()
        out = model(**data.collate(examples, rows, packed=packed))
        out.sum().backward()
        found[name] = torch.cat([out.detach(), *(p.grad.flatten() for p in model.parameters())])
    for name in ("packed", "one row"):
        assert (found[name] - found["apart"]).norm() < 1e-6 * found["apart"].norm(), name


@pytest.fixture
def flash(monkeypatch):
    """transformers' way to FlashAttention, but for its kernel, in whose place sequences are computed one by one.

    Returns the kernel's calls: the sequences' bounds of queries and keys, and the longest ones."""
    calls = []

    def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
        calls.append((cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))
        out = [
            F.scaled_dot_product_attention(
                *(t[start:end].transpose(0, 1)[None] for t in (q, k, v)),
                is_causal=causal, scale=softmax_scale, enable_gqa=True,
            )[0].transpose(0, 1)
            for start, end in itertools.pairwise(cu_seqlens_q.tolist())
        ]  # fmt: skip
        return torch.cat(out)

    def refuse(*args, **kwargs):
        raise AssertionError("this would wait for the device, or let sequences mix")

    functions = (refuse, kernel, None, None, None), (flash_attention._lazy_define_process_function(kernel), dict)
    monkeypatch.setattr(flash_attention, "lazy_import_flash_attention", lambda implementation: functions)
    monkeypatch.setattr(flash_attention, "_is_packed_sequence", refuse)
    AttentionInterface.register("flash_stand_in", flash_attention_forward)
    AttentionMaskInterface.register("flash_stand_in", flash_attention_mask)
    return calls


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("again", [False, True])
def test_flash_attention_is_told_where_sequences_begin(tmp_path, examples, flash, kind, again):
    """Not in each layer anew, from position_ids. Losses and gradients are those of the examples, also checkpointed."""
    torch.manual_seed(0)
    model = {"llama": lambda: llama(tmp_path), "gpt2": gpt2}[kind]().double().train()
    losses.attach_loss(model, 5)
    if again:
        model.activation_checkpointing_enable({"use_reentrant": False})
    found = []
    for attention, rows in (("sdpa", [[i] for i in (3, 7, 8, 11)]), ("flash_stand_in", [[3, 7, 8, 11]])):
        model.config._attn_implementation = attention
        model.zero_grad()
        batch = data.collate(examples, rows, packed=attention != "sdpa")
        out = model(**batch)
        out.sum().backward()
        found.append(torch.cat([out.detach(), *(p.grad.flatten() for p in model.parameters())]))
    assert (found[1] - found[0]).norm() < 1e-6 * found[0].norm()
    (bounds, _), (longest, _) = flash_attention.prepare_fa_kwargs_from_position_ids(batch["position_ids"])
    assert len(flash) == 2 * (1 + again) and bounds.tolist()[0] == 0 and len(bounds) == 5
    for q, k, longest_q, longest_k in flash:
        assert torch.equal(q, bounds) and q is k and type(longest_q) is int and longest_q == longest_k == longest


def let_examples_mix(model):
    """As with transformers' default use_cache: position_ids are not looked at for what may see what."""
    decoder = model.base_model.forward
    model.base_model.forward = lambda use_cache, **kwargs: decoder(use_cache=True, **kwargs)


def ignore_positions(model):
    decoder = model.base_model.forward

    def forward(input_ids, position_ids, **kwargs):
        apart = torch.cumsum(position_ids == 0, 1) - 1
        return decoder(input_ids=input_ids, position_ids=position_ids + 7 * apart * (apart > 0), **kwargs)

    model.base_model.forward = forward


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packing_is_chosen_refused_or_left(tmp_path, examples, accelerator, capsys, precision, monkeypatch):
    settings = config(packing="on", mixed_precision=precision, attention="eager")
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    sound, mixing = llama(tmp_path / "a"), llama(tmp_path / "b")
    for model in (sound, mixing):
        losses.attach_loss(model, 0)
    let_examples_mix(mixing)
    with autocast:
        assert checks.decide_packing(settings, sound, examples, accelerator) is True
        assert sound.training
        with pytest.raises(UserError, match="packing on: model type llama lets an example see the one before it, with"):
            checks.decide_packing(settings, mixing, examples, accelerator)
        # auto packs under FlashAttention alone, which is not here: its place is taken
        monkeypatch.setattr(checks, "wants_packing", lambda config: True)
        settings.packing = "auto"
        assert checks.decide_packing(settings, mixing, examples, accelerator) is False
        assert "not packed: model type llama lets an example see the one before it" in capsys.readouterr().out


def test_wrong_positions_are_found(examples, accelerator):
    torch.manual_seed(0)
    model = gpt2()  # learned positions
    losses.attach_loss(model, 0)
    settings = config(packing="on", **FP32)
    assert checks.packing_leaks(settings, model, examples, accelerator) == ""
    ignore_positions(model)
    assert "gives an example other losses in a packed row" in checks.packing_leaks(
        settings, model, examples, accelerator
    )


def test_what_wants_packing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    flash = {"attention": "flash_attention_2"}
    assert not plan.wants_packing(config())
    assert plan.wants_packing(config(packing="on")) and plan.wants_packing(config(**flash))
    assert not plan.wants_packing(config(packing="off", **flash))
    assert not plan.wants_packing(config(per_device_batch_size=2, **flash))
    with pytest.raises(UserError, match="packing on fills rows up to micro_batch_tokens: leave per_device_batch_size"):
        config(packing="on", per_device_batch_size=2)
    with pytest.raises(UserError, match="flash_attention_2 computes in 16 bits"):
        config(**flash, **FP32)
    # one row a forward pass, where the kernel knows its parts; else rows of max_length
    lengths = torch.arange(10, 42).numpy()
    some = data.Examples(None, lengths[:, None], lengths[:, None])
    (share,) = plan.distribute(config(micro_batch_tokens=512, **flash), some, lengths - 10, True, 1)
    assert all(len(batch) == 1 for batch in share) and len(share) == 2
    (share,) = plan.distribute(config(micro_batch_tokens=512, max_length=82), some, lengths - 10, True, 1)
    assert 75 < max(sum(lengths[row]) for batch in share for row in batch) <= 82 and max(map(len, share)) > 3
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="attention flash_attention_2: pip install flash-attn, or use sdpa"):
        config(**flash)


# --- in a run --------------------------------------------------------------------------------------------------------


def test_keys_reach_the_model(tmp_path, train_args, monkeypatch):
    seen, compiled = {}, []
    attach_loss = losses.attach_loss

    def look(model, chunk):
        layers = plan.layers(model)
        seen.update(chunk=chunk, attention=model.config._attn_implementation, again=layers[0].gradient_checkpointing)
        attach_loss(model, chunk)

    monkeypatch.setattr(loading, "attach_loss", look)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: compiled.append(type(self).__name__))
    train.main(train_args(tmp_path / "a", "--max_steps", "1"))
    assert seen == {"chunk": 1024, "attention": "sdpa", "again": False} and not compiled
    more = ["--loss_chunk", "9", "--attention", "eager", "--gradient_checkpointing", "true", "--compile", "true"]
    train.main(train_args(tmp_path / "b", "--max_steps", "1", *more))
    assert seen == {"chunk": 9, "attention": "eager", "again": True} and compiled == ["LlamaDecoderLayer"] * 2


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses(tmp_path, train_args):
    """With masks by packing, checkpointing, and shapes that change from step to step."""
    found = []
    for i, more in enumerate([[], ["--compile", "true"], ["--compile", "true", "--gradient_checkpointing", "true"]]):
        line = train.main(train_args(tmp_path / str(i), "--max_steps", "3", "--micro_batch_tokens", "1024", *more))
        found.append(line["loss"])
        names = AutoModelForCausalLM.from_pretrained(tmp_path / str(i) / "final").state_dict()
        assert not any("_orig_mod" in n for n in names)
    assert found[1:] == [pytest.approx(found[0], rel=1e-4)] * 2


@pytest.mark.slow
def test_hft_runs_compiled_in_all_layers(tmp_path, train_args, monkeypatch):
    """Each pattern of frozen weights takes a graph of its own. Beyond a limit torch.compile goes on uncompiled."""
    graphs, runs, forwards = [], [], []
    compile_module, forward = torch.nn.Module.compile, LlamaModel.forward

    def count(graph, inputs):
        graphs.append(graph)
        return lambda *args: runs.append(1) or graph(*args)

    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(compile_module, backend=count))
    monkeypatch.setattr(LlamaModel, "forward", lambda *args, **kwargs: forwards.append(1) or forward(*args, **kwargs))
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        monkeypatch.setattr(torch._dynamo.config, limit, 2)  # a low one, for a small model
    torch._dynamo.reset()
    model = make_model(tmp_path / "model", num_hidden_layers=3)
    words = train_args(tmp_path / "run", "--model", str(model), "--rule", "hft", "--compile", "true")
    train.main([*words, "--max_steps", "3", "--micro_batch_tokens", "1024"])
    assert len(graphs) > 2 and len(runs) == 3 * len(forwards)


def test_dry_run_knows_of_packing(tmp_path, train_args, capsys):
    train.main([*train_args(tmp_path / "run"), "--packing", "on", "--dry_run"])
    assert "packed if the model keeps examples apart" in capsys.readouterr().out
    parse(TrainConfig, train_args(tmp_path / "run"))


def test_autocast_keeps_no_copies_of_the_weights(tmp_path, train_args, monkeypatch):
    """Its cache would hold a 16-bit copy of every layer's weights to the end of a forward pass."""
    seen, whole = [], losses.token_losses

    def look(*args):
        if torch.is_grad_enabled():  # not while the model is looked at before training
            seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
        return whole(*args)

    monkeypatch.setattr(losses, "token_losses", look)
    train.main(train_args(tmp_path / "run", "--max_steps", "1", "--mixed_precision", "bf16"))
    assert set(seen) == {(True, False)}


@pytest.mark.gpu
def test_flash_attention_packs(tmp_path, train_args, capsys):
    """The check finds examples kept apart, and the loss is that of length-sorted rows."""
    pytest.importorskip("flash_attn")
    more = ["--mixed_precision", "bf16", "--max_steps", "2"]
    packed = train.main(train_args(tmp_path / "a", *more, "--attention", "flash_attention_2"))
    assert "not packed" not in capsys.readouterr().out
    assert packed["loss"] == pytest.approx(train.main(train_args(tmp_path / "b", *more))["loss"], rel=1e-2)


@pytest.mark.gpu
def test_chunks_save_a_gpus_memory():
    peaks = []
    for chunk in (0, 256):
        head = torch.nn.Linear(64, 100_000, bias=False, device="cuda")
        hidden = torch.randn(4096, 64, device="cuda", requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        losses.token_losses(head, hidden, torch.zeros(4096, dtype=torch.long, device="cuda"), chunk).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated())
        del head, hidden
    assert peaks[1] < 0.3 * peaks[0]
