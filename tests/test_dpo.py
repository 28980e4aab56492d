"""DPO: its loss, pairs of answers, the reference, and the loop that it shares with SFT: pytest tests/test_dpo.py"""

import json
import math
import random
import re
import shutil

import pytest
import torch
from conftest import make_model, read_metrics, write_rows
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
)

import gmt
import train
from common import run_folder, sources, templates
from common.config import TrainConfig, parse
from common.errors import UserError
from training import data, losses, objectives, plan, reference, resume


@pytest.fixture(scope="module")
def pairs():
    """12 rows: prompt, chosen, rejected, of unequal lengths."""
    rng = random.Random(0)
    text = lambda most: "".join(rng.choice("abcdefg ") for _ in range(rng.randint(2, most))).strip() + "."  # noqa: E731
    return [
        {"prompt": f"{i}: {text(20)}", "chosen": f" yes {text(30)}", "rejected": f" no {text(50)}"} for i in range(12)
    ]


@pytest.fixture(scope="module")
def pairs_file(pairs, tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pairs)


@pytest.fixture
def dpo_args(model_dir, pairs_file):
    def words(output_dir, *more):
        return [
            "--model", str(model_dir), "--dataset", str(pairs_file), "--output_dir", str(output_dir), "--objective",
            "dpo", "--template", "prompt_response", "--rule", "none", "--epochs", "3", "--global_batch_size", "4",
            "--learning_rate", "1e-3", "--mixed_precision", "fp32", "--max_length", "128", *more,
        ]  # fmt: skip

    return words


def tokenised(rows, tokenizer, template, tmp_path, max_length=128, overlong="truncate"):
    kind, path = templates.TEMPLATES[template], str(write_rows(tmp_path / "rows.jsonl", rows))
    columns, conversations = templates.columns(kind, True)
    optional = templates.optional_columns(kind, True, tokenizer)
    rows = sources.load_rows(path, columns, conversations=conversations, optional=optional)
    return data.tokenise(rows, tokenizer, template, max_length, overlong, 1, preferences=True)


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", [False, True])
def test_loss_equals_its_formula(normalised):
    rng = random.Random(1)
    rows = [[rng.uniform(-60, -1) for _ in range(4)] + [rng.randint(1, 40) for _ in range(2)] for _ in range(9)]
    expected, rewards = [], []
    for pc, pr, rc, rr, nc, nr in rows:
        r = [0.3 * (pc - rc) / (nc if normalised else 1), 0.3 * (pr - rr) / (nr if normalised else 1)]
        expected.append(math.log1p(math.exp(-(r[0] - r[1]))))
        rewards.append(r)
    table = torch.tensor(rows, dtype=torch.float64)
    losses, got = objectives.dpo_losses(table[:, :2], table[:, 2:4], 0.3, table[:, 4:] if normalised else None)
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert got.flatten().tolist() == pytest.approx([x for r in rewards for x in r], rel=1e-12)


@pytest.mark.parametrize("normalised", [False, True])
def test_losses_rewards_and_gradients_are_those_of_trl(normalised, tmp_path, pairs, model_dir):
    trl = pytest.importorskip("trl")
    other = make_model(tmp_path / "reference", seed=5)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # noqa: E731

    # ours: one batch of all pairs
    examples = tokenised(pairs, tokenizer, "prompt_response", tmp_path)
    policy, reference, ids = load(model_dir), load(other), list(range(len(pairs)))
    batch = data.collate(examples, [[i] for i in ids])
    for model in (policy, reference):
        losses.attach_loss(model, 0)
    tokens = torch.from_numpy(examples.sequence_trained)
    with torch.no_grad():
        logps = objectives.sequence_logps(reference(**batch), tokens)
    loss, metrics = objectives.DPO(examples, logps, 0.3, normalised)(policy(**batch), ids)
    (loss / len(ids)).backward()
    ours = {name: p.grad for name, p in policy.named_parameters()}
    metrics = dict(zip(objectives.DPO.metrics, (float(m) / len(ids) for m in metrics), strict=True))

    # theirs: one step of that batch
    theirs = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            theirs.update({name: p.grad.clone() for name, p in model.named_parameters()})

    args = trl.DPOConfig(
        str(tmp_path / "trl"), per_device_train_batch_size=len(pairs), max_steps=1, beta=0.3, max_grad_norm=0,
        loss_type=["sigmoid_norm" if normalised else "sigmoid"], report_to="none", save_strategy="no", use_cpu=True,
        disable_tqdm=True, logging_steps=1, bf16=False, gradient_checkpointing=False, max_length=128,
        disable_dropout=True,
    )  # fmt: skip
    rows = Dataset.from_list(pairs)
    trainer = trl.DPOTrainer(load(model_dir), load(other), args, train_dataset=rows, processing_class=tokenizer)
    trainer.add_callback(Look())
    trainer.train()
    log = next(line for line in trainer.state.log_history if "rewards/chosen" in line)
    assert float(loss) / len(ids) == pytest.approx(log["loss"], rel=1e-4)  # logged with four digits
    if not normalised:  # TRL logs rewards without the lengths
        assert log["rewards/accuracies"] == pytest.approx(metrics["reward_accuracy"])
        for name in ("chosen", "rejected"):
            assert metrics[f"reward_{name}"] == pytest.approx(log[f"rewards/{name}"], rel=1e-5, abs=1e-5)
        assert metrics["reward_margin"] == pytest.approx(log["rewards/margins"], rel=1e-5, abs=1e-5)
    assert ours.keys() == theirs.keys()
    for name, g in ours.items():
        assert (g - theirs[name]).norm() / g.norm() < 1e-5, name


# --- pairs of answers ------------------------------------------------------------------------------------------------


def conversation(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def test_an_explicit_prompt_stands_in_front_of_both_answers(tmp_path, model_dir):
    """TRL's explicit format, with messages or the user's text as prompt, gives the tokens of the implicit one."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    system, chosen, rejected = {"role": "system", "content": "s"}, conversation("q", "good"), conversation("q", "bad")
    implicit = [
        {"chosen": chosen, "rejected": rejected},
        {"chosen": [system, *chosen], "rejected": [system, *rejected]},
    ]
    answers = {"chosen": chosen[1:], "rejected": rejected[1:]}
    explicit = [{"prompt": chosen[:1], **answers}, {"prompt": [system, *chosen[:1]], **answers}]
    expected = tokenised(implicit, tokenizer, "tulu", tmp_path).rows.to_list()
    assert "q" in tokenizer.decode(expected[0]["input_ids"])
    behind_system = {column: [system, *answer] for column, answer in answers.items()}
    nulls = [{**chosen[0], "name": None, "tool_calls": None}]  # as Dataset.to_json writes them
    for rows in (
        explicit,
        [{"prompt": nulls, **answers}, {"prompt": "q", **behind_system}],
        [{"prompt": nulls, "chosen": [*nulls, *chosen[1:]], "rejected": [*nulls, *rejected[1:]]}, explicit[1]],
        [{"prompt": "q", **answers}, explicit[1]],
        [{"prompt": "q", **implicit[0]}, {"prompt": [system, *chosen[:1]], **implicit[1]}],  # said twice, as on the Hub
    ):
        assert tokenised(rows, tokenizer, "tulu", tmp_path).rows.to_list() == expected
    with pytest.raises(UserError, match="1 with no prompt"):
        tokenised([answers], tokenizer, "tulu", tmp_path)
    with pytest.raises(UserError, match="column 'prompt' must be a list of {role, content}, got dict"):
        tokenised([{"prompt": system, **answers}], tokenizer, "tulu", tmp_path)
    both = {"prompt": "Human: q Assistant:", "chosen": "Human: q Assistant: a", "rejected": "Human: q Assistant: b"}
    with pytest.raises(UserError, match="1 with answers that repeat the prompt"):
        tokenised([both], tokenizer, "prompt_response", tmp_path)
    with pytest.raises(UserError, match="column 'chosen' must be a list .*, got str: texts need template prompt_respo"):
        tokenised([both], tokenizer, "tulu", tmp_path)
    with pytest.raises(UserError, match="column 'prompt' must be text, got list: messages need template tulu or chat"):
        tokenised(explicit, tokenizer, "prompt_response", tmp_path)


def test_a_prompt_is_not_said_twice(tmp_path, model_dir):
    """What differs from the conversation's beginning by blanks, or by the system's message, is no other prompt."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    system, chosen, rejected = {"role": "system", "content": "s"}, conversation("q", "good"), conversation("q", "bad")
    whole = {"chosen": chosen, "rejected": rejected}
    blank = {"role": "user", "content": "q ", "name": "x"}
    behind = {"chosen": [system, *chosen], "rejected": [system, *rejected]}
    for prompt, expected in (([system, chosen[0]], behind), ([blank], whole), ([system], behind), ([], whole)):
        rows = [{"prompt": prompt, **whole}], [expected]
        found, implicit = (tokenised(x, tokenizer, "tulu", tmp_path).rows.to_list() for x in rows)
        assert found == implicit, prompt
    for prompt, answers in (([chosen[0]], behind), ([blank], behind)):  # the system's message in the answers alone
        rows = [{"prompt": prompt, **answers}], [behind]
        found, implicit = (tokenised(x, tokenizer, "tulu", tmp_path).rows.to_list() for x in rows)
        assert found == implicit, prompt
    call = [*conversation("q", "call"), {"role": "tool", "content": "1"}, {"role": "assistant", "content": "good"}]
    assert templates._with_prompt(call[:2], call[2:]) == call
    more = {"chosen": conversation("q", "a", "r", "good")[1:], "rejected": conversation("q", "a", "r", "bad")[1:]}
    (row,) = tokenised([{"prompt": chosen[:1], **more}], tokenizer, "tulu", tmp_path).rows.to_list()
    assert tokenizer.decode(row["input_ids"]).count("<|user|>\nq\n") == 2  # once for each answer
    with pytest.raises(UserError, match="1 with a prompt that its answers do not begin with"):
        tokenised([{"prompt": conversation("p"), **whole}], tokenizer, "tulu", tmp_path)
    with pytest.raises(UserError, match="1 with a prompt that its answers do not begin with"):
        tokenised([{"prompt": [{**system, "content": "t"}], **behind}], tokenizer, "tulu", tmp_path)


def test_answers_that_begin_as_a_rows_input_does_are_kept(tmp_path, model_dir):
    row = {"instruction": "Go on.", "input": "a", "chosen": "a b", "rejected": "a c"}
    examples = tokenised([row], AutoTokenizer.from_pretrained(model_dir), "alpaca", tmp_path, 512)
    assert len(examples) == 1


def test_of_a_conversation_the_last_answer_is_trained(tmp_path, model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = [{"chosen": conversation("q", "a", "r", "good"), "rejected": conversation("q", "a", "r", "bad one")}]
    examples = tokenised(rows, tokenizer, "tulu", tmp_path)
    row, (first, _) = examples.rows[0], examples.sequence_lengths[0]
    head = "<|user|>\nq\n<|assistant|>\na<eos>\n<|user|>\nr\n<|assistant|>\n"
    assert tokenizer.decode(row["input_ids"]) == f"{head}good<eos>{head}bad one<eos>"
    trained = [t for t in row["labels"] if t != templates.IGNORE]
    assert tokenizer.decode(trained) == "good<eos>bad one<eos>" and examples.sequence_trained.tolist() == [[5, 8]]
    assert tokenizer.decode(row["input_ids"][:first]).endswith("good<eos>")


def test_pairs_that_cannot_be_compared_are_left_out_and_counted(tmp_path, model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    make = lambda chosen, rejected: {"chosen": conversation(*chosen), "rejected": conversation(*rejected)}  # noqa: E731
    rows = [
        make(("q", "a"), ("q", "b")),
        make(("q", "a"), ("q", " a ")),
        make(("q", "a"), ("q", "")),
        make(("q", "a"), ("p", "b")),
        make(("q", "a"), ("q", "b", "c")),
        make(("", "a"), ("", "b")),
        make(("q" * 200, "a"), ("q" * 200, "b")),
        make(("q", "a" * 300), ("q", "b")),
        make(("q", "a" * 300 + "1"), ("q", "a" * 300 + "2")),
    ]
    examples = tokenised(rows, tokenizer, "tulu", tmp_path)
    assert examples.left_out == {
        "equal answers": 1, "an empty answer": 1, "different prompts": 1, "no answer at the end": 1,
        "an empty message": 1, "no token to train on within max_length": 1, "equal answers within max_length": 1,
    }  # fmt: skip
    assert (len(examples), examples.truncated) == (2, 1)
    # the text columns of a template with a prompt of its own
    texts = [{"query": "q\nmore", "chosen": "a", "rejected": "b"}, {"query": "q", "chosen": "a", "rejected": " a"}]
    examples = tokenised(texts, tokenizer, "metamath", tmp_path, 400)
    assert examples.left_out == {"equal answers": 1}
    assert "### Input:\nmore\n\n### Response:b<eos>" in tokenizer.decode(examples.rows[0]["input_ids"])


def test_each_answer_has_its_own_row_or_its_own_positions(tmp_path, pairs, model_dir):
    examples = tokenised(pairs[:2], AutoTokenizer.from_pretrained(model_dir), "prompt_response", tmp_path)
    (a, b), (c, d) = examples.sequence_lengths.tolist()
    apart = data.collate(examples, [[0], [1]])
    assert apart["input_ids"].shape == (4, max(a, b, c, d))
    ids = [examples.rows[i]["input_ids"] for i in (0, 1)]
    assert apart["input_ids"][1, :b].tolist() == ids[0][a:] and apart["input_ids"][2, :c].tolist() == ids[1][:c]
    packed = data.collate(examples, [[0, 1]], packed=True)
    assert packed["input_ids"].tolist() == [ids[0] + ids[1]]
    assert packed["position_ids"][0].tolist() == [*range(a), *range(b), *range(c), *range(d)]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    losses.attach_loss(model, 0)
    assert torch.allclose(model(**apart), model(**packed), atol=1e-10)
    assert examples.padded_lengths(False).tolist() == [2 * max(a, b), 2 * max(c, d)]


# --- the loop --------------------------------------------------------------------------------------------------------


def test_at_step_0_the_policy_is_the_reference_and_then_the_margin_grows(tmp_path, dpo_args):
    train.main(dpo_args(tmp_path / "run", "--rule", "gmt", "--keep_ratio", "0.3", "--eval_rows", "3", "--epochs", "6"))
    lines = read_metrics(tmp_path / "run")
    assert lines[0]["loss"] == math.log(2)
    names = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy", "implicit_kl")
    assert all(lines[0][name] == 0.0 for name in names)
    held = {name: lines[-1][f"eval_{name}"] for name in names}  # of the held-out pairs
    assert held["reward_margin"] == pytest.approx(held["reward_chosen"] - held["reward_rejected"])
    assert held["reward_accuracy"] in (0, 1 / 3, 2 / 3, 1) and held["implicit_kl"] != lines[-1]["implicit_kl"]
    assert lines[-2]["eval_loss"] is None and "eval_reward_margin" not in lines[-2]
    assert lines[-1]["reward_margin"] > 0.05 and lines[-1]["loss"] < 0.67 and lines[-1]["reward_accuracy"] == 1.0
    assert lines[-1]["eval_loss"] != math.log(2) and abs(lines[-1]["eval_loss"] - math.log(2)) < 0.2
    reward = lines[-1]["reward_chosen"] + lines[-1]["reward_rejected"]
    assert lines[-1]["implicit_kl"] == pytest.approx(reward / 2 / 0.1)
    logps = load_file(tmp_path / "run" / "reference.safetensors")
    assert logps["0"].shape == (9, 2) and logps["1"].shape == (3, 2) and all((x < 0).all() for x in logps.values())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon"])
def test_the_policy_has_no_dropout_since_the_reference_has_none(tmp_path, dpo_args, kind):
    """In Llama it is a number of the attention, in GPT-2 modules of their own, in Falcon read from the configuration.

    config.json keeps what it says.
    """
    base = make_model(tmp_path / "base", attention_dropout=0.3)
    if kind == "gpt2":
        shape = {"vocab_size": 259, "n_positions": 256, "n_embd": 32, "n_layer": 1, "n_head": 2, "eos_token_id": 1}
        GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0)).save_pretrained(base)
    if kind == "falcon":
        shape = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        rates = {"hidden_dropout": 0.3, "attention_dropout": 0.3, "bos_token_id": 0, "eos_token_id": 1}
        FalconForCausalLM(FalconConfig(**shape, **rates)).save_pretrained(base)
    words = ["--model", str(base), "--gradient_checkpointing", "true", "--eval_rows", "2", "--eval_every", "1"]
    train.main(dpo_args(tmp_path / "run", *words, "--learning_rate", "1e-12", "--max_steps", "2"))
    for line in read_metrics(tmp_path / "run"):
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-6) and abs(line["implicit_kl"]) < 1e-4
    before, after = (json.loads((f / "config.json").read_text()) for f in (base, tmp_path / "run" / "final"))
    name = "resid_pdrop" if kind == "gpt2" else "attention_dropout"
    assert before[name] == after[name] > 0


def test_step_0_in_bf16(tmp_path, dpo_args):
    train.main(dpo_args(tmp_path / "run", "--mixed_precision", "bf16", "--max_steps", "1"))
    (line,) = read_metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-2) and line["reward_margin"] == pytest.approx(0, abs=1e-2)


def test_gradients_do_not_depend_on_splits_padding_or_packing(tmp_path, dpo_args, monkeypatch):
    grads, whole = [], gmt.Masker.mask_gradients

    def keep(self, step, **kwargs):
        if step == 1:  # at step 0 all pairs weigh the same
            grads.append(torch.cat([p.grad.flatten().clone() for p in self.eligible.values()]))
        return whole(self, step, **kwargs)

    monkeypatch.setattr(gmt.Masker, "mask_gradients", keep)
    for i, more in enumerate(
        [[], ["--per_device_batch_size", "1"], ["--per_device_batch_size", "3"], ["--packing", "on"]]
    ):
        sizes = ["--global_batch_size", "6", "--max_grad_norm", "0", "--max_steps", "2", "--adam_epsilon", "1"]
        train.main(dpo_args(tmp_path / str(i), *sizes, *more))
    for g in grads[1:]:
        assert (g - grads[0]).norm() / grads[0].norm() < 2e-6


@pytest.mark.parametrize("rule", [["none"], ["gmt", "--keep_ratio", "0.3"]], ids=lambda r: r[0])
def test_resume_is_bitwise_and_the_reference_is_not_computed_again(tmp_path, dpo_args, monkeypatch, rule):
    more = ["--rule", *rule, "--save_every", "4", "--eval_rows", "3"]
    train.main(dpo_args(tmp_path / "whole", *more))

    class Cut(Exception):
        pass

    write = run_folder.Log.write

    def cut(self, line):
        write(self, line)
        if line["step"] == 6:
            raise Cut

    with monkeypatch.context() as m:
        m.setattr(run_folder.Log, "write", cut)
        with pytest.raises(Cut):
            train.main(dpo_args(tmp_path / "cut", *more))
    made, make = [], reference.compute
    monkeypatch.setattr(reference, "compute", lambda *args: made.append(1) or make(*args))
    train.main(dpo_args(tmp_path / "cut", *more, "--resume"))
    assert not made
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")
    a, b = (load_file(tmp_path / f / "final" / "model.safetensors") for f in ("cut", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in b)
    # a damaged file is computed anew, from the model that training began with
    (tmp_path / "cut" / "reference.safetensors").write_bytes(b"?")
    whole = load_file(tmp_path / "whole" / "reference.safetensors")
    (tmp_path / "cut" / "final" / "COMPLETED").unlink()
    train.main(dpo_args(tmp_path / "cut", *more, "--resume"))
    again = load_file(tmp_path / "cut" / "reference.safetensors")
    assert made and all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_resumed_run_is_refused_another_reference(tmp_path, dpo_args, model_dir, monkeypatch):
    """The reference is the model that training began with; scores in its card change nothing."""
    base = tmp_path / "base"
    shutil.copytree(model_dir, base)
    words = [*dpo_args(tmp_path / "run", "--max_steps", "2", "--save_every", "1"), "--model", str(base)]
    train.main(words)
    (tmp_path / "run" / "final" / "COMPLETED").unlink()
    (base / "README.md").write_text("with scores")
    monkeypatch.setattr(reference, "compute", lambda *args: pytest.fail("computed again"))
    train.main([*words, "--resume"])
    shutil.copytree(make_model(tmp_path / "retrained", seed=5), base, dirs_exist_ok=True)
    monkeypatch.setattr(reference, "compute", lambda *args: pytest.fail("computed again"))
    with pytest.raises(UserError, match=r"resume: not the run that .*: model_files: '\w+' -> '\w+'"):
        train.main([*words, "--resume"])


def test_of_a_hub_model_that_is_not_here_yet_nothing_is_compared(monkeypatch):
    """On a new machine the settings are compared before the model is fetched, and once more after it."""
    config = parse(
        TrainConfig,
        ["--model", "a/b", "--dataset", "d.jsonl", "--objective", "dpo", "--output_dir", "o", "--rule", "none"],
    )
    assert "reference" not in resume.about_settings(config)
    monkeypatch.setattr(resume, "identity", lambda model: [("revision", "1")])
    assert resume.about_settings(config)["reference"]["model_files"]


def test_keys_of_dpo_change_the_training(tmp_path, dpo_args):
    runs = {"plain": [], "beta": ["--beta", "0.5"], "normalised": ["--length_normalised"]}
    lines = {}
    for name, more in runs.items():
        train.main(dpo_args(tmp_path / name, *more, "--max_steps", "4"))
        lines[name] = read_metrics(tmp_path / name)[-1]["loss"]
    assert len(set(lines.values())) == 3


def test_hft_draws_anew_for_dpo(tmp_path, dpo_args, model_dir):
    train.main(dpo_args(tmp_path / "run", "--rule", "hft", "--max_steps", "2"))
    before = load_file(model_dir / "model.safetensors")
    after = load_file(tmp_path / "run" / "final" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    assert {n for n in before if torch.equal(before[n], after[n])} == set(gmt.freeze_half(model, 0, "dpo"))


def test_bad_input(tmp_path, dpo_args, rows_file):
    with pytest.raises(UserError, match="line 1: no column 'prompt'"):
        train.main(dpo_args(tmp_path / "a", "--dataset", str(rows_file)))
    with pytest.raises(UserError, match="one answer of a pair may have max_length 9000 tokens"):
        train.main(dpo_args(tmp_path / "a", "--max_length", "9000", "--micro_batch_tokens", "16384"))
    with pytest.raises(UserError, match="beta and length_normalised are of objective dpo"):
        train.main(dpo_args(tmp_path / "a", "--objective", "sft", "--beta", "0.2"))
    with pytest.raises(UserError, match="beta must be above 0"):
        train.main(dpo_args(tmp_path / "a", "--beta", "0"))
    same = write_rows(tmp_path / "same.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "a"}] * 4)
    with pytest.raises(UserError, match="none of the 4 examples can be trained on: 4 with equal answers"):
        train.main(dpo_args(tmp_path / "a", "--dataset", str(same)))


def test_dry_run(tmp_path, dpo_args, model_dir, capsys):
    train.main(dpo_args(tmp_path / "run", "--dry_run", "--gradient_checkpointing"))
    out = capsys.readouterr().out
    assert "steps: 9 of 4 examples" in out and not (tmp_path / "run").exists()
    tokens = int(re.search(r"12 examples, ([\d,]+) tokens", out)[1].replace(",", ""))
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    steps, reference = (plan.flops_per_token(model, tokens / 12, forward_only=only) for only in (False, True))
    assert f"compute: {tokens * (3 * steps + reference):.3g} FLOPs" in out


def test_the_readme_of_the_run_says_dpo(tmp_path, dpo_args):
    train.main(dpo_args(tmp_path / "run", "--max_steps", "1"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["objective"] == "dpo"
    assert "objective" in (tmp_path / "run" / "final" / "README.md").read_text()
