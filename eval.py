"""Score a causal language model on benchmarks: prompts -> generations -> scores.

    accelerate launch eval.py --model outputs/x/final --tasks gsm8k --output_dir outputs/x/eval

`python eval.py --help` lists all keys. The same call again goes on where the last one was cut; `--score_only` scores
stored completions again, without a model. The unit of generating, of dealing to processes and of resuming is the
batch: one sort over all items and the batch size fix it, so that answers do not depend on the number of processes.
"""

import contextlib
import hashlib
import json
import math
import shutil
import sys
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

import run_folder
from config import EvalConfig, UserError, nearest, parse, run_main
from hub import from_pretrained, is_local
from sources import load_rows
from tasks import TASKS
from tasks.task import Task
from templates import encode_prompts

SCORES, SETTINGS = "scores.json", "settings.json"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Score the tasks; returns the content of scores.json (on the main process). Can be called many times."""
    config = parse(EvalConfig, sys.argv[1:] if argv is None else argv)
    tasks = choose_tasks(config)
    folder = Path(config.output_dir)
    check_folder(config, folder, tasks)
    transformers_logging.set_verbosity_error()
    # Processes that are done wait for the slowest at the end of a task.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=24))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    try:
        with run_folder.lock(folder) if accelerator.is_main_process else contextlib.nullcontext():
            old_scores = run_folder.read_json(folder / SCORES) if (folder / SCORES).exists() else {}
            if not config.score_only:
                generate_all(config, folder, tasks, accelerator)
            if not accelerator.is_main_process:
                return {}
            scores = {name: score(folder, task) for name, (task, _) in tasks.items()}
            run_folder.write_json(folder / SCORES, {**old_scores, **scores})
            print_table(scores)
            return scores
    finally:
        if accelerator.num_processes == 1:  # as in train.py: the next call in this process starts afresh
            AcceleratorState._reset_state(reset_partial_state=True)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------


def choose_tasks(config: EvalConfig) -> dict[str, tuple[Task, str]]:
    """{task.protocol: (task, where its items are)} of the words of `tasks`."""
    chosen = {}
    for word in config.tasks:
        name, _, file = word.partition("=")
        if name not in TASKS:
            raise UserError(f"tasks: unknown task {name!r}{nearest(name, TASKS)}")
        task = TASKS[name]
        source = file or (str(Path(config.data_dir) / task.file) if config.data_dir else "")
        if source and not config.score_only and not Path(source).is_file():
            raise UserError(f"task {name}: no file {source} (expected a .jsonl, .json or .parquet file of its items)")
        if f"{name}.{task.protocol}" in chosen:
            raise UserError(f"tasks: {name} is named twice; score another file of it into another output_dir")
        chosen[f"{name}.{task.protocol}"] = (task, source)
    return chosen


def check_folder(config: EvalConfig, folder: Path, tasks: dict[str, tuple[Task, str]]) -> None:
    """What can be refused before anything is loaded."""
    run_folder.check_writable(folder)
    if config.score_only:
        for name in tasks:
            if not (folder / f"{name}.jsonl").exists():
                raise UserError(f"score_only: {folder} holds no {name}.jsonl; generate it first, without --score_only")
    elif not config.model:
        raise UserError("missing: --model (only --score_only goes without)")
    elif is_local(config.model) and not (Path(config.model) / "config.json").is_file():
        raise UserError(f"model {config.model}: no such folder, or no config.json in it (a Hub model is owner/name)")


def load_items(task: Task, source: str, limit: int) -> list[dict]:
    """The items of a task, from a file or the Hub."""
    dataset, subset, split = task.hub
    rows = load_rows(source or dataset, task.columns, split, subset=None if source else subset)
    items = [dict(row) for row in (rows.select(range(min(limit, len(rows)))) if limit else rows)]
    for i, item in enumerate(items, 1):
        try:
            task.check(item)
        except ValueError as e:
            raise UserError(f"{source or dataset}, item {i}: {e}") from None
    return items


# ---------------------------------------------------------------------------------------------------------------------
# Generations
# ---------------------------------------------------------------------------------------------------------------------


def generate_all(
    config: EvalConfig, folder: Path, tasks: dict[str, tuple[Task, str]], accelerator: Accelerator
) -> None:
    """Write folder/<task>.<protocol>.jsonl for every task; what an earlier call has done is kept."""
    with accelerator.local_main_process_first():
        items = {name: load_items(task, source, config.limit) for name, (task, source) in tasks.items()}
    tokenizer = from_pretrained(AutoTokenizer, config.tokenizer or config.model, "tokenizer")
    prompts = {
        name: encode_prompts(tokenizer, [task.prompt(item) for item in items[name]])
        for name, (task, _) in tasks.items()
    }
    settings = {
        name: describe(config, task, source, items[name], prompts[name]) for name, (task, source) in tasks.items()
    }
    done = compare_settings(config, folder, settings, accelerator)
    model = None
    for name, (task, _) in tasks.items():
        if name in done:
            continue
        parts = folder / f"{name}.parts"
        ids = prompts[name]
        order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))  # longest first: memory fails early
        batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
        mine = range(accelerator.process_index, len(batches), accelerator.num_processes)
        todo = [b for b in mine if not (parts / f"{b:06d}.jsonl").exists()]
        if todo and model is None:
            model = load_model(config, tokenizer, accelerator.device)
        for b in tqdm(todo, desc=name, unit="batch", disable=not accelerator.is_local_main_process):
            completions = generate(model, tokenizer, [ids[i] for i in batches[b]], task)
            lines = [
                {"id": i, "item": items[name][i], "prompt": task.prompt(items[name][i]), "prompt_ids": ids[i], **c}
                for i, c in zip(batches[b], completions, strict=True)
            ]
            write_lines(parts / f"{b:06d}.jsonl", lines)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            lines = [line for b in range(len(batches)) for line in read_lines(parts / f"{b:06d}.jsonl")]
            write_lines(folder / f"{name}.jsonl", sorted(lines, key=lambda line: line["id"]))
            shutil.rmtree(parts)
        accelerator.wait_for_everyone()


def describe(
    config: EvalConfig, task: Task, source: str, items: list[dict], prompts: list[list[int]]
) -> dict[str, Any]:
    """What a completion depends on; stored, and compared when a folder is used again."""
    digest = lambda value: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]  # noqa: E731
    files = [p for p in sorted(Path(config.model).iterdir()) if p.is_file()] if is_local(config.model) else []
    return {
        "task": task.name,
        "protocol": task.protocol,
        "dataset": source or ":".join(task.hub),
        "dataset_sha256": digest(items),
        "prompts_sha256": digest([prompts, task.stop]),
        "n": len(items),
        "limit": config.limit,
        "model": config.model,
        "model_files": digest([(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]),
        "tokenizer": config.tokenizer,
        "engine": "transformers.generate, greedy",
        "dtype": config.dtype,
        "batch_size": config.batch_size,
        "max_new_tokens": task.max_new_tokens,
    }


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


def load_model(config: EvalConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> torch.nn.Module:
    """The model, ready to generate greedily whatever its own generation configuration says."""
    architecture = from_pretrained(AutoConfig, config.model, "model").get_text_config()
    if max(tokenizer.get_vocab().values()) >= architecture.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {max(tokenizer.get_vocab().values())}, the model's embedding "
            f"{architecture.vocab_size} rows: they do not belong together"
        )
    model = from_pretrained(AutoModelForCausalLM, config.model, "model", dtype=getattr(torch, config.dtype))
    own = model.generation_config.eos_token_id  # some models end with several tokens
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    if not ends:
        raise UserError(f"model {config.model}: neither it nor its tokenizer names an end-of-sequence token")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=sorted(ends), pad_token_id=pad)
    return model.to(device).eval()


class StopStrings(StoppingCriteria):
    """Ends a row some tokens after one of the strings appeared; the text is cut at the string afterwards."""

    EVERY, LONGEST = 8, 16  # look every 8 tokens; a stop string has at most 16 tokens

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: tuple[str, ...], prompt_length: int):
        self.tokenizer, self.strings, self.start = tokenizer, strings, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        new = input_ids.shape[1] - self.start
        found = [False] * len(input_ids)
        if self.strings and new % self.EVERY == 0:
            tails = self.tokenizer.batch_decode(input_ids[:, self.start :][:, -(self.EVERY + self.LONGEST) :])
            found = [any(s in tail for s in self.strings) for tail in tails]
        return torch.tensor(found, device=input_ids.device)


@torch.inference_mode()
def generate(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], task: Task
) -> list[dict[str, Any]]:
    """Greedy completions of one batch, padded on the left.

    Returns:
        a dict per prompt: completion (cut before the first stop string), tokens (generated, up to the end of sequence),
        finish: `eos`, `stop` (a stop string), `length` (max_new_tokens or the context), or `too_long`: the prompt
        leaves no room in the context, and the completion is empty.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    room = [int(min(task.max_new_tokens, context - len(p))) for p in prompts]
    pad, ends = model.generation_config.pad_token_id, set(model.generation_config.eos_token_id)
    done: list[dict[str, Any]] = []
    # Prompts with the same room for an answer go together, so that a long one does not cut the answers of the others.
    for most, group in groupby(zip(room, prompts, strict=True), key=lambda pair: pair[0]):
        group = [p for _, p in group]
        if most <= 0:
            done += [{"completion": "", "tokens": 0, "finish": "too_long"} for _ in group]
            continue
        width = max(map(len, group))
        out = model.generate(
            input_ids=torch.tensor([[pad] * (width - len(p)) + p for p in group], device=model.device),
            attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in group], device=model.device),
            max_new_tokens=most,
            stopping_criteria=StoppingCriteriaList([StopStrings(tokenizer, task.stop, width)]),
        )
        done += [finish(tokenizer, p, row[width:], ends, task.stop) for p, row in zip(group, out.tolist(), strict=True)]
    return done


def finish(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], new: list[int], ends: set[int], stop: tuple[str, ...]
) -> dict[str, Any]:
    """Cut generated ids at the end of sequence, decode them after their prompt, cut the text at a stop string."""
    end = next((i for i, t in enumerate(new) if t in ends), None)
    ids = new[:end]
    # Decoded together with the prompt: some tokenizers drop the space that a text begins with.
    before, whole = (tokenizer.decode(i, skip_special_tokens=True) for i in (prompt, prompt + ids))
    text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids, skip_special_tokens=True)
    cut = min((at for s in stop if (at := text.find(s)) >= 0), default=None)
    why = "stop" if cut is not None else "eos" if end is not None else "length"
    return {"completion": text[:cut], "tokens": len(ids), "finish": why}


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


def score(folder: Path, task: Task) -> dict[str, Any]:
    """Judge the stored completions of a task and write the verdicts beside them; returns its entry of scores.json."""
    path = folder / f"{task.name}.{task.protocol}.jsonl"
    lines = [{**line, **task.score(line["item"], line["completion"])} for line in read_lines(path)]
    write_lines(path, lines)
    n, correct = len(lines), sum(line["correct"] for line in lines)
    mean = correct / n
    return {
        **run_folder.read_json(folder / SETTINGS).get(f"{task.name}.{task.protocol}", {"task": task.name}),
        "score": mean,
        "standard_error": math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else None,  # of a mean of n verdicts
        "correct": correct,
        "n": n,
        "nothing_extracted": sum(line["extracted"] is None for line in lines),
        "cut_at_length": sum(line["finish"] == "length" for line in lines),
        "prompt_too_long": sum(line["finish"] == "too_long" for line in lines),
        **run_folder.environment(),
    }


def print_table(scores: dict[str, dict[str, Any]]) -> None:
    print(f"{'task':12} {'protocol':14} {'n':>6} {'score':>8} {'± s.e.':>8} {'no answer':>10} {'cut':>6}")
    for s in scores.values():
        error = "" if s["standard_error"] is None else f"{s['standard_error']:.2%}"
        print(
            f"{s['task']:12} {s['protocol']:14} {s['n']:6d} {s['score']:8.2%} {error:>8} {s['nothing_extracted']:10d} "
            f"{s['cut_at_length']:6d}"
        )


def write_lines(path: Path, lines: list[dict]) -> None:
    """Write a JSON-lines file so that it is either the old or the new one."""
    aside = path.with_name(path.name + ".aside")
    aside.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    aside.replace(path)


def read_lines(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


if __name__ == "__main__":
    run_main(main, "eval.py")
