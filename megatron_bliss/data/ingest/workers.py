"""Processes that are handed tasks one at a time, each of which keeps its state from task to task."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait

PR_SET_PDEATHSIG = 1


class Workers:
    """``count`` processes; each makes its own ``make(*arguments)`` and calls that with every task it is given.

    One worker is this process itself. Use as a context manager: leaving it ends the processes.
    """

    def __init__(self, count: int, make: Callable, arguments: tuple) -> None:
        self.count, self._make, self._arguments = count, make, arguments
        self._own: Callable | None = None
        self._processes: list[multiprocessing.Process] = []
        self._connections: list[Connection] = []

    def __enter__(self) -> Workers:
        if self.count == 1:
            self._own = self._make(*self._arguments)
            return self
        context = multiprocessing.get_context("spawn")
        for _ in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._make, self._arguments), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        return self

    def __exit__(self, error_type, error, traceback_) -> None:
        for connection, process in zip(self._connections, self._processes, strict=True):
            if error_type is not None:
                process.terminate()
            with contextlib.suppress(OSError):  # it may be dead already
                connection.send(None)
            process.join()
            connection.close()

    def run(self, next_task: Callable[[int], object | None]) -> Iterator[object]:
        """Results as they come, of the tasks ``next_task(worker)`` gives until it has none for that worker.

        Raises what a task raised; RuntimeError when a process died.
        """
        if self._own is not None:
            while (task := next_task(0)) is not None:
                yield self._own(task)
            return
        busy = {}
        for number, connection in enumerate(self._connections):
            self._hand_over(number, connection, next_task, busy)
        while busy:
            for connection in wait(list(busy)):
                number = busy.pop(connection)
                yield _receive(connection)
                self._hand_over(number, connection, next_task, busy)

    def _hand_over(self, number: int, connection: Connection, next_task: Callable, busy: dict) -> None:
        task = next_task(number)
        if task is not None:
            try:
                connection.send(task)
            except OSError as error:
                raise _death() from error
            busy[connection] = number


def _receive(connection: Connection) -> object:
    try:
        result, error = connection.recv()
    except (EOFError, OSError) as lost:
        raise _death() from lost
    if error is not None:
        raise error
    return result


def _death() -> RuntimeError:
    return RuntimeError(
        "a worker process died (killed, or out of memory): nothing was published; run the same command again to go "
        "on, with fewer --workers if memory was short"
    )


def _serve(connection: Connection, make: Callable, arguments: tuple) -> None:
    """What a worker process does until it is told None or its parent is gone."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    work = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        while (task := connection.recv()) is not None:
            try:
                work = work or make(*arguments)
                answer = work(task), None
            except Exception as error:
                answer = None, _sendable(error)
            connection.send(answer)


def _sendable(error: Exception) -> Exception:
    """User errors as they are; anything else as text with its traceback, which a pipe would lose."""
    if type(error) in (ValueError, OSError, FileNotFoundError):
        return error
    return RuntimeError(f"in a worker process: {''.join(traceback.format_exception(error))}")


def _die_with_parent() -> None:
    """Linux: this process is killed with its parent. Elsewhere it ends when it finds the pipe closed."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
