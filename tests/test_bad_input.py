"""Wrong input ends in one clear line: pytest tests/test_bad_input.py

Most cases call main() in this process and look at the UserError; the last tests show that `python train.py` and
`python eval.py` turn it into one line on standard error and exit code 2.
"""

import errno
import gzip
import json
import os
import resource
import shutil

import pytest
import torch
from conftest import ROOT, make_model, python, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import eval as evaluation
import train
from common import run_folder
from common.config import EvalConfig, TrainConfig, parse
from common.errors import UserError
from common.hub import from_pretrained, load_weights

GOOD = '{"query": "q", "response": "r"}\n'


@pytest.fixture
def run(tmp_path, train_args):
    """Call train.main with settings that replace or extend those of a good run."""

    def call(**settings):
        words = train_args(tmp_path / "run")
        given = dict(zip(words[::2], words[1::2], strict=True))
        given.update({f"--{k}": str(v) for k, v in settings.items()})
        return train.main([f"{k}={v}" for k, v in given.items() if v != "None"])

    return call


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lerning_rate": 1}, r"--lerning_rate: unknown key 'lerning_rate'; did you mean learning_rate\?"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"learning_rate": "nan"}, "learning_rate must be a finite number, got 'nan'"),
        ({"learning_rate": "inf"}, "learning_rate must be a finite number"),
        ({"learning_rate": 0}, "learning_rate must be above 0, got 0.0"),
        ({"epochs": 1.5}, "epochs must be a whole number, got '1.5'"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"deterministic": "maybe"}, "deterministic must be true or false, got 'maybe'"),
        ({"rule": "gmtt"}, r"rule: unknown word 'gmtt'; did you mean gmt\?"),
        (
            {"rule": "gmt", "keep_ratio": 0.2, "masked_weights": "froze"},
            "masked_weights must be one of momentum, frozen, update; got 'froze'",
        ),
        ({"rule": "gmt", "keep_ratio": 0.2, "score": "gradients"}, "score must be one of gradient, random"),
        ({"rule": "gmt", "keep_ratio": 0.2, "refresh_every": -2}, "refresh_every must be at least 0, got -2"),
        ({"refresh_every": 5}, "refresh_every has no meaning for rule none"),
        ({"rule": "gmt", "keep_ratio": 0.2, "lift_rank": 8}, "lift_rank is of score low_rank"),
        ({"rule": "lift", "keep_ratio": 0.2, "lift_rank": 0}, "lift_rank must be at least 1, got 0"),
        ({"rule": "lift", "keep_ratio": 0.2, "scope": "model"}, "one matrix at a time: use scope tensor"),
        ({"rule": "mofo", "keep_ratio": 0.2, "optimizer": "adamw_8bit"}, "which optimizer adamw_8bit holds in 8 bits"),
        ({"rule": "mofo", "keep_ratio": 0.2, "mixed_precision": "fp16"}, "masked_weights update needs its own opt"),
        ({"rule": "mofo", "keep_ratio": 0.2, "clip": "after"}, "clip after clips what masking leaves"),
        ({"rule": "gmt", "keep_ratio": 0.2, "clip": "after", "max_grad_norm": 0}, "it needs a max_grad_norm above 0"),
        ({"clip": "after"}, "clip has no meaning for rule none"),
        ({"masked_weights": "frozen"}, "masked_weights has no meaning for rule none"),
        (
            {"masked_weights": "frozen", "rule": "gmt", "keep_ratio": 0.2, "mixed_precision": "fp16"},
            "masked_weights frozen needs its own optimizer step",
        ),
        ({"rule": "gmt"}, r"rule gmt needs keep_ratio, the fraction of entries kept, in \(0, 1\]"),
        ({"rule": "gmt", "keep_ratio": 0}, r"must be in \(0, 1\], got 0.0"),
        ({"rule": "rmt", "keep_ratio": 1.5}, r"must be in \(0, 1\], got 1.5"),
        ({"keep_ratio": 0.2}, "keep_ratio has no meaning for rule none"),
        ({"rule": "hft", "keep_ratio": 0.2}, "keep_ratio has no meaning for rule hft"),
        ({"scope": "model"}, "scope has no meaning for rule none"),
        ({"exclude": "*embed*"}, "exclude has no meaning for rule none"),
        ({"mask_vectors": "true"}, "mask_vectors has no meaning for rule none"),
        ({"rule": "gmt", "keep_ratio": 0.2, "exclude": "embedd"}, "exclude pattern 'embedd' matches none of"),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, r"warmup_ratio \(0.1\) or warmup_steps \(5\), not both"),
        ({"decay_ratio": 0.2}, "decay_ratio is of lr_schedule wsd and power: leave it out for cosine"),
        ({"lr_schedule": "wsd", "power_a": 1}, "power_a is of lr_schedule power: leave it out for wsd"),
        ({"lr_schedule": "wsd", "decay_ratio": 1.5}, r"decay_ratio must be in \[0, 1\], got 1.5"),
        ({"lr_schedule": "wsd", "decay_ratio": 0.6, "warmup_ratio": 0.5}, "together are more than the run"),
        ({"lr_schedule": "power"}, "power needs a power_a above 0 and a power_b below 0, got None and -0.51"),
        ({"lr_schedule": "power", "power_a": 1, "power_b": 0.5}, "above 0 and a power_b below 0, got 1.0 and 0.5"),
        ({"warmup_ratio": 1}, r"warmup_ratio must be in \[0, 1\), got 1.0"),
        ({"eval_every": 5}, "eval_every 5 needs eval_rows"),
        (
            {"rule": "grad_square", "keep_ratio": 0.2},
            "grad_square, which needs at least 1; got 0 with rule grad_square",
        ),
        ({"calibration_steps": 3}, "calibration_steps is for rule grad_square, .* got 3 with rule none"),
        ({"mask_jaccard": "true", "rule": "rmt", "keep_ratio": 0.2}, "mask_jaccard needs log_masks_every"),
        ({"mask_jaccard": "true", "log_masks_every": 1}, "mask_jaccard has no meaning for rule none"),
        ({"mask_update_share": "true", "rule": "rmt", "keep_ratio": 0.2}, "mask_update_share needs log_masks_every"),
        (
            {"mask_update_share": "true", "rule": "mofo", "keep_ratio": 0.2, "log_masks_every": 1},
            "mask_update_share has no meaning with masked_weights update, under which masked weights do not move",
        ),
        (
            {"optimizer": "mezo", "adapter": "lora", "lora_dropout": 0.1},
            "lora_dropout has no meaning for optimizer mezo",
        ),
        ({"trackers": "tensorbord"}, "unknown word 'tensorbord'; did you mean tensorboard"),
        ({"optimizer": "adam"}, "must be one of adamw, adamw_8bit, paged_adamw_8bit, mezo, subzero, got 'adam'"),
        ({"resume": "true", "overwrite": "true"}, "set one of the two"),
        ({"resume_changed": "true"}, "no meaning without resume"),
        ({"template": "metamaths"}, "unknown word 'metamaths'; did you mean metamath?"),
        ({"master_dtype": "float64", "mixed_precision": "bf16"}, "float64 needs mixed_precision fp32, got bf16"),
        # batch arithmetic: all the numbers
        ({"micro_batch_tokens": 100}, "max_length 512 tokens, but a forward pass takes micro_batch_tokens 100"),
        (
            {"global_batch_size": 71},
            "global_batch_size 71, 1 processes, 70 examples: a step would be larger than the data; lower global_b",
        ),
        (
            {"per_device_batch_size": 17},
            "global_batch_size 16, 1 processes, per_device_batch_size 17: one forward pass",
        ),
        ({"eval_rows": 70}, "eval_rows 70 leaves nothing to train on: there are 70 examples"),
        ({"model": "None"}, "missing: --model"),
        ({"model": "/no/such"}, "model /no/such: no such folder"),
        ({"tokenizer": "/no/such"}, "tokenizer /no/such: no such folder"),
        ({"model": "owner/not-in-the-cache"}, "tokenizer owner/not-in-the-cache cannot be loaded: "),
        (
            {"dataset": "owner/not-in-the-cache"},
            "dataset owner/not-in-the-cache, split train: no local path, and neither",
        ),
        ({"dataset": "missing.jsonl"}, "dataset missing.jsonl: no such file or folder"),
        ({"config": "missing.yaml"}, "--config missing.yaml: no such file"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)
def test_settings(run, settings, message):
    with pytest.raises(UserError, match=message):
        run(**settings)


def test_fp16_needs_a_gpu(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="bf16 gradients, which fp16's gradient scaler does not know: use bf16"):
        run(mixed_precision="fp16", master_dtype="bfloat16")
    with pytest.raises(UserError, match="mixed_precision fp16 needs a GPU"):
        run(mixed_precision="fp16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1\n", "unknown key 'learning_rat'; did you mean learning_rate"),
        ("learning_rate: [1, 2]\n", "learning_rate must be one value, got '1 2'"),
        ("learning_rate: {a: 1}\n", "learning_rate: expected one value or a flat list"),
        ("epochs: yes\n", "epochs must be a whole number, got 'True'"),
        ("just words\n", "expected lines of `key: value`, got str"),
        ("", "expected lines of `key: value`, got NoneType"),
        ("a: b: c\n", "not valid YAML: mapping values are not allowed here"),
        (b"rule: \xff\n", "cannot be read"),
    ],
)
def test_yaml(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        parse(TrainConfig, ["--config", str(path)])


def test_words_follow_yaml_and_types_are_the_same(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: m\ndataset: d\noutput_dir: o\nlearning_rate: 5e-6\nexclude: [a, b]\nseed:\nrule: rmt\nkeep_ratio: 1\n"
    )
    config = parse(TrainConfig, ["--seed", "3", "--config", str(path), "--learning-rate", "1e-3", "--resume"])
    assert (config.learning_rate, config.exclude, config.seed, config.resume) == (1e-3, ["a", "b"], 3, True)
    assert parse(TrainConfig, ["--config", str(path)]).learning_rate == 5e-6
    for word in ("on", "off", "auto"):  # to YAML 1.1 two of them are booleans
        (tmp_path / "packing.yaml").write_text(path.read_text() + f"packing: {word}\n")
        assert parse(TrainConfig, ["--config", str(tmp_path / "packing.yaml")]).packing == word
    with pytest.raises(UserError, match="unknown key 'learn'"):  # no abbreviations
        parse(TrainConfig, ["--learn", "1"])
    with pytest.raises(UserError, match="unexpected argument 'x'"):
        parse(TrainConfig, ["x"])
    with pytest.raises(UserError, match="tasks is empty"):
        parse(EvalConfig, ["--output_dir", "o", "--tasks"])


def test_a_rule_on_the_command_line_takes_the_place_of_the_yamls(tmp_path):
    path = tmp_path / "c.yaml"
    head = "model: m\ndataset: d\noutput_dir: o\nkeep_ratio: 0.2\nscope: model\n"
    path.write_text(head + "rule: grad_square\ncalibration_steps: 2\n")
    words = ["--config", str(path), "--rule"]
    config = parse(TrainConfig, [*words, "rmt"])
    assert (config.keep_ratio, config.scope, config.calibration_steps) == (0.2, "model", 0)
    for rule in ("none", "hft"):
        config = parse(TrainConfig, [*words, "gmt", "--rule", rule])
        assert (config.rule, config.keep_ratio, config.scope) == (rule, None, "tensor")
    assert parse(TrainConfig, [*words, "grad_square"]).calibration_steps == 2
    path.write_text(head.replace("scope: model", "scope: tensor") + "rule: lift\nlift_rank: 8\nclip: after\n")
    assert [parse(TrainConfig, [*words, rule]).lift_rank for rule in ("lift", "gmt", "none")] == [8, 64, 64]
    assert parse(TrainConfig, [*words, "gmt", "--score", "low_rank"]).lift_rank == 8
    with pytest.raises(UserError, match="keep_ratio has no meaning for rule none"):  # asked for here and now
        parse(TrainConfig, [*words, "none", "--keep_ratio", "0.2"])
    with pytest.raises(UserError, match="unknown word 'nome'; did you mean none"):
        parse(TrainConfig, [*words, "nome"])
    path.write_text(head + "rule: none\n")
    with pytest.raises(UserError, match="keep_ratio has no meaning for rule none"):
        parse(TrainConfig, words[:2])


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("\n \n", "no rows"),
        (GOOD + "{broken\n", "line 2: malformed JSON: Expecting property name"),
        (GOOD + '{"query": "q"', "line 2: malformed JSON"),
        (GOOD + "[1]\n", "line 2: expected an object"),
        (GOOD.encode() + b'{"query": "\xff"}\n', r"line 2: not valid UTF-8 \(byte 12 of the line\)"),
        (b"\xef\xbb\xbf" + GOOD.encode(), "byte-order mark"),
        (GOOD + '{"query": %s, "response": "r"}' % ("[" * 100_000), "line 2: cannot be read: nested too deeply"),
        (GOOD + '{"query": %s, "response": "r"}' % ("9" * 5000), "line 2: cannot be read: Exceeds the limit"),
        (GOOD + '{"query": "q"}\n', "line 2: no column 'response'; the row has 'query'"),
        (GOOD + '{"query": null, "response": "r"}\n', "line 2: column 'query' must be text, got null"),
        (GOOD + '{"query": 3, "response": "r"}\n', "line 2: column 'query' must be text, got int"),
        (GOOD + '{"query": [1], "response": "r"}\n', "line 2: column 'query' must be text, got list"),
        (GOOD + '{"query": "q", "response": "\\ud800"}\n', "line 2: column 'response' holds half of a surrogate pair"),
    ],
)
def test_rows(run, tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        run(dataset=path)
    assert "rows.jsonl" in str(error.value)


def test_gzip_array_parquet_and_folder(run, tmp_path):
    whole = gzip.compress((GOOD * 5000).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "not.jsonl.gz").write_text(GOOD)
    (tmp_path / "array.json").write_text(f"[{GOOD},\n{GOOD},\n{{]")
    (tmp_path / "item.json").write_text(f'[{GOOD}, {{"query": "q"}}]')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.csv").write_text("query,response\n")
    import pandas

    pandas.DataFrame([{"query": "q", "response": None}, {"query": "q", "response": "r"}]).to_parquet(
        tmp_path / "n.parquet"
    )
    pandas.DataFrame([{"query": ["q"], "response": "r"}]).to_parquet(tmp_path / "l.parquet")
    for name, message in {
        "cut.jsonl.gz": "cut.jsonl.gz: not a complete gzip file after line",
        "not.jsonl.gz": "not a complete gzip file",
        "array.json": "array.json, line 5: malformed JSON",
        "item.json": "item.json, item 2: no column 'response'",
        "bad.parquet": "bad.parquet: cannot be read",
        "n.parquet": "column 'response' is null in 1 of 2 rows, the first is row 1",
        "l.parquet": "column 'query' must be text, got List",
        "empty": "the folder holds no .jsonl",
        "rows.csv": "expected a file that ends in .jsonl",
    }.items():
        with pytest.raises(UserError, match=message):
            run(dataset=tmp_path / name)


def test_lengths_and_token_ids(run, tmp_path):
    with pytest.raises(
        UserError, match="none of the 70 examples can be trained on: 70 with no token to train on within max_length"
    ):
        run(max_length=20)
    with pytest.raises(UserError, match="an example has 2.. tokens, the model's context is 100: lower max_length"):
        run(model=make_model(tmp_path / "short", max_position_embeddings=100))
    small = make_model(tmp_path / "small", vocab_size=200)
    with pytest.raises(UserError, match=r"token id \d+ is beyond the model's embedding of 200 rows"):
        run(model=small)


def test_overlong_examples_are_reported(run, capsys):
    run(max_length=210, max_steps=1)
    out = capsys.readouterr().out
    cut = int(out.split(" cut to max_length 210")[0].rsplit("(", 1)[1])
    assert 0 < cut < 70


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def renamed(model_dir, tmp_path_factory):
    """Copy the tiny model, with other names for its tensors (None: without it), and changes to its config.json."""

    def copy(rename=lambda name: name, more=None, source=model_dir, **config):
        folder = tmp_path_factory.mktemp("renamed") / "model"
        shutil.copytree(source, folder)
        weights = {rename(name): t for name, t in load_file(folder / "model.safetensors").items()}
        weights.pop(None, None)
        save_file({**weights, **(more or {})}, folder / "model.safetensors", {"format": "pt"})
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return folder

    return copy


@pytest.mark.parametrize(
    ("rename", "change", "message"),
    [
        (lambda n: f"_orig_mod.{n}", {}, "21 missing .* 21 unknown .* the prefix '_orig_mod.' of a wrapper: save"),
        (lambda n: f"module.{n}", {}, "the prefix 'module.' of a wrapper"),
        (lambda n: f"base_model.model.{n}", {}, "the prefix 'base_model.model.' of a wrapper"),
        (lambda n: f"module._orig_mod.{n}", {}, "the prefix '(_orig_mod|module).' of a wrapper"),
        (lambda n: n.replace(".0.", ".0._checkpoint_wrapped_module."), {}, "prefix '_checkpoint_wrapped_module.'"),
        (
            lambda n: f"base_model.model.{n}".replace("q_proj", "q_proj.base_layer"),
            {},
            "an adapter's: merge it into its base",
        ),
        (lambda n: n if n != "lm_head.weight" else None, {}, "1 missing in the file: lm_head.weight; they do not fit"),
        (lambda n: n if ".1." not in n else None, {}, "9 missing in the file: model.layers.1.input_layernorm.weight, "),
        (lambda n: n, {"num_hidden_layers": 3}, "9 missing in the file: model.layers.2"),
        (lambda n: n, {"num_hidden_layers": 1}, "9 unknown to the model: model.layers.1"),
        (lambda n: n, {"vocab_size": 300}, r"2 of another shape: lm_head.weight is \[259, 32\], expected \[300, 32\]"),
        (lambda n: n.replace("lm_head", "score"), {}, "1 missing .*: lm_head.weight; 1 unknown .*: score.weight"),
    ],
)
@pytest.mark.parametrize("device", [None, "meta"])
def test_weights_of_another_model_are_refused(renamed, rename, change, message, device):
    with pytest.raises(UserError, match=message):
        load_weights(str(renamed(rename, **change)), device=device)


def test_tied_heads_optional_tensors_and_old_masks_are_fine(renamed, model_dir, tmp_path):
    assert load_weights(str(model_dir), dtype=torch.bfloat16).dtype == torch.bfloat16
    masks = {"model.layers.0.attn.masked_bias": torch.ones(1), "model.layers.0.rotary_emb.inv_freq": torch.ones(4)}
    load_weights(str(renamed(more=masks)))
    tied = make_model(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    load_weights(str(tied))
    with pytest.raises(UserError, match="the prefix 'module.' of a wrapper"):  # the head is not in the file
        load_weights(str(renamed(lambda n: f"module.{n}", source=tied)))
    with pytest.raises(UserError, match="embed_tokens"):
        load_weights(str(renamed(lambda n: n if "embed" not in n else None, source=tied)))


def test_adapters_and_damaged_generation_configs(renamed):
    adapter = renamed()
    (adapter / "adapter_config.json").write_text("{}")
    for load in (load_weights, lambda source: from_pretrained(AutoConfig, source, "model")):
        with pytest.raises(UserError, match="this is an adapter; merge it into its base first"):
            load(str(adapter))
    damaged = renamed()
    for text in ("{", "[1]"):
        (damaged / "generation_config.json").write_text(text)
        with pytest.raises(UserError, match="generation_config.json cannot be read"):
            load_weights(str(damaged))


@pytest.mark.parametrize("folder", ["common", "evaluation", "scripts", "tasks", "training", "."])
def test_all_weights_are_loaded_by_load_weights(folder):
    files = [p for p in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py") if p.name != "hub.py"]
    assert files and not [p for p in files if "AutoModelForCausalLM.from_pretrained" in p.read_text()]


def test_a_tokenizer_in_sentencepieces_format_alone(model_dir, tmp_path):
    """It is read; where the packages that read it are not installed, they are named."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("".join(f"{i} apples and pears, {i * 7} plums\n" for i in range(200)))
    shutil.copytree(model_dir, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "model" / "tokenizer"), vocab_size=60,
        model_type="bpe", minloglevel=2,
    )  # fmt: skip
    load = (
        "import sys; from transformers import AutoTokenizer; from common.errors import run_main; "
        "from common.hub import from_pretrained; "
        f"run_main(lambda: print(from_pretrained(AutoTokenizer, {str(tmp_path / 'model')!r}, 'tokenizer')('9')), 'x')"
    )
    assert "input_ids" in python("-c", load).stdout
    for module, package in (("sentencepiece", "sentencepiece"), ("google.protobuf", "protobuf")):
        done = python("-c", f"import sys; sys.modules[{module!r}] = None; {load}")
        assert done.returncode == 2 and f"its tokenizer.model needs: pip install {package}" in done.stderr, done.stderr


# --- output folder ---------------------------------------------------------------------------------------------------


def test_output_folder(run, tmp_path):
    with pytest.raises(UserError, match="resume: .* holds no run"):
        run(resume="true")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        run(output_dir=tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for words in ({}, {"overwrite": "true"}):
        with pytest.raises(UserError, match="is not empty and holds no run"):
            run(output_dir=tmp_path / "mine", **words)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    run(max_steps=1)
    with pytest.raises(
        UserError, match=r"already holds a run: go on with it \(--resume\) or delete it \(--overwrite\)"
    ):
        run()
    with pytest.raises(UserError, match="no complete checkpoint in .*; start again with --overwrite"):
        (tmp_path / "run" / "final" / "COMPLETED").unlink()
        run(resume="true", max_steps=1)


def test_overwrite_deletes_only_what_a_run_made(run, tmp_path, monkeypatch):
    run(max_steps=1)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run(max_steps=1, overwrite="true")
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(UserError, match="is a link, a home, the root or the working folder"):
        run(max_steps=1, overwrite="true", output_dir=tmp_path / "link")
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(UserError, match="working folder"):
        run(max_steps=1, overwrite="true")
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_overwrite_never_deletes_what_the_run_starts_from(run, tmp_path):
    run(max_steps=1)
    with pytest.raises(UserError, match="overwrite would delete model"):
        run(model=tmp_path / "run" / "final", overwrite="true")
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_folders_that_cannot_be_made_and_damaged_files(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file, expected a folder"):
        run(output_dir=tmp_path / "file" / "x")
    with pytest.raises(UserError, match="output_dir /proc/x: "):
        run(output_dir="/proc/x")
    run(max_steps=1, seed=10**30)  # any seed
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json: missing or damaged"):
        run(max_steps=1, resume="true")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "run.json.aside").write_text("{")
    run(max_steps=1, output_dir=tmp_path / "half")


@pytest.mark.parametrize(
    ("environment", "settings", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DEEPSPEED, which is not supported: its ZeRO shards flat buffers"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "MEGATRON_LM, which is not supported: its tensor parallelism"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, {}, "tensor parallelism is not supported"),
        ({"PARALLELISM_CONFIG_CP_SIZE": "2"}, {}, "context parallelism is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP1 is not supported, it flattens the matrices: set fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "FSDP2 with CPU offload is not supported"),
        ({"FSDP_VERSION": "2"}, {"optimizer": "adamw_8bit"}, "bitsandbytes, which does not know FSDP2: use adamw"),
        (
            {"FSDP_VERSION": "2"},
            {"master_dtype": "bfloat16", "mixed_precision": "bf16"},
            "bfloat16 is not supported under FSDP2, which keeps fp32 masters",
        ),
    ],
)
def test_backends_on_which_masks_would_be_wrong_are_refused(run, monkeypatch, environment, settings, message):
    if any(name.startswith("FSDP") for name in environment):
        environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **environment}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        run(max_steps=1, **settings)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8 is set, RANK is not: left over from another launch"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 is set, RANK is not: .* start the processes with accelerate launch"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE=2 is set, PMI_RANK is not"),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
            "OMPI_COMM_WORLD_SIZE=2 is set, MASTER_ADDR is no",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment is no number of processes"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment is no number of processes"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x in the environment is no number of processes"),
    ],
)
def test_what_another_launch_has_left_in_the_environment(run, monkeypatch, environment, message, model_dir, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        run(max_steps=1)
    rows = write_rows(tmp_path / "items.jsonl", [{"question": "q", "answer": "#### 1"}])
    with pytest.raises(UserError, match=message):
        evaluation.main([f"--model={model_dir}", f"--tasks=gsm8k={rows}", f"--output_dir={tmp_path / 'eval'}"])


def test_one_process_may_be_named_in_the_environment(run, monkeypatch):
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    run(max_steps=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    run(dry_run="true", output_dir="elsewhere")  # a plan for two


def test_a_folder_in_use_is_refused(run, tmp_path):
    with run_folder.lock(tmp_path / "run"), pytest.raises(UserError, match=r"is in use by process \d+ on "):
        run()


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(run_folder.fcntl, "flock", no_locks)
    with run_folder.lock(tmp_path / "run"):
        assert "run cannot be locked (Function not implemented): see that no second" in capsys.readouterr().out


# --- eval.py ---------------------------------------------------------------------------------------------------------


def test_eval(tmp_path, model_dir, monkeypatch):
    good = write_rows(tmp_path / "good.jsonl", [{"question": "q", "answer": "#### 1"}])
    bad = write_rows(tmp_path / "bad.jsonl", [{"question": "q", "answer": "#### 1"}, {"question": "q", "answer": "1"}])
    (tmp_path / "empty").mkdir()

    def run(**settings):
        given = {"model": model_dir, "tasks": f"gsm8k={good}", "output_dir": tmp_path / "e", "dtype": "float32"}
        evaluation.main([f"--{k}={v}" for k, v in {**given, **settings}.items() if v is not None])

    for settings, message in (
        ({"tasks": "gsm8"}, r"unknown task 'gsm8'; did you mean gsm8k\?"),
        ({"tasks": None}, "missing: --tasks"),
        ({"tasks": "gsm8k=missing.jsonl"}, "task gsm8k: no file missing.jsonl"),
        ({"tasks": "gsm8k", "data_dir": "/no/such"}, "task gsm8k: no file /no/such/gsm8k/test.jsonl"),
        ({"tasks": f"gsm8k={bad}"}, "bad.jsonl, item 2: the answer must end in '#### ' and a whole number, got '1'"),
        ({"tasks": "gsm8k"}, "dataset openai/gsm8k, split test: no local path, and neither Hub nor cache gives it"),
        ({"model": "/no/such"}, "model /no/such: no such folder, or no config.json in it"),
        ({"model": tmp_path / "empty"}, "no config.json in it"),
        ({"model": None}, r"missing: --model \(only --score_only goes without\)"),
        ({"score_only": "true"}, "score_only scores what is in output_dir: model has no meaning with it"),
        ({"score_only": "true", "model": None}, "write gsm8k=.* without the file"),
        ({"score_only": "true", "model": None, "tasks": "gsm8k"}, "score_only: .* holds no gsm8k.metamath.jsonl"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"output_dir": good}, "is a file, expected a folder"),
    ):
        with pytest.raises(UserError, match=message):
            run(**settings)
    no_weights = make_model(tmp_path / "no_weights")
    (no_weights / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model .*no_weights cannot be loaded"):
        run(model=no_weights)
    no_tokenizer = make_model(tmp_path / "no_tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (no_tokenizer / name).unlink()
    with pytest.raises(UserError, match="tokenizer .*no_tokenizer cannot be loaded"):
        run(model=no_tokenizer, output_dir=tmp_path / "e2")
    with pytest.raises(UserError, match="embedding 200 rows: they do not belong together"):
        run(model=make_model(tmp_path / "small", vocab_size=200), output_dir=tmp_path / "e3")
    with pytest.raises(UserError, match="named twice"):
        evaluation.main(["--model", str(model_dir), "--output_dir", "o", "--tasks", f"gsm8k={good}", f"gsm8k={bad}"])


# --- the programs ----------------------------------------------------------------------------------------------------


def one_line(done, program, message):
    assert done.returncode == 2, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.strip() and "/s]" not in line]  # progress bars
    assert len(lines) == 1 and lines[0].startswith(f"{program}: error: ") and message in lines[0], done.stderr[-2000:]


def test_programs_end_with_one_line_and_exit_code_2(tmp_path, train_args):
    one_line(python("train.py", "--lerning_rate", "1"), "train.py", "unknown key")
    one_line(python("eval.py", "--tasks", "gsm8", "--output_dir", "o"), "eval.py", "unknown task")
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + "{broken\n")
    done = python("train.py", *train_args(tmp_path / "run", "--dataset", str(path)))
    one_line(done, "train.py", "line 2: malformed JSON")
    fsdp2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    done = python("train.py", *train_args(tmp_path / "run"), **fsdp2)
    one_line(done, "train.py", "Accelerate starts it only for several processes on GPUs")
    done = python("train.py", "--help")
    assert done.returncode == 0 and "| keep_ratio | float |" in done.stdout


def test_no_space_left_at_a_save(tmp_path, train_args):
    """A limit on the size of files stands in for a full disk: real writes fail. The previous checkpoint is intact."""
    args = train_args(tmp_path / "run", "--save_every", "2")
    small = tmp_path / "small"
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import train\nfrom common import errors\nfrom training import checkpoint\n"
        "save = checkpoint.save\n"
        "def limited(accelerator, folder, progress, keep):\n"
        "    if progress['step'] == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "    save(accelerator, folder, progress, keep)\n"
        "checkpoint.save = limited\n"
        "errors.run_main(lambda: train.main(sys.argv[1:]), 'train.py')\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = python("-c", code, *args)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "step_000004 could not be saved" in done.stderr and "last good checkpoint is" in done.stderr
    checkpoints = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == ["step_000002"]
    assert len(json.loads((tmp_path / "run" / "checkpoints" / "step_000002" / "COMPLETED").read_text())) >= 3
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4  # the log of the failed run is there
    done = python("train.py", *args, "--resume")
    assert done.returncode == 0 and (tmp_path / "run" / "final").exists() and not small.exists()
