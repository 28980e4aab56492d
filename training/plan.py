"""What a run will do and need: steps, memory by part, FLOPs, disk. Counted on the architecture alone, without weights.

`train.py --dry_run` prints it, with WORLD_SIZE=8 in the environment as for 8 processes, under `accelerate launch` as
for its configuration. Weights, gradients and optimizer state are byte counts of the tensors that the run will hold.
Activations are what autograd would save of the largest micro-batch, counted on fake tensors, which have a shape but no
memory; what kernels need in passing, and the allocator's fragments, come on top.
"""

import math
import unittest.mock
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer

import gmt
from common.config import TrainConfig
from training import lora
from training.data import Examples, micro_batches, step_examples, steps_per_epoch
from training.losses import attach_loss, token_losses

# dense bf16 FLOP/s by a word of the device's name, from the vendor's data sheets
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
_BLOCK_8BIT, _LEAST_8BIT = 256, 4096  # bitsandbytes: entries per scale; smaller tensors keep fp32 moments


def on_meta(config: TrainConfig, architecture: PretrainedConfig) -> nn.Module:
    """The model without memory: names, shapes and dtypes; tied weights are one, as where weights are loaded."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            architecture, dtype=getattr(torch, config.master_dtype), attn_implementation=config.attention
        )
        model.tie_weights()
    return model


def layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model, those that can be checkpointed."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def wants_packing(config: TrainConfig) -> bool:
    """Whether rows are packed if the model allows it."""
    by_kernel = config.attention == "flash_attention_2" and not config.per_device_batch_size
    return config.packing == "on" or (config.packing == "auto" and by_kernel)


def distribute(
    config: TrainConfig, examples: Examples, ids: np.ndarray, packed: bool, processes: int
) -> list[list[list[list[int]]]]:
    """The examples `ids` as [process][micro-batch][row] -> ids. A function of its arguments alone."""
    row_tokens = 0
    if packed and config.attention == "flash_attention_2":  # it takes one row, and computes no more than the examples
        row_tokens = config.micro_batch_tokens
    elif packed:  # by a mask, which costs by the square of a row's length
        row_tokens = config.max_length * examples.sequences
    most = config.micro_batch_tokens, config.per_device_batch_size
    return micro_batches(ids, examples.padded_lengths(packed), processes, *most, row_tokens)


def tensor_bytes(
    config: TrainConfig, parameters: Iterable[nn.Parameter], processes: int, sharded: bool
) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state that the first process holds, which has the most.

    DDP keeps all of them whole. FSDP2 cuts dimension 0 as torch.chunk does; while a layer is computed its weights are
    there whole too, which is not counted. Paged 8-bit moments may be on the CPU.
    """
    total = {"weights": 0, "gradients": 0, "optimizer": 0}
    for p in parameters:
        rows = -(-p.shape[0] // processes) if sharded else p.shape[0]
        numel = rows * (p.numel() // p.shape[0])
        total["weights"] += numel * p.element_size()
        if not p.requires_grad:
            continue
        total["gradients"] += numel * p.element_size()
        if config.optimizer == "adamw":
            total["optimizer"] += 2 * numel * p.element_size() + 4  # and a step count, fp32
        elif numel < _LEAST_8BIT:
            total["optimizer"] += 2 * numel * 4
        else:  # two moments of a byte, their scales, and the two maps from a byte to a number
            total["optimizer"] += 2 * numel + 2 * 4 * -(-numel // _BLOCK_8BIT)
    if config.optimizer != "adamw":
        total["optimizer"] += 2 * 256 * 4
    return total


def mask_bytes(masker: gmt.Masker, processes: int, sharded: bool) -> dict[str, int]:
    """Bytes that masking holds: masks as bits, and copies of the largest tensor that its way takes."""
    shards = processes if sharded else 1
    eligible = list(masker.eligible.values())
    entries = sum(p.numel() for p in eligible)
    largest = max((p.numel() * p.element_size() for p in eligible), default=0)
    held = {}
    if masker.score and (masker.refresh_every != 1 or masker.masked_weights != "momentum"):
        held["masks"] = entries // (8 * shards)
    if copies := {"frozen": 3, "update": 1}.get(masker.masked_weights):
        held[f"{masker.masked_weights}'s copies"] = copies * largest // shards
    if masker.score == "low_rank":  # the whole tensor, gathered, its part of rank r, and its mask, at a refresh
        held["low rank's copies"] = 2 * largest + largest // 4
    if masker.score == "squared_gradients":
        held["sums of squares"] = sum(4 * p.numel() for p in eligible) // shards
    return held


def activation_bytes(
    config: TrainConfig, architecture: PretrainedConfig, rows: int, length: int, trained: int, packed: bool = False
) -> int:
    """Bytes that autograd saves of a forward pass of (rows, length) tokens and the loss of `trained` of them.

    The loss's chunks come and go one by one, as do layers that are checkpointed: of them, their inputs are saved, and
    once what the largest of them saves while its backward pass runs.
    """
    weights: set[int] = set()
    alive: list[torch.Tensor] = []  # so that no two storages share an address

    class Saved(dict):
        """Bytes by storage."""

        def add(self, tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                self[storage._cdata] = storage.nbytes()
                alive.append(tensor)
            return tensor

        def hooks(self):
            return torch.autograd.graph.saved_tensors_hooks(self.add, lambda t: t)

    saved, again = Saved(), [0]

    def checkpointed(function, *args, **kwargs):
        inside = Saved()
        for value in args:
            if isinstance(value, torch.Tensor):
                saved.add(value)
        with inside.hooks():
            out = function(*args)
        again.append(sum(size for storage, size in inside.items() if storage not in saved))
        return out

    def by_chunks(head, hidden, targets, chunk):
        parts = zip(hidden.split(chunk or len(hidden)), targets.split(chunk or len(hidden)), strict=True)
        return torch.cat([checkpointed(lambda h, t: token_losses(head, h, t), *part) for part in parts])

    precision = {"bf16": torch.bfloat16, "fp16": torch.bfloat16, "fp32": None}[config.mixed_precision]
    # transformers cannot look into fake tensors, and would build a mask that the run goes without
    AttentionInterface.register("causal", _causal_attention)
    AttentionMaskInterface.register("causal", lambda *args, **kwargs: None)
    with (
        FakeTensorMode(),
        unittest.mock.patch("training.losses.token_losses", by_chunks),
        # experts by the product that knows fake tensors, whatever the dtype; it saves the same
        unittest.mock.patch("transformers.integrations.moe._can_use_grouped_mm", lambda *args: False),
    ):
        model = _without_values(config, architecture)
        weights.update(p.untyped_storage()._cdata for p in model.parameters())
        attach_loss(model, config.loss_chunk)
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            for layer in layers(model):
                layer._gradient_checkpointing_func = checkpointed
        batch = {"input_ids": torch.zeros((rows, length), dtype=torch.long)}
        batch["positions"] = batch["targets"] = torch.zeros(trained, dtype=torch.long)
        autocast = torch.autocast(
            "cpu", dtype=precision or torch.bfloat16, enabled=precision is not None, cache_enabled=False
        )
        with autocast, saved.hooks():
            model.train()(**batch).sum()
    mask = rows * length * length if packed and config.attention != "flash_attention_2" else 0  # of bool
    return sum(saved.values()) + max(again) + mask


def _without_values(config: TrainConfig, architecture: PretrainedConfig) -> nn.Module:
    """The model as the run will compute it, in a FakeTensorMode."""
    dtype = getattr(torch, config.master_dtype)
    attention = "eager" if config.attention == "eager" else "causal"
    with no_init_weights():
        try:
            model = AutoModelForCausalLM.from_config(architecture, dtype=dtype, attn_implementation=attention)
        except KeyError:  # it has a table of its own of what computes attention (Falcon)
            model = AutoModelForCausalLM.from_config(architecture, dtype=dtype, attn_implementation=config.attention)
    if config.adapter:  # fake tensors cannot be moved: A and B stay in fp32, whatever the weights are in
        with unittest.mock.patch.object(nn.Module, "to", lambda module, *args, **kwargs: module):
            lora.add(config, model)
    return model


def _causal_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention of (batch, heads, length, width) tensors, as transformers computes it by SDPA without a mask."""
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def flops_per_token(model: nn.Module, length: float) -> float:
    """FLOPs of forward and backward per token: 6 per weight of a matrix product, and causal attention's 6 L h s.

    A frozen weight takes 4: its gradient is not computed.
    Recomputation by gradient checkpointing is not counted, as is usual for model-flops utilisation.
    """
    architecture = model.config.get_text_config()
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    matrices = [p for p in model.parameters() if p.dim() >= 2 and (tied or p is not embedding)]
    width = architecture.num_attention_heads * (
        getattr(architecture, "head_dim", None) or architecture.hidden_size // architecture.num_attention_heads
    )
    products = sum((6 if p.requires_grad else 4) * p.numel() for p in matrices)
    return products + 6 * architecture.num_hidden_layers * width * length


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 FLOP/s, where it is known."""
    if device.type != "cuda":
        return None
    return next((peak for word, peak in PEAK_FLOPS.items() if word in torch.cuda.get_device_name(device)), None)


def report(
    config: TrainConfig,
    model: nn.Module,
    masker: gmt.Masker,
    examples: Examples,
    held_out: int,
    processes: int,
    sharded: bool,
) -> str:
    """The plan, for people."""
    gib = lambda n: f"{n / 2**30:.2f} GiB"  # noqa: E731
    in_epoch = steps_per_epoch(len(examples), config.global_batch_size)
    steps = config.max_steps or config.epochs * in_epoch
    drawn = len(examples), config.global_batch_size, config.seed
    some = [step_examples(*drawn, step, config.shuffle) for step in range(min(steps, 20))]
    packed = wants_packing(config)
    shares = [distribute(config, examples, ids, packed, processes) for ids in some]
    forwards = np.mean([len(share[0]) for share in shares])
    micro = [m for share in shares for process in share for m in process]
    padded_lengths, per_row = examples.padded_lengths(packed), 1 if packed else examples.sequences
    shapes = [
        (len(m) * per_row, max(int(padded_lengths[row].sum()) for row in m) // per_row) if m else (1, 2) for m in micro
    ]
    padded = 1 - sum(examples.lengths[ids].sum() for ids in some) / sum(r * length for r, length in shapes)
    largest = max(range(len(micro)), key=lambda i: (shapes[i][0] * shapes[i][1], shapes[i][0]))
    rows, longest = shapes[largest]
    in_largest = int(sum(examples.trained[row].sum() for row in micro[largest]))
    tokens = steps / in_epoch * examples.lengths.sum()

    parameters = list(model.parameters())
    held = tensor_bytes(config, parameters, processes, sharded)
    held["activations"] = activation_bytes(config, model.config, rows, longest, in_largest, packed)
    held |= mask_bytes(masker, processes, sharded)
    whole = tensor_bytes(config, parameters, 1, False)
    checkpoint = whole["weights"] + whole["optimizer"]
    saves = config.save_every or config.save_every_minutes
    disk = whole["weights"] + (config.keep_checkpoints + 1) * checkpoint * bool(saves)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    flops = tokens * flops_per_token(model, float(np.mean(examples.lengths)))
    where = f"FSDP2 over {processes} processes" if sharded else f"{processes} process(es), each with the whole model"
    lines = [
        f"parameters: {sum(p.numel() for p in parameters):,}, {trained:,} of them trained",
        masker.summary(),
        f"data: {len(examples):,} examples, {examples.lengths.sum():,} tokens, {examples.trained.sum():,} of them "
        f"trained; {examples.truncated} cut to max_length {config.max_length}, {examples.left_out_text()}, "
        f"{held_out} held out",
        f"steps: {steps:,} of {config.global_batch_size} examples ({in_epoch:,} an epoch), on {where}; about "
        f"{forwards:.1f} forward passes a step and process, {padded:.0%} padding"
        + (", packed if the model keeps examples apart" if packed else ""),
        "memory per process, at least:",
        *(f"  {gib(n):>12}  {part}" for part, n in held.items()),
        f"  {gib(sum(held.values())):>12}  together (activations of {rows} x {longest} tokens)",
        f"compute: {flops:.3g} FLOPs"
        + "".join(f"; {flops / (0.4 * peak) / 3600:.1f} {name} hours at 40 %" for name, peak in _SHOWN.items()),
        f"disk: {gib(disk)}: final model {gib(whole['weights'])}"
        + (f", {config.keep_checkpoints} + 1 checkpoints of {gib(checkpoint)}" if saves else ", no checkpoints"),
    ]
    return "\n".join(lines)


_SHOWN = {name: PEAK_FLOPS[name] for name in ("A100", "H100")}


def utilisation(flops: float, seconds: float, processes: int, device: torch.device) -> float | None:
    """Model-flops utilisation: the share of the devices' peak that a step's FLOPs took; None where it is unknown."""
    peak = peak_flops(device)
    return flops / seconds / processes / peak if peak and math.isfinite(seconds) and seconds > 0 else None
