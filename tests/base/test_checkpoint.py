"""Saved states come back as they were or not at all."""

from __future__ import annotations

import pytest
import torch

from megatron_bliss.base import checkpoint

STATE = {
    "weight": torch.arange(1000.0).reshape(10, 100),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "nested": {"numbers": [1, 2.5, None, True], "name": "proxy"},
    "betas": (0.9, 0.95),
}


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
