"""Pictures of a run, drawn from its events. Matplotlib is imported only when one is drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..core.errors import ConfigurationError
from ..core.lifecycle import Stage
from .events import Event
from .runs import limits, numbers_in, passes, points, runs_of, stage_bands

PASSED = "passed a gate"  # what the dots are
FORMATS = (".png", ".svg", ".pdf")

Bands = Mapping[str, Sequence[tuple[Stage, int, int]]]

# Colour-blind safe (Okabe and Ito); the stages before and after a life have none.
STAGE_COLOURS = {
    Stage.TRAINING: "#56B4E9",
    Stage.BLENDING: "#E69F00",
    Stage.HOLDING: "#F0E442",
    Stage.FOSSILIZED: "#009E73",
}
SEED_COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#7F7F7F")


class Ink(NamedTuple):
    """The colours of a page: what is written, what is faint, the paper, and one for each seed in turn."""

    text: str
    faint: str
    paper: str
    seeds: Sequence[str] = SEED_COLOURS


LIGHT = Ink("#1a1a1a", "#6b6b6b", "#ffffff")
DARK = Ink("#e6edf3", "#8b949e", "#0d1117", ("#56B4E9", "#F28E4B", "#CC79A7", "#B0B0B0"))


def lifecycle_figure(
    events: Sequence[Event], path: str | os.PathLike[str] | None = None, title: str = "", *, dark: bool = False
) -> Any:
    """Stages, gradient ratio, blend gain, alpha, and accuracy or loss of a run over its epochs.

    Of several runs in the events the last is drawn. Backend, pyplot and rcParams are left as they are.

    Args:
        events: as the controller emits them; "baseline" events (epoch, accuracy, loss) draw a dashed line.
        path: where the picture goes as well, a .png, .svg or .pdf; None: nowhere.
        title: above it.
        dark: light on dark.

    Returns:
        The ``matplotlib.figure.Figure``, for ``savefig`` and notebooks.

    Raises:
        ImportError: matplotlib is not installed.
        ConfigurationError: there are no events, or a path of another kind.
    """
    if path is not None:
        check_path(path)
    import matplotlib
    from matplotlib.figure import Figure

    runs = runs_of(events)
    if not runs:
        raise ConfigurationError("there are no events to draw: the run had no epoch, or wrote elsewhere")
    ink = DARK if dark else LIGHT
    settings = {
        "font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False, "text.color": ink.text,
        "axes.labelcolor": ink.text, "axes.edgecolor": ink.faint, "xtick.color": ink.text, "ytick.color": ink.text,
        "axes.facecolor": ink.paper, "figure.facecolor": ink.paper,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = _draw(runs[-1], Figure(figsize=(10, 11), layout="constrained"), title, ink)
        if path is not None:
            save(figure, path)
    return figure


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure to a .png, .svg or .pdf; ConfigurationError for another ending."""
    check_path(path)
    figure.savefig(path, dpi=130, facecolor=figure.get_facecolor())


def check_path(path: str | os.PathLike[str]) -> None:
    """ConfigurationError unless a picture of this name can be written."""
    ending = os.path.splitext(os.fspath(path))[1].lower()
    if ending not in FORMATS:
        raise ConfigurationError(f"a picture ends in {', '.join(FORMATS)}, got {os.fspath(path)!r}")


def _draw(events: Sequence[Event], figure: Any, title: str, ink: Ink) -> Any:
    last = max(event["epoch"] for event in events)
    bands = stage_bands(events, last)
    colours = {seed: ink.seeds[i % len(ink.seeds)] for i, seed in enumerate(bands)}
    heights = [0.28 * max(1, len(bands)) + 0.2, 1, 1, 0.7, 1.2]
    axes = figure.subplots(5, 1, sharex=True, height_ratios=heights)
    stages, ratio, gain, alpha, result = axes
    _draw_bands(stages, bands, colours, ink)
    for seed, colour in colours.items():
        _draw_line(ratio, points(events, seed, "ratio"), colour, seed)
        _draw_line(gain, points(events, seed, "blend_gain_t"), colour, None)
        _draw_line(alpha, points(events, seed, "alpha"), colour, None)
        _draw_limits(ratio, events, seed, "gradient_ratio", colour)
        _draw_limits(gain, events, seed, "blend_gain", colour)
        _draw_passes(gain, events, seed, colour)
    ratio.set_yscale("log")
    ratio.set_ylabel("gradient ratio\nseed / host")
    ratio.set_xlim(0, max(1, last))
    gain.axhline(0, color=ink.faint, lw=0.6, alpha=0.5, zorder=0)
    gain.set_ylabel("blend gain\nt statistic")
    alpha.set_ylabel("alpha")
    alpha.set_ylim(-0.05, 1.05)
    _draw_result(result, events, ink)
    for panel in axes[1:]:
        _mark_moves(panel, bands, colours)
    for panel, place in ((ratio, "upper left"), (gain, "upper right"), (result, "best")):
        if panel.get_legend_handles_labels()[0]:  # a run may have measured nothing
            panel.legend(loc=place, frameon=False, ncols=3)
    figure.align_ylabels(axes[1:])
    figure.suptitle(title or "The life of a seed", fontsize=14, fontweight="bold")
    return figure


def _draw_result(panel: Any, events: Sequence[Event], ink: Ink) -> None:
    """The accuracy, and where nobody told one the loss; the baseline in the same."""
    field = "accuracy" if points(events, None, "accuracy") else "loss"
    baseline = [event for event in events if event["event"] == "baseline"]
    _draw_line(panel, points(events, None, field), ink.text, "grown")
    _draw_line(panel, numbers_in(baseline, field), ink.faint, "same host, no growth", ls="--")
    panel.set_ylabel(f"validation\n{field}")
    panel.set_xlabel("epoch")


def _draw_bands(panel: Any, bands: Bands, colours: Mapping[str, str], ink: Ink) -> None:
    for row, entries in enumerate(bands.values()):
        for stage, begin, end in entries:
            colour = STAGE_COLOURS.get(stage)
            if colour is None or end <= begin:
                continue
            panel.barh(row, end - begin, left=begin, height=0.72, color=colour, edgecolor=ink.paper)
            # A short stage has no room for its name inside; it stands above.
            inside = end - begin > 3
            panel.text(
                (begin + end) / 2, row if inside else row - 0.4, stage.name, color="#1a1a1a" if inside else ink.text,
                ha="center", va="center" if inside else "bottom", fontsize=8.5 if inside else 7,
            )
        pruned = [begin for stage, begin, _ in entries if stage is Stage.PRUNED]
        if pruned:
            panel.text(max(pruned) + 0.4, row, "PRUNED", ha="left", va="center", fontsize=8.5, color=ink.faint)
    panel.set_yticks(range(len(bands)), list(bands))
    for label, seed in zip(panel.get_yticklabels(), bands):
        label.set_color(colours[seed])
        label.set_fontweight("bold")
    panel.invert_yaxis()
    panel.spines[["left", "bottom"]].set_visible(False)
    panel.tick_params(length=0)


def _draw_line(panel: Any, curve: Sequence[tuple[int, float]], colour: str, label: str | None, **style: Any) -> None:
    if curve:
        panel.plot(*zip(*curve), color=colour, label=label, lw=1.8, **style)


def _draw_limits(panel: Any, events: Sequence[Event], seed: str, question: str, colour: str) -> None:
    """What each verdict asked for, where it asked it, with its number where that changes."""
    before: float | None = None
    for epoch, limit, gate in limits(events, seed, question):
        panel.plot((epoch - 0.5, epoch + 0.5), (limit, limit), color=colour, lw=1.4, ls=(0, (1, 1)), zorder=1)
        if limit != before:
            words = f"{gate}: at least {limit:g}"
            panel.annotate(
                words, (epoch - 0.5, limit), xytext=(0, 2), textcoords="offset points", fontsize=8, color=colour,
                bbox={"facecolor": panel.get_facecolor(), "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
            )  # fmt: skip
        before = limit


def _draw_passes(panel: Any, events: Sequence[Event], seed: str, colour: str) -> None:
    """A dot on the curve where a gate let the seed through."""
    for event in passes(events, seed):
        if type(event.get("blend_gain_t")) in (int, float):
            known = panel.get_legend_handles_labels()[1]
            label = None if PASSED in known else PASSED
            panel.plot(event["epoch"], event["blend_gain_t"], "o", color=colour, ms=5, zorder=3, label=label)


def _mark_moves(panel: Any, bands: Bands, colours: Mapping[str, str]) -> None:
    for seed, entries in bands.items():
        for stage, begin, _ in entries:
            if stage not in (Stage.EMBARGOED, Stage.RESETTING, Stage.DORMANT):
                panel.axvline(begin, color=colours[seed], lw=0.7, alpha=0.35, zorder=0)
