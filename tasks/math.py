"""Mathematics: GSM8K and MATH as MetaMath scores them, GSM8K with 8 examples as open-instruct does, and as peft does.

Beside each paper's own rule stands math-verify's verdict. What could hang runs in worker processes with a deadline.
"""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

from common.templates import ALPACA, PEFT
from sandbox import workers
from tasks.math_rules import last_boxed, open_instruct_number, peft_gsm8k
from tasks.metrics import per_item
from tasks.source import Source
from tasks.task import Answer, Chat, Format, Judge, Options, Task

# vLLM's `stop` in MetaMath's scripts, in its order
METAMATH_STOP = tuple(
    s for word in ("Question", "USER", "ASSISTANT", "Instruction", "Response") for s in (word + ":", word)
)
Result = tuple[dict | None, str]  # of a rule, or why there is none: workers.TIMEOUT or CRASH
RULES = Path(__file__).with_name("math_rules.py")


def judged_by(rule: str, gold: Callable[[dict], object]) -> Judge:
    """A judge with two metrics: `correct` by a rule of math_rules.py, and `math_verify`."""

    def judge(items: list[dict], answers: list[Answer], options: Options) -> list[dict]:
        pairs = [(answer["completions"][0], str(gold(item))) for item, answer in zip(items, answers, strict=True)]
        by_rule, by_library = apply_in_workers([rule, "math_verify"], pairs, options)
        return [verdict(*of_item) for of_item in zip(pairs, by_rule, by_library, strict=True)]

    return judge


def apply_in_workers(rules: list[str], pairs: list[tuple[str, str]], options: Options) -> list[list[Result]]:
    """For each rule: its result on each pair (completion, gold).

    One that takes more than 5 s of processor time or 2 GiB fails.
    """
    calls = [(rule, *pair) for rule in rules for pair in pairs]
    results = workers.call_all(RULES, "apply", calls, options.workers)
    return [results[i * len(pairs) : (i + 1) * len(pairs)] for i in range(len(rules))]


def verdict(pair: tuple[str, str], by_rule: Result, by_library: Result) -> dict:
    """The verdict on an item. A rule that failed says "wrong", and is counted."""
    (result, failure), (library_result, library_failure) = by_rule, by_library
    return {
        "extracted": result["extracted"] if result else None,
        "gold": pair[1],
        "correct": bool(result and result["correct"]),
        "math_verify": bool(library_result and library_result["correct"]),
        "timeouts": [failure, library_failure].count(workers.TIMEOUT),
        "crashes": [failure, library_failure].count(workers.CRASH),
    }


def metamath_prompt(text: str) -> str:
    """The whole question is the instruction: it is not split into instruction and input as training rows are."""
    return ALPACA.format_map({"instruction": text}) + " Let's think step by step."


# ---------------------------------------------------------------------------------------------------------------------
# GSM8K
# ---------------------------------------------------------------------------------------------------------------------


def gsm8k_gold(item: dict) -> int:
    """The number behind "#### " in an answer, without commas.

    Raises:
        ValueError: there is none.
    """
    pieces = item["answer"].split("#### ")
    try:
        return int(pieces[1].replace(",", ""))
    except (IndexError, ValueError):
        raise ValueError(f"the answer must end in '#### ' and a whole number, got {item['answer'][-40:]!r}") from None


def load_gsm8k(source: Source) -> list[dict]:
    columns = {"question": str, "answer": str}
    rows = source.rows("gsm8k/test.jsonl", ("openai/gsm8k", "main", "test"), columns)
    return source.checked([{column: row[column] for column in columns} for row in rows], gsm8k_gold)


GSM8K = Task(
    name="gsm8k",
    protocol="metamath",
    load=load_gsm8k,
    formats={"alpaca": Format(lambda item, _: metamath_prompt(item["question"]), METAMATH_STOP)},
    judge=judged_by("metamath_gsm8k", gsm8k_gold),
    metrics=("correct", "math_verify"),
    max_new_tokens=512,
    versions={1319: "main/test"},
)

# The 8 examples of Wei et al. (arXiv 2201.11903, table 20), as eval/gsm/examplars.py of open-instruct has them
SHOTS = json.loads(Path(__file__).with_name("gsm8k_8shot.json").read_text(encoding="utf-8"))


def open_instruct_question(item: dict) -> str:
    shots = "\n\n".join(f"Question: {shot['question']}\nAnswer: {shot['cot_answer']}" for shot in SHOTS)
    return f"Answer the following questions.\n\n{shots}\n\nQuestion: {item['question'].strip()}"


def open_instruct_gold(item: dict) -> str:
    """The text behind "####", without the commas between digits."""
    return re.sub(r"(\d),(\d)", r"\1\2", item["answer"].split("####")[1].strip())


def load_gsm8k_8shot(source: Source) -> list[dict]:
    """All items, or the 200 that the published scripts sample."""
    items = load_gsm8k(source)
    return random.Random(42).sample(items, 200) if source.published and len(items) > 200 else items


def judge_gsm8k_8shot(items: list[dict], answers: list[Answer], options: Options) -> list[dict]:
    """`correct`: the last number of the completion, or all of it, equals the gold without case and punctuation.

    Quirks of the rule, kept: a minus sign and a decimal point are punctuation, so -5 is 5 and 0.5 is 05.
    """
    pairs = [(answer["completions"][0], open_instruct_gold(item)) for item, answer in zip(items, answers, strict=True)]
    numbers = [open_instruct_number(completion) for completion, _ in pairs]
    matches = per_item(
        "exact_match",
        predictions=[text for _, text in numbers],
        references=[gold for _, gold in pairs],
        ignore_case=True,
        ignore_punctuation=True,
    )["exact_match"]
    by_rule = [
        ({"extracted": number, "correct": match}, "") for (number, _), match in zip(numbers, matches, strict=True)
    ]
    (by_library,) = apply_in_workers(["math_verify"], pairs, options)
    return [verdict(*of_item) for of_item in zip(pairs, by_rule, by_library, strict=True)]


GSM8K_8SHOT = Task(
    name="gsm8k_8shot",
    protocol="open_instruct",
    load=load_gsm8k_8shot,
    formats={
        "base": Format(lambda item, _: open_instruct_question(item) + "\nAnswer:", ("\n",)),
        "tulu": Format(lambda item, _: Chat(open_instruct_question(item), "Answer:")),
        "chat": Format(lambda item, _: Chat(open_instruct_question(item), "Answer:")),
    },
    judge=judge_gsm8k_8shot,
    metrics=("correct", "math_verify"),
    max_new_tokens=512,
    versions={1319: "main/test", 200: "main/test, the published 200"},
)


def peft_question(item: dict) -> str:
    return PEFT.format_map({"question": item["question"]})


def judge_gsm8k_peft(items: list[dict], answers: list[Answer], options: Options) -> list[dict]:
    """`correct`: peft's rule, which reads the prompt too; `math_verify`: of the completion alone."""
    completions = [answer["completions"][0] for answer in answers]
    texts = [answer["prompt"] + completion for answer, completion in zip(answers, completions, strict=True)]
    by_rule = [(peft_gsm8k(text, item["answer"]), "") for text, item in zip(texts, items, strict=True)]
    pairs = [(c, str(gsm8k_gold(item))) for c, item in zip(completions, items, strict=True)]
    (by_library,) = apply_in_workers(["math_verify"], pairs, options)
    return [verdict(*of_item) for of_item in zip(pairs, by_rule, by_library, strict=True)]


GSM8K_PEFT = Task(  # peft's limit of 800 tokens for prompt and answer together is beyond all of these prompts
    name="gsm8k_peft",
    protocol="peft",
    load=load_gsm8k,
    formats={"base": Format(lambda item, _: peft_question(item))},
    judge=judge_gsm8k_peft,
    metrics=("correct", "math_verify"),
    max_new_tokens=300,
    versions={1319: "main/test"},
)

# ---------------------------------------------------------------------------------------------------------------------
# MATH
# ---------------------------------------------------------------------------------------------------------------------

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def math_gold(item: dict) -> str:
    r"""The content of the solution's last \boxed{...}.

    Raises:
        ValueError: there is none.
    """
    gold = last_boxed(item["solution"])
    if gold is None:
        raise ValueError(f"the solution must hold a \\boxed{{...}}, got ...{item['solution'][-40:]!r}")
    return gold


def load_math(source: Source) -> list[dict]:
    """The 5,000 test problems: one local file, or seven configurations of the Hub."""
    columns, hub = dict.fromkeys(("problem", "level", "type", "solution"), str), "EleutherAI/hendrycks_math"
    if source.folder or source.file:
        items = source.rows("math/test.jsonl.gz", (hub, None, "test"), columns)
    else:
        items = [row for subject in SUBJECTS for row in source.rows("", (hub, subject, "test"), columns)]
    return source.checked([{c: item[c] for c in columns} for item in items], math_gold)


MATH = Task(
    name="hendrycks_math",
    protocol="metamath",
    load=load_math,
    formats={"alpaca": Format(lambda item, _: metamath_prompt(item["problem"]), METAMATH_STOP)},
    judge=judged_by("metamath_math", math_gold),
    metrics=("correct", "math_verify"),
    max_new_tokens=2048,
    versions={5000: "test"},
    group=lambda item: item["type"],
)
