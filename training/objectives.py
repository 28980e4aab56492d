"""What is minimised: SFT's cross-entropy, or DPO's preference loss.

An objective turns the model's output, the losses of a micro-batch's trained tokens, into a sum over the micro-batch's
examples; train.py divides the step's sum by the step's count. So splits and processes do not change what is trained.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.data import Examples


class Objective(Protocol):
    """What train.py asks of an objective."""

    metrics: tuple[str, ...]  # names of what is logged beside the loss

    def count(self, ids: np.ndarray) -> int:
        """What a step's sums over the examples `ids` are divided by."""

    def __call__(self, losses: Tensor, ids: list[int]) -> tuple[Tensor, list[Tensor]]:
        """(loss, metrics), each summed over the examples `ids`, from the (n,) losses of their trained tokens."""


class SFT:
    """Next-token cross-entropy, in nats: every trained token of a step weighs the same."""

    metrics = ()

    def __init__(self, examples: Examples):
        self.examples = examples

    def count(self, ids: np.ndarray) -> int:
        return int(self.examples.trained[ids].sum())

    def __call__(self, losses: Tensor, ids: list[int]) -> tuple[Tensor, list[Tensor]]:
        return losses.sum(), []


class DPO:
    """Direct Preference Optimization (arXiv 2305.18290, eq. 7), every pair of a step weighs the same.

    Metrics, means over pairs: rewards (eq. 5 without its constant) of the chosen and the rejected answer, their margin,
    the share of pairs with a margin above 0, implicit_kl, which is log pi / pi_ref of both answers (the KL divergence
    from the reference, estimated on answers that are not the policy's own), and the answers' tokens.

    Args:
        reference: (n, 2) fp64, log-probabilities of the examples' answers under the reference, see reference.py.
        beta: strength of the tie to the reference.
        length_normalised: LN-DPO, see dpo_losses.
    """

    metrics = (
        "reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy", "implicit_kl", "tokens_chosen",
        "tokens_rejected",
    )  # fmt: skip

    def __init__(self, examples: Examples, reference: Tensor, beta: float, length_normalised: bool):
        self.examples, self.reference, self.beta, self.length_normalised = examples, reference, beta, length_normalised

    def count(self, ids: np.ndarray) -> int:
        return len(ids)

    def __call__(self, losses: Tensor, ids: list[int]) -> tuple[Tensor, list[Tensor]]:
        tokens = torch.from_numpy(self.examples.sequence_trained[ids].reshape(-1, 2))
        policy, reference = sequence_logps(losses, tokens), self.reference[ids].to(losses.device)
        tokens = tokens.to(losses.device)
        pairs, rewards = dpo_losses(policy, reference, self.beta, tokens if self.length_normalised else None)
        chosen, rejected = rewards.detach().unbind(1)
        implicit_kl = (policy.detach() - reference).mean(1)
        metrics = [chosen, rejected, chosen - rejected, chosen > rejected, implicit_kl, *tokens.unbind(1)]
        return pairs.sum(), [m.sum() for m in metrics]


def sequence_logps(losses: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of answers: the negative losses of their tokens, summed in fp64.

    Args:
        losses: (m,) of the trained tokens, sequence after sequence.
        tokens: (n, 2) int64 on the CPU, trained tokens of each sequence; m together.
    Returns:
        (n, 2) fp64, on the device of `losses`.
    """
    if len(tokens) == 0:  # an empty micro-batch still has to reach the model's weights
        return losses.double().reshape(0, 2)
    return -torch.stack([part.sum() for part in losses.double().split(tokens.flatten().tolist())]).view(-1, 2)


def dpo_losses(policy: Tensor, reference: Tensor, beta: float, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """DPO's loss per pair: -log sigmoid(r_chosen - r_rejected), r = beta * (log pi - log pi_ref).

    arXiv 2305.18290, eq. 7; with `tokens` LN-DPO, where r is divided by the answer's length ("The Hitchhiker's Guide to
    Human Alignment with *PO", arXiv 2407.15229).

    Args:
        policy, reference: (n, 2) summed log-probabilities, in nats, of the chosen and the rejected answers.
        tokens: (n, 2) lengths of the answers in tokens.
    Returns:
        losses (n,) and rewards (n, 2), in the dtype of `policy`.
    """
    rewards = beta * (policy - reference)
    if tokens is not None:
        rewards = rewards / tokens
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards
