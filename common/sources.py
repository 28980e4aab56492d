"""Rows from files, folders and the Hub, on disk and memory-mapped: text columns, and conversations (`messages`)."""

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from common.config import UserError
from common.hub import is_local

MESSAGES = "messages"  # the usual column of conversations
ROW_FILES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")


def data_files(source: str) -> list[Path] | None:
    """The files of a local dataset; None for a Hub id.

    Raises:
        UserError: nothing there, no data file in the folder, or an unknown kind of file.
    """
    path = Path(source).expanduser()
    if not is_local(source) and not source.endswith(ROW_FILES):
        return None
    if path.is_dir():
        names = sorted(p.relative_to(path) for p in path.rglob("*") if p.name.endswith(ROW_FILES))
        files = [path / name for name in names if not any(part.startswith(".") for part in name.parts)]
        if not files:
            raise UserError(f"dataset {source}: the folder holds no {', '.join(ROW_FILES)} file")
        return files
    if not path.is_file():
        raise UserError(f"dataset {source}: no such file or folder (a Hub dataset is written owner/name)")
    if not path.name.endswith(ROW_FILES):
        raise UserError(f"dataset {source}: expected a file that ends in {', '.join(ROW_FILES)}")
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


def read_columns(
    path: str | Path, columns: tuple[str, ...], conversations: tuple[str, ...] = (MESSAGES,)
) -> Iterator[dict[str, Any]]:
    """These columns of each row of a JSON file: text, but for `conversations`, lists of {role, content}.

    The content of a message may be null: what an empty message means is the template's business.

    Raises:
        UserError: as read_json_rows; and a column is missing, null, of another kind, or cannot be encoded.
    """
    for place, row in read_json_rows(path):
        for column in columns:
            if column not in row:
                raise UserError(f"{place}: no column {column!r}; the row has {', '.join(map(repr, row)) or 'none'}")
            if column not in conversations:
                _check_text(row[column], f"{place}: column {column!r}")
                continue
            if not isinstance(row[column], list):
                raise UserError(
                    f"{place}: column {column!r} must be a list of {{role, content}}, got {_kind(row[column])}"
                )
            for i, message in enumerate(row[column], 1):
                what = f"{place}: message {i}"
                if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                    raise UserError(f"{what} must be an object with role and content, got {str(message)[:60]!r}")
                _check_text(message["role"], f"{what}: role")
                if message["content"] is not None:
                    _check_text(message["content"], f"{what}: content")
        yield {c: [_role_and_content(m) for m in row[c]] if c in conversations else row[c] for c in columns}


def _check_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise UserError(f"{what} must be text, got {_kind(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{what} holds half of a surrogate pair") from None


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _role_and_content(message: dict[str, Any]) -> dict[str, Any]:
    return {"role": message["role"], "content": message["content"]}


def split_cap(source: str) -> tuple[str, int]:
    """('x.jsonl:500') -> ('x.jsonl', 500): a dataset and its first N rows at most; 0 where there is no cap.

    Raises:
        UserError: a cap of 0.
    """
    name, colon, number = source.rpartition(":")
    if not colon or not number.isascii() or not number.isdigit() or os.path.exists(source):
        return source, 0
    if int(number) == 0:
        raise UserError(f"dataset {source}: a cap of 0 rows leaves nothing; leave the dataset out")
    return name, int(number)


def load_all(
    sources: list[str], columns: tuple[str, ...], split: str = "train", conversations: tuple[str, ...] = (MESSAGES,)
) -> Dataset:
    """The datasets `SOURCE` or `SOURCE:N` (its first N rows), one after the other; see load_rows."""
    capped = map(split_cap, sources)
    parts = [load_rows(source, columns, split, max_rows, conversations=conversations) for source, max_rows in capped]
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def load_rows(
    source: str,
    columns: tuple[str, ...],
    split: str = "train",
    max_rows: int = 0,
    subset: str | None = None,
    conversations: tuple[str, ...] = (MESSAGES,),
) -> Dataset:
    """The columns of a dataset, on disk and memory-mapped: text, but for `conversations`, lists of {role, content}.

    Args:
        source: a file, a folder of files (in the order of their names, its folders' too), or a Hub id.
        split, subset: which part of a Hub dataset (the Hub calls subset a configuration).
        max_rows: the first N rows; 0: all.
    Raises:
        UserError: the data cannot be read or has not the columns; no rows.
    """
    files = data_files(source)
    kinds = columns, conversations
    parts = [_from_hub(source, split, subset)] if files is None else [_from_file(f, *kinds) for f in files]
    rows = concatenate_datasets([_only(part, *kinds, source) for part in parts])
    if max_rows:
        rows = rows.select(range(min(max_rows, len(rows))))
    if len(rows) == 0:
        raise UserError(f"dataset {source}: no rows")
    return rows


def _features(columns: tuple[str, ...], conversations: tuple[str, ...]) -> Features:
    text = Value("string")
    return Features({c: List({"role": text, "content": text}) if c in conversations else text for c in columns})


def _only(rows: Dataset, columns: tuple[str, ...], conversations: tuple[str, ...], source: str) -> Dataset:
    """These columns, in the one type that all parts of a dataset share (Parquet files may say large_string)."""
    _check_columns(rows, columns, conversations, source)
    rows, features = rows.select_columns(list(columns)), _features(columns, conversations)
    if rows.features == features:
        return rows
    if some := set(columns) & set(conversations):  # messages may hold more than these, or hold them in another order
        return rows.map(lambda row: {c: [_role_and_content(m) for m in row[c]] for c in some}, features=features)
    return rows.cast(features)


def _from_file(path: Path, columns: tuple[str, ...], conversations: tuple[str, ...]) -> Dataset:
    stamp = path.stat()
    if stamp.st_size == 0:
        raise UserError(f"{path}: the file is empty")
    try:
        if path.suffix == ".parquet":
            return load_dataset("parquet", data_files=str(path), split="train")
        identity = f"{path.resolve()} {stamp.st_size} {stamp.st_mtime_ns} {columns} {conversations}"
        return Dataset.from_generator(
            read_columns,
            gen_kwargs={"path": str(path), "columns": columns, "conversations": conversations},
            features=_features(columns, conversations),
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


def _check_columns(rows: Dataset, columns: tuple[str, ...], conversations: tuple[str, ...], source: str) -> None:
    for column in columns:
        if column not in rows.column_names:
            raise UserError(f"dataset {source}: no column {column!r}; it has {', '.join(rows.column_names)}")
        kind = rows.features[column]
        if column in conversations:
            inner = getattr(kind, "feature", None)
            if not isinstance(inner, dict) or not {"role", "content"} <= inner.keys():
                raise UserError(f"dataset {source}: column {column!r} must be a list of {{role, content}}, got {kind}")
        elif getattr(kind, "dtype", None) not in ("string", "large_string"):
            raise UserError(f"dataset {source}: column {column!r} must be text, got {getattr(kind, 'dtype', kind)}")
        if nulls := rows.data.column(column).null_count:
            raise UserError(f"dataset {source}: column {column!r} is null in {nulls} of {len(rows)} rows")


def _one_line(e: BaseException) -> str:
    return " ".join(str(e).split())[:300] or type(e).__name__
