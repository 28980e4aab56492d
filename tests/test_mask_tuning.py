"""Mask tuning in the loop: its equation, its runs, its final model: pytest tests/test_mask_tuning.py"""

import pytest
import torch
from conftest import make_model, read_metrics, same, saved_bytes, weights
from safetensors.torch import load_file
from test_distributed import run
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from worker import exact_norm

import train
from common import run_folder
from common.config import TrainConfig, parse
from common.errors import UserError
from common.hub import load_weights
from training import data, losses, mask_tuning, plan

TUNING = ["--rule", "mask_tuning", "--learning_rate", "3e-3", "--lr_schedule", "constant", "--epochs", "1"]
FP64 = ["--master_dtype", "float64"]
SAVING = ["--save_every", "2", "--log_masks_every", "5", "--eval_rows", "3"]
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_args):
    """The folder of a run in fp64 that has saved and was never cut."""
    folder = tmp_path_factory.mktemp("masks") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", exact_norm)
        train.main(run_args(folder, *TUNING, *FP64, *SAVING))
    return folder


# --- the equation ----------------------------------------------------------------------------------------------------


def test_a_matrix_by_hand():
    """Adam on S with the gradient W * dL/dW' and M = [S > 0], written out, for as many steps as flip some masks."""
    torch.manual_seed(0)
    layer, x, y = nn.Linear(5, 4, bias=False).double(), torch.randn(9, 5).double(), torch.randn(9, 4).double()
    model = nn.Module()
    model.layer, model.get_output_embeddings = layer, lambda: None
    w = layer.weight.detach().clone()
    mask_tuning.add(parse(TrainConfig, ["--model=m", "--dataset=d", "--output_dir=o", *TUNING]), model)
    scores = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(scores, lr=3e-3, weight_decay=0.0)
    s, m, v, masked = torch.full_like(w, 0.005), torch.zeros_like(w), torch.zeros_like(w), []
    for t in range(1, 7):
        F.mse_loss(layer(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        gradient = 2 / y.numel() * (x @ (w * (s > 0)).T - y).T @ x * w
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        s = s - 3e-3 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        assert torch.allclose(scores[0], s, atol=1e-12)
        masked.append(int((s <= 0).sum()))
    assert masked[0] == 0 < masked[-1] < w.numel()
    assert mask_tuning.count(model) == {"layer.weight": {"entries": 20, "kept": 20 - masked[-1]}}
    mask_tuning.fold(model)
    assert torch.equal(layer.weight, w * (s > 0)) and [n for n, _ in model.named_parameters()] == ["layer.weight"]


def test_a_run_is_that_of_a_slow_twin(trained, run_args):
    """All examples one by one through a model with weights M * W; every mask of the final model, and what is logged."""
    config = parse(TrainConfig, run_args(trained, *TUNING, *FP64, *SAVING))
    _, examples, _ = train.load_data(config)
    base = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float64)
    w = {n: p.detach() for n, p in base.named_parameters() if n.split(".")[-2] in LAYERS}
    scores = {n: torch.full_like(p, 0.005) for n, p in w.items()}
    optimizer = torch.optim.AdamW(scores.values(), lr=3e-3, weight_decay=0.0)
    logged = read_metrics(trained)
    for step, line in enumerate(logged):
        product = {n: (w[n] * (s > 0)).requires_grad_() for n, s in scores.items()}
        assert line["masked_entries"] == sum(int((s <= 0).sum()) for s in scores.values())
        ids, loss = data.step_examples(len(examples), 4, config.seed, step), 0.0
        for i in ids:
            batch = data.collate(examples, [[i]], torch.device("cpu"))
            logits = torch.func.functional_call(base, product, (batch["input_ids"],)).logits.flatten(0, 1)
            loss += F.cross_entropy(logits[batch["positions"]], batch["targets"], reduction="sum")
        (loss / examples.trained[ids].sum()).backward()
        for n, s in scores.items():
            s.grad = product[n].grad * w[n]
        torch.nn.utils.clip_grad_norm_(scores.values(), 1.0)
        optimizer.step()
    final = weights(trained)
    assert final.keys() == dict(base.named_parameters()).keys()
    for n, p in base.named_parameters():
        assert torch.equal(final[n], p * (scores[n] > 0) if n in w else p), n
    assert 0.01 < logged[-1]["masked_fraction"] < 0.9 and logged[0]["masked_entries"] == 0


# --- a run -----------------------------------------------------------------------------------------------------------


def test_the_final_model_is_an_ordinary_one(trained, model_dir):
    final, base = load_weights(str(trained / "final")), load_weights(str(model_dir))
    assert (
        type(final.model.layers[0].mlp.up_proj) is nn.Linear
        and "`mask_tuning`" in (trained / "final" / "README.md").read_text()
    )
    for (name, p), q in zip(final.named_parameters(), base.parameters(), strict=True):
        assert torch.equal(p, q.double()) == (name.split(".")[-2] not in LAYERS)
        assert ((p == q.double()) | (p == 0)).all()


def test_resume_is_bitwise(trained, tmp_path, run_args, monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    args = run_args(tmp_path / "run", *TUNING, *FP64, *SAVING)
    write = run_folder.Log.write

    def crash(self, line):
        write(self, line)
        if line["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder.Log, "write", crash)
        train.main(args)
    train.main([*args, "--resume"])
    assert read_metrics(tmp_path / "run") == read_metrics(trained)
    assert same(weights(tmp_path / "run"), weights(trained))
    assert (tmp_path / "run" / "masks.jsonl").read_text() == (trained / "masks.jsonl").read_text()


def test_a_split_into_micro_batches_changes_no_mask(trained, tmp_path, run_args, monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    more = ["--per_device_batch_size", "3", "--loss_chunk", "50"]
    train.main(run_args(tmp_path / "run", *TUNING, *FP64, *SAVING, *more))
    assert same(weights(tmp_path / "run"), weights(trained))


@pytest.mark.slow
@pytest.mark.parametrize("worker", ["worker", "fsdp_worker"])
def test_two_processes_agree_with_one(trained, tmp_path, run_args, worker):
    """Under FSDP2 also cut after a checkpoint in shards, and resumed where weights stay whole after a forward pass."""
    args = run_args(tmp_path / "run", *TUNING, *FP64, *SAVING)
    if worker == "fsdp_worker":
        cut = run(2, args, worker, CRASH_AT="3")
        assert cut.returncode != 0 and len(read_metrics(tmp_path / "run")) == 3, cut.stderr[-3000:]
        args.append("--resume")
    done = run(2, args, worker, RESHARD="false")
    assert done.returncode == 0, done.stderr[-3000:]
    assert same(weights(tmp_path / "run"), weights(trained))
    for a, b in zip(read_metrics(tmp_path / "run"), read_metrics(trained), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-9) and a["masked_entries"] == b["masked_entries"]


@pytest.mark.slow
def test_fsdp2_gathers_scores_in_bf16_and_saves_whole_weights(tmp_path, run_args, model_dir):
    """Where weights stay gathered after an evaluation too."""
    args = run_args(tmp_path / "run", *TUNING, "--mixed_precision", "bf16", "--eval_rows", "3")
    done = run(2, args, "fsdp_worker", RESHARD="false")
    assert done.returncode == 0, done.stderr[-3000:]
    lines, base = read_metrics(tmp_path / "run"), load_file(model_dir / "model.safetensors")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.05 and lines[-1]["masked_entries"] > 0
    assert all(((p == base[n]) | (p == 0)).all() for n, p in weights(tmp_path / "run").items())


def test_tied_embeddings_stay_tied_and_16_bit_weights_have_fp32_scores(tmp_path, run_args, monkeypatch):
    seen, build = [], train.build_masker
    monkeypatch.setattr(train, "build_masker", lambda c, m: seen.extend(m.named_parameters()) or build(c, m))
    model = make_model(tmp_path / "model", tie_word_embeddings=True)
    more = ["--model", str(model), "--master_dtype", "bfloat16", "--mixed_precision", "bf16", "--max_steps", "4"]
    train.main(run_args(tmp_path / "run", *TUNING, *more, "--exclude", "*.mlp.*", "--gradient_checkpointing"))
    scores = {n: p for n, p in seen if p.requires_grad}
    assert len(scores) == 8 and all(p.dtype == torch.float32 and ".self_attn." in n for n, p in scores.items())
    base, final = load_file(model / "model.safetensors"), weights(tmp_path / "run")
    assert base.keys() == final.keys() and {p.dtype for p in final.values()} == {torch.bfloat16}
    changed = {n for n in base if not torch.equal(base[n].bfloat16(), final[n])}
    assert 0 < len(changed) <= 8 and all(".self_attn." in n for n in changed)


# --- the plan, and what is refused -----------------------------------------------------------------------------------


def test_the_plan_counts_scores_and_masked_copies(tmp_path, run_args, capsys):
    layers = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    train.main(run_args(tmp_path / "run", *TUNING, "--dry_run"))
    text = capsys.readouterr().out
    assert f"parameters: {32096 + layers:,}, {layers:,} of them trained" in text
    assert f"14 matrices of {layers:,} weights have scores" in text
    train.main(run_args(tmp_path / "run", "--rule", "none", "--epochs", "1", "--dry_run"))
    flops = [float(t.partition("compute: ")[2].split()[0]) for t in (text, capsys.readouterr().out)]
    head = 4 / 6 * 259 * 32 / (layers + 259 * 32)  # frozen, its gradient is not computed: 4 of 6
    assert flops[1] * (1 - head) < flops[0] < flops[1]


def test_the_plans_activations_are_those_that_autograd_saves(tmp_path, run_args, model_dir):
    """With the copies M * W that the backward pass needs."""
    config = parse(TrainConfig, run_args(tmp_path, *TUNING, "--loss_chunk", "0"))
    model = load_weights(config.model)
    mask_tuning.add(config, model)
    losses.attach_loss(model, 0)
    real = saved_bytes(model, 1, 8, 6)
    planned = plan.activation_bytes(config, AutoConfig.from_pretrained(model_dir), 1, 8, 6)
    assert abs(planned / real - 1) < 0.03, (planned, real)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep_ratio", "0.2"], "keep_ratio has no meaning for rule mask_tuning"),
        (["--weight_decay", "0.1"], "weight_decay has no meaning for rule mask_tuning"),
        (["--log_masks_every", "2", "--mask_jaccard"], "mask_jaccard has no meaning for rule mask_tuning"),
        (["--adapter", "lora"], "adapter lora is a baseline without masks, got rule mask_tuning"),
        (["--train_only", "*q_proj*"], "train_only has no meaning with rule mask_tuning"),
        (["--exclude", "*qkv*"], r"exclude pattern '\*qkv\*' matches none"),
        (["--rule", "mask_tunning"], "did you mean mask_tuning"),
    ],
)
def test_what_has_no_meaning_is_refused(tmp_path, run_args, words, message):
    with pytest.raises(UserError, match=message):
        train.main(run_args(tmp_path / "run", *TUNING, *words, "--dry_run"))


def test_the_command_lines_rule_leaves_out_the_files_keys(tmp_path):
    (tmp_path / "gmt.yaml").write_text("rule: gmt\nkeep_ratio: 0.2\nexclude: ['*norm*']\nmodel: m\ndataset: d\n")
    words = ["--config", str(tmp_path / "gmt.yaml"), "--rule", "mask_tuning", "--output_dir", "o"]
    config = parse(TrainConfig, words)
    assert config.keep_ratio is None and config.exclude == ["*norm*"]
