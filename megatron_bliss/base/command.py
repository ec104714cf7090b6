"""How a command ends: with its status, with one line for what the user can mend, quietly where nobody reads on."""

from __future__ import annotations

import functools
import io
import os
import select
import sys
from collections.abc import Callable

BROKEN_PIPE = 141
"""Exit status where standard output was closed early: what a shell reports of a program that SIGPIPE ended."""


def command(name: str, errors: tuple[type[Exception], ...] = (ValueError,), status: int = 1) -> Callable:
    """Make a function that returns an exit status the ``main`` of a command.

    Of ``errors`` it prints ``NAME: TEXT`` and returns ``status``; all others keep their traceback. Where standard
    output is a pipe that its reader has closed (``tools/plan.py ... | head -1``), it returns ``BROKEN_PIPE`` and says
    nothing.
    """

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(*arguments: object, **options: object) -> int:
            try:
                return _run(functools.partial(main, *arguments, **options), name, errors, status)
            except BrokenPipeError:
                if not _is_abandoned(sys.stdout):
                    raise
                _discard(sys.stdout)
                return BROKEN_PIPE

        return run

    return decorate


def _run(main: Callable[[], int], name: str, errors: tuple[type[Exception], ...], status: int) -> int:
    """What ``main`` returns, or ``status`` after one of ``errors``; what it printed has left this process by then."""
    try:
        return main()
    except errors as error:
        if isinstance(error, BrokenPipeError) and _is_abandoned(sys.stdout):
            raise
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return status
    finally:
        if sys.stdout is not None:  # Python has none where the process was started without
            sys.stdout.flush()


def _is_abandoned(stream: io.TextIOBase) -> bool:
    """Whether the reader of a stream is gone: a pipe to another process (a worker's) may be what broke."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), select.POLLOUT)
    except (AttributeError, OSError):  # no stream, or one that is no file
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _discard(stream: io.TextIOBase) -> None:
    """Send what a stream still holds nowhere: Python flushes it again at its exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
