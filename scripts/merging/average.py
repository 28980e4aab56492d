"""Model soups: the average of the weights of several fine-tuned models (Wortsman et al., 2022, arXiv 2203.05482)."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from common import model_card
from common.config import key, parse
from common.errors import UserError
from common.hub import from_pretrained
from scripts.merging import folders
from scripts.merging.folders import Model

SOURCE = "model soups (Wortsman et al., 2022, arXiv 2203.05482)"
# Keys of config.json that may differ between models whose weights can be averaged.
FREE = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id",
}  # fmt: skip


@dataclass
class AverageConfig:
    """Keys of scripts/merge.py average."""

    models: list[str] = key(
        help="folders or Hub ids of models of one architecture; tokenizer, config.json and dtype are the first one's"
    )
    output_dir: str = key(help="folder of the result; new or empty")
    weights: list[str] = key([], "a number above 0 for each model, divided by their sum; none given: all the same")

    def __post_init__(self):
        """Raise UserError where keys contradict each other or are out of range."""
        check_parts(self.models, self.weights)


def main(argv: list[str]) -> None:
    """Write the average of config.models."""
    config = parse(AverageConfig, argv)
    folders.check_output(Path(config.output_dir))
    models, weights = open_models(config.models), numbers(config.models, config.weights)
    write_average(config.output_dir, models, weights, "average", vars(config))
    print(f"saved {config.output_dir}: the average of {len(models)} models")


def write_average(out: str, models: list[Model], weights: list[float], method: str, settings: dict[str, Any]) -> None:
    """Write a weighted average as a model's folder."""
    parts = [(m.source, f"weight {w / sum(weights):.4f}") for m, w in zip(models, weights, strict=True)]
    card = model_card.make_merged(method, SOURCE, parts, settings)
    folders.write(Path(out), models[0], lambda name: mean(models, weights, name), card, method, settings)


def mean(models: Sequence[Model], weights: Sequence[float], name: str) -> Tensor:
    """sum_i w_i theta_i / sum_i w_i of one tensor, in fp32, rounded to the dtype that it has in the first model.

    A running mean: one model's tensor is held beside it. What is the same in all models stays so exactly.
    """
    first = models[0].read(name)
    dtype, result = first.dtype, first.float()
    del first
    totals = itertools.accumulate(weights)
    next(totals)
    for model, weight, total in zip(models[1:], weights[1:], totals, strict=True):
        result.lerp_(model.read(name).float(), weight / total)
    return result.to(dtype)


def check_parts(models: list[str], weights: list[str]) -> None:
    """Raise UserError where there are too few models, or weights that do not belong to them."""
    if len(models) < 2:
        raise UserError(f"models: expected two or more, got {len(models)}")
    if weights and len(weights) != len(models):
        raise UserError(f"weights: expected one for each of {len(models)} models, got {len(weights)}")
    try:
        right = all(0 < float(w) < math.inf for w in weights)
    except ValueError:
        right = False
    if not right:
        raise UserError(f"weights: expected numbers above 0, got {' '.join(weights)}")


def numbers(models: list[str], weights: list[str]) -> list[float]:
    """A weight per model; all 1 where none are given."""
    return [float(w) for w in weights] or [1.0] * len(models)


def open_models(sources: list[str]) -> list[Model]:
    """Models whose weights can be averaged.

    Raises:
        UserError: one cannot be read, or is of another architecture or vocabulary than the first one.
    """
    models = [Model(source, "model") for source in sources]
    first = models[0]
    config, vocabulary = _architecture(first), _vocabulary(first)
    for other in models[1:]:
        found = _architecture(other)
        if differing := [k for k in sorted(config.keys() | found.keys()) if config.get(k) != found.get(k)]:
            told = [f"{k} is {found.get(k)!r}, there {config.get(k)!r}" for k in differing[:3]]
            raise UserError(
                f"model {other.source} is not of the architecture of {first.source}: {'; '.join(told)}"
                + "; ..." * (len(differing) > 3)
            )
        if differing := vocabulary.items() ^ _vocabulary(other).items():
            raise UserError(
                f"model {other.source} has not the vocabulary of {first.source}: token {min(differing)[0]!r} differs "
                "in the tokenizers (fine-tune all of them with one tokenizer)"
            )
        if missing := sorted(first.files.keys() - other.files.keys()):
            raise UserError(
                f"model {other.source} has no tensor {missing[0]} ({len(missing)} missing): it was saved under other "
                "names; load it with from_pretrained, save it with save_pretrained, and take that"
            )
    return models


def _architecture(model: Model) -> dict[str, Any]:
    config = from_pretrained(AutoConfig, str(model.folder), model.what)
    return {k: v for k, v in config.get_text_config().to_dict().items() if k not in FREE}


def _vocabulary(model: Model) -> dict[str, int]:
    return from_pretrained(AutoTokenizer, str(model.folder), "the tokenizer of model").get_vocab()
