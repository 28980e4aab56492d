"""Where the rows of benchmarks come from: one file, a folder of local copies, or the Hugging Face Hub."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from common.errors import UserError, one_line
from common.sources import read_json_rows


@dataclass
class Source:
    """The data of one task. A task's `load` asks it for rows and files; it notes what was read.

    Attributes:
        folder: local copies, laid out as docs/evaluation.md says; empty: the Hub.
        file: a file that stands for the task's items (--tasks NAME=FILE), or empty.
        published: take the subset of items that published numbers were measured on, where the protocol has one.
        languages: of TyDiQA; none: all.
    """

    folder: str = ""
    file: str = ""
    published: bool = False
    languages: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)

    def rows(
        self,
        path: str,
        hub: tuple[str, str | None, str],
        columns: Iterable[str] | Mapping[str, type] = (),
        items: bool = True,
    ) -> list[dict]:
        """Rows of a .jsonl, .json (also .gz) or .parquet file.

        Args:
            path: where `folder` holds it.
            hub: dataset id, configuration, split.
            columns: what each row must have; a mapping names the types, too.
            items: whether these are the task's items, for which `file` may stand.
        Raises:
            UserError: the file is missing or damaged, or neither Hub nor cache gives it; a column is missing, null or
                of another type.
        """
        if items and self.file:
            path, self.file = self.file, ""
            rows, where = _from_file(self.exists(Path(path), hub[0])), path
        elif self.folder:
            rows, where = _from_file(self.exists(Path(self.folder) / path, hub[0])), str(Path(self.folder) / path)
        else:
            rows, where = _from_hub(*hub), ":".join(filter(None, hub))
        self.read.append(where)
        return checked_rows(rows, where, columns)

    def first_rows(self, hub: tuple[str, str | None, str], n: int, columns: Mapping[str, type]) -> list[dict]:
        """The first n rows of a dataset of the Hub, which is not downloaded whole.

        Raises:
            UserError: as `rows`.
        """
        where = ":".join(filter(None, hub))
        self.read.append(where)
        return checked_rows(_from_hub(*hub, first=n), where, columns)

    def json(self, path: str, hub: tuple[str, str | None, str], key: str, columns: Mapping[str, type]) -> list[dict]:
        """The rows under `key` of a local JSON file, or, where there is none, those of the Hub."""
        if not self.folder or not (Path(self.folder) / path).exists():
            where = ":".join(filter(None, hub))
            self.read.append(where)
            return checked_rows(_from_hub(*hub), where, columns)
        found = self.local(path, hub[0])
        rows = read_json(found)
        rows = rows.get(key) if isinstance(rows, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{found}: expected {{{key!r}: [...]}} with {', '.join(columns)} in each entry")
        return checked_rows(rows, str(found), columns)

    def csv(self, path: str, origin: str, columns: Iterable[str]) -> list[dict]:
        """The items of a CSV file with a header.

        Raises:
            UserError: it is missing or no such file, or has not these columns.
        """
        found = self.local(path, origin, items=True)
        reader = csv.DictReader(io.StringIO(read_text(found), newline=""))
        try:
            rows = list(reader)
        except csv.Error as e:
            raise UserError(f"{found}: no CSV file: {e}") from None
        if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
            raise UserError(f"{found}: expected a CSV file with columns {', '.join(columns)}; it has no {missing[0]!r}")
        return checked_rows(rows, str(found), dict.fromkeys(columns, str))

    def local(self, path: str, origin: str, items: bool = False) -> Path:
        """A file of `folder` (or, for items, `file`) that `rows` cannot read.

        Raises:
            UserError: it is not there; `origin` says where to get it.
        """
        if items and self.file:
            path, self.file = self.file, ""
            found = Path(path)
        elif not self.folder:
            raise UserError(f"needs {path} of {origin}: download it and name its folder with --data_dir")
        else:
            found = Path(self.folder) / path
        self.read.append(str(found))
        return self.exists(found, origin)

    def checked(self, items: list[dict], check: Callable[[dict], object]) -> list[dict]:
        """The items, after `check`, which raises ValueError for one that cannot be scored, has seen each of them."""
        for i, item in enumerate(items, 1):
            try:
                check(item)
            except ValueError as e:
                raise UserError(f"{self.read[0]}, item {i}: {e}") from None
        return items

    @staticmethod
    def exists(path: Path, origin: str) -> Path:
        if not path.is_file():
            how = f"hf download --repo-type dataset {origin}" if origin.count("/") == 1 else origin
            raise UserError(f"no file {path} (its origin: {how}; leave out --data_dir to have the Hub's copy)")
        return path


TYPE_NAMES = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


def checked_rows(rows: list[dict], where: str, columns: Iterable[str] | Mapping[str, type]) -> list[dict]:
    """The rows, if there are any, and each has these columns, of these types.

    Raises:
        UserError: naming the place and the item.
    """
    if not rows:
        raise UserError(f"{where}: no rows")
    types = columns if isinstance(columns, Mapping) else dict.fromkeys(columns, object)
    for i, row in enumerate(rows, 1):
        for column, kind in types.items():
            if column not in row:
                raise UserError(f"{where}, item {i}: no column {column!r}; it has {', '.join(map(repr, row))}")
            value = row[column]
            if value is None:
                raise UserError(f"{where}, item {i}: column {column!r} is null")
            if not isinstance(value, kind):
                raise UserError(
                    f"{where}, item {i}: column {column!r} must be {TYPE_NAMES[kind]}, got {str(value)[:60]!r} "
                    f"({type(value).__name__})"
                )
            if kind is str and not value.strip():
                raise UserError(f"{where}, item {i}: column {column!r} is empty")
    return rows


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, gzipped or not.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as f:
            return f.read().decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read: {e}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: no text in UTF-8: {e}") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file, gzipped or not.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: no JSON file: {e}") from None


def _from_file(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        try:
            return datasets.load_dataset("parquet", data_files=str(path), split="train").to_list()
        except Exception as e:  # pyarrow and datasets raise their own
            raise UserError(f"{path}: cannot be read: {one_line(e)}") from None
    return [row for _, row in read_json_rows(path)]


def _from_hub(name: str, subset: str | None, split: str, first: int = 0) -> list[dict]:
    """All rows, or the first ones, without the others."""
    try:
        if first:
            return list(datasets.load_dataset(name, subset, split=split, streaming=True).take(first))
        return datasets.load_dataset(name, subset, split=split).to_list()
    except Exception as e:  # whatever the network, the Hub or its cache raises
        raise UserError(
            f"dataset {name}, split {split}: no local path, and neither Hub nor cache gives it: "
            f"{one_line(e)} (to have it offline, where there is a network: hf download --repo-type "
            f"dataset {name}; or --data_dir names a folder of local copies)"
        ) from None
