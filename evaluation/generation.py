"""Completions and log-probabilities of a causal language model, in batches of unequal lengths."""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoConfig, PreTrainedTokenizerBase

from common.compatibility import refuse_unscorable
from common.config import EvalConfig
from common.errors import UserError
from common.hub import from_pretrained, load_weights
from evaluation.cache import RoomyCache, places

NOT_A_NUMBER = "the model's logits are no numbers (NaN): its weights are damaged, or overflow in this --dtype"
MOST_LOGITS = 8192  # positions whose logits exist at once: 2 GiB in bf16 at a vocabulary of 128k
STOP_INTERVAL, LONGEST_STOP = 8, 16  # tokens between looks for stop strings; tokens of a stop string at most


@dataclass(frozen=True)
class Decoding:
    """How completions are made."""

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    turn_ends: tuple[int, ...] = ()  # tokens that end a completion beside the model's own


@dataclass
class Model:
    """A model that is ready to be evaluated, and its special tokens."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]  # tokens that end a completion
    pad: int
    context: float  # tokens that fit, or infinity
    cached_tokens: float = math.inf  # tokens whose keys and values may exist at once, padding included


def load_for_generation(config: EvalConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Model:
    """The model of a folder or Hub id.

    Raises:
        UserError: it cannot be loaded, has no end-of-sequence token, does not belong to the tokenizer, or keeps another
            state than keys and values.
    """
    architecture = from_pretrained(AutoConfig, config.model, "model")
    refuse_unscorable(config.model, architecture, tokenizer)
    network = load_weights(config.model, verified=True, dtype=getattr(torch, config.dtype)).to(device).eval()
    own = network.generation_config.eos_token_id  # some models end with several tokens
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    if not ends:
        raise UserError(f"model {config.model}: neither it nor its tokenizer names an end-of-sequence token")
    text_config, padding = architecture.get_text_config(), tokenizer.pad_token_id
    if padding is None or padding >= text_config.vocab_size:
        padding = min(ends)
    context = getattr(text_config, "max_position_embeddings", None) or math.inf
    cached_tokens = config.kv_cache_gib * 2**30 // bytes_per_token(network)
    return Model(network, tokenizer, frozenset(ends), padding, context, cached_tokens)


@torch.inference_mode()
def bytes_per_token(network: torch.nn.Module) -> int:
    """Bytes of the keys and values of one token, in all layers."""
    cache = RoomyCache()
    network(input_ids=torch.zeros(1, 1, dtype=torch.long, device=network.device), past_key_values=cache, use_cache=True)
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


# ---------------------------------------------------------------------------------------------------------------------
# Completions
# ---------------------------------------------------------------------------------------------------------------------


def generate(
    model: Model, prompts: list[list[int]], decoding: Decoding, seeds: list[str], batch_size: int
) -> list[dict[str, Any]]:
    """Completions of prompts, at most `batch_size` at a time. A sampled one depends on its seed, not on the others.

    Args:
        prompts: token ids, best of falling length.
        seeds: one per prompt, any text.
    Returns:
        a dict per prompt: completion (cut before the first stop string), tokens (generated, up to the end of sequence),
        finish: `eos`, `stop` (a stop string), `length` (max_new_tokens or the context), or `too_long`: the prompt
        leaves no room in the context, and the completion is empty.
    """
    rows = continue_rows(model, prompts, decoding, seeds, batch_size)
    return [
        {"completion": "", "tokens": 0, "finish": "too_long"}
        if new is None
        else decode_completion(model, p, new, decoding)
        for p, new in zip(prompts, rows, strict=True)
    ]


@dataclass
class Batch:
    """Prompts and what they have been continued with, padded on the left."""

    rows: list[int]  # which prompt each row belongs to
    input_ids: Tensor  # (rows, new) int64: tokens whose keys and values are not in the cache yet
    mask: Tensor  # (rows, columns) int64: 0 on padding
    cache: RoomyCache


@torch.inference_mode()
def continue_rows(
    model: Model, prompts: list[list[int]], decoding: Decoding, seeds: list[str], batch_size: int
) -> list[list[int] | None]:
    """The tokens that follow each prompt: up to an end of sequence, soon after a stop string, or max_new_tokens.

    A row that has ended leaves the batch; when a quarter of the places is free, waiting prompts take them. None: the
    prompt leaves no room in the context.

    The batch has `batch_size` rows, or as many as have room in model.cached_tokens if all of them become as long as the
    longest can: what else is in memory must not decide it, since rounding may differ between batches.
    """
    ends = model.ends.union(decoding.turn_ends)
    most = [min(decoding.max_new_tokens, model.context - len(p)) for p in prompts]
    new: list[list[int] | None] = [[] if room > 0 else None for room in most]
    generators = [torch.Generator().manual_seed(_hash(s)) for s in seeds] if decoding.temperature else []

    def is_unfinished(r: int) -> bool:
        due = decoding.stop and len(new[r]) % STOP_INTERVAL == 0
        ended = new[r][-1] in ends or len(new[r]) >= most[r]
        return not ended and not (due and _has_stopped(model, new[r], decoding))

    def step(batch: Batch) -> None:
        """One more token for each row; rows that have ended are gone."""
        logits = model.model(
            input_ids=batch.input_ids,
            attention_mask=batch.mask,
            position_ids=positions(batch.mask)[:, -batch.input_ids.shape[1] :],
            past_key_values=batch.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        if bool(logits.isnan().any()):
            raise UserError(NOT_A_NUMBER)
        tokens = next_tokens(logits, decoding, [generators[r] for r in batch.rows] if generators else [])
        for r, token in zip(batch.rows, tokens.tolist(), strict=True):
            new[r].append(token)
        batch.input_ids = tokens[:, None]
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.rows), 1)], dim=1)
        keep = [i for i, r in enumerate(batch.rows) if is_unfinished(r)]
        if len(keep) < len(batch.rows):
            keep_rows(batch, keep)

    waiting = [r for r, row in enumerate(new) if row is not None]
    longest = max((len(prompts[r]) + most[r] for r in waiting), default=1)
    batch_size = int(max(1, min(batch_size, model.cached_tokens // longest)))
    running = None
    while waiting or running:
        free = batch_size - len(running.rows) if running else batch_size
        if waiting and free >= math.ceil(batch_size / 4):
            fresh, waiting = waiting[:free], waiting[free:]
            batch = Batch(fresh, *pad_left(model, [prompts[r] for r in fresh]), RoomyCache())
            step(batch)
            running = concatenate(running, batch) if running and batch.rows else running or batch
        else:
            step(running)
        if not running.rows:
            running = None
    return new


def keep_rows(batch: Batch, keep: list[int]) -> None:
    """Keep these rows of a batch, and drop its first columns if they are padding in all of them.

    The last ones move to the places of those that are gone: few are copied.
    """
    holes, movers = places(keep)
    order = list(range(len(keep)))
    for hole, mover in zip(holes, movers, strict=True):
        order[hole] = mover
    kept = torch.tensor(order, dtype=torch.long, device=batch.mask.device)
    batch.rows, batch.input_ids, batch.mask = [batch.rows[i] for i in order], batch.input_ids[kept], batch.mask[kept]
    padding = int(batch.mask.argmax(-1).min()) if keep else 0
    batch.mask = batch.mask[:, padding:]
    batch.cache.keep_rows(keep, padding)


def concatenate(a: Batch, b: Batch) -> Batch:
    """One batch of the rows of two, the narrower one padded on the left."""
    width = max(a.mask.shape[1], b.mask.shape[1])
    mask = torch.cat([pad(x.mask, (width - x.mask.shape[1], 0)) for x in (a, b)])
    a.cache.append_rows(b.cache, width - 1)  # the last token's keys are not there yet
    return Batch(a.rows + b.rows, torch.cat([a.input_ids, b.input_ids]), mask, a.cache)


def next_tokens(logits: Tensor, decoding: Decoding, generators: list[torch.Generator]) -> Tensor:
    """The next token of each row, (rows,) int64, of logits (rows, vocabulary): the largest, or a sampled one.

    Sampling is from the smallest set of most probable tokens whose probabilities sum to top_p; each row draws its
    number from its own generator, on the CPU.
    """
    if not decoding.temperature:
        return logits.argmax(-1)
    p, order = torch.softmax(logits.double() / decoding.temperature, -1).sort(dim=-1, descending=True, stable=True)
    p = p.masked_fill(p.cumsum(-1) - p >= decoding.top_p, 0.0)
    # Drawn from in the vocabulary's order: in that of probabilities, which rounding changes where two are alike, the
    # same number would mean another token in another batch.
    p = torch.zeros_like(p).scatter_(-1, order, p)
    drawn = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators]).to(p.device)
    cumulative = p.cumsum(-1)
    place = torch.searchsorted(cumulative, (drawn[:, None] * cumulative[:, -1:]), right=True)
    return place.clamp(max=p.shape[-1] - 1).squeeze(-1)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _has_stopped(model: Model, new: list[int], decoding: Decoding) -> bool:
    tail = model.tokenizer.decode(new[-(STOP_INTERVAL + LONGEST_STOP) :])
    return any(s in tail for s in decoding.stop)


def decode_completion(model: Model, prompt: list[int], new: list[int], decoding: Decoding) -> dict[str, Any]:
    """Cut generated ids at the end of sequence, decode them after their prompt, cut the text at a stop string.

    Special tokens that end nothing stay visible: a stop string may be one, and an answer with another is not the same
    without it.
    """
    ends = model.ends.union(decoding.turn_ends)
    end = next((i for i, t in enumerate(new) if t in ends), None)
    ids = new[:end]
    # Decoded together with the prompt: some tokenizers drop the space that a text begins with.
    before, both = (model.tokenizer.decode(i) for i in (prompt, prompt + ids))
    text = both[len(before) :] if both.startswith(before) else model.tokenizer.decode(ids)
    cut = min((at for s in decoding.stop if (at := text.find(s)) >= 0), default=None)
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
    kept = 1 + max((len(rows[i].ids) - rows[i].start for i in fits), default=0)
    at_once = max(1, MOST_LOGITS // kept)
    for first in range(0, len(fits), at_once):
        some = fits[first : first + at_once]
        for i, values in zip(some, _logprobs_at_once(model, [rows[i] for i in some]), strict=True):
            out[i] = values
    return out


def _logprobs_at_once(model: Model, rows: list[Scored]) -> list[list[float]]:
    ids, mask = pad_left(model, [row.ids for row in rows])
    logits = model.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions(mask),
        use_cache=False,
        logits_to_keep=1 + max(len(row.ids) - row.start for row in rows),
    ).logits
    out = []
    for row, scores in zip(rows, logits, strict=True):
        if row.choices:
            out.append(scores[-1].float().log_softmax(-1)[list(row.choices)].tolist())
        else:
            candidate = torch.tensor(row.ids[row.start :], device=scores.device)
            of_each = scores[-1 - len(candidate) : -1].float().log_softmax(-1)
            out.append([float(of_each.gather(-1, candidate[:, None]).sum())])
        if any(map(math.isnan, out[-1])):
            raise UserError(NOT_A_NUMBER)
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
