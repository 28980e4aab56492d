"""Code: HumanEval(+) and MBPP(+) under the protocols of EvalPlus and Magicoder, HumanEval of open-instruct, both plain.

Programs run in the sandbox (sandbox/run.py), where judges.py decides. What a program is made of depends on the prompt's
format: a base model goes on with the prompt, a chat model writes the whole program.
"""

import ast
import re
from collections.abc import Callable
from typing import Any

from common.errors import UserError
from common.templates import MAGICODER
from sandbox import run as sandbox
from sandbox.run import Trial
from tasks.metrics import per_item
from tasks.sanitize import parse, sanitize
from tasks.source import Source, checked_rows
from tasks.task import Answer, Chat, Format, Judge, Options, Task

# ---------------------------------------------------------------------------------------------------------------------
# Prompts and programs (evalplus/codegen.py and provider/; magicoder, experiments/text2code.py)
# ---------------------------------------------------------------------------------------------------------------------

STOP = ("<|endoftext|>", "<|endofmask|>", "</s>", "\nif __name__", "\ndef main(", "\nprint(")
STOP_HUMANEVAL = (*STOP, "\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert ")
STOP_MBPP = (*STOP, '\n"""', "\nassert")
STOP_CHAT = (*STOP, "\n```\n")
STOP_PLAIN = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # lm-eval and open-instruct


def raw_prompt(item: dict, tokenizer: object = None) -> str:
    return item["prompt"]


def base_prompt(item: dict, tokenizer: object = None) -> str:
    return item["prompt"].strip() + "\n"


def chat_prompt(item: dict, tokenizer: object = None) -> Chat:
    return Chat(
        user="Please provide a self-contained Python script that solves the following problem in a markdown code "
        f"block:\n```\n{item['prompt'].strip()}\n```\n",
        prefix="Below is a Python script with a self-contained function that solves the problem and passes "
        "corresponding tests:\n```python\n",
    )


def magicoder_humaneval(item: dict, tokenizer: object = None) -> str:
    block = f"```python\n{item['prompt'].strip()}"
    instruction = f"Write a solution to the following problem:\n{block}\n```"
    return MAGICODER.format_map({"instruction": instruction}) + block


def magicoder_mbpp(item: dict, tokenizer: object = None) -> str:
    text, mark, assertion = item["prompt"].strip().strip('"').strip().partition("assert")
    text = text.strip() if text.strip().endswith(".") else text.strip() + "."
    instruction = f"{text} Your code should satisfy the following assertion:\n```python\n{mark}{assertion}\n```"
    return MAGICODER.format_map({"instruction": instruction}) + "```python"


def evalplus_program(item: dict, completion: str, format: str) -> str:
    """What EvalPlus runs: the sanitized text of the prompt's stub and what follows it, or of the chat's answer."""
    is_mbpp = item["prompt"].lstrip().startswith('"""')
    if format == "magicoder" and not is_mbpp:  # as Magicoder's text2code.py
        return item["prompt"] + completion
    completion = completion.replace("\t", "    ")
    if format == "base":
        return sanitize(base_prompt(item) + completion, item["entry_point"])
    return sanitize(completion, item["entry_point"])  # the answer is the whole program


def plain_program(item: dict, completion: str, format: str) -> str:
    return item["prompt"] + completion


def completion_alone(item: dict, completion: str, format: str) -> str:
    return completion


# ---------------------------------------------------------------------------------------------------------------------
# Items, and the trial of a program on one
# ---------------------------------------------------------------------------------------------------------------------

HUMANEVAL_FILE = ("humaneval/HumanEval.jsonl.gz", ("openai/openai_humaneval", None, "test"))
HUMANEVALPLUS_FILE = ("humanevalplus/HumanEvalPlus.jsonl.gz", ("evalplus/humanevalplus", None, "test"))
MBPP_FILE = "mbpp/mbpp.jsonl"
MBPP_HUB = "google-research-datasets/mbpp"
MBPPPLUS_FILE = ("mbppplus/MbppPlus-v0.2.0.jsonl.gz", ("evalplus/mbppplus", None, "test"))
HUB_TESTS = "its test column in place of EvalPlus' inputs and oracles"
HUMANEVAL_COLUMNS = dict.fromkeys(("task_id", "prompt", "canonical_solution", "entry_point", "test"), str)
HUMANEVALPLUS_COLUMNS = {name: str for name in HUMANEVAL_COLUMNS if name != "test"}
EVALPLUS_COLUMNS = {
    "entry_point": str,
    "canonical_solution": str,
    "base_input": list,
    "plus_input": object,
    "atol": object,
}
HUB_MBPPPLUS_COLUMNS = {"code": str, "test_imports": list, "test_list": list, "test": str}


def load_humaneval(source: Source) -> list[dict]:
    rows = source.rows(*HUMANEVAL_FILE, HUMANEVAL_COLUMNS)
    items = [{column: row[column] for column in HUMANEVAL_COLUMNS} for row in rows]
    return source.checked(items, lambda item: check_reference(item["prompt"] + item["canonical_solution"]))


def check_reference(code: str) -> None:
    """Raise ValueError for a reference solution that is no Python."""
    if parse(code) is None:
        raise ValueError(f"the reference solution is no Python: {code[-60:]!r}")


def load_humaneval_plus(source: Source) -> list[dict]:
    """EvalPlus' file, or the Hub's, which has no inputs: then its test column judges, and HumanEval's for base."""
    rows = source.rows(*HUMANEVALPLUS_FILE, HUMANEVALPLUS_COLUMNS)
    items = [
        {
            **{column: row[column] for column in ("task_id", "prompt", "entry_point")},
            "_reference": row["prompt"] + row["canonical_solution"],
        }
        for row in rows
    ]
    source.checked(items, lambda item: check_reference(item["_reference"]))
    if "base_input" in rows[0]:
        checked_rows(rows, source.read[0], EVALPLUS_COLUMNS)
        return [{**item, **inputs_of(row)} for item, row in zip(items, rows, strict=True)]
    checked_rows(rows, source.read[0], {"test": str})
    source.read.append(HUB_TESTS)
    base = {row["task_id"]: row["test"] for row in source.rows(*HUMANEVAL_FILE, HUMANEVAL_COLUMNS, items=False)}
    for i, row in enumerate(rows, 1):
        if row["task_id"] not in base:
            raise UserError(
                f"{source.read[0]}, item {i}: HumanEval, which has the base tests, has no {row['task_id']!r}"
            )
    if all(row["test"] == base[row["task_id"]] for row in rows):
        raise UserError(f"{source.read[0]}: these are HumanEval's tests, not HumanEval+'s: score them as humaneval")
    for item, row in zip(items, rows, strict=True):
        tests = {"base": base[item["task_id"]], "plus": row["test"]}
        item["_tests"] = {group: f"{test}\ncheck({item['entry_point']})" for group, test in tests.items()}
    return items


def load_mbpp_plus(source: Source) -> list[dict]:
    """EvalPlus' file, or the Hub's, which has no inputs: then its test column judges, and its asserts for base."""
    rows = source.rows(*MBPPPLUS_FILE, {"task_id": object, "prompt": str})
    if "base_input" in rows[0]:
        checked_rows(rows, source.read[0], EVALPLUS_COLUMNS)
        items = [
            {
                **{column: row[column] for column in ("task_id", "prompt", "entry_point")},
                "_reference": row["prompt"] + row["canonical_solution"],
                **inputs_of(row),
            }
            for row in rows
        ]
        return source.checked(items, lambda item: check_reference(item["_reference"]))
    checked_rows(rows, source.read[0], HUB_MBPPPLUS_COLUMNS)
    source.checked(rows, lambda row: called(row["code"], row["test_list"]))
    source.read.append(HUB_TESTS)
    return [
        {
            "task_id": f"Mbpp/{row['task_id']}",
            # as in EvalPlus' file, whose texts have no links
            "prompt": f'"""\n{re.sub("https?://[^ ]+", "", row["prompt"])}\n{row["test_list"][0]}\n"""\n',
            "entry_point": called(row["code"], row["test_list"]),
            "_reference": row["code"],
            "_tests": {"base": "\n".join([*row["test_imports"], *row["test_list"]]), "plus": row["test"]},
        }
        for row in rows
    ]


def inputs_of(row: dict) -> dict[str, Any]:
    return {"_base_input": row["base_input"], "_plus_input": row["plus_input"], "_atol": row["atol"]}


def called(code: str, tests: list[str]) -> str:
    """The function of `code` that the first of the tests calls. Raises ValueError where there is none."""
    if not tests:
        raise ValueError("there are no tests")
    if not all(isinstance(test, str) for test in tests):
        raise ValueError(f"its tests must be texts, got {tests}")
    (test, *_) = tests
    check_reference(code)
    check_reference(test)
    defined = {node.name for node in ast.walk(parse(code)) if isinstance(node, ast.FunctionDef)}
    found = [n.id for n in ast.walk(parse(test)) if isinstance(n, ast.Name) and n.id in defined]
    if not found:
        raise ValueError(f"the test calls no function of the reference solution: {test[:60]!r}")
    return found[0]


MBPP_TEST, MBPP_SHOTS = range(11, 511), (2, 3, 4)
MBPP_COLUMNS = {"task_id": int, "text": str, "code": str, "test_setup_code": object, "test_list": list}


def load_mbpp(source: Source) -> list[dict]:
    """The 500 test tasks of plain MBPP; three of its prompt split are the examples before each."""
    rows = source.rows(MBPP_FILE, (MBPP_HUB, "full", "test"), MBPP_COLUMNS)
    shots = [row for row in rows if row["task_id"] in MBPP_SHOTS]  # a local file holds all splits
    if len(shots) < len(MBPP_SHOTS):
        others = source.rows(MBPP_FILE, (MBPP_HUB, "full", "prompt"), MBPP_COLUMNS, items=False)
        shots = [row for row in others if row["task_id"] in MBPP_SHOTS]
    if len(shots) != len(MBPP_SHOTS):
        raise UserError(f"{source.read[-1]}: {len(shots)} of the tasks {MBPP_SHOTS}, the examples before each item")
    source.checked(shots, check_mbpp)
    before = "".join(f"{mbpp_question(row)}{row['code']}\n[DONE]\n\n" for row in shots)
    items = [{column: row[column] for column in MBPP_COLUMNS} for row in rows if row["task_id"] in MBPP_TEST]
    source.checked(items, check_mbpp)
    return [{**item, "_shots": before} for item in items]


def check_mbpp(item: dict) -> None:
    """Raise ValueError for a row of MBPP that cannot be asked or judged."""
    called(item["code"], item["test_list"])
    if not isinstance(item["test_setup_code"], str):  # mostly empty
        raise ValueError(f"test_setup_code must be text, got {item['test_setup_code']!r}")


def mbpp_question(row: dict) -> str:
    tests = "\n".join(row["test_list"][:3])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} Your code should pass these tests:"
        f"\n\n{tests}\n[BEGIN]\n"
    )


def mbpp_prompt(item: dict, tokenizer: object = None) -> str:
    return item["_shots"] + mbpp_question(item)


def humaneval_trial(item: dict, program: str) -> Trial:
    """OpenAI's human-eval (execution.py): 3 seconds for the program and its tests."""
    data = {
        "program": program,
        "reference": item["prompt"] + item["canonical_solution"],  # some tests use functions of the prompt
        "remote": [item["entry_point"]],
        "tests": {"base": f"{item['test']}\ncheck({item['entry_point']})"},
    }
    return Trial("judge_asserts", data, seconds=3.0)


def mbpp_trial(item: dict, program: str) -> Trial:
    tests = "\n".join([item["test_setup_code"], *item["test_list"]])
    data = {"program": program, "reference": item["code"], "remote": None, "tests": {"base": tests}}
    return Trial(
        "judge_asserts", data, seconds=10.0
    )  # lm-eval has 3, which the reference of 123 needs on a slow machine


def evalplus_trial(item: dict, program: str) -> Trial:
    """EvalPlus (evaluate.py): max(4 s, 4 times the reference's time) for each input, 60 s for all of them."""
    if "_tests" in item:
        data = {"reference": item["_reference"], "remote": [item["entry_point"]], "tests": item["_tests"]}
        return Trial("judge_asserts", {"program": program, **data}, seconds=60.0)
    name, _, number = item["task_id"].partition("/")
    data = {
        "program": program,
        "reference": item["_reference"],
        "entry_point": item["entry_point"],
        "task": int(number) if name == "Mbpp" else 0,
        "base": item["_base_input"],
        "plus": item["_plus_input"],
        "atol": item["_atol"],
        "least": 4.0,
        "factor": 4.0,
    }
    return Trial("judge_inputs", data, seconds=60.0, spare=120.0)


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------------------------------------------


def in_sandbox(
    program: Callable[[dict, str, str], str], trial: Callable[[dict, str], Trial], metrics: dict[str, tuple[str, int]]
) -> Judge:
    """A judge that runs programs.

    Args:
        program: (item, completion, prompt format) -> program
        trial: (item, program) -> how it is judged
        metrics: name -> (group of tests, k of pass@k)
    """

    def judge(items: list[dict], answers: list[Answer], options: Options) -> list[dict]:
        unsafe = sandbox.ensure_available(options.allow_unsafe_code)
        programs = [
            [program(item, completion, answer["format"]) for completion in answer["completions"]]
            for item, answer in zip(items, answers, strict=True)
        ]
        different = list(dict.fromkeys((i, text) for i, texts in enumerate(programs) for text in texts))
        trials = [trial(items[i], text) for i, text in different]
        verdicts = dict(zip(different, sandbox.run_all(trials, options.workers, unsafe, show="judging"), strict=True))
        of_items = [[verdicts[i, text] for text in texts] for i, texts in enumerate(programs)]
        scores = {name: pass_at_k(of_items, group, k) for name, (group, k) in metrics.items()}
        return [
            {**{name: scores[name][i] for name in metrics}, **summary(of_items[i], texts, unsafe)}
            for i, texts in enumerate(programs)
        ]

    return judge


def pass_at_k(verdicts: list[list[dict]], group: str, k: int) -> list[float]:
    """pass@k of each item, from the verdicts on the programs of its samples."""
    passed = [[verdict.get(group) == "passed" for verdict in samples] for samples in verdicts]
    return per_item("pass_at_k", predictions=passed, k=k)[f"pass@{k}"]


def summary(verdicts: list[dict], programs: list[str], unsafe: bool) -> dict:
    """What is worth storing of the verdicts on the programs of an item's samples."""
    return {
        "extracted": programs if any(text.strip() for text in programs) else None,
        "verdicts": verdicts,
        "timeouts": sum(map(sandbox.timed_out, verdicts)),
        "crashes": sum(v.get("crashed", False) for v in verdicts),
        "sandbox": "none" if unsafe else "bubblewrap",
    }


def ensure_sandbox(options: Options) -> None:
    sandbox.ensure_available(options.allow_unsafe_code)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------------------


def evalplus(name: str, load: Callable, stop: tuple[str, ...], magicoder: Callable, versions: dict[int, str]) -> Task:
    return Task(
        name=name,
        protocol="evalplus",
        load=load,
        formats={
            "base": Format(base_prompt, stop),
            "chat": Format(chat_prompt, STOP_CHAT),
            "magicoder": Format(magicoder, ("```",)),
        },
        judge=in_sandbox(evalplus_program, evalplus_trial, {"plus": ("plus", 1), "base": ("base", 1)}),
        metrics=("plus", "base"),
        max_new_tokens=768,
        versions=versions,
        judge_needs_data=True,
        preflight=ensure_sandbox,
    )


def sampled(name: str, k: int, temperature: float) -> Task:
    """HumanEval as open-instruct measures pass@k (eval/codex_humaneval): 20 samples per task."""
    return Task(
        name=name,
        protocol="open_instruct",
        load=load_humaneval,
        formats={"base": Format(raw_prompt, STOP_PLAIN)},
        judge=in_sandbox(plain_program, humaneval_trial, {f"pass@{k}": ("base", k)}),
        metrics=(f"pass@{k}",),
        max_new_tokens=512,
        samples=20,
        temperature=temperature,
        top_p=0.95,
        versions={164: "HumanEval"},
        preflight=ensure_sandbox,
    )


HUMANEVAL_PLUS = evalplus(
    "humaneval_plus", load_humaneval_plus, STOP_HUMANEVAL, magicoder_humaneval, {164: "HumanEval+"}
)
MBPP_PLUS = evalplus("mbpp_plus", load_mbpp_plus, STOP_MBPP, magicoder_mbpp, {378: "MBPP+ v0.2.0", 399: "MBPP+ v0.1.0"})
HUMANEVAL_PASS1 = sampled("humaneval_pass1", 1, 0.1)
HUMANEVAL_PASS10 = sampled("humaneval_pass10", 10, 0.8)

HUMANEVAL = Task(
    name="humaneval",
    protocol="plain",
    load=load_humaneval,
    formats={"base": Format(raw_prompt, STOP_PLAIN)},
    judge=in_sandbox(plain_program, humaneval_trial, {"pass@1": ("base", 1)}),
    metrics=("pass@1",),
    max_new_tokens=1024,
    versions={164: "HumanEval"},
    preflight=ensure_sandbox,
)

MBPP = Task(
    name="mbpp",
    protocol="plain",
    load=load_mbpp,
    formats={"base": Format(mbpp_prompt, ("[DONE]",))},
    judge=in_sandbox(completion_alone, mbpp_trial, {"pass@1": ("base", 1)}),
    metrics=("pass@1",),
    max_new_tokens=1024,
    versions={500: "full/test"},
    preflight=ensure_sandbox,
)
