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
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

import gmt
from common import model_card, run_folder, templates
from common.config import TrainConfig, UserError, nearest, parse, run_main
from common.hub import from_pretrained, is_local
from common.sources import data_files, load_all, split_cap
from common.templates import TEMPLATES
from training import backend, checkpoint, checks, interrupts, plan, reference
from training.data import (
    Examples,
    collate,
    describe_example,
    permutation,
    step_examples,
    steps_per_epoch,
    tokenise,
)
from training.losses import give_loss
from training.objectives import DPO, SFT, Objective

# Keys that may differ between a run and its resumption: they do not change what is computed.
FREE_TO_CHANGE = {"output_dir", "dry_run", "resume", "resume_changed", "overwrite", "tokenise_processes"} | {
    "save_every", "save_every_minutes", "keep_checkpoints", "log_every", "log_masks_every", "mask_jaccard",
    "eval_every", "max_skipped_steps", "trackers",
}  # fmt: skip

# The benchmarks of the paper for each of its training sets, for the last line that a run prints.
SCORED_BY = {"metamath": "math", "magicoder": "code", "tulu": "general"}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run one training; returns the last line of metrics.jsonl. Can be called many times in one process."""
    config = parse(TrainConfig, sys.argv[1:] if argv is None else argv)
    check_paths(config)
    if config.dry_run:
        return dry_run(config)
    accelerator = backend.build_accelerator(config)
    try:
        lock = run_folder.lock(Path(config.output_dir)) if accelerator.is_main_process else contextlib.nullcontext()
        with lock, interrupts.Signals() as signals:
            line = train(config, accelerator, signals)
        accelerator.end_training()  # ends the process group
        return line
    finally:
        if accelerator.num_processes == 1:  # so that the next call in this process can choose another precision
            accelerator.free_memory()
            AcceleratorState._reset_state(reset_partial_state=True)


def train(config: TrainConfig, accelerator: Accelerator, signals: interrupts.Signals) -> dict[str, Any]:
    """The training run, top to bottom."""
    folder, say = Path(config.output_dir), accelerator.print
    torch.manual_seed(config.seed % 2**63)

    # --- data, model, masks, optimizer -------------------------------------------------------------------------------
    with accelerator.local_main_process_first():  # the others find its work in the cache
        tokenizer, examples, held_out = load_data(config)
    check_batches(config, len(examples), accelerator.num_processes)
    total_steps = config.max_steps or config.epochs * steps_per_epoch(len(examples), config.global_batch_size)
    model = load_model(config, examples)
    give_loss(model, config.loss_chunk)
    if config.rule == "hft":
        frozen = as_user_error(gmt.freeze_half, model, config.seed, config.objective)
        say(f"hft freezes {len(frozen)} tensors: {', '.join(frozen)}")
    if config.master_dtype == "bfloat16":
        say("warning: master_dtype bfloat16: a weight changes only where its update is above about 1/256 of it")
    optimizer = backend.build_optimizer(config, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    masker = build_masker(config, accelerator.unwrap_model(model))  # after prepare, which may replace parameters
    say(masker.summary())
    checks.check_loss(config, model, examples, accelerator)
    packed = checks.decide_packing(config, model, examples, accelerator)
    say(
        f"{len(examples)} examples ({examples.truncated} cut to max_length {config.max_length}, "
        f"{examples.left_out_text()}, {len(held_out)} held out), {examples.lengths.sum()} tokens, "
        f"{examples.trained.sum()} of them trained\n{describe_example(tokenizer, examples)}\n"
        f"{total_steps} steps of {config.global_batch_size} examples on {accelerator.num_processes} process(es), "
        f"{steps_per_epoch(len(examples), config.global_batch_size)} steps an epoch"
    )

    # --- what is minimised; DPO's reference is the model as it is now, before a checkpoint is loaded ------------------
    objective, objective_held_out = SFT(examples), SFT(held_out)
    if config.objective == "dpo":
        mark = reference.fingerprint(config, [examples, held_out], packed)
        logps = reference.load(folder / run_folder.REFERENCE, mark, accelerator) if config.resume else None
        if logps is None:
            say("computing the reference's log-probabilities")
            epoch = range(steps_per_epoch(len(examples), config.global_batch_size))
            training = (m for step in epoch for m in step_batches(config, examples, step, packed, accelerator).micro)
            evaluation = deal(config, held_out, np.arange(len(held_out)), packed, accelerator)
            logps = reference.compute(model, [(examples, training), (held_out, evaluation)], accelerator)
        splits = zip((examples, held_out), logps, strict=True)
        objective, objective_held_out = (DPO(*split, config.beta, config.length_normalised) for split in splits)

    # --- the run folder, and where to go on --------------------------------------------------------------------------
    description = {
        "config": asdict(config),
        "data": {"examples": len(examples), "fingerprint": examples.fingerprint(), "held_out": held_out.fingerprint()},
        **run_folder.environment(),
        "processes": accelerator.num_processes,
    }
    accelerator.register_for_checkpointing(masker)  # the masks of grad_square; nothing for the other rules
    progress = open_folder(config, folder, description, accelerator, optimizer)
    if progress is None:
        say(f"this run is finished: {folder / 'final'} is there")
        return {}
    if progress["step"] > total_steps:
        raise UserError(f"resume: the checkpoint is of step {progress['step']}, this run ends after {total_steps}")
    if config.objective == "dpo" and accelerator.is_main_process:
        reference.save(folder / run_folder.REFERENCE, logps, mark)
    log = run_folder.Log(folder, progress["step"], accelerator, config)
    line: dict[str, Any] = {}

    # --- calibration: grad_square chooses its masks from the first steps' gradients, without a step being taken -------
    model.train()
    for step in range(config.calibration_steps if masker.needs_calibration else 0):
        backward(model, step_batches(config, examples, step, packed, accelerator), objective, accelerator)
        masker.calibrate()
        optimizer.zero_grad()
    if masker.needs_calibration:
        as_user_error(masker.fix_masks)

    # --- training ----------------------------------------------------------------------------------------------------
    parameters = [p for p in model.parameters() if p.requires_grad]
    flops_per_token = plan.flops_per_token(accelerator.unwrap_model(model), float(examples.lengths.mean()))
    steps_in_epoch = steps_per_epoch(len(examples), config.global_batch_size)
    bar = tqdm(
        total=total_steps, initial=progress["step"], desc="train", unit="step", disable=not accelerator.is_main_process
    )
    signals.listen()
    last_save, not_finite_in_a_row = time.monotonic(), 0
    for step in range(progress["step"], total_steps):
        logged = (step + 1) % config.log_every == 0 or step + 1 == total_steps
        masks_logged = bool(config.log_masks_every) and (step + 1) % config.log_masks_every == 0
        timer = Timer(accelerator.device if logged else None)

        # 1. the step's examples, and this process's share of them
        batches = step_batches(config, examples, step, packed, accelerator)
        timer.lap("data")

        # 2. forward and backward: the gradient of (sum of the loss over the step) / (its count, of tokens or pairs)
        sums = backward(model, batches, objective, accelerator)
        # one sum over the processes: of losses and metrics, of whether it is time to save, of the signals any has got
        minutes = (time.monotonic() - last_save) / 60 if accelerator.is_main_process else 0.0
        time_to_save = 0 < config.save_every_minutes <= minutes
        agreed = torch.cat([torch.tensor([time_to_save, *signals.received()]).to(sums), sums])
        time_to_save, *agreed = accelerator.reduce(agreed, "sum").tolist()
        received, sums = agreed[: len(interrupts.SIGNALS)], agreed[len(interrupts.SIGNALS) :]
        loss, *metrics = (total / objective.count(batches.ids) for total in sums)
        timer.lap("forward_backward")

        # 3. clip by the full norm, so that the mask is the only difference between the rules; then mask
        accelerator.unscale_gradients()
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        grad_norm = whole(norm)
        finite = math.isfinite(grad_norm)
        stats, kept_norm = None, grad_norm
        what_to_tell = {"stats": logged or masks_logged, "jaccard": masks_logged and config.mask_jaccard}
        if finite:
            clipping = 1.0
            if config.max_grad_norm:
                clipping = min(1.0, config.max_grad_norm / (grad_norm + 1e-6))
                torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
            if config.masked_weights == "momentum":
                stats = masker.mask_gradients(step, **what_to_tell, check_finite=False)
        timer.lap("mask")

        # 4. the optimizer; a non-finite step is skipped (under fp16 the scaler has to see it, and skips it itself)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * lr_factor(config, step, total_steps)
        if finite and config.masked_weights == "frozen":  # masks, steps, and undoes the step where M = 0
            stats = masker.step(optimizer.optimizer, step, **what_to_tell, check_finite=False)
        elif finite or accelerator.scaler is not None:
            optimizer.step()
        if finite and logged:
            kept_norm = whole(torch.nn.utils.get_total_norm(grads)) / clipping
        optimizer.zero_grad()
        progress["step"] = step + 1
        progress["skipped_steps"] += not finite
        progress["tokens"] += batches.tokens
        not_finite_in_a_row = 0 if finite else not_finite_in_a_row + 1
        timer.lap("optimizer")

        # 5. log, evaluate
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{batches.tokens / timer.total():.0f}")
        eval_due = step + 1 == total_steps or (config.eval_every and (step + 1) % config.eval_every == 0)
        eval_loss = (
            evaluation_loss(config, model, held_out, packed, objective_held_out, accelerator)
            if eval_due and len(held_out)
            else None
        )
        per_tensor = stats.pop("tensors") if stats else None
        if logged or not finite or eval_loss is not None:
            line = {
                "step": step + 1,
                "epoch": round((step + 1) / steps_in_epoch, 4),
                "loss": loss,
                **dict(zip(objective.metrics, metrics, strict=True)),
                "eval_loss": eval_loss,
                "lr": optimizer.param_groups[0]["lr"],
                "grad_norm": grad_norm,
                "grad_norm_kept": kept_norm,
                **(stats or {}),
                "tokens": progress["tokens"],
                "trained_tokens": batches.trained,
                "skipped_steps": progress["skipped_steps"],
                "tokens_per_second": batches.tokens / timer.total(),
                "model_flops_utilisation": plan.utilisation(
                    batches.tokens * flops_per_token, timer.total(), accelerator.num_processes, accelerator.device
                ),
                "peak_memory_gib": peak_memory_gib(accelerator.device),
                "seconds": timer.seconds,
            }
            if not finite:
                line["skipped_examples"] = batches.ids.tolist()
                say(f"step {step + 1}: the gradient is not finite, the weights stay as they are")
            log.write(line)
        if masks_logged and per_tensor:
            log.write_masks({"step": step + 1, "jaccard": stats.get("mask_jaccard"), "tensors": per_tensor})

        # 6. save; stop where a signal, or one bad step after the other, asks for it
        if 0 < config.max_skipped_steps <= not_finite_in_a_row:
            stop_at_bad_steps(config, folder, progress, not_finite_in_a_row, accelerator)
        if (config.save_every and (step + 1) % config.save_every == 0) or time_to_save or any(received):
            checkpoint.save(accelerator, folder / "checkpoints", progress, config.keep_checkpoints)
            last_save = time.monotonic()
        if any(received):
            bar.close()
            interrupts.stop(received, f"saved step {step + 1} of {total_steps}; the same command with --resume goes on")
    bar.close()
    if progress["skipped_steps"] == total_steps:
        raise UserError(f"none of the {total_steps} steps had a finite gradient: nothing was trained, nothing is saved")

    # --- the final model ---------------------------------------------------------------------------------------------
    card = model_card.make(config, description, line)
    checkpoint.save_model(accelerator, folder / "final", model, tokenizer, card)
    say(
        f"saved {folder / 'final'}; score it with: accelerate launch eval.py --model {folder / 'final'} "
        f"--tasks {SCORED_BY.get(config.template, 'TASK')} --output_dir {folder / 'eval'}"
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
    datasets = [split_cap(source)[0] for source in config.dataset]
    for source in datasets:
        data_files(source)
    for name, path in [("model", config.model), ("tokenizer", config.tokenizer), *(("dataset", d) for d in datasets)]:
        inside = Path(path).expanduser().resolve().is_relative_to(folder.resolve())
        if config.overwrite and path and inside:
            raise UserError(f"overwrite would delete {name} {path}: choose another output_dir")
    for name in ("model", "tokenizer"):
        path = getattr(config, name)
        if path and is_local(path) and not Path(path).is_dir():
            raise UserError(f"{name} {path}: no such folder (a Hub model is written owner/name)")
    backend.check(config)
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


def load_data(config: TrainConfig) -> tuple[Any, Examples, Examples]:
    """(tokenizer, training examples, held-out examples)."""
    tokenizer = from_pretrained(AutoTokenizer, config.tokenizer or config.model, "tokenizer")
    if config.template not in TEMPLATES:
        raise UserError(f"template: unknown word {config.template!r}{nearest(config.template, TEMPLATES)}")
    preferences = config.objective == "dpo"
    columns, conversations = templates.columns(TEMPLATES[config.template], preferences)
    rows = load_all(config.dataset, columns, config.dataset_split, conversations)
    how = config.template, config.max_length, config.overlong, config.tokenise_processes
    examples = tokenise(rows, tokenizer, *how, preferences)
    if config.eval_rows >= len(examples):
        raise UserError(f"eval_rows {config.eval_rows} leaves nothing to train on: there are {len(examples)} examples")
    order = permutation(len(examples), config.seed, -1)
    held_out, rest = np.sort(order[: config.eval_rows]), np.sort(order[config.eval_rows :])
    return tokenizer, examples.select(rest), examples.select(held_out)


def dry_run(config: TrainConfig) -> dict[str, Any]:
    """Print the plan; raises UserError for all that the run would refuse before its first step."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    _, examples, held_out = load_data(config)
    check_batches(config, len(examples), processes)
    model = plan.on_meta(config, load_architecture(config, examples))
    if config.rule == "hft":
        as_user_error(gmt.freeze_half, model, config.seed, config.objective)
    sharded = backend.is_sharded()
    text = plan.report(config, model, build_masker(config, model), examples, len(held_out), processes, sharded)
    if os.environ.get("RANK", "0") == "0":
        print(text)
    return {}


def load_architecture(config: TrainConfig, examples: Examples) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        UserError: it does not fit the tokenizer or the examples, or its weights cannot be trained.
    """
    whole = from_pretrained(AutoConfig, config.model, "model")
    architecture = whole.get_text_config()
    if getattr(architecture, "quantization_config", None):
        raise UserError(f"model {config.model} is quantised: its weights cannot be trained; use the unquantised model")
    if (largest := examples.max_token_id()) >= architecture.vocab_size:
        raise UserError(
            f"token id {largest} is beyond the model's embedding of {architecture.vocab_size} rows: "
            f"the tokenizer {config.tokenizer or config.model} does not fit the model {config.model}"
        )
    context = getattr(architecture, "max_position_embeddings", math.inf)
    if (longest := int(examples.sequence_lengths.max())) > context:
        raise UserError(f"an example has {longest} tokens, the model's context is {context}: lower max_length")
    return whole


def load_model(config: TrainConfig, examples: Examples) -> torch.nn.Module:
    """The model with its weights in master_dtype, whatever dtype they are stored in."""
    load_architecture(config, examples)
    model = from_pretrained(
        AutoModelForCausalLM,
        config.model,
        "model",
        dtype=getattr(torch, config.master_dtype),
        attn_implementation=config.attention,
    )
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        for layer in plan.layers(model):  # one by one: they are alike, so one compilation serves all, and names stay
            layer.compile(dynamic=True)
    # transformers refuses to save some generation configurations that are published with models (a temperature without
    # do_sample, say). That must not come out after days of training.
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True  # what a temperature means
        as_user_error(model.generation_config.validate, strict=True)
    return model


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
) -> dict[str, Any] | None:
    """Write run.json, or compare it and load the latest checkpoint.

    Returns:
        step, tokens, skipped_steps; None where the run that is to be resumed is finished.
    """
    progress = {"step": 0, "tokens": 0, "skipped_steps": 0}
    configured = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    if config.resume:
        refuse_changes(config, folder, description)
        if checkpoint.is_finished(accelerator, folder / "final"):
            return None
        source = checkpoint.latest(accelerator, folder / "checkpoints")
        if source:
            progress = checkpoint.load(accelerator, source)
            for group, hyperparameters in zip(optimizer.param_groups, configured, strict=True):
                group.update(hyperparameters)  # those of this configuration, should it have been changed
        accelerator.print(f"resumed from {source}" if source else f"{folder} holds no checkpoint: starting at step 0")
        old = run_folder.read_json(folder / run_folder.RUN)
        description = {**old, "resumed": [*old.get("resumed", []), {"step": progress["step"], **description}]}
    accelerator.wait_for_everyone()  # all have read what is now written or deleted
    if accelerator.is_main_process:
        if config.overwrite:
            run_folder.clear(folder)
        if config.resume:
            checkpoint.clean(folder / "checkpoints", source, config.keep_checkpoints)
        run_folder.write_json(folder / run_folder.RUN, description)
    accelerator.wait_for_everyone()
    return progress


def build_masker(config: TrainConfig, model: torch.nn.Module) -> gmt.Masker:
    return as_user_error(
        gmt.Masker,
        model.named_parameters(),
        config.rule,
        config.keep_ratio,
        scope=config.scope,
        exclude=config.exclude,
        mask_vectors=config.mask_vectors,
        seed=config.seed,
    )


class Batches(NamedTuple):
    """What one process computes of an optimizer step, and the step's numbers over all processes."""

    ids: np.ndarray  # the step's examples
    tokens: int  # their tokens
    trained: int  # and those of them that are trained
    micro: list["MicroBatch"]  # this process's share


class MicroBatch(NamedTuple):
    """What one forward pass takes."""

    inputs: dict[str, torch.Tensor]  # of the model, see data.collate
    ids: list[int]  # the examples, in their order in it


def step_batches(config: TrainConfig, examples: Examples, step: int, packed: bool, accelerator: Accelerator) -> Batches:
    """This process's micro-batches of optimizer step `step`."""
    # dropout is a function of (seed, step, process): there is no generator state to save or restore
    torch.manual_seed(((config.seed * 1_000_003 + step) * 100_003 + accelerator.process_index) % 2**63)
    ids = step_examples(len(examples), config.global_batch_size, config.seed, step)
    micro = list(deal(config, examples, ids, packed, accelerator))
    return Batches(ids, int(examples.lengths[ids].sum()), int(examples.trained[ids].sum()), micro)


def deal(
    config: TrainConfig, examples: Examples, ids: np.ndarray, packed: bool, accelerator: Accelerator
) -> Iterator[MicroBatch]:
    """This process's micro-batches of the examples `ids`."""
    dealt = plan.deal(config, examples, ids, packed, accelerator.num_processes)[accelerator.process_index]
    for rows in dealt:
        yield MicroBatch(collate(examples, rows, accelerator.device, packed), [i for row in rows for i in row])


def backward(model: torch.nn.Module, batches: Batches, objective: Objective, accelerator: Accelerator) -> torch.Tensor:
    """Accumulate the gradient of the step's loss; returns this process's sums of the loss and of the metrics, fp64.

    DDP reduces gradients once, after the last micro-batch. FSDP2 does after each, so that none is ever held whole.
    """
    sharded = accelerator.distributed_type == DistributedType.FSDP
    sums = torch.zeros(1 + len(objective.metrics), dtype=torch.float64, device=accelerator.device)
    count = objective.count(batches.ids)
    for i, batch in enumerate(batches.micro):
        reduce_now = sharded or i + 1 == len(batches.micro)
        with contextlib.nullcontext() if reduce_now else accelerator.no_sync(model):
            loss, metrics = objective(model(**batch.inputs), batch.ids)
            sums += torch.stack([x.detach().double() for x in (loss, *metrics)])
            # DDP and FSDP2 average over the processes: undo that, since `count` already counts all of them
            accelerator.backward(loss * (accelerator.num_processes / count))
    return sums


def whole(norm: torch.Tensor) -> float:
    """The value of a norm, also of gradients that FSDP2 shards."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def stop_at_bad_steps(
    config: TrainConfig, folder: Path, progress: dict[str, Any], bad: int, accelerator: Accelerator
) -> NoReturn:
    """Save the state from before `bad` skipped steps in a row, and end the run with a UserError."""
    before = {**progress, "step": progress["step"] - bad, "skipped_steps": progress["skipped_steps"] - bad}
    saved = "no step was taken before"
    if before["step"] > before["skipped_steps"]:
        checkpoint.save(accelerator, folder / "checkpoints", before, config.keep_checkpoints)
        saved = f"the state from before is {folder / 'checkpoints'}/step_{before['step']:06d}"
    raise UserError(
        f"{bad} steps in a row had a non-finite gradient, up to step {progress['step']} (max_skipped_steps): {saved}; "
        f"look at their rows, listed in {folder / run_folder.METRICS}, lower learning_rate, or change mixed_precision"
    )


@torch.no_grad()
def evaluation_loss(
    config: TrainConfig,
    model: torch.nn.Module,
    held_out: Examples,
    packed: bool,
    objective: Objective,
    accelerator: Accelerator,
) -> float:
    """The objective's loss on the held-out examples: for SFT the mean cross-entropy per trained token, in nats."""
    model = accelerator.unwrap_model(model).eval()
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for batch in deal(config, held_out, np.arange(len(held_out)), packed, accelerator):
        total += objective(model(**batch.inputs), batch.ids)[0]
    model.train()
    return accelerator.reduce(total, "sum").item() / objective.count(np.arange(len(held_out)))


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
