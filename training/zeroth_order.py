"""Zeroth-order optimization: forward passes alone, at w + eps z and w - eps z, along one random direction z for a step.

    g = (L(w + eps z) - L(w - eps z)) / (2 eps)      a number; L is the loss of the whole global batch
    w <- w - lr (g z + weight_decay w)

MeZO (Malladi et al., NeurIPS 2023, arXiv 2305.17333): z is Gaussian. SubZero (Yu et al., ICCV 2025, arXiv 2410.08989):
for a matrix z = U Z V^T, Z (r x r) Gaussian, U (m x r) and V (n x r) with orthonormal columns, drawn anew every F
steps; for a vector, or a matrix with a side of r or less, z is Gaussian.

No gradient and no moment is ever in memory, and z, U and V are made again from (seed, step, the parameter's name)
wherever they are needed: the same on every process with the same kind of device, and after a resume.

A pass never writes to the weights. While a module's forward runs, and no longer, w + eps z stands in the place of w: a
copy of one module's weights at a time. So w is exactly what it was, in every dtype. MeZO's own code adds and subtracts
in place, whose rounding stays in 16-bit weights.
"""

import hashlib
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

import gmt
from training.losses import evaluating
from training.objectives import Objective

if TYPE_CHECKING:
    from training.steps import Batches  # which imports backend, which builds the optimizer


class ZerothOrder(torch.optim.Optimizer):
    """MeZO, or SubZero with a rank above 0: `estimate` takes the place of a backward pass, then `step` moves w along z.

    Args:
        model: not wrapped yet; its parameters that require gradients are trained, and require them no more.
        weight_decay: of matrices.
        rank, refresh_every: SubZero's r and F.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay=0.0, epsilon=1e-3, rank=0, refresh_every=1000, seed=0):
        self.epsilon, self.rank, self.refresh_every, self.seed = epsilon, rank, refresh_every, seed
        self.at, self.scale, self.projected_gradient = 0, 0.0, None
        self._bases: dict[str, tuple[int, Tensor, Tensor]] = {}  # SubZero's (drawn at step, U, V)
        self._weights: list[dict[str, nn.Parameter]] = []  # of the modules whose forward is running
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices, vectors = ([(n, p) for n, p in trained if (p.dim() >= 2) == is_matrix] for is_matrix in (True, False))
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        super().__init__([group for group in groups if group["params"]], {"lr": lr})
        names = {id(p): name for name, p in trained}  # a tied weight has one name, and one z
        for module in model.modules():
            own = {a: names[id(p)] for a, p in module.named_parameters(recurse=False) if id(p) in names}
            if own:
                module.register_forward_pre_hook(partial(self._replace, own))
                module.register_forward_hook(self._put_back)
        model.requires_grad_(False)

    def estimate(self, model: nn.Module, batches: "Batches", objective: Objective, accelerator: Accelerator) -> Tensor:
        """Compute the g of a step, without dropout, as in MeZO. Every process has to make the call.

        Returns:
            This process's sums of the loss and of the metrics, fp64, each the mean of the two passes'.
        """
        self.at = batches.step
        sums = torch.zeros(2, 1 + len(objective.metrics), dtype=torch.float64, device=accelerator.device)
        model = accelerator.unwrap_model(model)
        with evaluating(model):
            for sign, row in zip((1, -1), sums, strict=True):
                self.scale = sign * self.epsilon
                for batch in batches.micro:
                    loss, metrics = objective(model(**batch.inputs).double(), batch.ids)
                    row += torch.stack([x.double() for x in (loss, *metrics)])
        self.scale = 0.0
        plus, minus = (accelerator.reduce(sums[:, 0], "sum") / objective.count(batches.ids)).tolist()
        self.projected_gradient = (plus - minus) / (2 * self.epsilon)
        return sums.mean(0)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move the weights by the latest estimate, once."""
        if self.projected_gradient is None:  # a checkpoint's loading takes a step, to see an optimizer's state
            return
        for group in self.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                move = self.direction(name, p.shape, p.dtype, p.device).mul_(-group["lr"] * self.projected_gradient)
                p.add_(_laid_out_like(p, move))
        self.projected_gradient = None

    def direction(self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The z of a whole parameter at this step, in fp32, or fp64 for fp64 weights."""
        dtype = torch.promote_types(dtype, torch.float32)
        draw = partial(_gaussian, dtype=dtype, device=device)
        if not self.rank or len(shape) < 2 or min(shape[-2:]) <= self.rank:
            return draw(shape, (self.seed, self.at, name))
        drawn_at, *bases = self._bases.get(name, (-1,))
        if drawn_at != (start := self.at - self.at % self.refresh_every):
            sides = [(*shape[:-2], side, self.rank) for side in shape[-2:]]
            bases = [torch.linalg.qr(draw(s, (self.seed, start, name, i))).Q for i, s in enumerate(sides)]
            self._bases[name] = start, *bases
        u, v = bases
        return u @ draw((*shape[:-2], self.rank, self.rank), (self.seed, self.at, name)) @ v.mT

    # What Clipping is to a gradient. g says nothing of a norm: it is logged under its own name.

    def before_masking(self) -> float:
        """g, which nothing clips."""
        return self.projected_gradient

    def after_masking(self) -> None:
        """Nothing."""

    def norms(self, before_masking: float, measure: bool) -> dict[str, float]:
        """What is logged of a step."""
        return {"projected_gradient": before_masking}

    def _replace(self, names: dict[str, str], module: nn.Module, args: Any) -> None:
        if not self.scale:
            return
        weights = {attribute: getattr(module, attribute) for attribute in names}
        self._weights.append(weights)
        for attribute, w in weights.items():
            z = self.direction(names[attribute], w.shape, w.dtype, w.device)
            moved = z.mul_(self.scale).add_(w).to(w.dtype)
            setattr(module, attribute, nn.Parameter(moved, requires_grad=False))

    def _put_back(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.scale:
            for attribute, w in self._weights.pop().items():
                setattr(module, attribute, w)


def _gaussian(shape: Iterable[int], key: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normal numbers, a function of the arguments."""
    number = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(number, "little") >> 1)
    return torch.randn(tuple(shape), generator=generator, dtype=dtype, device=device)


def _laid_out_like(p: Tensor, whole: Tensor) -> Tensor:
    """This process's part of a tensor that every process has, where p is sharded; without communication."""
    if not isinstance(p, DTensor):
        return whole
    replicated = DTensor.from_local(whole, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
    return replicated.redistribute(placements=p.placements)


class NoMasks(gmt.Masker):
    """Stands where a run with gradients has its Masker: there is nothing to mask, and nothing to count."""

    def __init__(self, optimizer: str, model: nn.Module):
        super().__init__(model.named_parameters(), "none")
        self.optimizer = optimizer

    def mask_gradients(self, step: int, **unused: Any) -> None:
        """Nothing."""

    def summary(self) -> str:
        """How the model is trained, for people."""
        return f"optimizer {self.optimizer}: two forward passes a step, no gradients and no masks"
