"""The rounds of a run: which stage comes when, for which arm, and what a run says at its end.

    shards, warm-up of target and proxy, evaluation of the target on the tasks if there are any
    for each round, for each arm: [bilevel ->] score -> select -> pretrain -> [decay branch ->] evaluate

Arms share shards, warm-up, seeds, tokens and schedule; they differ only in the scores they select by. A finished stage
is not run again, so the same command continues a run that was stopped anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from megatron_bliss.base.files import write_json
from megatron_bliss.base.metrics import MetricsLogger
from megatron_bliss.base.parallel import Groups, barrier
from megatron_bliss.config.config import Config
from megatron_bliss.report.costs import read_stages
from megatron_bliss.report.gains import HeldOut
from megatron_bliss.report.page import write_report
from megatron_bliss.report.summary import build_summary
from megatron_bliss.report.text import format_table
from megatron_bliss.run import corpora as run_corpora
from megatron_bliss.run import stages, target_stages
from megatron_bliss.run.folder import RunFolder
from megatron_bliss.run.order import needs_proxy, round_stages
from megatron_bliss.run.session import Round, Session, warmup

STAGE_WORK: dict[str, Callable[[Round, Path], dict]] = {
    "bilevel": stages.learn_scores,
    "score": stages.score_shard,
    "select": stages.select_units,
    "pretrain": target_stages.pretrain_target,
    "decay_branch": target_stages.decay_target,
    "evaluate": target_stages.evaluate_target,
}
"""What each stage of a round does."""


def run(config: Config, groups: Groups) -> None:
    """Run what is missing of all stages (or the one stage asked for), then write summary.json and report.html."""
    folder = RunFolder(config.run_folder, groups)
    folder.open(config)
    metrics = MetricsLogger(folder.path, is_writer=groups.is_main, tensorboard=config.logging.tensorboard)
    session = Session(config, groups, folder, metrics)
    try:
        for path, work in _planned(session):
            folder.run_stage(path, work)
            summarise(session)
    finally:
        metrics.close()
    if groups.is_main and config.stage is None:
        print(format_table(summarise(session)), flush=True)
        print(f"\nreport: {write_report(folder.path)}", flush=True)
    barrier(groups)


def _planned(session: Session) -> Iterator[tuple[Path, Callable[[Path], dict]]]:
    """Every stage of the run as (folder, work), in order; only the ones that ``--stage`` names when it is given."""
    config, start = session.config, warmup(session)
    yield session.folder.path / "shards", partial(run_corpora.make_shards, session)
    if config.stage in (None, "warmup"):
        yield start.folder("target"), partial(target_stages.warm_up_target, session)
        if config.pretraining.decay_branch_iters:
            yield start.folder("decay_branch"), partial(target_stages.decay_target, start)
        if needs_proxy(config):
            yield start.folder("proxy"), partial(stages.warm_up_proxy, session)
    if config.evaluation.tasks and (
        config.stage in (None, "warmup") or (config.stage, config.round) == ("evaluate", 0)
    ):
        yield start.folder("evaluate"), partial(target_stages.evaluate_target, start)
    for number in range(1, config.rounds + 1):
        for arm in config.arms:
            this = Round(session, arm, number)
            for stage in round_stages(config, arm):
                if _is_wanted(this, stage):
                    yield this.folder(stage), partial(STAGE_WORK[stage], this)


def _is_wanted(this: Round, stage: str) -> bool:
    config = this.session.config
    return config.stage is None or (config.stage, config.round, config.arm) == (stage, this.number, this.arm)


def summarise(session: Session) -> dict:
    """Write and return ``summary.json`` from what is finished so far (on the main rank; {} elsewhere)."""
    if not session.groups.is_main:
        return {}
    path = session.folder.path
    summary = build_summary(
        _evaluations(session),
        stages=read_stages(path),
        domains_by_field=_domains(session),
        task_results=_task_results(session),
        held_out=_held_out(session),
        seed=session.config.seed,
        config_text=(path / "config.yaml").read_text(encoding="utf-8"),
    )
    write_json(path / "summary.json", summary)
    return summary


def _held_out(session: Session) -> HeldOut:
    guide, other = run_corpora.test_prefixes(session), session.config.data.other_prefixes
    names = [[Path(prefix).name for prefix in prefixes] for prefixes in (guide, other)]
    return HeldOut(*names, loss_margin=session.config.logging.loss_margin)


def _evaluations(session: Session) -> dict[str, list[dict]]:
    """Per arm every evaluation in order, the shared warm-up's first; a round's last point is that read from disk.

    In a run with decay branches only these count: at the same tokens they are far below the main line.
    """
    curves = {}
    for arm in session.config.arms:
        points = []
        for this in (warmup(session), *_rounds(session, arm)):
            record = this.record("evaluate") if this.number else None
            measured = [*_segment_evaluations(this), *([record["evaluation"]] if record else [])]
            points += [{**point, "round": this.number} for point in measured]
        newest = {point["iteration"]: point for point in points}
        curves[arm] = [newest[iteration] for iteration in sorted(newest)]
    return curves


def _rounds(session: Session, arm: str) -> list[Round]:
    return [Round(session, arm, number) for number in range(1, session.config.rounds + 1)]


def _task_results(session: Session) -> dict[str, list[dict]]:
    """Per arm {"tokens", "result"} of every checkpoint evaluated on tasks, the shared warm-up's first."""
    found = {}
    for arm in session.config.arms:
        records = [this.record("evaluate") for this in (warmup(session), *_rounds(session, arm))]
        evaluated = [record for record in records if record and "tasks" in record]
        found[arm] = [{"tokens": one["evaluation"]["tokens"], "result": one["tasks"]} for one in evaluated]
    return {arm: points for arm, points in found.items() if points}


def _segment_evaluations(this: Round) -> list[dict]:
    """What a segment measured on its way, or its decay branch at its end."""
    if this.session.config.pretraining.decay_branch_iters:
        record = this.record("decay_branch")
        return [record["evaluation"]] if record else []
    record = this.record(this.training_stage)
    return record["evaluations"] if record else []


def _domains(session: Session) -> dict[str, dict]:
    """{field: {"pool": shares, "selected": {arm: shares}}} over all rounds finished so far."""
    shards = session.folder.record(session.folder.path / "shards") or {}
    result: dict[str, dict] = {}
    for field, pool in shards.get("domains", {}).items():
        selected = {arm: _selected_shares(session, arm, field) for arm in session.config.arms}
        result[field] = {"pool": pool, "selected": {arm: shares for arm, shares in selected.items() if shares}}
    return result


def _selected_shares(session: Session, arm: str, field: str) -> dict[str, float]:
    """Shares of an arm's selections, all rounds together, by units."""
    counts: dict[str, float] = {}
    for this in _rounds(session, arm):
        record = this.record("select") or {}
        for name, share in record.get("domains", {}).get(field, {}).items():
            counts[name] = counts.get(name, 0.0) + share * record["units"]
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()}
