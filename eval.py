"""Score a causal language model on benchmarks: prompts -> answers -> scores.

    accelerate launch eval.py --model outputs/x/final --tasks gsm8k --output_dir outputs/x/eval

`python eval.py --help` lists all keys. The same command again resumes an interrupted run; `--score_only` scores
stored answers again, without a model.

A run's requests are sorted once and cut into blocks of a few batches. Blocks are what processes share out and what is
resumed, so that answers do not depend on the number of processes.
"""

import contextlib
import shutil
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from common import integrity, model_card, run_folder
from common.config import EvalConfig, parse
from common.errors import UserError, run_main
from common.hub import from_pretrained, is_local
from common.launch import check_launch
from common.precision import avoid_cudnn_attention, warn_if_no_gpu, warn_if_slow
from evaluation import generation, scores, settings
from evaluation.generation import Decoding, Scored
from evaluation.requests import Request, encode, make_requests, merge_responses, render_prompts
from evaluation.scores import read_lines, write_lines
from evaluation.task_run import TaskRun, choose_tasks
from tasks.task import Options

BATCHES_PER_BLOCK = 4  # a row that has ended gives its place to another row of its block


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Score the tasks; returns their entries of scores.json (on the main process). Can be called many times."""
    config = parse(EvalConfig, sys.argv[1:] if argv is None else argv)
    runs, options = choose_tasks(config), Options(config.workers or physical_cores(), config.allow_unsafe_code)
    folder = Path(config.output_dir)
    refuse_what_cannot_work(config, folder, runs, options)
    transformers_logging.set_verbosity_error()
    avoid_cudnn_attention()
    # Processes that are done wait for the slowest at the end of a task.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=24))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    try:
        with run_folder.lock(folder) if accelerator.is_main_process else contextlib.nullcontext():
            run_folder.refuse_separate_folders(folder, accelerator)
            if not config.score_only:
                generate_answers(config, folder, runs, accelerator)
            accelerator.end_training()  # ends the process group: the others need not wait while this one scores
            if not accelerator.is_main_process:
                return {}
            old_scores = settings.read(folder / settings.SCORES)
            new_scores = {run.name: score_answers(folder, run, options) for run in runs}
            all_scores = {**old_scores, **new_scores}
            run_folder.write_json(folder / settings.SCORES, all_scores)
            scores.print_table(new_scores)
            if is_local(config.model):
                of_model = {name: entry for name, entry in all_scores.items() if entry.get("model") == config.model}
                model_card.add_scores(Path(config.model), of_model)
            return new_scores
    finally:
        if accelerator.num_processes == 1:  # as in train.py: the next call in this process starts afresh
            AcceleratorState._reset_state(reset_partial_state=True)


def refuse_what_cannot_work(config: EvalConfig, folder: Path, runs: list[TaskRun], options: Options) -> None:
    """Raise UserError for all that is known to fail before anything is loaded."""
    check_launch()
    run_folder.check_writable(folder)
    if config.score_only:
        for run in runs:
            if not (folder / f"{run.name}.jsonl").exists():
                raise UserError(
                    f"score_only: {folder} holds no {run.name}.jsonl; generate it first, without --score_only"
                )
    elif not config.model:
        raise UserError("missing: --model (only --score_only goes without)")
    elif is_local(config.model) and not (Path(config.model) / "config.json").is_file():
        raise UserError(f"model {config.model}: no such folder, or no config.json in it (a Hub model is owner/name)")
    for run in runs:
        if run.task.preflight:
            run.task.preflight(options)


def physical_cores() -> int:
    """Processor cores that this process may use, hyper-threads not counted."""
    return max(1, min(psutil.cpu_count(logical=False) or 1, len(psutil.Process().cpu_affinity())))


# ---------------------------------------------------------------------------------------------------------------------
# Prompts -> answers
# ---------------------------------------------------------------------------------------------------------------------


def generate_answers(config: EvalConfig, folder: Path, runs: list[TaskRun], accelerator: Accelerator) -> None:
    """Write folder/<run>.jsonl for every run; what an earlier call has done is kept."""
    with accelerator.local_main_process_first():
        for run in runs:
            run.load_items(config.limit)
    if is_local(config.model):  # before its settings are stored
        integrity.verify(Path(config.model), "model")
    tokenizer = from_pretrained(AutoTokenizer, config.tokenizer or config.model, "tokenizer")
    if not is_local(config.model):  # its revision is among the settings
        from_pretrained(AutoConfig, config.model, "model")
    texts = {run.name: render_prompts(run, tokenizer) for run in runs}
    prompts = {
        run.name: [ids[: run.task.max_prompt_tokens] for ids in encode(tokenizer, texts[run.name], run.special_tokens)]
        for run in runs
    }
    described = {run.name: settings.describe(config, run, prompts[run.name], tokenizer) for run in runs}
    done = settings.record(folder, described, config.overwrite, accelerator)
    device = accelerator.device
    instead = "--dtype float32" if device.type == "cpu" else "--dtype float16"
    for line in filter(None, (warn_if_no_gpu(device), warn_if_slow(getattr(torch, config.dtype), device, instead))):
        accelerator.print(line)
    for run in runs:
        if config.prompt_format not in ("", run.format_name):
            accelerator.print(
                f"{run.task.name} does not know prompt_format {config.prompt_format}: it keeps {run.format_name}"
            )
    model = None
    for run in runs:
        if run.name in done:
            continue
        requests = make_requests(run, texts[run.name], prompts[run.name], tokenizer)
        size = config.batch_size * BATCHES_PER_BLOCK if run.task.generates else config.batch_size
        blocks = [requests[i : i + size] for i in range(0, len(requests), size)]
        files = [folder / f"{run.name}.parts" / f"{b:06d}.jsonl" for b in range(len(blocks))]
        mine = range(accelerator.process_index, len(blocks), accelerator.num_processes)
        todo = [b for b in mine if not files[b].exists()]
        if todo and model is None:
            model = generation.load_for_generation(config, tokenizer, accelerator.device)
        for b in tqdm(todo, desc=run.name, unit="block", disable=not accelerator.is_local_main_process):
            write_lines(files[b], respond(model, run, blocks[b], config))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            responses = [response for file in files for response in read_lines(file)]
            lines = merge_responses(run, responses, texts[run.name], prompts[run.name])
            write_lines(folder / f"{run.name}.jsonl", lines)
            shutil.rmtree(folder / f"{run.name}.parts")
        accelerator.wait_for_everyone()


def respond(model: generation.Model, run: TaskRun, block: list[Request], config: EvalConfig) -> list[dict[str, Any]]:
    """The model's responses to the requests of a block."""
    task = run.task
    if not task.generates:
        values = generation.logprobs(model, [Scored(r.ids, r.start, r.choices) for r in block])
        responses = [{"logprobs": value} for value in values]
    else:
        ends = tuple(run.turn_ends(model.tokenizer))
        decoding = Decoding(task.max_new_tokens, run.format.stop, task.temperature, task.top_p, ends)
        seeds = [f"{config.seed} {task.name} {r.item} {r.part}" for r in block]
        responses = generation.generate(model, [r.ids for r in block], decoding, seeds, config.batch_size)
    return [{"id": r.item, "part": r.part, **response} for r, response in zip(block, responses, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Answers -> scores
# ---------------------------------------------------------------------------------------------------------------------


def score_answers(folder: Path, run: TaskRun, options: Options) -> dict[str, Any]:
    """The entry of scores.json of a run whose answers are stored."""
    described = run_folder.read_json(folder / settings.SETTINGS).get(run.name)
    if described is None:
        raise UserError(
            f"{folder / settings.SETTINGS} has no entry {run.name}: the answers were made in another folder"
        )
    if run.task.judge_needs_data and run.items is None:
        run.source.published = described["published_subset"]
        run.load_items(described["limit"])
        if settings.digest(run.items) != described["dataset_sha256"]:
            where = ", ".join(run.source.read)
            raise UserError(f"task {run.task.name}: the items in {where} are not those of the stored answers")
    items = run.items if run.task.judge_needs_data else None
    path = folder / f"{run.name}.jsonl"
    return {**described, **scores.score(path, run.task, run.format_name, items, options)}


if __name__ == "__main__":
    run_main(main, "eval.py")
