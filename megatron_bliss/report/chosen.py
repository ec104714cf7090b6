"""The report's sections on what was chosen: scores, shares of the selection, and sample documents."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_bliss.config.selection import SelectionConfig
from megatron_bliss.report.parts import escape, figure, section
from megatron_bliss.report.plots import color_variable, histogram_chart, strip_chart
from megatron_bliss.report.run_data import RunData
from megatron_bliss.report.speedups import CHOSEN, CONTROL
from megatron_bliss.report.summary import by_lift
from megatron_bliss.selection.select import selection_in_words

SAMPLE_CHARACTERS = 1500


def score_section(run: RunData) -> str:
    """How the scores of each arm that chooses are spread, per round and by what is known of the units."""
    figures = []
    for arm, rounds in run.scores.items():
        groups = {f"round {number}": scores for number, scores in rounds.items()}
        svg = histogram_chart(groups, title=f"scores {arm}", x_label="score")
        keys = {label: index for index, label in enumerate(groups)}
        caption = f"Share of the shard's units.{_held_out(run.correlations.get(arm, {}))}{_drift(run, arm)}"
        figures.append(figure(f"Scores, {arm}", caption, svg, keys))
    for (arm, name), groups in run.scores_by_field.items():
        svg = strip_chart(groups, title=f"scores by {name} {arm}", x_label="score")
        caption = "Last scored round. Dot: median; thick: middle half; thin: 5 to 95 %; in brackets: units."
        figures.append(figure(f"Scores by {name}, {arm}", caption, svg))
    return section("Scores", "", *figures)


def _held_out(correlations: Mapping[int, float]) -> str:
    """How well scores rank what they predict, for methods that measure it."""
    rounds = ", ".join(f"{value:.2f} in round {number}" for number, value in sorted(correlations.items()))
    return f" Rank correlation with what was measured, on held-out units: {rounds}." if rounds else ""


def _drift(run: RunData, arm: str) -> str:
    """How a round's scores of its shard compare with those that the round before's scorer gives it."""
    found = [(one["round"], one["drift"]) for one in run.stages if one["arm"] == arm and one.get("drift")]
    rounds = ", ".join(
        f"round {number}: rank correlation {drift['rank_correlation']:.2f}, {drift['overlap']:.0%} of the best fifth "
        "are the same"
        for number, drift in found
    )
    return f" Against the scorer of the round before, on the same units: {rounds}." if rounds else ""


def share_section(run: RunData) -> str:
    """Shares of domains in the pool and in the selections, the most favoured first."""
    fields = (run.summary or {}).get("domains_by_field", {})
    parts = [_share_table(run, field, content) for field, content in fields.items()]
    shares = "Share of units in the pool and in the selection, over all rounds."
    options = run.option("selection")
    policy = _policy_in_words(options) if isinstance(options, dict) else ""
    return section("What was selected", f"Selected by {policy}. {shares}" if policy else shares, *parts)


def _policy_in_words(options: Mapping) -> str:
    """Of the section ``selection`` of a config, which may be of another version; empty where it cannot be read."""
    try:
        return escape(selection_in_words(SelectionConfig(str(options.get("policy")), settings=dict(options))))
    except (KeyError, TypeError, ValueError):
        return ""


def _share_table(run: RunData, field: str, content: Mapping) -> str:
    pool, selected = content["pool"], content["selected"]
    if not pool or not selected:
        return ""
    first = CHOSEN if CHOSEN in selected else next(iter(selected))
    arms = [first, *(arm for arm in selected if arm != first)]
    top = max([*pool.values(), *(share for arm in arms for share in selected[arm].values())])
    rows = []
    drawn = [arm for arm in arms if arm == first or arm != CONTROL]  # the control's bars would be the pool's again
    for label, share, chosen, factor in by_lift(pool, selected[first]):
        bars = _bar(share / top, "var(--series-6)")
        for arm in drawn:
            bars += _bar(selected[arm].get(label, 0.0) / top, color_variable(run.color(arm)))
        rest = "".join(f'<td class="number">{selected[arm].get(label, 0.0):.1%}</td>' for arm in arms[1:])
        rows.append(
            f'<tr><td class="label" title="{escape(label)}">{escape(label)}</td><td class="bars">{bars}</td>'
            f'<td class="number">{share:.1%}</td><td class="number">{chosen:.1%}</td>'
            f'<td class="number {"up" if (factor or 0) >= 1 else "down"}">{"-" if factor is None else f"{factor:.2f}×"}'
            f"</td>{rest}</tr>"
        )
    heads = "".join(f'<th class="number">{escape(text)}</th>' for text in ["pool", first, "ratio", *arms[1:]])
    keys = {"pool": "var(--series-6)"} | {arm: color_variable(run.color(arm)) for arm in drawn}
    legend = "".join(
        f'<span class="key"><i style="background:{color}"></i>{escape(text)}</span>' for text, color in keys.items()
    )
    return (
        f'<div class="scroll"><table>\n<thead><tr><th>{escape(field)}</th><th>{legend}</th>{heads}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>"
    )


def _bar(share: float, color: str) -> str:
    return f'<i style="width:{100 * share:.1f}%;background:{color}"></i>'


def sample_section(run: RunData) -> str:
    """Documents with the highest and the lowest scores, the latest round of each arm first."""
    parts = []
    for (arm, number), samples in sorted(run.samples.items(), key=lambda item: (item[0][0], -item[0][1])):
        columns = "".join(
            f"<div><h3>{title}</h3>{''.join(map(_sample, samples.get(kind, [])))}</div>"
            for kind, title in (("best", "Highest scores"), ("worst", "Lowest scores"))
        )
        is_open = "" if parts else " open"
        parts.append(
            f"<details{is_open}><summary>{escape(arm)}, round {number}</summary>\n"
            f'<div class="samples">{columns}</div></details>'
        )
    return section("Sample documents", "The units with the highest and the lowest scores of a shard.", *parts)


def _sample(sample: Mapping) -> str:
    text = "(text not at hand)" if sample.get("text") is None else str(sample["text"])
    more = f" … ({len(text) - SAMPLE_CHARACTERS:,} more characters)" if len(text) > SAMPLE_CHARACTERS else ""
    score = sample.get("score")
    shown = f"{score:.4f}" if isinstance(score, int | float) else "-"
    source = " · ".join(str(sample[key]) for key in ("domain", "url") if sample.get(key))
    return (
        f'<div class="sample"><header><b>{shown}</b><bdi>{escape(source)}</bdi></header>'
        f"<pre>{escape(text[:SAMPLE_CHARACTERS])}{more}</pre></div>"
    )
