"""Fisher-weighted averaging (Matena and Raffel, 2022, arXiv 2111.09832): each entry counts by how much it matters."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import trange
from transformers.core_model_loading import revert_weight_conversion

from common import model_card
from common.config import TrainConfig, key, parse
from scripts.merging import average, folders
from scripts.merging.folders import Model
from training.data import collate
from training.loading import load_data, load_trainable_model

SOURCE = "Fisher-weighted averaging (Matena and Raffel, 2022, arXiv 2111.09832)"


@dataclass
class FisherConfig:
    """Keys of scripts/merge.py fisher."""

    models: list[str] = key(
        help="folders or Hub ids of models of one architecture; tokenizer, config.json and dtype are the first one's"
    )
    output_dir: str = key(help="folder of the result; new or empty")
    dataset: list[str] = key(help="rows whose gradients tell what matters, as in train.py; SOURCE:N takes N rows")
    dataset_split: str = key("train", "split of a folder or of a Hub dataset")
    template: str = key("metamath", "how a row becomes text, as in train.py")
    max_length: int = key(512, "tokens per example at most")
    weights: list[str] = key([], "a number above 0 for each model, times its Fisher information; none given: all 1")

    def __post_init__(self):
        """Raise UserError where keys contradict each other or are out of range."""
        average.check_parts(self.models, self.weights)

    def training(self, model: str) -> TrainConfig:
        """How train.py would read the rows for a model, and load it."""
        return TrainConfig(
            model=model, dataset=self.dataset, output_dir=self.output_dir, dataset_split=self.dataset_split,
            template=self.template, max_length=self.max_length, rule="none", mixed_precision="fp32",
            micro_batch_tokens=max(self.max_length, 16384),
        )  # fmt: skip


def main(argv: list[str]) -> None:
    """Write the Fisher-weighted average of config.models. The Fisher information lies on disk beside it meanwhile."""
    config = parse(FisherConfig, argv)
    out = Path(config.output_dir).absolute()
    folders.check_output(out)
    models, weights = average.open_models(config.models), average.numbers(config.models, config.weights)
    aside = out.with_name(f".fisher_{out.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        files = [aside / f"{i}.safetensors" for i in range(len(models))]
        for model, file in zip(models, files, strict=True):
            save_file(diagonal_fisher(config.training(str(model.folder))), file)
        parts = [(m.source, f"weight {w:g} times its Fisher information") for m, w in zip(models, weights, strict=True)]
        card = model_card.make_merged("fisher", SOURCE, parts, vars(config))
        folders.write(out, models[0], lambda name: mean(models, files, weights, name), card, "fisher", vars(config))
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"saved {out}: the Fisher-weighted average of {len(models)} models")


def diagonal_fisher(config: TrainConfig) -> dict[str, Tensor]:
    """The mean over examples of the squared gradient of log p(answer | prompt), fp32, by the tensors' names in a file.

    This is the empirical Fisher information: answers are the data's, where the paper takes the expectation over the
    model's own.
    """
    tokenizer, examples, _ = load_data(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_trainable_model(config, tokenizer, examples).to(device).eval()
    fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in trange(len(examples), desc="Fisher information", unit="example"):
        model(**collate(examples, [[i]], device)).sum().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                fisher[name].addcmul_(p.grad, p.grad, value=1 / len(examples))
        model.zero_grad()
    return {n: t.contiguous() for n, t in revert_weight_conversion(model, fisher).items()}


def mean(models: list[Model], files: list[Path], weights: list[float], name: str) -> Tensor:
    """sum_i w_i F_i theta_i / sum_i w_i F_i of one tensor, entry by entry, in fp32; the plain mean where all F are 0.

    A running mean: the sum of the F, one model's F and its tensor are held beside it.
    """
    known = models[0].tied.get(name, name)

    def importance(i: int, like: Tensor) -> Tensor:
        with folders.safe_open(files[i], "pt") as f:
            if known not in f.keys():  # noqa: SIM118  no dict; a buffer, which is not trained
                return torch.zeros_like(like)
            return f.get_tensor(known) * weights[i]

    first = models[0].read(name)
    dtype, result = first.dtype, first.float()
    del first
    total = importance(0, result)
    for i, model in enumerate(models[1:], 1):
        mine = importance(i, result)
        total += mine
        share = torch.where(total > 0, mine / total, 1 / (i + 1))
        result.lerp_(model.read(name).float(), share)
    return result.to(dtype)
