"""Fixtures: a tiny model with a byte-level tokenizer, small datasets, and processes under torchrun. All offline."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may touch the network; read when the libraries are imported

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("GMT_DATA_DIR", "/nonexistent"))  # real benchmark files, where there are any
torch.set_num_threads(1)  # tiny tensors; and the same arithmetic in every test


# A shell starts what it runs in the background with SIGINT ignored, which children inherit; some are to be interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session", autouse=True)
def dataset_cache(tmp_path_factory):
    """The datasets' cache of this session alone."""
    try:
        import datasets
    except ImportError:  # on a machine for the tests marked gpu alone
        return
    cache = tmp_path_factory.mktemp("hf_cache")
    os.environ["HF_DATASETS_CACHE"] = str(cache)  # for the processes that tests start
    datasets.config.HF_DATASETS_CACHE = cache


def make_model(folder: Path, seed: int = 0, **overrides) -> Path:
    """A random Llama of about 35,000 parameters, and a tokenizer of the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(["<bos>", "<eos>", "<pad>", *alphabet])}
    bytes_only = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    torch.manual_seed(seed)
    config = {
        "vocab_size": len(vocab),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    LlamaForCausalLM(LlamaConfig(**{**config, **overrides})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def exact(monkeypatch):
    """eval.py computes in float64 here: in float32 rounding, which differs between processors, could decide."""
    from evaluation import generation

    load_weights = generation.load_weights
    monkeypatch.setattr(
        generation, "load_weights", lambda *args, **kwargs: load_weights(*args, **{**kwargs, "dtype": torch.float64})
    )


def needs_data(*files: str) -> pytest.MarkDecorator:
    """Skip a test where GMT_DATA_DIR has not these files."""
    missing = [f for f in files if not (DATA / f).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"GMT_DATA_DIR names no folder with {', '.join(missing)}")


def no_sandbox() -> str:
    """Why this machine can have none, whatever tasks/sandbox.py does; empty if it can."""
    missing = [program for program in ("bwrap", "setpriv") if not shutil.which(program)]
    if missing:
        return f"there is no {missing[0]}"
    words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    words += ["bwrap", "--unshare-all", "--unshare-user", "--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib"]
    words += ["--symlink", "usr/lib64", "/lib64", "/usr/bin/true"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stderr.strip()


needs_sandbox = pytest.mark.skipif(bool(why := no_sandbox()), reason=f"no sandbox here: {why}")


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    """70 rows of unequal lengths in MetaMathQA's columns."""
    rng = random.Random(0)
    rows = []
    for i in range(70):
        words = " ".join(rng.choice(["apples", "pears", "and", "a", "of"]) for _ in range(rng.randint(1, 12)))
        rows.append({"query": f"{i} {words}?", "response": f" {words[: rng.randint(3, 60)]} The answer is: {i}"})
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The final model of a run's folder."""
    return load_file(run / "final" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two models are, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saved_bytes(model: torch.nn.Module, rows: int, length: int, trained: int) -> int:
    """What autograd keeps of a forward pass and loss, beside the parameters."""
    known, saved = {p.data_ptr() for p in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids, at = torch.zeros((rows, length), dtype=torch.long), torch.arange(trained)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.train()(input_ids=ids, positions=at, targets=at).sum()
    return sum(t.untyped_storage().nbytes() for t in saved.values())


@pytest.fixture(scope="session")
def run_args(tmp_path_factory, train_args):
    """train_args for 23 short examples, 5 steps of 4 an epoch."""
    rows = [{"prompt": f"{i}{'?' * (i % 7)}", "response": "ab" * (i % 5 + 1)} for i in range(23)]
    file = write_rows(tmp_path_factory.mktemp("short") / "rows.jsonl", rows)
    short = ["--dataset", str(file), "--template", "prompt_response", "--global_batch_size", "4"]
    return lambda folder, *more: train_args(folder, *short, *more)


@pytest.fixture(scope="session")
def train_args(model_dir, rows_file):
    """Words for train.main: a run of 2 epochs of 5 steps (the last one short), in under a second."""

    def words(output_dir: Path, *more: str) -> list[str]:
        return [
            "--model", str(model_dir), "--dataset", str(rows_file), "--output_dir", str(output_dir),
            "--rule", "none", "--epochs", "2", "--global_batch_size", "16", "--learning_rate", "1e-3",
            "--mixed_precision", "fp32", "--micro_batch_tokens", "2048", *more,
        ]  # fmt: skip

    return words


def torchrun(
    processes: int, program: str, *args: str, timeout: float = 240, machines: int = 1
) -> subprocess.CompletedProcess:
    """Run a program of this repository on CPU processes (gloo), with one thread each.

    With several machines, each has a torchrun of its own with its share of the processes, and they meet over TCP; the
    result is that of the first one.
    """
    started = []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for machine in range(machines):
        where = ["--standalone"]
        if machines > 1:
            where = [
                f"--nnodes={machines}",
                f"--node_rank={machine}",
                "--master_addr=127.0.0.1",
                f"--master_port={port}",
            ]
        started.append(
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", *where),
                    *(f"--nproc_per_node={processes // machines}", program, *args),
                ],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [p.communicate(timeout=timeout) for p in started]
    finally:
        for p in started:
            p.kill()
    return subprocess.CompletedProcess(started[0].args, started[0].returncode, *outputs[0])


def python(*args: str, timeout: float = 240, **env: str) -> subprocess.CompletedProcess:
    """Run `python ...` in the repository's root."""
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what a clock or the machine decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second", "peak_memory_gib")}
        for line in lines
    ]
