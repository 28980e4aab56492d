"""The rules for mathematical answers, and the worker processes they run in: pytest tests/test_math.py"""

import random
import time
from pathlib import Path

import pytest
from conftest import DATA, needs_data

from sandbox import workers
from tasks import TASKS
from tasks.math import METAMATH_STOP, gsm8k_gold, math_gold, metamath_prompt, open_instruct_gold
from tasks.math_rules import (
    equivalent,
    last_boxed,
    math_verify,
    metamath_answer,
    metamath_math,
    metamath_number,
    normalise,
)
from tasks.source import Source
from tasks.task import Options

# --- MetaMath's rule for GSM8K ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "number"),
    [
        ("So 3+4=7. The answer is: 7", 7),
        ("The answer is: 7.", 7),
        ("The answer is: -12 apples", -12),
        ("The answer is: +5", 5),
        ("The answer is: $18", 18),
        ("The answer is: 1,450", 1450),
        ("The answer is: 1,450,000", 1450),  # one separator only
        ("The answer is: 3,5", 35),
        ("The answer is: 2.5", 2),  # Python rounds half to even
        ("The answer is: 3.5", 4),
        ("The answer is: .75", 1),
        ("The answer is: 1/2", 0),
        ("The answer is: 7/2", 4),
        ("The answer is: -9/4", -2),
        ("The answer is: 5/0", 5),  # the numerator
        ("The answer is: 5/00", None),
        ("The answer is: /5", None),  # matched as "/5", whose numerator is no number
        ("The answer is: 4. The answer is: 6", 6),  # the last one
        ("The answer is: 4 The answer is:6", 4),  # the space belongs to the phrase
        ("The answer is 7", None),  # and so does the colon
        ("the answer is: 7", None),
        ("The answer is: seven", None),
        ("The answer is: ", None),
        ("", None),
        ("7", None),
        ("The answer is: " + "9" * 400, None),  # infinity
        ("The answer is: ٣", 3),  # \d is any Unicode digit in the original, too
    ],
)
def test_metamath_number(completion, number):
    assert metamath_number(completion) == number


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("x\n#### 18", 18), ("#### 1,450,000", 1450000), ("#### -3", -3), ("a 5", None), ("#### 1.5", None)],
)
def test_gsm8k_gold(answer, gold):
    if gold is None:
        with pytest.raises(ValueError, match="must end in '#### ' and a whole number"):
            gsm8k_gold({"answer": answer})
    else:
        assert gsm8k_gold({"answer": answer}) == gold


def test_prompt_to_the_letter():
    assert metamath_prompt("How many\n{x}?") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nHow many\n{x}?\n\n### Response: Let's think step by step."
    )


def test_stop_strings_are_metamaths():
    assert set(METAMATH_STOP) == {
        "Question:", "Question", "USER:", "USER", "ASSISTANT:", "ASSISTANT", "Instruction:", "Instruction",
        "Response:", "Response",
    }  # fmt: skip


# --- MetaMath's rule for MATH ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("So. The answer is: 5", "5"),
        ("The answer is: 5.", "5"),
        ("The answer is: 5..", "5."),
        ("The answer is: $x$. ", "$x$"),
        ("The answer is: 1.\nMore. The end.", "1"),
        ("The answer is: 1.5\nMore.", "1.5\nMore"),
        ("The answer is: 1. The answer is: 2", "2"),
        ("The answer is 1", None),
        ("The answer is: ", ""),
    ],
)
def test_metamath_answer(completion, answer):
    assert metamath_answer(completion) == answer


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        (r"so $\boxed{3}$", "3"),
        (r"$\boxed{\frac{1}{2}}$ and \boxed{x_{1}}.", "x_{1}"),
        (r"\boxed 3", None),
        (r"\boxed{3", None),
        (r"\fbox{3}", None),
        ("none", None),
    ],
)
def test_last_boxed(solution, gold):
    assert last_boxed(solution) == gold


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (r"\dfrac{1}{2}", r"\frac12", True),
        ("0.5", r"\tfrac{1}{2}", True),
        ("1/2", r"\frac{1}{2}", True),
        ("-3/4", r"\frac{-3}{4}", True),
        ("-3/4", r"-\frac{3}{4}", False),
        (".5", r"\frac{1}{2}", True),
        (r"\sqrt3", r"\sqrt{3}", True),
        ("x=5", "5", True),
        ("abc=5", "5", False),
        ("1=2=3", "1=2=3", True),
        (r"30^\circ", "30", True),
        (r"30^{\circ}", "30", True),
        (r"50\%", "50", True),
        (r"\$7", "7", True),
        (r"5\text{ cm}", "5", True),
        (r"5\text{ cm}^2\text{ x}", "5", False),  # two units: the original fails, the raw texts are compared
        (r"\left( 1, 2 \right)", "(1,2)", True),
        (r"\frac", r"\frac", True),  # fails inside, equal as raw texts
        (r"\frac1", r"\frac1", True),
        ("1 000", "1000", True),
        ("1,000", "1000", False),
        ("2.0", "2", False),
        (None, None, True),
        ("1", None, False),
    ],
)
def test_equivalent(a, b, same):
    assert equivalent(a, b) is same and equivalent(b, a) is same


def test_normaliser_is_lm_evals():
    """Against the copy of the original in lm-eval, on random texts of the pieces that rules look at."""
    original = pytest.importorskip("lm_eval.tasks.hendrycks_math.utils")
    rng = random.Random(0)
    pieces = [
        r"\frac", r"\dfrac", r"\sqrt", r"\text{ ", r"\left", r"\right", "{", "}", "1", "2", "12", "a", "=", "/", ".",
        " ", "0.5", "-", r"\%", "%", r"\$", "$", r"^\circ", r"^{\circ}", r"\!", "\\\\", "\n", "(", ",", ")",
    ]  # fmt: skip
    checked = failed = 0
    for _ in range(20_000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 7)))
        try:
            wanted = original.strip_string(text)
        except Exception:
            wanted, failed = None, failed + 1
        try:
            got = normalise(text)
        except (ValueError, IndexError):
            got = None
        assert got == wanted, text
        checked += 1
    assert checked == 20_000 and 500 < failed < 15_000


# --- open-instruct's rule for GSM8K ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "gold", "correct", "extracted"),
    [
        ("So the answer is 1,234.", "1234", True, "1234"),
        ("3 apples, then 4", "4", True, "4"),
        ("It is 4, not 5", "4", False, "5"),
        ("-7", "7", True, "7"),  # a sign belongs to decimals alone
        ("-7", "-7", True, "7"),
        ("0.5", "5", False, "0.5"),
        (".5", "5", True, ".5"),  # punctuation is deleted
        ("12.0", "120", True, "12.0"),
        ("none at all", "4", False, None),
        ("$1,234,567", "1234567", True, "1234567"),
        ("1,2,3,4", "1234", False, "34"),  # every second comma
    ],
)
def test_open_instruct_gsm8k(completion, gold, correct, extracted):
    (got,) = verdicts(TASKS["gsm8k_8shot"], [{"answer": f"#### {gold}"}], [completion])
    assert (got["extracted"], got["correct"]) == (extracted, correct)


def test_8_shot_prompt_to_the_letter():
    task = TASKS["gsm8k_8shot"]
    base = task.formats["base"].prompt({"question": "How many? "}, None)
    assert base.startswith(
        "Answer the following questions.\n\nQuestion: There are 15 trees in the grove. Grove workers will plant trees "
        "in the grove today. After they are done, there will be 21 trees. How many trees did the grove workers plant "
        "today?\nAnswer: There are 15 trees originally. Then there were 21 trees after some more were planted. So "
        "there must have been 21 - 15 = 6. So the answer is 6.\n\nQuestion: If there are 3 cars"
    )
    assert base.endswith("So the answer is 8.\n\nQuestion: How many?\nAnswer:") and base.count("Question: ") == 9
    chat = task.formats["tulu"].prompt({"question": "How many? "}, None)
    assert (chat.user, chat.prefix) == (base.removesuffix("\nAnswer:"), "Answer:")
    assert task.formats["base"].stop == ("\n",) and task.formats["tulu"].stop == ()


# --- math-verify -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "gold", "correct"),
    [
        (r"The answer is: \frac{2}{4}", r"\frac{1}{2}", True),
        ("The answer is: 0.5", r"\frac{1}{2}", True),
        ("The answer is: $(1,2)$", "(1,2)", True),
        ("The answer is: $x^2+2x+1$", "(x+1)^2", True),
        ("The answer is: 42 dollars", "42", True),
        ("I am 42 years old.", "42", True),
        ("The answer is: about 42", "42", True),
        ("The answer is: $42 per week", "42", True),
        ("The answer is: (1,2)", "(1,2)", False),  # no formula for the library without $ or a box
        ("So it is $\\boxed{7}$.", "7", True),  # without MetaMath's phrase: what math-verify finds itself
        ("So the answer is 6.", "6", True),
        ("The answer is: 1,450,000", "1450000", True),  # where MetaMath's rule has a quirk
        ("The answer is: 8", "7", False),
        ("The answer is: ", "7", False),
        ("", "7", False),
    ],
)
def test_math_verify(completion, gold, correct):
    assert math_verify(completion, gold) == {"correct": correct}


# --- the gold answers of the real files ------------------------------------------------------------------------------


def verdicts(task, items, completions):
    return task.judge(items, [{"completions": [c]} for c in completions], Options(workers=2))


def totals(verdicts):
    return {k: sum(v[k] for v in verdicts) for k in ("correct", "math_verify", "timeouts", "crashes")}


ALL = {"timeouts": 0, "crashes": 0}


def check_gold(name, items, gold, before, wrong):
    """`before` holds BOXED where the library needs to see a formula."""
    task = TASKS[name]

    def completions(answer):
        return [before.replace("BOXED", rf"\boxed{{{answer(i)}}}") + answer(i) for i in items]

    got = verdicts(task, items, completions(lambda i: str(gold(i))))
    bad = verdicts(task, items, completions(lambda i: wrong(gold(i))))
    return got, bad


def test_gold_answers_of_own_items():
    items = [{"question": "q", "answer": f"x #### {n}"} for n in (7, -3, "1,450", 0)]
    for name, gold in (("gsm8k", gsm8k_gold), ("gsm8k_8shot", open_instruct_gold)):
        got, bad = check_gold(name, items, gold, "The answer is: ", lambda g: str(int(g) + 1))
        assert totals(got) == {"correct": 4, "math_verify": 4, **ALL}
        assert totals(bad) == {"correct": 0, "math_verify": 0, **ALL}
    items = [
        {"problem": "p", "solution": rf"\boxed{{{s}}}"} for s in (r"\frac{1}{2}", "x^2+1", r"(1,\infty)", r"-\sqrt{3}")
    ]
    got, bad = check_gold("hendrycks_math", items, math_gold, "So BOXED. The answer is: ", lambda g: g + "+1")
    assert totals(got) == {"correct": 4, "math_verify": 4, **ALL}
    assert totals(bad) == {"correct": 0, "math_verify": 0, **ALL}


@needs_data("gsm8k/test.jsonl")
def test_real_gold_answers_of_gsm8k():
    """1,319 of 1,319 without commas; with commas MetaMath's rule takes 1,318: one separator, and one gold has two."""
    items = TASKS["gsm8k"].load(Source(str(DATA)))
    got, bad = check_gold("gsm8k", items, gsm8k_gold, "Thus. The answer is: ", lambda g: str(g + 1))
    assert totals(got) == {"correct": 1319, "math_verify": 1319, **ALL}
    assert totals(bad) == {"correct": 0, "math_verify": 0, **ALL}
    commas = verdicts(TASKS["gsm8k"], items, [f"The answer is: {i['answer'].split('#### ')[1]}" for i in items])
    assert totals(commas) == {"correct": 1318, "math_verify": 1319, **ALL}
    got, bad = check_gold("gsm8k_8shot", items, open_instruct_gold, "So it is ", lambda g: str(int(g) + 1))
    assert totals(got) == {"correct": 1319, "math_verify": 1319, **ALL}
    assert totals(bad) == {"correct": 0, "math_verify": 0, **ALL}


EXCEPTION = (
    r"\frac{7}{5} + \frac{1}{5} i."  # the one gold answer of MATH that ends in a point, which the rule takes away
)


@needs_data("math/test.jsonl.gz")
def test_real_gold_answers_of_math_under_the_papers_rule():
    """4,999 of 5,000."""
    golds = [math_gold(item) for item in TASKS["hendrycks_math"].load(Source(str(DATA)))]
    assert len(golds) == 5000
    right = [metamath_math(f"Thus. The answer is: {g}.", g)["correct"] for g in golds]
    assert [g for g, r in zip(golds, right, strict=True) if not r] == []  # with a point behind all of them: 5,000
    right = [metamath_math(f"Thus. The answer is: {g}", g)["correct"] for g in golds]
    assert [g for g, r in zip(golds, right, strict=True) if not r] == [EXCEPTION]
    assert not any(metamath_math(f"The answer is: 1+{g}", g)["correct"] for g in golds)
    assert not any(metamath_math(g, g)["correct"] for g in golds)


def check_math(step):
    items = TASKS["hendrycks_math"].load(Source(str(DATA)))[::step]
    got, bad = check_gold("hendrycks_math", items, math_gold, "So BOXED. The answer is: ", lambda g: "123457")
    assert [v["gold"] for v in got if not (v["correct"] and v["math_verify"])] in ([EXCEPTION], [])
    assert totals(got)["timeouts"] == totals(got)["crashes"] == 0 and totals(bad)["math_verify"] == 0
    return totals(got)["math_verify"]


@needs_data("math/test.jsonl.gz")
def test_some_real_gold_answers_of_math_in_workers():
    assert check_math(20) == 250


@pytest.mark.slow
@needs_data("math/test.jsonl.gz")
def test_all_real_gold_answers_of_math_in_workers():
    """math-verify takes all 5,000: it finds the box, and a point behind a formula does not disturb it."""
    assert check_math(1) == 5000


# --- untrusted text --------------------------------------------------------------------------------------------------

HOSTILE = {
    "tower of powers": "9^{9^{9^{9^{9}}}}",
    "power of a power": "(((99999^{99999})^{99999})^{99999})",
    "factorials": "99999999!!!!",
    "brackets": "(" * 1_000_000,
    "braces": "{" * 1_000_000 + "}" * 1_000_000,
    "fractions": r"\frac{1" * 20_000,
    "roots": r"\sqrt{" * 2_000 + "2" + "}" * 2_000,
    "simplification": r"(\sin(x)+\cos(x)+\tan(x)+x)^{200}-" * 5 + "1",
    "many digits": "9" * 1_000_000,
    "sums": "+".join(["x^{9}y"] * 20_000),
    "null and surrogate": "\x00\ud800$\\boxed{",
    "intervals": r"\cup".join([f"({i},{i + 1})" for i in range(3000)]),
}


@pytest.mark.parametrize(
    ("rule", "names"),
    [
        ("metamath_math", list(HOSTILE)),
        ("math_verify", list(HOSTILE)[:4]),
        pytest.param("math_verify", list(HOSTILE), marks=pytest.mark.slow),
    ],
)
def test_hostile_answers_are_wrong_and_the_next_one_is_judged(rule, names):
    """Each ends within the deadline (here 0.5 s of processor time) and takes nothing else down."""
    fine = (rule, r"The answer is: \frac{1}{2}", r"\frac{1}{2}")
    calls = [c for name in names for c in ((rule, f"The answer is: {HOSTILE[name]}", r"\frac{1}{2}"), fine)]
    start = time.perf_counter()
    results = workers.call_all(Path("tasks/math_rules.py").resolve(), "apply", calls, 2, seconds=0.5)
    assert time.perf_counter() - start < 90
    for name, (result, why), (after, _) in zip(names, results[::2], results[1::2], strict=True):
        assert after["correct"], f"after {name}"
        assert why in (workers.TIMEOUT, workers.CRASH) or not result["correct"], name


WORKER = """
import os, time
def call(what):
    if what == "loop":
        while True: pass
    if what == "in C": 3 ** 3 ** 17
    if what == "memory": return len(b"x" * 10**10)
    if what == "raise": raise KeyboardInterrupt if 0 else ValueError
    if what == "deep": return (lambda f: f(f))(lambda f: f(f))
    if what == "die": os._exit(0)
    if what == "wait": time.sleep(100)
    if what == "print": print('[1, ""]', flush=True); os.write(1, b'[1, ""]')
    return what
"""


def test_the_deadline_is_processor_time(tmp_path):
    code = """
import time

def call(what):
    if what == "wait":
        time.sleep(1)
    while what == "work" and time.process_time() < 1.5:
        pass
    return what
"""
    (tmp_path / "file.py").write_text(code)
    results = workers.call_all(tmp_path / "file.py", "call", [("wait",), ("work",)], 1, seconds=0.5)
    assert [tuple(r) for r in results] == [
        ("wait", ""),
        (None, workers.TIMEOUT),
    ]  # the clock alone would allow both 5 s


def test_workers_outlive_what_they_judge(tmp_path):
    (tmp_path / "file.py").write_text(WORKER)
    expected = {
        "loop": (None, "timeout"), "in C": (None, "timeout"), "memory": (None, "crash"), "raise": (None, "crash"),
        "deep": (None, "crash"), "die": (None, "crash"), "wait": (None, "timeout"), "print": ["print", ""],
    }  # fmt: skip
    calls = [w for word in expected for w in (word, "fine")]
    results = workers.call_all(tmp_path / "file.py", "call", [(c,) for c in calls], 2, seconds=0.3)
    assert [list(r) for r in results[1::2]] == [["fine", ""]] * len(expected)
    assert {word: list(r) for word, r in zip(expected, results[::2], strict=True)} == {
        word: list(r) for word, r in expected.items()
    }


def test_a_worker_that_does_not_start_is_an_error(tmp_path):
    (tmp_path / "file.py").write_text("import no_such_module")
    with pytest.raises(RuntimeError, match="does not start"):
        workers.call_all(tmp_path / "file.py", "call", [(1,)], 1)


def test_a_timeout_is_a_wrong_answer_and_is_counted(monkeypatch):
    call_all = workers.call_all
    monkeypatch.setattr(workers, "call_all", lambda *a: call_all(*a, seconds=0.5))
    (got,) = verdicts(
        TASKS["hendrycks_math"], [{"problem": "p", "solution": r"\boxed{3}"}], ["The answer is: $9^{9^{9^{9}}}$"]
    )
    assert got["correct"] is got["math_verify"] is False and got["extracted"] == "$9^{9^{9^{9}}}$"
    assert got["timeouts"] + got["crashes"] == 1
