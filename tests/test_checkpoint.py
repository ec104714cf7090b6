"""Saved states come back as they were or not at all."""

from __future__ import annotations

import pytest
import torch

from megatron_bliss import checkpoint
from megatron_bliss.files import write_json
from tests.targets import grouped, layout

STATE = {
    "weight": torch.arange(1000.0).reshape(10, 100),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "nested": {"numbers": [1, 2.5, None, True], "name": "proxy"},
    "betas": (0.9, 0.95),
}


@pytest.fixture
def groups():
    with grouped(layout()) as groups:
        yield groups


def save(folder, step: int, groups, **changes):
    states = {"shared": {"iteration": step}, "weights": {"w": torch.ones(2)}, "state": {"step": step}}
    return checkpoint.save_checkpoint(folder, step, groups, **{**states, **changes})


def test_a_state_comes_back_as_it_was(tmp_path):
    checkpoint.save_state(tmp_path / "state.pt", STATE)
    loaded = checkpoint.load_state(tmp_path / "state.pt")
    assert torch.equal(loaded["weight"], STATE["weight"]) and loaded["half"].dtype == torch.bfloat16
    assert loaded["nested"] == STATE["nested"] and loaded["betas"] == STATE["betas"]
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_every_kind_of_damage_is_noticed(tmp_path):
    path = tmp_path / "state.pt"
    checkpoint.save_state(path, STATE)
    content = path.read_bytes()
    middle = content.index(STATE["weight"][5].numpy().tobytes()) + 7  # inside the weight's numbers
    damages = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "other": b"not a checkpoint",
        "a bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    }
    for name, damaged in damages.items():
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="state.pt.*remove it"):
            checkpoint.load_state(path)
        assert path.read_bytes() == damaged, name
    path.write_bytes(content)
    assert torch.equal(checkpoint.load_state(path)["weight"], STATE["weight"])
    with pytest.raises(ValueError, match="found no file"):
        checkpoint.load_state(tmp_path / "missing.pt")


def test_a_save_that_fails_leaves_the_old_state(tmp_path):
    path = tmp_path / "state.pt"
    checkpoint.save_state(path, {"step": 1})
    with pytest.raises(Exception, match="pickle|local|lambda"):
        checkpoint.save_state(path, {"step": 2, "function": lambda: None})
    assert checkpoint.load_state(path) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]


def test_the_newest_finished_checkpoint_is_found_and_old_ones_go(tmp_path, groups):
    assert checkpoint.latest(tmp_path) is None and checkpoint.latest(tmp_path / "nowhere") is None
    for step in (5, 10, 100):
        assert save(tmp_path, step, groups) == checkpoint.latest(tmp_path) == tmp_path / f"step_{step:08d}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010", "step_00000100"]
    (tmp_path / "step_00000200").mkdir()  # no manifest: not finished
    (tmp_path / ".step_00000300.tmp").mkdir()
    assert checkpoint.latest(tmp_path).name == "step_00000100"
    checkpoint.keep_last(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000100", "step_00000200"]


def test_a_checkpoint_comes_back_and_can_be_written_again(tmp_path, groups):
    save(tmp_path, 5, groups)
    path = save(tmp_path, 5, groups, state={"step": -1})
    shared, weights, state = checkpoint.load_checkpoint(path, groups)
    assert shared == {"iteration": 5} and state == {"step": -1}
    assert torch.equal(weights["w"], torch.ones(2))
    assert torch.equal(checkpoint.load_weights(path, groups)["w"], torch.ones(2))


def test_a_failed_save_keeps_the_checkpoints_there_are(tmp_path, groups):
    save(tmp_path, 5, groups)
    with pytest.raises(RuntimeError, match="rank 0 failed with"):
        save(tmp_path, 10, groups, state={"function": lambda: None})
    assert checkpoint.latest(tmp_path).name == "step_00000005"
    save(tmp_path, 10, groups)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000005", "step_00000010"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tensor_model_parallel_size": 4}, "found tensor_model_parallel_size=4 .* set target.tensor_model"),
        ({"pipeline_model_parallel_size": 2}, "found pipeline_model_parallel_size=2 .* set target.pipeline_model"),
        ({"data_parallel_size": 8}, "found data_parallel_size=8 .* start 8 times the ranks of one replica"),
        ({"format": 99}, "found checkpoint format 99"),
    ],
)
def test_a_checkpoint_of_another_layout_is_refused(tmp_path, groups, change, message):
    path = save(tmp_path, 5, groups)
    write_json(path / "manifest.json", {**checkpoint.read_manifest(path), **change})
    with pytest.raises(ValueError, match=message):
        checkpoint.load_checkpoint(path, groups)
    if "data_parallel_size" in change:  # weights are the same on every replica
        assert checkpoint.load_weights(path, groups)


def test_damage_in_a_checkpoint_names_the_file(tmp_path, groups):
    path = save(tmp_path, 5, groups)
    state = next(path.glob("state_*.pt"))
    state.write_bytes(state.read_bytes()[:-20])
    with pytest.raises(ValueError, match=state.name):
        checkpoint.load_checkpoint(path, groups)
    state.unlink()
    with pytest.raises(ValueError, match=f"found no file .*{state.name}"):
        checkpoint.load_checkpoint(path, groups)
    (path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        checkpoint.load_checkpoint(path, groups)
    with pytest.raises(ValueError, match="expected a finished checkpoint"):
        checkpoint.load_checkpoint(tmp_path, groups)
