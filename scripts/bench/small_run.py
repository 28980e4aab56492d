"""A few steps of a small random model under Accelerate, as train.py takes them: what gpu_check.py compares.

    python scripts/bench/small_run.py [--precision fp16] [--masked_weights frozen] [--sharded] [--json FILE] ...

The environment says whether it is one of several processes. Every step sees the same examples, whatever their number,
so that the loss falls, and runs can be compared. Prints and saves, from the first process: the losses, the steps that
fp16's scaler skipped, a hash of the weights, and the largest number of weights that a step changed where its mask is 0.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
from scripts.bench.measure import allow_missing

allow_missing("datasets")
import torch.distributed as dist

import gmt
from common.config import TrainConfig
from scripts.bench import step as bench_step
from training.backend import build_accelerator, build_optimizer

KEEP_RATIO, EXAMPLES = 0.2, 8


def shard_on_a_cpu() -> None:
    """Accelerate builds FSDP for accelerators only; its FSDP2 path runs on a CPU, too, once its state says so."""
    from accelerate import DistributedType
    from accelerate.state import AcceleratorState, PartialState

    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState().distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def run(args: argparse.Namespace) -> dict:
    """Take the steps; what the module's head says."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not args.sharded:
        dist.init_process_group("gloo")  # NCCL refuses two processes on one GPU
    if args.sharded:
        os.environ.update(
            ACCELERATE_USE_FSDP="true",
            FSDP_VERSION="2",
            FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
            FSDP_RESHARD_AFTER_FORWARD="true",
            FSDP_CPU_RAM_EFFICIENT_LOADING="false",
        )
        if not torch.cuda.is_available():
            shard_on_a_cpu()
    config = TrainConfig(
        model="-", dataset="-", output_dir="-", rule="gmt", keep_ratio=KEEP_RATIO, learning_rate=1e-3,
        mixed_precision=args.precision, deterministic=args.deterministic, masked_weights=args.masked_weights,
    )  # fmt: skip
    accelerator = build_accelerator(config)
    torch.manual_seed(0)
    model = bench_step.LlamaForCausalLM(bench_step.architecture(args.shape)).train()
    optimizer = build_optimizer(config, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    names = accelerator.unwrap_model(model).named_parameters()
    masker = gmt.Masker(names, "gmt", KEEP_RATIO, masked_weights=args.masked_weights)
    parameters = list(model.parameters())
    vocabulary = accelerator.unwrap_model(model).config.vocab_size
    tokens = torch.randint(vocabulary, (EXAMPLES, args.length), generator=torch.Generator().manual_seed(0))
    mine = tokens[accelerator.process_index :: accelerator.num_processes].to(accelerator.device)
    if args.load:
        accelerator.load_state(args.load)
    losses, skipped, wrongly_changed = [], 0, 0
    for number in range(args.first, args.last):
        logits = model(mine).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits.float(), mine[:, 1:].flatten())
        accelerator.backward(loss)
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        accelerator.unscale_gradients()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        finite = math.isfinite(float(whole(norm)))
        skipped += not finite
        if finite:
            torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        if finite and args.masked_weights == "frozen":
            before = {name: p.detach().clone() for name, p in masker.eligible.items()}
            masker.step(optimizer.optimizer, number, check_finite=False)
            changed = [((p != before[n]) & (p.grad == 0)).sum() for n, p in masker.eligible.items()]
            wrongly_changed = max(wrongly_changed, int(sum(changed)))
        else:
            if finite:
                masker.mask_gradients(number, check_finite=False)
            optimizer.step()
        optimizer.zero_grad()
    if args.save:
        accelerator.save_state(args.save)
    digest = hashlib.sha256()
    for p in parameters:
        digest.update(whole(p.detach()).float().cpu().numpy().tobytes())
    is_main = accelerator.is_main_process
    accelerator.end_training()
    found = {"losses": losses, "skipped": skipped, "weights": digest.hexdigest(), "wrongly_changed": wrongly_changed}
    return found if is_main else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=bench_step.SHAPES, default="1m")
    parser.add_argument("--length", type=int, default=128, help="of an example")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--masked_weights", choices=("momentum", "frozen"), default="momentum")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--sharded", action="store_true", help="by FSDP2")
    parser.add_argument("--first", type=int, default=0, help="step")
    parser.add_argument("--last", type=int, default=10, help="step, not taken any more")
    parser.add_argument("--load", default="", help="a state that --save has made")
    parser.add_argument("--save", default="", help="save the state into this folder at the end")
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    if found := run(args):
        print(json.dumps(found))
        if args.json:
            Path(args.json).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
