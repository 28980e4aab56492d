"""What a benchmark is: where its items are, the prompt of an item, and the verdict on a completion."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A benchmark under a named protocol. All functions are pure: prompts and scores can be made again at any time."""

    name: str
    protocol: str
    hub: tuple[str, str, str]  # dataset id, configuration, split
    file: str  # where --data_dir holds a local copy
    columns: tuple[str, ...]  # text columns of an item
    check: Callable[[dict], None]  # raises ValueError for an item that cannot be scored
    prompt: Callable[[dict], str]
    score: Callable[[dict, str], dict]  # (item, completion) -> at least {"extracted": ..., "correct": bool}
    max_new_tokens: int
    stop: tuple[str, ...] = ()  # a completion ends before the first of these strings
