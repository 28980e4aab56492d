"""Where the rows of benchmarks come from: one file, a folder of local copies, or the Hugging Face Hub."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from common.config import UserError
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
        self, path: str, hub: tuple[str, str | None, str], columns: Iterable[str] = (), items: bool = True
    ) -> list[dict]:
        """Rows of a .jsonl, .json (also .gz) or .parquet file.

        Args:
            path: where `folder` holds it.
            hub: dataset id, configuration, split.
            columns: what each row must have.
            items: whether these are the task's items, for which `file` may stand.
        Raises:
            UserError: the file is missing or damaged, or neither Hub nor cache gives it; a column is missing.
        """
        if items and self.file:
            path, self.file = self.file, ""
            rows, where = _from_file(self.exists(Path(path), hub[0])), path
        elif self.folder:
            rows, where = _from_file(self.exists(Path(self.folder) / path, hub[0])), str(Path(self.folder) / path)
        else:
            rows, where = _from_hub(*hub), ":".join(filter(None, hub))
        self.read.append(where)
        if not rows:
            raise UserError(f"{where}: no rows")
        for i, row in enumerate(rows, 1):
            for column in columns:
                if row.get(column) is None:
                    raise UserError(f"{where}, item {i}: no column {column!r}; it has {', '.join(map(repr, row))}")
        return rows

    def json(self, path: str, hub: tuple[str, str | None, str], key: str, columns: tuple[str, ...]) -> list[dict]:
        """The rows under `key` of a local JSON file, or, where there is none, those of the Hub."""
        if not self.folder or not (Path(self.folder) / path).exists():
            self.read.append(":".join(filter(None, hub)))
            return _from_hub(*hub)
        found = self.local(path, hub[0])
        try:
            rows = json.loads(found.read_text(encoding="utf-8"))[key]
            return [{column: row[column] for column in columns} for row in rows]
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{found}: expected {{{key!r}: [...]}} with {', '.join(columns)}: {e!r}") from None

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


def _from_file(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        try:
            return datasets.load_dataset("parquet", data_files=str(path), split="train").to_list()
        except Exception as e:  # pyarrow and datasets raise their own
            raise UserError(f"{path}: cannot be read: {' '.join(str(e).split())[:300]}") from None
    return [row for _, row in read_json_rows(path)]


def _from_hub(name: str, subset: str | None, split: str) -> list[dict]:
    try:
        return datasets.load_dataset(name, subset, split=split).to_list()
    except Exception as e:  # whatever the network, the Hub or its cache raises
        raise UserError(
            f"dataset {name}, split {split}: no local path, and neither Hub nor cache gives it: "
            f"{' '.join(str(e).split())[:300]} (to have it offline, where there is a network: hf download --repo-type "
            f"dataset {name}; or --data_dir names a folder of local copies)"
        ) from None
