"""How a command ends, in processes of their own: real statuses, real pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bliss.base.command import BROKEN_PIPE, command

ROOT = Path(__file__).parents[2]
PROGRAM = """
import argparse, os, sys
from megatron_bliss.base.command import command

def other_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    os.write(writer, b"x")

ENDS = {
    "little": lambda: print("a line"),
    "much": lambda: [print("a line") for _ in range(100_000)],
    "help": lambda: argparse.ArgumentParser().parse_args(["--help"]),
    "wrong": lambda: int("x"),
    "wrong after a line": lambda: (print("a line"), int("x")),
    "gone": lambda: open("/nowhere/file"),
    "a folder": lambda: open("/"),
    "half written": lambda: open("/nowhere/file.123.tmp", "w"),
    "told": lambda: (_ for _ in ()).throw(OSError("told by the program")),
    "bug": lambda: {}["x"],
    "a worker's pipe": other_pipe,
}

@command("tool", (ValueError, OSError), status=3)
def main():
    ENDS[sys.argv[1]]()
    return 0

sys.exit(main())
"""


def end(how: str, *, closed: bool, unbuffered: bool = False) -> tuple[int, str]:
    """(status, standard error) of a process whose reader is gone before it prints, or stays."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1" if unbuffered else ""},
    )
    assert program.stdout is not None
    if closed:
        program.stdout.close()
        program.stdout = None
    _, said = program.communicate()
    return program.returncode, said


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("how", ["little", "much"])
def test_where_nobody_reads_on_a_command_ends_quietly(how: str, unbuffered: bool) -> None:
    assert end(how, closed=True, unbuffered=unbuffered) == (BROKEN_PIPE, "")
    assert end(how, closed=False, unbuffered=unbuffered) == (0, "")


def test_help_that_nobody_reads_ends_quietly() -> None:
    assert end("help", closed=True) == (BROKEN_PIPE, "")
    # argparse passes over what it cannot write from Python 3.11.3 on
    assert end("help", closed=True, unbuffered=True) in ((0, ""), (BROKEN_PIPE, ""))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("wrong", "tool: invalid literal for int() with base 10: 'x'\n"),
        ("gone", "tool: found no /nowhere/file, expected it to be there: change its name, or make it\n"),
        ("half written", "tool: found no /nowhere/file, expected it to be there: change its name, or make it\n"),
        ("a folder", "tool: found a folder at /, expected a file: change the name\n"),
        ("told", "tool: told by the program\n"),
        ("a worker's pipe", "tool: [Errno 32] Broken pipe\n"),  # not that of the output
    ],
)
def test_what_the_user_can_mend_is_one_line(how: str, said: str) -> None:
    assert end(how, closed=False) == (3, said)


def test_an_error_is_said_even_after_output_that_nobody_reads() -> None:
    assert end("wrong after a line", closed=True) == (
        BROKEN_PIPE,
        "tool: invalid literal for int() with base 10: 'x'\n",
    )


def test_other_errors_keep_their_traceback() -> None:
    status, said = end("bug", closed=False)
    assert status == 1 and "Traceback" in said and "KeyError" in said


def test_a_command_called_as_a_function_returns_its_status(capsys) -> None:
    @command("tool")
    def main(number: str) -> int:
        return int(number)

    assert main("7") == 7 and main("x") == 1
    assert capsys.readouterr().err.startswith("tool: invalid literal")
