"""Every experiment's YAML: its real architecture, small, takes two steps on rows of its dataset's schema; and what a
configuration for one GPU needs fits: pytest tests/test_configs.py"""

import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, make_model, write_rows
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, MistralConfig, Qwen2Config

import plan
import train
from config import TrainConfig, parse

# What the published config.json files say, as far as it matters here.
LLAMA2 = {"vocab_size": 32000, "max_position_embeddings": 4096}
SHAPES = {
    "mistralai/Mistral-7B-v0.1": (MistralConfig, {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "sliding_window": 4096,
    }),
    "meta-llama/Meta-Llama-3-8B": (LlamaConfig, {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    }),
    "meta-llama/Llama-2-7b-hf": (LlamaConfig, {
        **LLAMA2, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }),
    "meta-llama/Llama-2-13b-hf": (LlamaConfig, {
        **LLAMA2, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 40,
    }),
    "deepseek-ai/deepseek-coder-6.7b-base": (LlamaConfig, {
        "vocab_size": 32256, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 16384,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
    }),
    "Qwen/Qwen2.5-0.5B": (Qwen2Config, {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    }),
    "meta-llama/Llama-3.2-1B": (LlamaConfig, {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    }),
}  # fmt: skip
SHAPES["Qwen/Qwen2.5-Coder-0.5B"] = SHAPES["Qwen/Qwen2.5-0.5B-Instruct"] = SHAPES["Qwen/Qwen2.5-0.5B"]
SHAPES["allenai/tulu-2-7b"] = SHAPES["meta-llama/Llama-2-7b-hf"]
SHAPES["allenai/tulu-2-13b"] = SHAPES["meta-llama/Llama-2-13b-hf"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_BOS = ("Qwen",)  # the other tokenizers put one in front
ROWS = {
    "meta-math/MetaMathQA": lambda i: {
        "type": "GSM_AnsAug", "query": f"What is {i}+{i}?", "original_question": "?",
        "response": f"The answer is: {2 * i}",
    },
    "ise-uiuc/Magicoder-Evol-Instruct-110K": lambda i: {
        "instruction": f"Add {i}.", "response": f"```python\nx += {i}\n```",
    },
    "allenai/tulu-v2-sft-mixture": lambda i: {
        "dataset": "flan", "id": f"flan_{i}",
        "messages": [
            {"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "" if i == 3 else "It."},
        ],
    },
    "HuggingFaceH4/ultrafeedback_binarized": lambda i: {
        "prompt": f"{i}?", "prompt_id": str(i), "messages": [], "score_chosen": 8.0, "score_rejected": 4.0,
        **{
            column: [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": answer}]
            for column, answer in (("chosen", "Yes."), ("rejected", "Yes." if i == 3 else "Never!"))
        },
    },
}  # fmt: skip
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.yaml") if re.match("math_|code_|general_|dpo_", p.name))


def test_the_experiments_are_there():
    assert [p.stem for p in CONFIGS] == [
        "code_deepseek_coder_6.7b", "code_mistral_7b", "code_qwen2.5_coder_0.5b", "dpo_llama2_13b", "dpo_llama2_7b",
        "dpo_qwen2.5_0.5b", "general_llama2_13b", "general_llama2_7b", "math_llama3.2_1b", "math_llama3_8b",
        "math_mistral_7b", "math_mistral_7b_1gpu", "math_qwen2.5_0.5b",
    ]  # fmt: skip


def small(folder: Path, name: str) -> Path:
    """The model `name` with few layers of few, narrow heads, and a tokenizer of bytes."""
    make_model(folder)
    cls, shape = SHAPES[name]
    heads = shape["num_attention_heads"]
    reduced = {
        "vocab_size": 259,
        "hidden_size": 4 * heads,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "head_dim": 4,
    }
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(
        cls(**{**shape, **reduced, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})
    ).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not name.startswith(NO_BOS):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_two_steps(tmp_path, path, capsys):
    settings = yaml.safe_load(path.read_text())
    model = small(tmp_path / "model", settings["model"])
    rows = write_rows(tmp_path / "rows.jsonl", [ROWS[settings["dataset"]](i) for i in range(12)])
    line = train.main([
        "--config", str(path), "--model", str(model), "--dataset", str(rows), "--output_dir", str(tmp_path / "run"),
        "--max_steps", "2", "--global_batch_size", "6", "--learning_rate", "1e-3",
    ])  # fmt: skip
    assert line["step"] == 2 and line["skipped_steps"] == 0 and 0.1 < line["kept_fraction"] < 0.21
    said = capsys.readouterr().out
    one_less = re.search("tulu|ultrafeedback", settings["dataset"])  # an empty message, equal answers
    assert f"{'11' if one_less else '12'} examples (0 cut" in said
    end = "<|im_end|>" if settings["template"] == "chat" else "<eos>"
    assert ("'<bos>" in said) == (not settings["model"].startswith(NO_BOS)) and end in said


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
    held = plan.tensor_bytes(config, plan.on_meta(config, architecture).parameters(), 1, False)
    rows = config.micro_batch_tokens // config.max_length
    held["activations"] = plan.activation_bytes(
        config, architecture, rows, config.max_length, rows * (config.max_length - 1)
    )
    print({part: f"{n / 2**30:.2f} GiB" for part, n in held.items()})
    assert sum(held.values()) / 2**30 < CARDS[name] - 1.5
