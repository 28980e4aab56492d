"""What a run will do and need: steps, memory by part, FLOPs, disk. Counted on the architecture alone, without weights.

`train.py --dry_run` prints it: with WORLD_SIZE=8 in the environment for 8 processes, with ACCELERATE_USE_FSDP=true and
FSDP_VERSION=2 beside it under FSDP2; `accelerate launch` sets them all. Weights, gradients and optimizer state are byte
counts of the tensors that the run will hold, and so are masks and the copies that masking takes. Activations are what
autograd would save of the largest micro-batch, counted on fake tensors, which have a shape but no memory; what kernels
need in passing, and the allocator's fragments, come on top.
"""

import math
import unittest.mock
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer

import gmt
from common.config import MASK_TUNING, ZEROTH_ORDER, TrainConfig
from training import backend, lora, mask_tuning
from training.data import Examples, micro_batches, step_examples, steps_per_epoch
from training.losses import attach_loss, token_losses

# dense bf16 FLOP/s by words of the device's name, from the vendor's data sheets; what is more special comes first
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12,
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12,
}  # fmt: skip
# tokens of a forward pass where micro_batch_tokens is left to the run
CHOICES, ON_CPU = (16384, 8192, 4096, 2048), 1024
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


def checkpoint_layers(model: nn.Module) -> None:
    """Keep the layers' inputs alone for the backward pass, and compute the rest anew."""
    # older versions of transformers (5.18) know it by its older name alone
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


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


def tensor_bytes(config: TrainConfig, parameters: Iterable[nn.Parameter], shards: int) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state that the first of so many shards holds, which has the most.

    DDP keeps all of them whole, gradients once, in its buckets: see backend.prepare and steps.zero_gradients. FSDP2
    cuts dimension 0 as torch.chunk does; what it gathers in passing is counted by gathered_bytes. Paged 8-bit moments
    may be on the CPU.
    """
    total = {"weights": 0, "gradients": 0, "optimizer": 0}
    for p in parameters:
        numel = _entries_here(p, shards)
        total["weights"] += numel * p.element_size()
        if not p.requires_grad or config.optimizer in ZEROTH_ORDER:
            continue
        total["gradients"] += numel * p.element_size()
        if config.optimizer == "adamw":
            total["optimizer"] += 2 * numel * p.element_size() + 4  # and a step count, fp32
        elif numel < _LEAST_8BIT:
            total["optimizer"] += 2 * numel * 4
        else:  # two moments of a byte, their scales, and the two maps from a byte to a number
            total["optimizer"] += 2 * numel + 2 * 4 * -(-numel // _BLOCK_8BIT)
    if config.optimizer not in ("adamw", *ZEROTH_ORDER):
        total["optimizer"] += 2 * 256 * 4
    return total


def _entries_here(p: nn.Parameter, shards: int) -> int:
    """Entries of a parameter in the first, largest of so many shards."""
    return -(-p.shape[0] // shards) * (p.numel() // p.shape[0]) if p.numel() else 0


def mask_bytes(config: TrainConfig, masker: gmt.Masker, shards: int) -> dict[str, int]:
    """Bytes that masking holds, where it holds any; chunks of a tensor, of some MiB, are not counted.

    masks: as bits: those that serve for more than a step, those of this step where its update is taken back, those
    that the statistics compare. copies: of one tensor at a time, the largest (of all where the update is measured);
    without those for a choice at the first step alone, when there is no optimizer state yet. calibration: the sums of
    squares of grad_square, and copies, which are gone before the first step.
    """
    eligible = [p for p in masker.eligible.values() if p.numel() and p.requires_grad]
    if not eligible:
        return {}
    here = {p: _entries_here(p, shards) for p in eligible}
    largest = max(eligible, key=lambda p: here[p])
    size, wide = largest.element_size(), 8 if largest.element_size() == 8 else 4
    takes_back = masker.masked_weights != "momentum"
    compared = config.mask_jaccard and (config.log_masks_every > 0)
    sets = (masker.refresh_every != 1) + takes_back + compared * (1 if takes_back else 2)
    sets = sets if masker.score or compared else 0

    chosen_anew = masker.refresh_every > 1
    copies = 3 * here[largest] if chosen_anew or takes_back or compared else 0  # bools and bytes on the way to bits
    if takes_back:  # the weight, moments of the weight's dtype, and the mask as bytes and as bools
        moments = 2 * (masker.masked_weights == "frozen" and config.optimizer == "adamw")
        copies = max(copies, ((1 + moments) * size + 2) * here[largest])
    if masker.score == "low_rank" and chosen_anew:  # of a whole tensor: the part of rank r and its keys, and bools
        whole = max(eligible, key=lambda p: p.numel())
        matrix = whole.shape[-2:].numel()
        gathered = whole.numel() * size if shards > 1 else 0
        at_selection = 2 * wide * matrix + whole.numel()
        copies = max(copies, gathered + max(at_selection, wide * matrix + 4 * whole.numel()))
    if config.mask_update_share:  # of all weights, through the optimizer's step
        copies = max(copies, size * sum(here.values()) + here[largest])
    held = {"masks": sets * sum(-(-n // 8) for n in here.values()), "copies for masking": copies}
    if masker.score == "squared_gradients":  # the new square and the new sum; 16-bit gradients are widened first
        held["calibration"] = wide * sum(here.values()) + (2 * wide + (4 if size == 2 else 0)) * here[largest]
    return {part: n for part, n in held.items() if n}


def gathered_bytes(config: TrainConfig, model: nn.Module) -> int:
    """About the most that FSDP2 has whole in passing, in the backward pass: bytes of weights and gradients.

    Of the group that is computed, its weights and gradients, in the dtype of the computation; the weights of the group
    before, fetched ahead; and the gradients of the group behind, in fp32, on their way to their owners. The groups are
    Accelerate's: the embedding, each layer, and the last norm with the head.
    """
    size = 2 if config.mixed_precision == "bf16" else next(model.parameters()).element_size()
    summed = max(4, size)
    numel = lambda parameters: sum(p.numel() for p in set(parameters))  # noqa: E731
    inside = [numel(layer.parameters()) for layer in layers(model)]
    embedding = model.get_input_embeddings().weight
    own = 0 if embedding is model.get_output_embeddings().weight else embedding.numel()
    groups = [0, own, *inside, numel(model.parameters()) - sum(inside) - own, 0]
    return max(
        size * before + max(2 * size * group + summed * behind, (size + summed) * group)
        for before, group, behind in zip(groups, groups[1:], groups[2:], strict=False)
    )


def held_bytes(config: TrainConfig, model: nn.Module, masker: gmt.Masker, shards: int) -> dict[str, int]:
    """tensor_bytes and mask_bytes, or directions: what a step holds for certain, whatever the activations."""
    held = tensor_bytes(config, model.parameters(), shards)
    if config.optimizer in ZEROTH_ORDER:
        return held | {"directions": direction_bytes(config, model.parameters())}
    return held | mask_bytes(config, masker, shards)


def certain_bytes(config: TrainConfig, model: nn.Module, masker: gmt.Masker, processes: int) -> dict[str, int]:
    """held_bytes of what has to be on the GPU: paged optimizer state may be in the memory of the CPU."""
    held = held_bytes(config, model, masker, backend.shards(processes))
    return held | ({"optimizer": 0} if config.optimizer == "paged_adamw_8bit" else {})


def most_at_once(held: dict[str, int]) -> int:
    """The most of these bytes that is there at once.

    Activations are gone when masks are chosen, and calibration is over when optimizer state and masks come.
    """
    of = lambda part: held.get(part, 0)  # noqa: E731
    passing = of("activations") + of("gathered in passing")
    training = of("optimizer") + of("masks") + max(passing, of("copies for masking"))
    return of("weights") + of("gradients") + of("directions") + max(training, of("calibration") + passing)


def ways_to_save(config: TrainConfig, certain: bool) -> str:
    """What to do where a GPU is too small: for weights and their like (certain), or for activations too."""
    ways = []
    if not certain:
        if not config.gradient_checkpointing:
            ways.append("--gradient_checkpointing true")
        ways += ["a smaller micro_batch_tokens", "a smaller loss_chunk"]
    sharded = backend.is_sharded()
    ways.append("more GPUs" if sharded else "several GPUs with configs/accelerate/fsdp2.yaml")
    if not sharded and config.optimizer == "adamw":
        ways.append("--optimizer adamw_8bit")
    if not config.adapter:
        ways.append("--adapter lora with --rule none")
    return f"use {', '.join(ways[:-1])} or {ways[-1]}" if len(ways) > 1 else f"use {ways[0]}"


def direction_bytes(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of a zeroth-order optimizer's direction of the largest tensor, and of all of SubZero's U and V."""
    parameters = list(parameters)
    wide = max(4, parameters[0].element_size())
    held = max(p.numel() for p in parameters)
    if (rank := config.subzero_rank) and config.optimizer == "subzero":
        matrices = [p for p in parameters if p.dim() >= 2 and min(p.shape[-2:]) > rank]
        held += sum(p.shape[:-2].numel() * sum(p.shape[-2:]) * rank for p in matrices)
    return wide * held


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
            checkpoint_layers(model)
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
    if config.rule == MASK_TUNING:
        mask_tuning.add(config, model)
    return model


def _causal_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention of (batch, heads, length, width) tensors, as transformers computes it by SDPA without a mask."""
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def experts(architecture: PretrainedConfig) -> tuple[int, int] | None:
    """(experts that a token passes through, experts of a layer); None where the configuration tells of none."""
    text = architecture.get_text_config()

    def number(*names: str) -> int:
        found = [getattr(text, name, None) for name in names]
        return next((n for n in found if isinstance(n, int)), 0)

    active = number("num_experts_per_tok", "top_k_experts", "moe_topk")
    of_layer = number("num_local_experts", "num_experts", "n_routed_experts")
    return (active, of_layer) if 0 < active < of_layer else None


def flops_per_token(model: nn.Module, length: float, forward_only: bool = False) -> float:
    """FLOPs of forward and backward per token: 6 per weight of a matrix product, and causal attention's 6 L h s.

    A frozen weight takes 4: its gradient is not computed. The forward pass alone takes 2 of each. Of a
    mixture's experts those count that a token passes. Recomputation by gradient checkpointing is not counted, as is
    usual for model-flops utilisation.
    """
    architecture = model.config.get_text_config()
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    active, of_layer = experts(architecture) or (1, 1)
    products = 0.0
    for name, p in model.named_parameters():
        if name.endswith(".original1"):  # what a mask is multiplied with, see mask_tuning.py: in no product by itself
            continue
        if p.dim() >= 2 and not name.endswith("bias") and (tied or p is not embedding):
            share = active / of_layer if ".experts." in name else 1
            products += (2 if forward_only else 6 if p.requires_grad else 4) * p.numel() * share
    width = architecture.num_attention_heads * (
        getattr(architecture, "head_dim", None) or architecture.hidden_size // architecture.num_attention_heads
    )
    return products + (2 if forward_only else 6) * architecture.num_hidden_layers * width * length


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 FLOP/s, where it is known."""
    if device.type != "cuda":
        return None
    return next((peak for word, peak in PEAK_FLOPS.items() if word in torch.cuda.get_device_name(device)), None)


class Share(NamedTuple):
    """What the processes compute of a step: arrays (processes, micro-batches)."""

    rows: np.ndarray  # of the micro-batch; a pair for DPO has two, unless it is packed
    lengths: np.ndarray  # tokens of each of its rows, padding included

    @property
    def tokens(self) -> np.ndarray:
        return self.rows * self.lengths


def share_of(examples: Examples, micro: list[list[list[list[int]]]], packed: bool) -> Share:
    """The shapes of what `distribute` gives. An empty micro-batch is one row of two tokens, see data.collate."""
    padded, per_row = examples.padded_lengths(packed), 1 if packed else examples.sequences
    rows = [[len(m) * per_row if m else 1 for m in process] for process in micro]
    lengths = [[max(int(padded[row].sum()) for row in m) // per_row if m else 2 for m in process] for process in micro]
    return Share(np.array(rows), np.array(lengths))


def idle_share(share: Share, together: bool) -> float:
    """The share of the processes' time in a step in which they wait for one another, a token's time taken as fixed.

    Args:
        together: they meet in every micro-batch, as under FSDP2; else at the end of the step, as under DDP.
    """
    longest = share.tokens.max(0).sum() if together else share.tokens.sum(1).max()
    return 1 - share.tokens.sum() / (len(share.tokens) * longest)


class FirstStep(NamedTuple):
    """One of the steps that a plan looks at."""

    micro: list[list[list[list[int]]]]  # [process][micro-batch][row] -> ids
    share: Share
    tokens: int  # of its examples, without padding


def first_steps(config: TrainConfig, examples: Examples, processes: int) -> list[FirstStep]:
    """How the first steps, up to 20, are split."""
    steps = config.max_steps or config.epochs * steps_per_epoch(len(examples), config.global_batch_size)
    packed, out = wants_packing(config), []
    for step in range(min(steps, 20)):
        ids = step_examples(len(examples), config.global_batch_size, config.seed, step, config.shuffle)
        micro = distribute(config, examples, ids, packed, processes)
        out.append(FirstStep(micro, share_of(examples, micro, packed), int(examples.lengths[ids].sum())))
    return out


def largest_micro_batch(steps: list[FirstStep], examples: Examples) -> tuple[int, int, int]:
    """Rows, tokens of the longest, and trained tokens of the micro-batch with the most tokens."""
    step = max(steps, key=lambda step: step.share.tokens.max())
    process, index = np.unravel_index(step.share.tokens.argmax(), step.share.tokens.shape)
    trained = sum(examples.trained[row].sum() for row in step.micro[process][index])
    return int(step.share.rows[process, index]), int(step.share.lengths[process, index]), int(trained)


def passing_bytes(config: TrainConfig, model: nn.Module, examples: Examples, steps: list[FirstStep]) -> dict[str, int]:
    """Bytes of what is there within a step alone: activations, and weights that FSDP2 gathers."""
    held = {"gathered in passing": gathered_bytes(config, model)} if backend.is_sharded() else {}
    if config.optimizer not in ZEROTH_ORDER:
        size = largest_micro_batch(steps, examples)
        held["activations"] = activation_bytes(config, model.config, *size, wants_packing(config))
    return held


def choose_micro_batch_tokens(
    config: TrainConfig, model: nn.Module, masker: gmt.Masker, examples: Examples, processes: int, memory: int
) -> int:
    """Tokens of a forward pass: the most of CHOICES for which a step takes at most nine tenths of a GPU's memory.

    Args:
        config: with micro_batch_tokens 0; model: on the meta device, with what is frozen frozen; masker: its masks.
        processes: of the run; memory: of the GPU, in bytes.
    Returns:
        At least config.longest_example, which is the answer too where nothing fits.
    """
    certain = certain_bytes(config, model, masker, processes)
    for tokens in CHOICES:
        if tokens <= config.longest_example:
            break
        one = replace(config, micro_batch_tokens=tokens)
        passing = passing_bytes(one, model, examples, first_steps(one, examples, processes))
        if most_at_once(certain | passing) <= 0.9 * memory:
            return tokens
    return config.longest_example


def report(
    config: TrainConfig, model: nn.Module, masker: gmt.Masker, examples: Examples, held_out: int, processes: int
) -> str:
    """The plan, for people."""
    gib = lambda n: f"{n / 2**30:.2f} GiB"  # noqa: E731
    in_epoch = steps_per_epoch(len(examples), config.global_batch_size)
    steps = config.max_steps or config.epochs * in_epoch
    packed, sharded, shards = wants_packing(config), backend.is_sharded(), backend.shards(processes)
    first = first_steps(config, examples, processes)
    shares = [step.share for step in first]
    forwards = np.mean([share.rows.shape[1] for share in shares])
    padded = 1 - sum(step.tokens for step in first) / sum(share.tokens.sum() for share in shares)
    idle = np.mean([idle_share(share, sharded) for share in shares])
    rows, longest, _ = largest_micro_batch(first, examples)
    tokens = steps / in_epoch * examples.lengths.sum()

    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    held = held_bytes(config, model, masker, shards) | passing_bytes(config, model, examples, first)
    if config.optimizer in ZEROTH_ORDER:  # as the optimizer does; then a weight's products are two of two FLOPs
        model.requires_grad_(False)
    needed, card = most_at_once(held), backend.card_bytes()
    whole = tensor_bytes(config, parameters, 1)
    checkpoint = whole["weights"] + whole["optimizer"]
    saves = config.save_every or config.save_every_minutes
    disk = whole["weights"] + ((config.keep_checkpoints + 1) * checkpoint if saves else 0)
    mean = float(np.mean(examples.lengths))
    flops = tokens * flops_per_token(model, mean)
    if config.objective == "dpo":  # the reference's pass over all pairs
        flops += examples.lengths.sum() * flops_per_token(model, mean, forward_only=True)
    mixture = experts(model.config)
    where = f"{processes} process(es), each with the whole model"
    if sharded:
        where = f"FSDP2 over {processes} processes" + (f" in groups of {shards}" if shards < processes else "")
    lines = [
        f"parameters: {sum(p.numel() for p in parameters):,}, {trained:,} of them trained",
        masker.summary(),
        f"data: {len(examples):,} examples, {examples.lengths.sum():,} tokens, {examples.trained.sum():,} of them "
        f"trained; {examples.truncated} cut to max_length {config.max_length}, {examples.left_out_text()}, "
        f"{held_out} held out",
        f"steps: {steps:,} of {config.global_batch_size} examples ({in_epoch:,} an epoch), on {where}; about "
        f"{forwards:.1f} forward passes of at most {config.micro_batch_tokens:,} tokens a step and process, "
        f"{padded:.0%} padding, {idle:.0%} waiting for one another"
        + (", packed if the model keeps examples apart" if packed else ""),
        "memory per process, at least:",
        *(f"  {gib(n):>12}  {part}" for part, n in held.items()),
        f"  {gib(needed):>12}  together at once (activations of {rows} x {longest} tokens)",
        *([f"  {gib(card):>12}  on this GPU"] if card else []),
        *(
            ["warning: it may not fit on this GPU: " + ways_to_save(config, certain=False)]
            if card and needed > 0.95 * card  # CUDA itself and the allocator's fragments take some
            else []
        ),
        f"memory of the machine while weights are read: {gib(whole['weights'])} "
        + (
            "in the first process of all, next to none in the others"
            if backend.first_reads_for_all(model)
            else "in each process"
        ),
        f"compute: {flops:.3g} FLOPs"
        + (f" ({mixture[0]} of {mixture[1]} experts a token)" if mixture else "")
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
