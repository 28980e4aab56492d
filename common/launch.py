"""How many processes run, as the environment says it."""

import os

from common.errors import UserError

# Where Accelerate looks for the number of processes, and what the same launcher sets beside it.
SIZES = {
    "WORLD_SIZE": ("RANK", "MASTER_ADDR", "MASTER_PORT"),
    "PMI_SIZE": ("PMI_RANK", "MASTER_ADDR", "MASTER_PORT"),
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_RANK", "MASTER_ADDR", "MASTER_PORT"),
    "MV2_COMM_WORLD_SIZE": ("MV2_COMM_WORLD_RANK", "MASTER_ADDR", "MASTER_PORT"),
}


def world_size() -> int:
    """WORLD_SIZE of the environment, 1 where there is none.

    Raises:
        UserError: it is not a positive integer.
    """
    return _number("WORLD_SIZE", 1)


def check_launch() -> None:
    """Raise UserError where the environment speaks of several processes that no launcher has started.

    Such a run would wait for the others, or fail in the middle of torch.distributed.
    """
    launched = all(_number(name, -1) >= 0 for name in ("RANK", "LOCAL_RANK")) and "MASTER_ADDR" in os.environ
    for name, others in {**SIZES, "LOCAL_RANK": ("RANK", "WORLD_SIZE", "MASTER_ADDR")}.items():
        value = _number(name, -1 if name == "LOCAL_RANK" else 1)
        several = value >= 0 if name == "LOCAL_RANK" else value > 1
        missing = [other for other in others if other not in os.environ]
        if several and missing and not launched:
            raise UserError(
                f"{name}={value} is set, {missing[0]} is not: left over from another launch? unset {name}, or start "
                "the processes with accelerate launch or torchrun"
            )


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    try:
        number = int(value or default)
    except ValueError:
        number = -1
    if value and number < (name in SIZES):
        raise UserError(f"{name}={value} in the environment is no number of processes: unset it")
    return number
