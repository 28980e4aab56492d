"""Gradient-Mask Tuning inside transformers' Trainer, and what is built on it, such as TRL's SFTTrainer.

trainer = Trainer(..., callbacks=[GMTCallback(rule="gmt", keep_ratio=0.2)])
"""

from typing import Any

from transformers import TrainerCallback

import gmt


class GMTCallback(TrainerCallback):
    """Masks the gradients where Trainer calls on_pre_optimizer_step: accumulated, reduced, unscaled and clipped.

    Args:
        rule, keep_ratio, options: as those of gmt.Masker; the rules are those that mask gradients step by step.
        masked_weights: `momentum`. `frozen` has to own the optimizer's step, which Trainer does not hand out.
    Raises:
        ValueError: what gmt.Masker refuses; `frozen`; rule hft (call gmt.freeze_half(model, seed) before the Trainer
            is made) and grad_square, whose calibration runs without steps.
    """

    def __init__(self, rule: str, keep_ratio: float | None = None, masked_weights: str = "momentum", **options: Any):
        if masked_weights != "momentum":
            raise ValueError(
                f"a callback cannot do masked_weights {masked_weights!r}: use masker.step in your own loop"
            )
        if rule not in ("none", *gmt.SCORES):
            raise ValueError(f"a callback can do the rules none, {', '.join(gmt.SCORES)}; got {rule!r}")
        gmt.Masker([], rule, keep_ratio, **{k: v for k, v in options.items() if k != "exclude"})  # refuse it now
        self.settings = {"rule": rule, "keep_ratio": keep_ratio, **options}
        self.masker: gmt.Masker | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.masker = None  # a new training, maybe of another model

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.masker is None:  # only now is the model surely wrapped: FSDP2 replaces its parameters
            self.masker = gmt.Masker(model.named_parameters(), **self.settings)
        self.masker.mask_gradients(state.global_step)
