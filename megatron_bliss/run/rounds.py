"""The rounds of a run: which stage comes when, for which arm, and what a run says at its end.

    shards, warm-up of target and proxy, evaluation of the target on the tasks if there are any
    for each round, for each arm: [bilevel ->] score -> select -> pretrain -> [decay branch ->] evaluate

Arms share shards, warm-up, seeds, tokens and schedule; they differ only in the scores they select by. A finished stage
is not run again, so the same command continues a run that was stopped anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_bliss.base.files import write_json
from megatron_bliss.base.metrics import MetricsLogger
from megatron_bliss.base.parallel import Groups, barrier
from megatron_bliss.config.config import Config
from megatron_bliss.config.parse import arm_names, has_stage
from megatron_bliss.report.costs import read_stages
from megatron_bliss.report.page import write_report
from megatron_bliss.report.summary import build_summary
from megatron_bliss.report.text import format_table
from megatron_bliss.run import corpora as run_corpora
from megatron_bliss.run import stages, target_stages
from megatron_bliss.run.folder import RunFolder
from megatron_bliss.run.session import Session

ROUND_STAGES: dict[str, Callable[[Session, Path, str, int], dict]] = {
    "bilevel": stages.learn_scores,
    "score": stages.score_shard,
    "select": stages.select_units,
    "pretrain": target_stages.pretrain_target,
    "decay_branch": target_stages.decay_target,
    "evaluate": target_stages.evaluate_target,
}


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
    config, folder = session.config, session.folder
    yield folder.path / "shards", lambda path: run_corpora.make_shards(session, path)
    if config.stage in (None, "warmup"):
        yield folder.stage_folder("shared", 0, "target"), lambda path: target_stages.warm_up_target(session, path)
        if config.pretraining.decay_branch_iters:
            branch = folder.stage_folder("shared", 0, "decay_branch")
            yield branch, lambda path: target_stages.decay_target(session, path, "shared", 0)
        yield folder.stage_folder("shared", 0, "proxy"), lambda path: stages.warm_up_proxy(session, path)
    if config.evaluation.tasks and (
        config.stage in (None, "warmup") or (config.stage, config.round) == ("evaluate", 0)
    ):
        yield folder.stage_folder("shared", 0, "evaluate"), _bind(target_stages.evaluate_target, session, "shared", 0)
    for number in range(1, config.rounds + 1):
        for arm in arm_names(config):
            for stage in ROUND_STAGES:
                if has_stage(config, arm, stage) and _is_wanted(config, number, arm, stage):
                    yield folder.stage_folder(arm, number, stage), _bind(ROUND_STAGES[stage], session, arm, number)


def _bind(stage: Callable[..., dict], session: Session, arm: str, number: int) -> Callable[[Path], dict]:
    return lambda path: stage(session, path, arm, number)


def _is_wanted(config: Config, number: int, arm: str, stage: str) -> bool:
    return config.stage is None or (config.stage, config.round, config.arm) == (stage, number, arm)


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
        seed=session.config.seed,
        config_text=(path / "config.yaml").read_text(encoding="utf-8"),
    )
    write_json(path / "summary.json", summary)
    return summary


def _evaluations(session: Session) -> dict[str, list[dict]]:
    """Per arm every evaluation in order, the shared warm-up's first; a round's last point is that read from disk.

    In a run with decay branches only these count: at the same tokens they are far below the main line.
    """
    decayed = session.config.pretraining.decay_branch_iters > 0
    curves = {}
    for arm in arm_names(session.config):
        points = {point["iteration"]: point for point in _segment_evaluations(session, "shared", 0, decayed)}
        for number in range(1, session.config.rounds + 1):
            evaluate = session.folder.record(session.folder.stage_folder(arm, number, "evaluate")) or {}
            points |= {point["iteration"]: point for point in _segment_evaluations(session, arm, number, decayed)}
            points |= {point["iteration"]: point for point in [evaluate.get("evaluation")] if point}
        curves[arm] = [points[iteration] for iteration in sorted(points)]
    return curves


def _task_results(session: Session) -> dict[str, list[dict]]:
    """Per arm {"tokens", "result"} of every checkpoint evaluated on tasks, the shared warm-up's first."""
    found = {}
    for arm in arm_names(session.config):
        folders = [session.folder.stage_folder(arm, n, "evaluate") for n in range(session.config.rounds + 1)]
        records = [record for record in map(session.folder.record, folders) if record and "tasks" in record]
        found[arm] = [{"tokens": one["evaluation"]["tokens"], "result": one["tasks"]} for one in records]
    return {arm: points for arm, points in found.items() if points}


def _segment_evaluations(session: Session, arm: str, number: int, decayed: bool) -> list[dict]:
    """What a segment measured on its way, or its decay branch at its end."""
    stage = "decay_branch" if decayed else "pretrain" if number else "target"
    record = session.folder.record(session.folder.stage_folder(arm, number, stage)) or {}
    return [record["evaluation"]] if decayed and record else record.get("evaluations", [])


def _domains(session: Session) -> dict[str, dict]:
    """{field: {"pool": shares, "selected": {arm: shares}}} over all rounds finished so far."""
    shards = session.folder.record(session.folder.path / "shards") or {}
    result: dict[str, dict] = {}
    for field, pool in shards.get("domains", {}).items():
        selected = {arm: _selected_shares(session, arm, field) for arm in arm_names(session.config)}
        result[field] = {"pool": pool, "selected": {arm: shares for arm, shares in selected.items() if shares}}
    return result


def _selected_shares(session: Session, arm: str, field: str) -> dict[str, float]:
    """Shares of an arm's selections, all rounds together, by units."""
    counts: dict[str, float] = {}
    for number in range(1, session.config.rounds + 1):
        record = session.folder.record(session.folder.stage_folder(arm, number, "select")) or {}
        for name, share in record.get("domains", {}).get(field, {}).items():
            counts[name] = counts.get(name, 0.0) + share * record["units"]
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()}
