"""The few figures of the README, from the raw outputs whose tables are in docs/."""

from bench.growth.tables import SABOTAGED, close_to, permanent
from bench.performance.tables import OURS, ratio

PROBED, GRADIENTS, MEAN, BARE = "G2", "G2 without probe", "G2, sum of losses alone", "original"
GATED, ALONE, ONCE, AGAIN = "gates decide", "no growth", "blending at once", "blending at once, another seed"


def markdown(readiness, fresh, new, growth, new_growth, gpu=None):
    """One row per figure; the arguments are raw outputs, of which those that are not there are None."""
    records = (
        ("", readiness),
        (", random seeds that no limit was settled on", fresh),
        (", tasks that none was", new),
    )
    lines = ["| measured on a CPU | |", "|---|---|"]
    for said, record in records:
        if record is None:
            continue
        runs = record["runs"]
        optimizers = ", ".join(dict.fromkeys(run["optimizer"] for run in runs))
        figure = f"{_wrong(runs, PROBED)} ({optimizers})"
        lines.append(f"| wrong verdicts of G2 with a probe of each sample{said} | {figure} |")
        figure = f"{_wrong(runs, GRADIENTS)}; {_wrong(runs, MEAN)}"
        lines.append(f"| the same, by gradients alone; with the mean loss alone | {figure} |")
    lines.append(f"| the ratio of the original gate, 0.05 | {_wrong(readiness['runs'], BARE)} |")
    for said, record in (("", growth), (", new tasks", new_growth)):
        if record is None:
            continue
        runs = [run for run in record["runs"] if run.get("optimizer", "AdamW") == "AdamW"]
        above, lives = close_to(runs, GATED, ALONE)
        lines.append(f"| lives under the gates that end more than 2 % above no growth{said} | {above} of {lives} |")
        worse, lives = close_to(runs, GATED, ONCE)
        chance, pairs = close_to(runs, AGAIN, ONCE)
        figure = f"{lives - worse} of {lives}; chance, with other first weights: {pairs - chance} of {pairs}"
        lines.append(f"| better than blending at once, or within 2 %{said} | {figure} |")
        sabotaged = [run for run in runs if run["strategy"].startswith(SABOTAGED) and run.get("ended")]
        lines.append(
            f"| sabotaged seeds that became permanent{said} | {sum(map(permanent, sabotaged))} of {len(sabotaged)} |"
        )
    return "\n".join(lines + ([] if gpu is None else ["", *_on_a_gpu(gpu)]))


def _on_a_gpu(record):
    """GPU time of GPT-2's gradients, in two dtypes, and how many times as long others take for the same."""
    head = record["header"]
    rows = {
        (row["task"], row["dtype"], row["contender"]): row
        for row in record["rows"]
        if row["shape"].split(", 2 segments")[0] == "GPT-2"
    }
    lines = [f"| measured on one {head['device']}, torch {head['torch']} | fp32 | bf16 |", "|---|---|---|"]
    for said, task, peer, name in (
        ("measuring every gradient of GPT-2", "telemetry", "P4 native graph", "torch's operations in a CUDA graph"),
        ("the same, and clipping that leaves them as they are", "clip 1", "P1 clip_grad_norm_", "torch's clipping"),
    ):
        pairs = [(rows.get((task, dtype, OURS)), rows.get((task, dtype, peer))) for dtype in ("fp32", "bf16")]
        if not all(own and other and own["gpu_us_median"] and other["gpu_us_median"] for own, other in pairs):
            continue  # left out, as by --seconds or --part
        ours, others = [own for own, _ in pairs], [ratio(*pair)[0] for pair in pairs]
        lines.append(f"| {said}, GPU time | " + " | ".join(f"{own['gpu_us_median']:.0f} µs" for own in ours) + " |")
        lines.append(f"| {name} for it | " + " | ".join(f"{other:.2f} times as long" for other in others) + " |")
        counts = (f"{own['kernels']} and {own['syncs']}" for own in ours)
        lines.append("| kernels of ours and waits | " + " | ".join(counts) + " |")
    return lines if len(lines) > 2 else []


def _wrong(runs, judge):
    wrong = sum(run["verdicts"][judge]["right"] == "wrong" for run in runs)
    return f"{wrong} of {len(runs)}, {wrong / len(runs):.1%}"
