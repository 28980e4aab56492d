"""Training losses: the cross-entropy of the trained tokens, without the logits of all of them at once."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def token_losses(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk: int = 0) -> Tensor:
    """The cross-entropy, in nats, of each of n tokens.

    The logits of `chunk` tokens exist at once, 0: of all. The backward pass makes them again, chunk by chunk, but for
    those of the last chunk, which it needs first.

    Args:
        head: hidden states (m, width) -> logits (m, vocabulary), in the dtype of the head or of autocast.
        hidden: (n, width), the states that predict the targets.
        targets: (n,) int64.
    Returns:
        (n,) fp32, or fp64 for fp64 logits: 16-bit logits are widened first.
    """

    def of_chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden)
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        return F.cross_entropy(logits, targets, reduction="none")

    size = chunk or max(1, len(targets))
    *pieces, last = zip(hidden.split(size), targets.split(size), strict=True)
    losses = [checkpoint(of_chunk, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    return torch.cat([*losses, of_chunk(*last)])


def attach_loss(model: nn.Module, chunk: int) -> None:
    """Make `model(**batch)` of a transformers model return the losses of the batch's trained tokens, see token_losses.

    A batch is what data.collate makes: input_ids, positions, targets and, where rows are packed, position_ids and the
    sequences' bounds. Hidden states are gathered at the trained positions before the head sees them: a prompt needs no
    logits. Without targets the call is the model's own, and returns logits.

    The loss is computed inside the model's forward, in one call of the head's module however many chunks there are: DDP
    and FSDP2 see one forward pass, every process issues the same collectives, and the head's shards are gathered once.
    Call this before `accelerator.prepare`.
    """
    head = model.get_output_embeddings()
    own_forward, own_head = model.forward, head.forward
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma

    def logits_of(hidden: Tensor) -> Tensor:
        logits = own_head(hidden)
        return torch.tanh(logits / cap) * cap if cap else logits

    def head_forward(hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        return own_head(hidden) if targets is None else token_losses(logits_of, hidden, targets, chunk)

    def forward(
        input_ids: Tensor,
        positions: Tensor | None = None,
        targets: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens: Tensor | None = None,
        max_length: int = 0,
    ) -> Tensor:
        # A cache would hide from transformers that rows are packed, and cost memory.
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        if cu_seq_lens is not None and "flash" in model.config._attn_implementation:
            for of in ("q", "k"):  # queries and keys
                inputs |= {f"cu_seq_lens_{of}": cu_seq_lens, f"max_length_{of}": max_length}
        if targets is None:
            return own_forward(**inputs)
        hidden = model.base_model(**inputs).last_hidden_state
        return head(hidden.flatten(0, 1).index_select(0, positions), targets)

    model.forward, head.forward = forward, head_forward


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout and gradients; afterwards it is back in training mode, with its weights in shards."""
    model.eval()
    with torch.no_grad():
        yield
    model.train()
    for module in model.modules():
        if isinstance(module, FSDPModule):  # keeps some weights whole until a backward pass, as other Parameter objects
            module.reshard()
