"""What a training runs on: the Accelerator, the optimizer, and what is refused since masks would not be exact on it."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)
from datasets.utils.logging import disable_progress_bar
from transformers.utils import logging as transformers_logging

from common.config import MASK_TUNING, ZEROTH_ORDER, TrainConfig
from common.errors import UserError
from common.precision import avoid_cudnn_attention
from training import zeroth_order

DDP = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def is_sharded() -> bool:
    """Whether Accelerate is configured for FSDP, here as in all processes."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def shards(processes: int) -> int:
    """Over how many of so many processes FSDP2 cuts weights, gradients and optimizer state; 1: each holds them whole.

    With Accelerate's dp_shard_size there are copies of the shards between such groups.
    """
    if not is_sharded():
        return 1
    size = os.environ.get("PARALLELISM_CONFIG_DP_SHARD_SIZE", "1")
    grouped = parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG") and int(size) > 1
    return int(size) if grouped else processes


def first_reads_for_all(model: torch.nn.Module) -> bool:
    """Whether the first process of all reads the weights alone, and Accelerate sends them to the others.

    This is the case under FSDP2, unless Accelerate's configuration says otherwise: else each process of a machine would
    hold the whole model in the machine's memory, to keep its shard of it. Accelerate sends parameters, and fails on
    buffers that are saved with them (the bias of DeepSeek-V3's router).
    """
    allowed = is_sharded() and parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING", default=True)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return allowed and model.state_dict().keys() <= parameters


def reads_weights(accelerator: Accelerator, model: torch.nn.Module) -> bool:
    """Whether this process reads the weights; makes Accelerate do the same. Call it before `prepare`.

    The first process is that of all machines, not of each: from there Accelerate's FSDP2 sends them.

    Args:
        model: the model, maybe on the meta device.
    """
    first_reads = first_reads_for_all(model)
    if is_sharded():
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = first_reads
    return accelerator.is_main_process or not first_reads


def card_bytes() -> int | None:
    """The memory of this process's GPU; None where a run would take none."""
    if not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return None
    device = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    return torch.cuda.get_device_properties(device).total_memory


def check_supported(config: TrainConfig) -> None:
    """Raise UserError for what is not supported, from configuration and environment alone: every process agrees."""
    on_cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    masked_weights = config.axes.masked_weights
    if config.mixed_precision == "fp16" and masked_weights != "momentum":
        raise UserError(
            f"masked_weights {masked_weights} needs its own optimizer step, which fp16's gradient scaler owns: use bf16"
        )
    in_fp32 = config.adapter or config.rule == MASK_TUNING  # what they train
    if config.mixed_precision == "fp16" and config.master_dtype == "bfloat16" and not in_fp32:
        raise UserError(
            "master_dtype bfloat16 has bf16 gradients, which fp16's gradient scaler does not know: use bf16"
        )
    if config.mixed_precision == "fp16" and on_cpu:
        raise UserError("mixed_precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    for name, reason in {
        "DEEPSPEED": "its ZeRO shards flat buffers, in which a matrix's gradient cannot be told apart",
        "MEGATRON_LM": "its tensor parallelism cuts matrices in ways that the masks do not know",
    }.items():
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise UserError(f"Accelerate is configured for {name}, which is not supported: {reason}; use DDP or FSDP2")
    for size, what in {"TP": "tensor", "CP": "context", "SP": "sequence"}.items():
        if int(os.environ.get(f"PARALLELISM_CONFIG_{size}_SIZE", "1")) > 1:
            raise UserError(f"{what} parallelism is not supported: use dp_replicate_size and dp_shard_size alone")
    if not is_sharded():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP1 is not supported, it flattens the matrices: set fsdp_version: 2 (configs/accelerate)")
    if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        raise UserError("FSDP2 with CPU offload is not supported: set fsdp_offload_params: false")
    if config.optimizer not in ("adamw", *ZEROTH_ORDER):
        raise UserError(
            f"optimizer {config.optimizer} is of bitsandbytes, which does not know FSDP2: use adamw, or, on "
            "one GPU, configs/accelerate/single_gpu.yaml"
        )
    if config.mixed_precision == "fp16":
        raise UserError("mixed_precision fp16 is not supported under FSDP2: use bf16")
    if config.master_dtype == "bfloat16":
        raise UserError("master_dtype bfloat16 is not supported under FSDP2, which keeps fp32 masters: leave it out")


def build_accelerator(config: TrainConfig) -> Accelerator:
    """The Accelerator of a run, with its process group."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # transformers reads it at each call
    torch.use_deterministic_algorithms(config.deterministic)
    avoid_cudnn_attention()
    transformers_logging.set_verbosity_error()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision={"fp32": "no"}.get(config.mixed_precision, config.mixed_precision),
        step_scheduler_with_optimizer=False,
        log_with=config.trackers or None,
        project_dir=config.output_dir,
        fsdp_plugin=_fsdp2(config) if is_sharded() else None,
        kwargs_handlers=[
            # Each weight is used once a pass: a cache of 16-bit copies, kept until its end, would serve nothing. Under
            # gradient checkpointing it would hold all layers' copies at once.
            AutocastKwargs(cache_enabled=False),
            # find_unused_parameters keeps DDP from re-ordering its buckets after the first step: with 3 and more
            # processes a sum's rounding depends on that order, and a resumed run would differ.
            DistributedDataParallelKwargs(
                find_unused_parameters=True, broadcast_buffers=False, gradient_as_bucket_view=True
            ),
            InitProcessGroupKwargs(timeout=timedelta(hours=3)),  # others wait while one tokenises or saves
        ],
    )
    if accelerator.distributed_type not in (DistributedType.NO, *DDP, DistributedType.FSDP):
        raise UserError(f"{accelerator.distributed_type.value} is not supported: use one process, DDP or FSDP2")
    if is_sharded() and accelerator.distributed_type != DistributedType.FSDP:
        raise UserError(
            "FSDP2 is configured, but Accelerate starts it only for several processes on GPUs: "
            "use configs/accelerate/single_gpu.yaml or cpu.yaml, or torchrun for DDP on CPUs"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            f"Accelerate's configuration sets gradient_accumulation_steps {accelerator.gradient_accumulation_steps}: "
            "set it to 1, accumulation follows from global_batch_size"
        )
    if not accelerator.is_local_main_process:
        disable_progress_bar()
        transformers_logging.disable_progress_bar()
    return accelerator


def _fsdp2(config: TrainConfig) -> FullyShardedDataParallelPlugin:
    """Accelerate's plugin, the rest of it from the environment that `accelerate launch` makes of its YAML file."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # Accelerate's default for bf16 sums the gradients in bf16 too: many ties, and other masks than on one process.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        state_dict_type="SHARDED_STATE_DICT",
        mixed_precision_policy=policy if config.mixed_precision == "bf16" else None,
    )


def prepare(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """accelerator.prepare. Under DDP gradients lie in its buckets from the start, see steps.zero_gradients.

    A model without gradients is not wrapped by DDP, which would refuse it: there is nothing to reduce.
    """
    if accelerator.distributed_type in DDP:
        if not any(p.requires_grad for p in model.parameters()):
            return accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare(optimizer)
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None  # DDP moves what is there into its buckets
    return accelerator.prepare(model, optimizer)


def build_optimizer(config: TrainConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW, of torch or, with 8-bit moments, of bitsandbytes; or MeZO or SubZero. Weight decay is on matrices only."""
    if config.optimizer in ZEROTH_ORDER:
        rank = config.subzero_rank if config.optimizer == "subzero" else 0
        refresh_every = config.subzero_refresh_every
        rates = config.learning_rate, config.weight_decay, config.zo_epsilon
        return zeroth_order.ZerothOrder(model, *rates, rank, refresh_every, config.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    settings = {"lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings, fused=True)
    from bitsandbytes.optim import AdamW8bit

    return (AdamW8bit if config.optimizer == "adamw_8bit" else _paged_adamw_8bit())(groups, **settings)


def _paged_adamw_8bit() -> type[torch.optim.Optimizer]:
    """bitsandbytes' paged AdamW, whose moments are paged after a resume, too.

    Its own load_state_dict copies all moments to the GPU, where there may be no room for them, and leaves them there.
    """
    from bitsandbytes.optim import PagedAdamW8bit

    class Resumable(PagedAdamW8bit):
        def load_state_dict(self, state_dict, move_to_device=True):
            super().load_state_dict(state_dict, move_to_device=False)
            for p, state in self.state.items():
                for name, loaded in state.items():
                    if name in ("state1", "state2"):
                        state[name] = self.get_state_buffer(p, loaded.dtype).copy_(loaded)
                    elif isinstance(loaded, torch.Tensor):
                        state[name] = loaded.to(p.device)

    return Resumable


def any_process(happened: bool, accelerator: Accelerator) -> bool:
    """Whether it happened on any process: all have to go the same way. Every process has to make the call."""
    return bool(accelerator.reduce(torch.tensor(float(happened), device=accelerator.device), "sum") > 0)
