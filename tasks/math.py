"""Mathematics: GSM8K under MetaMath's protocol (meta-math/MetaMath, eval_gsm8k.py)."""

import re

from data import ALPACA
from tasks.source import Source
from tasks.task import Format, Task, each

# vLLM's `stop` in MetaMath's script, in its order
METAMATH_STOP = tuple(
    s for word in ("Question", "USER", "ASSISTANT", "Instruction", "Response") for s in (word + ":", word)
)


def metamath_prompt(item: dict, tokenizer: object = None) -> str:
    """The whole question is the instruction: it is not split into instruction and input as training rows are."""
    return ALPACA.format_map({"instruction": item["question"]}) + " Let's think step by step."


def metamath_number(completion: str) -> int | None:
    """The number that MetaMath's rule finds in a completion, or None.

    The first number after the last "The answer is: ", rounded to a whole one; a fraction is divided first. Quirks of
    the rule, kept: only one comma, point or slash belongs to a number, so "1,450,000" is 1450; "1,5" is 15.
    """
    pieces = completion.split("The answer is: ")
    found = re.search(r"[\-+]?\d*[\.,/]?\d+", pieces[-1].strip()) if len(pieces) > 1 else None
    if not found:
        return None
    numerator, slash, denominator = found.group().replace(",", "").partition("/")
    try:
        if slash and denominator != "0":  # the original takes the numerator of n/0
            return round(float(numerator) / float(denominator))
        return round(float(numerator))
    except (ValueError, OverflowError, ZeroDivisionError):  # "/5" has no numerator; infinity cannot be rounded
        return None


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


def score_gsm8k(item: dict, completion: str) -> dict:
    extracted = metamath_number(completion)
    # float on both sides, as the original compares
    correct = extracted is not None and float(extracted) == float(gsm8k_gold(item))
    return {"extracted": extracted, "gold": gsm8k_gold(item), "correct": correct}


def load_gsm8k(source: Source) -> list[dict]:
    items = source.rows("gsm8k/test.jsonl", ("openai/gsm8k", "main", "test"), ("question", "answer"))
    return source.checked(items, gsm8k_gold)


GSM8K = Task(
    name="gsm8k",
    protocol="metamath",
    load=load_gsm8k,
    formats={"alpaca": Format(metamath_prompt, METAMATH_STOP)},
    judge=each(score_gsm8k),
    max_new_tokens=512,
    versions={1319: "main/test"},
)
