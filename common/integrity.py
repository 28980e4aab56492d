"""COMPLETED lists a folder's files with sizes and checksums, so that a missing, cut or changed one is noticed.

It is written last: a folder without it was not finished, unless someone else made it.
"""

import json
import os
import zlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.errors import UserError

COMPLETED = "COMPLETED"


def seal(folder: Path, leave_out: Collection[str] = ()) -> None:
    """Make the files of a folder durable, and list them in COMPLETED; files named in leave_out may change later."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in {COMPLETED, *leave_out})
    with ThreadPoolExecutor() as threads:
        checksums = list(threads.map(checksum, files))
    for path in files:
        fsync(path)
    content = {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "crc32": c}
        for p, c in zip(files, checksums, strict=True)
    }
    (folder / COMPLETED).write_text(json.dumps(content, indent=1))
    fsync(folder / COMPLETED)
    fsync(folder)


def is_complete(folder: Path) -> bool:
    """Whether every file that COMPLETED lists is there in its full size."""
    return damaged_file(folder, read=False) is None


def damaged_file(folder: Path, read: bool = True) -> str | None:
    """The first file of a folder that is missing, cut or (with `read`) changed; None where all are sound.

    A COMPLETED that is missing or damaged itself is such a file, too.
    """
    try:
        listed = json.loads((folder / COMPLETED).read_text())
        expected = {folder / name: (entry["bytes"], entry["crc32"]) for name, entry in listed.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):  # not there, not JSON, JSON of another shape
        return COMPLETED
    for path, (size, _) in expected.items():
        if not path.is_file() or path.stat().st_size != size:
            return str(path.relative_to(folder))
    if not expected:
        return COMPLETED
    if read:
        with ThreadPoolExecutor() as threads:
            for path, crc in zip(expected, threads.map(checksum, expected), strict=True):
                if crc != expected[path][1]:
                    return str(path.relative_to(folder))
    return None


def verify(folder: Path, what: str) -> None:
    """Raise UserError where a file of a folder is not what COMPLETED says of it. A folder without COMPLETED passes."""
    if (folder / COMPLETED).exists() and (file := damaged_file(folder)):
        raise UserError(
            f"{what} {folder}: {file} is missing, cut or changed since the model was saved; make or copy it again, or, "
            f"if the change is meant, delete {COMPLETED}"
        )


def checksum(path: Path) -> int:
    """CRC-32 of a file: finds what a disk or a copy has changed, at the speed of reading.

    Raises:
        OSError: it cannot be read.
    """
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def fsync(path: Path) -> None:
    """Make a file or folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
