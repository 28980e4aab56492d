"""Where the kept entries and the kept energy of a run lie, by layer and matrix type, from its masks.jsonl.

report.py makes this figure for every run folder that has the file (train.py's key log_masks_every writes it). Energy is
the sum of squared gradients; all logged steps of the run count alike.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from common.errors import UserError
from scripts.report.figures import save

NO_LAYER = "none"  # the row of embeddings, head and other tensors outside the layers


def place(name: str) -> tuple[str, str]:
    """(layer, matrix type) of a parameter name: model.layers.3.mlp.up_proj.weight -> ("3", "up_proj")."""
    name = name.removesuffix(".weight")
    found = re.search(r"\.(\d+)\.(.+)$", name)
    return (found[1], found[2].split(".")[-1]) if found else (NO_LAYER, name.split(".")[-1])


def kept_by_place(path: Path) -> list[dict]:
    """Of each layer and matrix type: kept (share of its entries), energy_kept (share of its own energy), and
    share_of_energy_kept (its share of all kept energy).

    Raises:
        UserError: the file holds no line, or no lines of this kind.
    """
    sums: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):  # the last one may have been cut
        try:
            tensors = json.loads(line)["tensors"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: not a line that train.py's log_masks_every writes") from None
        total = sum(counts["energy"] for counts in tensors.values()) or 1.0
        for name, counts in tensors.items():
            for key in ("entries", "kept"):
                sums[place(name)][key] += counts[key]
            for key in ("energy", "energy_kept"):  # relative, so that a step with large gradients is not all there is
                sums[place(name)][key] += counts[key] / total
    if not sums:
        raise UserError(f"{path}: no line; log_masks_every says how often train.py writes one")
    all_kept = sum(s["energy_kept"] for s in sums.values()) or 1.0
    return [
        {
            "layer": layer,
            "type": kind,
            "kept": s["kept"] / s["entries"],
            "energy_kept": s["energy_kept"] / s["energy"] if s["energy"] else float("nan"),
            "share_of_energy_kept": s["energy_kept"] / all_kept,
        }
        for (layer, kind), s in sums.items()
    ]


def draw(cells: list[dict], title: str, path: Path) -> None:
    """One panel for each share of kept_by_place, layers down, matrix types across."""
    kinds = list(dict.fromkeys(c["type"] for c in cells))
    kinds.sort(key=lambda kind: all(c["layer"] == NO_LAYER for c in cells if c["type"] == kind))
    layers = sorted(
        {c["layer"] for c in cells}, key=lambda layer: (layer == NO_LAYER, 0 if layer == NO_LAYER else int(layer))
    )
    panels = {
        "kept": "kept entries,\n% of the matrix's entries",
        "energy_kept": "kept energy,\n% of the matrix's energy",
        "share_of_energy_kept": "kept energy,\n% of all kept energy",
    }
    small = len(layers) * len(kinds) <= 120  # room for numbers
    size = (0.62 * len(kinds) + 1.2, 0.34 * len(layers) + 2.3) if small else (0.42 * len(kinds) + 1.6, 7)
    fig, axes = plt.subplots(1, len(panels), figsize=(len(panels) * size[0], size[1]), sharey=True)
    for ax, (key, label) in zip(axes, panels.items(), strict=True):
        grid = np.full((len(layers), len(kinds)), np.nan)
        for c in cells:
            grid[layers.index(c["layer"]), kinds.index(c["type"])] = 100 * c[key]
        image = ax.imshow(grid, cmap="cividis", aspect="auto", vmin=0)
        fig.colorbar(image, ax=ax, shrink=0.8)
        ax.set_title(label, fontsize=10)
        ax.set_xticks(range(len(kinds)), kinds, rotation=90)
        every = max(1, len(layers) // 32 + (len(layers) > 40))
        ax.set_yticks(range(0, len(layers), every), layers[::every], fontsize=9)
        for (row, column), value in np.ndenumerate(grid) if small else ():
            if np.isfinite(value):
                colour = "black" if value > 0.6 * np.nanmax(grid) else "white"
                ax.text(column, row, f"{value:.3g}", ha="center", va="center", color=colour, fontsize=7)
    axes[0].set_ylabel("layer")
    fig.suptitle(title, fontsize=11)
    save(fig, path)


def mask_figure(run: Path, out: Path) -> list[dict]:
    """Draw the figure of a run folder into `out`.png and .pdf; returns what it shows."""
    config = json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]
    cells = kept_by_place(run / "masks.jsonl")
    settings = f"rule {config['rule']}, keep_ratio {config['keep_ratio']}, scope {config['scope']}"
    draw(cells, f"{run.name}: {settings}", out)
    return cells
