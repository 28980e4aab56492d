"""train.main under torchrun with FSDP2 on CPU processes: see test_distributed.py.

Accelerate builds FSDP for accelerators only. Its FSDP2 path itself runs on gloo, once its state says so.
"""

import os
import sys

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

if __name__ == "__main__":
    import worker  # the patches of the other distributed tests

    worker.main(sys.argv[1:])
