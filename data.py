"""From a dataset to one optimizer step: rows -> tokenised examples -> the step's example list -> micro-batches.

An optimizer step is a fixed list of examples, a function of (seed, epoch, step) alone. Sorting by length, padding,
micro-batches and processes only decide how the sum over that list is computed. Hence exact resume, and the same
training on 1 or N processes.
"""

import functools
import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute
import torch
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from config import UserError, nearest
from hub import is_local

IGNORE = -100  # label of a token that is not trained

# ---------------------------------------------------------------------------------------------------------------------
# Templates: a row -> (prompt, response). To add one, enter it here.                                        <- edit here
# ---------------------------------------------------------------------------------------------------------------------

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def metamath(row: dict[str, str]) -> tuple[str, str]:
    """MetaMath's train_math.py: the first line of the query is the instruction, further lines are the input."""
    instruction, _, rest = row["query"].partition("\n")
    template = ALPACA_WITH_INPUT if rest else ALPACA
    return template.format_map({"instruction": instruction, "input": rest}), row["response"]


@dataclass(frozen=True)
class Template:
    """`render` makes (prompt, response) of a row with these columns; the response is trained, and must not be empty."""

    columns: tuple[str, ...]
    render: Callable[[dict[str, str]], tuple[str, str]]


TEMPLATES = {"metamath": Template(("query", "response"), metamath)}

# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------

_ROW_FILES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")


def data_files(source: str) -> list[Path] | None:
    """The files of a local dataset; None for a Hub id.

    Raises:
        UserError: nothing there, no data file in the folder, or an unknown kind of file.
    """
    path = Path(source).expanduser()
    if not is_local(source) and not source.endswith(_ROW_FILES):
        return None
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.name.endswith(_ROW_FILES))
        if not files:
            raise UserError(f"dataset {source}: the folder holds no {', '.join(_ROW_FILES)} file")
        return files
    if not path.is_file():
        raise UserError(f"dataset {source}: no such file or folder (a Hub dataset is written owner/name)")
    if not path.name.endswith(_ROW_FILES):
        raise UserError(f"dataset {source}: expected a file that ends in {', '.join(_ROW_FILES)}")
    return [path]


def read_json_rows(path: str | Path) -> Iterator[tuple[str, dict]]:
    """(place, row) for each object of a JSON-lines file or a JSON array, gzipped or not. Blank lines are skipped.

    Raises:
        UserError: naming file and line: empty file, byte-order mark, invalid UTF-8, malformed JSON, a line that is no
            object, a truncated gzip file.
    """
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    number, found = 0, 0
    try:
        with opener(path, "rb") as f:
            is_array = path.name.endswith((".json", ".json.gz")) and f.read(64).lstrip()[:1] == b"["
            f.seek(0)
            for number, line in enumerate([f.read()] if is_array else f, 1):
                if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                    raise UserError(f"{path}: starts with a byte-order mark: save it as UTF-8 without one")
                if not line.strip():
                    continue
                content = json.loads(line.decode("utf-8"))
                for i, row in enumerate(content if is_array else [content], 1):
                    place = f"{path}, item {i}" if is_array else f"{path}, line {number}"
                    if not isinstance(row, dict):
                        raise UserError(f"{place}: expected an object {{...}}, got {type(row).__name__}")
                    found += 1
                    yield place, row
    except UnicodeDecodeError as e:
        raise UserError(f"{path}, line {number}: not valid UTF-8 (byte {e.start + 1} of the line)") from None
    except json.JSONDecodeError as e:
        line = e.lineno if is_array else number
        raise UserError(f"{path}, line {line}: malformed JSON: {e.msg} at column {e.colno}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"{path}: not a complete gzip file after line {number}: {e}") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None
    if not found:
        raise UserError(f"{path}: the file is empty" if number == 0 else f"{path}: no rows in the file")


def read_columns(path: str | Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """The text columns of each row of a JSON file.

    Raises:
        UserError: as read_json_rows; and a column is missing, null, not text, or cannot be encoded.
    """
    for place, row in read_json_rows(path):
        for column in columns:
            if column not in row:
                raise UserError(f"{place}: no column {column!r}; the row has {', '.join(map(repr, row)) or 'none'}")
            if not isinstance(row[column], str):
                got = "null" if row[column] is None else type(row[column]).__name__
                raise UserError(f"{place}: column {column!r} must be text, got {got}")
            if not row[column].isascii():
                try:
                    row[column].encode()
                except UnicodeEncodeError:
                    raise UserError(f"{place}: column {column!r} holds half of a surrogate pair") from None
        yield {column: row[column] for column in columns}


def load_rows(
    source: str, columns: tuple[str, ...], split: str = "train", max_rows: int = 0, subset: str | None = None
) -> Dataset:
    """The text columns of a dataset, on disk and memory-mapped.

    Args:
        source: a file, a folder of files (concatenated in the order of their names), or a Hub id.
        split, subset: which part of a Hub dataset (the Hub calls subset a configuration).
        max_rows: the first N rows; 0: all.
    Raises:
        UserError: the data cannot be read or has not the columns; no rows.
    """
    files = data_files(source)
    parts = [_from_hub(source, split, subset)] if files is None else [_from_file(f, columns) for f in files]
    for part in parts:
        _check_columns(part, columns, source)
    parts = [part.select_columns(list(columns)) for part in parts]
    text = Features({column: Value("string") for column in columns})  # Parquet files may say large_string
    rows = concatenate_datasets([part if part.features == text else part.cast(text) for part in parts])
    if max_rows:
        rows = rows.select(range(min(max_rows, len(rows))))
    if len(rows) == 0:
        raise UserError(f"dataset {source}: no rows")
    return rows


def _from_file(path: Path, columns: tuple[str, ...]) -> Dataset:
    stamp = path.stat()
    if stamp.st_size == 0:
        raise UserError(f"{path}: the file is empty")
    try:
        if path.suffix == ".parquet":
            return load_dataset("parquet", data_files=str(path), split="train")
        identity = f"{path.resolve()} {stamp.st_size} {stamp.st_mtime_ns} {columns}"
        return Dataset.from_generator(
            read_columns,
            gen_kwargs={"path": str(path), "columns": columns},
            fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:32],  # a changed file is read anew
        )
    except DatasetGenerationError as e:
        cause = e.__cause__ or e
        raise UserError(str(cause) if isinstance(cause, UserError) else f"{path}: cannot be read: {cause}") from None
    except (ValueError, OSError) as e:  # no Parquet file; a cache that cannot be written
        raise UserError(f"{path}: cannot be read: {_one_line(e)}") from None


def _from_hub(source: str, split: str, subset: str | None) -> Dataset:
    try:
        return load_dataset(source, subset, split=split)
    except Exception as e:  # whatever the network, the Hub or its cache raises
        raise UserError(
            f"dataset {source}, split {split}: no local path, and neither Hub nor cache gives it: {_one_line(e)} "
            f"(to have it offline, where there is a network: hf download --repo-type dataset {source}; name its folder)"
        ) from None


def _check_columns(rows: Dataset, columns: tuple[str, ...], source: str) -> None:
    for column in columns:
        if column not in rows.column_names:
            raise UserError(f"dataset {source}: no column {column!r}; it has {', '.join(rows.column_names)}")
        kind = getattr(rows.features[column], "dtype", rows.features[column])
        if str(kind) not in ("string", "large_string"):
            raise UserError(f"dataset {source}: column {column!r} must be text, got {kind}")
        if nulls := rows.data.column(column).null_count:
            raise UserError(f"dataset {source}: column {column!r} is null in {nulls} of {len(rows)} rows")


def _one_line(e: BaseException) -> str:
    return " ".join(str(e).split())[:300] or type(e).__name__


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


def tokenise(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, template: str, max_length: int, overlong: str = "truncate"
) -> Examples:
    """Render rows, tokenise prompt and response together, train the response and the end-of-sequence token.

    As MetaMath does: a prompt's length is found by tokenising it alone; one beginning-of-sequence token if the
    tokenizer adds one, else none.

    Raises:
        UserError: an unknown template, a tokenizer without EOS, an empty response, or nothing left to train on.
    """
    if template not in TEMPLATES:
        raise UserError(f"template: unknown word {template!r}{nearest(template, TEMPLATES)}")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {tokenizer.name_or_path} has no end-of-sequence token: set eos_token")
    render, eos = TEMPLATES[template].render, tokenizer.eos_token_id

    def encode(batch: dict[str, list[str]], indices: list[int]) -> dict[str, list]:
        pairs = [render(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        for i, (_, response) in zip(indices, pairs, strict=True):
            if not response.strip():
                raise UserError(f"row {i + 1} of the dataset: the response is empty")
        prompts = encode_prompts(tokenizer, [p for p, _ in pairs])
        texts = tokenizer([p + r for p, r in pairs], verbose=False)["input_ids"]
        out: dict[str, list] = {"input_ids": [], "labels": [], "trained": [], "cut": [], "left_out": []}
        for prompt, whole in zip(prompts, texts, strict=True):
            if not whole or whole[-1] != eos:  # some tokenizers add one themselves
                whole.append(eos)
            cut = len(whole) > max_length
            ids = whole[:max_length]
            # The first token is never predicted: it is not trained even where the prompt is empty.
            labels = [IGNORE if i < max(1, len(prompt)) else t for i, t in enumerate(ids)]
            trained = sum(label != IGNORE for label in labels)
            out["input_ids"].append(ids)
            out["labels"].append(labels)
            out["trained"].append(trained)
            out["cut"].append(cut)
            out["left_out"].append(trained == 0 or (cut and overlong == "drop"))
        return out

    # A name of our own for the cached result: hashing a tokenizer object is slow and not stable. This file is part of
    # it, so that an edited template is not served from the cache.
    this_file = Path(__file__).read_bytes()
    identity = (rows._fingerprint, _tokenizer_hash(tokenizer), template, max_length, overlong, this_file)
    try:
        encoded = rows.map(
            encode,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            new_fingerprint=hashlib.sha256(repr(identity).encode()).hexdigest()[:32],
            desc="tokenise",
        )
    except OSError as e:
        raise UserError(
            f"the tokenised examples cannot be cached: {e} (HF_HOME names the folder of the cache)"
        ) from None
    cut, left_out = (encoded.data.column(c).to_numpy() for c in ("cut", "left_out"))
    trained = encoded.data.column("trained").to_numpy()
    lengths = np.concatenate([c.value_lengths().to_numpy() for c in encoded.data.column("input_ids").chunks])
    examples = Examples(encoded.select_columns(["input_ids", "labels"]), lengths.astype(np.int64), trained)
    if left_out.any():
        examples = examples.select(np.flatnonzero(~left_out))
    examples.truncated, examples.dropped = int((cut & ~left_out).sum()), int(left_out.sum())
    if len(examples) == 0:
        raise UserError(f"none of the {len(rows)} examples has a token to train on within max_length {max_length}")
    return examples


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[list[int]]:
    """Token ids of prompts that a response follows: without the EOS that some tokenizers add."""
    ends = [tokenizer.eos_token_id]
    encoded = tokenizer(prompts, verbose=False)["input_ids"] if prompts else []
    return [ids[:-1] if ids[-1:] == ends else ids for ids in encoded]


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{state}{tokenizer.special_tokens_map}".encode()).hexdigest()


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
