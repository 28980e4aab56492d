"""The method: pytest tests/test_gmt.py"""

import itertools
import math
import typing

import pytest
import torch
from torch import nn

import gmt

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def slow_mask(scores: torch.Tensor, k: int) -> torch.Tensor:
    """DESIGN in one line: M = |G| >= (k-th largest |G|) and G != 0, by a full sort."""
    return (scores.abs() >= scores.abs().flatten().sort(descending=True).values[k - 1]) & (scores != 0)


def tensors(dtype):
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(300, 400, generator=g, dtype=torch.float64)
    yield "random", normal.to(dtype)
    yield "heavy-tailed", (normal / torch.rand(300, 400, generator=g, dtype=torch.float64)).to(dtype)
    yield "constant", torch.full((40, 30), -0.5, dtype=dtype)
    yield "zero", torch.zeros(30, 20, dtype=dtype)
    yield "minus zero", -torch.zeros(30, 20, dtype=dtype)
    yield "denormal", torch.randint(-9, 10, (50, 40), generator=g).to(dtype) * torch.finfo(dtype).smallest_normal / 16
    yield "tied", torch.randint(-3, 4, (200, 500), generator=g).to(dtype)
    yield "mostly zero", (normal * (torch.rand(300, 400, generator=g) < 0.05)).to(dtype)
    yield "one entry", torch.tensor([[-2.5]], dtype=dtype)
    yield "vector", normal[0].to(dtype)
    yield "scalar", torch.tensor(3.0, dtype=dtype)
    yield "transposed", normal.to(dtype).t()
    yield "strided", normal.to(dtype)[::3, 1::7]
    yield "stack", normal.to(dtype).view(3, 100, 400)
    yield "extremes", torch.tensor([[torch.finfo(dtype).max, -torch.finfo(dtype).tiny, 1, -0.0]], dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["kthvalue", "bracket", "missed bracket", "bincount", "histc", "histc of 11 bits"])
def test_mask_is_that_of_a_full_sort(dtype, path, monkeypatch):
    """Each of the ways to the threshold, on every kind of tensor, with chunks smaller than the tensor."""
    monkeypatch.setitem(gmt._CHUNK, "cpu", 1000)
    monkeypatch.setattr(gmt, "_SORT_BELOW", 10**9 if path == "kthvalue" else 0)
    if path == "missed bracket":
        monkeypatch.setattr(gmt, "_bracket", lambda sample, share: (int(sample.max()) // 2, int(sample.max()) - 1))
    if path == "histc of 11 bits":
        monkeypatch.setattr(gmt, "_DIGIT_BITS", 11)
    if path == "bincount" or path.startswith("histc"):
        monkeypatch.setattr(gmt, "_kth_in_bracket", lambda *args: None)
    if path.startswith("histc"):  # the GPU's way, on the CPU
        monkeypatch.setattr(torch, "bincount", histc_instead_of_bincount)
    for name, t in tensors(dtype):
        for ratio in (1e-9, 0.05, 0.2, 0.5, 0.999, 1.0):
            k = gmt.keep_count(t.numel(), ratio)
            assert torch.equal(gmt.topk_mask(t, k), slow_mask(t, k)), (name, ratio)


def histc_instead_of_bincount(keys, minlength):
    return torch.histc(keys.float(), bins=minlength, min=0.5, max=minlength + 0.5).long().roll(1)


def test_gpu_histogram_counts_as_the_cpu_one():
    """The branch for GPUs, called with a tensor that says it is on one."""

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    keys = torch.randint(0, 2**31 - 1, (5000,), dtype=torch.int32)
    keys[:700] = keys[0]
    keys[-900:] = 0
    for shift, width, prefix in ((16, 15, None), (0, 16, keys[0] >> 16), (20, 11, None), (9, 11, keys[0] >> 20)):
        here, there = (gmt._histogram(k, shift, width, prefix) for k in (keys, keys.as_subclass(Elsewhere)))
        assert int(here.sum()) == 5000 if prefix is None else 700 <= int(here.sum()) < 1000
        here[0] = 0
        assert torch.equal(here, there.as_subclass(torch.Tensor))


def test_empty_and_wrong_k():
    assert gmt.topk_mask(torch.zeros(0, 5), 1).shape == (0, 5)
    for k in (0, 7):
        with pytest.raises(ValueError, match="between 1 and the 6 entries"):
            gmt.topk_mask(torch.ones(2, 3), k)


def test_keep_count():
    assert [gmt.keep_count(n, r) for n, r in ((10, 0.26), (1, 0.01), (7, 1.0), (1000, 0.2))] == [3, 1, 7, 200]


def test_ties_are_all_kept():
    assert gmt.topk_mask(torch.tensor([3.0, -2, 2, 1]), 2).tolist() == [True, True, True, False]


def test_magnitude_keys_order():
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-38, 0.5, -0.6, 3e38, float("-inf"), float("nan")])
    keys = gmt.magnitude_keys(values).tolist()
    assert keys == sorted(keys) and keys[0] == keys[1] == 0


def test_temporary_memory_does_not_grow_with_the_tensor(monkeypatch):
    """The largest integer tensor that a selection makes is a chunk or a histogram."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else [out]:
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                    self.entries = max(self.entries, t.numel())
            return out

    p = nn.Parameter(torch.zeros(3000, 1000))
    p.grad = torch.randn_like(p)
    given = {t.untyped_storage().data_ptr() for t in (p.data, p.grad)}  # views of them are no memory
    for rule in ("gmt", "rmt"):
        with Largest() as largest, torch.no_grad():
            gmt.Masker([("w", p)], rule, 0.2).mask_gradients(0, check_finite=False)
        # mul_ returns a chunk of the gradient itself, a view
        assert largest.entries <= max(gmt._CHUNK["cpu"], 2**16), rule


def readings(monkeypatch, masker) -> int:
    """How often a masker goes through the scores of its one matrix."""
    seen, chunks = [], gmt._Scorer.chunks

    def look(self, m):
        seen.append(m.grad.numel())
        return chunks(self, m)

    monkeypatch.setattr(gmt._Scorer, "chunks", look)
    masker.mask_gradients(0)
    (p,) = masker.eligible.values()
    return seen.count(p.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["random", "heavy-tailed", "rows", "mostly zero", "constant"])
def test_a_threshold_takes_one_reading(kind, dtype, monkeypatch):
    g = torch.Generator().manual_seed(0)
    grad = torch.randn(500, 700, generator=g)
    grad = {
        "random": grad,
        "heavy-tailed": grad / torch.rand(500, 700, generator=g),
        "rows": grad * torch.arange(500).view(-1, 1),  # with sizes of their own
        "mostly zero": grad * (torch.arange(500) < 20).view(-1, 1),  # an embedding's
        "constant": torch.full((500, 700), -0.5),
    }[kind].to(dtype)
    p = nn.Parameter(torch.zeros(500, 700, dtype=dtype))
    p.grad = grad.clone()
    assert readings(monkeypatch, gmt.Masker([("w", p)], "gmt", 0.2)) == 1
    assert torch.equal(p.grad, grad * slow_mask(grad, 70000))


def test_random_masks_take_one_reading_too(monkeypatch):
    p = nn.Parameter(torch.zeros(500, 700))
    p.grad = torch.ones(500, 700)
    assert readings(monkeypatch, gmt.Masker([("w", p)], "rmt", 0.2)) == 2  # and one to apply the mask
    assert p.grad.sum() == 70000


def test_a_bracket_with_too_many_equal_keys_is_given_up():
    keys = torch.arange(1 << 20, dtype=torch.int32) % 3
    assert gmt._kth_in_bracket(keys.split(1 << 18), 0, 1, 1 << 19, 1 << 20) is None
    assert gmt._kth_in_bracket(keys.split(1 << 18), 1, 1, 1 << 19, 1 << 20) == 1  # of one key they are but counted


@pytest.mark.parametrize("rule", ["gmt", "rmt", "mofo", "super_tuning"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_nothing_waits_for_a_gpu(rule, scope, monkeypatch):
    """On tensors without values, which take the GPU's way: what would wait for a value raises, as do copies to it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoCopies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [t for t in (*args, out) if isinstance(t, torch.Tensor) and t.dim()]
            assert len({t.device.type for t in tensors}) < 2, f"{func} copies between host and device"
            return out

    def refuse(*args, **kwargs):
        raise AssertionError("copies a list to the device")

    parameters = [(str(i), nn.Parameter(torch.zeros(300, 400, device="meta"))) for i in range(3)]
    for _, p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW([p for _, p in parameters], foreach=False)
    masker = gmt.Masker(parameters, rule, 0.2, scope=scope, masked_weights="momentum")
    monkeypatch.setattr(torch, "tensor", refuse)
    monkeypatch.setattr(torch.Tensor, "new_tensor", refuse)
    with NoCopies():
        masker.mask_gradients(0, optimizer=optimizer, check_finite=False)
        with pytest.raises(AssertionError, match="copies between host and device"):  # it is seen
            parameters[0][1].detach().copy_(torch.zeros(300, 400))
    for waits in ({"check_finite": True}, {"stats": True, "check_finite": False}):
        with pytest.raises((RuntimeError, NotImplementedError), match=r"item\(\)|meta"):
            masker.mask_gradients(0, optimizer=optimizer, **waits)


# --- Masker ----------------------------------------------------------------------------------------------------------


def model_with_grads(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = nn.ModuleDict(
        {"embed": nn.Embedding(50, 8), "up": nn.Linear(8, 24), "norm": nn.LayerNorm(24), "down": nn.Linear(24, 8)}
    ).to(dtype)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    model["embed"].weight.grad[3:] = 0  # unseen words
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gmt_keeps_the_largest_of_each_matrix_and_leaves_vectors(dtype):
    model = model_with_grads(dtype)
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    gmt.Masker(model.named_parameters(), "gmt", 0.2).mask_gradients(0)
    for n, p in model.named_parameters():
        g = before[n]
        expected = g * slow_mask(g, gmt.keep_count(g.numel(), 0.2)) if g.dim() == 2 else g
        assert torch.equal(p.grad, expected), n
    assert (model["embed"].weight.grad != 0).sum() == 24  # 20 % are 80, but only 3 rows have a gradient


def test_scope_model_has_one_threshold():
    model = model_with_grads()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.dim() == 2}
    everything = torch.cat([g.flatten() for g in grads.values()])
    mask = slow_mask(everything, gmt.keep_count(everything.numel(), 0.3))
    gmt.Masker(model.named_parameters(), "gmt", 0.3, scope="model").mask_gradients(0)
    after = torch.cat([p.grad.flatten() for n, p in model.named_parameters() if n in grads])
    assert torch.equal(after, everything * mask)


def test_exclude_and_mask_vectors():
    model = model_with_grads()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    masker = gmt.Masker(model.named_parameters(), "gmt", 0.5, exclude=["embed*"], mask_vectors=True)
    masker.mask_gradients(0)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p.grad, before[n])}
    assert changed == {n for n in before if not n.startswith("embed")}
    assert "up.weight" in masker.summary() and "embed" not in masker.summary()
    with pytest.raises(ValueError, match="'emb' matches none"):
        gmt.Masker(model.named_parameters(), "gmt", 0.5, exclude=["emb"])


def test_exclude_takes_any_iterable_but_no_text():
    model = model_with_grads()
    assert not gmt.Masker(model.named_parameters(), "gmt", 0.5, exclude=(p for p in ["*"])).eligible
    with pytest.raises(ValueError, match="list of patterns, got the text '\\*'"):
        gmt.Masker(model.named_parameters(), "gmt", 0.5, exclude="*")


def test_names_stay_apart():
    parameters = [("weight", nn.Parameter(torch.zeros(2, 2))), ("module.weight", nn.Parameter(torch.zeros(2, 2)))]
    assert gmt.Masker(parameters, "gmt", 0.5).eligible.keys() == {"weight", "module.weight"}


def test_stack_of_matrices_has_a_threshold_each():
    p = nn.Parameter(torch.zeros(4, 10, 20))
    p.grad = torch.randn(4, 10, 20) * torch.tensor([1.0, 10, 100, 1000]).view(4, 1, 1)
    expected = torch.stack([g * slow_mask(g, 40) for g in p.grad])
    gmt.Masker([("experts", p)], "gmt", 0.2).mask_gradients(0)
    assert torch.equal(p.grad, expected)


def test_rmt_keeps_exactly_k_at_random(monkeypatch):
    p = nn.Parameter(torch.zeros(200, 300))
    masks = {}
    for name, seed, step in itertools.product("ab", (0, 1), (0, 1)):
        p.grad = torch.ones_like(p)
        gmt.Masker([(name, p)], "rmt", 0.2, seed=seed).mask_gradients(step)
        masks[name, seed, step] = p.grad != 0
        assert int(masks[name, seed, step].sum()) == 12000
    for (k1, m1), (k2, m2) in itertools.combinations(masks.items(), 2):
        overlap = int((m1 & m2).sum())  # independent masks share 0.2 * 12000 entries, with sd about 39
        assert abs(overlap - 2400) < 5 * 39, (k1, k2)
    # every row and column has its share: chi-squared of row counts against 60 each, 199 degrees of freedom
    for counts, n in ((masks["a", 0, 0].sum(1), 300), (masks["a", 0, 0].sum(0), 200)):
        chi2 = float(((counts - 0.2 * n) ** 2 / (0.2 * 0.8 * n)).sum())
        assert abs(chi2 - len(counts)) < 5 * math.sqrt(2 * len(counts))
    # the same with other chunks: the number of an entry depends on its place alone
    monkeypatch.setitem(gmt._CHUNK, "cpu", 1000)
    p.grad = torch.ones_like(p)
    gmt.Masker([("a", p)], "rmt", 0.2, seed=0).mask_gradients(0)
    assert torch.equal(p.grad != 0, masks["a", 0, 0])


def test_random_scores_are_pinned():
    """A change of the hash would break the resumption of RMT runs."""
    scores = gmt.score_random(gmt.Entries(torch.zeros(4), torch.zeros(4), 10, 7)).tolist()
    assert scores == gmt.score_random(gmt.Entries(torch.zeros(8), torch.zeros(8), 6, 7))[4:].tolist()
    assert scores == [1915592351, 237355098, 615727587, 64217843]


def slow_random(seed: int, offset: int, n: int) -> list[int]:
    """The random scores in Python's integers, which do not overflow."""
    scores = []
    for x in range(offset, offset + n):
        for r, odd in enumerate((0x2C1B3C6D, 0x297A2D39, 0x7FEB352D)):
            x = (((x ^ gmt._mix64(seed + r)) & (2**31 - 1)) * odd) & (2**31 - 1)
            x ^= x >> 15
        scores.append(x)
    return scores


def test_random_scores_equal_their_definition():
    """Also where offsets pass 2**31, as in a large stack of experts."""
    for offset in (0, 2**31 - 3, 2**40 + 1):
        got = gmt.score_random(gmt.Entries(torch.zeros(6), torch.zeros(6), offset, 7)).tolist()
        assert got == slow_random(7, offset, 6)


def test_one_threshold_for_gradients_of_two_dtypes_is_refused():
    """Their keys have different widths."""
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8).to(torch.bfloat16)})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    gmt.Masker(model.named_parameters(), "gmt", 0.2).mask_gradients(0)
    with pytest.raises(ValueError, match="all gradients must have one dtype"):
        gmt.Masker(model.named_parameters(), "gmt", 0.2, scope="model").mask_gradients(0)


def test_wrapped_names_give_the_same_masks():
    masks = []
    for name in ("w", "module.w", "module._orig_mod.w"):
        p = nn.Parameter(torch.zeros(50, 50))
        p.grad = torch.ones_like(p)
        gmt.Masker([(name, p)], "rmt", 0.3).mask_gradients(5)
        masks.append(p.grad)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


def test_keep_ratio_one_is_plain_adamw_bit_for_bit():
    weights = []
    for rule, ratio in (("none", None), ("gmt", 1.0), ("rmt", 1.0)):
        model = model_with_grads()
        masker = gmt.Masker(model.named_parameters(), rule, ratio)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for step in range(5):
            for i, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            masker.mask_gradients(step)
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


OPTIMIZERS = {
    "single": (torch.optim.AdamW, {"foreach": False, "fused": False}),
    "foreach": (torch.optim.AdamW, {"foreach": True}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True, "foreach": False}),
    "decay in the gradient": (torch.optim.Adam, {}),  # a masked entry's moments move, also at the first step
}


@pytest.mark.parametrize("rule", ["gmt", "rmt"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_frozen_entries_keep_weight_and_moments_and_the_others_get_plain_adamw(rule, kind):
    """Every entry, followed through many steps against the optimizer's own step from the same state."""
    import copy

    model = model_with_grads()
    groups = [{"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": 0.1}]
    groups += [{"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    cls, settings = OPTIMIZERS[kind]
    optimizer = cls(groups, lr=0.01, **settings)
    names = [n for n, _ in model.named_parameters()]
    masker = gmt.Masker(model.named_parameters(), rule, 0.2, masked_weights="frozen")
    ever_frozen = ever_moved = 0
    for step in range(12):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        plain_model, plain = copy.deepcopy((model, optimizer))
        for p, q in zip(model.parameters(), plain_model.parameters(), strict=True):
            q.grad = p.grad.clone()
        gmt.Masker(plain_model.named_parameters(), rule, 0.2).mask_gradients(step)
        before = copy.deepcopy(([p.detach() for p in model.parameters()], optimizer.state_dict()["state"]))
        plain.step()
        stats = masker.step(optimizer, step, stats=True)
        assert abs(stats["kept_fraction"] - 0.2) < 0.01
        for name, p, q, old in zip(names, model.parameters(), plain_model.parameters(), before[0], strict=True):
            assert torch.equal(p.grad, q.grad)
            if p.dim() < 2:
                assert torch.equal(p, q), name
                continue
            kept = q.grad != 0
            state, plain_state = optimizer.state[p], plain.state[q]
            index = next(i for i, x in enumerate(optimizer.param_groups[0]["params"]) if x is p)
            pairs = [(p, q, old)]
            for key in state:
                if key != "step":
                    zero = torch.zeros_like(p)
                    pairs.append((state[key], plain_state[key], before[1].get(index, {}).get(key, zero)))
            for now, expected, then in pairs:
                assert torch.equal(now[kept], expected[kept]) and torch.equal(now[~kept], then[~kept]), (name, step)
            assert state["step"] == plain_state["step"] == step + 1
            ever_frozen, ever_moved = ever_frozen + (~kept).sum(), ever_moved + kept.sum()
    assert ever_frozen > 2000 and ever_moved > 500
    assert [len(g["params"]) for g in optimizer.param_groups] == [3, 4]  # the groups are whole again


@pytest.mark.parametrize("bits", [32, 8])
def test_frozen_under_bitsandbytes(bits):
    """32-bit AdamW as torch's; at 8 bit, whose moments share block scales, only the weights are frozen."""
    bnb = pytest.importorskip("bitsandbytes")
    p = nn.Parameter(torch.randn(128, 128, generator=torch.Generator().manual_seed(0)))
    optimizer = {32: bnb.optim.AdamW32bit, 8: bnb.optim.AdamW8bit}[bits]([p], lr=0.01, weight_decay=0.1)
    masker = gmt.Masker([("w", p)], "gmt", 0.2, masked_weights="frozen")
    for step in range(4):
        p.grad = torch.randn(128, 128, generator=torch.Generator().manual_seed(step))
        old = p.detach().clone()
        moments = {k: optimizer.state[p][k].clone() for k in ("state1", "state2") if step}
        masker.step(optimizer, step)
        kept = p.grad != 0
        assert torch.equal(p.detach()[~kept], old[~kept]) and (p.detach()[kept] != old[kept]).all()
        frozen = [torch.equal(optimizer.state[p][k][~kept], m[~kept]) for k, m in moments.items()]
        assert all(frozen) if bits == 32 else not any(frozen)


def test_frozen_with_keep_ratio_one_is_plain_adamw():
    weights = []
    for frozen in (False, True):
        model = model_with_grads()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        masker = gmt.Masker(model.named_parameters(), "gmt", 1.0, masked_weights="frozen")
        for step in range(4):
            for i, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            if frozen:
                masker.step(optimizer, step)
            else:
                optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


# --- The family of rules ---------------------------------------------------------------------------------------------


class SlowTwin:
    """One matrix under a rule of the family and AdamW, from their equations, in fp64, with full sorts.

    Written for score, refresh_every and masked_weights as the papers have them, not as gmt.RULES does.
    """

    equations: typing.ClassVar = {  # rule: score of (G, W, m after this step), refresh_every, what a masked weight does
        "gmt": (lambda s: s.g, 1, "momentum"),
        "rmt": (lambda s: s.random(), 1, "momentum"),
        "sift": (lambda s: s.g, 0, "momentum"),
        "gasdu": (lambda s: s.g, 50, "momentum"),
        "shira": (lambda s: s.random(), 0, "momentum"),
        "super_tuning": (lambda s: s.w, 0, "momentum"),
        "mofo": (lambda s: s.next_m, 1, "update"),
        "lift": (lambda s: s.rank_r(), 200, "frozen"),
        "grad_square": (lambda s: s.squares, 0, "momentum"),
        "weight_gradient": (lambda s: s.w * s.g, 1, "momentum"),
    }
    lr, beta1, beta2, eps, decay = 0.01, 0.9, 0.999, 1e-8, 0.1

    def __init__(self, name, w, rule, k, seed, refresh_every=None, masked_weights=None):
        self.name, self.w, self.k, self.seed = name, w.clone(), k, seed
        self.score, self.every, self.masked = self.equations[rule]
        self.every = self.every if refresh_every is None else refresh_every
        self.masked = masked_weights or self.masked
        self.m, self.v, self.mask, self.t = torch.zeros_like(w), torch.zeros_like(w), None, 0
        self.squares = torch.zeros_like(w)  # of the gradients before the first step

    def random(self):
        import zlib

        seed = gmt._mix64(gmt._mix64(gmt._mix64(self.seed) ^ self.t) ^ zlib.crc32(self.name.encode()))
        return torch.tensor(slow_random(seed, 0, self.w.numel()), dtype=torch.float64).view_as(self.w)

    def rank_r(self):
        u, s, v = torch.linalg.svd(self.w)
        return sum(s[i] * torch.outer(u[:, i], v[i]) for i in range(3))

    def step(self, g):
        self.g, self.next_m = g, self.beta1 * self.m + (1 - self.beta1) * g
        if self.mask is None or (self.every and self.t % self.every == 0):
            self.mask = slow_mask(self.score(self), self.k)
        seen = g if self.masked == "update" else g * self.mask
        m, v = self.beta1 * self.m + (1 - self.beta1) * seen, self.beta2 * self.v + (1 - self.beta2) * seen**2
        self.t += 1
        step = (m / (1 - self.beta1**self.t)) / ((v / (1 - self.beta2**self.t)).sqrt() + self.eps)
        w = self.w * (1 - self.lr * self.decay) - self.lr * step
        where = lambda new, old: torch.where(self.mask, new, old)  # noqa: E731
        self.w = w if self.masked == "momentum" else where(w, self.w)
        self.m, self.v = (where(m, self.m), where(v, self.v)) if self.masked == "frozen" else (m, v)


def family(rule, **axes):
    """A model of two matrices, its masker and AdamW, in fp64; and a function that draws a step's gradients."""
    torch.manual_seed(1)
    model = nn.ModuleDict({"a": nn.Linear(12, 9, bias=False), "b": nn.Linear(9, 14, bias=False)}).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=SlowTwin.lr, weight_decay=SlowTwin.decay)
    masker = gmt.Masker(model.named_parameters(), rule, 0.3, lift_rank=3, seed=5, **axes)

    def draw(step):
        for i, p in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + i)
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)

    return model, optimizer, masker, draw


@pytest.mark.parametrize(
    ("rule", "axes"),
    [
        *((rule, {}) for rule in SlowTwin.equations),
        *((rule, {"refresh_every": 3}) for rule in ("gmt", "rmt", "super_tuning", "mofo", "lift")),
        *((rule, {"masked_weights": how}) for rule in ("gmt", "sift", "mofo") for how in gmt.MASKED_WEIGHTS),
    ],
)
def test_each_rule_is_that_of_its_equation(rule, axes):
    model, optimizer, masker, draw = family(rule, **axes)
    twins = [
        SlowTwin(n, p.detach(), rule, gmt.keep_count(p.numel(), 0.3), 5, **axes) for n, p in model.named_parameters()
    ]
    for step in (50, 51) if masker.needs_calibration else ():
        draw(step)
        masker.calibrate()
        for twin, p in zip(twins, model.parameters(), strict=True):
            twin.squares += p.grad**2
    if masker.needs_calibration:
        masker.fix_masks()
    for step in range(8):
        draw(step)
        grads = [p.grad.clone() for p in model.parameters()]
        masker.step(optimizer, step)
        for twin, p, g in zip(twins, model.parameters(), grads, strict=True):
            twin.step(g)
            torch.testing.assert_close(p.detach(), twin.w, rtol=0, atol=1e-13)
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], twin.m, rtol=0, atol=1e-13)
            assert torch.equal(p.grad, g if twin.masked == "update" else g * twin.mask)


def test_the_twin_has_every_rule_that_masks():
    masking = {rule for rule in gmt.rules() if gmt.masks_entries(rule)}
    assert masking == SlowTwin.equations.keys(), "an equation for each rule and score: enter yours"
    assert gmt.RULES.keys() - masking == {"none", "hft"}  # see below


@pytest.mark.parametrize("rule", ["none", "hft"])
def test_without_masks_it_is_adamw_of_what_is_trained(rule):
    model = llama(2).double()
    frozen = gmt.freeze_half(model, seed=3) if rule == "hft" else []
    trained = {n: p for n, p in model.named_parameters() if n not in frozen}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    twins = {n: SlowTwin(n, p.detach(), "gmt", p.numel(), 0) for n, p in trained.items()}  # k: all of them
    optimizer = torch.optim.AdamW(trained.values(), lr=SlowTwin.lr, weight_decay=SlowTwin.decay)
    masker = gmt.Masker(model.named_parameters(), rule)
    for step in range(4):
        for i, (n, p) in enumerate(trained.items()):
            generator = torch.Generator().manual_seed(100 * step + i)
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            twins[n].step(p.grad.clone())
        masker.step(optimizer, step)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), twins[n].w if n in trained else before[n], rtol=0, atol=1e-13)
    assert len(trained) < len(before) or rule == "none"


@pytest.mark.parametrize("rule", [rule for rule in SlowTwin.equations if rule != "grad_square"])  # whose masks stay
def test_masks_go_on_in_the_middle_of_an_interval(rule):
    """A masker loaded from a state of the third of four steps, with the optimizer's, ends at the same bits."""
    import copy

    def run(first, last, state=None):
        model, optimizer, masker, draw = family(rule, refresh_every=4)
        if state:
            for thing, content in zip((model, optimizer, masker), copy.deepcopy(state), strict=True):
                thing.load_state_dict(content)
        for step in range(first, last):
            draw(step)
            masker.step(optimizer, step)
        return copy.deepcopy([thing.state_dict() for thing in (model, optimizer, masker)])

    whole, half = run(0, 11), run(0, 7)
    assert half[2]["chosen_at"] == 4 and len(half[2]["masks"]) == 2
    resumed = run(7, 11, half)
    assert all(torch.equal(whole[0][n], w) for n, w in resumed[0].items())
    assert all(torch.equal(whole[2]["masks"][n], m) for n, m in resumed[2]["masks"].items())


def test_a_skipped_step_does_not_skip_a_refresh():
    _, optimizer, masker, draw = family("gmt", refresh_every=3)
    chosen = []
    for step in (0, 1, 2, 4, 5, 6, 7, 8):  # step 3 had no finite gradient
        draw(step)
        masker.step(optimizer, step)
        chosen.append(masker.state_dict()["chosen_at"])
    assert chosen == [0, 0, 0, 4, 4, 4, 7, 7]


def test_a_parameter_that_gets_its_first_gradient_late_gets_its_mask_then():
    model, _, masker, draw = family("sift")
    draw(0)
    late = model["b"].weight
    late.grad = None
    masker.mask_gradients(0)
    assert list(masker.state_dict()["masks"]) == ["a.weight"]
    draw(1)
    expected = late.grad * slow_mask(late.grad, gmt.keep_count(late.numel(), 0.3))
    masker.mask_gradients(1)
    assert torch.equal(late.grad, expected)


@pytest.mark.parametrize("kind", [kind for kind, (cls, _) in OPTIMIZERS.items() if cls is torch.optim.AdamW])
def test_moment_is_that_of_the_optimizer_after_the_step(kind):
    """Bit for bit, so that what moves are the largest |m| that the optimizer then holds."""
    model = model_with_grads()
    cls, settings = OPTIMIZERS[kind]
    optimizer = cls(model.parameters(), lr=0.01, **settings)
    masker = gmt.Masker(model.named_parameters(), "mofo", 0.1)
    for step in range(5):
        before = {p: p.detach().clone() for p in model.parameters()}
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        masker.step(optimizer, step)
        for p in (p for p in model.parameters() if p.dim() == 2):
            mask = slow_mask(optimizer.state[p]["exp_avg"], gmt.keep_count(p.numel(), 0.1))
            assert torch.equal(p != before[p], mask)


def test_low_rank_part_of_a_large_matrix_is_near_the_exact_one():
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 80, generator=generator)).Q for n in (300, 200))
    w = (u * 0.8 ** torch.arange(80)) @ v.T
    exact = torch.linalg.svd(w)
    exact = (exact.U[:, :8] * exact.S[:8]) @ exact.Vh[:8]
    part = gmt.low_rank_part(w, 8)
    assert (part - exact).norm() < 1e-5 * exact.norm() and not torch.equal(part, exact)  # one power iteration: 1e-4
    ours, theirs = gmt.topk_mask(part, 6000), slow_mask(exact, 6000)
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.99
    assert torch.equal(part, gmt.low_rank_part(w, 8))  # nothing is drawn from a generator
    assert gmt.low_rank_part(w[:, :7], 8) is not None and torch.equal(gmt.low_rank_part(w[:, :7], 8), w[:, :7])


@pytest.mark.parametrize(("power", "shared"), [(1.0, 0.99), (0.5, 0.86)])
def test_what_the_randomised_decomposition_shares_with_the_exact_one(power, shared):
    """The numbers of docs/method.md."""
    n, rank, k = 384, 32, round(0.05 * 384**2)
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for _ in range(2))
    w = (u * torch.arange(1, n + 1) ** -power) @ v.T
    exact = (u[:, :rank] * torch.arange(1, rank + 1) ** -power) @ v[:, :rank].T
    ours = gmt.topk_mask(gmt.low_rank_part(w, rank), k)
    assert (ours & slow_mask(exact, k)).sum() / k == pytest.approx(shared, abs=0.02)


def test_a_rule_of_ones_own_is_a_function_and_a_line(monkeypatch):
    monkeypatch.setattr(gmt, "SCORES", dict(gmt.SCORES))
    gmt.SCORES["gem"] = lambda e: e.grad / e.weight
    assert "gem" in gmt.rules()
    p = nn.Parameter(torch.randn(30, 40))
    g = p.grad = torch.randn(30, 40)
    expected = g * slow_mask((g / p).detach(), 360)
    gmt.Masker([("p", p)], "gem", 0.3).mask_gradients(0)
    assert torch.equal(p.grad, expected)
    held = gmt.Masker([("p", p)], "gem", 0.3, refresh_every=0, masked_weights="frozen")
    assert "score gem, chosen once, masked_weights frozen" in held.summary()
    monkeypatch.setitem(gmt.RULES, "gem_once", gmt.Rule("gem", 0, "frozen", "a preset of all axes"))
    assert "gem" not in gmt.rules()
    assert gmt.Masker([("p", p)], "gem_once", 0.3).summary().partition("(")[2] == held.summary().partition("(")[2]


@pytest.mark.parametrize("shape", [(30, 40), (300, 400)])  # sorted in part, and sampled first
def test_a_score_of_ones_own_that_is_no_number_is_refused(monkeypatch, shape):
    """A NaN's key lies above all others: the mask would keep it whatever it is."""
    monkeypatch.setattr(gmt, "SCORES", {**gmt.SCORES, "root": lambda e: e.grad.sqrt()})
    p = nn.Parameter(torch.ones(shape))
    p.grad = torch.rand(shape)
    gmt.Masker([("p", p)], "root", 0.3).mask_gradients(0)
    p.grad = torch.rand(shape)
    p.grad[7, 7] = -1
    with pytest.raises(ValueError, match="the score of p has entries that are NaN: guard"):
        gmt.Masker([("p", p)], "root", 0.3).mask_gradients(0)


def test_every_score_that_is_not_checked_is_a_number_for_finite_entries():
    extreme = torch.tensor([0.0, 1.0, -1.0, 3.4e38, -3.4e38, 1e-45])
    g, w = (x.flatten() for x in torch.meshgrid(extreme, extreme, indexing="ij"))
    entries = gmt.Entries(g, w, 0, 0, lambda: torch.lerp(w, g, 0.1))
    assert not any(score(entries).isnan().any() for score in gmt._ALWAYS_NUMBERS)


def test_refusals_of_axes():
    p = nn.Parameter(torch.zeros(2, 2))
    for kwargs, message in (
        ({"score": "momentum"}, "score must be one of gradient, "),
        ({"refresh_every": -1}, "refresh_every must be at least 0, got -1"),
        ({"masked_weights": "gone"}, "masked_weights must be one of momentum, frozen, update"),
        ({"rule": "none", "keep_ratio": None, "refresh_every": 0}, "refresh_every has no meaning for rule none"),
        ({"rule": "grad_square", "refresh_every": 5}, "refresh_every must be 0, got 5"),
        ({"rule": "lift", "scope": "model"}, "scope must be tensor"),
        ({"rule": "lift", "lift_rank": 0}, "lift_rank must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            gmt.Masker([("p", p)], **{"keep_ratio": 0.5, **kwargs})
    p.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"masked_weights update owns the optimizer's step: call step\(\)"):
        gmt.Masker([("p", p)], "mofo", 0.5).mask_gradients(0)
    with pytest.raises(
        ValueError, match=r"score moment needs the optimizer: mask_gradients\(step, optimizer=optimizer\)"
    ):
        gmt.Masker([("p", p)], "mofo", 0.5, masked_weights="momentum").mask_gradients(0)
    with pytest.raises(ValueError, match="needs torch's Adam or AdamW, got SGD"):
        gmt.Masker([("p", p)], "mofo", 0.5).step(torch.optim.SGD([p], lr=0.1), 0)


def test_statistics():
    p, q = nn.Parameter(torch.zeros(1, 4)), nn.Parameter(torch.zeros(2, 2))
    p.grad, q.grad = torch.tensor([[3.0, 4, 0, 0]]), torch.tensor([[1.0, 1], [1, 1]])
    assert gmt.Masker([("p", p), ("q", q)], "gmt", 0.25).mask_gradients(0, stats=True) == {
        "kept_fraction": 5 / 8,
        "kept_nonzero_fraction": 5 / 6,
        "energy_kept": pytest.approx(20 / 29),
        "tensors": {
            "p": {"entries": 4, "kept": 1, "nonzero": 2, "energy": 25, "nonzero_kept": 1, "energy_kept": 16},
            "q": {"entries": 4, "kept": 4, "nonzero": 4, "energy": 4, "nonzero_kept": 4, "energy_kept": 4},
        },
    }
    assert gmt.Masker([("p", p)], "none").mask_gradients(0, stats=True)["kept_fraction"] == 1
    p.grad = None
    stats = gmt.Masker([("p", p), ("q", q)], "gmt", 0.25).mask_gradients(0, stats=True)
    assert stats["kept_fraction"] == 0.5 and not any(list(stats["tensors"]["p"].values())[1:])
    assert gmt.Masker([("p", p)], "gmt", 0.25).mask_gradients(0) is None


def test_jaccard_compares_with_the_masks_of_the_last_call_that_asked():
    p = nn.Parameter(torch.zeros(1, 10))
    masker = gmt.Masker([("p", p)], "gmt", 0.4)

    def mask(kept, **kwargs):
        p.grad = torch.full((1, 10), 0.1).index_fill(1, torch.tensor(kept), 1.0)
        return masker.mask_gradients(0, **kwargs)

    assert mask([0, 1, 2, 3], stats=True, jaccard=True)["mask_jaccard"] is None
    assert "mask_jaccard" not in mask([6, 7, 8, 9], stats=True)
    assert mask([1, 2, 3, 4], stats=True, jaccard=True)["mask_jaccard"] == 3 / 5
    assert mask([1, 2, 3, 4], stats=True, jaccard=True)["mask_jaccard"] == 1


def test_masks_as_bits():
    mask = torch.rand(1003, generator=torch.Generator().manual_seed(0)) < 0.3
    bits = gmt._pack(mask)
    assert bits.dtype == torch.uint8 and bits.numel() == 126
    assert bits[0] == sum(int(m) << i for i, m in enumerate(mask[:8]))
    for start, stop in ((0, 1003), (5, 6), (7, 801), (8, 16), (1000, 1003), (9, 9)):
        assert torch.equal(gmt._unpack(bits, start, stop), mask[start:stop])


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_grad_square_keeps_the_largest_sums_of_squares(scope, monkeypatch):
    monkeypatch.setitem(gmt._CHUNK, "cpu", 30)  # chunks that do not end at whole bytes
    model = model_with_grads()
    masker = gmt.Masker(model.named_parameters(), "grad_square", 0.2, scope=scope)
    with pytest.raises(ValueError, match=r"calibrate\(\) and fix_masks\(\) come before the first step"):
        masker.mask_gradients(0)
    with pytest.raises(ValueError, match="nothing to choose by"):
        masker.fix_masks()
    matrices = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    sums = {n: torch.zeros_like(p) for n, p in matrices.items()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def draw(seed):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i))

    for step in range(3):
        draw(10 * step)
        for n, p in matrices.items():
            sums[n] += p.grad**2
        masker.calibrate()
    masker.fix_masks()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    if scope == "model":
        everything = torch.cat([x.flatten() for x in sums.values()])
        whole = slow_mask(everything, gmt.keep_count(everything.numel(), 0.2)).split([x.numel() for x in sums.values()])
        expected = {n: m.view_as(sums[n]) for n, m in zip(sums, whole, strict=True)}
    else:
        expected = {n: slow_mask(x, gmt.keep_count(x.numel(), 0.2)) for n, x in sums.items()}
    # a Masker that is loaded from the first one's state masks alike, at every step, in both readings of masked
    loaded = gmt.Masker(model.named_parameters(), "grad_square", 0.2, scope=scope)
    state = masker.state_dict()
    loaded.load_state_dict({**state, "masks": {n: bits.clone() for n, bits in state["masks"].items()}})
    frozen = gmt.Masker(model.named_parameters(), "grad_square", 0.2, scope=scope, masked_weights="frozen")
    frozen.load_state_dict(state)
    for step, m in enumerate((masker, frozen, loaded)):
        draw(1000 + step)
        grads = {n: p.grad.clone() for n, p in matrices.items()}
        if step == 1:
            m.step(torch.optim.AdamW(model.parameters(), lr=0.1), step)
        else:
            m.mask_gradients(step)
        for n, p in matrices.items():
            assert torch.equal(p.grad, grads[n] * expected[n]), (step, n)
            assert step != 1 or torch.equal(p != before[n], expected[n])
    with pytest.raises(ValueError, match="masks in the checkpoint do not fit the parameter"):
        loaded.load_state_dict({"chosen_at": 0, "masks": {"up.weight": torch.zeros(3, dtype=torch.uint8)}})


def test_grad_square_masks_all_of_a_parameter_without_calibration():
    p, q = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    masker = gmt.Masker([("p", p), ("q", q)], "grad_square", 0.25)
    p.grad = torch.arange(16.0).view(4, 4)
    masker.calibrate()
    masker.fix_masks()
    p.grad, q.grad = torch.ones(4, 4), torch.ones(4, 4)
    masker.mask_gradients(0)
    assert p.grad.sum() == 4 and q.grad.sum() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradient_is_named(bad):
    model = model_with_grads()
    model["down"].weight.grad[2, 3] = bad
    before = model["up"].weight.grad.clone()
    with pytest.raises(ValueError, match=r"non-finite gradient in down\.weight \(1 of 3 matrices\)"):
        gmt.Masker(model.named_parameters(), "gmt", 0.2).mask_gradients(0)
    assert torch.equal(model["up"].weight.grad, before)  # nothing is masked by halves


def test_largest_finite_gradients_are_not_called_infinite():
    p = nn.Parameter(torch.zeros(2, 2))
    p.grad = torch.full((2, 2), torch.finfo(torch.float32).max)
    gmt.Masker([("p", p)], "gmt", 0.5).mask_gradients(0)


def test_refusals():
    p = nn.Parameter(torch.zeros(2, 2))
    for kwargs, message in (
        ({"rule": "gtm", "keep_ratio": 0.2}, "rule must be one of none, hft, gmt, rmt, sift"),
        ({"keep_ratio": None}, "needs a keep_ratio"),
        ({"keep_ratio": 0.0}, r"in \(0, 1\]"),
        ({"keep_ratio": 1.1}, r"in \(0, 1\]"),
        ({"keep_ratio": float("nan")}, r"in \(0, 1\]"),
        ({"rule": "none", "keep_ratio": 0.2}, "no meaning for rule none"),
        ({"keep_ratio": 0.2, "scope": "layer"}, "scope must be"),
    ):
        with pytest.raises(ValueError, match=message):
            gmt.Masker([("p", p)], **kwargs)
    e = nn.Embedding(5, 3, sparse=True)
    e(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="gradient of weight is sparse"):
        gmt.Masker(e.named_parameters(), "gmt", 0.5).mask_gradients(0)


def test_tied_weights_are_counted_once():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["embed"].weight
    assert len(gmt.Masker(model.named_parameters(), "gmt", 0.5).eligible) == 1


# --- HFT -------------------------------------------------------------------------------------------------------------


def llama(layers=4, **kwargs):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = {**config, "num_hidden_layers": layers, "num_key_value_heads": 2}
    if kwargs.pop("qwen", False):
        return Qwen2ForCausalLM(Qwen2Config(**config))
    return LlamaForCausalLM(LlamaConfig(**config))


@pytest.mark.parametrize("layers", [1, 3, 4])
def test_hft_freezes_by_category(layers):
    model = llama(layers)
    frozen = gmt.freeze_half(model, seed=0)
    assert frozen == [n for n, p in model.named_parameters() if not p.requires_grad]
    ffn_frozen = []
    for i in range(layers):
        mine = [n for n in frozen if f"layers.{i}." in n]
        assert sum("self_attn" in n for n in mine) == 2
        assert sum("layernorm" in n for n in mine) == 1
        ffn_frozen.append(sum("mlp" in n for n in mine))
    assert sorted(ffn_frozen) == [1] * ((layers + 1) // 2) + [2] * (layers // 2)
    assert not any("embed" in n or "lm_head" in n or "model.norm" in n for n in frozen)


def test_hft_draws_anew_for_each_seed_and_stage():
    draws = [gmt.freeze_half(llama(), seed, stage) for seed, stage in ((0, "sft"), (0, "sft"), (1, "sft"), (0, "dpo"))]
    assert draws[0] == draws[1] and len({tuple(d) for d in draws}) == 3


def test_hft_biases_go_with_their_matrix_and_fused_weights_are_refused():
    frozen = gmt.freeze_half(llama(2, qwen=True), seed=0)
    for projection in ("q_proj", "k_proj", "v_proj"):
        for i in (0, 1):
            name = f"model.layers.{i}.self_attn.{projection}"
            assert (f"{name}.weight" in frozen) == (f"{name}.bias" in frozen)
    fused = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"attn": nn.Linear(4, 12), "mlp": nn.Linear(4, 4)})])})
    with pytest.raises(ValueError, match=r"4 attention and 3 feed-forward matrices per layer; h\.0 has"):
        gmt.freeze_half(fused, seed=0)
    with pytest.raises(ValueError, match="no decoder layers"):
        gmt.freeze_half(nn.Linear(3, 3), seed=0)


def test_frozen_weights_count_as_not_kept():
    model = llama(2)
    gmt.freeze_half(model, seed=0)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    stats = gmt.Masker(model.named_parameters(), "hft").mask_gradients(0, stats=True)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    trained = sum(p.numel() for p in matrices if p.requires_grad)
    assert stats["kept_fraction"] == trained / sum(p.numel() for p in matrices) and stats["energy_kept"] is None
