"""Models made of finished ones: pytest tests/test_merge.py"""

import json
import shutil
import weakref
from pathlib import Path
from statistics import fmean

import pytest
import torch
from conftest import make_model, write_rows
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, MixtralConfig

import eval as evaluation
from common import integrity
from common.config import TrainConfig
from common.errors import UserError
from common.hub import load_weights
from scripts import merge
from scripts.merging import drop, greedy
from scripts.merging import folders as folders_module
from training.loading import load_data

# --- drop -------------------------------------------------------------------------------------------------------------


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


def as_bin(folder):
    """Its weights in the old format, as some models are published."""
    for path in Path(folder).glob("*.safetensors"):
        torch.save(load_file(path), path.with_name(path.name.replace("model", "pytorch_model")).with_suffix(".bin"))
        path.unlink()
    index = Path(folder) / "model.safetensors.index.json"
    text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
    index.with_name("pytorch_model.bin.index.json").write_text(text)
    index.unlink()


def weights(folder):
    return {n: t for path in Path(folder).glob("*.safetensors") for n, t in load_file(path).items()}


def test_of_folders_with_several_files(tmp_path, folders, capsys):
    base, tuned = folders
    words = ["--base", base, "--tuned", tuned, "--output_dir", str(tmp_path / "out"), "--keep_ratio", "0.25"]
    merge.main(["drop", *words, "--exclude", "*embed*"])
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
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    assert f"- part: {base}, base\n- part: {tuned}, fine-tuned\n" in text and "arXiv 2406.15330" in text


def test_a_base_of_bin_files(tmp_path, folders):
    base, tuned = folders
    words = ["--base", base, "--tuned", tuned, "--keep_ratio", "0.25", "--output_dir"]
    merge.main(["drop", *words, str(tmp_path / "expected")])
    as_bin(base)
    merge.main(["drop", *words, str(tmp_path / "dry"), "--dry_run"])
    merge.main(["drop", *words, str(tmp_path / "out")])
    expected, out = weights(tmp_path / "expected"), weights(tmp_path / "out")
    assert all(torch.equal(out[name], value) for name, value in expected.items())
    with pytest.raises(UserError, match="base has .bin files alone: load and save it by transformers once"):
        merge.main(["average", "--models", tuned, base, "--output_dir", str(tmp_path / "mean")])
    for path in Path(base).glob("*.bin"):  # of torch before 1.6
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    folders_module._bin_tensors.cache_clear()
    merge.main(["drop", *words, str(tmp_path / "old")])
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "old").items())
    shutil.copytree(base, tmp_path / "cut")
    damaged = next((tmp_path / "cut").glob("*.bin"))
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(UserError, match="base .*cut: a file of its weights is damaged: "):
        merge.main(["drop", "--base", str(tmp_path / "cut"), *words[2:], str(tmp_path / "no")])


def test_the_base_may_be_of_the_hub(tmp_path, folders, monkeypatch):
    base, tuned = folders
    asked = []
    monkeypatch.setattr(
        folders_module, "snapshot_download", lambda *args, **kwargs: asked.append((args, kwargs)) or base
    )
    words = ["--tuned", tuned, "--output_dir", str(tmp_path / "out"), "--keep_ratio", "0.25"]
    merge.main(["drop", *words, "--base", "owner/name"])
    wanted = {"allow_patterns": ["model*.safetensors", "*.json", "*.jinja", "*.model"]}
    assert asked == [(("owner/name",), wanted)]
    as_bin(base)
    merge.main(["drop", *words[:2], "--output_dir", str(tmp_path / "bin"), *words[4:], "--base", "owner/name"])
    assert asked[1:] == [(("owner/name",), wanted), (("owner/name",), {"allow_patterns": "pytorch_model*.bin"})]
    monkeypatch.undo()
    with pytest.raises(UserError, match="base owner/name cannot be fetched: .*"):
        merge.main(["drop", "--base", "owner/name", *words[:2], "--output_dir", str(tmp_path / "other"), *words[4:]])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--keep_ratio", "0"], r"keep_ratio must be in \(0, 1\], got 0.0"),
        (["--drop_largest", "0.8"], r"drop_largest must be in \[0, 1 - keep_ratio\], got 0.8"),
        (["--drop_largest", "0.1", "--by", "random"], "no meaning with by random"),
        (["--base", "/no/such"], "base /no/such: no folder with a model's weights"),
        (["--exclude", "nothing"], "exclude pattern 'nothing' matches none of the 21"),
        (["--base", "WIDER"], r"lm_head.weight is \[259, 48\] in base, \[259, 32\] in tuned"),
        (["--base", "SHALLOW"], "has no tensor model.layers.1.* not the tuned one's base"),
        (["--base", "CUT"], "a file of its weights is damaged"),
        (["--base", "POINTER"], "damaged: model.safetensors is no safetensors file .a pointer of Git LFS"),
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
    (tmp_path / "POINTER").mkdir()
    (tmp_path / "POINTER" / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    more = [str(tmp_path / w) if w.isupper() else w for w in more]
    base, tuned = folders
    out = tmp_path / "out"
    with pytest.raises(UserError, match=message):
        merge.main(["drop", "--base", base, "--tuned", tuned, "--output_dir", str(out), "--keep_ratio", "0.3", *more])
    assert not out.exists() and not list(tmp_path.glob(".aside*"))


def test_the_working_folder_may_be_the_output(tmp_path, folders, monkeypatch):
    base, tuned = (str(Path(f).resolve()) for f in folders)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    merge.main(["drop", "--base", base, "--tuned", tuned, "--output_dir", ".", "--keep_ratio", "0.3"])
    assert (tmp_path / "here" / "COMPLETED").exists()


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
        merge.main(["drop", *words])
    (tmp_path / which / "COMPLETED").unlink()
    merge.main(["drop", *words])


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
    assert folders_module.saved_names(load_weights(str(base), device="meta")) == tensors.keys()
    words = ["--base", str(base), "--tuned", "no/such", "--output_dir", str(out), "--keep_ratio", "0.3", "--dry_run"]
    merge.main(["drop", *words])
    assert f"of {len(tensors)} tensors would keep 0.3" in capsys.readouterr().out and not out.exists()
    if architecture.model_type == "gpt2":  # published without the prefix, which from_pretrained adds
        bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        save_file(bare, base / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match="base .* has no tensor transformer.h.0.* saved under other names"):
            merge.main(["drop", *words])


# --- averages ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path, folders):
    """Three models, the first two in shards of different sizes; their up_proj of layer 0 is the same."""
    third = str(make_model(tmp_path / "third", seed=2))
    name = "model.layers.0.mlp.up_proj.weight"
    shared = weights(folders[0])[name]
    for folder in (*folders, third):
        for path in Path(folder).glob("*.safetensors"):
            tensors = load_file(path)
            if name in tensors:
                save_file({**tensors, name: shared}, path, {"format": "pt"})
    return [*folders, third]


def same_files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}


@pytest.mark.parametrize("given", [[], ["3", "0.5", "1.5"]], ids=["uniform", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_average_is_the_mean_of_the_weights(tmp_path, parts, given, dtype, capsys):
    if dtype != torch.float32:  # the first one's counts
        AutoModelForCausalLM.from_pretrained(parts[0], dtype=dtype).save_pretrained(parts[0])
    before = [same_files(folder) for folder in parts]
    out = tmp_path / "soup"
    out.mkdir()  # an empty one will do
    merge.main(["average", "--models", *parts, "--output_dir", str(out), *(["--weights", *given] if given else [])])
    assert "the average of 3 models" in capsys.readouterr().out and before == [same_files(folder) for folder in parts]
    w = [float(x) for x in given] or [1.0, 1.0, 1.0]
    tensors, found = [weights(folder) for folder in parts], weights(out)
    assert found.keys() == tensors[0].keys()
    for name, t in found.items():
        expected = sum(x * part[name].double() for x, part in zip(w, tensors, strict=True)) / sum(w)
        assert t.dtype == dtype and torch.allclose(t.double(), expected, rtol=1e-2 if dtype != torch.float32 else 1e-6)
    shared = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found[shared], tensors[0][shared])  # to the bit
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in found.items())
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(parts[0]).get_vocab()
    assert integrity.damaged_file(out) is None
    card = ModelCard.load(out / "README.md")
    assert card.data.tags == ["merge", "average"] and "Wortsman et al., 2022, arXiv 2203.05482" in card.text
    assert all(f"- part: {folder}, weight {x / sum(w):.4f}\n" in card.text for folder, x in zip(parts, w, strict=True))
    assert json.loads((out / "average.json").read_text())["models"] == parts


def test_an_average_holds_the_mean_and_one_tensor_more(tmp_path, parts, monkeypatch):
    """However many models there are."""
    alive, most, read = [], [], folders_module.Model.read

    def counting(self, name):
        tensor = read(self, name)
        alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(tensor)]
        most.append(sum(ref().nbytes for ref in alive))
        return tensor

    monkeypatch.setattr(folders_module.Model, "read", counting)
    merge.main(["average", "--models", *parts, parts[1], "--output_dir", str(tmp_path / "soup")])
    largest = max(t.nbytes for t in weights(parts[0]).values())
    assert len(most) == 4 * 21 and max(most) == 2 * largest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{0}"], "models: expected two or more, got 1"),
        (["{0}", "{1}", "--weights", "1"], "weights: expected one for each of 2 models, got 1"),
        (["{0}", "{1}", "--weights", "1", "-1"], "weights: expected numbers above 0, got 1 -1"),
        (["{0}", "{1}", "--weights", "1", "x"], "weights: expected numbers above 0, got 1 x"),
        (["{0}", "{1}", "--output_dir", "{0}"], "output_dir .*base exists already"),
        (["{0}", "no/such/model"], "model no/such/model: no folder with a model's weights"),
        (["{0}", "wider"], "model .*wider is not of the architecture of .*base: .*; hidden_size is 48, there 32"),
        (["{0}", "rope"], "model .*rope is not of the architecture of .*base: rope_parameters is "),
        (["{0}", "words"], "model .*words has not the vocabulary of .*base: token '<(pad|new)>' differs"),
        (["{0}", "cut"], "a file of its weights is damaged"),
    ],
)
def test_an_average_refuses(tmp_path, folders, words, message):
    out = tmp_path / "out"
    if "wider" in words:
        make_model(tmp_path / "wider", hidden_size=48)
    elif "rope" in words:
        make_model(tmp_path / "rope", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    elif "words" in words:
        make_model(tmp_path / "words")
        path = tmp_path / "words" / "tokenizer.json"
        path.write_text(path.read_text().replace("<pad>", "<new>"))
    elif "cut" in words:
        make_model(tmp_path / "cut")
        (tmp_path / "cut" / "model.safetensors").write_bytes(b"\x10\x00")
    words = [str(tmp_path / w) if (tmp_path / w).exists() else w.format(*folders) for w in words]
    with pytest.raises(UserError, match=message):
        merge.main(["average", "--output_dir", str(out), "--models", *words])
    assert not out.exists() and not list(tmp_path.glob(".aside*"))


def test_the_first_word_is_the_method(monkeypatch, capsys):
    with pytest.raises(UserError, match="the first word is the method, got 'avarage'; did you mean average"):
        merge.main(["avarage"])
    with pytest.raises(UserError, match="the first word is the method, got ''; known: drop, average"):
        merge.main([])
    for words in (["--help"], *([method, "--help"] for method in merge.METHODS)):
        with pytest.raises(SystemExit):
            merge.main(words)
    assert capsys.readouterr().out.count("| output_dir | str | required |") == 4
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="merge.py is one process, a launcher started 2"):
        merge.main(["average"])


# --- greedy soup ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shifted(tmp_path):
    """Models whose heads are one model's and a number, and a score that depends on the number alone."""
    base, shifts = make_model(tmp_path / "m"), [0.5, 0.1, 0.1, -0.7, 0.0, 0.9]
    head, found = load_file(base / "model.safetensors"), []
    for i, shift in enumerate(shifts):
        shutil.copytree(base, tmp_path / f"m{i}")
        tensors = {**head, "lm_head.weight": head["lm_head.weight"] + shift}
        save_file(tensors, tmp_path / f"m{i}" / "model.safetensors", {"format": "pt"})
        found.append(str(tmp_path / f"m{i}"))

    def score(shift):
        return 1 - round(abs(shift - 0.2), 4)

    def score_of(folder):
        return score(
            float((load_file(Path(folder) / "model.safetensors")["lm_head.weight"] - head["lm_head.weight"]).mean())
        )

    return found, shifts, score, score_of


def recipe(shifts, score):
    """GreedySoup, recipe 1 of the paper: the numbers of the models in the soup, and its score."""
    order = sorted(range(len(shifts)), key=lambda i: -score(shifts[i]))
    soup = [order[0]]
    for i in order[1:]:
        if score(fmean(shifts[j] for j in [*soup, i])) >= score(fmean(shifts[j] for j in soup)):
            soup.append(i)
    return soup, score(fmean(shifts[j] for j in soup))


def test_greedy_is_the_recipe_and_goes_on_where_it_was_cut(tmp_path, shifted, monkeypatch, capsys):
    models, shifts, score, score_of = shifted
    calls = []

    def fake(words):
        model = words[words.index("--model") + 1]
        calls.append((words, (Path(model) / "model.safetensors").stat().st_mtime_ns))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return {"t.p": {"score": score_of(model), "unit": "share"}}

    monkeypatch.setattr(greedy.eval_program, "main", fake)
    out = tmp_path / "soup" / "final"
    words = ["greedy", "--models", *models, "--output_dir", str(out), "--tasks", "gsm8k", "--limit=7"]
    with pytest.raises(KeyboardInterrupt):
        merge.main(words)
    merge.main(words)
    assert calls[7] == calls[8]  # the evaluation that was cut goes on with the very same model
    assert len(calls) == 1 + len(models) + len(models) - 1  # each model, each candidate, and the one that was cut
    assert all(called[:3] == ["--tasks", "gsm8k", "--limit=7"] for called, _ in calls)
    assert not list((tmp_path / "soup").rglob("model"))

    soup, best = recipe(shifts, score)
    assert 1 < len(soup) < len(models)
    record = json.loads((out / "greedy.json").read_text())
    assert record["soup"] == [models[i] for i in soup] and record["score"] == pytest.approx(best)
    expected = {n: sum(weights(models[i])[n].double() for i in soup) / len(soup) for n in weights(out)}
    assert all(torch.allclose(t.double(), expected[n], rtol=1e-6, atol=1e-7) for n, t in weights(out).items())
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {tmp_path}")]
    assert [row[0].removeprefix("| ") for row in table if row[3] != "left out |"] == record["soup"]
    assert [float(row[1]) for row in table] == pytest.approx(sorted(map(score, shifts), reverse=True))

    shutil.rmtree(out)
    merge.main(words)
    assert len(calls) == 12  # all scores are there
    shutil.rmtree(out)
    merge.main([*words[:-1], "--limit=8"])  # other scores
    assert len(calls) == 12 + 11
    shutil.rmtree(out)
    path = Path(models[0]) / "model.safetensors"
    save_file(load_file(path), path, {"format": "pt"})  # another model, perhaps
    merge.main([*words[:-1], "--limit=8"])
    assert len(calls) > 12 + 11


def test_greedy_by_eval_itself(tmp_path, folders):
    """The loss of texts: less is better. A merged model's card is given its scores."""
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "Once upon a time"}, {"text": "there was"}])
    words = ["--tasks", f"text_loss={texts}", "--dtype", "float32", "--workers", "1"]
    out = tmp_path / "soup"
    merge.main(["greedy", "--models", *folders, "--output_dir", str(out), "--work_dir", str(tmp_path / "w"), *words])

    def loss(model):
        (entry,) = evaluation.main(
            [*words, "--model", str(model), "--output_dir", str(tmp_path / Path(model).name / "e")]
        ).values()
        return entry["score"]

    record = json.loads((out / "greedy.json").read_text())
    first, *rest = record["soup"]
    assert loss(first) == min(map(loss, folders)) and record["score"] == pytest.approx(-loss(out))
    assert loss(out) <= loss(first) and (bool(rest) or loss(out) == loss(first))
    card = ModelCard.load(out / "README.md")
    assert card.data.eval_results[0].metric_value == loss(out) and card.data.tags == ["merge", "greedy"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "missing: --tasks"),
        (["--tasks", "gsm8k", "--model", "m"], "model has no meaning here"),
        (["--tasks", "gsm8k", "--score_only"], "score_only has no meaning here"),
        (["--tasks", "gsm8k", "--limt", "3"], "unknown key 'limt'; did you mean limit"),
    ],
)
def test_greedy_refuses(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        merge.main(["greedy", "--models", "a", "b", "--output_dir", str(tmp_path / "soup"), *words])


# --- Fisher -----------------------------------------------------------------------------------------------------------


def slow_fisher(folder, examples):
    """The mean over examples of the squared gradient of the answer's log-probability, from the model's own logits."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for row in examples.rows:
        model.zero_grad()
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        logp = model(ids[None]).logits[0].log_softmax(-1)
        sum(logp[i - 1, labels[i]] for i in range(1, len(ids)) if labels[i] >= 0).backward()
        for n, p in model.named_parameters():
            total[n] += p.grad**2 / len(examples)
    return total


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_fisher_is_its_equation(tmp_path, rows_file, tied):
    models = [str(make_model(tmp_path / f"m{i}", seed=i, tie_word_embeddings=tied)) for i in range(3)]
    if tied:  # as some are published: with a copy of the tied one
        for folder in models:
            tensors = weights(folder)
            copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
            save_file({**tensors, **copy}, f"{folder}/model.safetensors", {"format": "pt"})
    words = ["fisher", "--models", *models, "--weights", "1", "2", "0.5", "--dataset", f"{rows_file}:4"]
    merge.main([*words, "--output_dir", str(tmp_path / "out")])
    config = TrainConfig(model=models[0], dataset=[f"{rows_file}:4"], output_dir="o", rule="none")
    _, examples, _ = load_data(config)
    tensors, found = [weights(folder) for folder in models], weights(tmp_path / "out")
    importance = [
        {n: w * t for n, t in slow_fisher(m, examples).items()} for m, w in zip(models, (1, 2, 0.5), strict=True)
    ]
    assert found.keys() == tensors[0].keys() and "lm_head.weight" in found
    for name, t in found.items():
        if tied and name == "lm_head.weight":
            assert torch.equal(t, found["model.embed_tokens.weight"])
            continue
        f = torch.stack([part[name].double() for part in importance])
        w = torch.stack([part[name].double() for part in tensors])
        expected = torch.where(f.sum(0) > 0, (f * w).sum(0) / f.sum(0), w.mean(0))
        # where all F are about 0 their ratio is not known to many digits
        sure = (f.sum(0) == 0) | (f.sum(0) > 1e-6 * f.max())
        assert torch.allclose(t.double()[sure], expected[sure], rtol=1e-3, atol=1e-5), name
    unseen = found["model.embed_tokens.weight"][100]  # no row has this byte
    if not tied:
        assert torch.allclose(unseen, sum(t["model.embed_tokens.weight"][100] for t in tensors) / 3, atol=1e-7)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "2111.09832" in card.text and "weight 2 times its Fisher information" in card.text
    assert not list(tmp_path.glob(".*"))
