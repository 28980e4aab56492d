"""The real model of scripts/get_smollm2.py: pytest tests/test_get_smollm2.py (-m slow: pip must reach the package)"""

import pytest
import torch
from conftest import ROOT, python
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from common import integrity
from common.errors import UserError
from common.hub import load_weights
from scripts import get_smollm2


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"x.gguf is not the expected SmolLM2.*: its SHA-256 is [0-9a-f]{64}, expected"):
        get_smollm2.convert(tmp_path / "x.gguf", tmp_path / "out")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        get_smollm2.convert(tmp_path / "none.gguf", tmp_path / "out")
    done = python("scripts/get_smollm2.py", str(tmp_path))
    assert done.returncode == 2 and "exists already" in done.stderr and (tmp_path / "x.gguf").exists()


def test_without_gguf_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(get_smollm2, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["get_smollm2.py", str(tmp_path / "new")])
    tested = next(
        line.split()[0] for line in (ROOT / "requirements-dev.txt").read_text().splitlines() if "gguf" in line
    )
    with pytest.raises(UserError, match=f"needs the package gguf: python -m pip install {tested}$"):
        get_smollm2.main()
    assert all(f"pip install {tested}" in (ROOT / page).read_text() for page in ("README.md", "docs/training.md"))


@pytest.mark.slow
def test_the_model_is_an_ordinary_folder_and_answers(tmp_path):
    """Greedy answers whose every token leads the next best by over 0.05, hundreds of times fp32's rounding."""
    folder = tmp_path / "model"
    done = python("scripts/get_smollm2.py", str(folder), timeout=600)
    if "cannot be downloaded" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    model, tokenizer = load_weights(str(folder)), AutoTokenizer.from_pretrained(folder)
    assert not hasattr(model.config, "quantization_config") and integrity.damaged_file(folder) is None
    assert model.dtype == torch.float32 and model.num_parameters() == 134_515_008
    assert tokenizer.eos_token == "<|im_end|>" and model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.tokenize("x  1 ab 23") == ["x", "ĠĠ", "1", "Ġab", "Ġ", "2", "3"]
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0" and "de-quantised" in card.text and str(ROOT) not in card.content
    answers = {
        "What is the capital of France?": "The capital of France is Paris.<|im_end|>",
        "What is the capital of Italy?": "Il Coriobella, Italy.<|im_end|>",
        "What is 2 plus 2?": "The answer to this classic math problem is 4.<|im_end|>",
    }
    for question, expected in answers.items():
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        made = model.generate(
            prompt, max_new_tokens=24, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        assert tokenizer.decode(made.sequences[0, prompt.shape[1] :]) == expected
        first, second = torch.cat(made.logits).topk(2).values.T
        assert (first - second).min() > 0.05, question
