"""Write GSM8K's training problems as rows of MetaMathQA's schema, for trials of the real thing without a Hub.

    python scripts/quickstart/gsm8k_to_metamath.py DIR OUT.jsonl        # reads DIR/gsm8k/train.jsonl or train.jsonl.gz

A response is the answer without the calculator's <<...>> marks, its last line "#### N" kept, and "The answer is: N"
behind it, as MetaMathQA has it; N without commas, since MetaMath's scorer reads only one of them.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from common.errors import UserError, run_main
from common.sources import read_columns
from tasks.math import gsm8k_gold


def to_metamath(row: dict[str, str]) -> dict[str, str]:
    """A row (type, query, original_question, response) of a GSM8K problem (question, answer)."""
    answer = re.sub(r"<<.*?>>", "", row["answer"])
    return {
        "type": "GSM_AnsAug",
        "query": row["question"],
        "original_question": row["question"],
        "response": f"{answer}\nThe answer is: {gsm8k_gold(row)}",
    }


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("two arguments are needed: the folder that holds gsm8k/, and the file to write")
    source, target = Path(sys.argv[1]) / "gsm8k", Path(sys.argv[2])
    files = [p for p in (source / "train.jsonl", source / "train.jsonl.gz") if p.is_file()]
    if not files:
        raise UserError(f"no train.jsonl or train.jsonl.gz in {source}")
    rows = [json.dumps(to_metamath(row), ensure_ascii=False) for row in read_columns(files[0], ("question", "answer"))]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"{len(rows)} rows in {target}")


if __name__ == "__main__":
    run_main(main, "gsm8k_to_metamath.py")
