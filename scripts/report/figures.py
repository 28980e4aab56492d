"""How figures look, in one place: a style per rule, and how a figure is saved.

Every script that draws imports this first. Colours are Okabe and Ito's, distinct for the colour-blind; markers and
dashes tell the rules apart without colour.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

plt.rcParams.update(
    {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.wspace": 0.06,
        "pdf.fonttype": 42,  # letters stay letters: text can be searched and edited
    }
)

# rule: (colour, marker, dashes). base is the model before training, drop a task vector that merge.py has masked.
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


# ---------------------------------------------------------------------------------------------------------------------
# The figures of report.py, from plain numbers
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Curve:
    """A line of a figure, of one rule with one setting."""

    label: str
    rule: str  # a key of STYLE
    x: list[float]  # steps (loss_figure), keep_ratio (sensitivity_figure), score of the new task (forgetting_figure)
    y: list[float]  # losses in nats; scores in per cent
    x_error: list[float] | None = None  # half-widths of 95 % intervals
    y_error: list[float] | None = None
    seeds: list[tuple[list[float], list[float]]] = field(default_factory=list)  # (x, y) of each, drawn faintly


def loss_figure(panels: dict[str, list[Curve]], path: Path | str) -> None:
    """Training loss against the step, one panel per unit: {"training loss (nats per token)": curves}."""
    fig, axes = plt.subplots(1, len(panels), figsize=(6.2 * len(panels) + 1.6, 4.2), squeeze=False)
    for ax, (unit, curves) in zip(axes[0], panels.items(), strict=True):
        for curve, look in zip(curves, _looks(curves), strict=True):
            for x, y in curve.seeds if len(curve.seeds) > 1 else ():
                ax.plot(x, y, color=look["color"], linewidth=0.5, alpha=0.4)
            ax.plot(
                curve.x, curve.y, color=look["color"], linestyle=look["linestyle"], linewidth=1.8, label=curve.label
            )
        values = [y for curve in curves for y in curve.y if y > 0]
        if values and max(values) > 20 * min(values):
            ax.set_yscale("log")
        ax.set(xlabel="optimizer step", ylabel=unit)
    _legend(fig, axes[0])
    save(fig, path)


def forgetting_figure(panels: dict[str, list[Curve]], new: str, note: str, path: Path | str) -> None:
    """What was to be learnt against what was known before: a panel for each label of what was retained."""
    fig, axes = plt.subplots(1, len(panels), figsize=(5.4 * len(panels) + 2, 4.8), squeeze=False)
    for ax, (retained, curves) in zip(axes[0], panels.items(), strict=True):
        for curve, look in zip(curves, _looks(curves), strict=True):
            _points(ax, curve, look)
        ax.set(xlabel=new, ylabel=retained)
    axes[0][0].set_title(note, fontsize=9, color="#444444", loc="left")
    _legend(fig, axes[0])
    save(fig, path)


def sensitivity_figure(panels: dict[str, tuple[list[Curve], list[Curve], str]], note: str, path: Path | str) -> None:
    """Scores against keep_ratio. A panel per metric: its curves, horizontal lines of other runs, the axis' label.

    Curves are moved sideways by up to 2 % of the axis, so that bars at the same keep_ratio do not hide each other.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(4.2 * columns + 2.2, 3.6 * rows + 0.4), squeeze=False)
    for ax, (metric, (curves, levels, label)) in zip(axes.flat, panels.items(), strict=False):
        for curve, look in zip(levels, _looks(levels), strict=True):
            (y,), (error,) = curve.y, curve.y_error or [0.0]
            ax.axhspan(y - error, y + error, color=look["color"], alpha=0.12, linewidth=0)
            ax.axhline(y, color=look["color"], linestyle=look["linestyle"], linewidth=1.2, label=curve.label)
        log = min(x for curve in curves for x in curve.x) < 0.02
        for i, (curve, look) in enumerate(zip(curves, _looks(curves), strict=True)):
            shift = (i - (len(curves) - 1) / 2) * 0.04 / max(4, len(curves))
            _points(ax, curve, look, lambda x, s=shift, log=log: x * 10**s if log else x + s)
        if log:
            ax.set_xscale("log")
        else:
            ax.set_xlim(0, 1.03)
        ax.set(xlabel="keep_ratio (fraction of entries kept)", ylabel=label)
        ax.set_title(metric, fontsize=11)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    fig.suptitle(note, fontsize=9, color="#444444", x=0.01, horizontalalignment="left")
    _legend(fig, axes.flat[: len(panels)])
    save(fig, path)


def smooth(values: list[float], window: int) -> list[float]:
    """The mean over `window` values around each, over fewer at the ends."""
    half = window // 2
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _looks(curves: list[Curve]) -> list[dict[str, Any]]:
    """Colour, marker and dashes of each curve; a rule's further settings are paler, their markers filled otherwise."""
    total, count = Counter(curve.rule for curve in curves), Counter()
    looks = []
    for curve in curves:
        colour, marker, dashes = STYLE.get(curve.rule, OTHER)
        i = count[curve.rule]
        count[curve.rule] += 1
        paler = 0.7 * i / max(3, total[curve.rule] - 1)
        colour = to_hex([(1 - paler) * c + paler for c in to_rgb(colour)])
        fill = ("full", "none", "left", "right", "top", "bottom")[i % 6]
        looks.append({"color": colour, "marker": marker, "linestyle": dashes, "fillstyle": fill})
    return looks


def _points(ax: Axes, curve: Curve, look: dict[str, Any], place: Callable[[float], float] = lambda x: x) -> None:
    """A curve with its intervals, and each seed's points under it."""
    for x, y in curve.seeds if len(curve.seeds) > 1 or any(len(x) > 1 for x, _ in curve.seeds) else ():
        ax.plot([place(v) for v in x], y, **{**look, "linestyle": "none"}, markersize=4, alpha=0.35)
    line = look if len(curve.x) > 1 else {**look, "linestyle": "none"}
    ax.errorbar(
        [place(v) for v in curve.x], curve.y, xerr=curve.x_error, yerr=curve.y_error, label=curve.label, markersize=8,
        capsize=3, linewidth=1.5, elinewidth=1, **line,
    )  # fmt: skip


def _legend(fig: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, beside them, where it hides nothing."""
    entries = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(entries.values(), entries.keys(), loc="outside right center", handlelength=3)
