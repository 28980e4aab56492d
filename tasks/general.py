"""Knowledge, reasoning, languages, truthfulness as open-instruct scores them: MMLU, BBH, TyDiQA, TruthfulQA.

The protocol is that of allenai/open-instruct at ea3467d (June 2024), with its quirks. GSM8K with 8 examples, of the
same protocol, is in math.py.
"""

import json
import math
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from common.errors import UserError, nearest
from tasks.metrics import per_item
from tasks.source import Source, read_json, read_text
from tasks.task import Answer, Chat, Format, Options, Task, render

HERE = Path(__file__).parent

# ---------------------------------------------------------------------------------------------------------------------
# MMLU: eval/mmlu/run_eval.py
# ---------------------------------------------------------------------------------------------------------------------

LETTERS = ("A", "B", "C", "D")
MMLU_TOKENS = 2048  # a longer prompt loses its last example


def load_mmlu(shots: int) -> Callable[[Source], list[dict]]:
    def load(source: Source) -> list[dict]:
        """The test questions, each with its subject's examples from the dev split, in the order of the file."""
        columns = {"question": str, "subject": str, "choices": list, "answer": int}
        items = source.rows("mmlu/test.jsonl.gz", ("cais/mmlu", "all", "test"), columns)
        examples: dict[str, list[dict]] = {}
        if shots:
            for row in source.rows("mmlu/dev.jsonl.gz", ("cais/mmlu", "all", "dev"), columns, items=False):
                examples.setdefault(row["subject"], []).append(row)
        source.checked(items, _check_mmlu)
        for i, item in enumerate(items, 1):
            if shots and len(examples.get(item["subject"], [])) < shots:
                raise UserError(f"{source.read[0]}, item {i}: the dev split has no {shots} of {item['subject']!r}")
        return [{c: i[c] for c in columns} | {"_examples": examples.get(i["subject"], [])[:shots]} for i in items]

    return load


def _check_mmlu(item: dict) -> None:
    texts = [choice for choice in item["choices"] if isinstance(choice, str)]
    if len(texts) != 4 or len(item["choices"]) != 4 or item["answer"] not in range(4):
        raise ValueError(f"expected 4 choices and an answer in 0..3, got {item['choices']}, {item['answer']!r}")


def mmlu_question(item: dict) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, item["choices"], strict=True))
    return f"{item['question']}{choices}\nAnswer:"


def mmlu_prompt(item: dict, examples: list[dict]) -> str:
    """Two spaces after "about", as the original has them."""
    subject = "".join(f" {word}" for word in item["subject"].split("_"))
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return head + "".join(f"{mmlu_question(e)} {LETTERS[e['answer']]}\n\n" for e in examples) + mmlu_question(item)


def mmlu_format(name: str) -> Format:
    """One of the formats; examples are dropped, the last first, until the prompt has at most 2048 tokens."""

    def prompt(item: dict, tokenizer: PreTrainedTokenizerBase) -> str | Chat:
        for k in range(len(item["_examples"]), -1, -1):
            text = mmlu_prompt(item, item["_examples"][:k])
            shown = text if name == "base" else Chat(text, "The answer is:")
            if k == 0 or len(tokenizer.encode(render(shown, name, tokenizer), add_special_tokens=False)) <= MMLU_TOKENS:
                return shown
        raise AssertionError("the loop ends at k = 0")

    return Format(prompt)


def judge_mmlu(items: list[dict], answers: list[Answer], options: Options) -> list[dict]:
    """The letter with the largest probability; the first of equal ones."""
    verdicts = []
    for item, answer in zip(items, answers, strict=True):
        scores = answer["logprobs"]
        chosen = LETTERS[max(range(4), key=lambda i: scores[i])] if scores else None
        verdicts.append({"extracted": chosen, "correct": chosen == LETTERS[item["answer"]]})
    return verdicts


def mmlu(name: str, shots: int) -> Task:
    return Task(
        name=name,
        protocol="open_instruct",
        load=load_mmlu(shots),
        formats={word: mmlu_format(word) for word in ("base", "tulu", "chat")},
        judge=judge_mmlu,
        candidates=lambda item: list(LETTERS),
        scoring="next_token",
        versions={14042: "test, 57 subjects"},
        group=lambda item: item["subject"],
    )


MMLU, MMLU_5SHOT = mmlu("mmlu", 0), mmlu("mmlu_5shot", 5)

# ---------------------------------------------------------------------------------------------------------------------
# BIG-Bench Hard: eval/bbh/run_eval.py
# ---------------------------------------------------------------------------------------------------------------------

BBH_TASKS = (
    "boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages",
    "formal_fallacies", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects",
    "logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation",
    "multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table",
    "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks",
    "sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies", "word_sorting",
)  # fmt: skip
BBH_ORIGIN = "github.com/suzgunmirac/BIG-Bench-Hard"


def load_bbh(source: Source) -> list[dict]:
    """27 tasks in alphabetical order, or 40 examples of each: the original's order is that of its file system, so that
    the published 40 cannot be had again; these are drawn by the same rule.
    """
    sampler, items = random.Random(42), []
    for task in BBH_TASKS:
        prompt = read_text(source.local(f"bbh/cot-prompts/{task}.txt", f"{BBH_ORIGIN}, cot-prompts/"))
        prompt = "".join(prompt.splitlines(keepends=True)[2:])  # after the canary and a rule
        columns = {"input": str, "target": str}
        rows = source.json(f"bbh/bbh/{task}.json", ("SaylorTwift/bbh", task, "test"), "examples", columns)
        if source.published and len(rows) < 40:
            raise UserError(
                f"published_subset takes 40 items of each task of BBH, {task} has {len(rows)}: leave it out"
            )
        rows = sampler.sample(rows, 40) if source.published else rows
        items += [{"task": task, "input": r["input"], "target": r["target"], "_examples": prompt} for r in rows]
    return items


def without_reasoning(examples: str) -> str:
    """The examples of a task with the answer alone behind "A:"."""
    fields = []
    for field in examples.split("\n\n"):
        if field.startswith("Q:"):
            question, answer = field.split("\nA:")[0], field.split("So the answer is")[-1]
            field = f"{question.strip()}\nA: {answer.strip()}"
        fields.append(field)
    return "\n\n".join(fields)


def bbh_answer(completion: str) -> str:
    """What follows "answer is" up to a point on the same line, or the whole completion."""
    found = re.search(r"[t|T]he answer is (.*?)\.", completion)
    return found.group(1).strip() if found else completion.strip()


def judge_bbh(items: list[dict], answers: list[Answer], options: Options) -> list[dict]:
    """Quirk of the rule, kept: punctuation does not count, so that brackets are compared by the spaces between them."""
    extracted = [bbh_answer(answer["completions"][0]) for answer in answers]
    targets = [item["target"] for item in items]
    matches = per_item(
        "exact_match", predictions=extracted, references=targets, ignore_case=True, ignore_punctuation=True
    )["exact_match"]
    return [
        {"extracted": answer, "gold": target, "correct": match}
        for answer, target, match in zip(extracted, targets, matches, strict=True)
    ]


def bbh(name: str, examples: Callable[[str], str]) -> Task:
    def question(item: dict) -> str:
        return f"{examples(item['_examples']).strip()}\n\nQ: {item['input']}"

    return Task(
        name=name,
        protocol="open_instruct",
        load=load_bbh,
        formats={
            "base": Format(lambda item, _: question(item) + "\nA:", ("\n\n",)),
            "tulu": Format(lambda item, _: Chat(question(item), "A:"), ("\n\n",)),
            "chat": Format(lambda item, _: Chat(question(item), "A:"), ("\n\n",)),
        },
        judge=judge_bbh,
        max_new_tokens=512,
        versions={6511: "27 tasks", 1080: "40 of each of 27 tasks"},
        group=lambda item: item["task"],
        macro=True,
    )


BBH, BBH_DIRECT = bbh("bbh", lambda examples: examples), bbh("bbh_direct", without_reasoning)

# ---------------------------------------------------------------------------------------------------------------------
# TyDiQA-GoldP, one example, gold passage: eval/tydiqa/run_eval.py
# ---------------------------------------------------------------------------------------------------------------------

TYDIQA_WORDS = json.loads((HERE / "tydiqa.json").read_text(encoding="utf-8"))
# Questions of each language in the two parts, of which the published subset and the example are drawn: these numbers,
# not the files of the others, decide which ones they are.
TYDIQA_DEV = {
    "arabic": 921, "bengali": 113, "english": 440, "finnish": 782, "indonesian": 565, "korean": 276, "russian": 812,
    "swahili": 499, "telugu": 669,
}  # fmt: skip
TYDIQA_TRAIN = {
    "arabic": 14805, "bengali": 2390, "english": 3696, "finnish": 6855, "indonesian": 5702, "korean": 1625,
    "russian": 6490, "swahili": 2755, "telugu": 5563,
}  # fmt: skip
TYDIQA_HUB = "google-research-datasets/tydiqa"
PASSAGE_TOKENS = 512


def load_tydiqa(source: Source) -> list[dict]:
    """The questions of nine languages (or some), or 100 of each, and an example of each from its training part.

    The original draws with one generator: first the published 100 of each language, then the examples.
    """
    wanted = source.languages or sorted(TYDIQA_WORDS)
    for word in wanted:
        if word not in TYDIQA_WORDS:
            raise UserError(f"languages: unknown word {word!r}{nearest(word, TYDIQA_WORDS)}")
    dev, train = squad_rows(source, "dev", "validation", wanted), squad_rows(source, "train", "train", wanted)
    sampler, items = random.Random(42), []
    for language, n in TYDIQA_DEV.items():
        drawn = sampler.sample(range(n), 100) if source.published else range(len(dev[language]))
        if language in wanted:
            _check_count(language, "validation", len(dev[language]), n if source.published else None)
            items += [dev[language][i] for i in drawn]
    examples = {}
    for language, n in TYDIQA_TRAIN.items():
        (drawn,) = sampler.sample(range(n), 1)
        if language in wanted:
            _check_count(language, "training", len(train[language]), n)
            examples[language] = train[language][drawn]
    return [{**item, "_example": examples[item["language"]]} for item in items]


def _check_count(language: str, part: str, got: int, expected: int | None) -> None:
    if expected is not None and got != expected:
        raise UserError(f"TyDiQA's {part} part has {expected} questions in {language}, got {got}")


def squad_rows(source: Source, part: str, split: str, languages: Iterable[str]) -> dict[str, list[dict]]:
    """Rows of each language, in the order of the file: id, language, context, question, answers (texts)."""
    found: dict[str, list[dict]] = {language: [] for language in TYDIQA_WORDS}

    def add(row: dict, context: str, answers: list[str]) -> None:
        language = row["id"].split("-")[0]
        kept = {"id": row["id"], "language": language, "context": context, "question": row["question"]}
        if not answers or not all(
            isinstance(text, str) and text.strip() for text in (context, row["question"], *answers)
        ):
            raise ValueError(f"{row['id']} has no answer, or what is no text")
        if language not in found:
            raise ValueError(f"{row['id']!r} begins with no language of TyDiQA's")
        found[language].append(kept | {"answers": answers})

    if not source.folder:
        columns = {"id": str, "context": str, "question": str, "answers": dict}
        rows = source.rows("", (TYDIQA_HUB, "secondary_task", split), columns)
        source.checked(rows, lambda row: add(row, row["context"], row["answers"].get("text")))
        return found
    for language in languages:
        origin = f"{TYDIQA_HUB}, secondary_task, {split}; without it: --languages of those that are there"
        path = source.local(f"tydiqa_goldp/{language}_{part}.json.gz", origin)
        content = read_json(path)
        try:
            for paragraph in (p for article in content["data"] for p in article["paragraphs"]):
                for qa in paragraph["qas"]:
                    add(qa, paragraph["context"], [answer["text"] for answer in qa["answers"]])
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise UserError(f"{path}: expected the layout of SQuAD's files: {e!r}") from None
    return found


def shorten(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A passage cut to 512 tokens, BOS among them; the original leaves the BOS in the cut text, we do not."""
    ids, special = tokenizer.encode(text, add_special_tokens=False), tokenizer.num_special_tokens_to_add()
    return text if len(ids) + special <= PASSAGE_TOKENS else tokenizer.decode(ids[: PASSAGE_TOKENS - special])


def tydiqa_prompt(item: dict, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """(the prompt up to its last line, the word for "Answer:")"""
    words, example = TYDIQA_WORDS[item["language"]], item["_example"]

    def asked(row: dict) -> str:
        passage = f"{words['passage']} {shorten(row['context'], tokenizer)}"
        return f"{passage}\n{words['question']} {row['question']}\n"

    shot = f"{asked(example)}{words['answer']} {example['answers'][0]}"
    return f"{words['instruction']}\n\n{shot}\n\n{asked(item)}", words["answer"]


def judge_tydiqa(items: list[dict], answers: list[Answer], options: Options) -> list[dict]:
    """The best F1 and exact match over the gold answers."""
    extracted = [answer["completions"][0].strip() for answer in answers]
    golds = [item["answers"] for item in items]
    values = per_item("squad_f1", predictions=extracted, references=golds)
    return [
        {"extracted": answer, "gold": gold, "f1": f1, "exact_match": match}
        for answer, gold, f1, match in zip(extracted, golds, values["f1"], values["exact_match"], strict=True)
    ]


TYDIQA = Task(
    name="tydiqa",
    protocol="open_instruct",
    load=load_tydiqa,
    formats={
        "base": Format(lambda item, tokenizer: "".join(tydiqa_prompt(item, tokenizer)), ("\n",)),
        "tulu": Format(lambda item, tokenizer: Chat(*tydiqa_prompt(item, tokenizer))),
        "chat": Format(lambda item, tokenizer: Chat(*tydiqa_prompt(item, tokenizer))),
    },
    judge=judge_tydiqa,
    metrics=("f1", "exact_match"),
    max_new_tokens=50,
    versions={5077: "GoldP v1.1, 9 languages", 900: "GoldP v1.1, 100 of each of 9 languages"},
    group=lambda item: item["language"],
    macro=True,
)

# ---------------------------------------------------------------------------------------------------------------------
# TruthfulQA, multiple choice: eval/truthfulqa/run_eval.py
# ---------------------------------------------------------------------------------------------------------------------

TRUTHFULQA_PRIMER = (HERE / "truthfulqa_primer.txt").read_text(encoding="utf-8").strip()


def load_truthfulqa(source: Source) -> list[dict]:
    """Questions with their best, correct and incorrect answers, each ending in a point."""
    hub = ("truthfulqa/truthful_qa", "generation", "validation")
    if source.folder or source.file:
        origin = "github.com/sylinrl/TruthfulQA, data/v1/TruthfulQA.csv"
        columns = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")
        rows = [
            {"question": row["Question"], "best": row["Best Answer"], "correct": row["Correct Answers"].split(";")}
            | {"incorrect": row["Incorrect Answers"].split(";")}
            for row in source.csv("truthfulqa/TruthfulQA_v1.csv", origin, columns)
        ]
    else:
        columns = {"question": str, "best_answer": str, "correct_answers": list, "incorrect_answers": list}
        rows = [
            {"question": r["question"], "best": r["best_answer"], "correct": r["correct_answers"]}
            | {"incorrect": r["incorrect_answers"]}
            for r in source.rows("", hub, columns)
        ]
    return source.checked([_closed(row) for row in rows], _check_truthfulqa)


def _closed(row: dict) -> dict:
    """A point behind every answer that has none; empty answers are left out."""

    def close(answers: list[str]) -> list[str]:
        return [a.strip().removesuffix(".") + "." for a in answers if a.strip()]

    best = close([row["best"]])
    return {"question": row["question"], "best": best[0] if best else ""} | {
        k: close(row[k]) for k in ("correct", "incorrect")
    }


def _check_truthfulqa(item: dict) -> None:
    if item["best"] not in item["correct"] or not item["incorrect"]:
        raise ValueError(f"the best answer must be one of the correct ones, got {item['best']!r}")


def truthfulqa_question(item: dict) -> str:
    return f"{TRUTHFULQA_PRIMER}\n\nQ: {item['question']}"


def judge_truthfulqa(items: list[dict], answers: list[Answer], options: Options) -> list[dict]:
    """MC1: the best answer is more probable than every incorrect one. MC2: the correct ones' share of probability."""
    verdicts = []
    for item, answer in zip(items, answers, strict=True):
        if answer["logprobs"] is None:
            verdicts.append({"mc1": 0, "mc2": 0})
            continue
        n = len(item["correct"])
        correct, incorrect = answer["logprobs"][:n], answer["logprobs"][n:]
        best, top = correct[item["correct"].index(item["best"])], max(answer["logprobs"])
        weights = [math.exp(v - top) for v in answer["logprobs"]]  # a common factor, lest all be 0
        verdicts.append({"mc1": best > max(incorrect), "mc2": sum(weights[:n]) / sum(weights)})
    return verdicts


TRUTHFULQA = Task(
    name="truthfulqa",
    protocol="open_instruct",
    load=load_truthfulqa,
    formats={
        "base": Format(lambda item, _: truthfulqa_question(item) + "\nA:"),
        "tulu": Format(lambda item, _: Chat(truthfulqa_question(item), "A:")),
        "chat": Format(lambda item, _: Chat(truthfulqa_question(item), "A:")),
    },
    judge=judge_truthfulqa,
    metrics=("mc2", "mc1"),
    candidates=lambda item: item["correct"] + item["incorrect"],
    versions={817: "v1 (2021), 817 questions", 790: "2025, 790 questions"},
)
