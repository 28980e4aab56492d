"""When a mathematical answer is right: the papers' rules to the letter, and math-verify's verdict.

This file imports the standard library alone (and math-verify where it is called), since workers load it by its path.
"""

import re
from decimal import Decimal

PHRASE = "The answer is: "  # that MetaMath's answers end in


def apply(rule: str, completion: str, gold: str) -> dict:
    """{"extracted": what the rule found in the completion, or None; "correct": bool} of a rule of RULES."""
    return RULES[rule](completion, gold)


# ---------------------------------------------------------------------------------------------------------------------
# MetaMath, GSM8K: eval_gsm8k.py
# ---------------------------------------------------------------------------------------------------------------------


def metamath_number(completion: str) -> int | None:
    """The number that MetaMath's rule finds in a completion, or None.

    The first number after the last "The answer is: ", rounded to a whole one; a fraction is divided first. Quirks of
    the rule, kept: only one comma, point or slash belongs to a number, so "1,450,000" is 1450; "1,5" is 15.
    """
    pieces = completion.split(PHRASE)
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


def metamath_gsm8k(completion: str, gold: str) -> dict:
    extracted = metamath_number(completion)
    # float on both sides, as the original compares
    return {"extracted": extracted, "correct": extracted is not None and float(extracted) == float(gold)}


# ---------------------------------------------------------------------------------------------------------------------
# MetaMath, MATH: eval_math.py and util.py, whose normaliser is that of lm-eval and (nearly) of hendrycks/math
# ---------------------------------------------------------------------------------------------------------------------


def metamath_answer(completion: str) -> str | None:
    """What follows the last "The answer is: ", up to a point that ends a line or the text; None without the phrase."""
    pieces = completion.split(PHRASE)
    return pieces[-1].split(".\n")[0].strip().removesuffix(".").strip() if len(pieces) > 1 else None


def last_boxed(solution: str) -> str | None:
    r"""The content of the last \boxed{...} of a solution, or None; a last \fbox counts as having none."""
    start = solution.rfind(r"\boxed")
    if start < 0 or not solution.startswith(r"\boxed{", start):
        return None
    depth = 0
    for i in range(start, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[i], 0)
        if solution[i] == "}" and depth == 0:
            return solution[start + len(r"\boxed{") : i]
    return None


def normalise(answer: str) -> str:
    """The form in which two answers are compared.

    Raises:
        ValueError, IndexError: where the original's code fails; equivalent() then compares the raw texts.
    """
    s = answer.replace("\n", "").replace(r"\!", "").replace("\\\\", "\\")
    s = s.replace("tfrac", "frac").replace("dfrac", "frac").replace(r"\left", "").replace(r"\right", "")
    s = s.replace(r"^{\circ}", "").replace(r"^\circ", "").replace(r"\$", "")
    if r"\text{ " in s:  # a unit on the right
        s, _ = s.split(r"\text{ ")
    s = s.replace(r"\%", "").replace(r"\%", "")  # twice, as the original
    s = s.replace(" .", " 0.").replace("{.", "{0.")
    if not s:
        return s
    if s[0] == ".":
        s = "0" + s
    left, *right = s.split("=")
    if len(right) == 1 and len(left) <= 2:  # "k = "
        s = right[0]
    s = _brace_roots(s).replace(" ", "")
    s = _brace_fractions(s)
    if s == "0.5":
        s = r"\frac{1}{2}"
    if s.count("/") == 1:  # of anything but whole numbers the original fails
        a, b = map(int, s.split("/"))
        s = rf"\frac{{{a}}}{{{b}}}" if s == f"{a}/{b}" else s
    return s


def _brace_roots(s: str) -> str:
    r"""\sqrt3 -> \sqrt{3}"""
    first, *roots = s.split(r"\sqrt")
    return first + "".join(r"\sqrt" + (r if r[0] == "{" else f"{{{r[0]}}}{r[1:]}") for r in roots)


def _brace_fractions(s: str) -> str:
    r"""\frac12 and \frac1{2} -> \frac{1}{2}; a fraction that is cut off leaves the whole text as it is."""
    first, *fractions = s.split(r"\frac")
    out = [first]
    for f in fractions:
        if f[0] == "{":
            out.append(f)
        elif len(f) < 2:
            return s
        else:
            out.append(f"{{{f[0]}}}{f[1:]}" if f[1] == "{" else f"{{{f[0]}}}{{{f[1]}}}{f[2:]}")
    return r"\frac".join(out)


def equivalent(a: str | None, b: str | None) -> bool:
    """Whether two answers are equal once normalised; two that are missing are."""
    if a is None or b is None:
        return a is b
    try:
        return normalise(a) == normalise(b)
    except (ValueError, IndexError):
        return a == b


def metamath_math(completion: str, gold: str) -> dict:
    extracted = metamath_answer(completion)
    return {"extracted": extracted, "correct": extracted is not None and equivalent(extracted, gold)}


# ---------------------------------------------------------------------------------------------------------------------
# open-instruct, GSM8K: eval/gsm/run_eval.py
# ---------------------------------------------------------------------------------------------------------------------


def open_instruct_number(completion: str) -> tuple[str | None, str]:
    """The last number of a completion, or None, and the text that is compared: the number, or the whole completion.

    Commas between digits are taken away first. A sign belongs to numbers with a decimal point alone.
    """
    text = re.sub(r"(\d),(\d)", r"\1\2", completion)
    numbers = re.findall(r"[-+]?\d*\.\d+|\d+", text)
    return (numbers[-1], numbers[-1]) if numbers else (None, text)


# ---------------------------------------------------------------------------------------------------------------------
# peft, GSM8K: method_comparison/MetaMathQA/utils.py
# ---------------------------------------------------------------------------------------------------------------------

# MetaMath's phrases and GSM8K's mark. The first one that a text holds anywhere is looked for, wherever the others are.
PEFT_PHRASES = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")


def peft_answer(text: str) -> str | None:
    """What peft's rule finds in a text: the rest of the line behind the last of its phrases; None without a phrase."""
    text = text.strip().rstrip(".!?")
    phrase = next((phrase for phrase in PEFT_PHRASES if phrase in text), None)
    if phrase is None:
        return None
    return text.rpartition(phrase)[2].strip().partition("\n")[0].strip(" .!?$%")


def peft_value(answer: str) -> float | str:
    """A number or a fraction as a float; any other answer as it is: with a thousands comma, a unit, or in LaTeX."""
    numerator, slash, denominator = answer.partition("/")
    try:
        number = Decimal(numerator.strip())
        return float(number / Decimal(denominator.strip()) if slash else number)
    except (ArithmeticError, ValueError):  # decimal's own errors are among the first
        return answer


def peft_gsm8k(text: str, gold: str) -> dict:
    """Whether an answer's text, prompt included, and the gold answer's text hold the same, by peft's rule for both."""
    extracted, wanted = peft_answer(text), peft_answer(gold)
    correct = extracted is not None and wanted is not None and peft_value(extracted) == peft_value(wanted)
    return {"extracted": extracted, "correct": correct}


# ---------------------------------------------------------------------------------------------------------------------
# math-verify
# ---------------------------------------------------------------------------------------------------------------------


def math_verify(completion: str, gold: str) -> dict:
    """math-verify's verdict on the completion: it looks for an answer in it by its own rules."""
    import math_verify as library

    # No timeouts of its own: they work in a main thread alone, and do not end all that can hang.
    parsed = library.parse(completion, parsing_timeout=None)
    wanted = library.parse(f"${gold}$", parsing_timeout=None)
    return {"correct": bool(parsed) and library.verify(wanted, parsed, timeout_seconds=None)}


def prepare() -> None:
    """Import at a worker's start what takes long to import."""
    import math_verify as library

    library.parse("$1$", parsing_timeout=None)


RULES = {
    "metamath_gsm8k": metamath_gsm8k,
    "metamath_math": metamath_math,
    "math_verify": math_verify,
}
