"""Runs that differ in their seed, side by side: mean and spread of what selection was worth, as Markdown."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from megatron_bliss.base.files import read_json
from megatron_bliss.report.curves import speedup
from megatron_bliss.report.speedups import CONTROL


def spread(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation over runs (of the sample; no spread for a single run)."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def loss_rows(summaries: list[dict]) -> list[list[str]]:
    """Per test set and arm: final loss, difference to random's, and speed-up over random, of each run and overall."""
    rows = []
    for name in summaries[0]["arms"][CONTROL]["losses"]:
        curves = {arm: [s["arms"][arm]["losses"][name] for s in summaries] for arm in summaries[0]["arms"]}
        control = curves[CONTROL]
        for arm, found in curves.items():
            row = [name, arm, spread([curve[-1][1] for curve in found]), "", ""]
            if arm != CONTROL:
                pairs = list(zip(control, found, strict=True))
                row[3] = spread([mine[-1][1] - random[-1][1] for random, mine in pairs])
                row[4] = speedups([speedup(random, mine) for random, mine in pairs])
            rows.append(row)
    return rows


def speedups(ratios: list[float | None]) -> str:
    """Mean and spread, and each run's; None where an arm never had the other's final loss."""
    reached = [ratio for ratio in ratios if ratio is not None]
    each = ", ".join("never" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
    return f"{spread(reached, 2) if len(reached) == len(ratios) else 'not in all runs'} ({each})"


def task_rows(summaries: list[dict]) -> list[list[str]]:
    """Per task, in per cent: the warm-up's value, which all arms share, and every arm's at the end."""
    arms = summaries[0]["arms"]
    names = [set(summary["arms"][arm].get("tasks", {})) for summary in summaries for arm in arms]
    return [
        [
            name,
            spread([100 * s["arms"][CONTROL]["tasks"][name][0][1] for s in summaries], 1),
            *(spread([100 * s["arms"][arm]["tasks"][name][-1][1] for s in summaries], 1) for arm in arms),
        ]
        for name in arms[CONTROL].get("tasks", {})
        if name in set.intersection(*names)
    ]


def share_rows(summaries: list[dict], field: str, arms: list[str], count: int) -> list[list[str]]:
    """Shares of the pool, and by how much each arm's selection changed them; those that the first arm changed most."""
    fields = [summary["domains_by_field"][field] for summary in summaries]
    rows = []
    for label, pool in fields[0]["pool"].items():
        ratios = {arm: [f["selected"][arm].get(label, 0.0) / f["pool"][label] for f in fields] for arm in arms}
        selected = statistics.mean(f["selected"][arms[0]].get(label, 0.0) for f in fields)
        shares = [f"{100 * pool:.1f} %", f"{100 * selected:.1f} %"]
        rows.append((statistics.mean(ratios[arms[0]]), [label, *shares, *(spread(ratios[arm], 2) for arm in arms)]))
    rows.sort(key=lambda row: -row[0])
    kept = rows if len(rows) <= 2 * count else [*rows[:count], *rows[-count:]]
    return [cells for _, cells in kept]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Print the comparison of the run folders given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="finished run folders with the same arms, random among them")
    parser.add_argument("--labels", type=int, default=6, help="labels shown from each end of a field")
    options = parser.parse_args()
    summaries = [read_json(run / "summary.json") for run in options.runs]
    print(f"Seeds: {', '.join(str(summary['seed']) for summary in summaries)}.\n")
    print(table(["test set", "arm", "final loss", f"− {CONTROL}", "speed-up (each run)"], loss_rows(summaries)))
    arms = list(summaries[0]["arms"])
    if tasks := task_rows(summaries):
        print(f"\n{table(['task, %', 'warm-up', *arms], tasks)}")
    choosing = [arm for arm in arms if arm != CONTROL]
    for field in summaries[0]["domains_by_field"] if choosing else []:
        header = [field, "pool", f"{choosing[0]}'s share", *(f"{arm}, ratio" for arm in choosing)]
        print(f"\n{table(header, share_rows(summaries, field, choosing, options.labels))}")
    minutes = [sum(stage["seconds"] for stage in summary["stages"]) / 60 for summary in summaries]
    peak = max(stage["peak_bytes"] for summary in summaries for stage in summary["stages"])
    print(f"\nMinutes a run: {spread(minutes, 1)}. Largest peak of a process: {peak / 2**20:.0f} MiB.")


if __name__ == "__main__":
    main()
