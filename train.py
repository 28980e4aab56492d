"""Fine-tune a causal language model with a rule that says which weights are updated at each step (see gmt.py).

    accelerate launch train.py --config configs/quickstart.yaml --rule gmt --keep_ratio 0.2 --output_dir outputs/x

`python train.py --help` lists all keys.
"""

import contextlib
import math
import os
import resource
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, parse_flag_from_env
from datasets.utils.logging import disable_progress_bar
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import checkpoint
import gmt
import run_folder
from config import TrainConfig, UserError, nearest, parse, run_main
from data import (
    TEMPLATES,
    Examples,
    collate,
    data_files,
    load_rows,
    micro_batches,
    permutation,
    step_examples,
    steps_per_epoch,
    tokenise,
)
from hub import from_pretrained, is_local
from losses import sum_cross_entropy

# Keys that may differ between a run and its resumption: they do not change what is computed.
FREE_TO_CHANGE = {"output_dir", "resume", "resume_changed", "overwrite"} | {
    "save_every", "keep_checkpoints", "log_every", "eval_every"
}  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run one training; returns the last line of metrics.jsonl. Can be called many times in one process."""
    config = parse(TrainConfig, sys.argv[1:] if argv is None else argv)
    check_paths(config)
    accelerator = build_accelerator(config)
    try:
        lock = run_folder.lock(Path(config.output_dir)) if accelerator.is_main_process else contextlib.nullcontext()
        with lock:
            line = train(config, accelerator)
        accelerator.end_training()  # ends the process group
        return line
    finally:
        if accelerator.num_processes == 1:  # so that the next call in this process can choose another precision
            accelerator.free_memory()
            AcceleratorState._reset_state(reset_partial_state=True)


def train(config: TrainConfig, accelerator: Accelerator) -> dict[str, Any]:
    """The training run, top to bottom."""
    folder, say = Path(config.output_dir), accelerator.print
    torch.manual_seed(config.seed % 2**63)

    # --- data, model, masks, optimizer -------------------------------------------------------------------------------
    with accelerator.local_main_process_first():  # the others find its work in the cache
        tokenizer, examples, held_out = load_data(config)
    check_batches(config, len(examples), accelerator.num_processes)
    total_steps = config.max_steps or config.epochs * steps_per_epoch(len(examples), config.global_batch_size)
    model = load_model(config, examples)
    if config.rule == "hft":
        frozen = as_user_error(gmt.freeze_half, model, config.seed, "sft")
        say(f"hft freezes {len(frozen)} tensors: {', '.join(frozen)}")
    optimizer = build_optimizer(config, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    masker = as_user_error(  # after prepare, which may replace parameters
        gmt.Masker,
        accelerator.unwrap_model(model).named_parameters(),
        config.rule,
        config.keep_ratio,
        scope=config.scope,
        exclude=config.exclude,
        mask_vectors=config.mask_vectors,
        seed=config.seed,
    )
    say(masker.summary())
    say(
        f"{len(examples)} examples ({examples.truncated} cut to max_length {config.max_length}, {examples.dropped} left"
        f" out, {len(held_out)} held out), {examples.lengths.sum()} tokens, {examples.trained.sum()} of them trained\n"
        f"{total_steps} steps of {config.global_batch_size} examples on {accelerator.num_processes} process(es), "
        f"{steps_per_epoch(len(examples), config.global_batch_size)} steps an epoch"
    )

    # --- the run folder, and where to go on --------------------------------------------------------------------------
    description = {
        "config": asdict(config),
        "data": {"examples": len(examples), "fingerprint": examples.fingerprint(), "held_out": held_out.fingerprint()},
        **run_folder.environment(),
        "processes": accelerator.num_processes,
    }
    progress = open_folder(config, folder, description, accelerator, optimizer)
    if progress["step"] > total_steps:
        raise UserError(f"resume: the checkpoint is of step {progress['step']}, this run ends after {total_steps}")
    if config.resume and checkpoint.is_complete(folder / "final"):
        say(f"this run is finished: {folder / 'final'} is there")
        return {}
    metrics = run_folder.Metrics(folder, progress["step"]) if accelerator.is_main_process else None
    line: dict[str, Any] = {}

    # --- training ----------------------------------------------------------------------------------------------------
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    bar = tqdm(
        total=total_steps, initial=progress["step"], desc="train", unit="step", disable=not accelerator.is_main_process
    )
    for step in range(progress["step"], total_steps):
        # dropout is a function of (seed, step, process): there is no generator state to save or restore
        torch.manual_seed(((config.seed * 1_000_003 + step) * 100_003 + accelerator.process_index) % 2**63)
        logged = (step + 1) % config.log_every == 0 or step + 1 == total_steps
        timer = Timer(accelerator.device if logged else None)

        # 1. the step's examples, and this process's share of them
        ids = step_examples(len(examples), config.global_batch_size, config.seed, step)
        num_trained = int(examples.trained[ids].sum())
        share = deal(config, examples, ids, accelerator)
        batches = [collate(examples, micro, accelerator.device) for micro in share]
        timer.lap("data")

        # 2. forward and backward: the gradient of (sum over the step's trained tokens) / (their number)
        loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        for i, (input_ids, labels) in enumerate(batches):
            is_last = i + 1 == len(batches)
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                loss = sum_cross_entropy(model(input_ids=input_ids, use_cache=False).logits, labels)
                loss_sum += loss.detach()
                # DDP averages over the processes: undo that, since num_trained already counts all of them
                accelerator.backward(loss * (accelerator.num_processes / num_trained))
        loss_sum = accelerator.reduce(loss_sum, "sum")
        timer.lap("forward_backward")

        # 3. clip by the full norm, so that the mask is the only difference between the rules; then mask
        accelerator.unscale_gradients()
        grads = [p.grad for p in parameters if p.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(grads)
        finite = bool(grad_norm.isfinite())
        stats, kept_norm = None, grad_norm
        if finite:
            clipping = 1.0
            if config.max_grad_norm:
                clipping = min(1.0, config.max_grad_norm / (float(grad_norm) + 1e-6))
                torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, grad_norm)
            if config.masked_weights == "momentum":
                stats = masker.mask_gradients(step, stats=logged, check_finite=False)
        timer.lap("mask")

        # 4. the optimizer; a non-finite step is skipped (under fp16 the scaler has to see it, and skips it itself)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * lr_factor(config, step, total_steps)
        if finite and config.masked_weights == "frozen":  # masks, steps, and undoes the step where M = 0
            stats = masker.step(optimizer.optimizer, step, stats=logged, check_finite=False)
        elif finite or accelerator.scaler is not None:
            optimizer.step()
        if finite and logged:
            kept_norm = torch.nn.utils.get_total_norm(grads) / clipping
        optimizer.zero_grad()
        progress["step"] = step + 1
        progress["skipped_steps"] += not finite
        progress["tokens"] += int(examples.lengths[ids].sum())
        timer.lap("optimizer")

        # 5. log, evaluate, save
        loss = loss_sum.item() / num_trained
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{examples.lengths[ids].sum() / timer.total():.0f}")
        eval_due = step + 1 == total_steps or (config.eval_every and (step + 1) % config.eval_every == 0)
        eval_loss = evaluation_loss(config, model, held_out, accelerator) if eval_due and len(held_out) else None
        if not finite:
            say(f"step {step + 1}: the gradient is not finite, the weights stay as they are")
        if logged or not finite or eval_loss is not None:
            line = {
                "step": step + 1,
                "epoch": round((step + 1) / steps_per_epoch(len(examples), config.global_batch_size), 4),
                "loss": loss,
                "eval_loss": eval_loss,
                "lr": optimizer.param_groups[0]["lr"],
                "grad_norm": float(grad_norm),
                "grad_norm_kept": float(kept_norm),
                **(stats or {}),
                "tokens": progress["tokens"],
                "trained_tokens": num_trained,
                "skipped_steps": progress["skipped_steps"],
                "tokens_per_second": examples.lengths[ids].sum() / timer.total(),
                "peak_memory_gib": peak_memory_gib(accelerator.device),
                "seconds": timer.seconds,
            }
            if not finite:
                line["skipped_examples"] = ids.tolist()
            if metrics:
                metrics.write(line)
        if config.save_every and (step + 1) % config.save_every == 0:
            checkpoint.save(accelerator, folder / "checkpoints", progress, config.keep_checkpoints)
    bar.close()

    # --- the final model ---------------------------------------------------------------------------------------------
    checkpoint.save_model(accelerator, folder / "final", model, tokenizer)
    say(
        f"saved {folder / 'final'}; score it with: accelerate launch eval.py --model {folder / 'final'} "
        f"--tasks gsm8k --output_dir {folder / 'eval'}"
    )
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the above
# ---------------------------------------------------------------------------------------------------------------------


def check_paths(config: TrainConfig) -> None:
    """What can be refused before anything is loaded; every process comes to the same answer."""
    folder = Path(config.output_dir)
    run_folder.check(folder, config.resume, config.overwrite)
    if config.resume:
        refuse_changes(config, folder, {"config": asdict(config), **run_folder.environment()})
    data_files(config.dataset)
    for name in ("model", "tokenizer", "dataset"):
        inside = Path(getattr(config, name)).expanduser().resolve().is_relative_to(folder.resolve())
        if config.overwrite and getattr(config, name) and inside:
            raise UserError(f"overwrite would delete {name} {getattr(config, name)}: choose another output_dir")
    for name in ("model", "tokenizer"):
        path = getattr(config, name)
        if path and is_local(path) and not Path(path).is_dir():
            raise UserError(f"{name} {path}: no such folder (a Hub model is written owner/name)")
    if config.masked_weights == "frozen" and config.mixed_precision == "fp16":
        raise UserError(
            "masked_weights frozen needs its own optimizer step, which fp16's gradient scaler owns: use bf16"
        )
    on_cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    if config.mixed_precision == "fp16" and on_cpu:
        raise UserError("mixed_precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    for backend in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if parse_flag_from_env(f"ACCELERATE_USE_{backend}"):
            raise UserError(
                f"Accelerate is configured for {backend}, which is not supported yet: use DDP or one process"
            )
    check_batches(config, None, int(os.environ.get("WORLD_SIZE", "1")))


def check_batches(config: TrainConfig, num_examples: int | None, processes: int) -> None:
    """Raise UserError where the batch arithmetic cannot work out; num_examples is None where it is not known yet."""
    numbers = f"global_batch_size {config.global_batch_size}, {processes} processes"
    if config.global_batch_size < processes:
        raise UserError(f"{numbers}: some processes would never get an example; raise global_batch_size")
    if config.per_device_batch_size * processes > config.global_batch_size:
        raise UserError(
            f"{numbers}, per_device_batch_size {config.per_device_batch_size}: one forward pass on every process takes "
            f"{config.per_device_batch_size * processes} examples, more than a step has"
        )
    if num_examples is not None and num_examples < config.global_batch_size:
        raise UserError(f"{numbers}, {num_examples} examples: a step would be larger than the data")


def build_accelerator(config: TrainConfig) -> Accelerator:
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    transformers_logging.set_verbosity_error()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision={"fp32": "no"}.get(config.mixed_precision, config.mixed_precision),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            # find_unused_parameters keeps DDP from re-ordering its buckets after the first step: with 3 and more
            # processes a sum's rounding depends on that order, and a resumed run would differ.
            DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(hours=3)),  # others wait while one tokenises or saves
        ],
    )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise UserError(f"{accelerator.distributed_type.value} is not supported yet: use one process or DDP")
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            f"Accelerate's configuration sets gradient_accumulation_steps {accelerator.gradient_accumulation_steps}: "
            "set it to 1, accumulation follows from global_batch_size"
        )
    if not accelerator.is_local_main_process:
        disable_progress_bar()
        transformers_logging.disable_progress_bar()
    return accelerator


def load_data(config: TrainConfig) -> tuple[Any, Examples, Examples]:
    """(tokenizer, training examples, held-out examples)."""
    tokenizer = from_pretrained(AutoTokenizer, config.tokenizer or config.model, "tokenizer")
    if config.template not in TEMPLATES:
        raise UserError(f"template: unknown word {config.template!r}{nearest(config.template, TEMPLATES)}")
    columns = TEMPLATES[config.template].columns
    rows = load_rows(config.dataset, columns, config.dataset_split, config.max_train_rows)
    examples = tokenise(rows, tokenizer, config.template, config.max_length, config.overlong)
    if config.eval_rows >= len(examples):
        raise UserError(f"eval_rows {config.eval_rows} leaves nothing to train on: there are {len(examples)} examples")
    order = permutation(len(examples), config.seed, -1)
    held_out, rest = np.sort(order[: config.eval_rows]), np.sort(order[config.eval_rows :])
    training = examples.select(rest)
    training.truncated, training.dropped = examples.truncated, examples.dropped
    return tokenizer, training, examples.select(held_out)


def load_model(config: TrainConfig, examples: Examples) -> torch.nn.Module:
    """The model with its weights in master_dtype, whatever dtype they are stored in."""
    architecture = from_pretrained(AutoConfig, config.model, "model").get_text_config()
    if getattr(architecture, "quantization_config", None):
        raise UserError(f"model {config.model} is quantised: its weights cannot be trained; use the unquantised model")
    if (largest := examples.max_token_id()) >= architecture.vocab_size:
        raise UserError(
            f"token id {largest} is beyond the model's embedding of {architecture.vocab_size} rows: "
            f"the tokenizer {config.tokenizer or config.model} does not fit the model {config.model}"
        )
    context = getattr(architecture, "max_position_embeddings", math.inf)
    if (longest := int(examples.lengths.max())) > context:
        raise UserError(f"an example has {longest} tokens, the model's context is {context}: lower max_length")
    model = from_pretrained(AutoModelForCausalLM, config.model, "model", dtype=getattr(torch, config.master_dtype))
    # transformers refuses to save some generation configurations that are published with models (a temperature without
    # do_sample, say). That must not come out after days of training.
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True  # what a temperature means
        as_user_error(model.generation_config.validate, strict=True)
    return model


def build_optimizer(config: TrainConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def lr_factor(config: TrainConfig, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) over its peak, as transformers.get_scheduler has it.

    So the first step of a warm-up has learning rate 0, and the last step of a decay has one step's worth left.
    """
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.lr_schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress if config.lr_schedule == "linear" else 1.0


def refuse_changes(config: TrainConfig, folder: Path, new: dict[str, Any]) -> None:
    """Raise UserError where the run in `folder`, as it was last resumed, is not the one that `new` describes.

    Compared is what both have of configuration, data and versions, so that an early call can do with less.
    """
    old = run_folder.read_json(folder / run_folder.RUN)
    old = old.get("resumed", [old])[-1]
    changed = []
    for part in ("config", "data", "versions"):
        names = [name for name in new.get(part, {}) if name not in FREE_TO_CHANGE]
        changed += run_folder.differences(old[part], new.get(part, {}), names)
    if changed and not config.resume_changed:
        raise UserError(f"resume: not the run that {folder} holds: {'; '.join(changed)} (--resume_changed goes on)")


def open_folder(
    config: TrainConfig, folder: Path, description: dict, accelerator: Accelerator, optimizer
) -> dict[str, Any]:
    """Write run.json, or compare it and load the latest checkpoint; returns step, tokens, skipped_steps."""
    progress = {"step": 0, "tokens": 0, "skipped_steps": 0}
    configured = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    if config.resume:
        refuse_changes(config, folder, description)
        if checkpoint.is_complete(folder / "final"):
            return progress
        source = checkpoint.latest(folder / "checkpoints")
        progress = checkpoint.load(accelerator, source)
        for group, hyperparameters in zip(optimizer.param_groups, configured, strict=True):
            group.update(hyperparameters)  # those of this configuration, should it have been changed
        accelerator.print(f"resumed from {source}")
        old = run_folder.read_json(folder / run_folder.RUN)
        description = {**old, "resumed": [*old.get("resumed", []), {"step": progress["step"], **description}]}
    accelerator.wait_for_everyone()  # all have read what is now written or deleted
    if accelerator.is_main_process:
        if config.overwrite:
            run_folder.clear(folder)
        run_folder.write_json(folder / run_folder.RUN, description)
    accelerator.wait_for_everyone()
    return progress


def deal(config: TrainConfig, examples: Examples, ids: np.ndarray, accelerator: Accelerator) -> list[list[int]]:
    """This process's micro-batches of the examples `ids`."""
    args = accelerator.num_processes, config.micro_batch_tokens, config.per_device_batch_size
    return micro_batches(ids, examples.lengths, *args)[accelerator.process_index]


@torch.no_grad()
def evaluation_loss(config: TrainConfig, model: torch.nn.Module, held_out: Examples, accelerator: Accelerator) -> float:
    """Mean cross-entropy per trained token of the held-out examples, in nats."""
    model = accelerator.unwrap_model(model).eval()
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for micro in deal(config, held_out, np.arange(len(held_out)), accelerator):
        input_ids, labels = collate(held_out, micro, accelerator.device)
        total += sum_cross_entropy(model(input_ids=input_ids, use_cache=False).logits, labels)
    model.train()
    return accelerator.reduce(total, "sum").item() / int(held_out.trained.sum())


class Timer:
    """Seconds per phase of a step. A GPU runs behind Python: where `wait_for` is one, each lap waits for it."""

    def __init__(self, wait_for: torch.device | None):
        self.wait = wait_for is not None and wait_for.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.start = self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        if self.wait:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase], self.last = now - self.last, now

    def total(self) -> float:
        return self.last - self.start


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process, in GiB: on its GPU, or, without one, resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def as_user_error(function, *args, **kwargs) -> Any:
    """Call a function of gmt.py, whose complaints about its arguments are ValueErrors."""
    try:
        return function(*args, **kwargs)
    except ValueError as e:
        raise UserError(str(e)) from e


if __name__ == "__main__":
    run_main(main, "train.py")
