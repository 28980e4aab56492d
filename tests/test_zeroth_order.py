"""MeZO and SubZero: the estimator, its memory, runs: pytest tests/test_zeroth_order.py"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model, read_metrics, same, weights
from safetensors.torch import load_file
from test_distributed import run
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from worker import exact_norm

import train
from common import run_folder
from common.config import TrainConfig, parse
from common.errors import UserError
from training import data, plan
from training.zeroth_order import ZerothOrder

MEZO = ["--optimizer", "mezo", "--learning_rate", "1e-4"]
SUBZERO = ["--optimizer", "subzero", "--subzero_rank", "4", "--subzero_refresh_every", "3", "--learning_rate", "1e-3"]
FIVE = ["--epochs", "1", "--lr_schedule", "constant", "--save_every", "2", "--eval_rows", "5"]  # steps
FP64 = ["--master_dtype", "float64"]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_args):
    """The folder of a run of SubZero in fp64 that has saved and was never cut."""
    folder = tmp_path_factory.mktemp("subzero") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", exact_norm)
        train.main(run_args(folder, *SUBZERO, *FP64, *FIVE))
    return folder


# --- the estimator ---------------------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """sum_i a_i w_i^2 / 2 of a matrix and a vector; its gradient is a * w, its central difference exact."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = [torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5 for shape in ((6, 5), (4,))]
        self.w = nn.Parameter(torch.randn(6, 5, generator=generator, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64))

    def forward(self):
        return torch.stack([(a * p.square()).sum() / 2 for a, p in zip(self.a, (self.w, self.b), strict=True)])


class Sum:
    metrics = ()

    def count(self, ids):
        return 1

    def __call__(self, losses, ids):
        return losses.sum(), []


def estimates(optimizer, model, draws):
    """The (draws, n) estimates g z: what steps of rate 1 take off the weights."""
    before, rows, accelerator = [p.detach().clone() for p in model.parameters()], [], Accelerator(cpu=True)
    for step in range(draws):
        batches = SimpleNamespace(step=step, micro=[SimpleNamespace(inputs={}, ids=[])], ids=[])
        optimizer.estimate(model, batches, Sum(), accelerator)
        optimizer.step()
        rows.append(torch.cat([(b - p).detach().flatten() for b, p in zip(before, model.parameters(), strict=True)]))
        for p, b in zip(model.parameters(), before, strict=True):
            p.copy_(b)
    return torch.stack(rows)


@pytest.mark.parametrize("rank", [0, 2])
def test_mean_and_variance_of_the_estimate_are_those_of_the_formula(rank):
    """g z = z z^T G, G the gradient. With B B^T = 1 (MeZO) or what U, V span, and p = B B^T G, for Gaussian numbers the
    mean is p and the covariance |p|^2 B B^T + p p^T. Bounds of 5 standard errors."""
    draws, model = 600, Quadratic()
    optimizer = ZerothOrder(model, lr=1.0, epsilon=0.1, rank=rank, refresh_every=draws, seed=3)
    gradient = torch.cat([(a * p).detach().flatten() for a, p in zip(model.a, model.parameters(), strict=True)])
    found = estimates(optimizer, model, draws)
    projector = torch.eye(34, dtype=torch.float64)
    if rank:
        _, u, v = optimizer._bases["w"]
        assert u.shape == (6, 2) and v.shape == (5, 2)
        for basis in (u, v):
            assert torch.allclose(basis.T @ basis, torch.eye(2, dtype=torch.float64))
        projector[:30, :30] = torch.kron(u @ u.T, v @ v.T)
    p = projector @ gradient
    variance = p.square().sum() * projector.diagonal() + p.square()
    assert ((found.mean(0) - p).abs() <= 5 * (variance / draws).sqrt()).all()
    error = ((found - found.mean(0)).pow(4).mean(0) - found.var(0).square()).sqrt() / draws**0.5
    assert ((found.var(0) - variance).abs() <= 5 * error).all()
    if rank:  # nothing leaves the subspace
        assert torch.allclose(found[:, :30] @ projector[:30, :30], found[:, :30])


@pytest.mark.parametrize("words", [MEZO, SUBZERO], ids=["mezo", "subzero"])
def test_a_run_is_that_of_a_slow_twin(tmp_path, run_args, words):
    """w + eps z and w - eps z as whole models, all examples one by one; also with tied weights, which have one z."""
    model = make_model(tmp_path / "model", tie_word_embeddings=True)
    more = ["--model", str(model), "--max_steps", "4", "--weight_decay", "0.1", "--lr_schedule", "linear"]
    args = run_args(tmp_path / "run", *words, *FP64, *more)
    train.main(args)
    config = parse(TrainConfig, args)
    _, examples, _ = train.load_data(config)
    twin = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    rank = 4 if "subzero" in words else 0
    draw = ZerothOrder(AutoModelForCausalLM.from_pretrained(model), 0.0, rank=rank, refresh_every=3, seed=config.seed)
    w, bases = {n: p.detach() for n, p in twin.named_parameters()}, []
    for step, line in enumerate(read_metrics(tmp_path / "run")):
        draw.at, losses = step, []
        z = {n: draw.direction(n, p.shape, p.dtype, p.device) for n, p in w.items()}
        ids = data.step_examples(len(examples), 4, config.seed, step)
        for sign in (1, -1):
            moved, loss = {n: w[n] + sign * 1e-3 * z[n] for n in w}, 0.0
            for i in ids:
                batch = data.collate(examples, [[i]], torch.device("cpu"))
                with torch.no_grad():
                    logits = torch.func.functional_call(twin, moved, (batch["input_ids"],)).logits.flatten(0, 1)
                loss += F.cross_entropy(logits[batch["positions"]], batch["targets"], reduction="sum")
            losses.append(loss / examples.trained[ids].sum())
        g = float(losses[0] - losses[1]) / 2e-3
        assert line["projected_gradient"] == pytest.approx(g, abs=1e-9) and "grad_norm" not in line
        assert line["loss"] == pytest.approx(float(sum(losses)) / 2, abs=1e-11) and "kept_fraction" not in line
        lr = config.learning_rate * (1 - step / 4)
        w = {n: p * (1 - lr * 0.1 * (p.dim() >= 2)) - lr * g * z[n] for n, p in w.items()}
        matrix = "model.layers.1.mlp.up_proj.weight"
        assert torch.linalg.matrix_rank(z[matrix]) == (rank or 32)
        bases.append(draw._bases[matrix][1] if rank else z[matrix])
    final = weights(tmp_path / "run")
    assert final.keys() == w.keys() and max((final[n] - w[n]).abs().max() for n in w) < 1e-11
    renewed = [not torch.equal(a, b) for a, b in itertools.pairwise(bases)]
    assert renewed == ([False, False, True] if rank else [True] * 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_pass_leaves_the_weights_as_they_are(model_dir, dtype):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    before = {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    optimizer = ZerothOrder(model, 1e-3, epsilon=1e-2)
    logits, ids = [], torch.arange(20).view(1, 20)
    for scale in (0.0, 1e-2, -1e-2, 0.0):
        optimizer.scale = scale
        logits.append(model(ids).logits)
    assert torch.equal(logits[0], logits[3]) and not torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[1], logits[2])
    for name, p in model.named_parameters():
        assert p is before[name][0] and torch.equal(p, before[name][1]) and not p.requires_grad, name


@pytest.mark.parametrize("rank", [0, 2])
def test_a_direction_is_a_function_of_seed_step_and_name(rank):
    def draw(seed=0, at=7, name="a"):
        optimizer = ZerothOrder(Quadratic(), 1.0, rank=rank, refresh_every=5, seed=seed)
        optimizer.at = at
        return optimizer.direction(name, torch.Size((6, 5)), torch.float32, torch.device("cpu"))

    assert torch.equal(draw(), draw())
    for other in (draw(seed=1), draw(at=8), draw(name="b")):
        assert not torch.equal(draw(), other)


def test_a_pass_has_no_dropout(tmp_path, run_args):
    found = []
    for name, dropout in (("with", 0.5), ("without", 0.0)):
        model = make_model(tmp_path / f"{name}_model", attention_dropout=dropout)
        train.main(run_args(tmp_path / name, *MEZO, "--model", str(model), "--max_steps", "1"))
        found.append(read_metrics(tmp_path / name)[0]["projected_gradient"])
    assert found[0] == found[1]


# --- a run -----------------------------------------------------------------------------------------------------------


def test_memory_is_that_of_the_weights(tmp_path, run_args, monkeypatch):
    """All tensors between the gradient and the step, in a run each; and the copies in the middle of a pass."""
    held, made, copies, prepare = {}, [], [0], Accelerator.prepare
    monkeypatch.setattr(Accelerator, "prepare", lambda self, *a: made.append(prepare(self, *a)) or made[-1])
    replace = ZerothOrder._replace

    def look(self, line):
        model, optimizer = made[-1][0], made[-1][1].optimizer
        state = [x for of_one in optimizer.state.values() for x in of_one.values() if isinstance(x, torch.Tensor)]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        bases = [x for _, *pair in getattr(optimizer, "_bases", {}).values() for x in pair]
        parts = {"weights": list(model.parameters()), "gradients": gradients, "state": state, "bases": bases}
        held[line["optimizer"]] = {name: sum(x.nbytes for x in part) for name, part in parts.items()}

    def count(self, *args):
        replace(self, *args)
        copies.append(sum(p.nbytes for weights in self._weights for p in weights.values()))

    monkeypatch.setattr(ZerothOrder, "_replace", count)
    for optimizer in ("adamw", "mezo", "subzero"):
        unscale = lambda self, name=optimizer: look(self, {"optimizer": name})  # noqa: E731
        monkeypatch.setattr(Accelerator, "unscale_gradients", unscale)
        words = {"adamw": [], "mezo": MEZO, "subzero": SUBZERO}[optimizer]
        train.main(run_args(tmp_path / optimizer, *words, "--max_steps", "2"))
    size = 4 * 32096
    assert held["adamw"] == {"weights": size, "gradients": size, "state": 2 * size + 4 * 21, "bases": 0}
    assert held["mezo"] == {"weights": size, "gradients": 0, "state": 0, "bases": 0}
    config = parse(TrainConfig, run_args(tmp_path, *SUBZERO))
    parameters = list(made[-1][0].parameters())
    largest = max(p.nbytes for p in parameters)
    bases = plan.direction_bytes(config, parameters) - largest
    assert held["subzero"] == {"weights": size, "gradients": 0, "state": 0, "bases": bases} and 0 < bases < size / 2
    assert max(copies) == largest  # one module's at a time


def test_resume_is_bitwise(trained, tmp_path, run_args, monkeypatch):
    """The cut lies inside of an interval of the subspaces."""
    args = run_args(tmp_path / "run", *SUBZERO, *FP64, *FIVE)
    write = run_folder.Log.write

    def crash(self, line):
        write(self, line)
        if line["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder.Log, "write", crash)
        train.main(args)
    train.main([*args, "--resume"])
    assert read_metrics(tmp_path / "run") == read_metrics(trained)
    assert same(weights(tmp_path / "run"), weights(trained))


def test_a_split_into_micro_batches_is_the_same_step(trained, tmp_path, run_args):
    more = ["--per_device_batch_size", "3", "--loss_chunk", "50"]
    train.main(run_args(tmp_path / "run", *SUBZERO, *FP64, *FIVE, *more))
    a, b = weights(tmp_path / "run"), weights(trained)
    assert max((a[name] - b[name]).abs().max() for name in b) < 1e-9


def test_the_keys_change_the_training(trained, tmp_path, run_args):
    first = [line["projected_gradient"] for line in read_metrics(trained)]
    for key, value, same_steps in (("zo_epsilon", 0.1, 0), ("subzero_rank", 5, 0), ("subzero_refresh_every", 2, 2)):
        train.main(run_args(tmp_path / key, *SUBZERO, *FP64, *FIVE, f"--{key}={value}", "--max_steps", "3"))
        found = [line["projected_gradient"] for line in read_metrics(tmp_path / key)]
        assert [a == b for a, b in zip(found, first, strict=False)] == [i < same_steps for i in range(3)], key


@pytest.mark.slow
@pytest.mark.parametrize("worker", ["worker", "fsdp_worker"])
def test_two_processes_agree_with_one(trained, tmp_path, run_args, worker):
    """Under FSDP2 also cut after a checkpoint in shards, and resumed where weights stay whole after a forward pass."""
    args = run_args(tmp_path / "run", *SUBZERO, *FP64, *FIVE)
    if worker == "fsdp_worker":
        cut = run(2, args, worker, CRASH_AT="3")
        assert cut.returncode != 0 and len(read_metrics(tmp_path / "run")) == 3, cut.stderr[-3000:]
        args.append("--resume")
    done = run(2, args, worker, RESHARD="false")
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = weights(tmp_path / "run"), weights(trained)
    assert a.keys() == b.keys() and max((a[name] - b[name]).abs().max() for name in b) < 1e-9
    for x, y in zip(read_metrics(tmp_path / "run"), read_metrics(trained), strict=True):
        for name in ("loss", "projected_gradient", "eval_loss"):
            assert x[name] == pytest.approx(y[name], abs=1e-8), name


def test_an_adapter_is_trained_too(tmp_path, run_args):
    train.main(run_args(tmp_path / "run", *MEZO, "--adapter", "lora", "--lora_rank", "4", "--max_steps", "2"))
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 28 and all(p.abs().max() > 0 for p in adapter.values())  # B was 0


def test_losses_that_are_not_finite_move_nothing(tmp_path, run_args):
    with pytest.raises(UserError, match="2 steps in a row had a non-finite gradient"):
        train.main(run_args(tmp_path / "run", *MEZO, "--zo_epsilon", "1e38", "--max_skipped_steps", "2"))


# --- the plan, and what is refused -----------------------------------------------------------------------------------


def test_the_plan_has_no_gradients(tmp_path, run_args, capsys):
    sizes = {}
    for name, words in (("adamw", []), ("mezo", MEZO)):
        train.main(run_args(tmp_path / "run", *words, "--dry_run"))
        sizes[name] = capsys.readouterr().out
    assert "parameters: 32,096, 32,096 of them trained" in sizes["mezo"]
    assert "two forward passes a step" in sizes["mezo"] and "directions" in sizes["mezo"]
    flops = [float(text.partition("compute: ")[2].split()[0]) for text in sizes.values()]
    assert 0.6 < flops[1] / flops[0] < 0.8  # 4 of 6, and attention


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rule", "gmt", "--keep_ratio", "0.2"], "optimizer mezo has no gradients to mask, got rule gmt"),
        (["--rule", "hft"], "has no gradients to mask, got rule hft: use rule none"),
        (["--rule", "mask_tuning"], "has no gradients to mask, got rule mask_tuning"),
        (["--max_grad_norm", "0.5"], "max_grad_norm has no meaning for optimizer mezo: leave it out"),
        (["--adam_beta1", "0.5"], "adam_beta1 has no meaning for optimizer mezo"),
        (["--gradient_checkpointing"], "gradient_checkpointing has no meaning for optimizer mezo"),
        (["--compile"], "compile has no meaning for optimizer mezo"),
        (["--mixed_precision", "fp16"], "has no gradients for fp16's scaler"),
        (["--subzero_rank", "8"], "subzero_rank has no meaning for optimizer mezo"),
        (["--optimizer", "adamw", "--zo_epsilon", "0.1"], "zo_epsilon has no meaning for optimizer adamw"),
        (["--zo_epsilon", "0"], "zo_epsilon must be above 0"),
        (["--optimizer", "subzero", "--subzero_rank", "0"], "subzero_rank must be at least 1"),
    ],
)
def test_what_has_no_meaning_is_refused(tmp_path, run_args, words, message):
    with pytest.raises(UserError, match=message):
        train.main(run_args(tmp_path / "run", *MEZO, *words, "--dry_run"))


def test_the_command_lines_optimizer_leaves_out_the_files_keys(tmp_path):
    (tmp_path / "sft.yaml").write_text(
        "rule: none\nmax_grad_norm: 0\ngradient_checkpointing: true\nmodel: m\ndataset: d"
    )
    words = ["--config", str(tmp_path / "sft.yaml"), "--output_dir", "o"]
    assert parse(TrainConfig, [*words, "--optimizer", "subzero"]).max_grad_norm == 1.0
    assert parse(TrainConfig, words).gradient_checkpointing
