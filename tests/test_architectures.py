"""The architectures that are fine-tuned most, tiny and random: pytest tests/test_architectures.py

Each is trained for two steps, planned, saved, loaded without a missing key, and generates. A new one is one row.
"""

import pytest
import torch
import transformers
from conftest import make_model, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import train
from common.errors import UserError
from common.hub import load_weights

COMMON = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
HEADS = {"head_dim": 8}  # where it does not follow from the width
WINDOW = {"sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2 = {"vocab_size": 264, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": 0}
IMAGES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

# name: (transformers' configuration, its settings, more words for train.py)
ARCHITECTURES = {
    "dense: Llama": ("LlamaConfig", COMMON),
    "tied: Qwen2": ("Qwen2Config", {**COMMON, "tie_word_embeddings": True}),
    "norms of queries and keys: Qwen3": ("Qwen3Config", {**COMMON, **HEADS}),
    "sliding window: Mistral": ("MistralConfig", {**COMMON, **WINDOW}),
    "fused qkv: Phi-3": ("Phi3Config", COMMON),
    "fused qkv, one norm for both: GPT-NeoX": ("GPTNeoXConfig", COMMON),
    "Conv1D: GPT-2": ("GPT2Config", {**GPT2, "eos_token_id": 1}),
    "attention of its own: Falcon": ("FalconConfig", {k: v for k, v in COMMON.items() if "max" not in k}),
    "softcap: Gemma 2": ("Gemma2Config", {**COMMON, **HEADS, **WINDOW}, "--attention=eager"),
    "two windows: Gemma 3's text": ("Gemma3TextConfig", {**COMMON, **HEADS, **WINDOW}),
    "multimodal: Gemma 3": (
        "Gemma3Config",
        {
            "text_config": {**COMMON, **HEADS, **WINDOW}, "vision_config": IMAGES, "mm_tokens_per_image": 4,
            "bos_token_id": 0, "eos_token_id": 1,
        },
    ),
    "experts: Mixtral": ("MixtralConfig", {**COMMON, "num_local_experts": 4}),
    "experts: Qwen3-MoE": ("Qwen3MoeConfig", {**COMMON, **HEADS, **EXPERTS}),
    "experts, sinks: gpt-oss": ("GptOssConfig", {**COMMON, **HEADS, "num_local_experts": 4}, "--attention=eager"),
    "experts, latent attention: DeepSeek-V3": (
        "DeepseekV3Config",
        {
            **COMMON, **LATENT, "num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 16,
            "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        },
    ),
}  # fmt: skip

REFUSED = {
    "scaled logits: Granite": ("GraniteConfig", {**COMMON, "logits_scaling": 8.0}, "granite.* its logits"),
    "scaled logits: Cohere": ("CohereConfig", COMMON, "cohere.* does something to its logits"),
    "softcap under sdpa": ("Gemma2Config", {**COMMON, **HEADS}, "attention sdpa; use --attention eager"),
    "sinks under sdpa": (
        "GptOssConfig", {**COMMON, **HEADS, "num_local_experts": 4}, "attention sdpa; use --attention eager",
    ),
    "recurrent: Falcon-H1": (
        "FalconH1Config",
        {**COMMON, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
        "keeps a recurrent state",
    ),
    "short convolutions: LFM2": (
        "Lfm2Config", {**COMMON, "layer_types": ["conv", "full_attention"]}, "keeps a recurrent state",
    ),
    "a router's loss": (
        "MixtralConfig", {**COMMON, "num_local_experts": 4, "output_router_logits": True},
        "set output_router_logits to false",
    ),
    "a tokenizer with more ids": ("LlamaConfig", {**COMMON, "vocab_size": 258}, "token id 258 is beyond .* 258 rows"),
}  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory, model_dir):
    """Words for train.main of a tiny model of this kind."""
    rows = [{"query": f"{i} apples?", "response": f" yes {i}" * (1 + i % 3)} for i in range(8)]
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)

    def make(kind: str, settings: dict, folder) -> list[str]:
        set_seed(0)
        AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings)).save_pretrained(folder / "model")
        AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder / "model")
        return [
            "--model", str(folder / "model"), "--dataset", str(path), "--output_dir", str(folder / "run"), "--rule",
            "gmt", "--keep_ratio", "0.3", "--global_batch_size", "4", "--max_steps", "2", "--learning_rate", "1e-3",
            "--mixed_precision", "fp32",
        ]  # fmt: skip

    return make


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_train_plan_save_load_generate(name, words, tmp_path, capsys):
    kind, settings, *more = ARCHITECTURES[name]
    args = [*words(kind, settings, tmp_path), *more]
    train.main([*args, "--dry_run"])
    planned = capsys.readouterr().out
    assert "  activations\n" in planned and "steps: 2 of 4 examples" in planned
    line = train.main(args)
    assert line["step"] == 2 and 0 < line["loss"] < 10 and line["kept_fraction"] > 0
    before, model = (load_weights(str(tmp_path / part)) for part in ("model", "run/final"))
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert len(moved) > 10
    prompt = torch.tensor([[5, 6, 7, 8]])
    new = model.eval().generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False)
    assert new.shape[1] > 4


@pytest.mark.parametrize("name", REFUSED)
def test_plan_and_run_refuse_the_same(name, words, tmp_path):
    kind, settings, message = REFUSED[name]
    args = words(kind, settings, tmp_path)
    for more in (["--dry_run"], []):
        with pytest.raises(UserError, match=message):
            train.main([*args, *more])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_plan_refuses_weights_of_another_model(tmp_path, words):
    args = words("LlamaConfig", COMMON, tmp_path)
    make_model(tmp_path / "other", hidden_size=16, vocab_size=264)
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "model" / "model.safetensors")
    for more in (["--dry_run"], []):
        with pytest.raises(UserError, match=r"of another shape: lm_head.weight is \[264, 16\], expected \[264, 32\]"):
            train.main([*args, *more])
    (tmp_path / "model" / "model.safetensors").unlink()
    train.main([*args, "--dry_run"])  # a plan needs no weights
