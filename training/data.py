"""From a dataset to one optimizer step: rows -> tokenised examples -> the step's example list -> micro-batches.

An optimizer step is a fixed list of examples, a function of (seed, epoch, step) alone. Sorting by length, padding,
micro-batches and processes only decide how the sum over that list is computed. Hence exact resume, and the same
training on 1 or N processes.
"""

import bisect
import functools
import hashlib
import itertools
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common import sources, templates
from common.errors import UserError, nearest
from common.templates import IGNORE, TEMPLATES, LeftOut

if TYPE_CHECKING:
    import pyarrow

# ---------------------------------------------------------------------------------------------------------------------
# Examples
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Examples:
    """Tokenised examples: columns input_ids and labels (lists of ints, label IGNORE where a token is not trained).

    An example is one sequence, or, for DPO, two, the chosen and the rejected one, strung together in the columns.
    """

    rows: Dataset
    sequence_lengths: np.ndarray  # (n, sequences) int64: tokens of each sequence
    sequence_trained: np.ndarray  # (n, sequences) int64: its trained tokens
    truncated: int = 0  # how many were cut to max_length
    left_out: Counter[str] = field(default_factory=Counter)  # how many were left out, by reason

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    @property
    def sequences(self) -> int:
        """Sequences of an example."""
        return self.sequence_lengths.shape[1]

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """(n,) int64: tokens of each example."""
        return self.sequence_lengths.sum(1)

    @functools.cached_property
    def trained(self) -> np.ndarray:
        """(n,) int64: trained tokens of each example."""
        return self.sequence_trained.sum(1)

    def select(self, ids: np.ndarray) -> "Examples":
        """Some of the examples; what was truncated or left out of all of them stays known."""
        lengths, trained = self.sequence_lengths[ids], self.sequence_trained[ids]
        return Examples(self.rows.select(ids), lengths, trained, self.truncated, self.left_out)

    def padded_lengths(self, packed: bool) -> np.ndarray:
        """(n,) int64: tokens that an example takes in a micro-batch of its like, where sequences have rows of their own
        (padded to the longer one of a pair) or are packed."""
        return self.lengths if packed else self.sequences * self.sequence_lengths.max(1)

    def left_out_text(self) -> str:
        """How many were left out, and why, as a phrase."""
        return f"{self.left_out.total()} left out" + (f" ({_listed(self.left_out)})" if self.left_out else "")

    def max_token_id(self) -> int:
        chunks = (chunk.flatten().to_numpy() for chunk in self.rows.data.column("input_ids").chunks)
        return max(int(ids.max()) for ids in chunks if len(ids))

    def fingerprint(self) -> str:
        """A hash of all tokens and labels, in order: two runs with the same one train on the same examples."""
        digest = hashlib.sha256()
        for batch in self.rows.with_format("arrow").iter(1000):
            for column in ("input_ids", "labels"):
                digest.update(batch[column].combine_chunks().flatten().to_numpy(zero_copy_only=False).tobytes())
        digest.update(self.sequence_lengths.tobytes())
        return digest.hexdigest()[:16]


ROWS_PER_PROCESS = 10_000  # fewer are tokenised faster than a process starts


def processes_for(rows: int) -> int:
    """How many processes are worth starting for so many rows."""
    return max(1, min(len(os.sched_getaffinity(0)), rows // ROWS_PER_PROCESS))


def tokenise(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int,
    overlong: str = "truncate",
    processes: int = 0,
    preferences: bool = False,
    train_on_prompt: bool = False,
) -> Examples:
    """Tokens and labels of all rows, made on several processes and cached on disk.

    Args:
        template: a word of TEMPLATES.
        max_length: tokens per example at most.
        overlong: "truncate" or "drop" longer examples.
        processes: 0: as many as there are cores, and work for.
        preferences: a row is a pair of answers, see templates.encode_preference; an example has two sequences.
        train_on_prompt: every token but the first is trained, not those of responses alone.
    Raises:
        UserError: an unknown template, a tokenizer without EOS, a row that cannot be rendered (its number is named), or
            nothing left to train on.
    """
    if template not in TEMPLATES:
        raise UserError(f"template: unknown word {template!r}{nearest(template, TEMPLATES)}")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {tokenizer.name_or_path} has no end-of-sequence token: set eos_token")
    processes = processes or processes_for(len(rows))
    kind = TEMPLATES[template]

    def render(row: dict[str, Any]) -> list[list[templates.Segment]]:
        """The sequences of a row."""
        if preferences:
            return list(templates.render_preference(kind, row, tokenizer))
        segments = templates.render(kind, row, tokenizer)
        return [[s._replace(trained=True) for s in segments] if train_on_prompt else segments]

    def encode_rows(columns: dict[str, list], indices: list[int]) -> dict[str, list]:
        rendered: list[list[list[templates.Segment]]] = []
        reasons: list[str] = []  # why a row is left out, or ""
        for index, *values in zip(indices, *columns.values(), strict=True):
            sequences, reason = [], ""
            try:
                sequences = render(dict(zip(columns, values, strict=True)))
            except LeftOut as e:
                reason = str(e)
            except UserError as e:
                raise UserError(f"row {index + 1} of the dataset: {e}") from None
            rendered.append(sequences)
            reasons.append(reason)
        encoded = iter(templates.encode(kind, [sequence for row in rendered for sequence in row], tokenizer))
        out: dict[str, list] = {name: [] for name in _FEATURES}
        for row, reason in zip(rendered, reasons, strict=True):
            full = [next(encoded) for _ in row]
            sequences = [(ids[:max_length], labels[:max_length]) for ids, labels in full]
            trained = [sum(label != IGNORE for label in labels) for _, labels in sequences]
            cut = any(len(ids) > max_length for ids, _ in full)
            if cut and overlong == "drop":
                reason = "more than max_length tokens"
            elif row and min(trained) == 0:
                reason = "no token to train on within max_length"
            elif preferences and row and sequences[0] == sequences[1]:
                reason = "equal answers within max_length"
            out["input_ids"].append(list(itertools.chain(*(ids for ids, _ in sequences))))
            out["labels"].append(list(itertools.chain(*(labels for _, labels in sequences))))
            out["lengths"].append([len(ids) for ids, _ in sequences])
            out["trained"].append(trained)
            out["cut"].append(cut)
            out["reason"].append(reason)
        return out

    # A name of our own for the cached result: hashing a tokenizer object is slow and not stable. The code is part of
    # it, so that an edited template is not served from the cache.
    code = b"".join(Path(file).read_bytes() for file in (__file__, templates.__file__, sources.__file__))
    how = template, max_length, overlong, preferences, train_on_prompt
    identity = (rows._fingerprint, _tokenizer_hash(tokenizer), *how, code)
    try:
        encoded = rows.map(
            encode_rows,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            features=_FEATURES,
            num_proc=processes if processes > 1 else None,
            new_fingerprint=hashlib.sha256(repr(identity).encode()).hexdigest()[:32],
            desc="tokenise",
        )
    except OSError as e:
        raise UserError(
            f"the tokenised examples cannot be cached: {e} (HF_HOME names the folder of the cache)"
        ) from None
    reasons = np.array(encoded["reason"], dtype=object)
    kept = np.flatnonzero(reasons == "")
    if len(kept) == 0:
        raise UserError(f"none of the {len(rows)} examples can be trained on: {_listed(_count(reasons))}")
    table = encoded.select(kept) if len(kept) < len(encoded) else encoded
    lengths, trained = (
        np.array(table[column], dtype=np.int64).reshape(len(kept), -1) for column in ("lengths", "trained")
    )
    cut = int(np.array(table["cut"]).sum())
    return Examples(table.select_columns(["input_ids", "labels"]), lengths, trained, cut, _count(reasons))


_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "lengths": List(Value("int64")),
        "trained": List(Value("int64")),
        "cut": Value("bool"),
        "reason": Value("string"),
    }
)


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{number} with {reason}" for reason, number in reasons.items())


def _count(reasons: np.ndarray) -> Counter[str]:
    return Counter(reason for reason in reasons if reason)


def describe_example(tokenizer: PreTrainedTokenizerBase, examples: Examples, index: int = 0, most: int = 12) -> str:
    """An example as the model is trained on it, as text: runs of trained and untrained tokens, ids and text.

    Of a longer run the first and last `most` / 2 ids are shown; the text is whole.
    """
    ids, labels = examples.rows[index]["input_ids"], examples.rows[index]["labels"]
    lines = [f"example {index} of {len(examples)}: {len(ids)} tokens, {int(examples.trained[index])} of them trained"]
    for trained, run in itertools.groupby(range(len(ids)), key=lambda i: labels[i] != IGNORE):
        run = [ids[i] for i in run]
        shown = list(map(str, run)) if len(run) <= most else [*run[: most // 2], "...", *run[-most // 2 :]]
        lines.append(
            f"  {'trained' if trained else 'not trained':11} {len(run):5} tokens [{' '.join(map(str, shown))}] "
            f"{tokenizer.decode(run)!r}"
        )
    return "\n".join(lines)


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{state}{tokenizer.special_tokens_map}{tokenizer.chat_template}".encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Steps and micro-batches
# ---------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """(n,) int64: the order of the examples in an epoch; epoch -1 chooses the held-out rows."""
    mixed = int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:7], "big")
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed)).numpy()


def steps_per_epoch(n: int, global_batch_size: int) -> int:
    return math.ceil(n / global_batch_size)


def step_examples(n: int, global_batch_size: int, seed: int, step: int, shuffle: bool = True) -> np.ndarray:
    """The example ids of optimizer step `step` (from 0, over all epochs). An epoch's last list may be shorter."""
    epoch, position = divmod(step, steps_per_epoch(n, global_batch_size))
    order = permutation(n, seed, epoch) if shuffle else np.arange(n)
    return order[position * global_batch_size : (position + 1) * global_batch_size]


def pack(ids: np.ndarray, lengths: np.ndarray, row_tokens: int) -> list[list[int]]:
    """Rows of at most row_tokens tokens that hold each example once: best fit, the longest examples first."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens that are free, row), sorted
    for i in sorted(ids.tolist(), key=lambda i: (-lengths[i], i)):
        length = int(lengths[i])
        at = bisect.bisect_left(rooms, (length, -1))
        room, row = rooms.pop(at) if at < len(rooms) else (row_tokens, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(rooms, (room - length, row))
    return rows


def micro_batches(
    ids: np.ndarray, lengths: np.ndarray, world_size: int, max_tokens: int, max_rows: int = 0, row_tokens: int = 0
) -> list[list[list[list[int]]]]:
    """Distribute a step's examples over processes as length-sorted micro-batches: [process][micro-batch][row] -> ids.

    A row is one example or, with row_tokens, as many as fit into that many tokens. A micro-batch holds at most
    max_tokens tokens, padding included (one longer example stands alone), and at most max_rows rows (0: any number).
    Every process gets the same number of micro-batches, as a collective needs, and no more than that takes; where there
    are fewer examples than that, some are empty. They are as even as they can be, since processes wait for one another.
    """

    length_of = dict(zip(ids.tolist(), lengths[ids].tolist(), strict=True))
    length = lambda row: sum(length_of[i] for i in row)  # noqa: E731
    tokens = lambda batch: len(batch) * max(map(length, batch), default=0)  # noqa: E731

    def fill(budget: int) -> list[list[list[int]]]:
        rows = pack(ids, lengths, min(row_tokens, budget)) if row_tokens else [[i] for i in ids.tolist()]
        return _filled({tuple(row): length(row) for row in rows}, budget, max_rows)

    if not len(ids):
        return [[] for _ in range(world_size)]
    number = -(-len(fill(max_tokens)) // world_size) * world_size
    budgets = range(min(sum(length_of.values()) // number, max_tokens), max_tokens)
    smallest = bisect.bisect_left(budgets, True, key=lambda budget: len(fill(budget)) <= number)
    batches = fill(budgets.start + smallest)  # the smallest budget that takes no more micro-batches than that
    while len(batches) < number:  # split those with the most work: halves cost less than an idle process
        at = max(range(len(batches)), key=lambda b: tokens(batches[b]) if sum(map(len, batches[b])) > 1 else 0)
        batches[at : at + 1] = _halves(batches[at]) if sum(map(len, batches[at])) > 1 else [batches[at], []]
    batches.sort(key=tokens, reverse=True)  # alike ones run at the same time
    return [batches[rank::world_size] for rank in range(world_size)]


def _filled(rows: dict[tuple[int, ...], int], max_tokens: int, max_rows: int) -> list[list[list[int]]]:
    """Rows, with their lengths, as micro-batches; longest first: its length is the width of its micro-batch."""
    batches: list[list[list[int]]] = []
    width = 0
    for row, length in sorted(rows.items(), key=lambda item: (-item[1], item[0])):
        count = len(batches[-1]) if batches else 0
        if count and (count + 1) * width <= max_tokens and not (max_rows and count == max_rows):
            batches[-1].append(list(row))
        else:
            batches.append([list(row)])
            width = length
    return batches


def _halves(batch: list[list[int]]) -> list[list[list[int]]]:
    """A micro-batch of several rows, or of one row of several examples, as two."""
    if len(batch) > 1:
        return [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return [[batch[0][::2]], [batch[0][1::2]]]


def collate(
    examples: Examples, rows: list[list[int]], device: torch.device | str = "cpu", packed: bool = False
) -> dict[str, Tensor | int]:
    """A micro-batch for a model with losses.attach_loss; no rows: one row of two untrained tokens.

    There is no attention mask: under causal attention no token sees the padding to its right. Where rows are packed,
    position_ids restart at 0 for every sequence, and for every token of padding. transformers derives from them which
    tokens may attend to which; checks.py tests that it does. FlashAttention is told by the sequences' bounds, which
    transformers would derive too, but on the device, in every layer, and wait for it.

    Returns:
        input_ids (rows, length) int64, padded on the right; positions (n,) int64, where in the flattened input_ids the
        token before each trained token is; targets (n,) int64, the trained tokens. Packed: position_ids (rows, length)
        int64; cu_seq_lens (sequences + 1,) int32, where in the flattened input_ids each sequence begins, and their
        end; max_length, the tokens of the longest sequence.
    """
    table = examples.rows.with_format("arrow")[[i for row in rows for i in row]] if rows else None
    ids, labels = (_Tokens(table, c) for c in ("input_ids", "labels")) if rows else (None, None)
    rows = [[(i, s) for i in row for s in range(examples.sequences)] for row in rows]
    if not packed:  # the sequences of an example, too, have rows of their own
        rows = [[sequence] for row in rows for sequence in row]
    lengths = [[int(examples.sequence_lengths[i, s]) for i, s in row] for row in rows]
    width = max(map(sum, lengths), default=2)
    input_ids = np.zeros((max(1, len(rows)), width), dtype=np.int64)
    position_ids = np.zeros_like(input_ids)
    positions, targets = [], []
    for r, in_row in enumerate(lengths):
        start = 0
        for length in in_row:
            end = start + length
            input_ids[r, start:end] = ids.take(length)
            position_ids[r, start:end] = np.arange(length)
            trained = labels.take(length)[1:]
            at = np.flatnonzero(trained != IGNORE)
            positions.append(at + (r * width + start))
            targets.append(trained[at])
            start = end
    empty = np.zeros(0, dtype=np.int64)
    batch = {
        "input_ids": input_ids,
        "positions": np.concatenate([empty, *positions]),
        "targets": np.concatenate([empty, *targets]),
    }
    more = {}
    if packed:
        bounds = np.append(np.flatnonzero(position_ids == 0), position_ids.size).astype(np.int32)
        batch |= {"position_ids": position_ids, "cu_seq_lens": bounds}
        more = {"max_length": int(np.diff(bounds).max())}
    return {name: torch.from_numpy(array).to(device) for name, array in batch.items()} | more


class _Tokens:
    """The tokens of a table's rows, one after the other."""

    def __init__(self, table: "pyarrow.Table", column: str):
        chunks = table.column(column).chunks  # flatten heeds the offsets of a slice
        self.tokens = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks])
        self.start = 0

    def take(self, number: int) -> np.ndarray:
        self.start += number
        return self.tokens[self.start - number : self.start].astype(np.int64)
