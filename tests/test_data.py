"""Rows, examples, a step's examples, micro-batches: pytest tests/test_data.py"""

import gzip
import json

import numpy as np
import pytest
import torch
from conftest import make_model, write_rows
from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from common import sources, templates
from common.errors import UserError
from training import data


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


# --- templates, tokens and labels ------------------------------------------------------------------------------------


def test_metamath_template_to_the_letter():
    prompt, response = templates.metamath({"query": "What is 1+1?", "response": "2"})
    assert response == "2"
    assert prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nWhat is 1+1?\n\n### Response:"
    )
    prompt, _ = templates.metamath({"query": "Add these.\n1 {x}\n2", "response": "3"})
    # as in the original, an input that is empty is none
    assert "### Input" not in templates.metamath({"query": "a\n", "response": ""})[0]
    assert prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request."
        "\n\n### Instruction:\nAdd these.\n\n### Input:\n1 {x}\n2\n\n### Response:"
    )


def test_response_and_eos_are_trained_and_nothing_else(tmp_path, tokenizer):
    rows = sources.load_rows(str(write_rows(tmp_path / "a.jsonl", [{"query": "Hi é?", "response": " yes."}])), COLUMNS)
    examples = data.tokenise(rows, tokenizer, "metamath", 512)
    ids, labels = examples.rows[0]["input_ids"], examples.rows[0]["labels"]
    prompt, _ = templates.metamath({"query": "Hi é?", "response": " yes."})
    assert tokenizer.decode(ids) == prompt + " yes.<eos>"
    assert labels == [-100] * len(tokenizer(prompt)["input_ids"]) + [*tokenizer(" yes.")["input_ids"], 1]
    assert (examples.lengths[0], examples.trained[0]) == (len(ids), 6)


COLUMNS = ("query", "response")


def test_overlong_examples_are_cut_or_dropped_and_counted(tmp_path, tokenizer):
    prompt_length = len(tokenizer(templates.metamath({"query": "q", "response": ""})[0])["input_ids"])
    rows = [{"query": "q", "response": r} for r in ("ab", "abcdef")] + [{"query": "q" * 400, "response": "a"}]
    rows = sources.load_rows(str(write_rows(tmp_path / "a.jsonl", rows)), COLUMNS)
    cut = data.tokenise(rows, tokenizer, "metamath", prompt_length + 4)
    assert (cut.lengths.tolist(), cut.truncated, cut.left_out.total()) == ([prompt_length + 3, prompt_length + 4], 1, 1)
    assert cut.rows[1]["labels"][-4:] == tokenizer("abcd")["input_ids"]  # without EOS: the text goes on
    dropped = data.tokenise(rows, tokenizer, "metamath", prompt_length + 4, "drop")
    assert (len(dropped), dropped.truncated, dropped.left_out.total()) == (1, 0, 2)
    with pytest.raises(
        UserError, match="none of the 3 examples can be trained on: 3 with no token to train on within max_length"
    ):
        data.tokenise(rows, tokenizer, "metamath", 10)


def test_one_bos_if_the_tokenizer_adds_one(tmp_path, model_dir):
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    rows = sources.load_rows(str(write_rows(tmp_path / "a.jsonl", [{"query": "q", "response": "r"}])), COLUMNS)
    ids = data.tokenise(rows, tokenizer, "metamath", 512).rows[0]["input_ids"]
    assert ids.count(0) == 1 and ids[0] == 0
    # and one that adds EOS, too: still one, and the first token of the response is trained
    ends = [("<bos>", 0), ("<eos>", 1)]
    both = AutoTokenizer.from_pretrained(model_dir)
    both.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    example = data.tokenise(rows, both, "metamath", 512).rows[0]
    assert example["input_ids"] == ids and example["labels"][-2:] == ids[-2:]
    assert data.tokenise(rows, tokenizer, "metamath", 512).rows[0]["labels"][-3:] == [-100, ids[-2], 1]


def test_tokenising_on_processes_gives_the_same_examples(tmp_path, tokenizer, monkeypatch):
    rows = [{"query": f"q{i}" * (i % 7 + 1), "response": f"{i}"} for i in range(30)]
    rows = sources.load_rows(str(write_rows(tmp_path / "a.jsonl", rows)), COLUMNS)
    one = data.tokenise(rows, tokenizer, "metamath", 150, processes=1)
    monkeypatch.setattr(data, "_tokenizer_hash", lambda t: "another, so that nothing comes from the cache")
    two = data.tokenise(rows, tokenizer, "metamath", 150, processes=2)
    assert len(two.rows.cache_files) == 2 and one.fingerprint() == two.fingerprint()  # a part from each process
    monkeypatch.setattr(data, "ROWS_PER_PROCESS", 15)
    monkeypatch.setattr(data.os, "sched_getaffinity", lambda pid: range(8))
    assert data.processes_for(30) == 2 and data.processes_for(7) == 1 and data.processes_for(1000) == 8


def test_an_example_is_shown_as_runs_of_tokens(tmp_path, tokenizer):
    rows = sources.load_rows(str(write_rows(tmp_path / "a.jsonl", [{"query": "q", "response": " yes"}])), COLUMNS)
    text = data.describe_example(tokenizer, data.tokenise(rows, tokenizer, "metamath", 512), most=4)
    first, prompt, response = text.splitlines()
    assert first == "example 0 of 1: 145 tokens, 5 of them trained"
    assert prompt.startswith("  not trained   140 tokens [") and prompt.endswith("### Response:'")
    assert " ... " in prompt and response == "  trained         5 tokens [223 91 ... 85 1] ' yes<eos>'"


# --- files -----------------------------------------------------------------------------------------------------------


def test_all_kinds_of_files_give_the_same_rows(tmp_path):
    rows = [{"query": f"q{i}", "response": "é 😀", "extra": [i]} for i in range(3)]
    lines = "".join(json.dumps(r, ensure_ascii=i % 2 == 0) + "\n\n" for i, r in enumerate(rows))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(lines)
    (tmp_path / "b.json").write_text("  " + json.dumps(rows, indent=1))
    for name in ("a.jsonl", "b.json"):
        with gzip.open(tmp_path / f"{name}.gz", "wt") as f:
            f.write((tmp_path / name).read_text())
    import pandas

    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    expected = [{"query": r["query"], "response": r["response"]} for r in rows]
    files = sorted(tmp_path.iterdir())
    assert len(files) == 6
    for path in files:
        assert list(sources.load_rows(str(path), COLUMNS)) == expected, path
    (tmp_path / "folder").mkdir()
    for path in files:
        path.rename(tmp_path / "folder" / path.name)
    assert list(sources.load_rows(str(tmp_path / "folder"), COLUMNS)) == expected * 6
    (tmp_path / "folder" / "data").mkdir()
    (tmp_path / "folder" / "a.jsonl").rename(tmp_path / "folder" / "data" / "a.jsonl")
    (tmp_path / "folder" / ".cache").mkdir()
    write_rows(tmp_path / "folder" / ".cache" / "a.jsonl", [{"no": "rows"}])  # as downloads leave
    assert list(sources.load_rows(str(tmp_path / "folder"), COLUMNS)) == expected * 6
    both = [f"{tmp_path / 'folder'}:4", str(tmp_path / "folder" / "data" / "a.jsonl")]
    assert list(sources.load_all(both, COLUMNS)) == (expected * 2)[:4] + expected


def numbered(*numbers):
    return [{"query": f"{i}", "response": "r"} for i in numbers]


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        ({"train.jsonl": 1, "test.jsonl": 2}, {"train": [1], "test": [2]}),
        ({"train/b.jsonl": 2, "train/a.jsonl": 1, "test/a.jsonl": 3}, {"train": [1, 2], "test": [3]}),
        ({"x-train.jsonl": 1, "x-eval.jsonl": 2}, {"train": [1], "test": [2]}),
        ({"b.jsonl": 2, "a.jsonl": 1, "sub/c.jsonl": 3}, {"train": [1, 2, 3]}),
        (
            {"data/train_x-00000-of-00001.jsonl": 1, "data/test_x-00000-of-00001.jsonl": 2},
            {"train_x": [1], "test_x": [2]},
        ),
        ({"contest.jsonl": 1, "latest.jsonl": 2}, {"train": [1, 2]}),
        ({"data/one.jsonl": 1, "data/two.jsonl": 2, "README.md": "one two"}, {"one": [1], "two": [2]}),
    ],
)
def test_a_folder_has_the_splits_that_datasets_finds(tmp_path, monkeypatch, files, splits):
    from datasets import load_dataset

    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name == "README.md":
            lines = [f"  - split: {split}\n    path: data/{split}*\n" for split in content.split()]
            (tmp_path / name).write_text(
                "---\nconfigs:\n- config_name: default\n  data_files:\n" + "".join(lines) + "---\n"
            )
        else:
            write_rows(tmp_path / name, numbered(content))
    for split, expected in splits.items():
        rows = sources.load_rows(str(tmp_path), COLUMNS, split)
        assert rows.to_list() == numbered(*expected) == load_dataset(str(tmp_path), split=split).to_list()
    monkeypatch.chdir(tmp_path.parent)
    for folder in (str(tmp_path), tmp_path.name, f"./{tmp_path.name}/"):
        with pytest.raises(UserError, match="no split 'other'; the folder has ") as error:
            sources.data_files(folder, "other")
        assert all(f"{split}: " in str(error.value) for split in splits) and ".." not in str(error.value)


def test_a_folder_of_several_configurations_is_not_guessed(tmp_path):
    configs = "".join(f"- config_name: {c}\n  data_files: {c}.jsonl\n" for c in "ab")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for c in "ab":
        write_rows(tmp_path / f"{c}.jsonl", numbered(1))
    with pytest.raises(UserError, match="its README has the configurations a, b: name the files of one"):
        sources.load_rows(str(tmp_path), COLUMNS)


def test_what_datasets_leaves_on_disk(tmp_path):
    from datasets import Dataset, DatasetDict

    train, test = Dataset.from_list(numbered(1, 2)), Dataset.from_list(numbered(3))
    train.save_to_disk(tmp_path / "one")
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "dict")
    read = lambda *args: sources.load_rows(str(tmp_path / args[0]), COLUMNS, *args[1:]).to_list()  # noqa: E731
    assert read("one") == read("dict") == numbered(1, 2) and read("dict", "test") == numbered(3)
    with pytest.raises(UserError, match="no split 'dev'; the folder has test: test; train: train"):
        read("dict", "dev")
    with pytest.raises(
        UserError, match="it holds folders of save_to_disk: name one of them, dict/test, dict/train, one"
    ):
        read("")
    (tmp_path / "infos").mkdir()
    write_rows(tmp_path / "infos" / "train.jsonl", numbered(1))
    (tmp_path / "infos" / "dataset_infos.json").write_text(json.dumps({"default": {"splits": {"train": {}}}}))
    assert read("infos") == numbered(1)
    (tmp_path / "dict" / "dataset_dict.json").write_text("{")
    with pytest.raises(UserError, match="dataset_dict.json cannot be read"):
        read("dict")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match="one: cannot be read"):
        read("one")


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder", "disk"])
@pytest.mark.parametrize("word", ["metamath", "tulu"])
def test_rows_are_read_and_tokenised_once(tmp_path, tokenizer, monkeypatch, kind, word):
    import pandas

    rows = [{**row, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}
            for row in numbered(1, 2)]  # fmt: skip
    path = tmp_path / f"a.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        pandas.DataFrame(rows).to_parquet(path)
    elif kind == "disk":
        Dataset.from_list(rows).save_to_disk(path)
    else:
        (tmp_path / "a.folder").mkdir()
        write_rows(path / "train-1.jsonl" if kind == "folder" else path, rows)
        if kind == "folder":
            write_rows(path / "train-2.jsonl", rows)
    calls, encode = [], templates.encode
    monkeypatch.setattr(templates, "encode", lambda *args: calls.append(args) or encode(*args))
    template = templates.TEMPLATES[word]
    examples = [data.tokenise(sources.load_all([str(path)], template.columns), tokenizer, word, 512) for _ in range(3)]
    assert len(calls) == 1 and examples[0].rows.to_list() == examples[2].rows.to_list()


def test_caps(tmp_path, monkeypatch):
    assert sources.split_cap("a/b:500") == ("a/b", 500) and sources.split_cap("a/b") == ("a/b", 0)
    assert sources.split_cap("c:x") == ("c:x", 0) and sources.split_cap(":5") == ("", 5)
    with pytest.raises(UserError, match="dataset a/b:0: a cap of 0 rows leaves nothing"):
        sources.split_cap("a/b:0")
    path = write_rows(tmp_path / "rows:12", [{"query": "q", "response": "r"}] * 3)
    assert sources.split_cap(str(path)) == (str(path), 0)  # a file of that very name
    rows = str(write_rows(tmp_path / "a.jsonl", [{"query": f"{i}", "response": "r"} for i in range(3)]))
    loaded = sources.load_all([f"{rows}:2", f"{rows}:9", f"{rows}:1"], COLUMNS)
    assert loaded["query"][:] == ["0", "1", "0", "1", "2", "0"]


def test_a_changed_file_is_read_anew(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"query": "q", "response": "old"}])
    assert sources.load_rows(str(path), COLUMNS)[0]["response"] == "old"
    write_rows(path, [{"query": "q", "response": "new"}])
    assert sources.load_rows(str(path), COLUMNS)[0]["response"] == "new"


def test_an_edited_template_is_not_served_from_the_cache(tmp_path, tokenizer, monkeypatch):
    rows = sources.load_rows(str(write_rows(tmp_path / "a.jsonl", [{"query": "q", "response": "r"}])), COLUMNS)
    before = data.tokenise(rows, tokenizer, "metamath", 512).fingerprint()
    (tmp_path / "templates.py").write_text("another version of the file")
    monkeypatch.setattr(templates, "__file__", str(tmp_path / "templates.py"))
    monkeypatch.setitem(data.TEMPLATES, "metamath", templates.Pair(COLUMNS, lambda row: ("Q:", row["response"])))
    assert data.tokenise(rows, tokenizer, "metamath", 512).fingerprint() != before


def test_hub_datasets_are_asked_for_by_id_and_split(monkeypatch):
    asked = []
    monkeypatch.setattr(
        sources,
        "load_dataset",
        lambda *a, **k: asked.append((a, k)) or Dataset.from_list([{"query": "q", "response": "r"}]),
    )
    assert len(sources.load_rows("owner/name", COLUMNS, "train_sft")) == 1
    assert len(sources.load_all(["owner/name:main:1"], COLUMNS)) == 1
    assert asked == [(("owner/name", None), {"split": "train_sft"}), (("owner/name", "main"), {"split": "train"})]


def test_a_hub_dataset_with_several_configurations_says_how_to_name_one(monkeypatch):
    def load(*args, **kwargs):
        raise ValueError("Config name is missing. Please pick one among the available configs: ['main', 'socratic']")

    monkeypatch.setattr(sources, "load_dataset", load)
    with pytest.raises(UserError, match=r"\['main', 'socratic'\] \(written openai/gsm8k:CONFIG\)"):
        sources.load_rows("openai/gsm8k", COLUMNS)


# --- steps and micro-batches -----------------------------------------------------------------------------------------


def test_every_epoch_visits_every_example_once_in_another_order():
    n, size = 23, 5
    assert data.steps_per_epoch(n, size) == 5
    epochs = [np.concatenate([data.step_examples(n, size, 7, e * 5 + s) for s in range(5)]) for e in range(3)]
    assert all(sorted(e.tolist()) == list(range(n)) for e in epochs)
    assert len({tuple(e.tolist()) for e in epochs}) == 3
    assert not np.array_equal(epochs[0], data.permutation(n, 8, 0))
    # pinned: a change would break the resumption of runs
    assert data.permutation(6, 0, 0).tolist() == [4, 1, 0, 2, 3, 5]


@pytest.mark.parametrize("row_tokens", [0, 60, 150])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(("tokens", "rows"), [(64, 0), (200, 0), (10_000, 0), (10_000, 3), (10_000, 1), (5, 0)])
def test_micro_batches_hold_each_example_once_within_the_budget(world, tokens, rows, row_tokens):
    lengths = np.random.default_rng(0).integers(5, 60, size=100)
    for ids in (np.arange(32), np.arange(10, 15), np.array([3])):
        dealt = data.micro_batches(ids, lengths, world, tokens, rows, row_tokens)
        assert len(dealt) == world and len({len(share) for share in dealt}) == 1
        batches = [b for share in dealt for b in share]
        assert sorted(i for b in batches for row in b for i in row) == sorted(ids.tolist())
        for b in filter(None, batches):
            widths = [sum(lengths[row]) for row in b]
            assert len(b) == 1 or len(b) * max(widths) <= tokens
            assert max(widths) <= row_tokens or max(map(len, b)) == 1
            assert not rows or len(b) <= rows
        assert all(batches) or len(ids) < len(batches)  # nobody is idle unless there is too little work
    # alone, examples of about one length are shared out evenly
    shares = data.micro_batches(np.arange(96), np.full(96, 7), world, tokens, 0, row_tokens)
    work = [sum(len(b) for b in share) for share in shares] if not row_tokens else []
    assert not work or tokens < 64 or max(work) - min(work) <= len(shares[0])
    assert data.micro_batches(np.array([], int), lengths, world, tokens, rows, row_tokens) == [[]] * world
    # pinned: the shares of a step do not change between versions
    lengths = np.array([5, 9, 2, 7, 4, 6])
    assert data.micro_batches(np.arange(6), lengths, 1, 18) == [[[[0], [4], [2]], [[3], [5]], [[1]]]]
    assert data.micro_batches(np.arange(6), lengths, 1, 18, 0, 9) == [[[[0, 4], [1]], [[3, 2], [5]]]]
    assert data.micro_batches(np.arange(6), lengths, 2, 18, 0, 18) == [[[[5, 0, 4, 2]]], [[[1, 3]]]]


def test_best_fit_is_that_of_a_slow_search():
    rng = np.random.default_rng(0)
    for capacity in (60, 100, 200):
        lengths = rng.integers(1, 60, size=200)
        rows, free = [], []
        for i in sorted(range(200), key=lambda i: (-lengths[i], i)):
            fitting = [r for r in range(len(rows)) if free[r] >= lengths[i]]
            if not fitting:
                rows.append([])
                free.append(capacity)
                fitting = [len(rows) - 1]
            best = min(fitting, key=lambda r: (free[r], r))
            rows[best].append(i)
            free[best] -= lengths[i]
        assert data.pack(np.arange(200), lengths, capacity) == rows
        assert len(rows) <= 1.05 * lengths.sum() / capacity + 1


@pytest.fixture
def two(tmp_path, tokenizer):
    rows = [{"query": "q", "response": "long answer"}, {"query": "q", "response": "no"}]
    rows = sources.load_rows(str(write_rows(tmp_path / "a.jsonl", rows)), COLUMNS)
    return data.tokenise(rows, tokenizer, "metamath", 512)


def test_collate_pads_on_the_right_and_an_empty_batch_trains_nothing(two):
    batch = data.collate(two, [[0], [1]])
    assert batch.keys() == {"input_ids", "positions", "targets"}
    ids, labels = two.rows["input_ids"], two.rows["labels"]
    assert batch["input_ids"].tolist() == [ids[0], ids[1] + [0] * (len(ids[0]) - len(ids[1]))]
    flat = batch["input_ids"].flatten()
    assert torch.equal(flat[batch["positions"] + 1], batch["targets"])  # a token is predicted from the one before
    assert batch["targets"].tolist() == [label for row in labels for label in row if label != -100]
    assert batch["positions"].tolist() == [len(ids[0]) - 13 + i for i in range(12)] + [
        len(ids[0]) + len(ids[1]) - 4 + i for i in range(3)
    ]
    empty = data.collate(two, [])
    assert empty["input_ids"].shape == (1, 2) and len(empty["positions"]) == len(empty["targets"]) == 0


def test_collate_packs(two):
    ids = two.rows["input_ids"]
    batch = data.collate(two, [[0, 1], [1]], packed=True)
    both = len(ids[0]) + len(ids[1])
    assert batch["input_ids"].tolist() == [ids[0] + ids[1], ids[1] + [0] * len(ids[0])]
    assert batch["position_ids"].tolist() == [
        [*range(len(ids[0])), *range(len(ids[1]))],
        [*range(len(ids[1])), *[0] * len(ids[0])],
    ]
    apart = [data.collate(two, [[i]]) for i in (0, 1, 1)]
    assert torch.equal(batch["targets"], torch.cat([b["targets"] for b in apart]))
    starts = (0, len(ids[0]), both)
    assert torch.equal(batch["positions"], torch.cat([b["positions"] + s for b, s in zip(apart, starts, strict=True)]))


@pytest.mark.parametrize("rows", [[[0, 1]], [[0, 1], [1]], [[1]], []], ids=str)
def test_sequences_bounds_are_those_that_transformers_derives(two, rows):
    batch = data.collate(two, rows, packed=True)
    (bounds, _), (longest, _) = prepare_fa_kwargs_from_position_ids(batch["position_ids"])
    assert batch["cu_seq_lens"].dtype == bounds.dtype == torch.int32 and torch.equal(batch["cu_seq_lens"], bounds)
    assert type(batch["max_length"]) is int and batch["max_length"] == longest  # a tensor would be waited for


def test_fingerprint_sees_tokens_labels_and_order(tmp_path, tokenizer):
    def fingerprint(rows, **kwargs):
        rows = sources.load_rows(str(write_rows(tmp_path / "a.jsonl", rows)), COLUMNS)
        return data.tokenise(rows, tokenizer, "metamath", kwargs.get("max_length", 512)).fingerprint()

    a, b = {"query": "a", "response": "b"}, {"query": "c", "response": "d"}
    prints = [fingerprint(rows) for rows in ([a, b], [b, a], [a], [a, {**b, "query": "c "}])]
    assert len(set(prints)) == 4 and fingerprint([a, b]) == prints[0]
    # the same tokens, other labels
    rows = sources.load_rows(str(write_rows(tmp_path / "a.jsonl", [a, b])), COLUMNS)
    usual, all_of_it = (data.tokenise(rows, tokenizer, "metamath", 512, train_on_prompt=on) for on in (False, True))
    assert usual.rows["input_ids"][:] == all_of_it.rows["input_ids"][:]
    assert usual.fingerprint() != all_of_it.fingerprint()


def test_token_ids_are_checked_against_the_model(tmp_path):
    small = make_model(tmp_path / "m")
    rows = sources.load_rows(str(write_rows(tmp_path / "a.jsonl", [{"query": "q", "response": "r"}])), COLUMNS)
    examples = data.tokenise(rows, AutoTokenizer.from_pretrained(small), "metamath", 512)
    assert examples.max_token_id() == max(max(r["input_ids"]) for r in examples.rows)
    parts = [Dataset.from_dict({"input_ids": ids}) for ids in ([[5, 9], [6]], [[7]], [[8]])]  # a chunk each
    assert data.Examples(concatenate_datasets(parts), np.ones((4, 1)), np.ones((4, 1))).max_token_id() == 9
