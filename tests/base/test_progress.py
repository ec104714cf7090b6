"""Progress says what it must, on a terminal and in a log."""

import io

import pytest

from megatron_bliss.base import progress as progress_module
from megatron_bliss.base.progress import progress


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress_module.time, "monotonic", lambda: self.now)


def test_log_gets_a_line_every_five_seconds_and_one_at_the_end(monkeypatch):
    clock, out = Clock(monkeypatch), io.StringIO()
    with progress(300, description="bliss round 1 bilevel", unit="steps", enabled=True, file=out) as bar:
        for step in range(300):
            clock.now += 0.25
            bar.set(loss=5.3141, validation=5.02)
            bar.update()
            if step == 119:
                assert bar.done == 120
    lines = out.getvalue().splitlines()
    assert len(lines) == 15  # 75 s, the last of them that of the end
    assert "\r" not in out.getvalue()
    assert lines[5] == "bliss round 1 bilevel  120/300 steps  4.0 steps/s  ETA 0:45  loss 5.314  validation 5.02"
    assert lines[-1] == "bliss round 1 bilevel  300/300 steps  4.0 steps/s  in 1:15  loss 5.314  validation 5.02"


def test_steps_of_an_earlier_run_do_not_count_towards_the_rate(monkeypatch):
    clock, out = Clock(monkeypatch), io.StringIO()
    with progress(110, description="pretrain", unit="steps", enabled=True, initial=100, file=out) as bar:
        clock.now += 10.0
        bar.update(5)
    assert out.getvalue().splitlines()[0] == "pretrain  105/110 steps  2.0 s/step  ETA 0:10"


def test_an_iterable_is_walked_and_counted(monkeypatch):
    clock, out = Clock(monkeypatch), io.StringIO()
    seen = []
    for item in progress(["a", "b", "c"], description="score", unit="batches", enabled=True, file=out):
        clock.now += 0.001
        seen.append(item)
    assert seen == ["a", "b", "c"]
    assert out.getvalue() == "score  3/3 batches  1,000 batches/s  in 0:00\n"
    assert list(progress(iter([1, 2]), description="", unit="x", enabled=False)) == [1, 2]


def test_progress_that_is_not_enabled_is_silent(capsys):
    with progress(3, description="score", unit="batches", enabled=False) as bar:
        bar.update(3)
        bar.set(loss=1.0)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_an_error_inside_still_leaves_the_last_state():
    out = io.StringIO()
    with (
        pytest.raises(RuntimeError),
        progress(9, description="bilevel", unit="steps", enabled=True, file=out) as bar,
    ):
        bar.update(4)
        raise RuntimeError("a dead rank")
    assert "bilevel  4/9 steps" in out.getvalue()


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    with progress(4, description="bliss round 2 score", unit="batches", enabled=True, file=out) as bar:
        for _ in range(4):
            bar.update()
        bar.set(loss=2.5)
    last = out.getvalue().split("\r")[-1]
    assert "\r" in out.getvalue()
    assert "bliss round 2 score  100%" in last and "4/4 batches" in last and "loss 2.5" in last
