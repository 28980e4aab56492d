"""The tasks of one call of eval.py: which they are, in which format, on which items."""

import json
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

import tasks
from common.config import EvalConfig
from common.errors import UserError, nearest
from common.templates import turn_end_ids
from tasks.source import Source
from tasks.task import Format, Task


@dataclass
class TaskRun:
    """A task as `--tasks` and `--prompt_format` ask for it."""

    task: Task
    format_name: str  # a key of task.formats
    source: Source
    items: list[dict] | None = None
    version: str = ""  # of the items

    @property
    def name(self) -> str:
        """The stem of its files: task.protocol, and the format where it is not the protocol's default."""
        default = next(iter(self.task.formats))
        suffix = "" if self.format_name == default else f".{self.format_name}"
        return f"{self.task.name}.{self.task.protocol}{suffix}"

    @property
    def format(self) -> Format:
        return self.task.formats[self.format_name]

    @property
    def special_tokens(self) -> bool:
        """Whether the tokenizer adds its BOS to the prompts; a chat template has written its own, as in training."""
        return self.format_name != "chat"

    def turn_ends(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Tokens that end an answer beside the model's own: what the chat template puts behind a turn."""
        return turn_end_ids(tokenizer) if self.format_name == "chat" else []

    def load_items(self, limit: int) -> None:
        """Read the items from a file, a folder or the Hub; `limit` takes the first ones, 0 all.

        Raises:
            UserError: they are missing or damaged, or hold what is no text.
        """
        try:
            items = self.task.load(self.source)
        except UserError as e:
            raise UserError(f"task {self.task.name}: {e}") from None
        if self.source.file:  # `load` has not asked for it
            raise UserError(f"task {self.task.name} is made of several files: give a folder of them, --data_dir")
        if not items:
            raise UserError(f"task {self.task.name}: {self.source.read[0]} holds no item of it")
        for i, item in enumerate(items, 1):
            try:
                json.dumps(item, ensure_ascii=False, default=str).encode()
            except UnicodeEncodeError as e:
                raise UserError(
                    f"task {self.task.name}: {self.source.read[0]}, item {i}: {e.object[e.start]!r} is half a "
                    "surrogate pair and no text: mend or delete the item"
                ) from None
        versions = self.task.versions
        self.version = versions.get(len(items), "another version, or part of it" if versions else "")
        if 0 < limit < len(items):
            self.version = f"the first {limit} of {self.version or len(items)}"
        self.items = items[:limit] if limit else items


def choose_tasks(config: EvalConfig) -> list[TaskRun]:
    """The runs that the words of `tasks` ask for: a task, a task with a file, or a group.

    Raises:
        UserError: a word is unknown, or names a task a second time; no task knows the format.
    """
    runs: list[TaskRun] = []
    for word in config.tasks:
        name, equals, file = word.partition("=")
        if name in tasks.GROUPS and equals:
            members = ", ".join(tasks.GROUPS[name])
            raise UserError(f"tasks: {name} is a group of {members}: name one of them with the file")
        if name not in tasks.TASKS and name not in tasks.GROUPS:
            raise UserError(f"tasks: unknown task {name!r}{nearest(name, [*tasks.TASKS, *tasks.GROUPS])}")
        if equals and not file:
            raise UserError(f"tasks: {word} names no file behind the =")
        for task in [tasks.TASKS[n] for n in tasks.GROUPS.get(name, [name])]:
            known = config.prompt_format in task.formats
            format_name = config.prompt_format if known else next(iter(task.formats))
            source = Source(config.data_dir, file, config.published_subset, config.languages)
            runs.append(TaskRun(task, format_name, source))
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            raise UserError(
                f"tasks: {run.task.name} is named twice (perhaps by a group); score another file of it into another "
                "output_dir"
            )
    if config.prompt_format and not any(config.prompt_format in run.task.formats for run in runs):
        known_formats = sorted({name for run in runs for name in run.task.formats})
        raise UserError(
            f"prompt_format: these tasks do not know {config.prompt_format!r}"
            f"{nearest(config.prompt_format, known_formats)}"
        )
    return runs
