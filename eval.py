"""Score a causal language model on benchmarks: prompts -> answers -> scores.

    accelerate launch eval.py --model outputs/x/final --tasks gsm8k --output_dir outputs/x/eval

`python eval.py --help` lists all keys. The same call again goes on where the last one was cut; `--score_only` scores
stored answers again, without a model. The unit of dealing to processes and of resuming is a block of a few batches: one
sort over all rows and the batch size fix it, so that answers do not depend on the number of processes.
"""

import contextlib
import hashlib
import json
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from common import integrity, model_card, run_folder
from common.config import EvalConfig, UserError, nearest, parse, run_main
from common.hub import from_pretrained, is_local
from common.templates import encode_prompts
from evaluation import generation, scores
from evaluation.generation import Decoding, Scored
from evaluation.scores import read_lines, write_lines
from tasks import GROUPS, TASKS
from tasks.source import Source
from tasks.task import Options, Task, render

SCORES, SETTINGS = "scores.json", "settings.json"
BATCHES_PER_BLOCK = 4  # a row that has ended gives its place to another row of its block


@dataclass
class Job:
    """A task of this call: what `--tasks` and `--prompt_format` made of it."""

    task: Task
    format: str  # a key of task.formats
    source: Source
    items: list[dict] | None = None
    version: str = ""  # of the items

    @property
    def name(self) -> str:
        """The stem of its files, task.protocol, and the format where it is not the protocol's default."""
        default = next(iter(self.task.formats))
        return f"{self.task.name}.{self.task.protocol}" + ("" if self.format == default else f".{self.format}")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Score the tasks; returns their entries of scores.json (on the main process). Can be called many times."""
    config = parse(EvalConfig, sys.argv[1:] if argv is None else argv)
    jobs, options = choose_tasks(config), Options(config.workers or physical_cores(), config.allow_unsafe_code)
    folder = Path(config.output_dir)
    check_folder(config, folder, jobs)
    for job in jobs:
        if job.task.check:
            job.task.check(options)
    transformers_logging.set_verbosity_error()
    # Processes that are done wait for the slowest at the end of a task.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=24))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    try:
        with run_folder.lock(folder) if accelerator.is_main_process else contextlib.nullcontext():
            old_scores = run_folder.read_json(folder / SCORES) if (folder / SCORES).exists() else {}
            if not config.score_only:
                answer_all(config, folder, jobs, accelerator)
            if not accelerator.is_main_process:
                return {}
            new_scores = {job.name: judge(folder, job, options) for job in jobs}
            run_folder.write_json(folder / SCORES, {**old_scores, **new_scores})
            scores.print_table(new_scores)
            if is_local(config.model):
                model_card.add_scores(Path(config.model), {**old_scores, **new_scores})
            return new_scores
    finally:
        if accelerator.num_processes == 1:  # as in train.py: the next call in this process starts afresh
            AcceleratorState._reset_state(reset_partial_state=True)


def physical_cores() -> int:
    """Processor cores that this process may use, hyper-threads not counted."""
    return max(1, min(psutil.cpu_count(logical=False) or 1, len(psutil.Process().cpu_affinity())))


# ---------------------------------------------------------------------------------------------------------------------
# Tasks and items
# ---------------------------------------------------------------------------------------------------------------------


def choose_tasks(config: EvalConfig) -> list[Job]:
    """The jobs of the words of `tasks`: a task, a task with a file, or a group."""
    jobs: list[Job] = []
    for word in config.tasks:
        name, equals, file = word.partition("=")
        if name in GROUPS and equals:
            raise UserError(f"tasks: {name} is a group of {', '.join(GROUPS[name])}: name one of them with the file")
        if name not in TASKS and name not in GROUPS:
            raise UserError(f"tasks: unknown task {name!r}{nearest(name, [*TASKS, *GROUPS])}")
        for task in [TASKS[n] for n in GROUPS.get(name, [name])]:
            known = config.prompt_format in task.formats
            format = config.prompt_format if known else next(iter(task.formats))
            jobs.append(Job(task, format, Source(config.data_dir, file, config.published_subset, config.languages)))
    for job in jobs:
        if sum(other.name == job.name for other in jobs) > 1:
            raise UserError(
                f"tasks: {job.task.name} is named twice (perhaps by a group); score another file of it into another "
                "output_dir"
            )
    if config.prompt_format and not any(config.prompt_format in job.task.formats for job in jobs):
        words = sorted({word for job in jobs for word in job.task.formats})
        raise UserError(
            f"prompt_format: these tasks do not know {config.prompt_format!r}{nearest(config.prompt_format, words)}"
        )
    return jobs


def check_folder(config: EvalConfig, folder: Path, jobs: list[Job]) -> None:
    """What can be refused before anything is loaded."""
    run_folder.check_writable(folder)
    if config.score_only:
        for job in jobs:
            if not (folder / f"{job.name}.jsonl").exists():
                raise UserError(
                    f"score_only: {folder} holds no {job.name}.jsonl; generate it first, without --score_only"
                )
    elif not config.model:
        raise UserError("missing: --model (only --score_only goes without)")
    elif is_local(config.model) and not (Path(config.model) / "config.json").is_file():
        raise UserError(f"model {config.model}: no such folder, or no config.json in it (a Hub model is owner/name)")


def load_items(job: Job, limit: int) -> list[dict]:
    """The items of a task, from a file, a folder or the Hub."""
    try:
        items = job.task.load(job.source)
    except UserError as e:
        raise UserError(f"task {job.task.name}: {e}") from None
    if job.source.file:
        raise UserError(f"task {job.task.name} is made of several files: give a folder of them, --data_dir")
    job.version = job.task.versions.get(len(items), "another version, or part of it" if job.task.versions else "")
    if 0 < limit < len(items):
        job.version = f"the first {limit} of {job.version or len(items)}"
    return items[:limit] if limit else items


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What the model is given at a time: one sample of an item, or one candidate."""

    item: int
    part: int  # which sample or candidate
    ids: list[int]
    start: int = 0  # where the candidate begins in ids
    choices: tuple[int, ...] = ()  # tokens whose probabilities are asked for at the end


def answer_all(config: EvalConfig, folder: Path, jobs: list[Job], accelerator: Accelerator) -> None:
    """Write folder/<job>.jsonl for every job; what an earlier call has done is kept."""
    with accelerator.local_main_process_first():
        for job in jobs:
            job.items = load_items(job, config.limit)
    if is_local(config.model):
        integrity.verify(Path(config.model), "model")
    tokenizer = from_pretrained(AutoTokenizer, config.tokenizer or config.model, "tokenizer")
    texts = {job.name: prompts_of(job, tokenizer) for job in jobs}
    prompts = {name: encode(tokenizer, prompts) for name, prompts in texts.items()}
    settings = {job.name: describe(config, job, prompts[job.name]) for job in jobs}
    done = compare_settings(config, folder, settings, accelerator)
    model = None
    for job in jobs:
        if job.name in done:
            continue
        parts = folder / f"{job.name}.parts"
        rows = rows_of(job, texts[job.name], prompts[job.name], tokenizer)
        rows.sort(key=lambda r: (-len(r.ids), r.item, r.part))  # longest first: memory fails early
        size = config.batch_size if job.task.candidates else config.batch_size * BATCHES_PER_BLOCK
        blocks = [rows[i : i + size] for i in range(0, len(rows), size)]
        mine = range(accelerator.process_index, len(blocks), accelerator.num_processes)
        todo = [b for b in mine if not (parts / f"{b:06d}.jsonl").exists()]
        if todo and model is None:
            model = generation.load_model(config, tokenizer, accelerator.device)
        for b in tqdm(todo, desc=job.name, unit="block", disable=not accelerator.is_local_main_process):
            answers = answer(model, job, blocks[b], config)
            lines = [{"id": r.item, "part": r.part, **a} for r, a in zip(blocks[b], answers, strict=True)]
            write_lines(parts / f"{b:06d}.jsonl", lines)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            lines = [line for b in range(len(blocks)) for line in read_lines(parts / f"{b:06d}.jsonl")]
            write_lines(folder / f"{job.name}.jsonl", merge(job, lines, texts[job.name], prompts[job.name]))
            shutil.rmtree(parts)
        accelerator.wait_for_everyone()


def prompts_of(job: Job, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each item's prompt, without BOS."""
    prompt = job.task.formats[job.format].prompt
    return [render(prompt(item, tokenizer), job.format, tokenizer) for item in job.items]


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids: one BOS if the tokenizer adds one, even where the text brings another, and no EOS."""
    bos = tokenizer.bos_token_id
    encoded = encode_prompts(tokenizer, texts)
    return [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in encoded]


def rows_of(job: Job, texts: list[str], prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """One row per sample or candidate of each item."""
    task = job.task
    if not task.candidates:
        return [Row(i, part, ids) for i, ids in enumerate(prompts) for part in range(task.samples)]
    rows = []
    for i, (item, text, prompt) in enumerate(zip(job.items, texts, prompts, strict=True)):
        if task.scoring == "next_token":
            last = tuple(tokenizer.encode(f" {c}", add_special_tokens=False)[-1] for c in task.candidates(item))
            rows.append(Row(i, 0, prompt, len(prompt), last))
            continue
        between = "" if text[-1:] in (" ", "\n") else " "
        for part, ids in enumerate(encode(tokenizer, [text + between + c for c in task.candidates(item)])):
            rows.append(Row(i, part, ids, min(len(prompt), len(ids) - 1)))
    return rows


def answer(model: generation.Model, job: Job, rows: list[Row], config: EvalConfig) -> list[dict[str, Any]]:
    """What the model says to each row of a block."""
    task = job.task
    if task.candidates:
        scores = generation.logprobs(model, [Scored(r.ids, r.start, r.choices) for r in rows])
        return [{"logprobs": s} for s in scores]
    decoding = Decoding(task.max_new_tokens, task.formats[job.format].stop, task.temperature, task.top_p)
    seeds = [f"{config.seed} {task.name} {r.item} {r.part}" for r in rows]
    return generation.generate(model, [r.ids for r in rows], decoding, seeds, config.batch_size)


def merge(job: Job, lines: list[dict], texts: list[str], prompts: list[list[int]]) -> list[dict]:
    """One line per item, of the lines of its samples or candidates."""
    by_item: dict[int, list[dict]] = defaultdict(list)
    for line in sorted(lines, key=lambda line: (line["id"], line["part"])):
        by_item[line["id"]].append(line)
    merged = []
    for i, item in enumerate(job.items):
        parts = by_item[i]
        if job.task.candidates:
            known = all(p["logprobs"] is not None for p in parts)
            said = {"logprobs": [v for p in parts for v in p["logprobs"]] if known else None}
        else:
            said = {
                "completions" if k == "completion" else k: [p[k] for p in parts]
                for k in ("completion", "tokens", "finish")
            }
        stored = {k: v for k, v in item.items() if not k.startswith("_")}
        merged.append({"id": i, "item": stored, "prompt": texts[i], "prompt_ids": prompts[i], **said})
    return merged


def describe(config: EvalConfig, job: Job, prompts: list[list[int]]) -> dict[str, Any]:
    """What an answer depends on; stored, and compared when a folder is used again."""
    task = job.task
    files = [p for p in sorted(Path(config.model).iterdir()) if p.is_file()] if is_local(config.model) else []
    files = [p for p in files if p.name != model_card.CARD]  # which is given the scores below
    candidates = [task.candidates(item) for item in job.items] if task.candidates else []
    how = "log-probabilities" if task.candidates else "sampled" if task.temperature else "greedy"
    return {
        "task": task.name,
        "protocol": task.protocol,
        "prompt_format": job.format,
        "dataset": ", ".join(job.source.read),
        "dataset_sha256": digest(job.items),
        "dataset_version": job.version,
        "prompts_sha256": digest([prompts, candidates, task.formats[job.format].stop]),
        "n": len(job.items),
        "limit": config.limit,
        "published_subset": config.published_subset,
        "model": config.model,
        "model_files": digest([(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]),
        "tokenizer": config.tokenizer,
        "engine": f"transformers, {how}",
        "dtype": config.dtype,
        "batch_size": config.batch_size,
        "max_new_tokens": task.max_new_tokens,
        "samples": task.samples,
        "temperature": task.temperature,
        "top_p": task.top_p,
        "seed": config.seed if task.temperature else 0,
    }


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def compare_settings(config: EvalConfig, folder: Path, settings: dict[str, dict], accelerator: Accelerator) -> set[str]:
    """Write settings.json, after a look at what is there; returns the tasks whose completions are complete."""
    path = folder / SETTINGS
    old = run_folder.read_json(path) if path.exists() else {}
    changed = {}
    for name, new in settings.items():
        results = [folder / f"{name}.jsonl", folder / f"{name}.parts"]
        if name in old and (differences := run_folder.differences(old[name], new, list(new))):
            changed[name] = "; ".join(differences)
        elif name not in old and any(p.exists() for p in results):
            changed[name] = f"not known, {SETTINGS} has no entry"
    if changed and not config.overwrite:
        listed = "; ".join(f"{name}: {what}" for name, what in changed.items())
        raise UserError(f"{folder} holds results of other settings: {listed} (--overwrite deletes them)")
    accelerator.wait_for_everyone()  # all have read what is now written
    if accelerator.is_main_process:
        for name in changed:
            shutil.rmtree(folder / f"{name}.parts", ignore_errors=True)
            (folder / f"{name}.jsonl").unlink(missing_ok=True)
        for name in settings:
            (folder / f"{name}.parts").mkdir(parents=True, exist_ok=True)
        run_folder.write_json(path, {**old, **settings})
    accelerator.wait_for_everyone()
    done = {name for name in settings if (folder / f"{name}.jsonl").exists()}
    for name in done if accelerator.is_main_process else ():
        shutil.rmtree(folder / f"{name}.parts", ignore_errors=True)
    return done


def judge(folder: Path, job: Job, options: Options) -> dict[str, Any]:
    """The entry of scores.json of a job whose answers are stored."""
    settings = run_folder.read_json(folder / SETTINGS).get(job.name)
    if settings is None:
        raise UserError(f"{folder / SETTINGS} has no entry {job.name}: the answers were made in another folder")
    if job.task.judge_needs_data and job.items is None:
        job.source.published = settings["published_subset"]
        job.items = load_items(job, settings["limit"])
        if digest(job.items) != settings["dataset_sha256"]:
            where = ", ".join(job.source.read)
            raise UserError(f"task {job.task.name}: the items in {where} are not those of the stored answers")
    items = job.items if job.task.judge_needs_data else None
    return {**settings, **scores.score(folder / f"{job.name}.jsonl", job.task, job.format, items, options)}


if __name__ == "__main__":
    run_main(main, "eval.py")
