"""What of an update falls on masked weights: pytest tests/test_updates.py"""

import json

import pytest
import torch
from accelerate import Accelerator
from conftest import read_metrics

import gmt
import train
from training import updates


def shares(optimizer_class, steps, **options):
    """The share at each of some steps, by share_of_masked and by comparing whole weights."""
    torch.manual_seed(0)
    model = torch.nn.ModuleList([torch.nn.Linear(20, 30), torch.nn.Linear(10, 8)])
    masker = gmt.Masker(model.named_parameters(), "gmt", 0.3)
    optimizer = optimizer_class(model.parameters(), lr=0.01, **options)
    found, expected = [], []
    for step in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        masker.mask_gradients(step)
        old = {name: p.detach().clone() for name, p in model.named_parameters()}
        copies = updates.copies(masker)
        optimizer.step()
        squares = {name: (p.detach() - old[name]).double() ** 2 for name, p in model.named_parameters() if p.dim() == 2}
        masked = sum(s[dict(model.named_parameters())[name].grad == 0].sum() for name, s in squares.items())
        expected.append(float(masked / sum(s.sum() for s in squares.values())))
        found.append(updates.share_of_masked(copies, masker, Accelerator(cpu=True)))
        assert not copies
    return found, expected


def test_adamw_moves_masked_weights_by_their_momentum():
    found, expected = shares(torch.optim.AdamW, 4, weight_decay=0.0)
    assert found == pytest.approx(expected, rel=1e-5) and found[0] == 0 and 0.05 < found[1] < found[3] < 0.8


def test_plain_sgd_moves_none():
    found, _ = shares(torch.optim.SGD, 3)
    assert found == [0, 0, 0]


def test_nothing_has_moved():
    p = torch.nn.Parameter(torch.ones(4, 4))
    p.grad = torch.zeros(4, 4)
    masker = gmt.Masker([("p", p)], "gmt", 0.5)
    assert updates.share_of_masked(updates.copies(masker), masker, Accelerator(cpu=True)) is None


def test_a_run_logs_it(tmp_path, train_args):
    """And is the same as one that does not."""
    words = ["--rule", "gmt", "--keep_ratio", "0.3", "--log_masks_every", "3", "--log_every", "2"]
    train.main(train_args(tmp_path / "run", *words, "--mask_update_share", "true"))
    train.main(train_args(tmp_path / "other", *words))
    masks = [json.loads(x) for x in (tmp_path / "run" / "masks.jsonl").read_text().splitlines()]
    assert [line["step"] for line in masks] == [3, 6, 9] and all(0 < m["update_share_masked"] < 1 for m in masks)
    assert "update_share_masked" not in (tmp_path / "other" / "masks.jsonl").read_text()
    metrics = read_metrics(tmp_path / "run")
    assert [m["step"] for m in metrics if "update_share_masked" in m] == [6]
    assert [m["loss"] for m in metrics] == [m["loss"] for m in read_metrics(tmp_path / "other")]
