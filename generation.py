"""Completions and log-probabilities of a causal language model, in batches of unequal lengths."""

import hashlib
import math
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerBase

from config import EvalConfig, UserError
from hub import from_pretrained

LOOK_EVERY, LONGEST_STOP = 8, 16  # look for stop strings every 8 tokens; a stop string has at most 16 tokens


@dataclass(frozen=True)
class Decoding:
    """How completions are made."""

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0


@dataclass
class Model:
    """A model that is ready to be evaluated, and its special tokens."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]  # tokens that end a completion
    pad: int
    context: float  # tokens that fit, or infinity


def load_model(config: EvalConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Model:
    """The model of a folder or Hub id.

    Raises:
        UserError: it cannot be loaded, has no end-of-sequence token, does not belong to the tokenizer, or keeps another
            state than keys and values.
    """
    architecture = from_pretrained(AutoConfig, config.model, "model").get_text_config()
    if max(tokenizer.get_vocab().values()) >= architecture.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {max(tokenizer.get_vocab().values())}, the model's embedding "
            f"{architecture.vocab_size} rows: they do not belong together"
        )
    model = from_pretrained(AutoModelForCausalLM, config.model, "model", dtype=getattr(torch, config.dtype))
    if getattr(model, "_is_stateful", False):
        raise UserError(f"model {config.model}: a recurrent state is not supported, only keys and values")
    own = model.generation_config.eos_token_id  # some models end with several tokens
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    if not ends:
        raise UserError(f"model {config.model}: neither it nor its tokenizer names an end-of-sequence token")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    context = getattr(architecture, "max_position_embeddings", None) or math.inf
    return Model(model.to(device).eval(), tokenizer, frozenset(ends), pad, context)


# ---------------------------------------------------------------------------------------------------------------------
# Completions
# ---------------------------------------------------------------------------------------------------------------------


def generate(model: Model, prompts: list[list[int]], decoding: Decoding, seeds: list[str]) -> list[dict[str, Any]]:
    """Completions of one batch. A sampled one depends on its seed, not on its batch.

    Args:
        prompts: token ids, longest first.
        seeds: one per prompt, any text.
    Returns:
        a dict per prompt: completion (cut before the first stop string), tokens (generated, up to the end of sequence),
        finish: `eos`, `stop` (a stop string), `length` (max_new_tokens or the context), or `too_long`: the prompt
        leaves no room in the context, and the completion is empty.
    """
    room = [int(min(decoding.max_new_tokens, model.context - len(p))) for p in prompts]
    done: list[dict[str, Any]] = []
    # Prompts with the same room for an answer go together, so that a long one does not cut the answers of the others.
    for most, group in groupby(zip(room, prompts, seeds, strict=True), key=lambda row: row[0]):
        _, group_prompts, group_seeds = zip(*group, strict=True)
        if most <= 0:
            done += [{"completion": "", "tokens": 0, "finish": "too_long"} for _ in group_prompts]
            continue
        rows = continue_rows(model, list(group_prompts), most, decoding, list(group_seeds))
        done += [finish(model, p, new, decoding.stop) for p, new in zip(group_prompts, rows, strict=True)]
    return done


@torch.inference_mode()
def continue_rows(
    model: Model, prompts: list[list[int]], most: int, decoding: Decoding, seeds: list[str]
) -> list[list[int]]:
    """The tokens that follow each prompt: up to an end of sequence, soon after a stop string, or `most`.

    Rows are padded on the left. One that has ended leaves the batch, so that the others' steps cost less.
    """
    input_ids, mask = pad_left(model, prompts)
    generators = [torch.Generator().manual_seed(_seed(s)) for s in seeds] if decoding.temperature else []
    cache = DynamicCache()
    new: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the batch belongs to
    while rows:
        logits = model.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions(mask)[:, -input_ids.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens = choose(logits, decoding, [generators[r] for r in rows] if generators else [])
        keep = []
        looks = (len(new[rows[0]]) + 1) % LOOK_EVERY == 0 and bool(decoding.stop)  # all rows are of one age
        for i, (r, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            new[r].append(token)
            if token not in model.ends and len(new[r]) < most and not (looks and _stopped(model, new[r], decoding)):
                keep.append(i)
        input_ids, mask = tokens[:, None], torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        if len(keep) < len(rows):
            rows = [rows[i] for i in keep]
            kept = torch.tensor(keep, dtype=torch.long, device=mask.device)
            input_ids, mask = input_ids[kept], mask[kept]
            padding = int(mask.argmax(-1).min()) if rows else 0  # columns that are padding in all rows
            narrow(cache, kept, padding)
            mask = mask[:, padding:]
    return new


def narrow(cache: DynamicCache, rows: Tensor, padding: int) -> None:
    """Keep these rows of a cache, and drop its first columns, which are padding in all of them."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[rows, :, padding:], layer.values[rows, :, padding:]


def choose(logits: Tensor, decoding: Decoding, generators: list[torch.Generator]) -> Tensor:
    """The next token of each row, (rows,) int64, of logits (rows, vocabulary): the largest, or a sampled one.

    Sampling is from the smallest set of most probable tokens whose probabilities sum to top_p; each row draws its
    number from its own generator, on the CPU.
    """
    if not decoding.temperature:
        return logits.argmax(-1)
    p, order = torch.softmax(logits.double() / decoding.temperature, -1).sort(-1, descending=True, stable=True)
    before = p.cumsum(-1) - p
    p = p.masked_fill(before >= decoding.top_p, 0.0)
    drawn = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators]).to(p.device)
    cumulative = p.cumsum(-1)
    place = torch.searchsorted(cumulative, (drawn[:, None] * cumulative[:, -1:]), right=True)
    return order.gather(-1, place.clamp(max=p.shape[-1] - 1)).squeeze(-1)


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _stopped(model: Model, new: list[int], decoding: Decoding) -> bool:
    tail = model.tokenizer.decode(new[-(LOOK_EVERY + LONGEST_STOP) :])
    return any(s in tail for s in decoding.stop)


def finish(model: Model, prompt: list[int], new: list[int], stop: tuple[str, ...]) -> dict[str, Any]:
    """Cut generated ids at the end of sequence, decode them after their prompt, cut the text at a stop string."""
    end = next((i for i, t in enumerate(new) if t in model.ends), None)
    ids = new[:end]
    # Decoded together with the prompt: some tokenizers drop the space that a text begins with.
    before, whole = (model.tokenizer.decode(i, skip_special_tokens=True) for i in (prompt, prompt + ids))
    text = whole[len(before) :] if whole.startswith(before) else model.tokenizer.decode(ids, skip_special_tokens=True)
    cut = min((at for s in stop if (at := text.find(s)) >= 0), default=None)
    why = "stop" if cut is not None else "eos" if end is not None else "length"
    return {"completion": text[:cut], "tokens": len(ids), "finish": why}


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """One row to be scored: token ids, of which the last ones, from `start`, are the candidate.

    `choices`, if there are any, are ids whose log-probabilities are asked for at the end instead.
    """

    ids: list[int]
    start: int
    choices: tuple[int, ...] = ()


@torch.inference_mode()
def logprobs(model: Model, rows: list[Scored]) -> list[list[float] | None]:
    """Log-probabilities, in float32: [the sum over the candidate's tokens], or one for each of the choices.

    Rows are padded on the left, so that the logits of the longest candidate are all that is ever computed. None: the
    row is longer than the context.
    """
    fits = [i for i, row in enumerate(rows) if len(row.ids) <= model.context]
    out: list[list[float] | None] = [None] * len(rows)
    if not fits:
        return out
    ids, mask = pad_left(model, [rows[i].ids for i in fits])
    logits = model.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions(mask),
        use_cache=False,
        logits_to_keep=1 + max(len(rows[i].ids) - rows[i].start for i in fits),
    ).logits
    for i, scores in zip(fits, logits, strict=True):
        if rows[i].choices:
            out[i] = scores[-1].float().log_softmax(-1)[list(rows[i].choices)].tolist()
        else:
            candidate = torch.tensor(rows[i].ids[rows[i].start :], device=scores.device)
            of_each = scores[-1 - len(candidate) : -1].float().log_softmax(-1)
            out[i] = [float(of_each.gather(-1, candidate[:, None]).sum())]
    return out


def pad_left(model: Model, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (rows, longest) int64."""
    width = max(map(len, rows))
    ids = [[model.pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=model.model.device), torch.tensor(mask, device=model.model.device)


def positions(mask: Tensor) -> Tensor:
    """Where each token stands in its row, not counting padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
