"""Tokens per second and peak memory of plain fine-tuning: train.py (rule none) against TRL's SFTTrainer.

    python scripts/bench/train.py                      # small models on a CPU: a large vocabulary, then more layers
    python scripts/bench/train.py --vocabulary 4096 --layers 6 --hidden 256 --intermediate 688
    python scripts/bench/train.py --hidden 2048 --layers 16 --heads 32 --kv_heads 8 --intermediate 8192 \\
        --vocabulary 128256 --gradient_checkpointing --attention flash_attention_2 --micro_batch_tokens 16384 \\
        --global_batch_size 64 --steps 8 --batch_sizes 4 16                          # the shape of a 1B, on a GPU
    python scripts/bench/train.py --model FOLDER --bf16 --micro_batch_tokens 512 2048 16384 --compile    # a real model

Both get the same model (random without --model), rows, global batch size, optimizer, precision and attention. train.py
runs with its defaults, but for the tokens of a micro-batch, by which memory is matched. SFTTrainer groups rows by
length, with several batch sizes, and, under FlashAttention, packs; its best counts. Tokens are those of the rows,
without padding; the first 2 steps are not timed. Each way runs in a process of its own.
Memory on a GPU is torch.cuda.max_memory_allocated; on a CPU it is the peak of the process's resident memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["HF_HUB_OFFLINE"] = "1"
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.hub import load_weights
from scripts.bench import measure as bench
from scripts.bench.packing import KINDS

WORDS, WARMUP = 1000, 2


def make(args: argparse.Namespace, folder: Path) -> None:
    """A model with its tokenizer, and rows whose second half is the response: all in `folder`."""
    if args.model:
        (folder / "model").symlink_to(Path(args.model).resolve())
        words = Path(__file__).parents[2].joinpath("README.md").read_text().split()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        tokens_per_word = len(tokenizer(" ".join(words))["input_ids"]) / len(words)
    else:
        make_model(args, folder / "model")
        words, tokens_per_word = [f"w{i}" for i in range(WORDS)], 1.0
    rng = np.random.default_rng(0)
    median, spread, longest = KINDS[args.data]
    with open(folder / "rows.jsonl", "w") as f:
        for length in rng.lognormal(np.log(median), spread, args.steps * args.global_batch_size):
            number = int(np.clip(length, 16, longest - 1) / tokens_per_word)
            text = [words[i] for i in rng.integers(0, len(words), max(2, number))]
            half = len(text) // 2
            row = {"prompt": " ".join(text[:half]) + " ", "completion": " ".join(text[half:])}
            f.write(json.dumps({**row, "response": row["completion"]}) + "\n")


def make_model(args: argparse.Namespace, folder: Path) -> None:
    """A random model, and a tokenizer of one token per word."""
    words = Tokenizer(
        models.WordLevel({"<eos>": 0, "<pad>": 1, **{f"w{i}": i + 2 for i in range(WORDS)}}, unk_token="w0")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    architecture = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(architecture).save_pretrained(folder)


def count_tokens(args: argparse.Namespace, folder: Path) -> int:
    """Of all rows, an end of sequence included, each cut where training cuts it."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = map(json.loads, (folder / "rows.jsonl").read_text().splitlines())
    lengths = [len(tokenizer(r["prompt"] + r["completion"])["input_ids"]) + 1 for r in rows]
    return sum(min(n, KINDS[args.data][2]) for n in lengths)


def ours(args: argparse.Namespace, folder: Path, micro_batch_tokens: int, compiled: bool) -> list[float]:
    """Seconds of each step of train.py."""
    import train

    train.main([
        "--model", str(folder / "model"), "--dataset", str(folder / "rows.jsonl"), "--output_dir", str(folder / "ours"),
        "--template", "prompt_response", "--rule", "none", "--epochs", "1", "--learning_rate", "1e-5",
        "--global_batch_size", str(args.global_batch_size), "--max_length", str(KINDS[args.data][2]),
        "--micro_batch_tokens", str(micro_batch_tokens), "--attention", args.attention,
        "--lr_schedule", "constant", "--compile", str(compiled),
        "--mixed_precision", "bf16" if args.bf16 or bench.device().type == "cuda" else "fp32",
        "--gradient_checkpointing", str(args.gradient_checkpointing),
    ])  # fmt: skip
    lines = [json.loads(line) for line in (folder / "ours" / "metrics.jsonl").read_text().splitlines()]
    print(
        "data share of a step:",
        sum(x["seconds"]["data"] for x in lines) / sum(sum(x["seconds"].values()) for x in lines),
    )
    return [sum(line["seconds"].values()) for line in lines]


def theirs(args: argparse.Namespace, folder: Path, batch_size: int, packing: bool) -> list[float]:
    """Seconds of each step of SFTTrainer."""
    import trl
    from datasets import load_dataset
    from transformers import TrainerCallback

    ends = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            if not ends:
                ends.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    gpu = bench.device().type == "cuda"
    rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train").select_columns(
        ["prompt", "completion"]
    )
    config = trl.SFTConfig(
        str(folder / "theirs"), per_device_train_batch_size=batch_size, num_train_epochs=1, learning_rate=1e-5,
        gradient_accumulation_steps=args.global_batch_size // batch_size if not packing else 1, report_to="none",
        lr_scheduler_type="constant", save_strategy="no", disable_tqdm=True, use_cpu=not gpu, bf16=gpu or args.bf16,
        max_length=KINDS[args.data][2] if not packing else args.micro_batch_tokens[0], optim="adamw_torch_fused",
        gradient_checkpointing=args.gradient_checkpointing, packing=packing, logging_steps=1, max_grad_norm=1.0,
        **({} if packing else {"train_sampling_strategy": "group_by_length"}),
    )  # fmt: skip
    model = load_weights(str(folder / "model"), dtype=torch.float32, attention=args.attention)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    trl.SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, callbacks=[Clock()]).train()
    return np.diff(ends).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder of a model and its tokenizer, instead of a random one")
    for name, value in {
        "hidden": 128, "layers": 2, "heads": 4, "kv_heads": 4, "intermediate": 344, "vocabulary": 16000, "steps": 6,
        "global_batch_size": 32, "rounds": 2,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--micro_batch_tokens", type=int, nargs="+", default=[1024], help="of train.py")
    parser.add_argument("--batch_sizes", type=int, nargs="*", default=[2, 4, 8], help="of SFTTrainer")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16 on a CPU, as on a GPU")
    parser.add_argument("--compile", action="store_true", help="train.py also with --compile, at the last of its sizes")
    parser.add_argument("--data", choices=KINDS, default="word problems")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--json", default="")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # folder, a way as JSON: function and arguments
    args = parser.parse_args()
    if args.steps <= WARMUP:
        parser.error(f"--steps must be above {WARMUP}, which are not counted, got {args.steps}")
    if args.one:
        whose, *how = json.loads(args.one[1])
        seconds = {"ours": ours, "theirs": theirs}[whose](args, Path(args.one[0]), *how)
        print(json.dumps({"seconds": seconds, "peak_gib": bench.peak_bytes() / 2**30}))
        return
    ways: dict[str, tuple] = {f"train.py, {n} tokens": ("ours", n, False) for n in args.micro_batch_tokens}
    if args.compile:
        ways["train.py, compiled"] = ("ours", args.micro_batch_tokens[-1], True)
    ways |= {f"SFTTrainer, {n} rows": ("theirs", n, False) for n in args.batch_sizes}
    if args.attention == "flash_attention_2":
        ways["SFTTrainer, packed"] = ("theirs", 1, True)
    found: dict[str, list[dict]] = {name: [] for name in ways}
    for _ in range(args.rounds):  # in turn: what disturbs the machine disturbs all alike
        for name, way in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                make(args, Path(folder))
                command = [sys.executable, *sys.argv, "--one", folder, json.dumps(way)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)  # should the whole be cut
                tokens = count_tokens(args, Path(folder))
    table = []
    for name, runs in found.items():
        # an equal number of tokens per step on average; packed, SFTTrainer's steps are fewer, and their sum counts
        seconds = [sum(r["seconds"][WARMUP:]) * len(r["seconds"]) / (len(r["seconds"]) - WARMUP) for r in runs]
        table.append({
            "way": name, "tokens_per_second": tokens / statistics.median(seconds), "fastest": tokens / min(seconds),
            "peak_gib": max(r["peak_gib"] for r in runs), "steps": len(runs[0]["seconds"]),
        })  # fmt: skip
    bench.show(table)
    bench.write(args.json, {"settings": vars(args), "rows": table})


if __name__ == "__main__":
    main()
