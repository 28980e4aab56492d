"""The configuration of train.py and eval.py: two flat dataclasses, filled from a YAML file and the command line.

Every key is listed here with its meaning. A YAML file is turned into `--key value` words and the command line's words
follow them, so that types, precedence (the last word wins) and errors go one way.
"""

import dataclasses
import importlib.util
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

import gmt
from common.errors import UserError, nearest, one_line, user_errors

TRACKERS = ("tensorboard", "wandb")
# Keys of train.py that may differ between a run and its resumption: they do not change what is computed.
FREE_TO_CHANGE = {
    "output_dir", "dry_run", "resume", "resume_changed", "overwrite", "tokenise_processes", "save_every",
    "save_every_minutes", "keep_checkpoints", "log_every", "log_masks_every", "mask_jaccard", "mask_update_share",
    "eval_every", "max_skipped_steps", "trackers",
}  # fmt: skip
MASK_TUNING = "mask_tuning"  # the rule that gmt.py does not know: see training/mask_tuning.py
OF_MASKS = (  # no meaning for rules without masks
    "keep_ratio", "score", "refresh_every", "masked_weights", "scope", "exclude", "mask_vectors", "clip",
    "mask_jaccard", "mask_update_share",
)  # fmt: skip
ZEROTH_ORDER = ("mezo", "subzero")  # optimizers without gradients, for which the next keys have no meaning
OF_GRADIENTS = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "gradient_checkpointing", "compile", "log_masks_every",
    "lora_dropout",
)  # fmt: skip
OF_ADAPTERS = ("lora_rank", "lora_alpha", "lora_targets", "lora_dropout")  # no meaning without an adapter
OF_SCHEDULES = {  # keys of some schedules alone
    "decay_ratio": ("wsd", "power"), "decay_shape": ("wsd", "power"), "power_a": ("power",), "power_b": ("power",),
}  # fmt: skip
OF_SCORES = {"calibration_steps": "squared_gradients", "lift_rank": "low_rank"}  # keys of one score alone


def rules() -> tuple[str, ...]:
    """The words for a rule."""
    return *gmt.rules(), MASK_TUNING


def _meaningless(rule: str) -> list[str]:
    """The keys of OF_MASKS that mean nothing to a rule."""
    if rule == MASK_TUNING:
        return [name for name in OF_MASKS if name != "exclude"]
    return [] if gmt.masks_entries(rule) else list(OF_MASKS)


def key(default: Any = dataclasses.MISSING, help: str = "") -> Any:
    """A dataclass field with its line of help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """Keys of train.py, in a YAML file (--config FILE) or as --key value."""

    # model and data
    model: str = key(help="folder or Hub id of the model to fine-tune")
    dataset: list[str] = key(
        help="training rows, each entry a .jsonl, .json (also .gz) or .parquet file, a folder of them, or a Hub id "
        "(HUB_ID:CONFIG where it has several configurations); SOURCE:N takes its first N rows"
    )
    output_dir: str = key(help="folder of this run: log, checkpoints, final model")
    tokenizer: str = key("", "folder or Hub id of the tokenizer; empty: the model's own")
    dataset_split: str = key("train", "split of a folder or of a Hub dataset")
    template: str = key(
        "metamath",
        "how a row becomes text: metamath, alpaca, peft_metamath, magicoder, prompt_response, tulu, chat (the "
        "tokenizer's own chat template), or one added to templates.py",
    )
    max_length: int = key(512, "tokens per example at most")
    overlong: Literal["truncate", "drop"] = key("truncate", "what happens to longer examples")
    train_on_prompt: bool = key(False, "sft: train on all tokens, the prompt's too, not on the responses' alone")
    shuffle: bool = key(True, "a new random order of the examples in each epoch; false: that of the data")
    eval_rows: int = key(0, "hold out N random rows for the evaluation loss")
    tokenise_processes: int = key(0, "processes that tokenise; 0: one per core and 10,000 rows")

    # what is minimised
    objective: Literal["sft", "dpo"] = key("sft", "sft: the cross-entropy of responses; dpo: rows are pairs of answers")
    beta: float = key(0.1, "dpo: strength of the tie to the model before training")
    length_normalised: bool = key(False, "dpo: divide log-probabilities by the answers' lengths (LN-DPO)")

    # the method
    rule: str = key(
        "gmt",
        "which weights are updated: gmt, rmt, sift, gasdu, shira, super_tuning, mofo, lift, grad_square, hft, none "
        "(plain SFT), one added to gmt.py, or mask_tuning (the weights stay, which of them to keep is learnt)",
    )
    keep_ratio: float | None = key(
        None, "fraction of a matrix's entries kept, in (0, 1]: required, but by none, hft and mask_tuning"
    )
    score: str = key(
        "",
        "what entries are ranked by: gradient, random, weight, weight_gradient (their product), moment (Adam's "
        "first), squared_gradients (of a calibration), low_rank (the rank-r part of W); empty: the rule's own",
    )
    refresh_every: int | None = key(None, "masks are chosen every N steps; 0: once; none given: the rule's own")
    masked_weights: str = key(
        "",
        "momentum: a masked weight's gradient is 0, its moments still move it; frozen: nothing changes; update: the "
        "moments see the whole gradient, the weight stays; empty: the rule's own",
    )
    scope: Literal["tensor", "model"] = key("tensor", "one threshold per matrix, or one over all of them")
    exclude: list[str] = key([], "patterns of parameter names that are not masked, e.g. '*embed_tokens*'")
    mask_vectors: bool = key(False, "mask 1-D tensors (norms, biases) too")
    train_only: list[str] = key(
        [], "patterns of parameter names: all others are frozen, e.g. '*q_proj.weight'; none given: all are trained"
    )
    calibration_steps: int = key(0, "steps whose squared gradients choose the masks of rule grad_square, before step 1")
    lift_rank: int = key(64, "rank of the part of W that rule lift looks at")
    adapter: Literal["", "lora"] = key(
        "", "lora: with rule none, train matrices A and B of low rank beside each target, W + (alpha / rank) B A"
    )
    lora_rank: int = key(16, "rank of B A")
    lora_alpha: int = key(32, "scale of B A, divided by lora_rank")
    lora_targets: list[str] = key([], "names of linear layers, e.g. 'q_proj v_proj'; none named: all but the head")
    lora_dropout: float = key(0.0, "dropout of the input of A")

    # optimization
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "mezo", "subzero"] = key(
        "adamw",
        "torch's AdamW, or that of bitsandbytes with moments of 8 bit (paged: moved to the CPU when memory ends); or "
        "mezo, subzero: SGD along a random direction, by two forward passes and without a gradient",
    )
    zo_epsilon: float = key(1e-3, "mezo, subzero: how far from the weights the two passes are, along the direction")
    subzero_rank: int = key(24, "subzero: rank of a matrix's direction")
    subzero_refresh_every: int = key(1000, "subzero: the subspaces of the directions are drawn anew every N steps")
    learning_rate: float = key(2e-5, "peak learning rate")
    lr_schedule: Literal["cosine", "linear", "constant", "wsd", "power"] = key(
        "cosine",
        "after the warm-up; cosine, linear: down to 0; wsd: constant, then down to 0; power: a power of the tokens so "
        "far, then down to 0",
    )
    decay_ratio: float = key(0.1, "wsd, power: fraction of all steps on the way down to 0, at the end")
    decay_shape: Literal["exponential", "linear", "cosine", "1-sqrt"] = key("exponential", "wsd, power: that way down")
    power_a: float | None = key(
        None,
        "power: a in the rate, min(learning_rate, global_batch_size * a * tokens^b); the paper's 4 is too large here",
    )
    power_b: float = key(-0.51, "power: b in the rate, below 0")
    warmup_ratio: float = key(0.0, "fraction of all steps with a linearly rising learning rate")
    warmup_steps: int = key(0, "the same as a number of steps; set one of the two")
    weight_decay: float = key(0.0, "decoupled weight decay, on matrices only")
    adam_beta1: float = key(0.9, "decay of AdamW's first moment")
    adam_beta2: float = key(0.999, "decay of AdamW's second moment")
    adam_epsilon: float = key(1e-8, "AdamW's epsilon")
    max_grad_norm: float = key(1.0, "clip the gradient's norm; 0: no clipping")
    clip: Literal["before", "after"] = key(
        "before", "clip by the norm of the whole gradient, or of what masking leaves"
    )
    epochs: int = key(3, "passes over the data")
    max_steps: int = key(0, "stop (and end the schedule) after N optimizer steps; 0: after `epochs`")
    global_batch_size: int = key(128, "examples per optimizer step, over all processes")
    per_device_batch_size: int = key(0, "examples per forward pass at most; 0: by micro_batch_tokens alone")
    micro_batch_tokens: int = key(
        0,
        "tokens per forward pass at most, padding included; 0: on a CPU 1,024, on a GPU up to 16,384, as many as the "
        "plan finds memory for",
    )
    packing: Literal["auto", "on", "off"] = key(
        "auto",
        "several examples in a row, none seeing another; auto: with flash_attention_2, which knows a row's parts, if a "
        "check of the model at the start finds them kept apart; on: also by a mask, or an error; off: sorted by length",
    )
    loss_chunk: int = key(1024, "trained tokens whose logits exist at once; 0: all of a forward pass")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = key("sdpa", "transformers' implementation of attention")
    gradient_checkpointing: bool = key(False, "keep a layer's input alone and compute the layer again: memory for time")
    compile: bool = key(False, "torch.compile of each layer")
    seed: int = key(0, "of the order of examples, the random rules, dropout and LoRA's matrices")

    # precision
    mixed_precision: Literal["bf16", "fp16", "fp32"] = key(
        "bf16", "autocast dtype; fp32: none, for CPUs that have no bf16"
    )
    master_dtype: Literal["float32", "bfloat16", "float64"] = key(
        "float32", "dtype of the trained weights; bfloat16 saves memory but rounds most updates of a small rate away"
    )
    deterministic: bool = key(False, "deterministic GPU kernels, so that a resumed run is bitwise the same there too")

    # the run
    dry_run: bool = key(False, "print the plan (steps, memory, disk, what is masked) and stop; exit code 2 if refused")
    resume: bool = key(False, "go on from the latest checkpoint in output_dir")
    resume_changed: bool = key(False, "resume although configuration, data or package versions differ")
    overwrite: bool = key(False, "delete the run that is in output_dir")
    save_every: int = key(0, "steps between checkpoints; 0: none")
    save_every_minutes: float = key(0.0, "minutes between checkpoints; 0: none")
    keep_checkpoints: int = key(2, "the latest N checkpoints are kept")
    log_every: int = key(1, "steps between lines of metrics.jsonl")
    log_masks_every: int = key(0, "steps between lines of masks.jsonl, what is kept of each tensor; 0: none")
    mask_jaccard: bool = key(False, "log how far the masks overlap with the last logged ones; takes a bit per weight")
    mask_update_share: bool = key(
        False, "log the share of the squared update that falls on masked weights; takes a copy of the weights"
    )
    eval_every: int = key(0, "steps between evaluation losses; 0: at the end only")
    max_skipped_steps: int = key(5, "stop after N steps in a row with a non-finite gradient; 0: never")
    trackers: list[str] = key([], "log to these too, if they are installed: tensorboard, wandb")

    def __post_init__(self):
        """Raise UserError where keys contradict each other or are out of range."""
        if not self.dataset:
            raise UserError("dataset is empty: name at least one file, folder or Hub id")
        if self.rule not in rules():
            raise UserError(f"rule: unknown word {self.rule!r}{nearest(self.rule, rules())}")
        masks = not _meaningless(self.rule)
        if masks and self.keep_ratio is None:
            raise UserError(f"rule {self.rule} needs keep_ratio, the fraction of entries kept, in (0, 1]")
        if masks and not 0 < self.keep_ratio <= 1:
            raise UserError(f"keep_ratio is the fraction of entries kept and must be in (0, 1], got {self.keep_ratio}")
        for name in _meaningless(self.rule):
            if not self._is_default(name):
                raise UserError(
                    f"{name} has no meaning for rule {self.rule}: leave it out (or use a rule with masks, such as gmt)"
                )
        if self.rule == MASK_TUNING and self.weight_decay:
            raise UserError(f"weight_decay has no meaning for rule {self.rule}, which changes no weight: leave it out")
        if self.adapter and self.rule != "none":
            raise UserError(f"adapter {self.adapter} is a baseline without masks, got rule {self.rule}: use rule none")
        zeroth_order = self.optimizer in ZEROTH_ORDER
        if zeroth_order and self.rule != "none":
            raise UserError(f"optimizer {self.optimizer} has no gradients to mask, got rule {self.rule}: use rule none")
        if zeroth_order and self.mixed_precision == "fp16":
            raise UserError(f"optimizer {self.optimizer} has no gradients for fp16's scaler: use bf16 or fp32")
        of_others = {
            **dict.fromkeys(OF_GRADIENTS, not zeroth_order),
            "zo_epsilon": zeroth_order,
            **dict.fromkeys(("subzero_rank", "subzero_refresh_every"), self.optimizer == "subzero"),
        }
        for name, has_meaning in of_others.items():
            if not has_meaning and not self._is_default(name):
                raise UserError(f"{name} has no meaning for optimizer {self.optimizer}: leave it out")
        for name in OF_ADAPTERS:
            if not self.adapter and not self._is_default(name):
                raise UserError(f"{name} has no meaning without an adapter: leave it out (or set adapter lora)")
        if self.train_only and (self.adapter or self.rule in ("hft", MASK_TUNING)):
            chosen = f"adapter {self.adapter}" if self.adapter else f"rule {self.rule}"
            raise UserError(f"train_only has no meaning with {chosen}, which says itself what is trained: leave it out")
        with user_errors():
            axes = self.axes
        self._check_score(axes.score)
        if self.clip == "after" and (axes.masked_weights == "update" or not self.max_grad_norm):
            raise UserError(
                "clip after clips what masking leaves of the gradient: it needs a max_grad_norm above 0, "
                "and masked_weights other than update, under which the moments see the whole gradient"
            )
        if self.mask_jaccard and not self.log_masks_every:
            raise UserError("mask_jaccard needs log_masks_every, the steps between two masks that are compared")
        if self.mask_update_share and not self.log_masks_every:
            raise UserError("mask_update_share needs log_masks_every, the steps between two that are measured")
        if self.mask_update_share and axes.masked_weights != "momentum":
            raise UserError(
                f"mask_update_share has no meaning with masked_weights {axes.masked_weights}, under which masked "
                "weights do not move: leave it out"
            )
        for tracker in self.trackers:
            if tracker not in TRACKERS:
                raise UserError(f"trackers: unknown word {tracker!r}{nearest(tracker, TRACKERS)}")
            if importlib.util.find_spec(tracker) is None:
                raise UserError(f"trackers: {tracker} is not installed: pip install {tracker}, or leave it out")

        at_least = {
            **dict.fromkeys(("epochs", "global_batch_size", "keep_checkpoints", "log_every"), 1),
            **dict.fromkeys(("tokenise_processes", "eval_rows", "max_steps", "per_device_batch_size", "save_every"), 0),
            **dict.fromkeys(("loss_chunk", "warmup_steps", "weight_decay", "max_grad_norm", "eval_every", "seed"), 0),
            "micro_batch_tokens": 0,
            **dict.fromkeys(("calibration_steps", "save_every_minutes", "log_masks_every", "max_skipped_steps"), 0),
            **dict.fromkeys(("lift_rank", "lora_rank", "lora_alpha", "subzero_rank", "subzero_refresh_every"), 1),
            "max_length": 2,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("learning_rate", "adam_epsilon", "beta", "zo_epsilon"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("warmup_ratio", "adam_beta1", "adam_beta2", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.warmup_ratio and self.warmup_steps:
            raise UserError(f"set warmup_ratio ({self.warmup_ratio}) or warmup_steps ({self.warmup_steps}), not both")
        self._check_schedule()
        if self.objective == "sft" and (self.beta != 0.1 or self.length_normalised):
            raise UserError("beta and length_normalised are of objective dpo: leave them out under sft")
        if self.objective == "dpo" and self.train_on_prompt:
            raise UserError("train_on_prompt is of objective sft: dpo compares answers to one prompt; leave it out")
        if 0 < self.micro_batch_tokens < self.longest_example:
            raise UserError(
                f"one {'answer of a pair' if self.objective == 'dpo' else 'example'} may have max_length "
                f"{self.max_length} tokens, but a forward pass takes "
                f"micro_batch_tokens {self.micro_batch_tokens}: raise the one or lower the other"
            )
        if self.packing == "on" and self.per_device_batch_size:
            raise UserError("packing on fills rows up to micro_batch_tokens: leave per_device_batch_size out")
        if self.attention == "flash_attention_2":
            if importlib.util.find_spec("flash_attn") is None:
                raise UserError("attention flash_attention_2: pip install flash-attn, or use sdpa")
            if self.mixed_precision == "fp32":
                raise UserError("attention flash_attention_2 computes in 16 bits: use mixed_precision bf16, or sdpa")
        if self.master_dtype == "float64" and self.mixed_precision != "fp32":
            raise UserError(f"master_dtype float64 needs mixed_precision fp32, got {self.mixed_precision}")
        if self.eval_every and not self.eval_rows:
            raise UserError(f"eval_every {self.eval_every} needs eval_rows, the number of rows held out")
        if self.resume_changed and not self.resume:
            raise UserError("resume_changed has no meaning without resume")
        if self.resume and self.overwrite:
            raise UserError("resume goes on with the run in output_dir, overwrite deletes it: set one of the two")

    @property
    def longest_example(self) -> int:
        """Tokens that an example may take in a forward pass: a pair's two answers have rows of one length."""
        return self.max_length * (2 if self.objective == "dpo" else 1)

    @property
    def axes(self) -> gmt.Rule:
        """Score, refresh_every and masked_weights: the rule's own, or those of the keys."""
        rule = "none" if self.rule == MASK_TUNING else self.rule  # gradients of scores are not masked
        return gmt.rule_of(rule, self.score or None, self.refresh_every, self.masked_weights or None)

    def _is_default(self, name: str) -> bool:
        return getattr(self, name) == next(_default(f) for f in dataclasses.fields(self) if f.name == name)

    def _check_schedule(self) -> None:
        """Raise UserError where keys do not go with the schedule of the learning rate."""
        for name, schedules in OF_SCHEDULES.items():
            if self.lr_schedule not in schedules and not self._is_default(name):
                raise UserError(
                    f"{name} is of lr_schedule {' and '.join(schedules)}: leave it out for {self.lr_schedule}"
                )
        if not 0 <= self.decay_ratio <= 1:
            raise UserError(f"decay_ratio must be in [0, 1], got {self.decay_ratio}")
        if self.lr_schedule in OF_SCHEDULES["decay_ratio"] and self.warmup_ratio + self.decay_ratio > 1:
            raise UserError(
                f"warmup_ratio {self.warmup_ratio} and decay_ratio {self.decay_ratio} together are more than the run: "
                "lower one of them"
            )
        if self.lr_schedule == "power" and not (self.power_a and self.power_a > 0 > self.power_b):
            raise UserError(
                f"lr_schedule power needs a power_a above 0 and a power_b below 0, got {self.power_a} and "
                f"{self.power_b}: the rate is min(learning_rate, global_batch_size * power_a * tokens^power_b)"
            )

    def _check_score(self, score: str) -> None:
        """Raise UserError where keys do not go with what is large."""
        if (score == "squared_gradients") != (self.calibration_steps > 0):
            raise UserError(
                f"calibration_steps is for rule grad_square, which needs at least 1; got {self.calibration_steps} "
                f"with rule {self.rule}"
            )
        if score == "squared_gradients" and self.mixed_precision == "fp16":
            raise UserError("rule grad_square sums squares of unscaled gradients: use bf16 or fp32, not fp16")
        if score != "low_rank" and not self._is_default("lift_rank"):
            raise UserError(f"lift_rank is of score low_rank (rule lift): leave it out for rule {self.rule}")
        if score == "low_rank" and self.scope == "model":
            raise UserError("score low_rank (rule lift) looks at one matrix at a time: use scope tensor")
        if score == "moment" and self.optimizer != "adamw":
            raise UserError(
                f"score moment (rule mofo) reads AdamW's first moment, which optimizer {self.optimizer} holds in 8 "
                "bits: use adamw"
            )


@dataclass
class EvalConfig:
    """Keys of eval.py, in a YAML file (--config FILE) or as --key value."""

    tasks: list[str] = key(help="tasks to score: NAME, NAME=FILE (its items) or a group: math, code, general")
    output_dir: str = key(help="folder for completions and scores.json")
    model: str = key("", "folder or Hub id of the model to score; needed unless score_only")
    tokenizer: str = key("", "folder or Hub id of the tokenizer; empty: the model's own")
    data_dir: str = key("", "folder with local copies of the benchmarks, DIR/gsm8k/test.jsonl; empty: the Hub")
    limit: int = key(0, "score only the first N items of each task; 0: all")
    published_subset: bool = key(
        False, "score the subsets that published numbers were measured on, where there are any"
    )
    languages: list[str] = key([], "languages of TyDiQA, in English: 'english finnish'; none named: all nine")
    prompt_format: str = key(
        "", "how prompts are written: base, tulu, chat, ...; empty: each task's own; docs/evaluation.md"
    )
    seed: int = key(0, "of sampled completions (greedy ones have no use for it)")
    batch_size: int = key(
        64, "prompts generated at a time; processes share, and a resumed run keeps, blocks of 4 batches"
    )
    kv_cache_gib: float = key(
        32.0, "GiB of keys and values at most: where batch_size prompts could need more, fewer are generated at a time"
    )
    dtype: Literal["bfloat16", "float16", "float32"] = key("bfloat16", "dtype of the weights; on a CPU use float32")
    workers: int = key(0, "processes that judge answers at the same time; 0: one per physical core")
    allow_unsafe_code: bool = key(False, "run the model's programs although no sandbox works on this machine")
    score_only: bool = key(False, "score the completions that are in output_dir again, without a model")
    overwrite: bool = key(False, "delete results in output_dir that were made with other settings")

    def __post_init__(self):
        """Raise UserError where keys contradict each other or are out of range."""
        if not self.tasks:
            raise UserError("tasks is empty: name at least one, e.g. --tasks gsm8k")
        for name, least in (("batch_size", 1), ("limit", 0), ("seed", 0), ("workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.kv_cache_gib <= 0:
            raise UserError(f"kv_cache_gib must be above 0, got {self.kv_cache_gib}")
        if self.score_only:  # what only matters when something is generated
            for name in ("model", "tokenizer", "limit", "published_subset", "languages", "seed", "overwrite"):
                if getattr(self, name):
                    raise UserError(f"score_only scores what is in output_dir: {name} has no meaning with it")
            if files := [word for word in self.tasks if "=" in word]:
                raise UserError(f"score_only scores what is in output_dir: write {files[0]} without the file")


# ---------------------------------------------------------------------------------------------------------------------


def parse(cls: type, argv: list[str]) -> Any:
    """An instance of the dataclass `cls` from command-line words, `--config FILE` read first.

    A rule on the command line takes the place of the file's with what goes with it: keys of the file that have no
    meaning for this rule are left out. So does an optimizer without gradients.

    Raises:
        UserError: unknown key (the nearest known one is named), missing or wrong value.
        SystemExit: --help was asked for (0).
    """
    if "-h" in argv or "--help" in argv:
        print(f"{cls.__doc__}\n\n{reference(cls)}")
        raise SystemExit(0)
    pairs = list(_pairs(cls, argv))
    files = [values for k, values, _ in pairs if k == "config"]
    settings = []
    for values in files:
        if len(values) != 1:
            raise UserError(f"--config takes one file, got {len(values)}")
        settings += _read_yaml(values[0])
    given = {k: values[-1] for k, values, _ in pairs if values}
    if cls is TrainConfig and "rule" in given:
        settings = [setting for setting in settings if setting[0] not in _unused(given["rule"], settings, pairs)]
    if given.get("optimizer") in ZEROTH_ORDER:
        settings = [setting for setting in settings if setting[0] not in OF_GRADIENTS]
    settings += [(k, values, f"--{k}") for k, values, _ in pairs if k != "config"]

    fields = {f.name: f for f in dataclasses.fields(cls)}
    result = {}
    for name, values, where in settings:
        if name not in fields:
            raise UserError(f"{where}: unknown key {name!r}{nearest(name, fields)}")
        result[name] = _convert(fields[name], values, where)
    missing = [n for n, f in fields.items() if n not in result and not _has_default(f)]
    if missing:
        raise UserError(f"missing: {', '.join('--' + n for n in missing)} (or the same keys in the --config file)")
    return cls(**result)


def reference(cls: type) -> str:
    """The keys of a configuration as a Markdown table; docs/configuration.md holds this text."""
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for f in dataclasses.fields(cls):
        default = _default(f) if _has_default(f) else "required"
        default = "" if default in ("", None, []) else default
        rows.append(f"| {f.name} | {_type_name(f.type)} | {default} | {f.metadata['help']} |")
    return "\n".join(rows)


def _default(f: dataclasses.Field) -> Any:
    return f.default if f.default is not dataclasses.MISSING else f.default_factory()


def _has_default(f: dataclasses.Field) -> bool:
    return f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING


def _pairs(cls: type, argv: list[str]):
    """(key, values, where) of words like `--key value`, `--key=value`, `--flag`, `--list a b`."""
    i = 0
    while i < len(argv):
        word = argv[i]
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}: settings are written --key value")
        name, equals, value = word[2:].partition("=")
        values = [value] if equals else []
        i += 1
        while not equals and i < len(argv) and not argv[i].startswith("--"):
            values.append(argv[i])
            i += 1
        yield name.replace("-", "_"), values, word


def _read_yaml(path: str) -> list[tuple[str, list[str], str]]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--config {path}: cannot be read: {e}") from None
    except yaml.YAMLError as e:
        raise UserError(f"--config {path}: not valid YAML: {one_line(e)}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected lines of `key: value`, got {type(content).__name__}")
    settings = []
    for name, value in content.items():
        values = value if isinstance(value, list) else [value]
        if any(isinstance(v, (dict, list)) for v in values):
            raise UserError(f"{path}: {name}: expected one value or a flat list")
        if value is not None:  # `key:` with nothing behind it keeps the default
            settings.append((str(name), [str(v) for v in values], f"{path}"))
    return settings


def _convert(f: dataclasses.Field, values: list[str], where: str) -> Any:
    kind = f.type
    if typing.get_origin(kind) is types.UnionType:  # float | None
        kind = typing.get_args(kind)[0]

    def wrong(expected: str, got: Any) -> NoReturn:
        raise UserError(f"{where}: {f.name} must be {expected}, got {got!r}")

    if typing.get_origin(kind) is list:
        return values
    if kind is bool and not values:
        return True
    if len(values) != 1:
        wrong("one value", " ".join(values))
    (text,) = values
    if typing.get_origin(kind) is Literal:
        words = typing.get_args(kind)
        if "on" in words:  # YAML 1.1 reads `key: on` as a boolean
            text = {"True": "on", "False": "off"}.get(text, text)
        return text if text in words else wrong(f"one of {', '.join(words)}", text)
    if kind is bool:
        known = {"true": True, "false": False}
        return known[text.lower()] if text.lower() in known else wrong("true or false", text)
    if kind is str:
        return text
    try:
        number = kind(text)
    except ValueError:
        wrong("a whole number" if kind is int else "a number", text)
    if kind is float and not math.isfinite(number):
        wrong("a finite number", text)
    return number


def _unused(rule: str, settings: list[tuple], words: list[tuple]) -> set[str]:
    """Keys of the YAML file that have no meaning for the rule on the command line, which they were not written for."""
    if rule not in rules():
        return set()
    if meaningless := _meaningless(rule):
        return {*meaningless, *OF_SCORES}
    given = {k: values[-1] for k, values, _ in settings + words if values}
    score = given.get("score") or gmt.rule_of(rule).score
    return {name for name, of in OF_SCORES.items() if score != of}


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return ", ".join(typing.get_args(kind))
    if typing.get_origin(kind) is types.UnionType:
        return typing.get_args(kind)[0].__name__
    return "list" if typing.get_origin(kind) is list else kind.__name__
