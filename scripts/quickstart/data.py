"""The quickstart's world: generated word problems of four skills, a tokenizer, and a small random model.

    python scripts/quickstart/data.py outputs/quickstart

writes DIR/data/*.jsonl and DIR/random_model/. Training rows have MetaMathQA's columns (query, response), problems for
eval.py GSM8K's (question, answer). Three skills are old (the base model learns them), `sort` is new. Every operand
pattern is in one split only.
"""

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2]))
from common import integrity
from common.errors import UserError, run_main
from common.templates import ALPACA

OLD_SKILLS, NEW_SKILL = ("add", "subtract", "reverse"), "sort"
ROWS = {"base": 24_000, "new": 2_000, "validation": 200, "test": 400}  # base: in all; validation and test: per skill
NAMES, THINGS = ("Ann", "Ben", "Cid", "Dee"), ("figs", "pens", "cups", "maps")
THINK, ANSWER = " Let's think step by step.", " The answer is: "  # the first ends the prompt that eval.py gives


def problem(skill: str, rng: random.Random) -> tuple[str, str, int]:
    """(question, reasoning, answer) of one skill."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    if skill == "add":
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        return f"{name} has {a} {thing} and gets {b} more. How many now?", f"{a}+{b}={a + b}.", a + b
    if skill == "subtract":
        a, b = sorted((rng.randint(10, 99), rng.randint(10, 99)), reverse=True)
        return f"{name} has {a} {thing} and loses {b}. How many are left?", f"{a}-{b}={a - b}.", a - b
    digits = [str(rng.randint(1, 9)) for _ in range(4)]
    number = "".join(digits)
    if skill == "reverse":
        back = number[::-1]
        return f"{name} reads {number} backwards. What number?", f"{number}:{back}.", int(back)
    ordered = "".join(sorted(digits))
    return f"Order the digits of {number} from low to high.", f"{number}>{ordered}.", int(ordered)


def split_of(reasoning: str) -> str:
    """Which split may hold a problem: a function of its numbers, so that no split sees another's."""
    bucket = random.Random(reasoning).randrange(10)
    return {0: "test", 1: "validation"}.get(bucket, "train")


def sample(skill: str, split: str, n: int, seed: int) -> list[tuple[str, str, int]]:
    """n different problems of one skill and split."""
    rng, found = random.Random(f"{skill} {split} {seed}"), {}
    while len(found) < n:
        question, reasoning, answer = problem(skill, rng)
        if split_of(reasoning) == split:
            found[question] = (question, reasoning, answer)
    return list(found.values())


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_tokenizer(texts: list[str], vocab_size: int = 384) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text round-trips. Digits stand alone; the prompt's fixed strings are one token each."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    fixed = [*(part for part in ALPACA.split("{instruction}") if part), THINK, ANSWER]
    for string in fixed:
        texts = [t.replace(string, "") for t in texts]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens(fixed)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def save_random_model(
    folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int, hidden: int = 128, layers: int = 3
) -> LlamaForCausalLM:
    """A small Llama of random weights, with its tokenizer, in `folder`, which COMPLETED marks as finished."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    integrity.seal(folder)
    return model


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("one argument is needed: the folder to write")
    folder = Path(sys.argv[1])
    (folder / "data").mkdir(parents=True, exist_ok=True)
    train = {s: sample(s, "train", ROWS["base"] // 3, seed=0) for s in OLD_SKILLS}
    train[NEW_SKILL] = sample(NEW_SKILL, "train", ROWS["new"], seed=0)
    rows = {
        skill: [{"type": skill, "query": q, "response": f"{THINK} {r}{ANSWER}{a}"} for q, r, a in problems]
        for skill, problems in train.items()
    }
    write(folder / "data" / "base.jsonl", [row for skill in OLD_SKILLS for row in rows[skill]])
    write(folder / "data" / "new_skill.jsonl", rows[NEW_SKILL])
    for split in ("validation", "test"):
        problems = [(s, p) for s in (NEW_SKILL, *OLD_SKILLS) for p in sample(s, split, ROWS[split], seed=0)]
        write(
            folder / "data" / f"{split}.jsonl",
            [{"skill": s, "question": q, "answer": f"{r}\n#### {a}"} for s, (q, r, a) in problems],
        )

    tokenizer = make_tokenizer([row["query"] + row["response"] for part in rows.values() for row in part])
    model = save_random_model(folder / "random_model", tokenizer, seed=0)
    example = tokenizer(ALPACA.format(instruction=rows["add"][0]["query"]) + rows["add"][0]["response"])["input_ids"]
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens; an example has {len(example)}:")
    print("|".join(tokenizer.decode([t]) for t in example))


if __name__ == "__main__":
    run_main(main, "data.py")
