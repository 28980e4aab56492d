"""Where a training step's time and memory go, by rule: forward and backward, clipping, masking, the optimizer.

python scripts/bench/step.py --shape 10m --json outputs/bench_step.json

One model of random weights, the rules in turn at every repeat, medians; peak memory in a process of its own per rule.
"over none" is what masking and the optimizer take more than under plain SFT, as a share of SFT's whole step.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
import gmt
from common.config import TrainConfig
from common.precision import avoid_cudnn_attention
from scripts.bench import measure as bench
from training import plan
from training.backend import build_optimizer
from training.losses import attach_loss

# hidden size, layers, heads, key-value heads, feed-forward size, vocabulary, tied embeddings
SHAPES = {
    "1m": (128, 2, 4, 4, 352, 2048, True),
    "10m": (256, 10, 4, 4, 704, 8192, True),
    "135m": (576, 30, 9, 3, 1536, 49152, True),  # SmolLM2-135M
    "1b": (2048, 16, 32, 8, 8192, 128256, True),  # Llama-3.2-1B
    "8b": (4096, 32, 32, 8, 14336, 128256, False),  # Llama-3-8B
}
WAYS = {  # name: rule, options of the Masker, statistics at every step
    "none": ("none", {}, False),
    "gmt": ("gmt", {}, False),
    "gmt, statistics": ("gmt", {}, True),
    "gmt, frozen": ("gmt", {"masked_weights": "frozen"}, False),
    "rmt": ("rmt", {}, False),
    "hft": ("hft", {}, False),
    "sift": ("sift", {}, False),
    "gasdu": ("gasdu", {}, False),
    "shira": ("shira", {}, False),
    "super_tuning": ("super_tuning", {}, False),
    "grad_square": ("grad_square", {}, False),
    "mofo": ("mofo", {}, False),
    "lift": ("lift", {}, False),
    "lift, refresh": ("lift", {"refresh_every": 1}, False),
}
PHASES = ("forward_backward", "clip", "mask", "optimizer")


def architecture(shape: str) -> LlamaConfig:
    """The configuration of a word of SHAPES."""
    hidden, layers, heads, kv_heads, ffn, vocabulary, tied = SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        use_cache=False,
    )


def train_config(args: argparse.Namespace) -> TrainConfig:
    """What the plan and the optimizer need to know of the run that is imitated."""
    return TrainConfig(
        model="-", dataset="-", output_dir="-", rule="none", optimizer=args.optimizer, learning_rate=1e-6,
        master_dtype=args.master_dtype, gradient_checkpointing=args.gradient_checkpointing, loss_chunk=0,
    )  # fmt: skip


def build(args: argparse.Namespace) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A random model on the device, in the dtype of its masters, and its optimizer."""
    avoid_cudnn_attention()
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, args.master_dtype))
    with bench.device():
        model = LlamaForCausalLM(architecture(args.shape))
    torch.set_default_dtype(torch.float32)
    if args.gradient_checkpointing:
        plan.checkpoint_layers(model)
    attach_loss(model, train_config(args).loss_chunk)
    return model.train(), build_optimizer(train_config(args), model)


def build_masker(args: argparse.Namespace, way: str, model: torch.nn.Module) -> gmt.Masker:
    rule, options, _ = WAYS[way]
    keep_ratio = args.keep_ratio if gmt.masks_entries(rule) else None
    return gmt.Masker(model.named_parameters(), rule, keep_ratio, **options)


def step(
    args: argparse.Namespace,
    way: str,
    masker: gmt.Masker,
    number: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> dict:
    """Optimizer step `number`; seconds of each phase. Masks that serve for many steps are chosen in the first."""
    stats = WAYS[way][-1]
    for p in model.parameters():
        p.requires_grad_(True)
    if masker.rule == "hft":
        gmt.freeze_half(model, seed=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = bench.device()
    tokens = torch.randint(model.config.vocab_size, (args.tokens // args.length, args.length), device=device)

    def forward_backward():
        for rows in tokens.split(max(1, args.micro_batch_tokens // args.length)):
            places = torch.arange(rows.numel(), device=device).view_as(rows)
            batch = {"input_ids": rows, "positions": places[:, :-1].flatten(), "targets": rows[:, 1:].flatten()}
            dtype, in_16_bits = torch.bfloat16, args.bf16 or device.type == "cuda"
            with torch.autocast(device.type, dtype, enabled=in_16_bits, cache_enabled=False):  # as in train.py
                loss = model(**batch).sum()
            (loss / args.tokens).backward()

    def mask():
        if masker.needs_calibration:  # of grad_square, by the gradients of the first step
            masker.calibrate()
            masker.fix_masks()
        if masker.masked_weights == "momentum":
            masker.mask_gradients(number, stats=stats, check_finite=False)

    def update():
        if masker.masked_weights == "momentum":
            optimizer.step()
        else:
            masker.step(optimizer, number, stats=stats, check_finite=False)

    clip = lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0)  # noqa: E731
    seconds = {
        name: bench.seconds(call) for name, call in zip(PHASES, (forward_backward, clip, mask, update), strict=True)
    }
    optimizer.zero_grad()
    return seconds


def peak_memory_mib(args: argparse.Namespace, way: str) -> float:
    """In this process, after two steps; the second one has all of the optimizer's state."""
    model, optimizer = build(args)
    masker = build_masker(args, way, model)
    for number in range(2):
        step(args, way, masker, number, model, optimizer)
    return bench.peak_bytes() / 2**20


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments in `words`, or of the command line, with their defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="10m")
    parser.add_argument("--tokens", type=int, default=16384, help="per step")
    parser.add_argument("--length", type=int, default=512, help="of a sequence")
    parser.add_argument("--micro_batch_tokens", type=int, default=2048, help="per forward pass")
    parser.add_argument("--keep_ratio", type=float, default=0.2)
    parser.add_argument("--optimizer", choices=("adamw", "adamw_8bit"), default="adamw")
    parser.add_argument("--master_dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16 on a CPU, as on a GPU")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), metavar="WAY", help=f"of {list(WAYS)}")
    parser.add_argument("--no_memory", action="store_true", help="skip the measurement of memory")
    parser.add_argument("--json", default="", help="write the results to this file")
    parser.add_argument("--memory_of", default="", help=argparse.SUPPRESS)  # what the script calls itself with
    return parser.parse_args(words)


def measure(
    args: argparse.Namespace, ways: list[str], memory: dict[str, float]
) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """(the model, a row per way); `none` comes first. `memory`: peak memory in MiB by way, or nothing."""
    model, optimizer = build(args)
    maskers = {way: build_masker(args, way, model) for way in ways}
    samples: dict[str, list[dict]] = {way: [] for way in ways}
    for repeat in range(args.repeats + 1):  # the first is a warm-up
        for way in ways:
            seconds = step(args, way, maskers[way], repeat, model, optimizer)
            if repeat:
                samples[way].append(seconds)
    median = {way: {p: statistics.median([s[p] for s in found]) for p in PHASES} for way, found in samples.items()}
    plain = median["none"]
    rows = []
    for way in ways:
        # the share is taken within each repeat, whose "none" ran a moment before, and then its median
        over = [
            (s["mask"] + s["optimizer"] - n["mask"] - n["optimizer"]) / sum(n.values())
            for s, n in zip(samples[way], samples["none"], strict=True)
        ]
        row = {"rule": way, **{f"{p}, ms": 1000 * median[way][p] for p in PHASES}}
        row |= {
            "tokens/s": args.tokens / sum(median[way].values()),
            "over none, %": 100 * statistics.median(over),
            "step / none's": sum(median[way].values()) / sum(plain.values()),
        }
        if memory:
            row |= {"peak memory, MiB": memory[way], "/ none's": memory[way] / memory["none"]}
        rows.append(row)
    return model, rows


def main() -> None:
    args = arguments()
    if args.memory_of:
        print(json.dumps(peak_memory_mib(args, args.memory_of)))
        return
    ways = ["none", *(way for way in args.ways if way != "none")]
    memory = {}
    for way in ways if not args.no_memory else ():
        command = [sys.executable, *sys.argv, "--memory_of", way]
        memory[way] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

    model, rows = measure(args, ways, memory)
    entries = sum(p.numel() for p in model.parameters())
    print(f"{entries / 1e6:.1f} million parameters, {args.tokens} tokens a step, on {bench.hardware()}")
    bench.show(rows)
    bench.write(args.json, {"settings": vars(args), "parameters": entries, "rows": rows})


if __name__ == "__main__":
    main()
