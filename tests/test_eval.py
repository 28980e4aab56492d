"""Scores: extraction rules, generation, resumption: pytest tests/test_eval.py"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model, write_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
from common import config
from common.errors import UserError
from common.hub import identity
from evaluation import generation
from tasks import TASKS
from tasks.math import METAMATH_STOP, metamath_prompt
from tasks.task import Format

# --- generation ------------------------------------------------------------------------------------------------------


def items_file(folder, n=7):
    rows = [{"question": f"What is {'9' * (i % 4)}{i}?", "answer": f"#### {i}"} for i in range(n)]
    return write_rows(folder / "items.jsonl", rows)


def args(tmp_path, model_dir, *more, out="eval"):
    return [
        "--model", str(model_dir), "--tasks", f"gsm8k={tmp_path / 'items.jsonl'}", "--dtype", "float32",
        "--batch_size", "3", "--output_dir", str(tmp_path / out), *more,
    ]  # fmt: skip


def stored(folder):
    return [json.loads(line) for line in (folder / "gsm8k.metamath.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setitem(TASKS, "gsm8k", dataclasses.replace(TASKS["gsm8k"], max_new_tokens=24))


def test_batched_generation_is_greedy_decoding_of_each_prompt(tmp_path, model_dir, exact):
    """Left padding, sorting and batching against one prompt at a time and one argmax at a time."""
    items_file(tmp_path)
    scores = evaluation.main(args(tmp_path, model_dir))
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    lines = stored(tmp_path / "eval")
    assert [line["id"] for line in lines] == list(range(7))
    for line in lines:
        assert (
            line["prompt"] == metamath_prompt(line["item"]["question"])
            and line["prompt_ids"] == tokenizer(line["prompt"])["input_ids"]
        )
        ids = list(line["prompt_ids"])
        while len(ids) < len(line["prompt_ids"]) + 24:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
        new = ids[len(line["prompt_ids"]) :]
        assert line["completions"] == [tokenizer.decode(new[:-1] if new[-1] == 1 else new)]
        assert line["finish"] == ["eos" if new[-1] == 1 else "length"]
    entry = scores["gsm8k.metamath"]
    assert entry["n"] == 7 and entry["cut_at_length"] == sum(line["finish"] == ["length"] for line in lines)
    assert json.loads((tmp_path / "eval" / "scores.json").read_text())["gsm8k.metamath"]["score"] == entry["score"]


class Scripted:
    """A tokenizer whose ids are characters, for `decode_completion`."""

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("new", "completion", "tokens", "why"),
    [
        ("abc\0\0\0", "abc", 3, "eos"),
        ("abc", "abc", 3, "length"),
        ("\0", "", 0, "eos"),
        ("a Question: b", "a ", 13, "stop"),
        ("a USERResponse\0", "a ", 14, "stop"),
        (" lead", " lead", 5, "length"),
    ],
)
def test_decode_completion(new, completion, tokens, why):
    scripted = generation.Model(None, Scripted(), frozenset({0}), 0, 512)
    got = generation.decode_completion(
        scripted, [65, 66], [ord(c) for c in new], generation.Decoding(99, METAMATH_STOP)
    )
    assert got == {"completion": completion, "tokens": tokens, "finish": why}


def test_a_row_stops_soon_after_a_stop_string(tmp_path, model_dir):
    """A model that says `Question` again and again is stopped, and its text is cut before the word."""
    folder = make_model(tmp_path / "parrot")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    word = tokenizer(" xQuestion")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    calls = []

    def forward(self=model, **kwargs):
        logits = torch.full((1, 1, model.config.vocab_size), -10.0)
        logits[0, 0, word[len(calls) % len(word)]] = 10.0
        calls.append(1)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(logits=logits)

    model.forward = forward
    ready = generation.Model(model, tokenizer, frozenset({1}), 2, 512)
    long = generation.Decoding(300, METAMATH_STOP)
    (got,) = generation.generate(ready, [tokenizer("q")["input_ids"]], long, ["0"], 1)
    assert got["completion"] == " x" and got["finish"] == "stop" and len(calls) <= 20


def test_a_prompt_beyond_the_context_is_counted_and_wrong(tmp_path):
    model = make_model(tmp_path / "m", max_position_embeddings=200)
    rows = [{"question": "1?", "answer": "#### 1"}, {"question": "x" * 200, "answer": "#### 1"}]
    write_rows(tmp_path / "items.jsonl", rows)
    entry = evaluation.main(args(tmp_path, model))["gsm8k.metamath"]
    assert entry["prompt_too_long"] == 1 and entry["n"] == 2
    assert [line["finish"] == ["too_long"] for line in stored(tmp_path / "eval")] == [False, True]


# --- scores, resumption ----------------------------------------------------------------------------------------------


def test_score_and_standard_error(tmp_path, model_dir):
    items_file(tmp_path, 5)
    evaluation.main(args(tmp_path, model_dir))
    lines = stored(tmp_path / "eval")
    for line in lines[:2]:
        line["completions"] = [f"The answer is: {line['id']}"]
    (tmp_path / "eval" / "gsm8k.metamath.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--tasks", "gsm8k", "--score_only", "--output_dir", str(tmp_path / "eval")]
    entry = evaluation.main(words)["gsm8k.metamath"]  # without model and data
    assert (entry["score"], entry["n"]) == (0.4, 5)
    assert entry["standard_error"] == pytest.approx((0.4 * 0.6 / 4) ** 0.5)
    assert [line["correct"] for line in stored(tmp_path / "eval")] == [True, True, False, False, False]


def test_the_process_group_ends_before_the_scores_are_computed(tmp_path, model_dir, monkeypatch):
    """Programs may run for long on the main process, while the others have nothing to wait for."""
    items_file(tmp_path, 2)
    calls, score = [], evaluation.score_answers
    monkeypatch.setattr(Accelerator, "end_training", lambda self: calls.append("end"))
    monkeypatch.setattr(evaluation, "score_answers", lambda *a: calls.append("score") or score(*a))
    evaluation.main(args(tmp_path, model_dir))
    assert calls == ["end", "score"]


def test_limit_takes_the_first_items(tmp_path, model_dir):
    items_file(tmp_path)
    assert evaluation.main(args(tmp_path, model_dir, "--limit", "2"))["gsm8k.metamath"]["n"] == 2
    assert [line["item"]["answer"] for line in stored(tmp_path / "eval")] == ["#### 0", "#### 1"]


def test_a_cut_run_goes_on_and_a_finished_one_is_reused(tmp_path, model_dir, monkeypatch):
    items_file(tmp_path)
    evaluation.main(args(tmp_path, model_dir, out="whole"))
    generate, calls = generation.generate, []

    def cut(*a):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*a)

    monkeypatch.setattr(generation, "generate", cut)
    monkeypatch.setattr(evaluation, "BATCHES_PER_BLOCK", 1)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(args(tmp_path, model_dir))
    evaluation.main(args(tmp_path, model_dir))
    assert len(calls) == 4  # two before the cut, the cut one, and only the last batch again
    assert stored(tmp_path / "eval") == stored(tmp_path / "whole")
    evaluation.main(args(tmp_path, model_dir))
    assert len(calls) == 4


def test_other_settings_over_old_results_are_refused(tmp_path, model_dir):
    items_file(tmp_path)
    evaluation.main(args(tmp_path, model_dir))
    with pytest.raises(
        UserError, match=r"results of other settings: .*batch_size: 3 -> 4 \(--overwrite deletes them\)"
    ):
        evaluation.main(args(tmp_path, model_dir, "--batch_size", "4"))
    evaluation.main(args(tmp_path, model_dir, "--batch_size", "4", "--overwrite"))
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="model:"):
        evaluation.main(args(tmp_path, other, "--batch_size", "4"))
    # the same folder with new weights, as after a second training
    again = make_model(tmp_path / "again", seed=2)
    evaluation.main(args(tmp_path, again, out="e2"))
    make_model(tmp_path / "again", seed=3)
    with pytest.raises(UserError, match="model_files:"):
        evaluation.main(args(tmp_path, again, out="e2"))


def test_scores_of_other_weights_do_not_stay_beside_new_ones(tmp_path, model_dir):
    """Two tasks, a second training into the same folder, and one of the tasks again; or another model's task."""
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "Some text."}])
    two = [*args(tmp_path, again := make_model(tmp_path / "again", seed=2))]
    items_file(tmp_path)
    evaluation.main(two)
    loss = ["--model", str(again), "--tasks", f"text_loss={texts}", "--output_dir", str(tmp_path / "eval")]
    evaluation.main(loss)
    (tmp_path / "eval" / "gsm8k.metamath.jsonl").unlink()  # the answers may go, their scores stay
    evaluation.main(loss)
    assert len(json.loads((tmp_path / "eval" / "scores.json").read_text())) == 2
    make_model(tmp_path / "again", seed=3)
    with pytest.raises(
        UserError, match=r"other settings: gsm8k.metamath: model_files: .*; text_loss.peft: model_files"
    ):
        evaluation.main(loss)
    evaluation.main([*loss, "--overwrite"])
    for file in ("scores.json", "settings.json"):
        assert list(json.loads((tmp_path / "eval" / file).read_text())) == ["text_loss.peft"]
    assert not (tmp_path / "eval" / "gsm8k.metamath.jsonl").exists()
    with pytest.raises(UserError, match=r"other settings: text_loss.peft: model: "):
        evaluation.main(args(tmp_path, model_dir))


def test_scores_of_other_weights_go_also_where_their_overwrite_was_cut(tmp_path, monkeypatch):
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "Some text."}])
    items_file(tmp_path)
    both = [*args(tmp_path, again := make_model(tmp_path / "again", seed=2))]
    both[both.index("--tasks") + 1 : both.index("--tasks") + 1] = [f"text_loss={texts}"]
    evaluation.main(both)
    make_model(tmp_path / "again", seed=3)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(evaluation, "score_answers", raise_interrupt)
        evaluation.main([*both, "--overwrite"])
    assert json.loads((tmp_path / "eval" / "scores.json").read_text()) == {}
    evaluation.main(args(tmp_path, again))
    assert list(json.loads((tmp_path / "eval" / "scores.json").read_text())) == ["gsm8k.metamath"]


def test_the_revision_of_a_hub_model_is_known_before_its_settings_are_told(tmp_path, model_dir, monkeypatch):
    """Also with a tokenizer from elsewhere: else the cache tells it only once the weights are there."""
    items_file(tmp_path)
    asked = []

    class Stop(Exception):
        pass

    def describe(*_):
        raise Stop

    ask = evaluation.from_pretrained
    monkeypatch.setattr(
        evaluation, "from_pretrained", lambda cls, name, *a: asked.append((cls, name)) or ask(cls, str(model_dir), *a)
    )
    monkeypatch.setattr(evaluation.settings, "describe", describe)
    with pytest.raises(Stop):
        evaluation.main(args(tmp_path, "owner/name", "--tokenizer", str(model_dir)))
    assert asked == [(AutoTokenizer, str(model_dir)), (AutoConfig, "owner/name")]


def test_a_card_that_is_just_being_written_is_no_other_model(tmp_path, model_dir):
    """By another eval.py, of the same model into another folder."""
    model = shutil.copytree(model_dir, tmp_path / "m")
    before = identity(str(model))
    (model / "README.md.aside").touch()
    (model / "README.md").write_text("scores")
    assert identity(str(model)) == before
    (model / "model.safetensors").touch()
    assert identity(str(model)) != before


def raise_interrupt(*_):
    raise KeyboardInterrupt


def test_a_format_that_a_task_does_not_know_is_said(tmp_path, model_dir, monkeypatch, capsys):
    items_file(tmp_path)
    formats = {**TASKS["text_loss"].formats, "tulu": TASKS["text_loss"].formats["base"]}
    monkeypatch.setitem(TASKS, "text_loss", dataclasses.replace(TASKS["text_loss"], formats=formats))
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "Some text."}])
    words = args(tmp_path, model_dir, "--prompt_format", "tulu")
    words[words.index("--tasks") + 1 : words.index("--tasks") + 1] = [f"text_loss={texts}"]
    evaluation.main(words)
    out = capsys.readouterr().out
    assert "gsm8k does not know prompt_format tulu: it keeps alpaca" in out and "text_loss does not" not in out


def test_nothing_stale_is_reused(tmp_path, monkeypatch):
    """Another prompt, another tokenizer, weights in another format, no record of the settings: all are refused."""
    items_file(tmp_path, 3)
    model = make_model(tmp_path / "m")
    evaluation.main(args(tmp_path, model))
    formats = {"alpaca": Format(lambda item, tokenizer: item["question"], METAMATH_STOP)}
    other = dataclasses.replace(TASKS["gsm8k"], formats=formats)
    with monkeypatch.context() as m, pytest.raises(UserError, match="prompts_sha256"):
        m.setitem(TASKS, "gsm8k", other)
        evaluation.main(args(tmp_path, model))
    (model / "pytorch_model.bin").write_bytes(b"new")
    with pytest.raises(UserError, match="model_files"):
        evaluation.main(args(tmp_path, model))
    (model / "pytorch_model.bin").unlink()
    evaluation.main(args(tmp_path, model))
    (tmp_path / "eval" / "settings.json").unlink()
    with pytest.raises(UserError, match=r"gsm8k.metamath: not known, settings.json has no entry"):
        evaluation.main(args(tmp_path, model))
    (tmp_path / "eval" / "settings.json").write_text("{cut")
    with pytest.raises(UserError, match="settings.json: missing or damaged"):
        evaluation.main(args(tmp_path, model))


def test_a_tokenizer_that_adds_eos_does_not_end_the_prompt(tmp_path):
    from tokenizers.processors import TemplateProcessing

    items_file(tmp_path, 1)
    model = make_model(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(model)
    ends = [("<bos>", 0), ("<eos>", 1)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    tokenizer.save_pretrained(model)
    evaluation.main(args(tmp_path, model))
    ids = stored(tmp_path / "eval")[0]["prompt_ids"]
    assert ids[0] == 0 and ids.count(0) == 1 and 1 not in ids


def test_a_long_prompt_does_not_cut_the_answers_of_its_batch(tmp_path, exact):
    model = make_model(tmp_path / "m", max_position_embeddings=220)
    rows = [{"question": "x" * n, "answer": "#### 1"} for n in (1, 45, 45, 2)]  # room for all 24 tokens, or for 5
    write_rows(tmp_path / "items.jsonl", rows)
    evaluation.main(args(tmp_path, model, "--batch_size", "4"))
    evaluation.main(args(tmp_path, model, "--batch_size", "1", out="single"))
    together, alone = stored(tmp_path / "eval"), stored(tmp_path / "single")
    assert together == alone and [line["finish"] for line in alone] == [["length"]] * 4
    assert alone[0]["tokens"] == alone[3]["tokens"] == [24] > alone[1]["tokens"] == alone[2]["tokens"] > [0]


def test_data_dir_holds_a_copy_of_each_benchmark(tmp_path, model_dir):
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    items_file(tmp_path / "data" / "gsm8k", 2).rename(tmp_path / "data" / "gsm8k" / "test.jsonl")
    words = ["--model", str(model_dir), "--tasks", "gsm8k", "--data_dir", str(tmp_path / "data"), "--dtype", "float32"]
    assert evaluation.main([*words, "--output_dir", str(tmp_path / "e")])["gsm8k.metamath"]["n"] == 2


def test_the_hub_is_asked_for_the_right_split(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or 1 / 0)
    with pytest.raises(UserError, match=r"dataset openai/gsm8k, split test: no local path, and neither Hub nor cache"):
        evaluation.choose_tasks(config.EvalConfig(["gsm8k"], "o"))[0].load_items(0)
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]


def test_every_key_of_eval_is_used():
    files = [Path(evaluation.__file__), *Path(generation.__file__).parent.glob("*.py")]
    source = "".join(file.read_text() for file in files)
    for field in dataclasses.fields(config.EvalConfig):
        assert f"config.{field.name}" in source, field.name
