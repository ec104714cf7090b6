"""How a command ends: with its status, with one line for what the user can mend, quietly where nobody reads on."""

from __future__ import annotations

import errno
import functools
import io
import os
import re
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
        print(f"{name}: {_described(error)}", file=sys.stderr, flush=True)
        return status
    finally:
        if sys.stdout is not None:  # Python has none where the process was started without
            sys.stdout.flush()


_KINDS = {
    errno.ENOENT: "found no {file}, expected it to be there: change its name, or make it",
    errno.EISDIR: "found a folder at {file}, expected a file: change the name",
    errno.ENOTDIR: "found a file on the way to {file}, expected folders: change the name",
    errno.EEXIST: "found a file at {file}, expected a folder or a free name: change the name",
    errno.EACCES: "found no permission for {file}, expected to read or write it: change its mode, or the name",
    errno.EROFS: "found {file} on a file system that cannot be written, expected one that can: change the name",
    errno.ENOSPC: "found no space left for {file}, expected some: free space, then give the command again",
}
"""What the system says of a file, in this program's words."""


def _described(error: Exception) -> str:
    """The text of an error; that of the system names the file, not its temporary name, and says what to change."""
    if not isinstance(error, OSError) or error.errno not in _KINDS or error.filename is None:
        return str(error)
    file = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    return _KINDS[error.errno].format(file=re.sub(r"\.\d+\.tmp$", "", file))


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
