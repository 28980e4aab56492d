"""LoRA in the loop: what is trained, what is saved, what is refused: pytest tests/test_lora.py"""

import json

import pytest
import torch
from conftest import make_model, read_metrics, same, saved_bytes, weights, write_rows
from peft import PeftModel
from safetensors.torch import load_file
from test_distributed import run
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from worker import exact_norm

import eval as evaluation
import train
from common import run_folder
from common.config import TrainConfig, parse
from common.errors import UserError
from common.hub import load_weights
from training import data, lora, losses, plan

LORA = ["--adapter", "lora", "--lora_rank", "4", "--lora_alpha", "6", "--learning_rate", "1e-2"]
FP64 = ["--master_dtype", "float64"]
TARGETS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, train_args):
    """The folder of a run in fp64 that has saved and was never cut."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    train.main(train_args(folder, *LORA, *FP64, "--save_every", "3", "--lora_dropout", "0.1"))
    return folder


# --- what is trained -------------------------------------------------------------------------------------------------


def test_two_steps_are_those_of_a_slow_twin(tmp_path, train_args, monkeypatch):
    """(alpha / r) B A is added to each matrix, all examples go one by one, and torch's AdamW trains A and B."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    more = ["--max_steps", "2", "--lr_schedule", "constant", "--max_grad_norm", "0.1", "--weight_decay", "0.1"]
    args = train_args(tmp_path / "run", *LORA, *FP64, *more)
    train.main(args)

    config = parse(TrainConfig, args)
    _, examples, _ = train.load_data(config)
    base = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float64)
    matrices = {n: w for n, w in base.state_dict().items() if n.split(".")[-2] in TARGETS}
    start = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float64)
    lora.add(config, start)
    a = {n: start.get_submodule(n[:-7]).lora_A["default"].weight.detach().clone() for n in matrices}
    b = {n: torch.zeros(len(w), 4, dtype=torch.float64) for n, w in matrices.items()}
    parameters = [p.requires_grad_() for part in (a, b) for p in part.values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for step in range(2):
        ids, loss = data.step_examples(len(examples), 16, config.seed, step), 0.0
        tuned = {n: w + 6 / 4 * b[n] @ a[n] for n, w in matrices.items()}
        for i in ids:
            batch = data.collate(examples, [[i]], torch.device("cpu"))
            logits = torch.func.functional_call(base, tuned, (batch["input_ids"],)).logits.flatten(0, 1)
            loss += F.cross_entropy(logits[batch["positions"]], batch["targets"], reduction="sum")
        (loss / examples.trained[ids].sum()).backward()
        assert torch.nn.utils.clip_grad_norm_(parameters, 0.1) > 0.1
        optimizer.step()
        optimizer.zero_grad()

    ours = adapter(tmp_path / "run")
    assert len(ours) == 2 * len(matrices) == 28
    for n in matrices:
        for letter, part in (("A", a), ("B", b)):
            found = ours[f"base_model.model.{n[:-7]}.lora_{letter}.weight"]
            assert found.dtype == torch.float64 and (found - part[n]).abs().max() < 1e-9, (n, letter)
        assert b[n].abs().max() > 1e-2  # two steps of Adam


def test_the_matrices_are_those_of_the_seed(model_dir, train_args, tmp_path):
    def first(seed):
        config = parse(TrainConfig, train_args(tmp_path, *LORA, "--seed", seed))
        model = load_weights(config.model)
        lora.add(config, model)
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    torch.manual_seed(5)
    one = first("1")
    assert same(one, first("1")) and not same(one, first("2"))
    assert all((p == 0).all() == ("lora_B" in n) for n, p in one.items())


@pytest.mark.parametrize("chosen", [["q_proj", "down_proj"], []])
def test_only_the_targets_change_by_a_matrix_of_low_rank(tmp_path, train_args, model_dir, trained, chosen):
    folder = trained
    if chosen:
        folder = tmp_path / "run"
        train.main(train_args(folder, *LORA, *FP64, "--lora_targets", *chosen))
    base, final = load_file(model_dir / "model.safetensors"), weights(folder)
    assert base.keys() == final.keys()
    for name, w in base.items():
        change = final[name] - w.double()
        if name.split(".")[-2] not in (chosen or TARGETS):
            assert (change == 0).all(), name
            continue
        singular = torch.linalg.svdvals(change)
        assert singular[3] > 1e-4 and singular[4] < 1e-12, name


# --- what is saved ---------------------------------------------------------------------------------------------------


def test_dropout_changes_the_training(trained, tmp_path, train_args):
    train.main(train_args(tmp_path / "run", *LORA, *FP64))
    assert not same(adapter(tmp_path / "run"), adapter(trained))
    train.main(train_args(tmp_path / "same", *LORA, *FP64, "--lora_dropout", "0.1"))
    assert same(adapter(tmp_path / "same"), adapter(trained))


def test_the_merged_model_is_base_and_adapter(trained, model_dir):
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    ids = torch.randint(0, 250, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, trained / "adapter").eval()(ids).logits
        merged = load_weights(str(trained / "final"))(ids).logits
    assert merged.dtype == torch.float64 and (merged - adapted).abs().max() < 1e-5  # RMSNorm computes in fp32
    assert (merged - before).abs().max() > 0.1
    settings = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (4, 6, str(model_dir))
    assert "adapter lora of rank 4" in (trained / "final" / "README.md").read_text()


def test_eval_scores_the_merged_model_and_refuses_the_adapter(trained, tmp_path):
    items = write_rows(tmp_path / "gsm8k.jsonl", [{"question": "1+1?", "answer": "#### 2"}])
    words = ["--tasks", f"gsm8k={items}", "--dtype", "float32", "--workers", "1", "--output_dir", str(tmp_path / "e")]
    evaluation.main(["--model", str(trained / "final"), *words])
    assert (tmp_path / "e" / "scores.json").exists()
    with pytest.raises(UserError, match="no config.json in it"):
        evaluation.main(["--model", str(trained / "adapter"), *words, "--overwrite"])


def test_resume_is_bitwise(trained, tmp_path, train_args, monkeypatch):
    args = train_args(tmp_path / "run", *LORA, *FP64, "--save_every", "3", "--lora_dropout", "0.1")
    write = run_folder.Log.write

    def crash(self, line):
        write(self, line)
        if line["step"] == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder.Log, "write", crash)
        train.main(args)
    assert not (tmp_path / "run" / "adapter").exists()
    train.main([*args, "--resume"])
    assert read_metrics(tmp_path / "run") == read_metrics(trained)
    assert same(adapter(tmp_path / "run"), adapter(trained)) and same(weights(tmp_path / "run"), weights(trained))
    train.main([*args, "--overwrite", "--max_steps", "1"])
    assert not same(adapter(tmp_path / "run"), adapter(trained))


def test_16_bit_weights_have_matrices_in_fp32(tmp_path, train_args, capsys):
    more = ["--master_dtype", "bfloat16", "--mixed_precision", "bf16", "--gradient_checkpointing", "true"]
    train.main(train_args(tmp_path / "run", *LORA, *more))
    assert {w.dtype for w in weights(tmp_path / "run").values()} == {torch.bfloat16}
    assert {w.dtype for w in adapter(tmp_path / "run").values()} == {torch.float32}
    metrics = read_metrics(tmp_path / "run")
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1 and "warning: master_dtype" not in capsys.readouterr().out


SHORT = [*LORA, *FP64, "--max_steps", "5", "--eval_rows", "5", "--save_every", "2"]  # the last step is not saved


@pytest.fixture(scope="module")
def alone(tmp_path_factory, train_args):
    """The folder of a short run on one process, whose norms compute in fp64."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", exact_norm)
        train.main(train_args(folder, *SHORT))
    return folder


def assert_near(folder, expected):
    """The same adapter, merged model and losses, but for rounding."""
    ours, theirs = (adapter(f) | weights(f) for f in (folder, expected))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - w).abs().max() for name, w in theirs.items()) < 1e-9
    for a, b in zip(read_metrics(folder), read_metrics(expected), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-9)
        assert a["eval_loss"] == (b["eval_loss"] and pytest.approx(b["eval_loss"], abs=1e-9))


@pytest.mark.parametrize("worker", [pytest.param("worker", marks=pytest.mark.slow), "fsdp_worker"])
def test_two_processes_agree_with_one(alone, tmp_path, train_args, worker):
    """Under DDP, and on shards: also A and B as they are saved, and what they are merged into."""
    done = run(2, train_args(tmp_path / "run", *SHORT), worker)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_near(tmp_path / "run", alone)


@pytest.mark.slow
def test_fsdp2_resumes_on_another_number_of_processes_and_trains_in_bf16(alone, tmp_path, train_args):
    cut = run(2, train_args(tmp_path / "cut", *SHORT), "fsdp_worker", CRASH_AT="3")
    assert cut.returncode != 0 and len(read_metrics(tmp_path / "cut")) == 3, cut.stderr[-3000:]
    done = run(3, train_args(tmp_path / "cut", *SHORT, "--resume"), "fsdp_worker", RESHARD="false")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_near(tmp_path / "cut", alone)
    more = ["--mixed_precision", "bf16", "--gradient_checkpointing", "true", "--lora_dropout", "0.1"]
    done = run(2, train_args(tmp_path / "bf16", *LORA, *more), "fsdp_worker")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {w.dtype for w in (adapter(tmp_path / "bf16") | weights(tmp_path / "bf16")).values()} == {torch.float32}
    metrics = read_metrics(tmp_path / "bf16")
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1


def test_dpo_starts_at_its_reference(tmp_path, train_args):
    rows = [{"prompt": f"{i}", "chosen": "a" * (i % 5 + 1), "rejected": "b" * 9} for i in range(20)]
    pairs = str(write_rows(tmp_path / "pairs.jsonl", rows))
    more = ["--dataset", pairs, "--objective", "dpo", "--template", "prompt_response", "--lora_dropout", "0"]
    train.main(train_args(tmp_path / "run", *LORA, *more))
    margins = [line["reward_margin"] for line in read_metrics(tmp_path / "run")]
    assert margins[0] == 0.0 and margins[-1] > 0.01


# --- the plan --------------------------------------------------------------------------------------------------------


def test_the_plan_counts_the_adapter_alone(tmp_path, train_args, capsys):
    """Of a model of 2 layers, width 32, 16 for keys and values, 48 inside."""
    sides = [64, 48, 48, 64, 80, 80, 80]  # rows and columns of a layer's matrices, together
    count = 2 * 4 * sum(sides)
    train.main(train_args(tmp_path / "run", *LORA, "--dry_run"))
    text = capsys.readouterr().out
    assert f"parameters: {32096 + count:,}, {count:,} of them trained" in text


def test_the_plans_activations_are_those_that_autograd_saves(tmp_path, train_args, model_dir):
    config = parse(TrainConfig, train_args(tmp_path, *LORA, "--lora_dropout", "0.1", "--loss_chunk", "0"))
    model = load_weights(config.model)
    lora.add(config, model)
    losses.attach_loss(model, 0)
    real = saved_bytes(model, 3, 50, 100)
    planned = plan.activation_bytes(config, AutoConfig.from_pretrained(model_dir), 3, 50, 100)
    assert abs(planned / real - 1) < 0.03, (planned, real)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter", "lora", "--rule", "gmt", "--keep_ratio", "0.1"], "adapter lora .* got rule gmt: use rule none"),
        (["--adapter", "lora", "--rule", "hft"], "got rule hft: use rule none"),
        (["--adapter", "dora"], "adapter must be one of , lora, got 'dora'"),
        (["--lora_rank", "8"], "lora_rank has no meaning without an adapter"),
        (["--lora_targets", "q_proj"], "lora_targets has no meaning without an adapter"),
        ([*LORA, "--lora_rank", "0"], "lora_rank must be at least 1, got 0"),
        ([*LORA, "--lora_dropout", "1"], r"lora_dropout must be in \[0, 1\), got 1.0"),
        ([*LORA, "--lora_targets", "q_proj", "qproj"], "named 'qproj'; did you mean q_proj?"),
        ([*LORA, "--lora_targets", "lm_head"], "no linear layer before the head is named 'lm_head'"),
        ([*LORA, "--lora_targets", "embed_tokens"], "no linear layer before the head is named 'embed_tokens'"),
    ],
)
def test_what_has_no_meaning_is_refused(tmp_path, train_args, words, message):
    with pytest.raises(UserError, match=message):
        train.main(train_args(tmp_path / "run", *words, "--dry_run"))


def test_tied_weights_stay_tied(tmp_path, train_args):
    model = make_model(tmp_path / "model", tie_word_embeddings=True)
    train.main(train_args(tmp_path / "run", *LORA, "--model", str(model), "--max_steps", "2"))
    assert weights(tmp_path / "run").keys() == load_file(model / "model.safetensors").keys()
