"""Rows from files, folders and the Hub, on disk and memory-mapped: text columns, and conversations (`messages`)."""

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_dataset
from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns
from datasets.exceptions import DatasetGenerationError
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard

from common.errors import UserError, one_line
from common.hub import is_local

MESSAGES = "messages"  # the usual column of conversations
EXTRAS = "extras"  # column of JSON text: what conversations hold beside roles and contents, see load_rows
ROW_FILES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
TEXTS, CONVERSATIONS = ": texts need template prompt_response", ": messages need template tulu or chat"
SHAPES = {  # of rows that are often met, and what reads them; of several that fit, the first
    (MESSAGES,): "template chat or tulu reads messages",
    ("instruction", "input", "output"): "template alpaca reads instruction, input and output",
    ("query", "response"): "template metamath reads query and response",
    ("instruction", "response"): "template magicoder reads instruction and response",
    ("prompt", "response"): "template prompt_response reads prompt and response",
    ("prompt", "completion"): "rename completion to response, for template prompt_response",
    ("chosen", "rejected"): "chosen and rejected are read with --objective dpo",
}


def data_files(source: str, split: str = "train") -> list[Path] | None:
    """The files of one split of a local dataset; None for a Hub id.

    A folder has the splits that `datasets` finds there: those of its README, or of the names of files and folders, or
    one, train, of all files in the order of their names. What Dataset.save_to_disk leaves counts as one file.

    Raises:
        UserError: nothing there, no such split, no data file in the folder, or an unknown kind of file.
    """
    path = Path(source).expanduser()
    if not is_local(source) and not source.endswith(ROW_FILES):
        return None
    if (path / "state.json").is_file():  # of Dataset.save_to_disk: it is what it is, as a file is
        return [path]
    if path.is_dir():
        splits = _saved_splits(source, path) or _splits_of_folder(source, path)
        if split not in splits:
            there = "; ".join(f"{name}: {_names(files, path)}" for name, files in sorted(splits.items()))
            raise UserError(f"dataset {source}: no split {split!r}; the folder has {there} (--dataset_split names one)")
        return splits[split]
    if not path.is_file():
        raise UserError(f"dataset {source}: no such file or folder (a Hub dataset is written owner/name)")
    if not path.name.endswith(ROW_FILES):
        raise UserError(f"dataset {source}: expected a file that ends in {', '.join(ROW_FILES)}")
    return [path]


def _splits_of_folder(source: str, path: Path) -> dict[str, list[Path]]:
    """{split: its data files}, as `datasets` resolves a folder."""
    try:
        readme, configurations = path / "README.md", {}
        if readme.is_file() and readme.read_text(encoding="utf-8").startswith("---"):
            configurations = MetadataConfigs.from_dataset_card_data(DatasetCard.load(readme).data)
        if len(configurations) > 1:
            raise UserError(
                f"dataset {source}: its README has the configurations {', '.join(configurations)}: name the files of "
                "one of them"
            )
        named = next(iter(configurations.values()), {}).get("data_files")
        patterns = sanitize_patterns(named) if named else get_data_patterns(str(path))
        found = DataFilesDict.from_patterns(patterns, base_path=str(path))
    except UserError:
        raise
    except Exception as e:  # no file at all; a README that cannot be read or names files that are not there
        found = {}
        if any(path.rglob("*")):
            raise UserError(f"dataset {source}: its files cannot be found: {one_line(e)}") from None
    if any(Path(f).name == "state.json" for files in found.values() for f in files):
        saved = _names(sorted(f.parent for f in path.rglob("state.json")), path)
        raise UserError(f"dataset {source}: it holds folders of save_to_disk: name one of them, {saved}")
    splits = {str(name): [Path(f) for f in files if f.endswith(ROW_FILES)] for name, files in found.items()}
    splits = {name: files for name, files in splits.items() if files}
    if not splits:
        raise UserError(f"dataset {source}: the folder holds no {', '.join(ROW_FILES)} file")
    return splits


def _saved_splits(source: str, path: Path) -> dict[str, list[Path]]:
    """{split: [its folder]} of what DatasetDict.save_to_disk has left; {} for any other folder."""
    try:
        if (path / "dataset_dict.json").is_file():
            names = json.loads((path / "dataset_dict.json").read_text())["splits"]
            return {name: [path / name] for name in names}
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"dataset {source}: dataset_dict.json cannot be read: {one_line(e)}") from None
    return {}


def _names(files: list[Path], folder: Path, most: int = 3) -> str:
    names = [os.path.relpath(f, folder) for f in files]  # `datasets` gives absolute paths, also of a relative folder
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


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
    except (RecursionError, ValueError) as e:  # nested too deeply; an integer of thousands of digits
        reason = "nested too deeply" if isinstance(e, RecursionError) else one_line(e).partition(";")[0]
        raise UserError(f"{path}, line {number}: cannot be read: {reason}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"{path}: not a complete gzip file after line {number}: {e}") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None
    if not found:
        raise UserError(f"{path}: the file is empty" if number == 0 else f"{path}: no rows in the file")


def read_columns(
    path: str | Path,
    columns: tuple[str, ...],
    conversations: tuple[str, ...] = (MESSAGES,),
    optional: tuple[str, ...] = (),
) -> Iterator[dict[str, Any]]:
    """These columns of each row of a JSON file, see load_rows. `extras` is there if a conversation is asked for.

    The content of a message may be null: what an empty message means is the template's business.

    Raises:
        UserError: as read_json_rows; and a column is missing, null, of another kind, or cannot be encoded.
    """
    with_extras = bool(set(columns) & set(conversations))
    for place, row in read_json_rows(path):
        for column in columns:
            if column not in row:
                there = ", ".join(map(repr, row)) or "none"
                raise UserError(f"{place}: no column {column!r}; the row has {there}{_hint(column, row, columns)}")
            if column in conversations:
                check_messages(row[column], f"{place}: ", f"column {column!r}")
            else:
                first = row[column][0] if isinstance(row[column], list) and row[column] else None
                messages = isinstance(first, dict) and "role" in first
                hint = CONVERSATIONS if messages else ""
                _check_text(row[column], f"{place}: column {column!r}", hint)
        out = {c: _roles_and_contents(row[c]) if c in conversations else row[c] for c in columns}
        yield {**out, EXTRAS: _extras(row, columns, conversations, optional, place)} if with_extras else out


def check_messages(messages: Any, place: str, what: str) -> None:
    """Raise UserError where `messages` is no conversation: a list of {role, content}, both text.

    A message with tool_calls needs no content.
    """
    if not isinstance(messages, list):
        hint = TEXTS if isinstance(messages, str) else ""
        raise UserError(f"{place}{what} must be a list of {{role, content}}, got {_kind(messages)}{hint}")
    for i, message in enumerate(messages, 1):
        where = f"{place}message {i}"
        if not isinstance(message, dict) or "role" not in message or not {"content", "tool_calls"} & message.keys():
            hint = "; rename from and value (ShareGPT), human and gpt to user and assistant"
            hint = hint if isinstance(message, dict) and {"from", "value"} <= message.keys() else ""
            raise UserError(f"{where} must be an object with role and content, got {str(message)[:60]!r}{hint}")
        _check_text(message["role"], f"{where}: role")
        if message.get("content") is not None:
            _check_text(message["content"], f"{where}: content")


def _hint(column: str, row: dict, columns: tuple[str, ...]) -> str:
    """What may help where `column`, one of the wanted `columns`, is not in the row."""
    if column == MESSAGES and {"prompt", "completion"} <= row.keys():
        return ": put prompt and completion into one list of messages, or use template prompt_response"
    if column == MESSAGES and "conversations" in row:
        return ": rename it, its from and value to role and content, human and gpt to user and assistant"
    if column in ("chosen", "rejected"):
        return ": --objective dpo trains on pairs of answers, --objective sft on rows of one"
    fitting = (hint for shape, hint in SHAPES.items() if {*shape} <= row.keys() and not {*shape} <= {*columns})
    return next((f": {hint}" for hint in fitting), "")


def _roles_and_contents(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": m["role"], "content": m.get("content")} for m in messages]


def _extras(
    row: dict[str, Any], columns: tuple[str, ...], conversations: tuple[str, ...], optional: tuple[str, ...], place: str
) -> str:
    """What a row holds beside texts, roles and contents, as JSON: {column: value, or list of the messages' others}."""
    extras = {name: row[name] for name in optional if name not in columns and row.get(name) not in (None, [], {}, "")}
    for column in set(columns) & set(conversations):
        others = [{k: v for k, v in m.items() if k not in ("role", "content") and v is not None} for m in row[column]]
        if any(others):
            extras[column] = others
    if not extras:
        return ""
    text = json.dumps(extras, ensure_ascii=False, default=str)
    _check_text(text, f"{place}: {' or '.join(extras)}")
    return text


def with_extras(row: dict[str, Any]) -> dict[str, Any]:
    """A row of load_rows with its extras put back: messages with all their keys, and the optional columns."""
    extras = json.loads(row[EXTRAS]) if row.get(EXTRAS) else {}
    row = {name: value for name, value in row.items() if name != EXTRAS}
    for name, value in extras.items():
        row[name] = [{**m, **other} for m, other in zip(row[name], value, strict=True)] if name in row else value
    return row


def _check_text(value: Any, what: str, hint: str = "") -> None:
    if not isinstance(value, str):
        raise UserError(f"{what} must be text, got {_kind(value)}{hint}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{what} holds half of a surrogate pair") from None


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


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


def unread_columns(sources: list[str], split: str, read: tuple[str, ...]) -> list[str]:
    """Columns of the datasets of load_all that are not among `read`; of a JSON file those of its first row count."""
    names: dict[str, None] = {}
    for source, _ in map(split_cap, sources):
        files = data_files(source, split)
        found = [_from_hub(source, split).column_names] if files is None else map(_column_names, files)
        names |= dict.fromkeys(name for columns in found for name in columns if name not in read)
    return list(names)


def _column_names(path: Path) -> list[str]:
    if path.is_dir():
        return datasets.load_from_disk(str(path)).column_names
    if path.suffix == ".parquet":
        return load_dataset("parquet", data_files=str(path), split="train").column_names
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
        beginning = f.read(1 << 20).decode("utf-8", "ignore").lstrip()
    try:
        return list(json.JSONDecoder().raw_decode(beginning.removeprefix("[").lstrip())[0])
    except json.JSONDecodeError:  # a longer row
        return []


def load_all(
    sources: list[str],
    columns: tuple[str, ...],
    split: str = "train",
    conversations: tuple[str, ...] = (MESSAGES,),
    optional: tuple[str, ...] = (),
) -> Dataset:
    """The datasets `SOURCE` or `SOURCE:N` (its first N rows), one after the other; see load_rows."""
    parts = [
        load_rows(source, columns, split, max_rows, conversations=conversations, optional=optional)
        for source, max_rows in map(split_cap, sources)
    ]
    return _concatenated(parts)


def _concatenated(parts: list[Dataset]) -> Dataset:
    """The parts as one dataset, whose fingerprint follows from theirs alone: what is cached of it is found again.

    That of concatenate_datasets differs between the call that has built a part and later ones.
    """
    if len(parts) == 1:
        return parts[0]
    rows = concatenate_datasets(parts)
    rows._fingerprint = _hash(" ".join(part._fingerprint for part in parts))
    return rows


def load_rows(
    source: str,
    columns: tuple[str, ...],
    split: str = "train",
    max_rows: int = 0,
    conversations: tuple[str, ...] = (MESSAGES,),
    optional: tuple[str, ...] = (),
) -> Dataset:
    """The columns of a dataset, on disk and memory-mapped: text, but for `conversations`, lists of {role, content}.

    Beside a conversation there is the column `extras`, JSON text: what its messages hold beside role and content (a
    tool call), and the `optional` columns; "" if there is nothing. See with_extras.

    Args:
        source: a file, a folder, see data_files, a Hub id, or HUB_ID:CONFIG, which names one of its configurations.
        split: which part of a folder or of a Hub dataset.
        max_rows: the first N rows; 0: all.
        optional: columns that are kept where a row has them, of any type, null and empty ones left out.
    Raises:
        UserError: the data cannot be read or has not the columns; no rows.
    """
    files = data_files(source, split)
    kinds = columns, conversations, optional
    parts = [_from_hub(source, split)] if files is None else [_from_file(f, *kinds) for f in files]
    rows = _concatenated([_only(part, *kinds, source) for part in parts])
    if max_rows:
        rows = rows.select(range(min(max_rows, len(rows))))
    if len(rows) == 0:
        raise UserError(f"dataset {source}: no rows")
    return rows


def _features(columns: tuple[str, ...], conversations: tuple[str, ...]) -> Features:
    text = Value("string")
    features = {c: List({"role": text, "content": text}) if c in conversations else text for c in columns}
    return Features({**features, EXTRAS: text} if set(columns) & set(conversations) else features)


def _only(
    rows: Dataset,
    columns: tuple[str, ...],
    conversations: tuple[str, ...],
    optional: tuple[str, ...],
    source: str,
) -> Dataset:
    """These columns, in the one type that all parts of a dataset share (Parquet files may say large_string)."""
    features = _features(columns, conversations)
    _check_columns(rows, columns, conversations, source)
    if rows.features == features:  # what _from_file has read of JSON
        return rows
    if not set(columns) & set(conversations):
        rows = rows.select_columns(list(columns))
        return rows if rows.features == features else rows.cast(features)

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        place = f"dataset {source}, row {index + 1}"
        row = _without_nulls(row)  # Arrow gives each message the keys of all, null where it has them not
        for column in set(columns) & set(conversations):
            row[column] = [{"content": None, **m} if isinstance(m, dict) else m for m in row[column]]
            check_messages(row[column], f"{place}: ", f"column {column!r}")
        out = {c: _roles_and_contents(row[c]) if c in conversations else row[c] for c in columns}
        return {**out, EXTRAS: _extras(row, columns, conversations, optional, place)}

    wanted = [name for name in rows.column_names if name in (*columns, *optional)]
    identity = f"{rows._fingerprint} {columns} {conversations} {optional} {Path(__file__).read_bytes()}"
    return rows.select_columns(wanted).map(
        convert, with_indices=True, remove_columns=wanted, features=features, new_fingerprint=_hash(identity)
    )


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _from_file(
    path: Path, columns: tuple[str, ...], conversations: tuple[str, ...], optional: tuple[str, ...]
) -> Dataset:
    stamp = path.stat()
    if stamp.st_size == 0:
        raise UserError(f"{path}: the file is empty")
    try:
        if path.is_dir():
            return datasets.load_from_disk(str(path))
        if path.suffix == ".parquet":
            return load_dataset("parquet", data_files=str(path), split="train")
        # A changed file is read anew, and every file if this code has changed.
        how = f"{columns} {conversations} {optional} {Path(__file__).read_bytes()}"
        identity = _hash(f"{path.resolve()} {stamp.st_size} {stamp.st_mtime_ns} {how}")
        return Dataset.from_generator(
            read_columns,
            gen_kwargs={
                "path": str(path), "columns": columns, "conversations": conversations, "optional": optional
            },
            features=_features(columns, conversations),
            fingerprint=identity,
        )  # fmt: skip
    except DatasetGenerationError as e:
        cause = e.__cause__ or e
        raise UserError(str(cause) if isinstance(cause, UserError) else f"{path}: cannot be read: {cause}") from None
    except (ValueError, OSError) as e:  # no Parquet file; a cache that cannot be written
        raise UserError(f"{path}: cannot be read: {one_line(e)}") from None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _from_hub(source: str, split: str) -> Dataset:
    name, _, config = source.partition(":")
    try:
        return load_dataset(name, config or None, split=split)
    except Exception as e:  # whatever the network, the Hub or its cache raises
        hint = f"to have it offline, where there is a network: hf download --repo-type dataset {name}; name its folder"
        if "Config name is missing" in str(e):
            hint = f"written {name}:CONFIG"
        raise UserError(
            f"dataset {source}, split {split}: no local path, and neither Hub nor cache gives it: {one_line(e)} "
            f"({hint})"
        ) from None


def _check_columns(rows: Dataset, columns: tuple[str, ...], conversations: tuple[str, ...], source: str) -> None:
    for column in columns:
        if column not in rows.column_names:
            hint = _hint(column, dict.fromkeys(rows.column_names), columns)
            raise UserError(f"dataset {source}: no column {column!r}; it has {', '.join(rows.column_names)}{hint}")
        kind = rows.features[column]
        if column in conversations:
            inner = getattr(kind, "feature", None)
            if not isinstance(inner, dict) or not {"role", "content"} <= inner.keys():
                hint = TEXTS if _is_text(kind) else ""
                raise UserError(
                    f"dataset {source}: column {column!r} must be a list of {{role, content}}, got {kind}{hint}"
                )
            for name in ("role", "content"):
                if not _is_text(inner[name]):
                    raise UserError(f"dataset {source}: column {column!r}: {name} must be text, got {inner[name]}")
        elif not _is_text(kind):
            inner = getattr(kind, "feature", None)
            hint = CONVERSATIONS if isinstance(inner, dict) and "role" in inner else ""
            raise UserError(
                f"dataset {source}: column {column!r} must be text, got {getattr(kind, 'dtype', kind)}{hint}"
            )
        if nulls := rows.data.column(column).null_count:
            first = rows.data.column(column).is_null().to_pylist().index(True) + 1
            raise UserError(
                f"dataset {source}: column {column!r} is null in {nulls} of {len(rows)} rows, the first is row {first}"
            )


def _is_text(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("string", "large_string", "null")
