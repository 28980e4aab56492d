"""The card of a trained model, as huggingface_hub reads it: pytest tests/test_model_card.py"""

from pathlib import Path

import pytest
import yaml
from conftest import write_rows
from huggingface_hub import ModelCard

import eval as evaluation
import train
from common import integrity, model_card
from common.config import TrainConfig


@pytest.fixture
def final(tmp_path, train_args) -> Path:
    words = ["--rule", "gmt", "--keep_ratio", "0.3", "--max_steps", "2", "--max_grad_norm", "0", "--shuffle", "false"]
    train.main(train_args(tmp_path / "run", *words))
    return tmp_path / "run" / "final"


def results(model: Path) -> dict[tuple[str, str, str], float]:
    """{(task, protocol, metric): value} of a card's model-index."""
    found = ModelCard.load(model / "README.md").data.eval_results or []
    return {(r.dataset_type, r.dataset_config, r.metric_type): r.metric_value for r in found}


def test_a_card_tells_how_the_model_was_made(final, rows_file):
    card = ModelCard.load(final / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gradient-mask-tuning", "gmt"],
    }  # fmt: skip
    assert "- rule: gmt, keep_ratio 0.3\n" in card.text and "- base model: a local folder\n" in card.text
    assert f"- data: {rows_file}, 70 examples, fingerprint" in card.text and "- steps: 2 of 16 examples" in card.text
    settings = yaml.safe_load(card.text.split("```")[1].removeprefix("yaml\n"))
    assert settings["learning_rate"] == 1e-3 and settings["keep_ratio"] == 0.3
    assert settings["max_grad_norm"] == 0.0 and settings["shuffle"] is False  # which are not the defaults


def test_hub_names_are_metadata_and_secrets_are_not_told(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    config = TrainConfig(
        model="meta-llama/Llama-3.2-1B", output_dir="runs/mine", rule="none",
        dataset=["meta-math/MetaMathQA:500", f"{tmp_path}/rows.jsonl"],
    )  # fmt: skip
    description = {
        "config": {"model": config.model, "tokenizer": "hf_abcdefghijklmnop", "dataset": config.dataset},
        "data": {"examples": 7, "fingerprint": "x"}, "git_commit": "y", "versions": {"torch": "2"},
    }  # fmt: skip
    card = ModelCard(text := model_card.make(config, description, {}))
    assert card.data.base_model == "meta-llama/Llama-3.2-1B" and card.data.datasets == ["meta-math/MetaMathQA"]
    assert "~/rows.jsonl" in text and str(tmp_path) not in text and "hf_***" in text and "hf_abc" not in text


def test_evals_scores_are_the_cards_results(tmp_path, final):
    """The values of scores.json, beside what else is in the card; a second evaluation changes what it measured."""
    before = ModelCard.load(final / "README.md").text
    rows = [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(7)]
    items = write_rows(tmp_path / "items.jsonl", rows)

    def words(task: str, folder: str) -> list[str]:
        out = str(tmp_path / folder)
        return ["--model", str(final), "--tasks", f"{task}={items}", "--output_dir", out, "--dtype", "float32"]

    scores = evaluation.main(words("gsm8k", "eval"))["gsm8k.metamath"]["metrics"]
    assert len(scores) == 2
    expected = {("gsm8k", "metamath", metric): value["score"] for metric, value in scores.items()}
    assert results(final) == expected
    text = (final / "README.md").read_text()
    assert ModelCard(text).text.startswith(before)
    assert f"| gsm8k | metamath | correct | 7 | {100 * scores['correct']['score']:.2f} |\n" in text
    evaluation.main(words("gsm8k", "eval"))  # the card is none of the settings of an evaluation, and stays as it is
    assert (final / "README.md").read_text() == text and integrity.is_complete(final)

    (final / "README.md").write_text(text.replace("library_name", "license: mit\nlibrary_name") + "\nMy notes.\n")
    entry = {"task": "gsm8k", "n": 7, "metrics": {"correct": {"score": 0.75}}}
    other = {"task": "math", "n": 4, "metrics": {"correct": {"score": 1 / 3}}}
    model_card.add_scores(final, {"gsm8k.metamath": entry, "math.minerva.tulu": other})
    expected |= {("gsm8k", "metamath", "correct"): 0.75, ("math", "minerva.tulu", "correct"): 1 / 3}
    assert results(final) == expected
    card = ModelCard.load(final / "README.md")
    assert card.data.license == "mit" and card.data.tags == ["gradient-mask-tuning", "gmt"]
    assert card.text.startswith(before) and card.text.endswith("\nMy notes.\n") and card.text.count("| task |") == 1
    assert "| gsm8k | metamath | correct | 7 | 75.00 |\n" in card.text
    assert "| math | minerva.tulu | correct | 4 | 33.33 |\n" in card.text


@pytest.mark.parametrize("content", ["mine", "---\n[\n---\n# Fine-tuned with rule", "---\ntags: 3\n---\n# Fine-tuned"])
def test_a_card_of_another_kind_is_left_alone(tmp_path, content):
    (tmp_path / "README.md").write_text(content)
    entry = {"task": "gsm8k", "n": 7, "metrics": {"correct": {"score": 0.75}}}
    model_card.add_scores(tmp_path, {"gsm8k.metamath": entry})
    assert (tmp_path / "README.md").read_text() == content
