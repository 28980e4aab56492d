"""One-off drop of the task vector: pytest tests/test_drop.py"""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from common import integrity
from common.config import UserError
from common.hub import load_weights
from scripts import drop


def pair(*shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=g)
    return base.to(dtype), (base + 0.1 * torch.randn(shape, generator=g)).to(dtype)


def breadcrumbs(delta, density, gamma):
    """mergekit's magnitude_outliers, as it is defined: sorted, the ends cut off."""
    n = delta.numel()
    n_top = int(gamma * n)
    n_bot = n - int(density * n) - n_top
    order = delta.abs().flatten().sort().indices
    mask = torch.zeros(n)
    mask[order[n_bot : n - n_top]] = 1
    return delta * mask.view_as(delta)


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.25])
def test_breadcrumbs_is_mergekits(gamma):
    base, tuned = pair(40, 50)
    out = drop.drop_delta(base, tuned, 0.3, drop_largest=gamma)
    kept = breadcrumbs(tuned - base, 0.3, gamma) != 0
    assert torch.equal(out, torch.where(kept, tuned, base)) and kept.sum() == 600


def test_dare_is_its_papers_and_mergekits_with_the_same_mask():
    base, tuned = pair(40, 50)
    delta = tuned - base
    plain = drop.drop_delta(base, tuned, 0.3, "random", name="w")
    mask = plain != base
    assert mask.sum() == 600  # exactly, where the paper draws each entry: the mean is the same
    dare = drop.drop_delta(base, tuned, 0.3, "random", rescale="ratio", name="w")
    assert torch.allclose(dare, base + mask * delta / 0.3, atol=1e-6)
    l1 = drop.drop_delta(base, tuned, 0.3, "random", rescale="l1", name="w")
    masked = mask * delta
    assert torch.allclose(l1, base + masked * delta.abs().sum() / masked.abs().sum(), atol=1e-6)
    assert not torch.equal(plain, drop.drop_delta(base, tuned, 0.3, "random", name="w", seed=1))
    assert not torch.equal(plain, drop.drop_delta(base, tuned, 0.3, "random", name="v"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kept_entries_are_exactly_the_tuned_ones(dtype):
    base, tuned = pair(64, 33, dtype=dtype)
    out = drop.drop_delta(base, tuned, 0.2)
    assert out.dtype == dtype and ((out == tuned) | (out == base)).all()
    assert abs((out != base).float().mean() - 0.2) < 0.01
    assert torch.equal(drop.drop_delta(base, tuned, 1.0), tuned)


def test_each_matrix_of_a_stack_is_dropped_by_itself():
    base, tuned = pair(3, 20, 10)
    tuned[1] += 5
    out = drop.drop_delta(base, tuned, 0.3, rescale="l1", drop_largest=0.1)
    for i in range(3):
        assert torch.allclose(out[i], drop.drop_delta(base[i], tuned[i], 0.3, rescale="l1", drop_largest=0.1))


@pytest.fixture
def folders(tmp_path):
    base, tuned = make_model(tmp_path / "base"), make_model(tmp_path / "tuned", seed=1)
    for folder, size in ((base, "30KB"), (tuned, "50KB")):  # sharded, each in its own way
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size=size)
        (folder / "model.safetensors").unlink()
    assert len(list(base.glob("*.safetensors"))) > len(list(tuned.glob("*.safetensors"))) > 2
    return str(base), str(tuned)


def weights(folder):
    return {n: t for path in Path(folder).glob("*.safetensors") for n, t in load_file(path).items()}


def test_of_folders_with_several_files(tmp_path, folders, capsys):
    base, tuned = folders
    words = ["--base", base, "--tuned", tuned, "--output_dir", str(tmp_path / "out"), "--keep_ratio", "0.25"]
    drop.main([*words, "--exclude", "*embed*"])
    assert "15 of 21 tensors keep 0.25" in capsys.readouterr().out
    out, a, b = weights(tmp_path / "out"), weights(base), weights(tuned)
    assert out.keys() == b.keys()
    for name, t in out.items():
        if t.dim() < 2 or "embed" in name:
            assert torch.equal(t, b[name])
        else:
            assert torch.equal(t, drop.drop_delta(a[name], b[name], 0.25)) and not torch.equal(t, b[name])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in out.items())
    assert json.loads((tmp_path / "out" / "drop.json").read_text())["keep_ratio"] == 0.25
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_the_base_may_be_of_the_hub(tmp_path, folders, monkeypatch):
    base, tuned = folders
    asked = []
    monkeypatch.setattr(drop, "snapshot_download", lambda *args, **kwargs: asked.append((args, kwargs)) or base)
    words = ["--tuned", tuned, "--output_dir", str(tmp_path / "out"), "--keep_ratio", "0.25"]
    drop.main([*words, "--base", "owner/name"])
    assert asked == [(("owner/name",), {"allow_patterns": ["model*.safetensors", "*.json"]})]
    monkeypatch.undo()
    with pytest.raises(UserError, match="base owner/name cannot be fetched: .*"):
        drop.main(["--base", "owner/name", *words[:2], "--output_dir", str(tmp_path / "other"), *words[4:]])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--keep_ratio", "0"], r"keep_ratio must be in \(0, 1\], got 0.0"),
        (["--drop_largest", "0.8"], r"drop_largest must be in \[0, 1 - keep_ratio\], got 0.8"),
        (["--drop_largest", "0.1", "--by", "random"], "no meaning with by random"),
        (["--base", "/no/such"], "base /no/such: no folder with .safetensors files"),
        (["--exclude", "nothing"], "exclude pattern 'nothing' matches none of the 21"),
        (["--base", "WIDER"], r"lm_head.weight is \[259, 48\] in base, \[259, 32\] in tuned"),
        (["--base", "SHALLOW"], "has no tensor model.layers.1.* not the tuned one's base"),
        (["--base", "CUT"], "a safetensors file is damaged"),
        (["--tuned", "WRAPPED"], "tuned .*WRAPPED: the weights are not those of the model: .*'_orig_mod.'"),
        (["--dry_run", "--exclude", "nothing"], "exclude pattern 'nothing' matches none of the 21"),
    ],
)
def test_refusals(tmp_path, folders, more, message):
    make_model(tmp_path / "WIDER", hidden_size=48)
    make_model(tmp_path / "SHALLOW", num_hidden_layers=1)
    make_model(tmp_path / "WRAPPED")
    wrapped = {f"_orig_mod.{name}": t for name, t in load_file(tmp_path / "WRAPPED/model.safetensors").items()}
    save_file(wrapped, tmp_path / "WRAPPED/model.safetensors", {"format": "pt"})
    (tmp_path / "CUT").mkdir()
    (tmp_path / "CUT" / "model.safetensors").write_bytes(b"\x10\x00")
    more = [str(tmp_path / w) if w.isupper() else w for w in more]
    base, tuned = folders
    out = tmp_path / "out"
    with pytest.raises(UserError, match=message):
        drop.main(["--base", base, "--tuned", tuned, "--output_dir", str(out), "--keep_ratio", "0.3", *more])
    assert not out.exists() and not list(tmp_path.glob(".aside*"))


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_a_flipped_bit_is_noticed(tmp_path, folders, which):
    base, tuned = map(Path, folders)
    words = ["--base", str(base), "--tuned", str(tuned), "--output_dir", str(tmp_path / "out"), "--keep_ratio", "0.3"]
    for folder in (base, tuned):
        integrity.seal(folder)
    damaged = max((tmp_path / which).glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=f"{which} .*{which}: {damaged.name} is missing, cut or changed since"):
        drop.main(words)
    (tmp_path / which / "COMPLETED").unlink()
    drop.main(words)


TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "architecture",
    [
        LlamaConfig(**TINY, intermediate_size=48, tie_word_embeddings=True),
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2),
        MixtralConfig(**TINY, intermediate_size=48, num_local_experts=4),  # its experts are one tensor in memory
    ],
    ids=lambda architecture: architecture.model_type,
)
def test_a_dry_run_knows_what_a_run_will_need(tmp_path, architecture, capsys):
    """Names are those that a trained model will be saved with; a base with others is refused before any training."""
    base, out = tmp_path / "base", tmp_path / "out"
    AutoModelForCausalLM.from_config(architecture).save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    assert drop.saved_names(load_weights(str(base), device="meta")) == tensors.keys()
    words = ["--base", str(base), "--tuned", "no/such", "--output_dir", str(out), "--keep_ratio", "0.3", "--dry_run"]
    drop.main(words)
    assert f"of {len(tensors)} tensors would keep 0.3" in capsys.readouterr().out and not out.exists()
    if architecture.model_type == "gpt2":  # published without the prefix, which from_pretrained adds
        bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        save_file(bare, base / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match="base .* has no tensor transformer.h.0.* saved under other names"):
            drop.main(words)
