"""The README's code runs and its tables are the programs' own: pytest tests/test_readme.py"""

import json
import re

import pytest
import torch
import yaml
from conftest import ROOT, write_rows
from torch import nn

import eval as evaluation
import gmt
import tasks
from config import EvalConfig, TrainConfig, parse, reference
from tasks import TASKS

README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_configuration_tables_are_generated():
    """On a failure: python train.py --help, python eval.py --help."""
    assert reference(TrainConfig) in README
    assert reference(EvalConfig) in README


class Output(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x, y):
        return type("Result", (), {"loss": nn.functional.cross_entropy(self.linear(x), y)})


def test_three_lines_in_a_loop_of_ones_own():
    torch.manual_seed(0)
    model = Output()
    batches = [{"x": torch.randn(8, 6), "y": torch.randint(0, 5, (8,))} for _ in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, changed = model.linear.weight.detach().clone(), []

    def count(*_):
        changed.append(int((model.linear.weight.detach() != before).sum()))
        before.copy_(model.linear.weight.detach())

    optimizer.register_step_post_hook(count)
    exec(PYTHON[0], {"torch": torch, "model": model, "batches": batches, "optimizer": optimizer})
    assert changed == [6, 6, 6]  # 20 % of 30 entries, at every step


def test_a_rule_of_ones_own(monkeypatch):
    monkeypatch.setattr(gmt, "SCORES", dict(gmt.SCORES))
    assert len(PYTHON[1].strip().splitlines()) < 15
    exec(PYTHON[1], {"torch": torch, "gmt": gmt})
    p = nn.Parameter(torch.randn(30, 40))
    p.grad = torch.randn(30, 40)
    score = (p * p.grad).abs().detach()
    expected = p.grad * (score >= score.flatten().sort(descending=True).values[359])
    gmt.Masker([("p", p)], "weight_times_gradient", 0.3).mask_gradients(0)
    assert torch.equal(p.grad, expected)


def test_a_benchmark_of_ones_own(monkeypatch, tmp_path, model_dir):
    monkeypatch.setattr("tasks.TASKS", dict(TASKS))
    monkeypatch.setattr(evaluation, "TASKS", tasks.TASKS)
    (block,) = [text for text in PYTHON if "load_capitals" in text]
    exec(block, {})
    items = [{"country": "France", "capital": "Paris"}, {"country": "Peru", "capital": "Lima"}]
    file = write_rows(tmp_path / "capitals.jsonl", items)
    words = ["--model", str(model_dir), "--dtype", "float32", "--output_dir", str(tmp_path / "e")]
    evaluation.main([*words, "--tasks", f"capitals={file}"])
    path = tmp_path / "e" / "capitals.exact.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [
        "Q: What is the capital of France?\nA:", "Q: What is the capital of Peru?\nA:",
    ]  # fmt: skip
    lines[0]["completions"] = [" Paris"]
    write_rows(path, lines)
    words = ["--tasks", "capitals", "--score_only", "--output_dir", str(tmp_path / "e")]
    assert evaluation.main(words)["capitals.exact"]["score"] == 0.5


def test_the_table_of_tasks_is_complete():
    table = README[README.index("Words of `--tasks`") : README.index("`--tasks general` is")]
    for task in TASKS.values():
        if task.protocol in ("metamath", "open_instruct") and task.samples == 1:
            assert task.name in table, task.name


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_configuration_is_valid(path):
    cls = EvalConfig if "tasks" in yaml.safe_load(path.read_text()) else TrainConfig
    more = [] if "rule" in yaml.safe_load(path.read_text()) or cls is EvalConfig else ["--rule", "none"]
    parse(cls, ["--config", str(path), *more])


def test_files_that_the_readme_names_exist():
    names = re.findall(r"(?:configs|scripts|docs)/[\w/.]+\w", README)
    assert len(names) > 5
    for name in names:
        assert (ROOT / name).exists(), name
