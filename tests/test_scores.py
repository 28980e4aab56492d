"""From answers to scores, and results that cannot be used: pytest tests/test_scores.py"""

import contextlib
import dataclasses
import json
import statistics

import numpy as np
import pytest
from conftest import make_model, write_rows
from transformers import (
    AutoTokenizer,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MiniMaxConfig,
    RwkvConfig,
)

import eval as evaluation
from common.compatibility import refuse_unscorable
from common.errors import UserError
from evaluation import scores
from tasks import TASKS
from tasks.task import Chat, Format, Options, each


def test_mean_over_items_and_over_groups():
    values, groups = [1.0, 0.0, 1.0, 1.0, 0.5, 0.5], list("aabbbb")
    micro, macro = (scores.mean_of(values, groups, m, [1] * 6) for m in (False, True))
    assert micro["score"] == pytest.approx(4 / 6) and macro["score"] == pytest.approx((0.5 + 0.75) / 2)
    assert micro["standard_error"] == pytest.approx(statistics.stdev(values) / 6**0.5)
    by_hand = (statistics.variance([1, 0]) / 2 + statistics.variance([1, 1, 0.5, 0.5]) / 4) ** 0.5 / 2
    assert macro["standard_error"] == pytest.approx(by_hand)
    assert macro["groups"] == {"a": {"score": 0.5, "n": 2}, "b": {"score": 0.75, "n": 4}}
    single = scores.mean_of([1.0], [""], False, [1])
    assert single == {"score": 1.0, "standard_error": None, "groups": {}}


def test_a_weighted_mean_and_its_error_against_a_bootstrap():
    rng = np.random.default_rng(0)
    values, weights = rng.normal(3, 1, size=200), rng.integers(1, 700, size=200)
    got = scores.mean_of(values.tolist(), [""] * 200, False, weights.tolist())
    assert got["score"] == pytest.approx((values * weights).sum() / weights.sum())
    drawn = rng.integers(200, size=(20_000, 200))
    means = (values * weights)[drawn].sum(1) / weights[drawn].sum(1)
    assert got["standard_error"] == pytest.approx(means.std(), rel=0.03)
    equal = scores.mean_of(values.tolist(), [""] * 200, False, [7] * 200)
    assert equal["standard_error"] == pytest.approx(values.std(ddof=1) / 200**0.5)


def test_a_prompt_that_is_too_long_scores_0_whatever_the_rule_says(tmp_path):
    """A rule that takes an empty answer would count it as right."""
    task = dataclasses.replace(TASKS["bbh"], group=None, macro=False)
    lines = [
        {"id": 0, "item": {"task": "t", "target": "]"}, "completions": [""], "finish": ["too_long"]},
        {"id": 1, "item": {"task": "t", "target": "]"}, "completions": [""], "finish": ["eos"]},
    ]
    got = scores.score(write_rows(tmp_path / "a.jsonl", lines), task, "base", None, Options())
    assert (got["score"], got["prompt_too_long"]) == (0.5, 1)
    lines = [{"id": 0, "item": {"correct": ["a"], "incorrect": ["b"], "best": "a"}, "logprobs": None}]
    got = scores.score(write_rows(tmp_path / "a.jsonl", lines), TASKS["truthfulqa"], "base", None, Options())
    assert (got["score"], got["prompt_too_long"]) == (0, 1)


def test_judges_get_all_answers_with_the_prompts_format(tmp_path):
    seen = []

    def judge(items, answers, options):
        seen.append((items, [(a["completions"], a["format"]) for a in answers], options))
        return [{"correct": 0.25, "timeouts": 2, "crashes": 1, "extracted": None}, {"correct": True}]

    task = dataclasses.replace(TASKS["gsm8k"], judge=judge, metrics=("correct",))
    lines = [{"item": {"n": i}, "completions": [str(i)], "finish": ["length"]} for i in range(2)]
    path = write_rows(tmp_path / "a.jsonl", lines)
    got = scores.score(path, task, "tulu", None, Options(3))
    assert seen == [([{"n": 0}, {"n": 1}], [(["0"], "tulu"), (["1"], "tulu")], Options(3))]
    assert (got["score"], got["timeouts"], got["crashes"], got["nothing_extracted"], got["cut_at_length"]) == (
        0.625, 2, 1, 1, 2,
    )  # fmt: skip
    assert [line["correct"] for line in scores.read_lines(path)] == [0.25, True]


# --- results that cannot be used -------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path, model_dir, monkeypatch):
    quick = dataclasses.replace(
        TASKS["gsm8k"], max_new_tokens=4, judge=each(lambda item, text: {"correct": not text}), metrics=("correct",)
    )
    monkeypatch.setitem(TASKS, "gsm8k", quick)
    items = write_rows(tmp_path / "items.jsonl", [{"question": str(i), "answer": "#### 1"} for i in range(3)])
    words = ["--model", str(model_dir), "--tasks", f"gsm8k={items}", "--dtype", "float32"]
    return [*words, "--output_dir", str(tmp_path / "e")]


def test_damaged_results_are_one_clear_error(tmp_path, words):
    evaluation.main(words)
    path, again = tmp_path / "e/gsm8k.metamath.jsonl", ["--score_only", *words[-2:], "--tasks", "gsm8k"]
    whole = path.read_text()
    for text, message in {
        whole[:-20]: "gsm8k.metamath.jsonl: missing or damaged",
        "": "expected lines with item and completions: delete it",
        json.dumps({"item": {}, "completion": "of an older version"})
        + "\n": "expected lines with item and completions",
    }.items():
        path.write_text(text)
        for call in (again, words):
            with pytest.raises(UserError, match=message):
                evaluation.main(call)
    path.unlink()  # as the messages say
    assert evaluation.main(words)["gsm8k.metamath"]["n"] == 3
    settings = json.loads((tmp_path / "e/settings.json").read_text())
    (tmp_path / "e/settings.json").write_text(json.dumps({"other": settings["gsm8k.metamath"]}))
    with pytest.raises(UserError, match=r"settings.json has no entry gsm8k.metamath"):
        evaluation.main(again)


def test_a_judge_that_needs_the_data_reads_it_again(tmp_path, words, monkeypatch):
    """Keys that begin with _ are not stored; --score_only finds them, or says that they are others."""

    def load(source):
        return [{**row, "_secret": i} for i, row in enumerate(source.rows("rows.jsonl", ("x/y", None, "test")))]

    task = dataclasses.replace(
        TASKS["gsm8k"], load=load, judge_needs_data=True,
        judge=lambda items, answers, options: [{"correct": i["_secret"] == 1} for i in items],
    )  # fmt: skip
    monkeypatch.setitem(TASKS, "gsm8k", task)
    assert evaluation.main(words)["gsm8k.metamath"]["score"] == pytest.approx(1 / 3)
    assert "_secret" not in (tmp_path / "e/gsm8k.metamath.jsonl").read_text()
    (tmp_path / "items.jsonl").rename(tmp_path / "rows.jsonl")
    again = ["--score_only", *words[-2:], "--tasks", "gsm8k", "--data_dir", str(tmp_path)]
    assert evaluation.main(again)["gsm8k.metamath"]["score"] == pytest.approx(1 / 3)
    write_rows(tmp_path / "rows.jsonl", [{"question": "other", "answer": "#### 1"}] * 3)
    with pytest.raises(UserError, match=r"the items in .*rows.jsonl are not those of the stored answers"):
        evaluation.main(again)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "math=x.jsonl"], "math is a group of gsm8k, hendrycks_math: name one of them with the file"),
        (["--tasks", "math", "gsm8k"], "gsm8k is named twice"),
        (["--tasks", "gsm8k="], "tasks: gsm8k= names no file behind the ="),
        (["--tasks", "hendryks_math"], "unknown task 'hendryks_math'; did you mean hendrycks_math"),
        (["--tasks", "mmlu", "--prompt_format", "tul"], "these tasks do not know 'tul'; did you mean tulu"),
        (["--tasks", "gsm8k", "--prompt_format", "tulu"], "these tasks do not know 'tulu'; known: alpaca"),
        (["--tasks", "bbh=x.json", "--data_dir", "."], "no file cot-prompts|no file bbh/cot-prompts"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--workers", "-1"], "workers must be at least 0"),
    ],
)
def test_bad_words(more, message, words):
    with pytest.raises(UserError, match=message):
        evaluation.main([*words, *more])


def test_a_task_without_items_is_refused(words, monkeypatch):
    """As MBPP's of a file that holds its validation split."""
    load = lambda source: source.rows("", ("", None, "")) and []  # noqa: E731
    monkeypatch.setitem(TASKS, "gsm8k", dataclasses.replace(TASKS["gsm8k"], load=load))
    with pytest.raises(UserError, match=r"task gsm8k: .*items.jsonl holds no item of it"):
        evaluation.main(words)


def test_a_task_of_several_files_takes_no_single_one(words, monkeypatch):
    monkeypatch.setitem(TASKS, "gsm8k", dataclasses.replace(TASKS["gsm8k"], load=lambda source: [{}]))
    with pytest.raises(UserError, match="task gsm8k is made of several files: give a folder of them, --data_dir"):
        evaluation.main(words)


def test_the_preflight_of_a_task_comes_before_anything_is_loaded(words, monkeypatch):
    def preflight(options):
        raise UserError(f"no sandbox, {options.workers} workers, {options.allow_unsafe_code}")

    monkeypatch.setitem(TASKS, "gsm8k", dataclasses.replace(TASKS["gsm8k"], preflight=preflight))
    with pytest.raises(UserError, match="no sandbox, 5 workers, True"):
        evaluation.main([*words, "--model", "no/such", "--workers", "5", "--allow_unsafe_code"])


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "LOCAL_RANK"])
def test_what_another_launch_left_in_the_environment(name, words, monkeypatch):
    monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match=f"{name}=2 is set, .* is not: left over from another launch"):
        evaluation.main(words)


def test_a_chat_format_needs_a_template(words, monkeypatch):
    formats = {"chat": Format(lambda item, _: Chat(item["question"]))}
    monkeypatch.setitem(TASKS, "gsm8k", dataclasses.replace(TASKS["gsm8k"], formats=formats))
    with pytest.raises(UserError, match="prompt_format chat: the tokenizer .* has no chat template"):
        evaluation.main(words)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('No system role') }}", "refuses the conversation: No system role"),
        ("{% for m in messages %}{{ m.content }}", "chat template does not parse, line 1"),
        ("{{ messages[0].content }}", "leaves out what an answer says"),
    ],
)
def test_a_chat_template_that_does_not_work(template, message, words, tmp_path, monkeypatch):
    formats = {"chat": Format(lambda item, _: Chat(item["question"], "A:"))}
    monkeypatch.setitem(TASKS, "gsm8k", dataclasses.replace(TASKS["gsm8k"], formats=formats))
    model = make_model(tmp_path / "m")
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=message):
        evaluation.main([*words, "--model", str(model)])


def test_a_model_with_a_recurrent_state_is_refused(tmp_path, words, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_is_stateful", True)
    with pytest.raises(UserError, match="llama keeps a recurrent state, which is not supported"):
        evaluation.main([*words, "--model", str(make_model(tmp_path / "m"))])


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        (FalconH1Config, True),  # attention and a state space in each layer
        (lambda: Lfm2Config(layer_types=["conv", "full_attention"] * 16), True),  # short convolutions
        (MambaConfig, True),
        (RwkvConfig, True),  # no list of layers
        (MiniMaxConfig, True),  # linear attention
        (LlamaConfig, False),
        (Gemma2Config, False),  # sliding windows
        (Gemma3Config, False),  # the text part of a multimodal model
    ],
)
def test_what_keeps_another_state_is_refused_without_its_weights(config, refused, model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    with pytest.raises(UserError, match="recurrent state") if refused else contextlib.nullcontext():
        refuse_unscorable("m", config(), tokenizer)


def test_a_tokenizer_beyond_the_embedding_is_refused(model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    refuse_unscorable("m", LlamaConfig(vocab_size=259), tokenizer)
    with pytest.raises(UserError, match="ids up to 258, the model's embedding 258 rows: they do not belong together"):
        refuse_unscorable("m", LlamaConfig(vocab_size=258), tokenizer)


def test_items_that_are_no_text_are_refused(words, tmp_path):
    rows = [{"question": "1", "answer": "#### 1"}, {"question": "\U0001f600 and \ud83d", "answer": "#### 1"}]
    write_rows(tmp_path / "items.jsonl", rows)
    with pytest.raises(UserError, match=r"items.jsonl, item 2: '\\ud83d' is half a surrogate pair and no text"):
        evaluation.main(words)
    for value, message in (
        (None, "'question' is null"),
        (" ", "'question' is empty"),
        (5, r"'question' must be text, got '5' \(int\)"),
    ):
        write_rows(tmp_path / "items.jsonl", [rows[0], {**rows[0], "question": value}])
        with pytest.raises(UserError, match=f"task gsm8k: .*items.jsonl, item 2: column {message}"):
            evaluation.main(words)


def test_the_versions_of_the_data_stand_beside_the_scores(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "gsm8k", dataclasses.replace(TASKS["gsm8k"], versions={3: "release 7"}))
    assert evaluation.main(words)["gsm8k.metamath"]["dataset_version"] == "release 7"
    assert "release 7" in capsys.readouterr().out
    entry = evaluation.main([*words, "--limit", "2", "--overwrite"])["gsm8k.metamath"]
    assert (entry["n"], entry["dataset_version"]) == (2, "the first 2 of release 7")
    write_rows(tmp_path / "items.jsonl", [{"question": "q", "answer": "#### 1"}])
    assert (
        evaluation.main([*words, "--overwrite"])["gsm8k.metamath"]["dataset_version"]
        == "another version, or part of it"
    )
