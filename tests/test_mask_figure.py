"""scripts/report/mask_figure.py: the shares it draws, from counts made by hand."""

import json

import pytest

from common.errors import UserError
from scripts.report import mask_figure
from scripts.report import tables as report


def counts(entries: int, kept: int, energy: float, energy_kept: float) -> dict:
    return {"entries": entries, "kept": kept, "energy": energy, "energy_kept": energy_kept}


def test_shares_by_layer_and_type(tmp_path):
    lines = [
        {"model.layers.0.mlp.up_proj.weight": counts(10, 2, 6.0, 3.0), "lm_head.weight": counts(30, 3, 4.0, 1.0)},
        # a step with gradients a thousand times as large counts no more than the other
        {"model.layers.0.mlp.up_proj.weight": counts(10, 4, 2e3, 2e3), "lm_head.weight": counts(30, 3, 8e3, 1e3)},
    ]
    path = tmp_path / "masks.jsonl"
    path.write_text("".join(json.dumps({"step": i, "tensors": line}) + "\n" for i, line in enumerate(lines)))
    up, head = mask_figure.kept_by_place(path)
    assert (up["layer"], up["type"], head["layer"], head["type"]) == ("0", "up_proj", "none", "lm_head")
    assert (up["kept"], head["kept"]) == (6 / 20, 6 / 60)
    assert up["energy_kept"] == pytest.approx((0.3 + 0.2) / (0.6 + 0.2))
    assert head["energy_kept"] == pytest.approx((0.1 + 0.1) / (0.4 + 0.8))
    assert up["share_of_energy_kept"] == pytest.approx(0.5 / 0.7)
    assert head["share_of_energy_kept"] == pytest.approx(0.2 / 0.7)

    (tmp_path / "run.json").write_text(
        json.dumps({"config": {"model": "m", "rule": "gmt", "keep_ratio": 0.2, "scope": "model"}})
    )
    report.main([str(tmp_path)])
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")


def test_no_masks_logged(tmp_path):
    path = tmp_path / "masks.jsonl"
    for text, message in (
        ("", "masks.jsonl: no line; log_masks_every"),
        ("{}\n", "line 1: not a line that train.py's"),
        ('{"step": 1, "tens', "masks.jsonl: no line; log_masks_every"),  # cut
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            mask_figure.kept_by_place(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.11.self_attn.q_proj.weight", ("11", "q_proj")),
        ("model.layers.2.mlp.experts.gate_up_proj", ("2", "gate_up_proj")),
        ("transformer.h.3.attn.c_attn.weight", ("3", "c_attn")),
        ("model.embed_tokens.weight", ("none", "embed_tokens")),
    ],
)
def test_place(name, expected):
    assert mask_figure.place(name) == expected
