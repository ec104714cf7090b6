"""Runs that differ in their seed, side by side: mean and spread of what selection was worth, as Markdown."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from megatron_bliss.files import read_json
from megatron_bliss.summary import speedup


def spread(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation over runs (of the sample; no spread for a single run)."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def loss_rows(summaries: list[dict]) -> list[list[str]]:
    """Per test set: final losses of both arms, their difference, and the speed-up, run by run and overall."""
    rows = []
    for name in summaries[0]["arms"]["bliss"]["losses"]:
        curves = [(s["arms"]["bliss"]["losses"][name], s["arms"]["random"]["losses"][name]) for s in summaries]
        finals = [(bliss[-1][1], random[-1][1]) for bliss, random in curves]
        ratios = [speedup(random, bliss) for bliss, random in curves]
        reached = [ratio for ratio in ratios if ratio is not None]
        each = ", ".join("never" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        rows.append(
            [
                name,
                spread([bliss for bliss, _ in finals]),
                spread([random for _, random in finals]),
                spread([bliss - random for bliss, random in finals]),
                f"{spread(reached, 2) if len(reached) == len(ratios) else 'not in all runs'} ({each})",
            ]
        )
    return rows


def share_rows(summaries: list[dict], field: str, count: int) -> list[list[str]]:
    """The labels whose share grew or shrank most from pool to selection, by mean ratio."""
    fields = [summary["domains_by_field"][field] for summary in summaries]
    rows = []
    for label, pool in fields[0]["pool"].items():
        selected = [f["selected"]["bliss"].get(label, 0.0) for f in fields]
        ratios = [share / f["pool"][label] for share, f in zip(selected, fields, strict=True)]
        cells = [label, f"{100 * pool:.1f} %", f"{100 * statistics.mean(selected):.1f} %", spread(ratios, 2)]
        rows.append((statistics.mean(ratios), cells))
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
    parser.add_argument("runs", nargs="+", type=Path, help="finished run folders with the arms bliss and random")
    parser.add_argument("--labels", type=int, default=6, help="labels shown from each end of a field")
    options = parser.parse_args()
    summaries = [read_json(run / "summary.json") for run in options.runs]
    print(f"Seeds: {', '.join(str(summary['seed']) for summary in summaries)}.\n")
    print(table(["test set", "bliss", "random", "bliss − random", "speed-up (each run)"], loss_rows(summaries)))
    for field in summaries[0]["domains_by_field"]:
        header = [field, "pool", "selected", "ratio"]
        print(f"\n{table(header, share_rows(summaries, field, options.labels))}")
    minutes = [sum(stage["seconds"] for stage in summary["stages"]) / 60 for summary in summaries]
    peak = max(stage["peak_bytes"] for summary in summaries for stage in summary["stages"])
    print(f"\nMinutes a run: {spread(minutes, 1)}. Largest peak of a process: {peak / 2**20:.0f} MiB.")


if __name__ == "__main__":
    main()
