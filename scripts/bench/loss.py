"""Time and peak memory of the loss of n trained tokens, forward and backward: by chunks against all logits at once.

    python scripts/bench/loss.py --vocabulary 128256 --width 2048 --tokens 2048 [--json FILE]

Each way runs in a process of its own. Memory on a GPU is torch.cuda.max_memory_allocated, in bf16; on a CPU it is the
peak of the process's resident memory, in fp32. Both less what is there before: hidden states, head, its gradient.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from scripts.bench import measure as bench
from training.losses import token_losses


def one(tokens: int, width: int, vocabulary: int, chunk: int, repeats: int) -> dict:
    """Median seconds and peak memory of one way; chunk -1: torch's cross_entropy of logits[all tokens]."""
    gpu = bench.device().type == "cuda"
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=bench.device(), requires_grad=True)
    head = torch.nn.Linear(width, vocabulary, bias=False, device=bench.device())
    head.weight.grad = torch.zeros_like(head.weight)
    targets = torch.randint(0, vocabulary, (tokens,), device=bench.device())

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=gpu, cache_enabled=False):
            if chunk < 0:
                loss = torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")
            else:
                loss = token_losses(head, hidden, targets, chunk).sum()
        loss.backward()

    before = bench.peak_bytes(reset=True)
    seconds = [bench.seconds(step) for _ in range(repeats + 1)][1:]
    return {"seconds": statistics.median(seconds), "peak_gib": (bench.peak_bytes() - before) / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"tokens": 2048, "width": 1024, "vocabulary": 128256, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--chunks", type=int, nargs="+", default=[-1, 0, 1024, 256])
    parser.add_argument("--json", default="")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(one(args.tokens, args.width, args.vocabulary, args.one, args.repeats)))
        return
    rows = []
    for chunk in args.chunks:
        done = subprocess.run(
            [sys.executable, *sys.argv, "--one", str(chunk)], capture_output=True, text=True, check=True
        )
        name = {-1: "torch, all logits", 0: "ours, one chunk"}.get(chunk, f"ours, chunks of {chunk}")
        rows.append({"loss": name, **json.loads(done.stdout.splitlines()[-1])})
    bench.show(rows)
    bench.write(args.json, {"settings": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
