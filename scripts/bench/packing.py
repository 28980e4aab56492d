"""Padding, and tokens per second of forward and backward: length-sorted micro-batches against packed rows.

    python scripts/bench/packing.py [--layers 4 --hidden 512 ...] [--json FILE]

Lengths are drawn from a log-normal distribution like that of word problems (median 200, at most 512) or of
conversations (median 400, at most 4096), half of each example is trained. On a GPU, give it the shape of a real model.
"""

import argparse
import functools
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.bench import measure as bench
from training.data import Examples, collate, micro_batches, steps_per_epoch
from training.losses import attach_loss

KINDS = {"word problems": (200, 0.5, 512), "conversations": (400, 0.9, 4096)}  # median, spread of the log, longest


def draw(kind: str, n: int, vocabulary: int) -> Examples:
    """Examples of random tokens, the second half of each trained."""
    median, spread, longest = KINDS[kind]
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(median), spread, n), 16, longest).astype(np.int64)
    ids = [rng.integers(0, vocabulary, length).tolist() for length in lengths]
    labels = [[-100] * (len(i) // 2) + i[len(i) // 2 :] for i in ids]
    trained = np.array([len(i) - len(i) // 2 for i in ids])
    return Examples(Dataset.from_dict({"input_ids": ids, "labels": labels}), lengths[:, None], trained[:, None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {
        "layers": 4, "hidden": 512, "vocabulary": 32000, "steps": 2, "global_batch_size": 128,
        "micro_batch_tokens": 16384, "repeats": 3,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--data", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    architecture = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64, max_position_embeddings=4096,
    )  # fmt: skip
    gpu = bench.device().type == "cuda"
    model = LlamaForCausalLM._from_config(architecture, attn_implementation=args.attention).to(bench.device())
    attach_loss(model, 1024)

    def run(examples: Examples, batches: list, packed: bool) -> None:
        for rows in batches:
            with torch.autocast("cuda", torch.bfloat16, enabled=gpu):
                loss = model(**collate(examples, rows, bench.device(), packed)).sum()
            loss.backward()
        model.zero_grad()

    def ways(examples: Examples) -> dict[str, list]:
        """{way: micro-batches of a few steps}"""
        ids = np.random.default_rng(1).permutation(len(examples))
        steps = np.array_split(ids, steps_per_epoch(len(ids), args.global_batch_size))
        longest = [int(examples.lengths[s].max()) for s in steps]
        rows = {"sorted by length": [0] * len(steps)}
        if args.attention == "flash_attention_2":
            rows["packed, a row a pass"] = [args.micro_batch_tokens] * len(steps)
        else:
            rows["packed, rows of the longest"] = longest
            rows["packed, rows of twice that"] = [2 * n for n in longest]
        split = lambda s, r: micro_batches(s, examples.lengths, 1, args.micro_batch_tokens, 0, r)[0]  # noqa: E731
        return {
            name: [m for s, r in zip(steps, tokens, strict=True) for m in split(s, r)] for name, tokens in rows.items()
        }

    table = []
    for kind in args.data:
        examples = draw(kind, args.steps * args.global_batch_size, args.vocabulary)
        tokens = int(examples.lengths.sum())
        batches = ways(examples)
        calls = {name: functools.partial(run, examples, d, name != "sorted by length") for name, d in batches.items()}
        for name, spent in bench.interleaved(calls, args.repeats).items():
            padded = sum(len(m) * max(int(examples.lengths[row].sum()) for row in m) for m in batches[name])
            table.append({
                "way": name, "data": kind, "padding": 1 - tokens / padded, "forward_passes": len(batches[name]),
                "tokens_per_second": tokens / statistics.median(spent), "fastest": tokens / min(spent),
            })  # fmt: skip
    bench.show(table)
    bench.write(args.json, {"settings": vars(args), "rows": table})


if __name__ == "__main__":
    main()
