"""Folders of models: tensors are read one at a time, and written one at a time into a new folder."""

import functools
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from common import integrity, run_folder
from common.errors import UserError, one_line
from common.hub import is_local, load_weights
from common.model_card import CARD

BIN = "pytorch_model*.bin"
RECORDS = ("drop.json", "average.json", "greedy.json", "fisher.json")  # by method: the keys that a folder was made with
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")  # of the old values, in any format


class Model:
    """The tensors in a model's safetensors files, or, where it has none, in its .bin files; `read` loads one of them.

    Args:
        source: folder or Hub id.
        what: the word for it in messages.
        is_read_alone: nothing is written like it, so that .bin files will do.
    Raises:
        UserError: it cannot be read, a file is damaged, or its tensors are not those of its architecture.
    """

    def __init__(self, source: str, what: str, is_read_alone: bool = False):
        self.source, self.what = source, what
        self.folder = _folder(source, what)
        self.files = _tensor_files(self.folder, what)
        if not is_read_alone and any(path.suffix == ".bin" for path in self.files.values()):
            raise UserError(f"{what} {self.folder} has .bin files alone: load and save it by transformers once")
        integrity.verify(self.folder, what)
        empty = load_weights(str(self.folder), what, device="meta")
        self.saved_names = saved_names(empty)
        self.tied = dict(empty.all_tied_weights_keys)  # name of a tied tensor -> name of the one that it is

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU, in its own dtype."""
        return read(self.files[name], name)

    def shapes(self) -> dict[str, list[int]]:
        """Of all tensors in the files."""
        headers = {path: _header(path) for path in set(self.files.values())}
        return {name: headers[path][name]["shape"] for name, path in self.files.items()}


def read(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors or .bin file."""
    if path.suffix == ".bin":
        return _bin_tensors(path)[name]
    with safe_open(path, "pt") as f:
        return f.get_tensor(name)


def saved_names(model: PreTrainedModel) -> set[str]:
    """The names that save_pretrained gives a model's tensors: tied ones once, and as its published files have them."""
    tensors = {n: t for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}
    return set(revert_weight_conversion(model, tensors))


def check_output(out: Path) -> None:
    """Raise UserError where a new folder cannot be made here."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"output_dir {out} exists already: choose another one, or delete it")
    run_folder.check_writable(out)


def write(
    out: Path, like: Model, value: Callable[[str], Tensor], card: str, method: str, record: dict[str, Any]
) -> None:
    """Write a model's folder: the files of `like`, with other values, and with a card and a record of their own.

    Written aside and put in place by one rename, sealed like the final model of train.py.

    Args:
        value: name of a tensor -> its value, of the shape and dtype that `like` has. Called once per tensor; no tensor
            outlives the next call.
        record: the method's keys, for the file METHOD.json.
    Raises:
        UserError: the folder cannot be written.
    """
    out = out.absolute()
    aside = out.with_name(f".aside_{out.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        for path in sorted(like.folder.iterdir()):
            left_out = path.suffix in WEIGHTS or path.name in (integrity.COMPLETED, CARD, *RECORDS)
            if path.is_file() and not left_out:
                shutil.copy2(path, aside / path.name)
        for path in sorted(set(like.files.values())):
            _write_like(path, aside / path.name, value)
        (aside / CARD).write_text(card, encoding="utf-8")
        run_folder.write_json(aside / f"{method}.json", record)
        integrity.seal(aside, leave_out=[CARD])  # eval.py adds scores to the card
        aside.rename(out)
    except OSError as e:
        raise UserError(f"output_dir {out} could not be written: {e.strerror or e}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_like(source: Path, target: Path, value: Callable[[str], Tensor]) -> None:
    """A safetensors file with source's header (names, shapes, dtypes) and other values, in the order of its bytes."""
    header = _header(source)
    with open(source, "rb") as f, open(target, "wb") as out:
        (size,) = struct.unpack("<Q", f.read(8))
        f.seek(0)
        out.write(f.read(8 + size))
        for name in sorted(header.keys() - {"__metadata__"}, key=lambda n: header[n]["data_offsets"]):
            out.write(value(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _folder(source: str, what: str) -> Path:
    """The folder of a model: its own, or the cache's of a Hub model, whose files are fetched."""
    if is_local(source):
        return Path(source)
    wanted = ["model*.safetensors", "*.json", "*.jinja", "*.model"]
    try:
        folder = Path(snapshot_download(source, allow_patterns=wanted))
        return folder if any(folder.glob("*.safetensors")) else Path(snapshot_download(source, allow_patterns=BIN))
    except Exception as e:  # the network, the Hub (gated, unknown), the disk
        raise UserError(f"{what} {source} cannot be fetched: {one_line(e)}") from None


def _tensor_files(folder: Path, what: str) -> dict[str, Path]:
    """{tensor name: its file} of a model folder.

    Raises:
        UserError: no such folder, neither safetensors nor .bin files in it, or a damaged one.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob(BIN))
    if not files:
        raise UserError(f"{what} {folder}: no folder with a model's weights (a Hub model is written owner/name)")
    try:
        return {name: path for path in files for name in _header(path) if name != "__metadata__"}
    except (OSError, EOFError, ValueError, RuntimeError, struct.error, pickle.UnpicklingError, SafetensorError) as e:
        raise UserError(f"{what} {folder}: a file of its weights is damaged: {one_line(e)}") from None


@functools.cache
def _bin_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file; but for those of old versions of torch they stay on the disk until they are used."""
    loaded = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    return {name: value for name, value in loaded.items() if isinstance(value, Tensor)}


def _header(path: Path) -> dict[str, dict]:
    """The header of a safetensors file: dtype, shape and place of its bytes by tensor; of a .bin file the shapes."""
    if path.suffix == ".bin":
        return {name: {"shape": list(tensor.shape)} for name, tensor in _bin_tensors(path).items()}
    with open(path, "rb") as f:
        (size,) = struct.unpack("<Q", f.read(8))
        if size > path.stat().st_size:
            raise ValueError(f"{path.name} is no safetensors file (a pointer of Git LFS? `git lfs pull` fetches it)")
        return json.loads(f.read(size))
