"""From a dataset to one optimizer step: rows -> tokenised examples -> the step's example list -> micro-batches.

An optimizer step is a fixed list of examples, a function of (seed, epoch, step) alone. Sorting by length, padding,
micro-batches and processes only decide how the sum over that list is computed. Hence exact resume, and the same
training on 1 or N processes.
"""

import functools
import hashlib
import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import templates
from config import UserError, nearest
from templates import IGNORE, TEMPLATES, encode_row

# ---------------------------------------------------------------------------------------------------------------------
# Examples
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Examples:
    """Tokenised examples: columns input_ids and labels (lists of ints, label IGNORE where a token is not trained)."""

    rows: Dataset
    lengths: np.ndarray  # (n,) int64: tokens of each example
    trained: np.ndarray  # (n,) int64: its trained tokens
    truncated: int = 0  # how many were cut to max_length
    dropped: int = 0  # how many were left out, having no trained token within max_length (or being too long)
    empty: int = 0  # how many were left out, having an empty message

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, ids: np.ndarray) -> "Examples":
        return Examples(self.rows.select(ids), self.lengths[ids], self.trained[ids])

    def max_token_id(self) -> int:
        return pyarrow.compute.max(pyarrow.compute.list_flatten(self.rows.data.column("input_ids"))).as_py()

    def fingerprint(self) -> str:
        """A hash of all tokens and labels, in order: two runs with the same one train on the same examples."""
        digest = hashlib.sha256()
        for batch in self.rows.with_format("arrow").iter(1000):
            for column in ("input_ids", "labels"):
                digest.update(batch[column].combine_chunks().flatten().to_numpy(zero_copy_only=False).tobytes())
        digest.update(self.lengths.tobytes())
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
) -> Examples:
    """Tokens and labels of all rows, made on several processes and cached on disk.

    Args:
        template: a word of TEMPLATES.
        max_length: tokens per example at most.
        overlong: "truncate" or "drop" longer examples.
        processes: 0: as many as there are cores, and work for.
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

    def encode(row: dict, index: int) -> dict:
        try:
            ids, labels = encode_row(kind, row, tokenizer)
        except UserError as e:
            raise UserError(f"row {index + 1} of the dataset: {e}") from None
        empty, cut = not ids, len(ids) > max_length
        ids, labels = ids[:max_length], labels[:max_length]
        trained = sum(label != IGNORE for label in labels)
        left_out = trained == 0 or (cut and overlong == "drop")
        return {
            "input_ids": ids, "labels": labels, "trained": trained, "cut": cut, "empty": empty, "left_out": left_out
        }  # fmt: skip

    # A name of our own for the cached result: hashing a tokenizer object is slow and not stable. The code is part of
    # it, so that an edited template is not served from the cache.
    code = Path(__file__).read_bytes() + Path(templates.__file__).read_bytes()
    identity = (rows._fingerprint, _tokenizer_hash(tokenizer), template, max_length, overlong, code)
    try:
        encoded = rows.map(
            encode,
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
    cut, empty, left_out = (encoded.data.column(c).to_numpy() for c in ("cut", "empty", "left_out"))
    trained = encoded.data.column("trained").to_numpy()
    lengths = np.concatenate([c.value_lengths().to_numpy() for c in encoded.data.column("input_ids").chunks])
    examples = Examples(encoded.select_columns(["input_ids", "labels"]), lengths.astype(np.int64), trained)
    if left_out.any():
        examples = examples.select(np.flatnonzero(~left_out))
    examples.truncated, examples.empty = int((cut & ~left_out).sum()), int(empty.sum())
    examples.dropped = int(left_out.sum()) - examples.empty
    if len(examples) == 0:
        raise UserError(f"none of the {len(rows)} examples has a token to train on within max_length {max_length}")
    return examples


_TOKENS, _FLAG = List(Value("int32")), Value("bool")
_FEATURES = Features(
    {
        "input_ids": _TOKENS,
        "labels": _TOKENS,
        "trained": Value("int64"),
        "cut": _FLAG,
        "empty": _FLAG,
        "left_out": _FLAG,
    }
)


def describe_example(tokenizer: PreTrainedTokenizerBase, examples: Examples, index: int = 0, most: int = 12) -> str:
    """An example as the model is trained on it, for people: runs of trained and untrained tokens, ids and text.

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


def step_examples(n: int, global_batch_size: int, seed: int, step: int) -> np.ndarray:
    """The example ids of optimizer step `step` (from 0, over all epochs). An epoch's last list may be shorter."""
    epoch, position = divmod(step, steps_per_epoch(n, global_batch_size))
    return permutation(n, seed, epoch)[position * global_batch_size : (position + 1) * global_batch_size]


def micro_batches(
    ids: np.ndarray, lengths: np.ndarray, world_size: int, max_tokens: int, max_examples: int = 0
) -> list[list[list[int]]]:
    """Deal a step's examples to processes as length-sorted micro-batches: [process][micro-batch] -> ids.

    Each holds at most max_tokens tokens, padding included (one longer example stands alone), and at most max_examples
    examples (0: any number). Every process gets the same number of micro-batches, as a collective needs; where there
    are fewer examples than places, some are empty.
    """
    order = sorted(ids.tolist(), key=lambda i: (-lengths[i], i))  # longest first: its length is the width of its batch
    batches: list[list[int]] = []
    for i in order:
        current = batches[-1] if batches else None
        fits = current and (len(current) + 1) * lengths[current[0]] <= max_tokens
        if fits and not (max_examples and len(current) == max_examples):
            current.append(i)
        else:
            batches.append([i])
    # Split the batches with the most work until they can be dealt evenly: halves cost less than an idle process.
    while len(batches) % world_size:
        largest = max(batches, key=lambda b: len(b) * lengths[b[0]] if len(b) > 1 else 0)
        if len(largest) < 2:
            batches.append([])
            continue
        at = batches.index(largest)
        batches[at : at + 1] = [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    batches.sort(key=lambda b: -len(b) * (lengths[b[0]] if b else 0))  # alike ones run at the same time
    return [batches[rank::world_size] for rank in range(world_size)]


def collate(examples: Examples, ids: list[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """input_ids and labels, (batch, length) int64, padded on the right; no ids: one row of two untrained tokens.

    There is no attention mask: under causal attention no token sees the padding to its right, and padding has no label.
    """
    if not ids:
        return torch.zeros((1, 2), dtype=torch.long, device=device), torch.full((1, 2), IGNORE, device=device)
    rows = examples.rows[ids]
    width = max(map(len, rows["input_ids"]))
    input_ids = torch.tensor([r + [0] * (width - len(r)) for r in rows["input_ids"]], device=device)
    labels = torch.tensor([r + [IGNORE] * (width - len(r)) for r in rows["labels"]], device=device)
    return input_ids, labels
