"""metrics.jsonl survives kills and resumes exactly; TensorBoard holds the same."""

import json
import math

import pytest

from megatron_bliss.base.metrics import MetricsLogger, read_metrics


def open_logger(folder, tensorboard=False, is_writer=True):
    return MetricsLogger(folder, is_writer=is_writer, tensorboard=tensorboard)


def log_steps(logger, steps, round=1, stage="bilevel", arm="bliss"):
    for step in steps:
        logger.log(step, {"loss": 10.0 / step, "lr": 0.1}, arm=arm, round=round, stage=stage)


def without_time(path):
    return [{key: value for key, value in entry.items() if key != "time"} for entry in read_metrics(path)]


def test_lines_are_on_disk_before_the_logger_is_closed(tmp_path):
    logger = open_logger(tmp_path)
    log_steps(logger, [1, 2])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert json.loads(lines[1]) == {
        "time": json.loads(lines[1])["time"], "arm": "bliss", "round": 1, "stage": "bilevel", "step": 2, "loss": 5.0,
        "lr": 0.1,
    }  # fmt: skip
    logger.close()


def test_other_ranks_write_nothing(tmp_path):
    logger = open_logger(tmp_path / "run", tensorboard=True, is_writer=False)
    log_steps(logger, [1])
    logger.truncate("bliss", 1, "bilevel", 0)
    logger.close()
    assert not (tmp_path / "run").exists()


def test_killed_and_resumed_file_equals_an_uninterrupted_one(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    logger = open_logger(whole)
    log_steps(logger, range(1, 5), round=0, stage="target", arm="shared")
    log_steps(logger, range(1, 9))
    logger.close()

    logger = open_logger(killed)
    log_steps(logger, range(1, 5), round=0, stage="target", arm="shared")
    log_steps(logger, range(1, 7))
    logger.close()
    with open(killed / "metrics.jsonl", "ab") as file:
        file.write(b'{"time":1.0,"arm":"bliss","rou')
    assert len(read_metrics(killed / "metrics.jsonl")) == 10  # readers do not trip over the torn line
    logger = open_logger(killed)
    assert (killed / "metrics.jsonl").read_bytes().endswith(b"}\n")
    logger.truncate("bliss", 1, "bilevel", 4)
    log_steps(logger, range(5, 9))
    logger.close()
    assert without_time(killed / "metrics.jsonl") == without_time(whole / "metrics.jsonl")
    assert sorted(path.name for path in killed.iterdir()) == ["metrics.jsonl"]


@pytest.mark.parametrize("tail", [b'{"time": 1.0, "ar', b"\0\0\0\0", b"\0\0\0\0\n", b'{"time": 1.0, "arm"\n'])
def test_any_torn_tail_is_dropped_on_reopening(tmp_path, tail):
    logger = open_logger(tmp_path)
    log_steps(logger, [1, 2])
    logger.close()
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole + tail)
    open_logger(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_a_file_that_is_only_a_torn_line_becomes_empty(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"time"')
    open_logger(tmp_path).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_truncate_touches_only_its_own_stage(tmp_path):
    logger = open_logger(tmp_path)
    for arm, round, stage in (("bliss", 1, "bilevel"), ("random", 1, "bilevel"), ("bliss", 2, "bilevel")):
        log_steps(logger, [1, 2, 3], round, stage, arm)
    logger.truncate("bliss", 1, "bilevel", -1)
    logger.close()
    kept = [(e["arm"], e["round"], e["step"]) for e in read_metrics(tmp_path / "metrics.jsonl")]
    assert kept == [("random", 1, s) for s in (1, 2, 3)] + [("bliss", 2, s) for s in (1, 2, 3)]


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    logger = open_logger(tmp_path)
    logger.log(1, {"loss": math.nan, "norm": math.inf}, arm="bliss", round=1, stage="pretrain")
    logger.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["norm"])


def test_damage_in_the_middle_is_an_error_that_names_the_line(tmp_path):
    logger = open_logger(tmp_path)
    log_steps(logger, [1, 2, 3])
    logger.close()
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(lines[0] + b"oops\n" + lines[2])
    with pytest.raises(ValueError, match=r"line 2: found .*oops.*expected a JSON object.*remove"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_metrics_may_not_take_the_name_of_a_key(tmp_path):
    logger = open_logger(tmp_path)
    with pytest.raises(AssertionError, match="step"):
        logger.log(1, {"step": 2.0}, arm="bliss", round=1, stage="pretrain")
    logger.close()


def test_tensorboard_holds_the_same_scalars_also_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = open_logger(tmp_path, tensorboard=True)
    log_steps(logger, [1, 2, 3, 4])
    logger.truncate("bliss", 1, "bilevel", 2)
    logger.log(3, {"loss": 7.0}, arm="bliss", round=1, stage="bilevel")
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "round_01")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("bliss/bilevel/loss")] == [(1, 10.0), (2, 5.0), (3, 7.0)]
    assert [e.step for e in events.Scalars("bliss/bilevel/lr")] == [1, 2]
