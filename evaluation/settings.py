"""settings.json: what the answers in a folder depend on, so that none is taken for another's."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from common import run_folder
from common.config import EvalConfig
from common.errors import UserError
from common.hub import identity
from evaluation.task_run import TaskRun

SETTINGS, SCORES = "settings.json", "scores.json"
OF_THE_MODEL = ("model", "model_files", "tokenizer")  # one for all that a folder holds


def describe(
    config: EvalConfig, run: TaskRun, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What the answers of a run depend on."""
    task = run.task
    candidates = [task.candidates(item) for item in run.items] if task.candidates else []
    how = "log-probabilities" if not task.generates else "sampled" if task.temperature else "greedy"
    return {
        "task": task.name,
        "protocol": task.protocol,
        "prompt_format": run.format_name,
        "dataset": ", ".join(run.source.read),
        "dataset_sha256": digest(run.items),
        "dataset_version": run.version,
        "prompts_sha256": digest([prompts, candidates, run.format.stop]),
        "n": len(run.items),
        "limit": config.limit,
        "published_subset": config.published_subset,
        "turn_end": " ".join(tokenizer.convert_ids_to_tokens(run.turn_ends(tokenizer))),
        "model": config.model,
        "model_files": digest(identity(config.model)),
        "tokenizer": config.tokenizer,
        "engine": f"transformers, {how}",
        "dtype": config.dtype,
        "batch_size": config.batch_size,
        "kv_cache_gib": config.kv_cache_gib,
        "max_new_tokens": task.max_new_tokens,
        "samples": task.samples,
        "temperature": task.temperature,
        "top_p": task.top_p,
        "seed": config.seed if task.temperature else 0,
    }


def read(path: Path) -> dict[str, dict]:
    """The entries of settings.json or scores.json, by run; none where there is no file. Raises UserError on damage."""
    return run_folder.read_json(path) if path.exists() else {}


def digest(value: Any) -> str:
    """A short hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def record(folder: Path, settings: dict[str, dict], overwrite: bool, accelerator: Accelerator) -> set[str]:
    """Write the settings of all runs, once they are known to be those of the answers that are there.

    Returns:
        the names of the runs whose answers are complete.
    Raises:
        UserError: the folder holds answers of other settings, also to other tasks if they are of another model, and
            `overwrite` is not set, which deletes them.
    """
    old, scores = read(folder / SETTINGS), read(folder / SCORES)
    this_model = next(iter(settings.values()))
    changed = {
        name: "; ".join(differences)
        for name, entry in old.items()
        if name not in settings and (differences := run_folder.differences(entry, this_model, list(OF_THE_MODEL)))
    }
    for name, new in settings.items():
        results = [folder / f"{name}.jsonl", folder / f"{name}.parts"]
        if name in old and (differences := run_folder.differences(old[name], new, list(new))):
            changed[name] = "; ".join(differences)
        elif name not in old and any(p.exists() for p in results):
            changed[name] = f"not known, {SETTINGS} has no entry"
    if changed and not overwrite:
        listed = "; ".join(f"{name}: {what}" for name, what in changed.items())
        raise UserError(f"{folder} holds results of other settings: {listed} (--overwrite deletes them)")
    accelerator.wait_for_everyone()  # all have read what is now written
    if accelerator.is_main_process:
        if changed and scores:  # first: scores of answers that are gone, or half gone, would pass for the new ones'
            run_folder.write_json(folder / SCORES, {name: s for name, s in scores.items() if name not in changed})
        for name in changed:
            shutil.rmtree(folder / f"{name}.parts", ignore_errors=True)
            (folder / f"{name}.jsonl").unlink(missing_ok=True)
        for name in settings:
            (folder / f"{name}.parts").mkdir(parents=True, exist_ok=True)
        kept = {name: entry for name, entry in old.items() if name not in changed}
        run_folder.write_json(folder / SETTINGS, {**kept, **settings})
    accelerator.wait_for_everyone()
    done = {name for name in settings if (folder / f"{name}.jsonl").exists()}
    for name in done if accelerator.is_main_process else ():
        shutil.rmtree(folder / f"{name}.parts", ignore_errors=True)
    return done
