"""Gradient-Mask Tuning inside transformers' Trainer, and what is built on it, such as TRL's SFTTrainer.

trainer = Trainer(..., callbacks=[GMTCallback(rule="gmt", keep_ratio=0.2)])
"""

from typing import Any

from transformers import TrainerCallback

import gmt


class GMTCallback(TrainerCallback):
    """Masks the gradients where Trainer calls on_pre_optimizer_step: accumulated, reduced, unscaled and clipped.

    Non-finite gradients are left to Trainer: under fp16 its scaler skips the step.

    Args:
        rule, keep_ratio, options: as those of gmt.Masker.
    Raises:
        ValueError: what gmt.Masker refuses; a rule with masked_weights other than `momentum`, or score `moment`, which
            own the optimizer's step, and Trainer does not hand it out; a rule that keeps its masks for more than a
            step, since a Trainer's checkpoint would lack them; rule hft (call gmt.freeze_half(model, seed) before the
            Trainer is made). At the first step: no matrix has a gradient, as under DeepSpeed, which has stepped
            already, and FSDP1, which holds them flat.
    """

    def __init__(self, rule: str, keep_ratio: float | None = None, **options: Any):
        masker = gmt.Masker([], rule, keep_ratio, **{k: v for k, v in options.items() if k != "exclude"})
        instead = "write your own loop with gmt.Masker, or use train.py"
        if rule == "hft":
            raise ValueError("hft masks no gradients: call gmt.freeze_half(model, seed) before the Trainer is made")
        if masker.masked_weights != "momentum":
            raise ValueError(f"a callback cannot do masked_weights {masker.masked_weights!r}: {instead}")
        if masker.score == "moment":
            raise ValueError(f"a callback cannot do score 'moment', which needs the optimizer: {instead}")
        if masker.refresh_every != 1:
            raise ValueError(
                f"a callback chooses masks at each step, refresh_every {masker.refresh_every} would have to be in the "
                f"checkpoint: {instead}"
            )
        self.settings = {"rule": rule, "keep_ratio": keep_ratio, **options}
        self.masker: gmt.Masker | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.masker = None  # a new training, maybe of another model

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.masker is None:  # only now is the model surely wrapped: FSDP2 replaces its parameters
            self.masker = gmt.Masker(model.named_parameters(), **self.settings)
            flat = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
            if self.masker.score and (flat or all(p.grad is None for p in self.masker.eligible.values())):
                raise ValueError(
                    "no matrix has a gradient here, and nothing would be masked: DeepSpeed and FSDP1 hide them, use "
                    "DDP or FSDP2"
                )
        self.masker.mask_gradients(state.global_step, check_finite=False)
