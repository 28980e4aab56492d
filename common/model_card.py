"""README.md of a trained or merged model: how it was made, and what eval.py has measured, in the Hub's own metadata."""

import os
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from common import run_folder
from common.config import TrainConfig
from common.hub import CARD, is_local
from common.sources import split_cap

_TUNED, _MERGED = "# Fine-tuned with rule", "# Merged by"

_TABLE_HEAD = "\nScores (eval.py):\n\n| task | protocol | metric | n | score, % |\n| --- | --- | --- | --- | --- |\n"
_TABLE = re.compile(re.escape(_TABLE_HEAD) + r"(?:\|.*\n)*")


def make(config: TrainConfig, description: dict[str, Any], last: dict[str, Any]) -> str:
    """The card of a run's final model, without access tokens and home paths.

    Args:
        description: what run.json says of the run.
        last: the last line of metrics.jsonl.
    """
    hub_datasets = [source for source, _ in map(split_cap, config.dataset) if not is_local(source)]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gradient-mask-tuning", config.adapter or config.rule],
        base_model=None if is_local(config.model) else config.model,
        datasets=hub_datasets or None,
    )
    settings = {k: v for k, v in description["config"].items() if v not in (None, "", [])}
    facts = {
        "base model": "a local folder" if is_local(config.model) else config.model,
        "data": f"{' '.join(config.dataset)}, {description['data']['examples']} examples, "
        f"fingerprint {description['data']['fingerprint']}",
        "rule": f"{config.rule}"
        + (f", keep_ratio {config.keep_ratio}" if config.keep_ratio else "")
        + (f", adapter {config.adapter} of rank {config.lora_rank}, merged" if config.adapter else ""),
        "steps": f"{last.get('step')} of {config.global_batch_size} examples, {last.get('tokens')} tokens",
        "last loss": f"{last.get('loss')}; held out: {last.get('eval_loss')}",
        "commit": description["git_commit"],
        "packages": ", ".join(f"{k} {v}" for k, v in description["versions"].items()),
    }
    return run_folder.redact(
        f"---\n{metadata}\n---\n\n{_TUNED} `{config.rule}`\n\n"
        + "".join(f"- {k}: {v}\n" for k, v in facts.items())
        + f"\nConfiguration (train.py):\n\n```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```\n"
    )


def make_merged(method: str, source: str, parts: list[tuple[str, str]], settings: dict[str, Any]) -> str:
    """The card of a model that scripts/merge.py has made of others, without access tokens and home paths.

    Args:
        source: the paper of the method.
        parts: (folder or Hub id, its part in it) of each model that it is made of.
        settings: the method's keys.
    """
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["merge", method],
        base_model=[name for name, _ in parts if not is_local(name)] or None,
    )
    environment = run_folder.environment()
    told = {k: v for k, v in settings.items() if v not in (None, "", [])}
    return run_folder.redact(
        f"---\n{metadata}\n---\n\n{_MERGED} `{method}`\n\n- source: {source}\n"
        + "".join(f"- part: {name}, {role}\n" for name, role in parts)
        + f"- commit: {environment['git_commit']}\n"
        + f"- packages: {', '.join(f'{k} {v}' for k, v in environment['versions'].items())}\n"
        + f"\nConfiguration (scripts/merge.py {method}):\n\n```yaml\n{yaml.safe_dump(told, sort_keys=False)}```\n"
    )


def add_scores(model: Path, scores: dict[str, dict[str, Any]]) -> None:
    """Put eval.py's scores into the card of a trained model: its metadata (the Hub's model-index), and a table.

    Scores of other tasks, and what else was written into the card, stay. A card that is not ours, or whose
    metadata the Hub's library cannot read, is left alone.

    Args:
        model: the model's folder.
        scores: entries of scores.json.
    """
    path = model / CARD
    if not (os.access(path, os.W_OK) and os.access(model, os.W_OK)):
        return
    try:
        card = ModelCard.load(path)
    except (ValueError, TypeError, KeyError, yaml.YAMLError):
        return
    if _TUNED not in card.text and _MERGED not in card.text:
        return
    new = {_key(result): result for name, entry in scores.items() for result in _results(name, entry)}
    kept = {_key(result): result for result in card.data.eval_results or []}
    card.data.eval_results = sorted((kept | new).values(), key=lambda r: (r.dataset_type, r.dataset_config or ""))
    folder = model.resolve()
    card.data.model_name = card.data.model_name or (folder.parent if folder.name == "final" else folder).name
    rows = "".join(
        f"| {r.dataset_name} | {r.dataset_config} | {r.metric_type} | {r.dataset_args['items']} | {_shown(r)} |\n"
        for r in card.data.eval_results
        if "items" in (r.dataset_args or {})  # eval.py's
    )
    text = card.text if _TABLE.search(card.text) else card.text + _TABLE_HEAD
    card.text = _TABLE.sub(lambda _: _TABLE_HEAD + rows, text)
    run_folder.write_whole(path, str(card))


def _results(name: str, entry: dict[str, Any]) -> list[EvalResult]:
    """One result per metric of an entry of scores.json; `name` is its key, task.protocol or task.protocol.format."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=entry["task"],
            dataset_name=entry["task"],
            dataset_config=name.removeprefix(f"{entry['task']}."),
            dataset_args={"items": entry["n"], "unit": entry.get("unit", "share")},
            metric_type=metric,
            metric_name=metric,
            metric_value=value["score"],
        )
        for metric, value in entry["metrics"].items()
    ]


def _shown(result: EvalResult) -> str:
    """A share as per cent, a loss with its unit."""
    if result.dataset_args.get("unit") == "nats":
        return f"{result.metric_value:.4f} nats"
    return f"{100 * result.metric_value:.2f}"


def _key(result: EvalResult) -> tuple[str | None, ...]:
    return result.task_type, result.dataset_type, result.dataset_config, result.dataset_split, result.metric_type
