"""The study of scale: its tables say what the plans say, and losses follow from bytes and seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.studies import scale
from megatron_bliss.base.files import read_json
from megatron_bliss.plan.plan import Machine


def machine(gpus: int) -> Machine:
    return Machine(world_size=gpus, device="h100", mfu=0.4, proxy_mfu=0.1, memory_gib=80.0)


def test_tables_and_plans_are_written(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)  # where no corpus lies
    arguments = ["--targets", "410m", "70b", "--gpus", "8", "1024", "--tokens", "26214400000", "1e12"]
    assert scale.main([*arguments, "--output", "out/scale.md", "--json", "scale.json"]) == 0
    page = Path("out/scale.md").read_text()
    assert page in capsys.readouterr().out
    cells = {(one["target"], one["gpus"], one["tokens"]): one for one in read_json("scale.json")["cells"]}
    assert len(cells) == 8
    refused = {key for key, cell in cells.items() if "refusal" in cell}
    assert refused == {("410m", 1024, 26214400000), ("70b", 8, 26214400000), ("70b", 8, 10**12)}
    assert "410m, refused: found pretraining.global_batch_size 512, expected a multiple" in page
    small = cells["410m", 8, 26214400000]
    assert small["days"] == pytest.approx(sum(one["seconds"] for one in small["stages"]) / 86400)
    assert f"| 410m | 8 | {small['days']:.3g} | " in page
    trained = sum(one["tokens"] for one in cells["70b", 1024, 10**12]["stages"] if one["stage"] == "pretrain")
    assert trained == pytest.approx(0.8e12, rel=1e-3)


def test_losses_follow_from_what_is_sent_and_how_long_a_step_takes() -> None:
    cell = scale.planned("13b", 256, 26_214_400_000, machine)
    assert cell.plan["layout"]["data_parallel_size"] == 32 and cell.iteration * 10_000 * 4 == pytest.approx(
        cell.seconds("pretrain")
    )
    found = scale.losses(cell)
    assert found["tensor"] == pytest.approx(cell.sent("target training", "tensor") / 450e9 / cell.iteration)
    assert found["data"] == pytest.approx(cell.sent("target training", "data") / 100e9 / cell.iteration)  # two cards
    assert found["bubble"] == pytest.approx(1 / (8 * 4)) and scale.breaks(cell).startswith("data ")
    larger = scale.planned("13b", 256, 100_000_000_000, machine)
    assert scale.losses(larger)["data"] == pytest.approx(found["data"] / 4, rel=1e-3)


def test_micro_batches_shrink_to_what_the_batch_can_be_divided_into() -> None:
    sizes = [
        scale.planned("1b", gpus, 26_214_400_000, machine).plan["layout"]["micro_batches"] for gpus in (8, 64, 256, 512)
    ]
    assert sizes == [8, 1, 1, 1]  # in micro-batches of 8, 8, 2 and 1


def test_unknown_tokens_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        scale.parse_arguments(["--tokens", "1e9"])
    assert "found --tokens 1000000000, expected some of 26214400000" in capsys.readouterr().err
