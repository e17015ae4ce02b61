"""The raw output of run.py as pictures, of a GPU or of a CPU: by names that a reader knows, one row for each."""

import statistics

from bench.performance.tables import OURS, SHOWN, TITLES, files_of, is_of_gpu, ratio

# What the lists of contenders call by a number, in words.
NAMES = {
    "P1 get_total_norm": "torch get_total_norm",
    "P1 _foreach_norm": "torch _foreach_norm",
    "P1 clip_grad_norm_": "torch clip_grad_norm_",
    "P2 native": "foreach and eager torch",
    "P2 native + clip": "foreach and eager torch, then clip_grad_norm_",
    "P3 native compiled": "foreach and torch.compile",
    "P4 native graph": "the same in a CUDA graph",
    "P5 vector_norm(flat)": "vector_norm of one buffer",
    "P5 dot(flat, flat)": "dot of one buffer",
    "P6 esper-lite dual": "esper-lite, two gradient sets",
    "P6 esper-lite health": "esper-lite, health of each tensor",
    "P7 double loop": "loop over tensors, in float64",
    "P8 fp32 loop": "loop over tensors, in fp32",
    "P8 clip_grad_norm_ loop": "clip_grad_norm_, foreach=False",
    "P10 NeMo-style": "NeMo-style kernel",
    "P12 item loop": "loop with .item()",
    "off": "nothing measured, nothing clipped",
}
SHAPES = {
    "1000 x 64": "1000 tensors of 64",
    "1000 x 1K": "1000 tensors of 1024",
    "odd": "odd sizes",
    "unaligned": "unaligned addresses",
    "200M + 2000 x 1K": "one large, 2000 small",
    "one 1B": "one tensor",
}
# Colour-blind safe (Okabe and Ito), and a shape as well: nine colours are more than people tell apart.
LOOKS = (
    ("#E69F00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#D55E00", "v"), ("#56B4E9", "P"), ("#CC79A7", "X"),
    ("#999999", "D"), ("#882255", "<"), ("#332288", ">"),
)  # fmt: skip
INK, FAINT = "#1a1a1a", "#8a8a8a"


def name_of(contender):
    """A contender in words."""
    return NAMES.get(contender, contender)


def pictures(record, folder):
    """Both pictures, into ``folder``. The caller's backend and settings stay as they are."""
    import matplotlib

    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        for draw, (_, file) in zip((bandwidth, ratios), files_of(record)):
            draw(record).savefig(folder / file, dpi=120)


def bandwidth(record):
    """Bytes over time of the norm, in fp32 and bf16: a row for each set of gradients, from the smallest down."""
    from matplotlib.figure import Figure

    field = "gpu_us_median" if is_of_gpu(record) else "wall_us_median"
    rows = [row for row in record["rows"] if row["task"] == "norm" and row[field] and row["dtype"] in ("fp32", "bf16")]
    sizes = {row["shape"]: row["bytes"] for row in sorted(rows, key=lambda row: row["dtype"] == "fp32")}
    shapes = sorted(sizes, key=sizes.get)
    peers = dict.fromkeys(row["contender"] for row in rows if not row["contender"].startswith(OURS))
    figure = Figure(figsize=(10, 1.9 + 0.42 * len(shapes)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, sharex=True)
    copy = statistics.median(one["copy_bytes_per_second"] for one in record["anchors"].values())
    for panel, dtype in zip(panels, ("fp32", "bf16")):
        for name, (colour, shape) in [*zip(peers, LOOKS), (OURS, (INK, "o"))]:
            own = [row for row in rows if row["dtype"] == dtype and row["contender"] == name]
            speeds = [row["bytes"] / row[field] / 1e3 for row in own]
            panel.plot(
                speeds, [shapes.index(row["shape"]) for row in own], shape, color=colour, label=name_of(name),
                ms=9 if name == OURS else 6, mec="white", mew=0.7, zorder=3 if name == OURS else 2,
            )  # fmt: skip
        panel.axvline(copy / 1e9, color=FAINT, ls="--", lw=1)
        panel.annotate(
            "a copy, read plus written", (copy / 1e9, -0.75), xytext=(-4, 0), textcoords="offset points", ha="right",
            va="center", fontsize=8, color=FAINT,
        )  # fmt: skip
        panel.set(xscale="log", xlabel="GB/s, more is better", title=f"norm of {dtype} gradients")
        _plain_ticks(panel, (1.0,))
        panel.set_ylim(len(shapes) - 0.5, -1.1)
        panel.grid(alpha=0.3, axis="both")
        panel.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(shapes)), [f"{SHAPES.get(s, s)}, {_bytes(sizes[s])}" for s in shapes])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[-1:] + handles[:-1], labels[-1:] + labels[:-1], loc="outside lower center", ncols=4,
                  frameon=False, fontsize=9)  # fmt: skip
    where = record["header"]["device"]
    figure.suptitle(f"How fast the gradients are read: {where} (sizes are those in fp32)", fontweight="bold")
    return figure


def ratios(record):
    """How many times as long as ours everybody takes: the median over all cases, and from the least to the most."""
    from matplotlib.figure import Figure

    found = {task: of for task in SHOWN if (of := _times(record, task))}
    heights = [0.6 + len(of) for of in found.values()] or [1]
    figure = Figure(figsize=(10, 1.2 + 0.36 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (task, of) in zip(panels, found.items()):
        for place, values in enumerate(of.values()):
            middle = statistics.median(values)
            colour = "#009E73" if middle > 1.05 else "#D55E00" if middle < 0.95 else FAINT
            panel.plot([min(values), max(values)], [place, place], color=colour, lw=2.5, alpha=0.45)
            panel.plot(middle, place, "o", color=colour, ms=8)
            panel.annotate(
                f"{middle:.2f}", (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=INK,
                annotation_clip=False,
            )  # fmt: skip
        panel.set_yticks(range(len(of)), [name_of(name) for name in of])
        panel.set_ylim(len(of) - 0.4, -0.9)
        panel.set_xscale("log")
        panel.axvline(1.0, color=INK, lw=1)
        panel.grid(alpha=0.3, axis="x")
        panel.set_title(TITLES[task], loc="left", fontsize=10, fontweight="bold")
        panel.tick_params(axis="both", length=0)
    _plain_ticks(panels[-1], (1.0, 2.0, 5.0))
    panels[-1].set_xlabel("their time / seedtriton's; right of the line seedtriton is faster")
    where = record["header"]["device"]
    figure.suptitle(f"Median over all gradients, and from the least to the most: {where}", fontweight="bold")
    return figure


def _times(record, task):
    """By contender, their times over ours in every case that both have."""
    rows = [row for row in record["rows"] if row["task"] == task]
    ours = {(row["shape"], row["dtype"]): row for row in rows if row["contender"] == OURS}
    found = {}
    for row in rows:
        if not row["contender"].startswith(OURS) and (row["shape"], row["dtype"]) in ours:
            times, _ = ratio(ours[row["shape"], row["dtype"]], row)
            if times is not None:
                found.setdefault(row["contender"], []).append(times)
    return found


def _plain_ticks(panel, subs):
    """0.5, 1, 2 and so on, as they are written: the default writes powers, one over the other on a short axis."""
    from matplotlib import ticker

    panel.xaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=20))
    panel.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    panel.xaxis.set_minor_locator(ticker.NullLocator())


def _bytes(count):
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
