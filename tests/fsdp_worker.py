"""train.main under torchrun with FSDP2 on CPU processes: see test_distributed.py.

Accelerate builds FSDP for accelerators only. Its FSDP2 path itself runs on gloo, once its state says so.
"""

import os
import sys

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState

os.environ.update(  # as configs/accelerate/fsdp2.yaml has it
    ACCELERATE_USE_FSDP="true",
    FSDP_VERSION="2",
    FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    FSDP_RESHARD_AFTER_FORWARD=os.environ.get("RESHARD", "true"),
    FSDP_CPU_RAM_EFFICIENT_LOADING="true",
)
if replicate := os.environ.get("FSDP_REPLICATE"):
    os.environ.update(
        ACCELERATE_USE_PARALLELISM_CONFIG="true",
        PARALLELISM_CONFIG_DP_REPLICATE_SIZE=replicate,
        PARALLELISM_CONFIG_DP_SHARD_SIZE=str(int(os.environ["WORLD_SIZE"]) // int(replicate)),
    )
state_init = AcceleratorState.__init__


def fsdp_state(self, *args, fsdp_plugin=None, **kwargs):
    state_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:  # later calls only look the state up
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState().distributed_type = DistributedType.FSDP


AcceleratorState.__init__ = fsdp_state


def keep_weights(prepare):
    """backend.prepare, which stores what this process has of the model: bytes of weights before, its shards after."""

    def prepare_and_keep(accelerator, model, optimizer):
        held = {"read": sum(p.untyped_storage().nbytes() for p in model.parameters())}
        model, optimizer = prepare(accelerator, model, optimizer)
        held["shards"] = {n: p.to_local().detach().clone() for n, p in model.named_parameters()}
        held["buffers"] = dict(model.named_buffers())
        torch.save(held, f"{os.environ['WEIGHTS']}.{os.environ['RANK']}.pt")
        return model, optimizer

    return prepare_and_keep


if __name__ == "__main__":
    import worker  # the patches of the other distributed tests

    if "WEIGHTS" in os.environ:
        worker.train.backend.prepare = keep_weights(worker.train.backend.prepare)
    worker.main(sys.argv[1:])
    # DTensor's caches keep the process group, and with it gloo's threads. One that frees a tensor just when Python
    # ends takes the GIL too late, is unwound and aborts the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
