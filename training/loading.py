"""Loads what a run trains on and what it trains: tokenizer, examples, model."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

import gmt
from common import sources, templates
from common.compatibility import largest_text_id, refuse_unscorable
from common.config import TrainConfig
from common.errors import UserError, nearest, one_line, user_errors
from common.hub import from_pretrained, load_weights
from common.launch import world_size
from common.templates import TEMPLATES
from training import backend, checks, plan, resume
from training.data import Examples, permutation, tokenise
from training.losses import attach_loss
from training.masking import build_masker, freeze
from training.preflight import check_batches, check_memory


def load_data(config: TrainConfig) -> tuple[Any, Examples, Examples]:
    """(tokenizer, training examples, held-out examples).

    Raises:
        UserError: something cannot be read, or nothing is left to train on.
    """
    tokenizer = from_pretrained(AutoTokenizer, config.tokenizer or config.model, "tokenizer")
    if config.template not in TEMPLATES:
        raise UserError(f"template: unknown word {config.template!r}{nearest(config.template, TEMPLATES)}")
    preferences = config.objective == "dpo"
    template = TEMPLATES[config.template]
    columns, conversations = templates.columns(template, preferences)
    optional = templates.optional_columns(template, preferences, tokenizer)
    rows = sources.load_all(config.dataset, columns, config.dataset_split, conversations, optional)
    how = config.template, config.max_length, config.overlong, config.tokenise_processes
    examples = tokenise(rows, tokenizer, *how, preferences, config.train_on_prompt)
    if config.eval_rows >= len(examples):
        raise UserError(f"eval_rows {config.eval_rows} leaves nothing to train on: there are {len(examples)} examples")
    order = permutation(len(examples), config.seed, -1)
    held_out, rest = np.sort(order[: config.eval_rows]), np.sort(order[config.eval_rows :])
    return tokenizer, examples.select(rest), examples.select(held_out)


def unread_columns(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Columns of the data that the template makes no use of."""
    template, preferences = TEMPLATES[config.template], config.objective == "dpo"
    read, _ = templates.columns(template, preferences)
    read += templates.optional_columns(template, preferences, tokenizer)
    return sources.unread_columns(config.dataset, config.dataset_split, read)


def load_architecture(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, examples: Examples) -> PretrainedConfig:
    """The model's configuration. A plan and a run refuse the same here, before the weights are read.

    Raises:
        UserError: it does not fit the tokenizer or the examples, its weights cannot be trained, or it computes in a way
            that training or eval.py does not know.
    """
    full = from_pretrained(AutoConfig, config.model, "model")
    architecture = full.get_text_config()
    kind = f"model {config.model} (model type {full.model_type})"
    if getattr(architecture, "quantization_config", None):
        raise UserError(f"model {config.model} is quantised: its weights cannot be trained; use the unquantised model")
    if getattr(architecture, "output_router_logits", False):
        raise UserError(
            f"{kind} adds a balancing loss of its experts' router, which is not supported: set output_router_logits to "
            "false in its config.json to train without it"
        )
    largest = max(examples.max_token_id(), largest_text_id(tokenizer))
    if largest >= architecture.vocab_size:
        raise UserError(
            f"token id {largest} is beyond the model's embedding of {architecture.vocab_size} rows: "
            f"the tokenizer {config.tokenizer or config.model} does not fit the model {config.model}"
        )
    context = getattr(architecture, "max_position_embeddings", math.inf)
    if (longest := int(examples.sequence_lengths.max())) > context:
        raise UserError(f"an example has {longest} tokens, the model's context is {context}: lower max_length")
    try:
        model = plan.on_meta(config, full)
    except (ValueError, ImportError) as e:
        hint = "; use --attention eager" if config.attention == "sdpa" else ""
        raise UserError(
            f"{kind} cannot be built with attention {config.attention}{hint} ({one_line(e, 120)})"
        ) from None
    refuse_unscorable(config.model, full, tokenizer)
    if checks.changes_logits(model):
        raise UserError(
            f"{kind} does something to its logits that losses.attach_loss does not know: it scales them, say"
        )
    return full


def on_paper(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, examples: Examples
) -> tuple[torch.nn.Module, gmt.Masker]:
    """The model and the masks of a run, without memory: what a plan is made of. Raises as load_architecture."""
    model = plan.on_meta(config, load_architecture(config, tokenizer, examples))
    freeze(config, model)
    return model, build_masker(config, model)


def settle_batches(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, examples: Examples, accelerator: Accelerator | None = None
) -> TrainConfig:
    """The configuration with the tokens of a forward pass, which are chosen here where they are left to the run.

    How a step is split changes its gradient by rounding alone. So that a resumed run is the same to the bit, it keeps
    what the run has chosen.

    Args:
        accelerator: of the run; None: for a plan.
    Raises:
        UserError: as preflight.check_batches and load_architecture.
    """
    processes = accelerator.num_processes if accelerator else world_size()
    check_batches(config, len(examples), processes)
    if config.micro_batch_tokens:
        return config
    card = backend.card_bytes()
    if config.resume:
        tokens = resume.recorded(Path(config.output_dir))["config"]["micro_batch_tokens"]
    elif card is None:
        tokens = max(plan.ON_CPU, config.longest_example)
    else:
        tokens = plan.choose_micro_batch_tokens(
            config, *on_paper(config, tokenizer, examples), examples, processes, card
        )
    if accelerator:  # the smallest of the GPUs decides for all
        tokens = int(accelerator.gather(torch.tensor([tokens], device=accelerator.device)).min())
    return replace(config, micro_batch_tokens=tokens)


def load_trainable_model(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    accelerator: Accelerator | None = None,
) -> torch.nn.Module:
    """The model that a run trains: it returns losses, see losses.attach_loss.

    Its weights are in master_dtype, whatever dtype they are stored in. Where another process reads them, see
    backend.reads_weights, `prepare` gives this one its part.

    Args:
        accelerator: of the run; None: the model is for something else than training, and read here.
    Raises:
        UserError: as load_architecture, preflight.check_memory and hub.load_weights.
    """
    on_meta, masker = on_paper(config, tokenizer, examples)
    if accelerator:
        check_memory(config, on_meta, masker, accelerator.num_processes)
    model = load_weights(
        config.model,
        dtype=getattr(torch, config.master_dtype),
        attention=config.attention,
        values=accelerator is None or backend.reads_weights(accelerator, on_meta),
    )
    if config.gradient_checkpointing:
        plan.checkpoint_layers(model)
    if config.compile:
        layers = plan.layers(model)
        if config.rule == "hft":  # a graph for each pattern of frozen weights; beyond its limit torch does not compile
            limits = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, 8 * len(layers))
            limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, limits.recompile_limit)
        for layer in layers:  # otherwise one compilation serves all, since they are alike; names stay
            layer.compile(dynamic=True)
    if config.objective == "dpo":
        switch_dropout_off(model)
    _make_generation_config_valid(model)
    _end_generation_at(model, templates.turn_ends(TEMPLATES[config.template], tokenizer))
    attach_loss(model, config.loss_chunk)
    if accelerator:  # while one reads, others in `prepare` would wait in groups whose patience is 10 minutes
        accelerator.wait_for_everyone()
    return model


def switch_dropout_off(model: torch.nn.Module) -> None:
    """Train without the model's own dropout, as DPO's authors and TRL do: the reference is computed without it.

    With it, policy and reference differ before the first step. A rate is that of a Dropout module, a number in a module
    (attention's, in most models) or read from the configuration at each pass (Falcon). checkpoint.save_model writes the
    configuration as it was: `dropout_rates` of the model. LoRA's dropout, which comes later, is asked for by name.
    """
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    model.dropout_rates = [
        (config, name, value)
        for config in configs.values()
        for name, value in vars(config).items()
        if "drop" in name and isinstance(value, float)
    ]
    for config, name, _ in model.dropout_rates:
        setattr(config, name, 0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _make_generation_config_valid(model: torch.nn.Module) -> None:
    """Mend a generation configuration that transformers loads but refuses to save, before days of training.

    Some are published with models: a temperature without do_sample, say.
    """
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True  # what a temperature means
        with user_errors():
            model.generation_config.validate(strict=True)


def _end_generation_at(model: torch.nn.Module, ends: list[int]) -> None:
    """Add the tokens that end a trained answer to those at which generation stops."""
    known = model.generation_config.eos_token_id
    known = [] if known is None else known if isinstance(known, list) else [known]
    ends = list(dict.fromkeys([*known, *ends]))
    if ends:
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
