"""How figures look, in one place: a style per rule, and how a figure is saved.

Every script that draws imports this first. Colours are Okabe and Ito's, distinct for the colour-blind; markers and
dashes tell the rules apart without colour.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

plt.rcParams.update(
    {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
        "pdf.fonttype": 42,  # letters stay letters: text can be searched and edited
    }
)

# rule: (colour, marker, dashes). base is the model before training, drop a task vector that scripts/drop.py has masked.
STYLE: dict[str, tuple[str, str, Any]] = {
    "base": ("#000000", "*", "-"),
    "none": ("#0072B2", "o", "-"),
    "rmt": ("#E69F00", "s", "--"),
    "hft": ("#009E73", "^", "-."),
    "gmt": ("#D55E00", "D", (0, (1, 1))),
    "gmt_frozen": ("#CC79A7", "v", (0, (5, 1, 1, 1, 1, 1))),
    "grad_square": ("#8C6D1F", "X", (0, (3, 1))),
    "drop": ("#56B4E9", "P", (0, (5, 3))),
}
OTHER = ("#777777", "p", (0, (3, 3)))  # a rule of a fork that has no style yet
NAMES = {
    "base": "base model", "none": "none (SFT)", "rmt": "rmt", "hft": "hft", "gmt": "gmt", "grad_square": "grad_square",
    "gmt_frozen": "gmt, frozen", "drop": "one-off drop",
}  # fmt: skip


def save(fig: Figure, path: Path | str) -> None:
    """Write a figure as PNG (150 dots per inch) and PDF, and close it. `path` is without suffix, or with either one."""
    stem = str(path).removesuffix(".png").removesuffix(".pdf")
    fig.savefig(f"{stem}.png", dpi=150)
    fig.savefig(f"{stem}.pdf", metadata={"CreationDate": None})  # the same bytes for the same figure
    plt.close(fig)
