"""LoRA (arXiv 2106.09685) by the peft library: W + (alpha / r) B A, where A and B of rank r are trained and W is not.

The matrices are put into the model in place. It stays a transformers model, with the loss of losses.attach_loss, and
everything else of a run sees a model most of whose weights are frozen. peft is imported only where it is asked for.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from common.config import TrainConfig
from common.errors import UserError, nearest, user_errors


def add(config: TrainConfig, model: nn.Module, log: Callable[[str], object] = lambda text: None) -> Any:
    """Put LoRA's matrices into a transformers model and freeze the rest. Call it before the optimizer is built.

    A is random by config.seed, the same on every process; B is 0, so the model computes what it did before. They are in
    the dtype of their matrix, but in fp32 for 16-bit weights. A model on the meta device stays there.

    Returns:
        The peft.PeftModel around `model`, for `save` and `merge`.
    Raises:
        UserError: a word of lora_targets names no linear layer of the model, or its head.
    """
    from peft import LoraConfig, get_peft_model

    _check_targets(config, model)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_targets or "all-linear",
    )
    on_meta = next(model.parameters()).is_meta
    with user_errors(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed % 2**63)
        adapter = get_peft_model(model, settings, low_cpu_mem_usage=on_meta)
    trained = [p for p in model.parameters() if p.requires_grad]
    log(f"lora trains {sum(p.numel() for p in trained):,} weights, beside {len(trained) // 2} matrices")
    return adapter


def _check_targets(config: TrainConfig, model: nn.Module) -> None:
    """peft itself passes over a word that nothing matches, as long as another one does match."""
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    for word in config.lora_targets:
        if not any(name == word or name.endswith(f".{word}") for name in linear):
            known = dict.fromkeys(name.rpartition(".")[2] for name in linear)
            raise UserError(f"lora_targets: no linear layer before the head is named {word!r}{nearest(word, known)}")


def save(adapter: Any, folder: Path, is_main_process: bool) -> None:
    """Write an adapter in peft's format, for PeftModel.from_pretrained on the model that training began with.

    The main process writes. Under FSDP2 every process has to make the call: A and B are gathered.
    """
    whole = {
        name: p.full_tensor() if hasattr(p, "full_tensor") else p
        for name, p in adapter.named_parameters()
        if "lora_" in name  # not requires_grad: zeroth-order optimizers go without
    }
    if is_main_process:  # save_embedding_layers "auto" may ask the Hub about the base model
        adapter.save_pretrained(str(folder), state_dict=whole, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # an empty form; the card is that of the merged model


def merge(adapter: Any) -> None:
    """Add (alpha / r) B A to each matrix, in place, and take A and B out of the model.

    Under FSDP2 each process does so with its shards, and every process has to make the call.
    """
    adapter.merge_and_unload()
