"""scripts/download.py with the Hub replaced, and a run from what it left: pytest tests/test_download.py"""

import fnmatch
import importlib.util
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, python, write_rows

from common.errors import UserError
from common.sources import load_rows

spec = importlib.util.spec_from_file_location("download", ROOT / "scripts" / "download.py")
download = importlib.util.module_from_spec(spec)
spec.loader.exec_module(download)


@pytest.fixture
def hub(tmp_path, model_dir, monkeypatch):
    """A Hub of a model and two datasets; the calls of snapshot_download."""
    repos = {name: tmp_path / "hub" / name for name in ("owner/model", "owner/rows", "owner/splits", "owner/kinds")}
    shutil.copytree(model_dir, repos["owner/model"])
    for name in ("consolidated.safetensors", "pytorch_model.bin", "original/model.safetensors", "README.md"):
        (repos["owner/model"] / name).parent.mkdir(exist_ok=True)
        (repos["owner/model"] / name).write_text("not needed")
    rows = [{"query": f"{i}", "response": f"{i}"} for i in range(8)]
    for path in ("owner/rows/rows.json", "owner/splits/data/train-0.jsonl", "owner/splits/data/test-0.jsonl"):
        (tmp_path / "hub" / path).parent.mkdir(parents=True, exist_ok=True)
        write_rows(tmp_path / "hub" / path, rows)
    (repos["owner/rows"] / "dataset_infos.json").write_text("{}")
    for path in ("main/train-0.jsonl", "main/test-0.jsonl", "socratic/train-0.jsonl"):
        (repos["owner/kinds"] / path).parent.mkdir(parents=True, exist_ok=True)
        write_rows(repos["owner/kinds"] / path, rows)
    calls = []

    def files(name, repo_type="model"):
        if name not in repos:
            raise OSError(f"404: no repository\n{name}")
        return [str(p.relative_to(repos[name])) for p in repos[name].rglob("*") if p.is_file()]

    def snapshot_download(name, allow_patterns, local_dir, ignore_patterns=(), repo_type="model"):
        calls.append((name, repo_type))
        for f in files(name):
            wanted = any(fnmatch.fnmatch(f, p) for p in allow_patterns)
            if wanted and not any(fnmatch.fnmatch(f, p) for p in ignore_patterns):
                (Path(local_dir) / f).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(repos[name] / f, Path(local_dir) / f)

    monkeypatch.setattr(download, "list_repo_files", files)
    monkeypatch.setattr(download, "snapshot_download", snapshot_download)
    return calls


CONFIG = """model: owner/model
dataset: [owner/rows, 'owner/splits:5']
output_dir: run
rule: none
max_steps: 1
global_batch_size: 4
mixed_precision: fp32
"""


def test_a_run_goes_without_the_hub(tmp_path, hub, capsys):
    (tmp_path / "c.yaml").write_text(CONFIG)
    download.main([str(tmp_path / "a folder"), "--config", str(tmp_path / "c.yaml")])
    assert hub == [("owner/model", "model"), ("owner/rows", "dataset"), ("owner/splits", "dataset")]
    files = {str(p.relative_to(tmp_path / "a folder")) for p in (tmp_path / "a folder").rglob("*") if p.is_file()}
    assert {f for f in files if f.startswith("datasets")} == {
        "datasets/owner/rows/rows.json",
        "datasets/owner/splits/data/train-0.jsonl",
    }
    model = {Path(f).name for f in files if f.startswith("models/owner/model/")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= model
    assert not model & {"consolidated.safetensors", "pytorch_model.bin", "README.md"}
    assert "models/owner/model/original/model.safetensors" not in files
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train.py")]
    words = shlex.split(said.partition("add ")[2])
    done = python(
        "train.py", "--config", str(tmp_path / "c.yaml"), *words, "--output_dir", str(tmp_path / "run"),
        HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "no cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "13 examples" in done.stdout and (tmp_path / "run" / "final").is_dir()


def test_one_configuration_of_a_dataset(tmp_path, hub):
    folder = download.fetch_dataset("owner/kinds:main", "train", tmp_path / "f")
    assert [str(p.relative_to(folder)) for p in folder.rglob("*.jsonl")] == ["main/train-0.jsonl"]
    assert len(load_rows(str(folder), ("query", "response"))) == 8
    assert download.fetch_dataset("owner/kinds:socratic", "train", tmp_path / "f") != folder  # not mixed with it


def test_a_model_without_safetensors(tmp_path, hub):
    (tmp_path / "hub" / "owner" / "model" / "model.safetensors").unlink()
    assert (download.fetch_model("owner/model", tmp_path / "f") / "pytorch_model.bin").exists()


def test_every_configurations_sources_are_asked_for(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(download, "fetch_model", lambda name, folder: asked.append(name) or folder)
    monkeypatch.setattr(download, "fetch_dataset", lambda name, split, folder: asked.append((name, split)) or folder)
    download.main([str(tmp_path), "--config", str(ROOT / "configs" / "general_llama2_7b.yaml"), "--model", "a/b"])
    assert asked == ["meta-llama/Llama-2-7b-hf", ("allenai/tulu-v2-sft-mixture", "train"), "a/b"]


def test_tasks_come_into_a_cache(tmp_path, monkeypatch, capsys):
    import datasets

    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split, datasets.config.HF_DATASETS_CACHE))
        if names[0] != "openai/gsm8k":
            raise OSError("gone")
        return datasets.Dataset.from_list([{"question": "?", "answer": "#### 1"}])

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    download.main([str(tmp_path / "f"), "--tasks", "gsm8k"])
    assert asked == [("openai/gsm8k", "main", "test", tmp_path / "f" / "cache")]
    assert f"HF_HUB_OFFLINE=1 HF_DATASETS_CACHE={tmp_path}/f/cache" in capsys.readouterr().out
    with pytest.raises(UserError, match="hendrycks_math: dataset EleutherAI/hendrycks_math, split test: .*gone"):
        download.main([str(tmp_path / "f"), "--tasks", "hendrycks_math", "math"])
    assert len([a for a in asked if "main" in a]) == 2  # what can be fetched is


def test_texts_come_into_a_file(tmp_path, monkeypatch, capsys):
    """They are the first of a dataset that is not fetched whole, so no cache has them."""
    import datasets

    from tasks import TASKS
    from tasks.source import Source

    class Stream:
        def take(self, n):
            return [{"text": f"{i}", "id": i} for i in range(n)]

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **how: Stream())
    download.main([str(tmp_path / "f"), "--tasks", "text_loss"])
    said = capsys.readouterr().out.split()
    (word,) = [word for word in said if word.startswith("text_loss=")]
    assert TASKS["text_loss"].load(Source(file=word.partition("=")[2])) == [{"text": f"{i}"} for i in range(100)]


def test_errors(tmp_path, hub):
    with pytest.raises(UserError, match="model owner/other cannot be fetched: 404: no repository owner/other"):
        download.main([str(tmp_path), "--model", "owner/other"])
    with pytest.raises(UserError, match="nothing to fetch: name --config, --model or --tasks"):
        download.main([str(tmp_path)])
    with pytest.raises(UserError, match="unknown task 'gsm'; did you mean gsm8k"):
        download.main([str(tmp_path), "--tasks", "gsm"])
    for content in (b"", b"a list", b"\xff\xfe"):
        (tmp_path / "odd.yaml").write_bytes(content)
        with pytest.raises(UserError, match="odd.yaml: "):
            download.main([str(tmp_path), "--config", str(tmp_path / "odd.yaml")])
    with pytest.raises(UserError, match="--config no.yaml: "):
        download.main([str(tmp_path), "--config", "no.yaml"])


def test_no_service_is_asked_to_convert_a_model(monkeypatch):
    """transformers would ask the Hub's bot, in public, from every process that loads a model of .bin files."""
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    ask = "import common.hub; from transformers.utils import is_env_variable_true as on; "
    assert python("-c", f"{ask}print(on('DISABLE_SAFETENSORS_CONVERSION'))").stdout.split() == ["True"]
