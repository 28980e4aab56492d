"""Fetch what a run needs into a folder, for machines without internet.

    python scripts/download.py FOLDER --config configs/math_mistral_7b.yaml --tasks gsm8k

Run it where there is a network (a gated model needs `hf auth login` before). It prints what to add to the commands of
train.py and eval.py where there is none. What is there already is not fetched again; a call that was cut goes on.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from huggingface_hub import list_repo_files, snapshot_download

from common.errors import UserError, nearest, one_line, run_main
from common.hub import is_local
from common.sources import ROW_FILES, split_cap

ABOUT_MODELS = ["*.json", "*.jinja", "*.txt", "tokenizer*", "*.model"]  # configuration and tokenizer
TEXTS = "text_loss.jsonl"
NOT_ROWS = ("dataset_infos.json", "dataset_info.json", "state.json")


def fetch_model(name: str, folder: Path) -> Path:
    """The model's safetensors (or, where it has none, .bin files), configuration and tokenizer."""
    files = _ask(name, "model", list_repo_files, name)
    top = [f for f in files if "/" not in f]  # folders hold copies for other programs, e.g. original/
    weights = next(
        (w for w in ("model*.safetensors", "pytorch_model*.bin") if any(Path(f).match(w) for f in top)), "*.safetensors"
    )
    target = folder / "models" / name
    _ask(
        name, "model", snapshot_download, name,
        allow_patterns=[*ABOUT_MODELS, weights], ignore_patterns=["*/*"], local_dir=target,
    )  # fmt: skip
    return target


def fetch_dataset(name: str, split: str, folder: Path) -> Path:
    """The dataset's row files; where files are named after splits, those of this one, and of HUB_ID:CONFIG's folder."""
    name, _, config = name.partition(":")
    files = _ask(name, "dataset", list_repo_files, name, repo_type="dataset")
    rows = [f for f in files if f.endswith(ROW_FILES) and Path(f).name not in NOT_ROWS]
    rows = [f for f in rows if config in Path(f).parts[:-1]] or rows if config else rows
    chosen = [f for f in rows if split in Path(f).name] or rows
    if not chosen:
        raise UserError(f"dataset {name} holds no {', '.join(ROW_FILES)} file")
    target = folder / "datasets" / (f"{name}_{config}" if config else name)
    _ask(
        name, "dataset", snapshot_download, name, repo_type="dataset", allow_patterns=chosen, local_dir=target
    )  # fmt: skip
    return target


def fetch_tasks(words: list[str], folder: Path) -> Path:
    """The benchmarks' rows, in a cache that `datasets` finds again offline; text_loss's texts, which are no whole
    dataset, in text_loss.jsonl."""
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    import datasets

    from evaluation.scores import write_lines
    from tasks import GROUPS, TASKS
    from tasks.source import Source

    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    names = [name for word in words for name in GROUPS.get(word, [word])]
    for name in names:
        if name not in TASKS:
            raise UserError(f"tasks: unknown task {name!r}{nearest(name, [*TASKS, *GROUPS])}")
    failed = []
    for name in names:
        try:
            rows = TASKS[name].load(Source())
            if name == "text_loss":
                folder.mkdir(parents=True, exist_ok=True)
                write_lines(folder / TEXTS, rows)
        except UserError as e:  # not on the Hub, say
            failed.append(f"{name}: {e}")
    if failed:
        raise UserError("; ".join(failed))
    return folder / "cache"


def _ask(name: str, kind: str, function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except Exception as e:  # the network, the Hub (gated, unknown), the disk
        raise UserError(f"{kind} {name} cannot be fetched: {one_line(e)}") from None


def main(argv: list[str] | None = None) -> None:
    import yaml

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", help="a YAML of train.py: its model, tokenizer and datasets")
    parser.add_argument("--model", nargs="*", default=[], help="more models")
    parser.add_argument("--tasks", nargs="*", default=[], help="tasks of eval.py, or groups of them")
    args = parser.parse_args(argv)
    if not (args.config or args.model or args.tasks):
        raise UserError("nothing to fetch: name --config, --model or --tasks")
    words, folder = [], args.folder.expanduser().resolve()
    if args.config:
        try:
            settings = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as e:
            raise UserError(f"--config {args.config}: {one_line(e)}") from None
        if not isinstance(settings, dict):
            raise UserError(f"--config {args.config}: no keys of train.py in it")
        for key in ("model", "tokenizer"):
            if (name := settings.get(key)) and not is_local(name):
                words += [f"--{key}", str(fetch_model(name, folder))]
        sources = settings.get("dataset", [])
        sources = [split_cap(s) for s in (sources if isinstance(sources, list) else [sources])]
        words.append("--dataset")
        for name, cap in sources:
            where = name if is_local(name) else str(fetch_dataset(name, settings.get("dataset_split", "train"), folder))
            words.append(f"{where}:{cap}" if cap else where)
        print(f"train.py: HF_HUB_OFFLINE=1, and add {shlex.join(words)}")
    for name in args.model:
        print(f"model {name}: {fetch_model(name, folder)}")
    if args.tasks:
        cache = fetch_tasks(args.tasks, folder)
        print(f"eval.py: HF_HUB_OFFLINE=1 HF_DATASETS_CACHE={shlex.quote(str(cache))}")
        if "text_loss" in args.tasks:
            print(f"eval.py: write text_loss={shlex.quote(str(folder / TEXTS))} for text_loss")


if __name__ == "__main__":
    run_main(main, "download.py")
