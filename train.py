"""Fine-tune a causal language model with a rule that says which weights are updated at each step (see gmt.py).

    accelerate launch train.py --config configs/quickstart.yaml --rule gmt --keep_ratio 0.2 --output_dir outputs/x

`python train.py --help` lists all keys.
"""

import contextlib
import functools
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tqdm import tqdm

import gmt
from common import model_card, run_folder, templates
from common.config import TrainConfig, parse
from common.errors import Interrupted, run_main
from common.hub import has_weights, load_weights
from common.launch import world_size
from common.templates import TEMPLATES
from training import backend, checkpoint, checks, interrupts, plan, resume, updates
from training.data import Examples, describe_example, steps_per_epoch
from training.loading import load_data, load_trainable_model, on_paper, settle_batches, unread_columns
from training.masking import build_masker, calibrate, freeze
from training.preflight import check_memory, check_paths
from training.reference import build_objectives
from training.schedule import lr_factor, set_learning_rate
from training.steps import backward, evaluation, gradient, scaler_warms_up, step_batches, zero_gradients
from training.timing import Timer

SCORED_BY = {  # eval.py's --tasks for models of a template, for the last line that a run prints
    "metamath": "math",
    "peft_metamath": "gsm8k_peft",
    "magicoder": "code --prompt_format magicoder",
    "tulu": "TASK --prompt_format tulu",
    "chat": "TASK --prompt_format chat",
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run one training; returns the last line of metrics.jsonl: {} where none is written, by a plan or a finished run.

    Can be called many times in one process.
    """
    config = parse(TrainConfig, sys.argv[1:] if argv is None else argv)
    check_paths(config)
    if config.dry_run:
        return dry_run(config)
    accelerator = backend.build_accelerator(config)
    for line in checks.warnings(config, accelerator.device):
        accelerator.print(line)
    try:
        lock = run_folder.lock(Path(config.output_dir)) if accelerator.is_main_process else contextlib.nullcontext()
        with lock, interrupts.Signals() as signals:
            run_folder.refuse_separate_folders(Path(config.output_dir), accelerator)
            line = train(config, accelerator, signals)
        accelerator.end_training()  # ends the process group
        return line
    except Interrupted:  # on every process, at the same step
        accelerator.end_training()
        raise
    finally:
        if accelerator.num_processes == 1:  # so that the next call in this process can choose another precision
            accelerator.free_memory()
            AcceleratorState._reset_state(reset_partial_state=True)


def train(config: TrainConfig, accelerator: Accelerator, signals: interrupts.Signals) -> dict[str, Any]:
    """The training run, top to bottom; returns the last line of metrics.jsonl."""
    folder = Path(config.output_dir)
    torch.manual_seed(config.seed % 2**63)

    # --- data, model, optimizer, masks -------------------------------------------------------------------------------
    with accelerator.local_main_process_first():  # the others find its work in the cache
        tokenizer, examples, held_out = load_data(config)
    config = settle_batches(config, tokenizer, examples, accelerator)
    steps_in_epoch = steps_per_epoch(len(examples), config.global_batch_size)
    total_steps = config.max_steps or config.epochs * steps_in_epoch
    model = load_trainable_model(config, tokenizer, examples, accelerator)
    adapter = freeze(config, model, accelerator.print)
    model, optimizer = backend.prepare(accelerator, model, backend.build_optimizer(config, model))
    masker = build_masker(config, accelerator.unwrap_model(model))  # after prepare, which may replace parameters
    packed = checks.check_model(config, model, examples, accelerator)
    accelerator.print(summary(config, tokenizer, examples, held_out, masker, total_steps, accelerator.num_processes))

    # --- the objective (DPO's reference is the model as it is now), the run folder, the checkpoint to go on from ------
    objectives = build_objectives(config, model, examples, held_out, packed, accelerator)
    accelerator.register_for_checkpointing(masker)  # masks that serve for more than a step
    description = resume.describe(config, examples, held_out, accelerator)
    progress = resume.open_folder(config, folder, description, total_steps, optimizer, accelerator)
    if progress is None:  # the run to be resumed is finished
        return {}
    objectives.save(folder)
    log = run_folder.Log(folder, progress["step"], accelerator, config)

    # --- training ----------------------------------------------------------------------------------------------------
    model.train()
    objective, tokens_per_step = objectives.training, examples.lengths.sum() / steps_in_epoch
    accumulate, clipping = gradient(config, model, optimizer.optimizer, backward)
    batches_of = functools.partial(step_batches, config, examples, packed, accelerator)
    zero_grad = functools.partial(zero_gradients, optimizer, accelerator)
    evaluate = functools.partial(evaluation, config, model, held_out, packed, objectives.held_out)
    calibrate(config, masker, lambda step: accumulate(model, batches_of(step), objective, accelerator), zero_grad)
    flops_per_token = plan.flops_per_token(accelerator.unwrap_model(model), float(examples.lengths.mean()))
    bar = tqdm(total=total_steps, initial=progress["step"], desc="train", disable=not accelerator.is_main_process)
    last_save, saved_step, save_is_due, good = time.monotonic(), progress["step"], False, dict(progress)
    signals.listen()
    while (step := progress["step"]) < total_steps:
        evaluated = is_due(step, config.eval_every) or step + 1 == total_steps
        logged, masks_logged = is_due(step, config.log_every) or evaluated, is_due(step, config.log_masks_every)
        timer = Timer(accelerator.device if logged else None)

        # 1. the step's examples, and this process's share of them
        batches = batches_of(step)
        timer.lap("data")

        # 2. forward and backward: the gradient of (sum of the loss over the step) / (its count, of tokens or pairs)
        sums = accumulate(model, batches, objective, accelerator)
        time_to_save = 0 < config.save_every_minutes <= (time.monotonic() - last_save) / 60
        sums, time_to_save, received = signals.agree(sums, time_to_save, accelerator)
        loss, *metrics = (total / objective.count(batches.ids) for total in sums)
        timer.lap("forward_backward")

        # 3. clip, mask
        accelerator.unscale_gradients()
        grad_norm = clipping.before_masking()
        finite, stats = math.isfinite(grad_norm), None
        wanted = {"stats": logged or masks_logged, "jaccard": masks_logged and config.mask_jaccard}
        wanted["check_finite"] = False  # it has just been checked
        if finite and masker.masked_weights == "momentum":
            stats = masker.mask_gradients(step, optimizer=optimizer.optimizer, **wanted)
            clipping.after_masking()
        before = updates.copies(masker) if stats and masks_logged and config.mask_update_share else None
        timer.lap("mask")

        # 4. the optimizer; a non-finite step is skipped (under fp16 the scaler has to see it, and skips it itself)
        lr = config.learning_rate * lr_factor(config, step, total_steps, tokens_per_step)
        set_learning_rate(optimizer, lr)
        if finite and masker.masked_weights != "momentum":  # masks, steps, and takes back the step where M = 0
            stats = masker.step(optimizer.optimizer, step, after_masking=clipping.after_masking, **wanted)
        elif finite or accelerator.scaler is not None:
            optimizer.step()
        if before is not None:
            stats["update_share_masked"] = updates.share_of_masked(before, masker, accelerator)
        norms = clipping.norms(grad_norm, finite and logged)
        zero_grad()
        if not finite and scaler_warms_up(accelerator, progress):  # it has lowered its scale: the same step again
            continue
        progress["step"], progress["tokens"] = step + 1, progress["tokens"] + batches.tokens
        progress["skipped_steps"] += not finite
        good = dict(progress) if finite else good
        timer.lap("optimizer")

        # 5. log, evaluate
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{batches.tokens / timer.total():.0f}")
        on_held_out = evaluate(accelerator) if evaluated else {"eval_loss": None}
        if logged or not finite:
            line = {"step": step + 1, "epoch": round((step + 1) / steps_in_epoch, 4), "loss": loss}
            line |= {**dict(zip(objective.metrics, metrics, strict=True)), **on_held_out, "lr": lr}
            line |= {**norms, **(stats or {}), **progress, "trained_tokens": batches.trained}
            line |= timer.speed(batches.tokens, flops_per_token, accelerator.num_processes, accelerator.device)
            if not finite:
                line["skipped_examples"] = batches.ids.tolist()
                accelerator.print(f"step {step + 1}: the gradient is not finite, the weights stay as they are")
            log.write(line)
        if masks_logged and stats:
            log.write_masks(step + 1, stats)

        # 6. save, as of the last good step: bad ones are done again; stop where they or a signal ask for it
        if 0 < config.max_skipped_steps <= progress["step"] - good["step"]:
            resume.stop_at_bad_steps(config, folder, progress, good, accelerator)
        save_is_due |= is_due(step, config.save_every) or time_to_save
        if (save_is_due and finite) or (any(received) and good["step"] > saved_step):
            checkpoint.save(accelerator, folder / "checkpoints", good, config.keep_checkpoints)
            last_save, save_is_due, saved_step = time.monotonic(), False, good["step"]
        if any(received):
            bar.close()
            interrupts.stop(received, good["step"], total_steps)
    bar.close()

    # --- the final model ---------------------------------------------------------------------------------------------
    resume.refuse_untrained(progress)
    card = model_card.make(config, description, log.last)
    checkpoint.save_model(accelerator, folder / "final", model, tokenizer, card, adapter)
    accelerator.print(ending(config, folder, log.last))
    return log.last


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the above
# ---------------------------------------------------------------------------------------------------------------------


def is_due(step: int, every: int) -> bool:
    """Whether something that happens after every so many steps (0: never) happens after step `step`, from 0."""
    return every > 0 and (step + 1) % every == 0


def summary(
    config: TrainConfig,
    tokenizer: Any,
    examples: Examples,
    held_out: Examples,
    masker: gmt.Masker,
    total_steps: int,
    processes: int,
) -> str:
    """What is masked and what is trained on, for people, with one example as the model sees it."""
    text = (
        f"{masker.summary()}\n{len(examples)} examples ({examples.truncated} cut to max_length {config.max_length}, "
        f"{examples.left_out_text()}, {len(held_out)} held out), {examples.lengths.sum()} tokens, "
        f"{examples.trained.sum()} of them trained\n{describe_example(tokenizer, examples)}\n"
        f"columns that template {config.template} does not read: "
        f"{', '.join(unread_columns(config, tokenizer)) or 'none'}\n"
        f"{total_steps} steps of {config.global_batch_size} examples on {processes} process(es), up to "
        f"{config.micro_batch_tokens:,} tokens a forward pass, "
        f"{steps_per_epoch(len(examples), config.global_batch_size)} steps an epoch"
    )
    template = TEMPLATES[config.template]
    if ends := templates.turn_ends(template, tokenizer):
        shown = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} (id {i})" for i in ends)
        text += f"\na trained answer ends with {shown}, which ends generation too"
    else:
        text += "\nwarning: the chat template ends an answer with text alone: generation will not stop there"
    if config.template == "chat" and "strftime_now" in templates.chat_template(tokenizer):
        text += f"\nfor the chat template it is always {templates.TODAY:%d %B %Y}, in training and in scoring"
    if config.master_dtype == "bfloat16" and not config.adapter:  # whose matrices are in fp32
        text += "\nwarning: master_dtype bfloat16: a weight changes only where its update is above about 1/256 of it"
    return text


def ending(config: TrainConfig, folder: Path, last: dict[str, Any]) -> str:
    """The last losses, and the command that scores the final model."""
    names = {"loss": "loss", "eval_loss": "held-out loss", "eval_reward_accuracy": "held-out accuracy of rewards"}
    shown = ", ".join(f"{name} {last[key]:.4f}" for key, name in names.items() if last.get(key) is not None)
    return (
        f"the end: {shown}\nsaved {folder / 'final'}; score it with: accelerate launch eval.py "
        f"--model {folder / 'final'} --tasks {SCORED_BY.get(config.template, 'TASK')} --output_dir {folder / 'eval'}"
    )


def dry_run(config: TrainConfig) -> dict[str, Any]:
    """Print the plan; raises UserError for all that the run would refuse before its first step."""
    processes = world_size()
    tokenizer, examples, held_out = load_data(config)
    config = settle_batches(config, tokenizer, examples)
    model, masker = on_paper(config, tokenizer, examples)
    if has_weights(config.model):
        load_weights(config.model, device="meta")  # their names and shapes
    text = plan.report(config, model, masker, examples, len(held_out), processes)
    if os.environ.get("RANK", "0") == "0":
        print(text)
    check_memory(config, model, masker, processes)
    return {}


if __name__ == "__main__":
    run_main(main, "train.py")
