# SPDX-License-Identifier: Apache-2.0
"""A pool of gloo ranks, spawned once and used by many tests: a function and its arguments go in, one result per rank
comes out. A rank that fails, dies or hangs ends the call with an error that names it; no call waits for ever."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

_GRACE_S = 5.0


class RankError(RuntimeError):
    """A rank of the pool failed. `rank` is its number, or None where the pool as a whole was refused."""

    def __init__(self, message: str, rank: int | None = None):
        super().__init__(message)
        self.rank = rank


class RankPool:
    """`world_size` processes joined in one gloo group, reused from call to call.

    >>> with RankPool(2) as pool:
    ...     pool.run(all_reduce_of_ones)
    [2.0, 2.0]

    The processes start at the first `run` and end with the context (or `close`). After a rank died, hung or left
    another one waiting, the pool is broken: `run` refuses until `restart` has been called.

    Args:
        world_size: number of ranks, >= 1.
        timeout: seconds that one `run` may take, unless it says otherwise.
        start_timeout: seconds for all ranks to import torch and to find each other.
        threads: torch threads of each rank.
    """

    def __init__(self, world_size: int, *, timeout: float = 60.0, start_timeout: float = 180.0, threads: int = 1):
        if world_size < 1:
            raise ValueError(f"world_size must be >= 1, got {world_size}")
        self.world_size, self.timeout, self.start_timeout, self.threads = world_size, timeout, start_timeout, threads
        self.broken: str | None = None
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        """Spawn the ranks and wait until they form a group; `run` does it where nobody has."""
        if self._processes:
            return
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="lrc_ranks_")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, rank, self.world_size, self._folder.name, self.threads),
                name=f"rank {rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self._collect(self.start_timeout, "starting")

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        """Call `fn(*args)` on every rank at once and return the results in rank order.

        Args:
            fn: a function defined at the top level of a module; the default group is initialised when it runs.
            args: picklable arguments, the same for each rank (`torch.distributed.get_rank()` tells them apart).
            timeout: seconds until ranks that have not answered are killed (default: the pool's).

        Raises:
            RankError: a rank raised (with its traceback), died, or did not answer in time, or the pool is broken.
            TypeError, ValueError: `fn` is not a function at the top level of a module.
        """
        if not inspect.isfunction(fn):
            raise TypeError(f"fn must be a function, got {type(fn).__name__}")
        if "." in fn.__qualname__:
            raise ValueError(f"fn must be defined at the top level of a module, got {fn.__qualname__}")
        if self.broken is not None:
            raise RankError(f"the pool is broken ({self.broken}); call restart() first")
        self.start()
        module = (fn.__module__, getattr(sys.modules.get(fn.__module__), "__file__", None))
        message = (module, fn.__qualname__, pickle.dumps(args))
        for rank, connection in enumerate(self._connections):
            try:
                connection.send(message)
            except OSError:
                self._break(f"rank {rank} is gone ({self._exit(rank)})")
                raise RankError(f"rank {rank} is gone ({self._exit(rank)})", rank) from None
        return self._collect(self.timeout if timeout is None else timeout, fn.__qualname__)

    def restart(self) -> None:
        """End what is left of the ranks and spawn new ones."""
        self.close()
        self.broken = None
        self.start()

    def close(self) -> None:
        """End all ranks; a later `run` spawns new ones unless the pool is broken."""
        for connection in self._connections:
            connection.close()
        deadline = time.monotonic() + (0.0 if self.broken else 2.0)
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._connections = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _collect(self, timeout: float, what: str) -> list[Any]:
        started = time.monotonic()
        deadline = started + timeout
        answers: dict[int, tuple[bool, Any]] = {}
        dead: dict[int, str] = {}
        while len(answers) + len(dead) < self.world_size and time.monotonic() < deadline:
            pending = [rank for rank in range(self.world_size) if rank not in answers and rank not in dead]
            handles = {self._connections[rank]: rank for rank in pending}
            for handle in wait(list(handles), max(0.0, deadline - time.monotonic())):
                rank = handles[handle]  # type: ignore[index]
                try:
                    answers[rank] = self._connections[rank].recv()
                except (EOFError, OSError):
                    self._processes[rank].join(1.0)
                    dead[rank] = self._exit(rank)
            # The ranks that wait for one that failed get a moment to end by themselves.
            if dead or any(not ok for ok, _ in answers.values()):
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        return self._judge(answers, dead, what, timeout)

    def _judge(
        self, answers: dict[int, tuple[bool, Any]], dead: dict[int, str], what: str, timeout: float
    ) -> list[Any]:
        failed = {rank: value for rank, (ok, value) in sorted(answers.items()) if not ok}
        silent = [rank for rank in range(self.world_size) if rank not in answers and rank not in dead]
        traces = "".join(f"\n--- rank {rank} ---\n{trace}" for rank, trace in failed.items())
        if dead:
            rank, how = next(iter(dead.items()))
            self._break(f"rank {rank} died")
            raise RankError(f"rank {rank} died in {what}: {how}{traces}", rank)
        if silent and not failed:
            names = ", ".join(map(str, silent))
            self._break(f"rank {names} did not answer")
            raise RankError(f"rank {names} did not answer within {timeout:g} s in {what}", silent[0])
        if silent:
            self._break(f"rank {', '.join(map(str, silent))} waited for rank {next(iter(failed))}, which had failed")
        if failed:
            raise RankError(f"rank {next(iter(failed))} failed in {what}{traces}", next(iter(failed)))
        return [answers[rank][1] for rank in range(self.world_size)]

    def _break(self, reason: str) -> None:
        self.broken = reason
        for process in self._processes:
            process.kill()

    def _exit(self, rank: int) -> str:
        code = self._processes[rank].exitcode
        if code is None:
            return "its connection closed"
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def _serve(connection: Connection, rank: int, world_size: int, folder: str, threads: int) -> None:
    try:
        _join_group(rank, world_size, folder, threads)
        connection.send((True, None))
    except Exception:
        connection.send((False, traceback.format_exc()))
        return
    while True:
        try:
            module, name, arguments = connection.recv()
        except (EOFError, OSError):
            # The group is not destroyed: that would wait for ranks that may be gone.
            os._exit(0)
        try:
            result = getattr(_load_module(*module), name)(*pickle.loads(arguments))
            answer = (True, result)
            pickle.dumps(answer)
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send(answer)


def _join_group(rank: int, world_size: int, folder: str, threads: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    from torch import distributed

    torch.set_num_threads(threads)
    store = distributed.FileStore(os.path.join(folder, "store"), world_size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=30))


def _load_module(name: str, path: str | None) -> Any:
    if name in sys.modules:
        return sys.modules[name]
    try:
        return importlib.import_module(name)
    except ImportError:
        # pytest's importlib mode gives test modules names that only it can import.
        if path is None:
            raise
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {name} from {path}")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
