"""A small world of the real one's shape, made offline: models, training rows, benchmarks. For REDUCED=1 and for tests.

    python scripts/reproduce/reduced.py FOLDER

    FOLDER/models/OWNER/NAME      each base model's architecture with few layers of few, narrow heads, random weights
    FOLDER/datasets/OWNER/NAME    16 rows in the columns of each training set
    FOLDER/benchmarks/            a few items of each benchmark, laid out as --data_dir expects them

The first two are laid out as scripts/download.py leaves the real ones. All texts are made up.
"""

import csv
import gzip
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).parents[2]))
from common.errors import UserError, run_main
from common.templates import ALPACA, MAGICODER
from tasks.general import BBH_TASKS, TYDIQA_TRAIN

# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------

# What the published config.json files say, as far as it matters here.
LLAMA2 = {"vocab_size": 32000, "max_position_embeddings": 4096}
SHAPES = {
    "mistralai/Mistral-7B-v0.1": (MistralConfig, {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "sliding_window": 4096,
    }),
    "meta-llama/Meta-Llama-3-8B": (LlamaConfig, {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    }),
    "meta-llama/Llama-2-7b-hf": (LlamaConfig, {
        **LLAMA2, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }),
    "meta-llama/Llama-2-13b-hf": (LlamaConfig, {
        **LLAMA2, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 40,
    }),
    "deepseek-ai/deepseek-coder-6.7b-base": (LlamaConfig, {
        "vocab_size": 32256, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 16384,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
    }),
    "Qwen/Qwen2.5-0.5B": (Qwen2Config, {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    }),
    "meta-llama/Llama-3.2-1B": (LlamaConfig, {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    }),
    "meta-llama/Llama-3.2-3B": (LlamaConfig, {
        "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    }),
}  # fmt: skip
SHAPES["Qwen/Qwen2.5-Coder-0.5B"] = SHAPES["Qwen/Qwen2.5-0.5B-Instruct"] = SHAPES["Qwen/Qwen2.5-0.5B"]
SHAPES["allenai/tulu-2-7b"] = SHAPES["meta-llama/Llama-2-7b-hf"]
SHAPES["allenai/tulu-2-13b"] = SHAPES["meta-llama/Llama-2-13b-hf"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_BOS = ("Qwen",)  # the other tokenizers put one in front


def reduced_model(folder: Path, name: str, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The model `name` of SHAPES with 2 layers and heads of width 4, random weights, and the tokenizer."""
    cls, shape = SHAPES[name]
    smaller = {
        "vocab_size": len(tokenizer),
        "hidden_size": 4 * shape["num_attention_heads"],
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "head_dim": 4,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(cls(**{**shape, **smaller})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reduced_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 600 tokens that treats BOS as the model `name` does; with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>", "<|endoftext|>"]  # the last one is expected of Qwen's
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    texts = [ALPACA, MAGICODER] + [json.dumps(row(i)) for row in ROWS.values() for i in range(20)]
    bpe.train_from_iterator(texts, trainer)
    if not name.startswith(NO_BOS):
        bpe.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHATML
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Training rows, in the columns of each dataset: row i
# ---------------------------------------------------------------------------------------------------------------------

ROWS = {
    "meta-math/MetaMathQA": lambda i: {
        "type": "GSM_AnsAug", "query": f"What is {i}+{i}?", "original_question": "?",
        "response": f"The answer is: {2 * i}",
    },
    "ise-uiuc/Magicoder-Evol-Instruct-110K": lambda i: {
        "instruction": f"Add {i}.", "response": f"```python\nx += {i}\n```",
    },
    "allenai/tulu-v2-sft-mixture": lambda i: {
        "dataset": "flan", "id": f"flan_{i}",
        "messages": [
            {"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "" if i == 3 else "It."},
        ],
    },
    "HuggingFaceH4/ultrafeedback_binarized": lambda i: {
        "prompt": f"{i}?", "prompt_id": str(i), "messages": [], "score_chosen": 8.0, "score_rejected": 4.0,
        **{
            column: [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": answer}]
            for column, answer in (("chosen", "Yes."), ("rejected", "Yes." if i == 3 else "Never!"))
        },
    },
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks
# ---------------------------------------------------------------------------------------------------------------------

GSM8K_ROWS = [
    {"question": f"Ann has {n} figs and buys {n} more. How many has she?", "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>"
     f"{2 * n}\n#### {2 * n}"} for n in (3, 1200)
]  # fmt: skip
MATH_ROWS = [
    {"problem": "What is half of $8$?", "level": "Level 1", "type": "Prealgebra", "solution": r"It is \boxed{4}."},
    {
        "problem": "What is half of $1$?",
        "level": "Level 1",
        "type": "Algebra",
        "solution": r"It is \boxed{\frac{1}{2}}.",
    },
]
STUB = 'def double(x: int) -> int:\n    """ Twice x.\n    >>> double(2)\n    4\n    """\n'
HUMANEVAL_ROW = {
    "task_id": "HumanEval/0", "prompt": STUB, "entry_point": "double", "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
}  # fmt: skip
HUMANEVAL_PLUS_ROW = {**HUMANEVAL_ROW, "base_input": [[2], [-1]], "plus_input": [[10**20], [1.5]], "atol": 0}
MBPP_PROMPT = '"""\nWrite a function to swap a pair\nassert swap((1, 2)) == (2, 1)\n"""\n'
MBPP_CODE = "def swap(pair):\n    return pair[1], pair[0]\n"
MBPP_PLUS_ROW = {
    "task_id": "Mbpp/2", "prompt": MBPP_PROMPT, "entry_point": "swap", "canonical_solution": MBPP_CODE,
    "base_input": [[[1, 2]]], "plus_input": [[["a", None]]], "atol": 0,
}  # fmt: skip


def mbpp_row(number: int) -> dict:
    return {
        "task_id": number, "text": f"Write function f{number} that adds {number}.", "test_setup_code": "",
        "code": f"def f{number}(x):\r\n  return x + {number}",
        "test_list": [f"assert f{number}({x}) == {x + number}" for x in (1, 2, 3)],
    }  # fmt: skip


def write_rows(path: Path, rows: list[dict]) -> None:
    """A file of JSON lines, gzipped if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8", newline="\n") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def mathematics(folder: Path) -> None:
    write_rows(folder / "gsm8k/test.jsonl", GSM8K_ROWS)
    write_rows(folder / "math/test.jsonl.gz", MATH_ROWS)


def code(folder: Path) -> None:
    write_rows(folder / "humaneval/HumanEval.jsonl.gz", [HUMANEVAL_ROW])
    write_rows(folder / "humanevalplus/HumanEvalPlus.jsonl.gz", [HUMANEVAL_PLUS_ROW])
    write_rows(folder / "mbppplus/MbppPlus-v0.2.0.jsonl.gz", [MBPP_PLUS_ROW])
    write_rows(folder / "mbpp/mbpp.jsonl", [mbpp_row(i) for i in (2, 3, 4, 10, 11, 510, 511)])


def general(folder: Path, tydiqa_train: dict[str, int] = TYDIQA_TRAIN) -> None:
    """MMLU, BBH, TyDiQA, TruthfulQA. Of TyDiQA's training part there are as many rows as tasks/general.py asks for."""
    row = {
        "question": "Which is a bird?",
        "subject": "animal_names",
        "choices": ["cat", "owl", "elk", "ant"],
        "answer": 1,
    }
    write_rows(folder / "mmlu/test.jsonl.gz", [row, {**row, "question": "Again?", "answer": 3}])
    write_rows(folder / "mmlu/dev.jsonl.gz", [{**row, "question": f"Example {i}?", "answer": i % 4} for i in range(5)])
    for name in ("bbh/bbh", "bbh/cot-prompts", "truthfulqa"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for task in BBH_TASKS:
        examples = [{"input": f"{task} {i}", "target": f"({'AB'[i]})"} for i in range(2)]
        (folder / f"bbh/bbh/{task}.json").write_text(json.dumps({"canary": "", "examples": examples}))
        (folder / f"bbh/cot-prompts/{task}.txt").write_text(
            "canary\n-----\nDo it.\n\nQ: one\nA: Let's think step by step.\nWell. So the answer is (A).\n\n"
            "Q: two\nOptions:\n(A) x\nA: Let's think step by step.\nHm. So the answer is (B).\n"
        )
    for language, n in tydiqa_train.items():
        for part, count in (("dev", 2), ("train", n)):
            answers = [{"text": f"in {language}", "answer_start": 0}, {"text": "Berlin", "answer_start": 1}]
            qas = [
                {"id": f"{language}-{part}-{i}", "question": f"Where {i}?", "answers": answers} for i in range(count)
            ]
            paragraphs = [{"context": f"It is in {language}.", "qas": qas}]
            article = {"data": [{"title": "t", "paragraphs": paragraphs}]}
            write_rows(folder / f"tydiqa_goldp/{language}_{part}.json.gz", [article])
    with open(folder / "truthfulqa/TruthfulQA_v1.csv", "w", encoding="utf-8-sig", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(
            ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"]
        )
        writer.writerow(["", "", "Is it so?", "It is", "Yes; It is ; ", "No.; It is not", ""])


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("one argument is needed: the folder to write")
    folder = Path(sys.argv[1])
    disable_progress_bar()
    for name in SHAPES:
        reduced_model(folder / "models" / name, name, reduced_tokenizer(name))
    for name, row in ROWS.items():
        split = "train_prefs" if "ultrafeedback" in name else "train"  # in the file's name, as the Hub has it
        file = folder / "datasets" / name / "data" / f"{split}-00000-of-00001.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_rows(file, [row(i) for i in range(16)])
    for family in (mathematics, code, general):
        family(folder / "benchmarks")
    (folder / "COMPLETED").touch()
    print(f"{len(SHAPES)} models, {len(ROWS)} datasets and the benchmarks, in {folder}")


if __name__ == "__main__":
    run_main(main, "reduced.py")
