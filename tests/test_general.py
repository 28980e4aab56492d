"""Prompts and rules of open-instruct's benchmarks: pytest tests/test_general.py"""

import gzip
import hashlib
import json
import math
import random
import shutil
from collections import Counter

import datasets
import pytest
from conftest import DATA, needs_data, write_rows
from transformers import AutoTokenizer

from common.errors import UserError
from scripts.reproduce import reduced
from tasks import GROUPS, TASKS
from tasks.general import (
    BBH_TASKS,
    TYDIQA_DEV,
    TYDIQA_TRAIN,
    TYDIQA_WORDS,
    bbh_answer,
    load_tydiqa,
    squad_rows,
    without_reasoning,
)
from tasks.source import Source
from tasks.task import Options, render

OPTIONS = Options()


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small files of our own, laid out as the real ones."""
    root = tmp_path_factory.mktemp("data")
    reduced.general(root, dict.fromkeys(TYDIQA_TRAIN, 3))
    return root


@pytest.fixture
def few_training_rows(monkeypatch):
    monkeypatch.setattr("tasks.general.TYDIQA_TRAIN", dict.fromkeys(TYDIQA_TRAIN, 3))


def load(name, folder, published=False):
    return TASKS[name].load(Source(str(folder), published=published))


def prompt(name, word, item, tokenizer):
    return render(TASKS[name].formats[word].prompt(item, tokenizer), word, tokenizer)


# --- prompts to the letter -------------------------------------------------------------------------------------------

QUESTION = "Which is a bird?\nA. cat\nB. owl\nC. elk\nD. ant\nAnswer:"
HEAD = "The following are multiple choice questions (with answers) about  animal names.\n\n"
PRIMER = """Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain."""
COT = (
    "Do it.\n\nQ: one\nA: Let's think step by step.\nWell. So the answer is (A).\n\n"
    "Q: two\nOptions:\n(A) x\nA: Let's think step by step.\nHm. So the answer is (B).\n\nQ: boolean_expressions 0"
)
DIRECT = "Do it.\n\nQ: one\nA: (A).\n\nQ: two\nOptions:\n(A) x\nA: (B).\n\nQ: boolean_expressions 0"
ENGLISH = (
    "Answer the following question based on the information in the given passage.\n\nPassage: It is in english.\n"
    "Question: Where 0?\nAnswer: in english\n\nPassage: It is in english.\nQuestion: Where 0?\n"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def as_tulu(user, prefix):
    return f"<|user|>\n{user}\n<|assistant|>\n{prefix}"


def example(i):
    return f"Example {i}?\nA. cat\nB. owl\nC. elk\nD. ant\nAnswer: {'ABCD'[i % 4]}\n\n"


@pytest.mark.parametrize(
    ("name", "base", "user", "prefix"),
    [
        ("mmlu", HEAD + QUESTION, HEAD + QUESTION, "The answer is:"),
        ("mmlu_5shot", *[HEAD + "".join(map(example, range(5))) + QUESTION] * 2, "The answer is:"),
        ("bbh", COT + "\nA:", COT, "A:"),
        ("bbh_direct", DIRECT + "\nA:", DIRECT, "A:"),
        ("tydiqa", ENGLISH + "Answer:", ENGLISH, "Answer:"),
        ("truthfulqa", PRIMER + "\n\nQ: Is it so?\nA:", PRIMER + "\n\nQ: Is it so?", "A:"),
    ],
)
def test_prompts_to_the_letter(name, base, user, prefix, folder, tokenizer, few_training_rows):
    item = next(i for i in load(name, folder) if i.get("language", "english") == "english")
    assert prompt(name, "base", item, tokenizer) == base
    assert prompt(name, "tulu", item, tokenizer) == as_tulu(user, prefix)
    tokenizer.chat_template = CHAT_TEMPLATE
    assert prompt(name, "chat", item, tokenizer) == f"[user]{user.strip()}[/][assistant]{prefix}"


def test_stop_strings_and_lengths():
    """Base models stop at a line's (BBH: a paragraph's) end; chat models at the end of their turn, but for BBH."""
    stops = {n: {w: f.stop for w, f in t.formats.items()} for n, t in TASKS.items() if t.protocol == "open_instruct"}
    line = dict.fromkeys(("gsm8k_8shot", "tydiqa"), ("\n",))
    paragraph = dict.fromkeys(("bbh", "bbh_direct"), ("\n\n",))
    for name, expected in {**line, **paragraph, "mmlu": (), "truthfulqa": ()}.items():
        in_chat = expected if name.startswith("bbh") else ()
        assert stops[name] == {"base": expected, "tulu": in_chat, "chat": in_chat}
    lengths = {n: TASKS[n].max_new_tokens for n in ("gsm8k_8shot", "bbh", "bbh_direct", "tydiqa")}
    assert lengths == {"gsm8k_8shot": 512, "bbh": 512, "bbh_direct": 512, "tydiqa": 50}


def test_mmlu_drops_examples_of_long_prompts(folder, tokenizer, monkeypatch):
    """From the last one on, until 2,048 tokens are enough; the chat format's own tokens count."""
    item = load("mmlu_5shot", folder)[0]
    full = prompt("mmlu_5shot", "base", item, tokenizer)
    tokens = len(tokenizer.encode(full, add_special_tokens=False))
    monkeypatch.setattr("tasks.general.MMLU_TOKENS", tokens)
    assert prompt("mmlu_5shot", "base", item, tokenizer) == full
    monkeypatch.setattr("tasks.general.MMLU_TOKENS", tokens - 1)
    assert prompt("mmlu_5shot", "base", item, tokenizer) == HEAD + "".join(map(example, range(4))) + QUESTION
    monkeypatch.setattr("tasks.general.MMLU_TOKENS", 1)
    assert prompt("mmlu_5shot", "tulu", item, tokenizer) == as_tulu(HEAD + QUESTION, "The answer is:")


@pytest.mark.parametrize("special", [0, 1])
def test_tydiqa_cuts_passages_to_512_tokens(special, folder, tokenizer, few_training_rows, monkeypatch):
    """A BOS of the tokenizer is counted, and not left in the text."""
    monkeypatch.setattr(type(tokenizer), "num_special_tokens_to_add", lambda self: special)
    item = load("tydiqa", folder)[0]
    for length in (600, 513 - special, 512 - special):
        passage = prompt("tydiqa", "base", {**item, "context": "x" * length}, tokenizer)
        assert passage.count("x") == min(length, 512 - special)


def test_without_reasoning_keeps_what_is_no_question():
    assert without_reasoning("Head.\nQ in it.\n\nQ: a\nA: So. So the answer is b.") == "Head.\nQ in it.\n\nQ: a\nA: b."


# --- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (" Well. So the answer is (A).", "(A)"),
        ("The answer is 5. So the answer is 6.", "5"),  # the first one
        ("So the answer is 3.5.", "3"),  # up to a point
        ("So the answer is\n4.", "So the answer is\n4."),  # "answer is " with a space, on one line
        ("so the answer is 4", "so the answer is 4"),  # no point
        (" (B) ", "(B)"),
        ("|he answer is 1.", "1"),  # "[t|T]" of the original
    ],
)
def test_bbh_answer(completion, answer):
    assert bbh_answer(completion) == answer


def judge_one(name, item, completion):
    (verdict,) = TASKS[name].judge([item], [{"completions": [completion]}], OPTIONS)
    return verdict


@pytest.mark.parametrize(
    ("completion", "target", "correct"),
    [
        ("So the answer is (a).", "(A)", True),
        ("a", "(A)", True),
        ("(B)", "(A)", False),
        ("So the answer is 24.", "-24", True),  # a minus sign is punctuation
        ("So the answer is } }.", "] ]", True),  # brackets are compared by the spaces between them
        ("So the answer is ] ] ].", "] ]", False),
    ],
)
def test_score_bbh(completion, target, correct):
    assert judge_one("bbh", {"target": target}, completion)["correct"] is correct


@pytest.mark.parametrize(
    ("completion", "f1", "exact"),
    [
        (" Berlin.\n", 1.0, True),
        ("the berlin", 1.0, True),
        ("in Berlin", 2 / 3, False),
        ("Paris", 0.0, False),
        ("", 0.0, False),
        ("a new York city", 1.0, True),  # the best of several gold answers
        ("Berlin Berlin", 2 / 3, False),
    ],
)
def test_score_tydiqa(completion, f1, exact):
    got = judge_one("tydiqa", {"answers": ["Berlin", "New York City"]}, completion)
    assert got["f1"] == pytest.approx(f1) and got["exact_match"] is exact


def test_mmlu_takes_the_most_probable_letter():
    items = [{"answer": 1, "choices": list("abcd")}] * 3
    answers = [{"logprobs": v} for v in ([-3.0, -1.0, -2.0, -9.0], [-1.0, -1.0, -1.0, -1.0], None)]
    got = TASKS["mmlu"].judge(items, answers, OPTIONS)
    assert [(v["extracted"], v["correct"]) for v in got] == [("B", True), ("A", False), (None, False)]


def test_truthfulqa_mc1_and_mc2():
    item = {"best": "b", "correct": ["a", "b"], "incorrect": ["c", "d", "e"]}
    p = [0.1, 0.3, 0.2, 0.05, 0.15]
    (got,) = TASKS["truthfulqa"].judge([item], [{"logprobs": [math.log(v) - 2000 for v in p]}], OPTIONS)
    assert got["mc1"] is True and got["mc2"] == pytest.approx(0.5)  # 0.4 of 0.8; no underflow
    (got,) = TASKS["truthfulqa"].judge([item], [{"logprobs": [-1.0, -3.0, -2.0, -9.0, -9.0]}], OPTIONS)
    assert got["mc1"] is False  # the best answer, not any correct one
    assert TASKS["truthfulqa"].candidates(item) == ["a", "b", "c", "d", "e"]


# --- items -----------------------------------------------------------------------------------------------------------


def test_what_is_loaded(folder, few_training_rows):
    assert load("truthfulqa", folder) == [
        {"question": "Is it so?", "best": "It is.", "correct": ["Yes.", "It is."], "incorrect": ["No.", "It is not."]}
    ]
    items = load("tydiqa", folder)
    assert len(items) == 18 and items[0]["answers"] == ["in arabic", "Berlin"]
    assert Counter(TASKS["bbh"].group(i) for i in load("bbh", folder)) == dict.fromkeys(BBH_TASKS, 2)


def test_what_is_missing_is_named_with_its_origin(folder, tmp_path):
    for name, message in {
        "mmlu": r"no file .*mmlu/test.jsonl.gz \(its origin: hf download --repo-type dataset cais/mmlu",
        "bbh": "no file .*boolean_expressions.txt .*github.com/suzgunmirac/BIG-Bench-Hard",
        "tydiqa": "no file .*arabic_dev.json.gz",
        "truthfulqa": "no file .*TruthfulQA_v1.csv .*github.com/sylinrl/TruthfulQA",
        "hendrycks_math": "no file .*math/test.jsonl.gz .*EleutherAI/hendrycks_math",
    }.items():
        with pytest.raises(UserError, match=message):
            load(name, tmp_path)
    with pytest.raises(UserError, match="TyDiQA's training part has 14805 questions in arabic, got 3"):
        load("tydiqa", folder)


def other(folder, tmp_path, name, content):
    """A copy of the folder with another file in it."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    (copy / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return copy


HEADER = b"Question,Best Answer,Correct Answers,Incorrect Answers\n"


@pytest.mark.parametrize(
    ("task", "file", "content", "message"),
    [
        ("truthfulqa", "truthfulqa/TruthfulQA_v1.csv", b'[{"question": "q"}]', "expected a CSV file .* no 'Question'"),
        ("truthfulqa", "truthfulqa/TruthfulQA_v1.csv", b"\x80\x81", "no text in UTF-8"),
        ("truthfulqa", "truthfulqa/TruthfulQA_v1.csv", HEADER, "no rows"),
        ("truthfulqa", "truthfulqa/TruthfulQA_v1.csv", HEADER + b"q,a\n", "item 1: column 'Correct Answers' is null"),
        ("truthfulqa", "truthfulqa/TruthfulQA_v1.csv", HEADER + b"q,c,a,b\n", "the best answer must be one of the"),
        ("truthfulqa", "truthfulqa/TruthfulQA_v1.csv", HEADER + b'"' + b"x" * 200_000, "no CSV file"),
        ("bbh", "bbh/bbh/snarks.json", b'{"rows": []}', r"expected \{'examples': \[...\]\} with input, target"),
        ("bbh", "bbh/bbh/snarks.json", b"Question,Answer", "snarks.json: no JSON file"),
        ("bbh", "bbh/bbh/snarks.json", b'{"examples": [{"input": 1, "target": "a"}]}', "'input' must be text"),
        ("bbh", "bbh/cot-prompts/snarks.txt", b"\xff\xfe", "snarks.txt: no text in UTF-8"),
        ("tydiqa", "tydiqa_goldp/korean_dev.json.gz", b'{"rows": []}', "korean_dev.json.gz: expected the layout of SQ"),
        ("tydiqa", "tydiqa_goldp/korean_dev.json.gz", b"[]", "expected the layout of SQuAD's files"),
        ("mmlu", "mmlu/test.jsonl.gz", b'{"question": "q", "answer": "#### 1"}', "item 1: no column 'subject'"),
        (
            "mmlu", "mmlu/test.jsonl.gz", b'{"question": "q", "subject": "s", "choices": "abcd", "answer": 1}',
            "'choices' must be a list, got 'abcd'",
        ),
        (
            "mmlu", "mmlu/test.jsonl.gz", b'{"question": "q", "subject": "s", "choices": [1, 2, 3, 4], "answer": 1}',
            "expected 4 choices",
        ),
    ],
)  # fmt: skip
def test_a_file_of_another_format_is_one_line(task, file, content, message, folder, tmp_path, few_training_rows):
    with pytest.raises(UserError, match=message):
        load(task, other(folder, tmp_path, file, content))


def test_a_file_that_is_not_gzipped_is_one_line(folder, tmp_path, few_training_rows):
    copy = other(folder, tmp_path, "tydiqa_goldp/korean_dev.json.gz", b"")
    (copy / "tydiqa_goldp/korean_dev.json.gz").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"korean_dev.json.gz: cannot be read: Not a gzipped file"):
        load("tydiqa", copy)


def test_rows_of_the_hub_are_those_of_local_copies(folder, few_training_rows, monkeypatch):
    """Ids, configurations and splits; and the columns that differ from the local files' layout."""

    def squad(split):
        part = {"validation": "dev", "train": "train"}[split]
        rows = squad_rows(Source(str(folder)), part, split, TYDIQA_WORDS)
        return [{**r, "answers": {"text": r["answers"], "answer_start": [0, 1]}} for of in rows.values() for r in of]

    def truthfulqa():
        keys = {"best": "best_answer", "correct": "correct_answers", "incorrect": "incorrect_answers"}
        return [{keys.get(k, k): v for k, v in r.items()} for r in load("truthfulqa", folder)]

    def hub(name, subset, split):
        if name == "cais/mmlu" and subset == "all":
            with gzip.open(folder / f"mmlu/{split}.jsonl.gz", "rt") as f:
                rows = [json.loads(line) for line in f]
        elif name == "SaylorTwift/bbh" and split == "test":
            rows = json.loads((folder / f"bbh/bbh/{subset}.json").read_text())["examples"]
        elif (name, subset) == ("google-research-datasets/tydiqa", "secondary_task"):
            rows = squad(split)
        elif (name, subset, split) == ("truthfulqa/truthful_qa", "generation", "validation"):
            rows = truthfulqa()
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    for name in ("mmlu", "mmlu_5shot", "tydiqa", "truthfulqa"):
        assert TASKS[name].load(Source()) == load(name, folder)
    with pytest.raises(UserError, match="needs bbh/cot-prompts/boolean_expressions.txt of github.com/suzgunmirac"):
        TASKS["bbh"].load(Source())
    items, moved = load("bbh", folder), folder / "moved"
    (folder / "bbh/bbh").rename(moved)  # the prompts alone are local
    monkeypatch.setattr(datasets, "load_dataset", lambda n, s, split: datasets.Dataset.from_list(
        json.loads((moved / f"{s}.json").read_text())["examples"]))  # fmt: skip
    try:
        assert load("bbh", folder) == items
    finally:
        moved.rename(folder / "bbh/bbh")


def test_some_languages_alone(folder, few_training_rows, monkeypatch):
    """The example of a language, and its published questions, are the same whether the others are there or not."""
    monkeypatch.setattr("tasks.general.TYDIQA_DEV", dict.fromkeys(TYDIQA_DEV, 2))
    monkeypatch.setattr("tasks.general.random.Random.sample", lambda self, n, k, f=random.Random.sample: f(self, n, 1))
    for published in (False, True):
        every = TASKS["tydiqa"].load(Source(str(folder), published=published))
        some = TASKS["tydiqa"].load(Source(str(folder), published=published, languages=["korean", "telugu"]))
        assert some == [item for item in every if item["language"] in ("korean", "telugu")]
        assert len(some) == (2 if published else 4)
    with pytest.raises(UserError, match="languages: unknown word 'corean'; did you mean korean"):
        TASKS["tydiqa"].load(Source(str(folder), languages=["corean"]))


def test_math_is_seven_configurations_of_the_hub(monkeypatch):
    asked = []

    def hub(*where):
        asked.append(where)
        row = {"problem": "p", "level": "Level 1", "type": where[1], "solution": r"\boxed{1}"}
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split: hub(name, subset, split))
    items = TASKS["hendrycks_math"].load(Source())
    subjects = [
        "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
        "precalculus",
    ]  # fmt: skip
    assert [i["type"] for i in items] == subjects
    assert asked == [("EleutherAI/hendrycks_math", s, "test") for s in subjects]


def test_groups_name_tasks():
    assert set(GROUPS) >= {"math", "general"} and all(set(names) <= set(TASKS) for names in GROUPS.values())


# --- the real files --------------------------------------------------------------------------------------------------


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@needs_data("bbh/bbh/snarks.json")
def test_real_bbh():
    """Each gold answer scores 1, with and without the phrase; a wrong one 0. 250 targets are brackets alone."""
    items = load("bbh", DATA)
    assert len(items) == 6511 and len(load("bbh", DATA, published=True)) == 1080

    def right(text):
        answers = [{"completions": [text(i["target"])]} for i in items]
        return sum(v["correct"] for v in TASKS["bbh"].judge(items, answers, OPTIONS))

    assert right("Well. So the answer is {}.".format) == right("{}".format) == 6511
    assert right("So the answer is x{}.".format) == right(lambda t: "no idea at all") == 0
    punctuation = [i for i in items if not i["target"].strip("[](){}<> ")]
    assert Counter(i["task"] for i in punctuation) == {"dyck_languages": 250}
    empty = TASKS["bbh"].judge(items, [{"completions": [""]}] * len(items), OPTIONS)
    assert sum(v["correct"] for v in empty) == 81  # dyck_languages whose answer is one bracket: nothing is enough


@needs_data("mmlu/test.jsonl.gz")
def test_real_mmlu():
    items = load("mmlu", DATA)
    assert len(items) == 14042 and len({i["subject"] for i in items}) == 57
    for shift, correct in ((0, 14042), (1, 0)):
        answers = [{"logprobs": [0.0 if k == (i["answer"] + shift) % 4 else -1.0 for k in range(4)]} for i in items]
        assert sum(v["correct"] for v in TASKS["mmlu"].judge(items, answers, OPTIONS)) == correct


@needs_data("truthfulqa/TruthfulQA_v1.csv")
def test_real_truthfulqa():
    items = load("truthfulqa", DATA)
    assert len(items) == 817 and TASKS["truthfulqa"].versions[len(items)] == "v1 (2021), 817 questions"
    for good, bad, expected in ((0.0, -900.0, 1.0), (-900.0, 0.0, 0.0)):
        answers = [{"logprobs": [good] * len(i["correct"]) + [bad] * len(i["incorrect"])} for i in items]
        got = TASKS["truthfulqa"].judge(items, answers, OPTIONS)
        assert all(v["mc1"] == expected and v["mc2"] == pytest.approx(expected) for v in got)


@needs_data("tydiqa_goldp/arabic_dev.json.gz")
def test_real_tydiqa():
    of = squad_rows(Source(str(DATA)), "dev", "validation", TYDIQA_WORDS)
    assert {language: len(rows) for language, rows in of.items()} == TYDIQA_DEV
    rows = [row for language in of.values() for row in language]
    assert len(rows) == 5077
    for k in (0, -1):
        got = TASKS["tydiqa"].judge(rows, [{"completions": [f" {r['answers'][k]}\n"]} for r in rows], OPTIONS)
        assert all(v["f1"] == v["exact_match"] == 1 for v in got)
    got = TASKS["tydiqa"].judge(rows, [{"completions": ["qwxz"]}] * len(rows), OPTIONS)
    assert not any(v["f1"] or v["exact_match"] for v in got)


@needs_data("mmlu/test.jsonl.gz", "truthfulqa/TruthfulQA_v1.csv", "tydiqa_goldp/swahili_train.json.gz")
def test_real_prompts_are_pinned(tokenizer):
    """The first item's prompt; TyDiQA in the languages whose training file is there."""
    got = {}
    for name in ("mmlu", "mmlu_5shot", "bbh", "bbh_direct", "truthfulqa", "gsm8k_8shot", "gsm8k", "hendrycks_math"):
        item = load(name, DATA)[0]
        for word in TASKS[name].formats:
            if word != "chat":
                got[f"{name} {word}"] = sha(prompt(name, word, item, tokenizer))
    there = [w for w in TYDIQA_WORDS if (DATA / f"tydiqa_goldp/{w}_train.json.gz").exists()]
    for item in load_tydiqa(Source(str(DATA), languages=there)):
        got.setdefault(f"tydiqa {item['language']}", sha(prompt("tydiqa", "base", item, tokenizer)))
    assert got == PINNED


PINNED = {
    "mmlu base": "0fd4aa7bf568c18f",
    "mmlu tulu": "b7529cd49eedf037",
    "mmlu_5shot base": "da2912d4e148f4ed",
    "mmlu_5shot tulu": "e612f33ccd8f6985",
    "bbh base": "cb1e6f2eb40ab034",
    "bbh tulu": "0007c399b1e3582e",
    "bbh_direct base": "1680933497f9d730",
    "bbh_direct tulu": "dc18f98a659e536e",
    "truthfulqa base": "fc343982bc558624",
    "truthfulqa tulu": "92f4ccde1ff342dd",
    "gsm8k_8shot base": "3a26e2cb30f90569",
    "gsm8k_8shot tulu": "1d8e775eeda16d80",
    "gsm8k alpaca": "4a512c1ebbb69b73",
    "hendrycks_math alpaca": "51f5d3fa36de6519",
    "tydiqa english": "5c6c8be430d94945",
    "tydiqa korean": "b0ec796cdd362ab7",
    "tydiqa swahili": "28f3a98583e8bd42",
}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": "a"}, "item 1: no column 'id'"),
        (
            {"id": "klingon-1", "context": "c", "question": "q", "answers": {"text": ["a"]}},
            "begins with no language of",
        ),
        ({"id": "korean-1", "context": "c", "question": "q", "answers": {}}, "item 1: korean-1 has no answer"),
    ],
)
def test_rows_in_the_hubs_form_are_checked(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        TASKS["tydiqa"].load(Source("", str(write_rows(tmp_path / "rows.jsonl", [row]))))


def test_the_published_subset_of_bbh_needs_40_items(folder):
    with pytest.raises(UserError, match="published_subset takes 40 items of each task of BBH, boolean_expressions has"):
        TASKS["bbh"].load(Source(str(folder), published=True))
