"""One-off drop: mask the task vector (tuned minus base weights) of a finished model, the post-hoc baseline of GMT.

    python scripts/drop.py --base BASE_DIR --tuned outputs/x/final --output_dir outputs/x/drop --keep_ratio 0.2

`--by random --rescale ratio` is DARE (arXiv 2311.03099), `--by magnitude --drop_largest 0.01` Model Breadcrumbs
(arXiv 2312.06795). `--help` lists all keys. Tensors are read and written one by one.
"""

import json
import shutil
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parents[1]))
import gmt
from common import integrity, run_folder
from common.config import UserError, key, parse, run_main
from common.hub import is_local, load_weights


@dataclass
class DropConfig:
    """Keys of scripts/drop.py."""

    base: str = key(help="folder or Hub id of the base model, with safetensors files")
    tuned: str = key(help="folder of the fine-tuned model, of the same tensors")
    output_dir: str = key(help="folder of the result; must not exist")
    keep_ratio: float = key(help="fraction of a matrix's task vector that is kept, in (0, 1]")
    by: Literal["magnitude", "random"] = key("magnitude", "keep the largest entries, or random ones")
    drop_largest: float = key(0.0, "drop this fraction of the largest entries too, in [0, 1 - keep_ratio]")
    rescale: Literal["none", "ratio", "l1"] = key(
        "none", "multiply what is kept by 1 / keep_ratio (DARE), or so that the sum of magnitudes stays (mergekit)"
    )
    mask_vectors: bool = key(False, "drop from 1-D tensors (norms, biases) too; else they stay as tuned")
    exclude: list[str] = key([], "patterns of tensor names that stay as tuned, e.g. '*embed_tokens*'")
    seed: int = key(0, "of --by random")
    dry_run: bool = key(False, "check the settings and the base model alone; `tuned` need not be there yet")

    def __post_init__(self):
        """Raise UserError where keys contradict each other or are out of range."""
        if not 0 < self.keep_ratio <= 1:
            raise UserError(f"keep_ratio must be in (0, 1], got {self.keep_ratio}")
        if not 0 <= self.drop_largest <= 1 - self.keep_ratio + 1e-9:
            raise UserError(f"drop_largest must be in [0, 1 - keep_ratio], got {self.drop_largest}")
        if self.drop_largest and self.by == "random":
            raise UserError("drop_largest has no meaning with by random")


def drop_delta(
    base: Tensor,
    tuned: Tensor,
    keep_ratio: float,
    by: str = "magnitude",
    *,
    rescale: str = "none",
    drop_largest: float = 0.0,
    name: str = "",
    seed: int = 0,
) -> Tensor:
    """base + M * (tuned - base), for one tensor; a tensor of more than two dimensions is a stack of matrices.

    Of n entries the largest round(drop_largest * n) are dropped; of the others the round(keep_ratio * n) largest are
    kept (ties too), or as many random ones.

    Args:
        base, tuned: same shape, any floating dtype.
        keep_ratio, by, rescale, drop_largest: as in DropConfig.
        name, seed: by random, the choice is a function of both.
    Returns:
        tensor of tuned's shape and dtype. Without rescaling a kept entry is exactly the tuned one.
    """
    delta = nn.Parameter(torch.empty_like(tuned, dtype=torch.float32), requires_grad=False)
    delta.grad = tuned.float() - base.float()

    def keep_top(ratio: float) -> Tensor:
        """The task vector with all but a fraction of each matrix set to 0."""
        rule = {"magnitude": "gmt", "random": "rmt"}[by]
        gmt.Masker([(name, delta)], rule, ratio, mask_vectors=True, seed=seed).mask_gradients(0)
        return delta.grad

    whole = delta.grad
    if drop_largest:
        delta.grad = whole.clone()
        largest = keep_top(drop_largest)
        delta.grad = whole.clone()
        kept = keep_top(min(1.0, keep_ratio + drop_largest)).masked_fill_(largest != 0, 0)
    else:
        delta.grad = whole.clone()
        kept = keep_top(keep_ratio)
    if rescale == "none":
        return torch.where(kept != 0, tuned, base.to(tuned.dtype))
    scale = 1 / keep_ratio
    if rescale == "l1":
        dims = (-2, -1) if kept.dim() >= 2 else (-1,)
        scale = whole.abs().sum(dims, keepdim=True) / kept.abs().sum(dims, keepdim=True).clamp(min=1e-30)
    return (base.float() + kept * scale).to(tuned.dtype)


def main(argv: list[str] | None = None) -> None:
    """Write the folder config.output_dir: the tuned model's files, with the dropped weights."""
    config = parse(DropConfig, sys.argv[1:] if argv is None else argv)
    transformers_logging.set_verbosity_error()
    out = Path(config.output_dir)
    if out.exists():
        raise UserError(f"output_dir {out} exists already: choose another one, or delete it")
    run_folder.check_writable(out)
    base, tuned = base_folder(config.base), Path(config.tuned)
    base_files = tensor_files(base, "base")
    integrity.verify(base, "base")
    names = saved_names(load_weights(str(base), "base", device="meta"))
    if not config.dry_run:
        tuned_files = tensor_files(tuned, "tuned")
        integrity.verify(tuned, "tuned")
        load_weights(str(tuned), "tuned", device="meta")
        names = tuned_files.keys()
    if missing := sorted(names - base_files.keys()):
        raise UserError(
            f"base {config.base} has no tensor {missing[0]} ({len(missing)} missing): not the tuned one's base, or "
            "saved under other names: load it with from_pretrained, save it with save_pretrained, and take that"
        )
    shapes = read_shapes({n: base_files[n] for n in names} if config.dry_run else tuned_files)
    tensors = {n: nn.Parameter(torch.empty(shape, device="meta")) for n, shape in shapes.items()}
    try:  # checks `exclude`, and finds the tensors that are masked
        masker = gmt.Masker(
            tensors.items(), "gmt", config.keep_ratio, exclude=config.exclude, mask_vectors=config.mask_vectors
        )
    except ValueError as e:
        raise UserError(str(e)) from None
    if config.dry_run:
        print(f"{len(masker.eligible)} of {len(shapes)} tensors would keep {config.keep_ratio} of their task vector")
        return

    aside = out.with_name(f".aside_{out.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        for path in sorted(tuned.iterdir()):
            if path.is_file() and path.suffix != ".safetensors" and path.name != integrity.COMPLETED:
                shutil.copy2(path, aside / path.name)
        for path in sorted(set(tuned_files.values())):
            write_like(path, aside / path.name, dropped(config, path, base_files, set(masker.eligible)))
        run_folder.write_json(aside / "drop.json", vars(config))
        aside.rename(out)
    except OSError as e:
        raise UserError(f"output_dir {out} could not be written: {e.strerror or e}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"saved {out}: {len(masker.eligible)} of {len(shapes)} tensors keep {config.keep_ratio} of their task vector")


def dropped(config: DropConfig, path: Path, base_files: dict[str, Path], masked: set[str]) -> Iterator[Tensor]:
    """The tensors of one file of the tuned model, in the order of their bytes."""
    with safe_open(path, "pt") as tuned:
        for name in sorted(tuned.keys(), key=lambda n: read_header(path)[n]["data_offsets"]):
            tensor = tuned.get_tensor(name)
            if name in masked:
                with safe_open(base_files[name], "pt") as f:
                    base = f.get_tensor(name)
                if base.shape != tensor.shape:
                    raise UserError(f"{name} is {list(base.shape)} in base, {list(tensor.shape)} in tuned")
                tensor = drop_delta(
                    base, tensor, config.keep_ratio, config.by, rescale=config.rescale,
                    drop_largest=config.drop_largest, name=name, seed=config.seed,
                )  # fmt: skip
            yield tensor


def base_folder(base: str) -> Path:
    """The folder of the base model: its own, or the cache's of a Hub model, whose weights are fetched."""
    if is_local(base):
        return Path(base)
    try:
        return Path(snapshot_download(base, allow_patterns=["model*.safetensors", "*.json"]))
    except Exception as e:  # the network, the Hub (gated, unknown), the disk
        raise UserError(f"base {base} cannot be fetched: {' '.join(str(e).split())[:300]}") from None


def saved_names(model: PreTrainedModel) -> set[str]:
    """The names that save_pretrained gives a model's tensors: tied ones once, and as its published files have them."""
    tensors = {n: t for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}
    return set(revert_weight_conversion(model, tensors))


def tensor_files(folder: Path, what: str) -> dict[str, Path]:
    """{tensor name: its safetensors file} of a model folder.

    Raises:
        UserError: no such folder, no safetensors file in it, or a damaged one.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{what} {folder}: no folder with .safetensors files (a Hub model: hf download owner/name)")
    try:
        return {name: path for path in files for name in read_header(path) if name != "__metadata__"}
    except (OSError, ValueError, struct.error, SafetensorError) as e:
        raise UserError(f"{what} {folder}: a safetensors file is damaged: {e}") from None


def read_header(path: Path) -> dict[str, dict]:
    """The header of a safetensors file: per tensor dtype, shape and the place of its bytes."""
    with open(path, "rb") as f:
        (size,) = struct.unpack("<Q", f.read(8))
        return json.loads(f.read(size))


def read_shapes(files: dict[str, Path]) -> dict[str, list[int]]:
    headers = {path: read_header(path) for path in set(files.values())}
    return {name: headers[path][name]["shape"] for name, path in files.items()}


def write_like(source: Path, target: Path, tensors: Iterator[Tensor]) -> None:
    """A safetensors file with source's header (names, shapes, dtypes) and other values, one tensor at a time."""
    with open(source, "rb") as f, open(target, "wb") as out:
        (size,) = struct.unpack("<Q", f.read(8))
        f.seek(0)
        out.write(f.read(8 + size))
        for tensor in tensors:
            out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


if __name__ == "__main__":
    run_main(main, "drop.py")
