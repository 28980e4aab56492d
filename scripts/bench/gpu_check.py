"""Measure a GPU, and check that the method runs right on it, in at most ten minutes.

    bash scripts/gpu_check.sh                     # results/gpu.json
    bash scripts/gpu_check.sh --tiny              # all parts at their smallest, on a CPU too: outputs/cpu_check.json
    bash scripts/gpu_check.sh --parts card mask   # some of them

It needs torch 2.11 or newer, transformers and accelerate; what else is missing (Triton, bitsandbytes, TRL, datasets)
costs the lines that need it, and they say so. Each part runs in a process of its own, up to its time limit. A line is
written to outputs/gpu_check.jsonl as soon as it is known, so that a cut leaves what there is; a cut by SIGINT or
SIGTERM also leaves the table and its file. Exit code 1: a part failed, or a check did not hold.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

STARTED = time.monotonic()
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import gmt
from common.errors import UserError, run_main
from scripts.bench import measure as bench

KEEP_RATIO = 0.2
ALL_SECONDS = 570  # ten minutes, less what a process takes to start and to end
PATIENCE = 6  # how much longer than a GPU a CPU may take for its small parts


class Report:
    """What a part finds, line by line, on the screen and in a file."""

    def __init__(self, path: Path, part: str):
        self.path, self.part = path, part

    def value(self, what: str, value: float, unit: str) -> None:
        self._write({"what": what, "value": value, "unit": unit})

    def check(self, what: str, holds: bool) -> None:
        self._write({"what": what, "holds": holds})

    def left_out(self, what: str, why: str) -> None:
        self._write({"what": what, "left_out": why})

    def failed(self, why: str) -> None:
        self._write({"what": "the part", "failed": why})

    def _write(self, line: dict[str, Any]) -> None:
        line = {"part": self.part, **line}
        print(json.dumps(line), flush=True)
        with open(self.path, "a") as f:
            f.write(json.dumps(line) + "\n")
            f.flush()
            os.fsync(f.fileno())


def median_seconds(call: Callable[[], Any], repeats: int = 3) -> float:
    return statistics.median(bench.interleaved({"": call}, repeats)[""])


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


def card(report: Report, tiny: bool) -> None:
    """What the card gives: the two ceilings that all else is held against."""
    source = torch.randn(1 << (20 if tiny else 30), device=bench.device(), dtype=torch.bfloat16)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source))
    report.value("copy, read and written", 2 * source.nbytes / seconds / 1e9, "GB/s")
    n, times = (256, 1) if tiny else (8192, 10)
    a = torch.randn(n, n, device=bench.device(), dtype=torch.bfloat16)
    seconds = median_seconds(lambda: [a @ a for _ in range(times)])
    report.value(f"bf16 product of {n} x {n}", times * 2 * n**3 / seconds / 1e12, "TFLOP/s")


def mask(report: Report, tiny: bool) -> None:
    """Select and mask all gradients of a model."""
    from scripts.bench import step as bench_step

    for shape in ("1m",) if tiny else ("1b", "8b"):
        with torch.device("meta"):
            model = bench_step.LlamaForCausalLM(bench_step.architecture(shape))
        shapes = {n: p.shape for n, p in model.named_parameters() if p.dim() >= 2 and ("layers.0" in n or not tiny)}
        for dtype in (torch.bfloat16, torch.float32):
            what = f"{shape} {str(dtype)[6:]}"
            needed = sum(s.numel() for s in shapes.values()) * dtype.itemsize
            gradients = None  # of the round before
            torch.cuda.empty_cache()
            room = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else needed * 2
            if needed * 1.15 > room:
                report.left_out(what, f"{needed / 2**30:.0f} GiB of gradients do not fit")
                continue
            gradients = {n: torch.empty(s, dtype=dtype, device=bench.device()) for n, s in shapes.items()}
            _mask_all(report, what, gradients, 1 if tiny else 3)


def _mask_all(report: Report, what: str, gradients: dict[str, torch.Tensor], repeats: int) -> None:
    parameters = {name: nn.Parameter(g) for name, g in gradients.items()}
    for name, p in parameters.items():
        p.grad = gradients[name]  # the weights are not read: they share the gradients' memory
    masker = gmt.Masker(parameters.items(), "gmt", KEEP_RATIO)
    units = [[g] for g in gradients.values()]
    numbers = [g.numel() for g in gradients.values()]
    ks = [gmt.keep_count(n, KEEP_RATIO) for n in numbers]
    space = torch.empty_like(max(gradients.values(), key=torch.numel)).view(-1)

    def plain(digit_bits):
        with patch.object(gmt, "_kernels", lambda: None), patch.object(gmt, "_DIGIT_BITS", digit_bits):
            masker.mask_gradients(0, check_finite=False)

    def topk():
        for g, k in zip(gradients.values(), ks, strict=True):
            kept = g.abs().view(-1).topk(k, sorted=False).indices
            values = g.view(-1)[kept]
            g.zero_().view(-1).index_copy_(0, kept, values)

    ways = {"copy": lambda: [space[: g.numel()].copy_(g.view(-1)) for g in gradients.values()], "topk": topk}
    ways["plain"] = lambda: plain(gmt._DIGIT_BITS)
    ways["plain, 11-bit digits"] = lambda: plain(11)  # their histograms fit a multiprocessor's shared memory
    kernels, why_not = _kernels(gradients.values())
    if kernels:
        ways["Triton"] = lambda: kernels.mask_(units, kernels.kth_largest_keys(units, ks, numbers))
    floor = 0.0
    for way, call in ways.items():
        times = []
        for repeat in range(repeats + 1):  # the first is a warm-up
            for g in gradients.values():
                g.normal_()
            seconds = bench.seconds(call)
            times += [seconds] if repeat else []
        spent = statistics.median(times)
        floor = floor or spent
        report.value(f"{what}, {way}", 1000 * spent, "ms")
        if way != "copy":
            report.value(f"{what}, {way} over copy", spent / floor, "x")
    if not kernels:
        report.left_out(f"{what}, Triton", why_not)


def _kernels(gradients: Iterable[torch.Tensor]) -> tuple[Any, str]:
    """(gmt_triton if it serves for these gradients, else None; why it does not)."""
    if not bench.is_there("triton"):
        return None, "Triton is missing"
    import gmt_triton

    gmt_triton._runs_on.cache_clear()  # so that it says each time why it does not
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if gmt_triton.is_usable(gradients):
            return gmt_triton, ""
    return None, str(told[-1].message) if told else "it needs a GPU, or TRITON_INTERPRET=1"


def step_1b(report: Report, tiny: bool) -> None:
    """Phases of a training step: fp32 masters, AdamW."""
    if tiny:
        _step(report, "1m", ["--tokens", "256", "--length", "64", "--micro_batch_tokens", "128", "--repeats", "1"])
    else:
        _step(report, "1b", ["--tokens", "32768", "--length", "1024", "--micro_batch_tokens", "8192"])


def step_8b(report: Report, tiny: bool) -> None:
    """The same at 8B, so that it fits: bf16 masters, 8-bit AdamW, checkpointed layers."""
    small = ["--gradient_checkpointing", "--master_dtype", "bfloat16", "--repeats", "1" if tiny else "2"]
    if bench.is_there("bitsandbytes") and torch.cuda.is_available():
        small += ["--optimizer", "adamw_8bit"]
    else:
        report.left_out("8-bit AdamW", "it needs bitsandbytes and a GPU; bf16 moments instead")
    if tiny:
        _step(report, "1m", ["--tokens", "256", "--length", "64", "--micro_batch_tokens", "128", *small])
    else:
        _step(report, "8b", ["--tokens", "32768", "--length", "1024", "--micro_batch_tokens", "2048", *small])


def _step(report: Report, shape: str, words: list[str]) -> None:
    from scripts.bench import step as bench_step
    from training import plan

    args = bench_step.arguments(["--shape", shape, "--no_memory", *words])
    model, rows = bench_step.measure(args, ["none", "gmt"], {})
    for row in rows:
        for name, value in row.items():
            if name.endswith("ms"):
                report.value(f"{row['rule']}: {name[:-4]}", value, "ms")
        report.value(f"{row['rule']}: tokens per second", row["tokens/s"], "")
        flops = plan.flops_per_token(model, args.length) * row["tokens/s"]
        if (used := plan.utilisation(flops, 1, 1, bench.device())) is not None:
            report.value(f"{row['rule']}: model-flops utilisation", 100 * used, "%")
    report.value("gmt: masking over a step of none", rows[-1]["over none, %"], "%")
    if not torch.cuda.is_available():
        report.left_out("utilisation, peak memory", "they are those of a GPU")
    config = bench_step.train_config(args)
    held = plan.tensor_bytes(config, model.parameters(), 1)
    sequences = args.micro_batch_tokens // args.length
    held["activations"] = plan.activation_bytes(config, model.config, sequences, args.length, args.micro_batch_tokens)
    planned = sum(held.values()) / 2**30
    report.value("memory by the plan", planned, "GiB")
    if torch.cuda.is_available():
        peak = bench.peak_bytes() / 2**30
        report.value("peak memory", peak, "GiB")
        report.value("peak memory over the plan", peak / planned, "x")


def against_trl(report: Report, tiny: bool) -> None:
    """train.py against TRL's SFTTrainer."""
    if missing := [p for p in ("trl", "datasets") if not bench.is_there(p)]:
        report.left_out("train.py against SFTTrainer", f"{' and '.join(missing)} missing")
        return
    words = ["--steps", "4", "--rounds", "1", "--global_batch_size", "4", "--batch_sizes", "2"]
    if not tiny:
        words = [
            "--hidden", "1024", "--layers", "16", "--heads", "16", "--kv_heads", "8", "--intermediate", "4096",
            "--vocabulary", "32000", "--micro_batch_tokens", "16384", "--global_batch_size", "64", "--steps", "8",
            "--rounds", "1", "--batch_sizes", "16",
        ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        _python("scripts/bench/train.py", *words, "--json", f"{folder}/found.json")
        rows = json.loads(Path(folder, "found.json").read_text())["rows"]
    for row in rows:
        report.value(f"{row['way']}: tokens per second", row["tokens_per_second"], "")
        report.value(f"{row['way']}: peak memory", row["peak_gib"], "GiB")


def fp16(report: Report, tiny: bool) -> None:
    """Gradients scaled against underflow, on a GPU."""
    if not torch.cuda.is_available():
        report.left_out("fp16 with the scaler", "it needs a GPU")
        return
    found = _small_run(tiny, "--precision", "fp16", "--last", "20")
    report.value("fp16: steps skipped by the scaler, of 20", found["skipped"], "")
    report.check("fp16: the loss falls", found["losses"][-1] < found["losses"][0])


def frozen(report: Report, tiny: bool) -> None:
    """masked_weights frozen."""
    found = _small_run(tiny, "--masked_weights", "frozen")
    report.check("frozen: no weight changes where the mask is 0", found["wrongly_changed"] == 0)
    report.check("frozen: the loss falls", found["losses"][-1] < found["losses"][0])


def fsdp2(report: Report, tiny: bool) -> None:
    """FSDP2 through Accelerate, on one process."""
    _compare(report, "FSDP2", tiny, 1, "--sharded")


def ddp(report: Report, tiny: bool) -> None:
    """DDP of two processes that share the GPU, over gloo."""
    _compare(report, "DDP", tiny, 2)


def _compare(report: Report, what: str, tiny: bool, processes: int, *words: str) -> None:
    alone, together = _small_run(tiny), _small_run(tiny, *words, processes=processes)
    pairs = zip(alone["losses"], together["losses"], strict=True)
    distance = max(abs(a - b) / a for a, b in pairs)
    report.value(f"{what}: largest relative distance of a loss from that of one process", distance, "")
    report.check(f"{what}: losses as on one process, within bf16's rounding", distance < 0.01)


def resume(report: Report, tiny: bool) -> None:
    """Bitwise resume, with deterministic."""
    with tempfile.TemporaryDirectory() as folder:
        words = ("--deterministic", "--last")
        uninterrupted = _small_run(tiny, *words, "6")
        first = _small_run(tiny, *words, "3", "--save", folder)
        rest = _small_run(tiny, *words, "6", "--first", "3", "--load", folder)
    report.check(
        "resume: the losses are the same to the bit", first["losses"] + rest["losses"] == uninterrupted["losses"]
    )
    report.check("resume: the weights are the same to the bit", rest["weights"] == uninterrupted["weights"])


def generate(report: Report, tiny: bool) -> None:
    """Generated tokens per second; scores of padded prompts."""
    from evaluation import generation
    from scripts.bench import step as bench_step
    from scripts.bench.eval import byte_tokenizer

    new, length, batch_sizes = (8, 16, (2,)) if tiny else (128, 256, (16, 64))
    architecture = bench_step.architecture("1m" if tiny else "1b")
    architecture.use_cache = True
    torch.manual_seed(0)
    with torch.device(bench.device()):
        network = bench_step.LlamaForCausalLM(architecture).to(torch.bfloat16).eval()
    model = generation.Model(network, byte_tokenizer(), frozenset(), 1, 2048)
    for batch_size in batch_sizes:
        prompts = torch.randint(256, (batch_size, length)).tolist()
        arguments = (model, prompts, generation.Decoding(new), [""] * batch_size, batch_size)
        seconds = median_seconds(lambda a=arguments: generation.generate(*a), 1 if tiny else 2)
        report.value(f"{batch_size} rows: generated tokens per second", batch_size * new / seconds, "")
    rows = [generation.Scored(prompts[0][:n], n, tuple(range(256))) for n in (1, length // 3, length)]
    together = torch.tensor(generation.logprobs(model, rows))
    alone = torch.tensor([generation.logprobs(model, [row])[0] for row in rows])
    report.check(
        "prompts padded in a batch: scores as alone, within bf16's rounding",
        (together - alone).abs().max().item() < 0.2,
    )


def equal(report: Report, tiny: bool) -> None:
    """A GPU's masks are the CPU's."""
    units, there = _gradients(tiny, torch.device("cpu")), _gradients(tiny, bench.device())
    numbers = [sum(g.numel() for g in unit) for unit in units]
    ks = [gmt.keep_count(n, KEEP_RATIO) for n in numbers]
    expected = []
    for unit, k in zip(units, ks, strict=True):
        kept = gmt.topk_mask(torch.cat(unit), k).split([g.numel() for g in unit])
        expected += [torch.where(m, g, 0) for m, g in zip(kept, unit, strict=True)]
    report.check("kept entries are as many as ties allow", _about_kept(expected[0]))
    if torch.cuda.is_available():
        p = nn.Parameter(torch.empty_like(there[0][0]))
        p.grad = there[0][0].clone()
        with patch.object(gmt, "_kernels", lambda: None):
            gmt.Masker([("w", p)], "gmt", KEEP_RATIO, mask_vectors=True).mask_gradients(0)
        report.check("plain: equal to the CPU's", torch.equal(p.grad.cpu(), expected[0]))
    else:
        report.left_out("plain: equal to the CPU's", "it needs a GPU")
    given = [g for unit in there for g in unit]
    kernels, why_not = _kernels(given)
    if not kernels:
        report.left_out("Triton: equal to the CPU's", why_not)
        return
    kernels.mask_(there, kernels.kth_largest_keys(there, ks, numbers))
    same = all(torch.equal(g.cpu(), wanted) for g, wanted in zip(given, expected, strict=True))
    report.check("Triton: equal to the CPU's", same)


def _gradients(tiny: bool, device: torch.device) -> list[list[torch.Tensor]]:
    """The same on each device, of each dtype: large; small, not aligned; two under one threshold, with an empty one."""
    generator, units = torch.Generator().manual_seed(0), []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        sizes = (6000, 301, 100, 77) if tiny else (45_088_768, 3001, 50_000, 70_001)
        large, small, *two = (torch.randn(n, generator=generator).to(device, dtype) for n in sizes)
        units += [[large], [small[1:]], [*two, small[:0]]]
    return units


def _about_kept(masked: torch.Tensor) -> bool:
    share = masked.count_nonzero().item() / masked.numel()
    return KEEP_RATIO <= share < KEEP_RATIO + 0.01


PARTS: dict[str, tuple[Callable[[Report, bool], None], int]] = {  # in order of worth, with their limits in seconds
    "card": (card, 30),
    "equal": (equal, 60),
    "mask": (mask, 100),
    "step_1b": (step_1b, 60),
    "step_8b": (step_8b, 100),
    "trl": (against_trl, 80),
    "fp16": (fp16, 35),
    "frozen": (frozen, 35),
    "fsdp2": (fsdp2, 60),
    "ddp": (ddp, 60),
    "resume": (resume, 90),
    "generate": (generate, 45),
}


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------


def _python(*words: str, **environment: str) -> None:
    """Run a program of this repository; its last words are the error where it fails."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr[-2000:]}")


def _small_run(tiny: bool, *words: str, processes: int = 1) -> dict[str, Any]:
    """What small_run.py finds, on several processes that share the device."""
    size = ("--shape", "1m", "--length", "32") if tiny else ("--shape", "10m", "--length", "512")
    size += () if "--last" in words else ("--last", "4" if tiny else "10")
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        found, port = f"{folder}/found.json", free.getsockname()[1]
        free.close()
        command = [sys.executable, "scripts/bench/small_run.py", *size, *words, "--json", found]
        place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
        alone = processes == 1 and "--sharded" not in words
        started = []
        for rank in range(processes):
            environment = {**os.environ, **({} if alone else {**place, "RANK": str(rank)})}
            with open(f"{folder}/{rank}", "w") as log:
                started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
        codes = [process.wait() for process in started]
        if any(codes):
            failed = next(rank for rank, code in enumerate(codes) if code)
            raise RuntimeError(f"{' '.join(words)}: {Path(folder, str(failed)).read_text()[-2000:]}")
        return json.loads(Path(found).read_text())


def run_part(name: str, seconds: float, lines: Path, tiny: bool) -> None:
    """Run a part in a process of its own, and end it, and what it has started, after so many seconds."""
    command = [sys.executable, __file__, "--part", name, "--lines", str(lines), *(["--tiny"] if tiny else [])]
    interpreted = name in ("mask", "equal") and tiny and not torch.cuda.is_available()
    environment = {"TRITON_INTERPRET": "1"} if interpreted else {}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stderr=errors, start_new_session=True, cwd=ROOT
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            Report(lines, name).failed(f"cut after {seconds:.0f} seconds")
            return
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code:
            errors.seek(0)
            Report(lines, name).failed(" ".join(errors.read()[-1500:].split()) or f"exit code {code}")


def check_versions() -> None:
    """Raises UserError where something is missing that no part can do without."""
    for package in ("transformers", "accelerate"):
        if not bench.is_there(package):
            raise UserError(f"gpu_check needs {package}: pip install {package}")
    if tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 11):
        raise UserError(f"gpu_check needs torch 2.11 or newer, this is {torch.__version__}")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # missing, or under another name: pytorch-triton
        return None


def table(lines: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    for line in lines:
        if "value" in line:
            result = f"{line['value']:.4g} {line['unit']}".strip()
        elif "holds" in line:
            result = "yes" if line["holds"] else "NO"
        else:
            result = f"left out: {line['left_out']}" if "left_out" in line else f"FAILED: {line['failed'][-200:]}"
        yield {"part": line["part"], "what": line["what"], "result": result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="all at its smallest, also without a GPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {[*PARTS]}")
    parser.add_argument("--json", default="", help="results/gpu.json, or outputs/cpu_check.json with --tiny")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--lines", default="outputs/gpu_check.jsonl", help="the file of lines")
    args = parser.parse_args()
    lines = Path(args.lines).resolve()
    if args.part:
        bench.allow_missing("datasets")  # which the plan's and the optimizer's modules import, for other functions
        PARTS[args.part][0](Report(lines, args.part), args.tiny)
        return
    check_versions()
    if not args.tiny and not torch.cuda.is_available():
        raise UserError("there is no GPU that torch can use; --tiny runs all parts at their smallest on a CPU")
    lines.parent.mkdir(parents=True, exist_ok=True)
    lines.write_text("")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    seconds = ALL_SECONDS * (PATIENCE if args.tiny else 1)
    try:
        for name in args.parts:
            left = STARTED + seconds - time.monotonic()
            if left < 5:
                Report(lines, name).left_out("the part", f"{seconds} seconds are over")
            else:
                run_part(name, min(PARTS[name][1] * seconds / ALL_SECONDS, left), lines, args.tiny)
    finally:
        found = [json.loads(line) for line in lines.read_text().splitlines()]
        if found:
            print()
            bench.show(list(table(found)))
        versions = {p: version(p) for p in ("transformers", "accelerate", "triton")}
        bench.write(
            args.json or ("outputs/cpu_check.json" if args.tiny else "results/gpu.json"),
            {"tiny": args.tiny, "versions": versions, "lines": found},
        )
    if any("failed" in line or line.get("holds") is False for line in found):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main, "gpu_check.py")
