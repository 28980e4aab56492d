"""Every experiment's YAML: its real architecture, small, takes two steps on rows of its dataset's schema; and what a
configuration for one GPU needs fits: pytest tests/test_configs.py"""

import re

import pytest
import yaml
from conftest import ROOT, write_rows

import train
from common.config import TrainConfig, parse
from common.errors import UserError
from scripts.reproduce.reduced import NO_BOS, ROWS, SHAPES, reduced_model, reduced_tokenizer
from training import plan

CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.yaml") if re.match("math_|code_|general_|dpo_", p.name))


def test_the_experiments_are_there():
    assert [p.stem for p in CONFIGS] == [
        "code_deepseek_coder_6.7b", "code_mistral_7b", "code_qwen2.5_coder_0.5b", "dpo_llama2_13b", "dpo_llama2_7b",
        "dpo_qwen2.5_0.5b", "general_llama2_13b", "general_llama2_7b", "math_llama3.2_1b", "math_llama3_8b",
        "math_mistral_7b", "math_mistral_7b_1gpu", "math_qwen2.5_0.5b",
    ]  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_two_steps(tmp_path, path, capsys):
    settings = yaml.safe_load(path.read_text())
    model = reduced_model(tmp_path / "model", settings["model"], reduced_tokenizer(settings["model"]))
    rows = write_rows(tmp_path / "rows.jsonl", [ROWS[settings["dataset"]](i) for i in range(12)])
    line = train.main([
        "--config", str(path), "--model", str(model), "--dataset", str(rows), "--output_dir", str(tmp_path / "run"),
        "--max_steps", "2", "--global_batch_size", "6", "--learning_rate", "1e-3",
    ])  # fmt: skip
    assert line["step"] == 2 and line["skipped_steps"] == 0 and 0.1 < line["kept_fraction"] < 0.21
    said = capsys.readouterr().out
    one_less = re.search("tulu|ultrafeedback", settings["dataset"])  # an empty message, equal answers
    assert f"{'11' if one_less else '12'} examples (0 cut" in said
    end = "<|im_end|>" if settings["template"] == "chat" else "</s>"
    assert ("'<s>" in said) == (not settings["model"].startswith(NO_BOS)) and end in said


# GiB that a run may plan with: what the card has, less 1.5 for CUDA, kernels in passing and the allocator's fragments
CARDS = {
    "math_mistral_7b_1gpu": 79,
    "math_qwen2.5_0.5b": 23.5,
    "math_llama3.2_1b": 23.5,
    "code_qwen2.5_coder_0.5b": 23.5,
    "dpo_qwen2.5_0.5b": 23.5,
}


@pytest.mark.parametrize("name", CARDS)
def test_it_fits_on_its_card(name):
    """The worst micro-batch: as many tokens as there may be, all of them trained."""
    config = parse(TrainConfig, ["--config", str(ROOT / "configs" / f"{name}.yaml")])
    cls, shape = SHAPES[config.model]
    architecture = cls(**shape)
    held = plan.tensor_bytes(config, plan.on_meta(config, architecture).parameters(), 1)
    rows = config.micro_batch_tokens // config.max_length
    held["activations"] = plan.activation_bytes(
        config, architecture, rows, config.max_length, rows * (config.max_length - 1)
    )
    print({part: f"{n / 2**30:.2f} GiB" for part, n in held.items()})
    assert sum(held.values()) / 2**30 < CARDS[name] - 1.5


def test_placeholders_may_lie_beyond_the_embedding(model_dir):
    """Gemma-3-1b's tokenizer has one of images, others a padding; any other token there is a fault."""
    from transformers import AutoConfig, AutoTokenizer

    from common.compatibility import largest_text_id, refuse_unscorable

    config = AutoConfig.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, extra_special_tokens={"image_token": "<image_soft_token>"})
    assert len(tokenizer) == config.vocab_size + 1 and largest_text_id(tokenizer) == config.vocab_size - 1
    refuse_unscorable("a model", config, tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    assert tokenizer.pad_token_id == config.vocab_size + 1
    refuse_unscorable("a model", config, tokenizer)
    tokenizer.add_tokens(["<word>"])
    with pytest.raises(UserError, match="do not belong together"):
        refuse_unscorable("a model", config, tokenizer)
