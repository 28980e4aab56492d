"""Keys and values of a batch that grows by a token at a time, and whose rows end one by one."""

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 32  # tokens that a cache has room for beyond those that are there


class RoomyCache(DynamicCache):
    """transformers' cache with room behind what is there: a token's keys and values are written into it.

    transformers would copy all that are there: a seventh of a step of SmolLM2-135M with 32 rows on a CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = RoomyLayer

    def keep_rows(self, keep: list[int], padding: int) -> None:
        """Keep these rows, which fill the places of those that are gone as `places` says, without the first columns."""
        holes, movers = places(keep)
        for layer in self.layers:
            for name in ("keys", "values"):
                held = getattr(layer, name)  # (rows, heads, columns, size)
                if holes:
                    held[holes] = held[movers]
                setattr(layer, name, held[: len(keep), :, padding:])

    def append_rows(self, other: "RoomyCache", columns: int) -> None:
        """Put the rows of another cache behind these; the narrower of the two is padded on the left, to `columns`."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            for name in ("keys", "values"):
                both = [getattr(layer, name) for layer in (mine, theirs)]
                setattr(mine, name, torch.cat([pad(x, (0, 0, columns - x.shape[2], 0)) for x in both]))


class RoomyLayer(DynamicLayer):
    """The keys and values of one layer: views of tensors that may have more columns."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """All keys and values, with those of the new tokens, (rows, heads, new, size)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = _append(self.keys, key_states), _append(self.values, value_states)
        return self.keys, self.values


def places(keep: list[int]) -> tuple[list[int], list[int]]:
    """(holes, movers): which of the first len(keep) places become free, and which later rows move there."""
    n, kept = len(keep), set(keep)
    return [i for i in range(n) if i not in kept], [i for i in keep if i >= n]


def _append(held: Tensor, new: Tensor) -> Tensor:
    """held and, behind it, new: in held's own memory where that has room (it is no one else's)."""
    rows, heads, more, size = new.shape
    columns = held.shape[2] if held.numel() else 0
    # a view of a contiguous (rows, heads, all columns, size), whose first columns may have been dropped
    has_room = columns and held.storage_offset() // size + columns + more <= held.stride(1) // size
    if not has_room:
        space = new.new_empty(rows, heads, columns + more + ROOM, size)
        if columns:
            space[:, :, :columns] = held
        held = space[:, :, :columns]
    both = held.as_strided((rows, heads, columns + more, size), held.stride(), held.storage_offset())
    both[:, :, columns:] = new
    return both
