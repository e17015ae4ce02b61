"""Pictures of a run, drawn from its events. Matplotlib is imported only when one is drawn."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from ..core.errors import ConfigurationError
from ..core.lifecycle import Stage

# Colour-blind safe (Okabe and Ito); the stages before and after a life stay white.
STAGE_COLOURS = {
    Stage.TRAINING: "#56B4E9",
    Stage.BLENDING: "#E69F00",
    Stage.HOLDING: "#F0E442",
    Stage.FOSSILIZED: "#009E73",
}
SEED_COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#000000")


def read_events(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events of a file of JSON lines; ConfigurationError names a line that is none."""
    events = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                events += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise ConfigurationError(f"{os.fspath(path)}, line {number}, is no event: {error}") from error
    return events


def stage_bands(events: Iterable[dict[str, Any]], last_epoch: int) -> dict[str, list[tuple[Stage, int, int]]]:
    """For every seed its stages as (stage, from epoch, to epoch), in order."""
    moves: dict[str, list[tuple[Stage, int]]] = {}
    for event in events:
        if event["event"] == "stage":
            moves.setdefault(event["seed"], []).append((Stage[event["target"]], event["epoch"]))
    bands = {}
    for seed, entries in moves.items():
        ends = [begin for _, begin in entries[1:]] + [last_epoch]
        bands[seed] = [(stage, begin, end) for (stage, begin), end in zip(entries, ends)]
    return bands


def lifecycle_figure(events: Sequence[dict[str, Any]], path: str | os.PathLike[str], title: str = "") -> None:
    """Stages, gradient ratio, blend gain, alpha and accuracy over the epochs, as a PNG.

    Args:
        events: as the controller emits them; "baseline" events (epoch, accuracy) draw a dashed line.
        path: where the picture goes.
        title: above it.

    Raises:
        ImportError: matplotlib is not installed.
        ConfigurationError: there are no events.
    """
    import matplotlib
    from matplotlib.figure import Figure

    if not events:
        raise ConfigurationError("there are no events to draw: the run had no epoch, or wrote elsewhere")
    # For this picture alone: the caller's backend and settings stay.
    with matplotlib.rc_context({"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False}):
        _draw(events, Figure(figsize=(10, 11), layout="constrained"), title).savefig(path, dpi=130)


def _draw(events: Sequence[dict[str, Any]], figure: Any, title: str) -> Any:
    last = max(event["epoch"] for event in events)
    bands = stage_bands(events, last)
    seeds = list(bands)
    colours = {seed: SEED_COLOURS[i % len(SEED_COLOURS)] for i, seed in enumerate(seeds)}
    heights = [0.28 * max(1, len(seeds)) + 0.2, 1, 1, 0.7, 1.2]
    axes = figure.subplots(5, 1, sharex=True, height_ratios=heights)
    stages, ratio, gain, alpha, accuracy = axes
    _draw_bands(stages, bands, colours)
    for seed in seeds:
        epochs = [event for event in events if event["event"] == "epoch" and event["seed"] == seed]
        _draw_line(ratio, epochs, "ratio", colours[seed], seed)
        _draw_line(gain, epochs, "blend_gain_t", colours[seed], seed)
        _draw_line(alpha, epochs, "alpha", colours[seed], seed)
    _draw_limit(ratio, _limit(events, "gradient_ratio"), "threshold")
    _draw_limit(gain, _limit(events, "blend_gain"), "threshold")
    ratio.set_yscale("log")
    ratio.set_ylabel("gradient ratio\nseed / host")
    ratio.set_xlim(0, max(1, last))
    gain.axhline(0, color="0.8", lw=0.8, zorder=0)
    gain.set_ylabel("blend gain\nt statistic")
    alpha.set_ylabel("alpha")
    alpha.set_ylim(-0.05, 1.05)
    run = [event for event in events if event["event"] == "epoch" and event["seed"] is None]
    baseline = [event for event in events if event["event"] == "baseline"]
    _draw_line(accuracy, run, "accuracy", "0.1", "grown")
    _draw_line(accuracy, baseline, "accuracy", "0.55", "same host, no growth", ls="--")
    accuracy.set_ylabel("validation\naccuracy")
    accuracy.set_xlabel("epoch")
    for panel in axes[1:]:
        _mark_moves(panel, bands, colours)
    for panel, place in ((ratio, "upper left"), (accuracy, "lower right")):
        if panel.get_legend_handles_labels()[0]:  # a run may have measured nothing
            panel.legend(loc=place, frameon=False, ncols=3)
    figure.align_ylabels(axes[1:])
    figure.suptitle(title or "The life of a seed", fontsize=14, fontweight="bold")
    return figure


def _draw_bands(panel: Any, bands: dict[str, list[tuple[Stage, int, int]]], colours: dict[str, str]) -> None:
    for row, (_, entries) in enumerate(bands.items()):
        for stage, begin, end in entries:
            colour = STAGE_COLOURS.get(stage)
            if colour is None or end <= begin:
                continue
            panel.barh(row, end - begin, left=begin, height=0.72, color=colour, edgecolor="white")
            # A short stage has no room for its name inside; it stands above.
            inside = end - begin > 3
            panel.text(
                (begin + end) / 2, row if inside else row - 0.4, stage.name,
                ha="center", va="center" if inside else "bottom", fontsize=8.5 if inside else 7,
            )
        pruned = [begin for stage, begin, _ in entries if stage is Stage.PRUNED]
        if pruned:
            panel.text(max(pruned) + 0.4, row, "PRUNED", ha="left", va="center", fontsize=8.5, color="0.35")
    panel.set_yticks(range(len(bands)), list(bands))
    for label, seed in zip(panel.get_yticklabels(), bands):
        label.set_color(colours[seed])
        label.set_fontweight("bold")
    panel.invert_yaxis()
    panel.spines[["left", "bottom"]].set_visible(False)
    panel.tick_params(length=0)


def _draw_line(panel: Any, events: list[dict[str, Any]], key: str, colour: str, label: str, **style: Any) -> None:
    points = [(event["epoch"], event[key]) for event in events if event.get(key) is not None]
    if points:
        panel.plot(*zip(*points), color=colour, label=label, lw=1.8, **style)


def _draw_limit(panel: Any, limit: float | None, words: str) -> None:
    if limit is not None:
        panel.axhline(limit, color="0.35", lw=1, ls=":")
        panel.annotate(
            f"{words} {limit:g}", (1, limit), xycoords=("axes fraction", "data"), xytext=(-4, 3),
            textcoords="offset points", ha="right", va="bottom", fontsize=9, color="0.35",
        )


def _mark_moves(panel: Any, bands: dict[str, list[tuple[Stage, int, int]]], colours: dict[str, str]) -> None:
    for seed, entries in bands.items():
        for stage, begin, _ in entries:
            if stage not in (Stage.EMBARGOED, Stage.RESETTING, Stage.DORMANT):
                panel.axvline(begin, color=colours[seed], lw=0.7, alpha=0.35, zorder=0)


def _limit(events: Iterable[dict[str, Any]], question: str) -> float | None:
    """The last limit that a gate held this question against."""
    found = None
    for event in events:
        for check in event.get("checks") or ():
            if check["question"] == question and check["limit"] is not None:
                found = check["limit"]
    return found
