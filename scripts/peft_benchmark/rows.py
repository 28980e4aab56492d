"""The training rows of peft's MetaMathQA benchmark, in its order, as a file for train.py with `shuffle: false`.

    python scripts/peft_benchmark/rows.py --dataset meta-math/MetaMathQA --tokenizer MODEL --output FILE

Its data.py keeps rows of at most 1,300 characters (query, a space, response); 5,000 steps of 4 take the first 20,000.
Each 80 of them are sorted by their number of tokens, the longest first, and cut into batches of 4.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from transformers import AutoTokenizer

from common.errors import UserError, run_main
from common.hub import from_pretrained
from common.sources import load_rows
from common.templates import TEMPLATES, encode_prompts
from evaluation.scores import write_lines

ROWS = 20_000
MOST_CHARACTERS = 1300
MOST_TOKENS = 768
BUCKET = 80  # rows that are sorted together: 20 batches of 4
TOKENS = 4_198_051  # of these rows by Llama 3's tokenizer, an EOS for each: what every published result records


def in_its_order(rows: list[dict[str, str]], lengths: list[int], bucket: int = BUCKET) -> list[dict[str, str]]:
    """The rows, sorted by falling length within each `bucket` of them; equal lengths stay in order.

    (The benchmark sorts by torch.argsort, which promises no order among equal lengths.)
    """
    order = sorted(range(len(rows)), key=lambda i: (i // bucket, -lengths[i]))
    return [rows[i] for i in order]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="MetaMathQA: a file, a folder or a Hub id")
    parser.add_argument("--tokenizer", required=True, help="folder or Hub id of the model that is trained")
    parser.add_argument("--output", required=True, type=Path, help="the .jsonl file to write")
    parser.add_argument("--rows", type=int, default=ROWS, help="how many rows; another number is another benchmark")
    args = parser.parse_args(argv)
    found = load_rows(args.dataset, ("query", "response"))
    rows = []
    for row in found:
        if len(f"{row['query']} {row['response']}") <= MOST_CHARACTERS:
            rows.append({"query": row["query"], "response": row["response"]})
        if len(rows) == args.rows:
            break
    if len(rows) < args.rows:
        raise UserError(
            f"dataset {args.dataset}: {len(rows)} of its {len(found)} rows have at most {MOST_CHARACTERS} characters, "
            f"and the benchmark takes {args.rows}: name all of MetaMathQA"
        )
    tokenizer = from_pretrained(AutoTokenizer, args.tokenizer, "tokenizer")
    texts = ["".join(TEMPLATES["peft_metamath"].render(row)) for row in rows]
    lengths = [min(MOST_TOKENS, len(ids)) for ids in encode_prompts(tokenizer, texts)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_lines(args.output, in_its_order(rows, lengths))
    tokens = sum(lengths) + len(rows)
    print(f"{len(rows):,} rows, {tokens:,} tokens with an EOS for each")
    if tokens != TOKENS:
        print(f"warning: the benchmark's rows have {TOKENS:,} tokens: these are other rows, or of another tokenizer")


if __name__ == "__main__":
    run_main(main, "rows.py")
