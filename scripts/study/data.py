"""The study's world: the base models' old skills, and two new ones, arithmetic and code, as generated problems.

    python scripts/study/data.py outputs/study      # what scripts/study/run.py does first

Old skills (the base models learn them) are the quickstart's: addition, subtraction, reversal; they also see functions
of one operation, such as "twice x" or "the larger of x and y". The new ones:

    remainder  "Ann puts 387 figs in bags of 4. How many are left over?" in MetaMathQA's columns, scored as GSM8K is
    code       "Return the larger of x plus 3 and twice y." in columns prompt and response, scored as HumanEval is, by
               running the program in the sandbox

Every pattern of operands, and every function, is in one split only: train, validation or test.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from common.templates import ALPACA
from scripts.quickstart.data import ANSWER, NAMES, OLD_SKILLS, THINGS, THINK, make_tokenizer, problem, split_of, write

TASKS = ("remainder", "code")
TEMPLATES = {"remainder": "metamath", "code": "prompt_response"}
ARGUMENTS = ("x", "y", "z")
CHECKS = 6  # calls that a program has to answer


def remainder(rng: random.Random) -> tuple[str, str, int]:
    """(question, reasoning, answer) of a division, of which the remainder is asked."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b = rng.randint(100, 999), rng.choice([4, 5, 10, 20])
    return f"{name} puts {a} {thing} in bags of {b}. How many are left over?", f"{a}%{b}={a % b}.", a % b


def operand(rng: random.Random) -> tuple[str, str]:
    """(words, expression) of one argument, changed or not."""
    v, c = rng.choice(ARGUMENTS), rng.randint(2, 9)
    return rng.choice([
        (v, v), (f"twice {v}", f"2 * {v}"), (f"{v} plus {c}", f"({v} + {c})"), (f"{v} minus {c}", f"({v} - {c})"),
        (f"{v} squared", f"{v} ** 2"), (f"the size of {v}", f"abs({v})"), (f"{v} modulo {c}", f"{v} % {c}"),
    ])  # fmt: skip


def function(rng: random.Random, simple: bool = False) -> tuple[str, str, str]:
    """(name, prompt, body) of a small function of x, y and z; a simple one changes one argument or joins two."""
    (a, left), (b, right) = operand(rng), operand(rng)
    if simple and rng.random() < 0.5:
        words, expression = a, left
    else:
        if simple:
            a = left = rng.choice(ARGUMENTS)
            b = right = rng.choice(ARGUMENTS)
        words, expression = rng.choice([
            (f"the sum of {a} and {b}", f"{left} + {right}"), (f"the difference of {a} and {b}", f"{left} - {right}"),
            (f"the product of {a} and {b}", f"{left} * {right}"), (f"whether {a} is below {b}", f"{left} < {right}"),
            (f"the larger of {a} and {b}", f"max({left}, {right})"),
            (f"the smaller of {a} and {b}", f"min({left}, {right})"),
        ])  # fmt: skip
    name = rng.choice(["f", "g", "solve", "compute"])
    return name, f'def {name}({", ".join(ARGUMENTS)}):\n    """Return {words}."""\n    return', f" {expression}"


def word_problems(skill: str, split: str, n: int, seed: int) -> list[tuple[str, str, int]]:
    """n different word problems of one skill and split."""
    rng, found = random.Random(f"{skill} {split} {seed}"), {}
    while len(found) < n:
        question, reasoning, answer = remainder(rng) if skill == "remainder" else problem(skill, rng)
        if split_of(reasoning) == split:
            found[question] = (question, reasoning, answer)
    return list(found.values())


def functions(split: str, n: int, seed: int) -> list[tuple[str, str, str]]:
    """n functions of one split that differ in more than their name."""
    rng, found = random.Random(f"code {split} {seed}"), {}
    while len(found) < n:
        name, prompt, body = function(rng)
        if split_of(body) == split:
            found[body] = (name, prompt, body)
    return list(found.values())


def training_rows(skill: str, n: int, seed: int, split: str = "train") -> list[dict]:
    """n rows for train.py, in the columns of the skill's template."""
    if skill == "code":
        return [{"prompt": prompt, "response": body} for _, prompt, body in functions(split, n, seed)]
    return [
        {"query": q, "response": f"{THINK} {r}{ANSWER}{a}", "type": skill}
        for q, r, a in word_problems(skill, split, n, seed)
    ]


def base_rows(seed: int) -> list[dict]:
    """What a base model learns, in columns prompt, response: the old skills, the hard ones most, simple functions."""
    counts = {"add": 10_000, "subtract": 10_000, "reverse": 4_000}
    rows = [row for skill in OLD_SKILLS for row in training_rows(skill, counts[skill], seed)]
    rows = [{"prompt": ALPACA.format(instruction=row["query"]), "response": row["response"]} for row in rows]
    rng = random.Random(f"simple {seed}")
    simple = (function(rng, simple=True) for _ in range(4_000))
    return rows + [{"prompt": prompt, "response": body} for _, prompt, body in simple]


def problems(skill: str, split: str, n: int) -> list[dict]:
    """n items for eval.py, in GSM8K's columns or in HumanEval's."""
    if skill != "code":
        found = word_problems(skill, split, n, seed=0)
        return [{"skill": skill, "question": q, "answer": f"{r}\n#### {a}"} for q, r, a in found]
    items, rng = [], random.Random(0)
    for i, (name, prompt, body) in enumerate(functions(split, n, seed=0)):
        calls = [[rng.randint(-9, 9) for _ in ARGUMENTS] for _ in range(CHECKS)]
        answers = [eval(body, {}, dict(zip(ARGUMENTS, call, strict=True))) for call in calls]  # our own text
        checks = [f"    assert candidate(*{c}) == {a}" for c, a in zip(calls, answers, strict=True)]
        test = "\n".join(["def check(candidate):", *checks, ""])
        items.append(
            {
                "task_id": f"study/{i}",
                "prompt": prompt,
                "canonical_solution": body,
                "entry_point": name,
                "test": test,
            }
        )
    return items


def main(folder: Path, sizes: dict[str, int]) -> None:
    """Write what all runs share: data/{skills,code}_{validation,test}.jsonl and the tokenizer.

    Args:
        sizes: problems per skill and split: "old", "remainder", "code".
    """
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for split in ("validation", "test"):
        skills = {"remainder": sizes["remainder"], **dict.fromkeys(OLD_SKILLS, sizes["old"])}
        write(data / f"skills_{split}.jsonl", [row for s, n in skills.items() for row in problems(s, split, n)])
        write(data / f"code_{split}.jsonl", problems("code", split, sizes["code"]))
        for skill in (*OLD_SKILLS, *TASKS):  # their answers, whose likelihood is taken
            write(data / f"nll_{skill}_{split}.jsonl", training_rows(skill, sizes.get(skill, sizes["old"]), 0, split))
    rows = [row for skill in (*OLD_SKILLS, *TASKS) for row in training_rows(skill, 1000, seed=0)]
    texts = [row.get("query", "") + row.get("prompt", "") + row["response"] for row in rows]
    make_tokenizer(texts, vocab_size=448).save_pretrained(folder / "tokenizer")
