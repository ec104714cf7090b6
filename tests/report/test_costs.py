"""What stages took, from their own records."""

import json

import pytest

from megatron_bliss.report.costs import read_stages, total_cost
from tests.report.summaries import STAGES


def test_stage_records_come_from_done_files_in_order_of_work(tmp_path):
    for place, seconds in (
        ("random/round_01/select", 1), ("bliss/round_02/bilevel", 2), ("bliss/round_01/pretrain", 3),
        ("bliss/round_01/bilevel", 4), ("warmup/target", 5), ("warmup/proxy", 6),
    ):  # fmt: skip
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "done.json").write_text(json.dumps({"seconds": seconds, "peak_bytes": 10, "other": 1}))
    (tmp_path / "bliss/round_02/score").mkdir()  # begun, not finished
    records = read_stages(tmp_path)
    assert [record["seconds"] for record in records] == [5, 6, 4, 3, 2, 1]
    noted = {"seconds": 4, "peak_bytes": 10, "flops": None, "evaluation_seconds": None}
    unnoted = {"needs": None, "drift": None, "domain_weights": None}
    assert records[2] == {"arm": "bliss", "round": 1, "stage": "bilevel", **noted, **unnoted}
    assert records[0]["stage"] == "warmup target" and records[0]["arm"] == "shared"


def test_a_damaged_done_file_is_named(tmp_path):
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup/done.json").write_text("{")
    with pytest.raises(ValueError, match=r"warmup/done.json.*not (valid )?JSON.*remove it"):
        read_stages(tmp_path)


def test_times_and_work_add_up_and_of_the_peaks_the_largest_counts():
    assert total_cost(STAGES) == (155.2, 3 * 2**29, 12e12)
    assert total_cost(STAGES).cells == ["2:35", "1.5 GiB", "12.0 TFLOP"]
    assert total_cost(STAGES[3:]).cells == ["0:00", "-", "-"] and total_cost([]).cells == ["-", "-", "-"]
