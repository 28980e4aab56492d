"""HumanEval(+) and MBPP(+): prompts, programs, oracles, gold solutions of the real files, wrong ones of small ones."""

import ast
import hashlib
import itertools
import json
import random

import pytest
from conftest import DATA, make_model, needs_data, needs_sandbox, write_rows

import eval as evaluation
from common.sources import read_json_rows
from sandbox import judges
from sandbox import run as sandbox
from scripts.reproduce import reduced
from scripts.reproduce.reduced import HUMANEVAL_PLUS_ROW, HUMANEVAL_ROW, MBPP_CODE, MBPP_PROMPT, STUB, mbpp_row
from tasks import GROUPS, TASKS
from tasks.code import evalplus_program, evalplus_trial, humaneval_trial, mbpp_trial
from tasks.sanitize import longest_code, parse, sanitize
from tasks.source import Source
from tasks.task import Chat, Options, render

PLUS, MBPP = "humanevalplus/HumanEvalPlus.jsonl.gz", "mbpp/mbpp.jsonl"
MBPP_PLUS = "mbppplus/MbppPlus-v0.2.0.jsonl.gz"
HUB_PLUS, HUB_MBPP_PLUS = (
    "humanevalplus/HumanEvalPlus-OriginFmt.jsonl.gz",
    "mbppplus/MbppPlus-OriginFmt-v0.2.0.jsonl.gz",
)
REAL = needs_data("humaneval/HumanEval.jsonl.gz", PLUS, MBPP, MBPP_PLUS, HUB_PLUS, HUB_MBPP_PLUS)

HUB_MBPP_PLUS_ROW = {
    "task_id": 9, "prompt": "Write a function to swap a pair", "code": MBPP_CODE, "test_imports": [],
    "test_list": ["assert swap((1, 2)) == (2, 1)"],
    "test": "for a, b in [(1, 2), ('a', None)]:\n    assert swap((a, b)) == (b, a)",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A --data_dir with one or two items of each benchmark."""
    folder = tmp_path_factory.mktemp("data")
    reduced.code(folder)
    return folder


def load(name: str, folder, file: str = "") -> list[dict]:
    return TASKS[name].load(Source(str(folder), str(file)))


# --- prompts ---------------------------------------------------------------------------------------------------------

MAGICODER = (
    "You are an exceptionally intelligent coding assistant that consistently delivers accurate and reliable responses "
    "to user instructions.\n\n@@ Instruction\n{}\n\n@@ Response\n{}"
)
CHAT = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
    "```\n{}\n```\n"
)
PREFIX = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:\n"
    "```python\n"
)
PROMPTS = {
    ("humaneval", "base"): STUB,
    ("humaneval_pass1", "base"): STUB,
    ("humaneval_pass10", "base"): STUB,
    ("humaneval_plus", "base"): STUB,
    ("humaneval_plus", "chat"): Chat(CHAT.format(STUB.strip()), PREFIX),
    ("humaneval_plus", "magicoder"): MAGICODER.format(
        f"Write a solution to the following problem:\n```python\n{STUB.strip()}\n```", f"```python\n{STUB.strip()}"
    ),
    ("mbpp_plus", "base"): MBPP_PROMPT,
    ("mbpp_plus", "chat"): Chat(CHAT.format(MBPP_PROMPT.strip()), PREFIX),
    ("mbpp_plus", "magicoder"): MAGICODER.format(
        "Write a function to swap a pair. Your code should satisfy the following assertion:\n"
        "```python\nassert swap((1, 2)) == (2, 1)\n```",
        "```python",
    ),
    ("mbpp", "base"): "".join(
        f"You are an expert Python programmer, and here is your task: Write function f{i} that adds {i}. Your code "
        f"should pass these tests:\n\nassert f{i}(1) == {1 + i}\nassert f{i}(2) == {2 + i}\n"
        f"assert f{i}(3) == {3 + i}\n[BEGIN]\n" + (f"def f{i}(x):\r\n  return x + {i}\n[DONE]\n\n" if i < 11 else "")
        for i in (2, 3, 4, 11)
    ),
}


@pytest.mark.parametrize(("name", "format"), PROMPTS, ids=map("-".join, PROMPTS))
def test_prompts(folder, name, format):
    assert TASKS[name].formats[format].prompt(load(name, folder)[0], None) == PROMPTS[name, format]


def test_every_format_is_pinned():
    code = ["humaneval", "humaneval_pass1", "humaneval_pass10", "humaneval_plus", "mbpp", "mbpp_plus"]
    assert {(name, word) for name in code for word in TASKS[name].formats} == set(PROMPTS)
    assert GROUPS["code"] == ["humaneval_plus", "mbpp_plus"] and "humaneval_pass10" in GROUPS["general"]


REAL_PROMPTS = {  # sha256 of all prompts of the real files
    ("humaneval", "base"): "6a712466e64fa7d2",
    ("humaneval_plus", "base"): "a5ec3ac3fe4da547",
    ("humaneval_plus", "chat"): "415746c32205572a",
    ("humaneval_plus", "magicoder"): "66f149911a039dc7",
    ("mbpp_plus", "base"): "cfa050359ca54b30",
    ("mbpp_plus", "chat"): "c7fd2c0f68006427",
    ("mbpp_plus", "magicoder"): "e792ac2d8ccebc24",
    ("mbpp", "base"): "b09746904aefaa69",
}


@REAL
@pytest.mark.parametrize(("name", "format"), REAL_PROMPTS, ids=map("-".join, REAL_PROMPTS))
def test_real_prompts(name, format):
    texts = [TASKS[name].formats[format].prompt(item, None) for item in load(name, DATA)]
    texts = [t if isinstance(t, str) else t.user + t.prefix for t in texts]
    assert hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16] == REAL_PROMPTS[name, format]


def test_chat_prompts_end_where_the_program_begins(folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_model(tmp_path))
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
    text = render(
        TASKS["humaneval_plus"].formats["chat"].prompt(load("humaneval_plus", folder)[0], None), "chat", tokenizer
    )
    assert text == f"<user>{CHAT.format(STUB.strip()).strip()}</><assistant>{PREFIX}"


def test_decoding():
    settings = {
        name: (t.samples, t.temperature, t.top_p, t.max_new_tokens, t.metrics)
        for name, t in TASKS.items()
        if name.startswith(("humaneval", "mbpp"))
    }
    assert settings == {
        "humaneval_plus": (1, 0.0, 1.0, 768, ("plus", "base")),
        "mbpp_plus": (1, 0.0, 1.0, 768, ("plus", "base")),
        "humaneval": (1, 0.0, 1.0, 1024, ("pass@1",)),
        "mbpp": (1, 0.0, 1.0, 1024, ("pass@1",)),
        "humaneval_pass1": (20, 0.1, 0.95, 512, ("pass@1",)),
        "humaneval_pass10": (20, 0.8, 0.95, 512, ("pass@10",)),
    }
    stops = {(name, word): len(f.stop) for name in settings for word, f in TASKS[name].formats.items()}
    assert stops["humaneval_plus", "base"] == 11 and stops["mbpp_plus", "base"] == 8
    assert stops["humaneval_plus", "chat"] == 7 and stops["humaneval_plus", "magicoder"] == 1


# --- programs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("def f(x):\n    return x\n", "def f(x):\n    return x"),
        ("Sure!\n```python\ndef f(x):\n    return x\n```\nDone.", "def f(x):\n    return x"),
        ("def f(x):\n    return g(x)\ndef g(x):\n    return x\ndef h():\n    return 1\n",
         "def f(x):\n    return g(x)\ndef g(x):\n    return x"),
        ("import os\nfrom re import *\nA = 1\nB = A\ndef f(x):\n    return B",
         "import os\nfrom re import *\nA = 1\nB = A\ndef f(x):\n    return B"),
        ("def f(x):\n    return 1\ndef f(x):\n    return 2", "def f(x):\n    return 1"),
        ("def f(x):\n    pass\ndef f(x):\n    return 2", "def f(x):\n    return 2"),  # the first with a return
        ("def f(x):\n    return A().b\nclass A:\n    b = 1\nprint(f(1))\nassert f(1)",
         "def f(x):\n    return A().b\nclass A:\n    b = 1"),
        ("@cache\ndef f(x):\n    return x\ny = 1", "@cache\ndef f(x):\n    return x\ny = 1"),  # nothing left: all of it
        ("x: int = 1\nx += 1\ndef f():\n    return x", "x: int = 1\ndef f():\n    return x"),
        ("def f(x):\n    return x\n\ndef broken(", "def f(x):\n    return x"),
        ("no code at all, really", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_sanitize(text, program):
    assert sanitize(text, "f") == program


def test_longest_code_against_trying_all_spans():
    rng = random.Random(0)
    pieces = [
        "def f(x):",
        "    return x",
        "    y = 1",
        "",
        "Here it is:",
        "```",
        "x = 1",
        "if x:",
        "  ",
        "class A:",
        "(",
        ")",
    ]
    for _ in range(300):
        lines = [rng.choice(pieces) for _ in range(rng.randint(1, 9))]
        best, most = "", 0
        for i, j in itertools.combinations(range(len(lines) + 1), 2):
            if (n := sum(bool(line.strip()) for line in lines[i:j])) > most and parse(
                "\n".join(lines[i:j])
            ) is not None:
                best, most = "\n".join(lines[i:j]), n
        strip = lambda text: [line for line in text.split("\n") if line.strip()]  # noqa: E731
        assert strip(longest_code("\n".join(lines))) == strip(best), lines


def test_what_parses_is_never_an_exception():
    for text in ("\0", "(" * 5000, "-" * 100000 + "1", "x = " + "a." * 50000 + "b", "f'{" * 200, "\ud800"):
        parse(text)


def test_programs_of_each_format():
    item = {"prompt": STUB, "entry_point": "double"}
    assert evalplus_program(item, "    return 2 * x\n\nz = 1", "base") == STUB + "    return 2 * x"
    assert evalplus_program(item, "\treturn 2 * x", "magicoder") == STUB + "\treturn 2 * x"  # as it does itself
    assert evalplus_program(item, "def double(x):\n\treturn 2 * x", "chat") == "def double(x):\n    return 2 * x"
    item = {"prompt": MBPP_PROMPT, "entry_point": "swap"}
    for format in ("base", "chat", "magicoder"):
        assert evalplus_program(item, "\n" + MBPP_CODE, format) == MBPP_CODE.strip()


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task", "arguments", "out", "expected", "atol", "right"),
    [
        ("f", 0, [], 1, 1, 0, True),
        ("f", 0, [], 1, 2, 0, False),
        ("f", 0, [], 1, True, 0, True),  # as Python compares
        ("f", 0, [], [1.0, 2.0], [1.0, 2.0 + 1e-7], 1e-6, True),
        ("f", 0, [], [1.0, 2.0], [1.0, 2.1], 1e-6, False),
        ("f", 0, [], (1.0, 2.0), [1.0, 2.0 + 1e-7], 1e-6, False),
        ("f", 0, [], [1.0], [1.0, 2.0], 1e-6, False),
        ("f", 0, [], 1, 1.0000001, 1e-6, False),  # an int for a float
        ("f", 0, [], float("nan"), 1.0, 1e-6, False),
        ("f", 0, [], float("inf"), 1e300, 1e-6, False),
        ("f", 0, [], 1.0, float("inf"), 1e-6, False),
        ("f", 0, [], float("inf"), float("inf"), 1e-6, True),
        ("find_zero", 0, [[-4.0, 0.0, 1.0]], -2.0, 2.0, 1e-4, True),  # another root
        ("find_zero", 0, [[-4.0, 0.0, 1.0]], 1.9, 2.0, 1e-4, False),
        ("are_equivalent", 164, [1, 2], "anything", True, 0, True),
        ("sum_div", 295, [8], 0, 7, 0, True),
        ("sum_div", 295, [8], 1, 7, 0, False),
        ("digit_distance_nums", 558, [23, 156], 1 + 3 + 3, 0, 0, True),
        ("digit_distance_nums", 558, [1, 2], 2, 1, 0, False),
        ("surface_Area", 581, [3, 4], 34, 33, 0, False),
        ("surface_Area", 581, [3, 4], 35, 33, 0, True),
        ("similar_elements", 2, [], [2, 1, 1], (1, 2), 0, True),
        ("similar_elements", 0, [], [2, 1], (1, 2), 0, False),
        ("check_str", 99, [], "a match", object(), 0, True),
        ("check_str", 99, [], None, object(), 0, False),
        ("check_str", 99, [], False, object(), 0, False),
        ("check_str", 99, [], False, None, 0, True),
    ],
)  # fmt: skip
def test_oracles(name, task, arguments, out, expected, atol, right):
    assert judges.agree(name, task, arguments, out, expected, atol) is right


def test_inputs_of_mbpp_have_their_types():
    for task, json_input, python in [
        (1, [[1, 2]], [[1, 2]]),
        (2, [[1], [2]], [(1,), (2,)]),
        (63, [[[1, 2], [3, 4]]], [[(1, 2), (3, 4)]]),
        (75, [[[1, 2]], 3], [[(1, 2)], 3]),
        (106, [[1], [2]], [[1], (2,)]),
        (115, [[[1], [], {}]], [[{1}, {}, {}]]),
        (124, ["0", "1j"], [0.0, 1j]),
        (250, [[1], [2]], [(1,), [2]]),
        (252, ["1+2j"], [1 + 2j]),
        (259, [[[1, 2]], [[3, 4]]], [((1, 2),), ((3, 4),)]),
        (278, [[1, [2, 3], 4]], [(1, (2, 3), 4)]),
        (307, [[1], 2, 3], [(1,), 2, 3]),
        (580, [[1, [2, [3]]]], [(1, (2, (3,)))]),
        (722, [{"a": [1, 2]}, 3, 4], [{"a": (1, 2)}, 3, 4]),
    ]:
        assert judges.mbpp_inputs(task, [json_input]) == [python], task


@REAL
def test_inputs_of_mbpp_against_its_asserts():
    """EvalPlus' own asserts say with which arguments, as Python code; seven tasks differ there, too."""
    different, compared = [], 0
    for _, row in read_json_rows(DATA / MBPP_PLUS):
        number = int(row["task_id"].removeprefix("Mbpp/"))
        tree, name = ast.parse(row["assertion"]), row["entry_point"]
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == name]
        calls.sort(key=lambda call: call.lineno)
        try:
            arguments = [[ast.literal_eval(a) for a in call.args] for call in calls]
        except ValueError:  # no literals
            continue
        compared += 1
        if arguments != judges.mbpp_inputs(number, row["base_input"]):
            different.append(number)
    assert compared == 377 and different == [87, 98, 104, 140, 145, 301, 596]


# --- verdicts on small files -----------------------------------------------------------------------------------------

WRONG = {"none": "    return None", "endless": "    while True: pass", "exit": "    import sys; sys.exit(0)"}


@pytest.fixture
def impatient(monkeypatch):
    """Time limits of a second."""
    import dataclasses

    def shorter(trial):
        data = {**trial.data, "least": 1.0, "factor": 1.0} if "least" in trial.data else trial.data
        return dataclasses.replace(trial, data=data, seconds=1.0)

    run = sandbox.run
    sandbox.probe()  # with its own limits; it is made once per process
    monkeypatch.setattr(sandbox, "run", lambda trial, unsafe: run(shorter(trial), unsafe))


@needs_sandbox
@pytest.mark.parametrize("name", ["humaneval", "humaneval_pass1", "humaneval_plus", "mbpp", "mbpp_plus"])
def test_right_passes_and_wrong_fails(folder, impatient, name):
    task = TASKS[name]
    item = load(name, folder)[0]
    if name.startswith("humaneval"):
        heading, right = "", "    return 2 * x"
    else:
        heading = "def f11(x):\n" if name == "mbpp" else "def swap(pair):\n"
        right = "    return x + 11" if name == "mbpp" else "    return pair[1], pair[0]"
    answers = [{"completions": [heading + body], "format": "base"} for body in (right, *WRONG.values())]
    verdicts = task.judge([item] * 4, answers, Options(workers=1))
    assert [v[task.metrics[0]] for v in verdicts] == [1, 0, 0, 0]
    assert [v["timeouts"] for v in verdicts] == [0, 0, 1, 0]
    assert verdicts[0]["sandbox"] == "bubblewrap"


@needs_sandbox
def test_plus_needs_base_and_samples_are_averaged(folder):
    task, item = TASKS["humaneval_plus"], load("humaneval_plus", folder)[0]
    only_base = "    return 2 * x if isinstance(x, int) and x < 99 else 0"
    (verdict,) = task.judge([item], [{"completions": [only_base], "format": "base"}], Options())
    assert (verdict["base"], verdict["plus"]) == (1, 0)
    only_plus = "    return 2 * x if x > 2 or x == 1.5 else 0"
    (verdict,) = task.judge([item], [{"completions": [only_plus], "format": "base"}], Options())
    assert (verdict["base"], verdict["plus"]) == (0, 0)
    task, item = TASKS["humaneval_pass10"], load("humaneval_pass10", folder)[0]
    completions = ["    return 2 * x"] + ["    return 0"] * 19
    (verdict,) = task.judge([item], [{"completions": completions, "format": "base"}], Options())
    assert verdict["pass@10"] == 0.5


HUB_HUMANEVAL_PLUS_ROW = {**HUMANEVAL_ROW, "test": f"{HUMANEVAL_ROW['test']}\n    pass\n"}


@needs_sandbox
def test_the_hubs_tests_are_a_fallback_that_is_named(folder, tmp_path):
    task = TASKS["mbpp_plus"]
    source = Source(str(folder), str(write_rows(tmp_path / "hub.jsonl", [HUB_MBPP_PLUS_ROW])))
    (item,) = task.load(source)
    assert "its test column" in source.read[-1]
    assert (item["prompt"], item["entry_point"]) == (MBPP_PROMPT, "swap")
    only_base = "def swap(pair):\n    return (2, 1) if pair[0] == 1 else None"
    answers = [
        {"completions": [text], "format": "base"} for text in (MBPP_CODE, only_base, "def swap(p):\n    return p")
    ]
    assert [(v["base"], v["plus"]) for v in task.judge([item] * 3, answers, Options())] == [(1, 1), (1, 0), (0, 0)]
    source = Source(str(folder), str(write_rows(tmp_path / "hub.jsonl", [HUB_HUMANEVAL_PLUS_ROW])))
    (item,) = TASKS["humaneval_plus"].load(source)
    assert "its test column" in source.read[1] and set(item["_tests"]) == {"base", "plus"}


@needs_sandbox
def test_eval_from_the_model_to_the_scores(folder, tmp_path, monkeypatch):
    import dataclasses

    for name in GROUPS["code"]:
        monkeypatch.setitem(TASKS, name, dataclasses.replace(TASKS[name], max_new_tokens=8))
    model = make_model(tmp_path / "model", max_position_embeddings=2048)
    words = ["--tasks", "code", "--data_dir", str(folder), "--output_dir", str(tmp_path / "out")]
    scores = evaluation.main([*words, "--model", str(model), "--dtype", "float32"])
    assert list(scores) == ["humaneval_plus.evalplus", "mbpp_plus.evalplus"]
    for name, entry in scores.items():
        assert entry["n"] == 1 and set(entry["metrics"]) == {"plus", "base"} and entry["score"] == 0, name
        assert entry["sandbox"] == "bubblewrap" and entry["timeouts"] == entry["crashes"] == 0
    path = tmp_path / "out" / "humaneval_plus.evalplus.jsonl"
    line = json.loads(path.read_text())
    assert "_reference" not in line["item"] and line["verdicts"][0]["base"] == "failed"
    path.write_text(json.dumps({**line, "completions": ["    return x + x"]}) + "\n")
    again = evaluation.main([*words, "--score_only"])
    assert again["humaneval_plus.evalplus"]["score"] == 1


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "humaneval",
            {**HUMANEVAL_ROW, "canonical_solution": "    return ("},
            "item 1: the reference solution is no Pyt",
        ),
        ("humaneval", {**HUMANEVAL_ROW, "test": None}, "item 1: column 'test' is null"),
        ("humaneval_plus", {**HUMANEVAL_PLUS_ROW, "prompt": "def ("}, "item 1: the reference solution is no Python"),
        ("mbpp", {**mbpp_row(11), "test_list": ["assert g(1) == 2"]}, "item 1: the test calls no function"),
        ("mbpp_plus", {**HUB_MBPP_PLUS_ROW, "code": "swap = 1"}, "item 1: the test calls no function"),
        ("mbpp_plus", {**HUB_MBPP_PLUS_ROW, "test_list": []}, "item 1: there are no tests"),
        ("mbpp", {**mbpp_row(11), "test_list": []}, "item 1: there are no tests"),
        ("mbpp", {**mbpp_row(11), "test_list": [5]}, "item 1: its tests must be texts"),
        ("mbpp", {**mbpp_row(11), "test_setup_code": 5}, "item 1: test_setup_code must be text"),
        ("mbpp_plus", {**HUB_MBPP_PLUS_ROW, "prompt": 5}, "item 1: column 'prompt' must be text"),
        ("mbpp", {**mbpp_row(11), "code": 5}, "item 1: column 'code' must be text"),
        ("mbpp", {**mbpp_row(11), "task_id": "11"}, "item 1: column 'task_id' must be a whole number"),
        ("humaneval", {**HUMANEVAL_ROW, "prompt": 5}, "item 1: column 'prompt' must be text"),
        ("humaneval_plus", {**HUMANEVAL_PLUS_ROW, "task_id": 5}, "item 1: column 'task_id' must be text"),
        ("mbpp_plus", {**HUB_MBPP_PLUS_ROW, "code": None}, "item 1: column 'code' is null"),
        # plain HumanEval's, and those of sanitized MBPP, which have no test of their own
        ("humaneval_plus", HUMANEVAL_ROW, "these are HumanEval's tests, not HumanEval.'s: score them as humaneval"),
        ("humaneval_plus", {**HUB_HUMANEVAL_PLUS_ROW, "task_id": "x/1"}, "item 1: HumanEval, .*, has no 'x/1'"),
        ("mbpp_plus", {k: v for k, v in HUB_MBPP_PLUS_ROW.items() if k != "test"}, "item 1: no column 'test'"),
        ("humaneval_plus", {k: v for k, v in HUMANEVAL_PLUS_ROW.items() if k != "atol"}, "item 1: no column 'atol'"),
    ],
)
def test_bad_rows_are_named(folder, tmp_path, name, row, message):
    with pytest.raises(evaluation.UserError, match=message):
        load(name, folder, write_rows(tmp_path / "rows.jsonl", [row]))


def test_eval_without_a_sandbox_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "probe", lambda: "there is no bwrap")
    words = ["--tasks", "humaneval", "--data_dir", str(folder), "--output_dir", str(tmp_path / "out"), "--model", "x/y"]
    with pytest.raises(evaluation.UserError, match="there is no bwrap"):
        evaluation.main(words)


# --- the real files --------------------------------------------------------------------------------------------------


def gold(name: str, item: dict) -> sandbox.Trial:
    if name == "mbpp":
        return mbpp_trial(item, item["code"])
    if name == "humaneval":
        return humaneval_trial(item, item["prompt"] + item["canonical_solution"])
    return evalplus_trial(item, item["_reference"])


def not_passed(name: str, items: list[dict]) -> list:
    verdicts = sandbox.run_all([gold(name, item) for item in items], workers=2)
    return [
        item["task_id"]
        for item, v in zip(items, verdicts, strict=True)
        if (v["base"], v.get("plus", "passed")) != ("passed", "passed")
    ]


def not_passed_twice(name: str, items: list[dict]) -> list:
    """Items that do not pass in two tries: beside another test, a limit of time may pass for a right program, too."""
    failed = not_passed(name, items)
    return not_passed(name, [item for item in items if item["task_id"] in failed]) if failed else []


SIZES = {"humaneval": 164, "humaneval_plus": 164, "mbpp": 500, "mbpp_plus": 378}


@REAL
@needs_sandbox
@pytest.mark.parametrize("name", SIZES)
def test_some_reference_solutions_pass(name):
    items = load(name, DATA)
    assert len(items) == SIZES[name]
    assert not_passed(name, items[3 :: len(items) // 15][:15]) == []


@REAL
@needs_sandbox
@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_all_reference_solutions_pass(name):
    assert not_passed_twice(name, load(name, DATA)) == []


@REAL
@needs_sandbox
@pytest.mark.slow
def test_some_reference_solutions_under_the_hubs_tests():
    """HumanEval/32 fails there: its special oracle is missing. (Of all of MBPP+, Mbpp/255 fails: its size.)"""
    items = load("humaneval_plus", DATA, DATA / HUB_PLUS)
    assert not_passed_twice("humaneval_plus", items[::8]) == ["HumanEval/32"]
    assert not_passed_twice("mbpp_plus", load("mbpp_plus", DATA, DATA / HUB_MBPP_PLUS)[::16]) == []


@REAL
def test_the_hubs_rows_give_the_same_prompts():
    for name, file in (("humaneval_plus", HUB_PLUS), ("mbpp_plus", HUB_MBPP_PLUS)):
        ours, hubs = load(name, DATA), load(name, DATA, DATA / file)
        assert [(i["task_id"], i["entry_point"]) for i in ours] == [(i["task_id"], i["entry_point"]) for i in hubs]
        assert sum(a["prompt"] != b["prompt"] for a, b in zip(ours, hubs, strict=True)) == 0
