"""Greedy soup: models join the average one by one, as long as its score does not fall (arXiv 2203.05482, recipe 1)."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import eval as eval_program
from common import run_folder
from common.config import EvalConfig, key, parse
from common.errors import UserError
from common.hub import identity
from evaluation.settings import digest
from scripts.merging import average, folders
from scripts.merging.folders import Model

SCORES = "greedy_scores.json"


@dataclass
class GreedyConfig:
    """Keys of scripts/merge.py greedy. All others are eval.py's, --tasks first: they say what the score is."""

    models: list[str] = key(
        help="folders or Hub ids of models of one architecture; tokenizer, config.json and dtype are those of the best"
    )
    output_dir: str = key(help="folder of the result; new or empty")
    work_dir: str = key(
        "",
        "folder of answers and scores, with which the same command goes on; empty: output_dir with _greedy behind it",
    )

    def __post_init__(self):
        """Raise UserError where keys contradict each other or are out of range."""
        average.check_parts(self.models, [])


def main(argv: list[str]) -> None:
    """Write the greedy soup of config.models, and print how it came about."""
    own, words = split(argv)
    config = parse(GreedyConfig, own)
    out = Path(config.output_dir).absolute()
    folders.check_output(out)
    work = Path(config.work_dir or out.with_name(f"{out.name}_greedy"))
    run_folder.check_writable(work)
    settings = check_words(words, work)
    models = average.open_models(config.models)

    alone = {model.source: score([model], words, settings, work) for model in models}
    models.sort(key=lambda model: -alone[model.source])  # equal ones stay in their order
    soup, best = models[:1], alone[models[0].source]
    rows = [(models[0].source, best, best, "first")]
    for model in models[1:]:
        with_it = score([*soup, model], words, settings, work)
        better = with_it >= best
        rows.append((model.source, alone[model.source], with_it, "added" if better else "left out"))
        if better:
            soup, best = [*soup, model], with_it

    record = {**vars(config), "eval": " ".join(words), "soup": [m.source for m in soup], "score": best}
    average.write_average(config.output_dir, soup, [1.0] * len(soup), "greedy", record)
    print("\n| model | its score | score of the soup with it | |\n| --- | --- | --- | --- |")
    for name, its, with_it, verdict in rows:
        print(f"| {name} | {its:.4f} | {with_it:.4f} | {verdict} |")
    print(f"\nsaved {out}: the average of {len(soup)} of {len(models)} models, score {best:.4f}")


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The words of the command line that are greedy's, and those that are eval.py's."""
    own, of_eval = [], []
    side = own
    for word in argv:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            side = own if name in (*GreedyConfig.__dataclass_fields__, "help") else of_eval
        side.append(word)
    return own, of_eval


def check_words(words: list[str], work: Path) -> dict[str, Any]:
    """eval.py's configuration, as far as scores depend on it.

    Raises:
        UserError: it is not valid, or one of the keys is greedy's to set.
    """
    settings = asdict(parse(EvalConfig, [*words, "--output_dir", str(work)]))
    for name in ("model", "score_only"):
        if settings.pop(name):
            raise UserError(f"{name} has no meaning here: greedy scores its --models and their averages")
    return {k: v for k, v in settings.items() if k not in ("output_dir", "overwrite", "workers")}


def score(models: list[Model], words: list[str], settings: dict[str, Any], work: Path) -> float:
    """eval.py's score of the average of some models, more is better; the one in work/greedy_scores.json if it is there.

    The mean over the tasks; a loss in nats counts with its sign changed. An average lies in `work` until its score is
    known, so that an evaluation that was cut goes on.

    Raises:
        UserError: the tasks are measured in different units; or one of eval.py's.
    """
    name = digest([fingerprint(model) for model in models])
    known = run_folder.read_json(work / SCORES) if (work / SCORES).exists() else {}
    entry = known.get(digest([name, settings]))
    if entry is None:
        here, average_of = work / name, " + ".join(model.source for model in models)
        print(f"\n{average_of}:", flush=True)
        here.mkdir(parents=True, exist_ok=True)
        folder = models[0].folder
        if len(models) > 1:
            folder = here / "model"
            if not folder.exists():  # it is put there whole
                average.write_average(str(folder), models, [1.0] * len(models), "average", {"models": average_of})
        # what was made with other settings gives way
        scored = eval_program.main([*words, "--model", str(folder), "--output_dir", str(here / "eval"), "--overwrite"])
        if len(units := {task["unit"] for task in scored.values()}) > 1:
            raise UserError(f"tasks: scores in {' and '.join(sorted(units))} have no mean: name tasks of one unit")
        sign = -1 if units == {"nats"} else 1
        entry = {"models": average_of, "score": sign * fmean(task["score"] for task in scored.values())}
        run_folder.write_json(work / SCORES, {**known, digest([name, settings]): entry})
        shutil.rmtree(here / "model", ignore_errors=True)
    return entry["score"]


def fingerprint(model: Model) -> list:
    """What tells a model's files from those of another one, or of another time."""
    return [str(model.folder.resolve()), identity(str(model.folder))]
