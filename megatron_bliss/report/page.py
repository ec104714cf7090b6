"""A run folder as one HTML page: what selection was worth, how the stages went, what was chosen, what it cost.

The page holds everything it shows and loads nothing. It can be made at any time of a run: what is not there yet is said
at its top. Text from outside (documents, addresses, labels, the config) goes through :func:`escape`, all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_bliss.base.files import atomic_file
from megatron_bliss.base.text import format_flops, format_loss, format_seconds
from megatron_bliss.report.chosen import sample_section, score_section, share_section
from megatron_bliss.report.costs import stage_key, total_cost
from megatron_bliss.report.gain_section import alarm, gain_section
from megatron_bliss.report.losses import loss_section
from megatron_bliss.report.parts import escape, section, table
from megatron_bliss.report.run_data import RunData, read_run
from megatron_bliss.report.speedups import CHOSEN, CONTROL, speedup_sentence
from megatron_bliss.report.summary import final_losses
from megatron_bliss.report.tasks import task_section
from megatron_bliss.report.training import bilevel_section, pretraining_section

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser lets the page load: nothing."""


def write_report(run_folder: Path | str) -> Path:
    """Write ``report.html`` into a run folder and return its path."""
    path = Path(run_folder) / "report.html"
    page = build_report(run_folder).encode("utf-8", errors="replace")
    with atomic_file(path) as file:
        file.write(page)
    return path


def build_report(run_folder: Path | str) -> str:
    """Return the page for a run folder. Raises ``ValueError`` where there is no such folder."""
    folder = Path(run_folder)
    if not folder.is_dir():
        raise ValueError(f"found no folder {folder}, expected a run folder; change the path")
    run = read_run(folder)
    sections = (_head, alarm, _missing, loss_section, gain_section, task_section, pretraining_section, bilevel_section,
                score_section, share_section, sample_section, _stage_section, _config_section)  # fmt: skip
    body = "\n".join(write(run) for write in sections)
    return document(f"{run.name} - BLISS run", body)


def document(title: str, body: str) -> str:
    """A whole page of a title and of markup, which is taken as it is."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _head(run: RunData) -> str:
    state = "finished" if run.is_finished else "in progress"
    facts = [f"arms {', '.join(run.arms)}"] if run.arms else []
    facts += [f"{run.rounds} rounds"] if run.rounds else []
    if run.summary:
        facts += [f"seed {run.summary.get('seed')}", f"config {str(run.summary.get('config_digest'))[:12]}"]
        facts += [f"{name} {version}" for name, version in run.summary.get("versions", {}).items()]
    lead = speedup_sentence(run.summary) if run.summary else "No evaluation has been written yet."
    lead = lead if run.is_finished or not run.summary else f"So far: {lead}"
    return (
        f'<header>\n<h1>{escape(run.name)}<span class="pill{"" if run.is_finished else " open"}">{state}</span></h1>\n'
        f'<p class="meta">{escape(" · ".join(facts))}</p>\n</header>\n'
        f'<div class="tiles">{"".join(_tiles(run))}</div>\n<p class="lead">{escape(lead[:1].upper() + lead[1:])}</p>'
    )


def _tiles(run: RunData) -> list[str]:
    tiles = []
    if run.summary:
        ratio = run.summary.get("speedup")
        tiles.append(("–" if ratio is None else f"{ratio:.2f}×", f"speed-up to {CONTROL}'s final loss"))
        finals = next(iter(final_losses(run.summary).values()), {})
        compared = [arm for arm in (CHOSEN, CONTROL) if arm in finals]
        tiles += [(format_loss(finals[arm]), f"final validation loss, {arm}") for arm in compared]
    seconds = total_cost(run.stages).seconds
    if seconds is not None:
        tiles.append((format_seconds(seconds), f"in {len(run.stages)} finished stages"))
    return [f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in tiles]


def _missing(run: RunData) -> str:
    if not run.missing:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in run.missing)
    return f'<div class="missing"><b>Not on this page</b><ul>{items}</ul></div>'


def _stage_section(run: RunData) -> str:
    records = sorted(run.stages, key=stage_key)
    if not records:
        return ""
    rows = [[record["arm"], str(record["round"] or "–"), record["stage"], *_cost([record])] for record in records]
    rows.append(["total", "", "", *_cost(records)])
    header = ["arm", "round", "stage", "time", "peak memory", "work", "work per second"]
    note = "Peak memory is that of the largest process; work counts the operations of all ranks."
    return section("Time, memory and work", note, table(header, rows, left=3, total=True))


def _cost(records: Sequence[Mapping]) -> list[str]:
    cost = total_cost(records)
    speed = f"{format_flops(cost.flops / cost.seconds)}/s" if cost.flops and cost.seconds else "-"
    return [*cost.cells, speed]


def _config_section(run: RunData) -> str:
    if not run.config_text:
        return ""
    text = f'<details><summary>config.yaml</summary><pre class="config">{escape(run.config_text)}</pre></details>'
    return section("Configuration", "Every option as it was resolved, the first thing the run wrote.", text)
