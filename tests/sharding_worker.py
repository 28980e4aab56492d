"""Masks on FSDP2 shards against those of the whole gradients, under torchrun: see test_sharding.py.

torchrun --nproc_per_node N tests/sharding_worker.py shard|hybrid
"""

import functools
import os
import sys

import torch
import torch.distributed as dist
from test_gmt import slow_mask
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM

import gmt


class Experts(nn.Module):
    """A stack of 3 x 2 matrices, fewer on dimension 0 than there may be processes."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 2, 5, 7))
        self.short = nn.Parameter(torch.randn(2, 7))  # an empty shard on the third process

    def forward(self, x):
        return (x * self.stack.sum((0, 1, 2))).sum() + (self.short * x[0]).sum()


def make(dtype: torch.dtype, mesh) -> nn.Module:
    """A tiny Llama whose dimensions do not divide, and experts; sharded, with gradients of one backward pass."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37, hidden_size=18, intermediate_size=29, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = nn.ModuleDict({"llama": LlamaForCausalLM(config), "experts": Experts()}).to(dtype)
    for layer in model["llama"].model.layers:
        fully_shard(layer, mesh=mesh)
    for part in model.values():
        fully_shard(part, mesh=mesh)
    ids = torch.arange(10).view(1, 10) + 10 * dist.get_rank() % 37
    model["llama"](input_ids=ids % 37, labels=ids % 37).loss.backward()
    model["experts"](torch.randn(4, 7, dtype=dtype)).backward()
    return model


def expected_masks(grads: dict[str, torch.Tensor], rule: str, scope: str) -> dict[str, torch.Tensor]:
    """The masks of whole gradients: by a full sort for gmt; by the unsharded Masker, tested elsewhere, for rmt."""
    if rule == "rmt":
        parameters = {n: nn.Parameter(torch.zeros_like(g)) for n, g in grads.items()}
        for n, p in parameters.items():
            p.grad = torch.ones_like(grads[n])
        gmt.Masker(parameters.items(), rule, 0.3, scope=scope, mask_vectors=True).mask_gradients(7)
        return {n: p.grad != 0 for n, p in parameters.items()}
    if scope == "model":
        everything = torch.cat([g.flatten() for g in grads.values()])
        mask = slow_mask(everything, gmt.keep_count(everything.numel(), 0.3)).split([g.numel() for g in grads.values()])
        return {n: m.view_as(g) for (n, g), m in zip(grads.items(), mask, strict=True)}
    masks = {}
    for n, g in grads.items():
        stack = g.reshape(-1, *g.shape[-2:]) if g.dim() > 2 else g.unsqueeze(0)
        masks[n] = torch.stack([slow_mask(x, gmt.keep_count(x.numel(), 0.3)) for x in stack]).view_as(g)
    return masks


def check_family(rule: str, model: nn.Module) -> None:
    """Weights and held masks over three steps against those of the whole model; a state fits other numbers of ranks."""
    options = {"mask_vectors": True, "lift_rank": 2, "seed": 3} | ({} if rule == "mofo" else {"refresh_every": 2})
    whole = {n: nn.Parameter(p.full_tensor().detach().clone()) for n, p in model.named_parameters()}
    maskers = [gmt.Masker(x, rule, 0.3, **options) for x in (model.named_parameters(), whole.items())]
    # one tensor after the other, so that vectorised code rounds alike at both sizes
    adamw = functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1, foreach=False)
    optimizers = [adamw(model.parameters()), adamw(whole.values())]
    for step in range(3):
        for i, (name, p) in enumerate(model.named_parameters()):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            whole[name].grad, p.grad = g, distribute_tensor(g, p.device_mesh, p.placements)
        for masker, optimizer in zip(maskers, optimizers, strict=True):
            masker.step(optimizer, step)
        for name, p in model.named_parameters():
            assert torch.equal(p.full_tensor(), whole[name]), (rule, step, name)
    states = [masker.state_dict() for masker in maskers]
    assert states[0]["chosen_at"] == states[1]["chosen_at"]
    assert states[0]["masks"].keys() == states[1]["masks"].keys() == (set() if rule == "mofo" else set(whole))
    for name, bits in states[0]["masks"].items():
        assert torch.equal(bits, states[1]["masks"][name]), (rule, name)
    loaded = gmt.Masker(model.named_parameters(), rule, 0.3, **options)
    loaded.load_state_dict(states[1])
    assert all(torch.equal(bits, loaded.state_dict()["masks"][name]) for name, bits in states[0]["masks"].items())


def main() -> None:
    dist.init_process_group("gloo")
    n = dist.get_world_size()
    if sys.argv[1] == "shard":
        mesh = init_device_mesh("cpu", (n,))
    else:
        mesh = init_device_mesh("cpu", (n // 2, 2), mesh_dim_names=("replicate", "shard"))
    gmt._SHARED_BINS = 5 << gmt._DIGIT_BITS  # several collectives
    for dtype in (torch.float32, torch.bfloat16):
        for rule in ("gmt", "rmt"):
            for scope in ("tensor", "model"):
                model = make(dtype, mesh)
                whole = {name: p.grad.full_tensor().clone() for name, p in model.named_parameters()}
                masks = expected_masks(whole, rule, scope)
                masker = gmt.Masker(model.named_parameters(), rule, 0.3, scope=scope, mask_vectors=True)
                stats = masker.mask_gradients(7, stats=True)
                kept = nonzero = energy = 0.0
                for name, p in model.named_parameters():
                    after = p.grad.full_tensor()
                    assert torch.equal(after, whole[name] * masks[name]), (dtype, rule, scope, name)
                    kept, nonzero = kept + masks[name].sum().item(), nonzero + after.count_nonzero().item()
                    energy += after.double().square().sum().item()
                total = sum(g.numel() for g in whole.values())
                assert stats["kept_fraction"] == kept / total
                assert all(stats["tensors"][n]["kept"] == mask.sum() for n, mask in masks.items())
                assert stats["kept_nonzero_fraction"] == nonzero / sum(g.count_nonzero().item() for g in whole.values())
                all_energy = sum(g.double().square().sum().item() for g in whole.values())
                assert abs(stats["energy_kept"] - energy / all_energy) < 1e-6
    # grad_square: the masks of the whole sums of squares; a state made here fits any other number of processes
    model = make(torch.float32, mesh)
    masker = gmt.Masker(model.named_parameters(), "grad_square", 0.3, mask_vectors=True)
    masker.calibrate()
    masks = expected_masks({n: p.grad.full_tensor().square() for n, p in model.named_parameters()}, "gmt", "tensor")
    masker.fix_masks()
    state = masker.state_dict()
    assert set(state["masks"]) == set(masks)
    for name, bits in state["masks"].items():
        assert torch.equal(gmt._unpack(bits, 0, masks[name].numel()), masks[name].flatten()), name
    loaded = gmt.Masker(model.named_parameters(), "grad_square", 0.3, mask_vectors=True)
    loaded.load_state_dict(state)
    for m in (masker, loaded):
        for p in model.parameters():
            p.grad.fill_(1.0)
        m.mask_gradients(5)
        assert all(torch.equal(p.grad.full_tensor() == 1, masks[n]) for n, p in model.named_parameters())
    for rule in ("sift", "gasdu", "shira", "super_tuning", "mofo", "lift"):
        check_family(rule, make(torch.float32, mesh))
    # frozen: what is not selected keeps its weight on every shard; what is selected gets the plain step
    model, plain = make(torch.float32, mesh), make(torch.float32, mesh)
    before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    whole = {name: p.grad.full_tensor().clone() for name, p in model.named_parameters()}
    masks = expected_masks(whole, "gmt", "tensor")
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.1) for m in (model, plain)]
    masker = gmt.Masker(model.named_parameters(), "gmt", 0.3, mask_vectors=True, masked_weights="frozen")
    masker.step(optimizers[0], 0)
    optimizers[1].step()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), torch.where(masks[name], q.full_tensor(), before[name])), name
        moment = optimizers[0].state[p]["exp_avg"].full_tensor()
        assert torch.equal(moment != 0, masks[name]), name
    # a NaN on one process is seen, and named, by all
    model = make(torch.float32, mesh)
    grad = model["experts"].short.grad.to_local()
    if grad.numel() and mesh.get_local_rank(mesh.ndim - 1) == 0:  # on one shard, and its replicas
        grad[0, 0] = float("nan")
    masker = gmt.Masker(model.named_parameters(), "gmt", 0.3)
    try:
        masker.mask_gradients(0)
        raise AssertionError("a NaN went through")
    except ValueError as e:
        assert "non-finite gradient in experts.short (1 of " in str(e), e
    # gradients of two dtypes are refused
    both = [(f"{d}.{n}", p) for d in (torch.float32, torch.bfloat16) for n, p in make(d, mesh).named_parameters()]
    try:
        gmt.Masker(both, "gmt", 0.3).mask_gradients(0)
        raise AssertionError("two dtypes were accepted")
    except ValueError as e:
        assert "all gradients must have one dtype" in str(e), e
    # other layouts are refused
    p = nn.Parameter(distribute_tensor(torch.randn(12, 12), init_device_mesh("cpu", (n,)), [Shard(1)]))
    p.grad = DTensor.from_local(torch.randn_like(p.to_local()), p.device_mesh, p.placements)
    try:
        gmt.Masker([("w", p)], "gmt", 0.3).mask_gradients(0, check_finite=False)
        raise AssertionError("Shard(1) was accepted")
    except ValueError as e:
        assert "the gradient of w is laid out as" in str(e)
    dist.barrier()
    print("all masks are those of the whole gradients", flush=True)
    os._exit(0)  # gloo's threads sometimes abort a process with meshes at its very end: see fsdp_worker.py


if __name__ == "__main__":
    main()
