"""What makes a study: many short runs, each with a line in runs.jsonl, in parts that may depend on earlier lines.

A study (miniature.py, smollm2.py) says which runs there are and how one is made; the driver makes those that have no
line yet and appends theirs. So a call that was cut goes on, also on another machine with the committed lines alone:
weights are deleted as soon as they are scored. A study whose settings differ from those of the lines is refused.
"""

import contextlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from common import run_folder
from common.errors import UserError
from common.hub import load_weights
from common.sources import load_all
from common.templates import TEMPLATES, columns
from training.data import collate, micro_batches, tokenise
from training.losses import attach_loss

RUNS, ABOUT = "runs.jsonl", "study.json"
Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """One fine-tuning and its scores."""

    part: str  # a study's word: rates, seeds, keep_ratio, ...
    task: str
    rule: str
    learning_rate: float
    keep_ratio: float | None
    seed: int

    @property
    def name(self) -> str:
        keep = "" if self.keep_ratio is None else f"_keep{self.keep_ratio:g}"
        return f"{self.part}_{self.task}_{self.rule}_{self.learning_rate:g}{keep}_seed{self.seed}"


class Study(Protocol):
    """What differs between studies. An instance is sent to worker processes: a frozen dataclass."""

    threads: int  # of a worker; 0: all cores, divided among the workers
    processes: int  # runs at the same time
    may_grow: tuple[str, ...]  # settings that say which runs there are: no line depends on them

    def settings(self, folder: Path) -> dict[str, Any]:
        """Write what all runs share into `folder`; returns what may not change within one study, as JSON holds it."""

    def bases(self, folder: Path, results: Path, pool: ProcessPoolExecutor) -> None:
        """Make, and score, the models that are fine-tuned; called if a run is missing."""

    def parts(self) -> tuple[Callable[[Lines], list[Run]], ...]:
        """The runs of each part, in their order, from the lines of the parts before."""

    def make(self, run: Run, folder: Path) -> Lines:
        """Fine-tune and score; the run's line, and those of other runs that come with it."""


def run_study(study: Study, folder: Path, results: Path, processes: int, command: str) -> None:
    """Make all runs that have no line in results/runs.jsonl yet, `processes` at a time; study.json names the command.

    Raises:
        UserError: the lines that are there are of other settings; a run has failed (the others are made first).
    """
    results.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(study.settings(folder)))
    about, old = results / ABOUT, settings
    if about.exists():
        content = run_folder.read_json(about)
        old = content["scale"]
    else:  # without this machine's folders
        content = {"processes": processes, **run_folder.environment(), "command": command}
    if differing := [key for key in differences(old, settings) if key not in study.may_grow]:
        raise UserError(f"{about} is of a study with another {', '.join(differing)}: move {results} away")
    run_folder.write_json(about, {**content, "scale": settings})
    threads = study.threads or max(1, torch.get_num_threads() // processes)
    workers = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), set_up_worker, (threads,))
    with workers as pool:
        take_away_a_cut_line(results / RUNS)
        bases_are_there = False
        for part in study.parts():
            todo = missing(part(lines := read_lines(results / RUNS)), lines)
            if todo and not bases_are_there:
                study.bases(folder, results, pool)
                bases_are_there = True
            futures = [pool.submit(study.make, run, folder) for run in todo]
            failed = None
            for done in tqdm(as_completed(futures), part.__name__, len(futures), unit="run"):
                if (e := done.exception()) is not None:
                    failed = failed or e
                    continue
                with open(results / RUNS, "a") as f:
                    f.writelines(json.dumps(line) + "\n" for line in done.result())
            if failed is not None:
                raise failed


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The keys at which two settings differ."""
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def missing(runs: list[Run], lines: Lines) -> list[Run]:
    """The runs without a line, in their order."""
    there = {key_of(line) for line in lines}
    return [run for run in runs if tuple(asdict(run).values()) not in there]


def read_lines(path: Path) -> Lines:
    """The lines of runs.jsonl, the first of each run, without a last one that was cut."""
    texts = path.read_text().splitlines(keepends=True) if path.exists() else []
    found: dict[tuple, dict[str, Any]] = {}
    for line in (json.loads(text) for text in texts if text.endswith("\n")):
        found.setdefault(key_of(line), line)
    return list(found.values())


def take_away_a_cut_line(path: Path) -> None:
    """So that the next one can be appended."""
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1])


def key_of(line: dict[str, Any]) -> tuple:
    """The run that a line is of."""
    return tuple(line[key] for key in Run.__annotations__)


# ---------------------------------------------------------------------------------------------------------------------
# In a worker process
# ---------------------------------------------------------------------------------------------------------------------


def set_up_worker(threads: int) -> None:
    """Runs share the cores."""
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """What is printed inside goes to a file, which names itself if the work fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        try:
            yield
        except BaseException as e:
            e.add_note(f"see {path}")
            raise


@torch.no_grad()
def answer_losses(
    model: Path,
    files: dict[str, tuple[Path, str]],
    max_length: int,
    micro_batch_tokens: int = 1 << 16,
    bf16: bool = False,
) -> dict[str, float]:
    """Mean cross-entropy, in nats per trained token, of the right answers in some files.

    Args:
        model: a model folder, loaded in fp32.
        files: {name: (rows of a template's columns, the template's word)}.
        max_length: tokens of an example at most.
        bf16: compute under bf16 autocast, as in training.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = load_weights(str(model), dtype=torch.float32).eval()
    attach_loss(network, 1024)
    found = {}
    for name, (file, template) in files.items():
        wanted, conversations = columns(TEMPLATES[template], False)
        rows = load_all([str(file)], wanted, "train", conversations)
        examples = tokenise(rows, tokenizer, template, max_length, processes=1)
        ids, total = torch.arange(len(examples)).numpy(), 0.0
        for batch in micro_batches(ids, examples.lengths, 1, micro_batch_tokens)[0]:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                total += network(**collate(examples, batch)).double().sum().item()
        found[name] = total / int(examples.trained.sum())
    return found
