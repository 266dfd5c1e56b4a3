# SPDX-License-Identifier: Apache-2.0
"""The `bench` fixture: correctness first, then times of a kernel and its peers, interleaved, beside the ceiling that
the same run measured. CPU figures are of one thread and are called CPU figures."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import lrc_kernels
from lrc_kernels import backend as lrc_backend
from lrc_kernels import env

GRAPH_BELOW_S = 100e-6
ROUNDS_CPU, ROUNDS_CUDA = 9, 30
SAMPLE_S = 2e-3

Make = Callable[[int], tuple]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-size", action="store_true", help="real model sizes also on a CPU (default: on a GPU only)")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["lrc"] = machine()


def device_of() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict[str, str]:
    """Where and with what a figure was measured."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, 1 thread ({env.cpu_name()})",
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": str(torch.version.cuda) if on_gpu else "none",
        "python": platform.python_version(),
        "lrc_kernels": lrc_kernels.__version__,
    }


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return device_of()


@pytest.fixture(scope="session")
def full_size(request: pytest.FixtureRequest) -> bool:
    """Whether to use the sizes of the real model: on a GPU, or with --full-size."""
    return torch.cuda.is_available() or request.config.getoption("--full-size")


@pytest.fixture(scope="session")
def ceiling(device: torch.device, full_size: bool) -> dict[str, float]:
    """What this device reaches on random data: a copy (bytes read + written, GB/s) and a matrix product (TFLOP/s)."""
    elements, edge = (1 << 29, 8192) if device.type == "cuda" else (1 << 23, 1024 if full_size else 384)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source = torch.randn(elements, device=device, dtype=dtype)
    target = torch.empty_like(source)
    a, b = torch.randn(edge, edge, device=device, dtype=dtype), torch.randn(edge, edge, device=device, dtype=dtype)
    timers = {"copy": Timer(target.copy_, lambda i: (source,), 1), "matmul": Timer(torch.matmul, lambda i: (a, b), 1)}
    for _ in range(9):
        for timer in timers.values():
            timer.sample()
    nbytes = 2 * source.numel() * source.element_size()
    return {
        "gbps": nbytes / min(timers["copy"].seconds) / 1e9,
        "tflops": 2 * edge**3 / min(timers["matmul"].seconds) / 1e12,
    }


class Timer:
    """Times one function over rotating inputs; `sample` adds the seconds of one call to `seconds`.

    A call shorter than GRAPH_BELOW_S on a GPU is captured, one launch per input set, into a CUDA graph, so that launch
    overhead is not what is measured.
    """

    def __init__(self, fn: Callable, make_inputs: Make, num_sets: int):
        self.fn, self.sets = fn, [make_inputs(i) for i in range(num_sets)]
        self.seconds: list[float] = []
        self.graph: Any = None
        self.on_gpu = torch.cuda.is_available()
        self.fn(*self.sets[0])
        self.repeat = 1
        once = min(self._run() for _ in range(3))
        if self.on_gpu and once < GRAPH_BELOW_S:
            self._capture()
            once = self._run()
        self.repeat = max(1, min(1000, int(SAMPLE_S / max(once, 1e-7))))

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for args in self.sets:
                self.fn(*args)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for args in self.sets:
                self.fn(*args)
        self.graph = graph

    def _run(self) -> float:
        """Seconds per call, over `repeat` rounds of all input sets."""
        calls = self.repeat * len(self.sets)
        if not self.on_gpu:
            started = time.perf_counter()
            for _ in range(self.repeat):
                for args in self.sets:
                    self.fn(*args)
            return (time.perf_counter() - started) / calls
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(self.repeat):
            if self.graph is not None:
                self.graph.replay()
            else:
                for args in self.sets:
                    self.fn(*args)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    def sample(self) -> None:
        self.seconds.append(self._run())

    def summary(self) -> dict[str, Any]:
        ordered = sorted(self.seconds)
        at = lambda share: ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]  # noqa: E731
        return {
            "median_us": statistics.median(ordered) * 1e6,
            "p20_us": at(0.2) * 1e6,
            "p80_us": at(0.8) * 1e6,
            "min_us": ordered[0] * 1e6,
            "cuda_graph": self.graph is not None,
        }


@contextmanager
def poisoned_memory() -> Any:
    """Uninitialised memory reads as NaN, so that an output element nobody wrote cannot pass the check."""
    enabled = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled)


def num_input_sets(inputs: tuple) -> int:
    """Enough input sets that one does not lie in L2 when its turn comes again; 1 on a CPU."""
    nbytes = sum(x.numel() * x.element_size() for x in inputs if isinstance(x, torch.Tensor))
    if not torch.cuda.is_available() or nbytes == 0:
        return 1
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(64, max(1, -(-3 * l2 // nbytes)))


@pytest.fixture
def bench(benchmark: Any, device: torch.device, ceiling: dict[str, float]) -> Callable[..., dict[str, Any]]:
    """bench(fn, *, bytes_moved, flops, check, make_inputs=None, peers=None, backend=None, **info) -> the record

    fn: called with the tensors of one input set (or without arguments).
    bytes_moved, flops: the fewest that the task needs, not what an implementation happens to do.
    check: called with fn's output on input set 0, in poisoned memory, before any timing; it must raise where wrong.
    make_inputs: i -> a tuple, random data, different for each i.
    peers: name -> function of the same inputs; each output passes `check` too, and is timed in turn with fn.
    backend: the backend that every op of fn must have run on (default: any but the reference).
    info: parameters worth a column (shape, dtype, ...).
    """

    def run(
        fn: Callable,
        *,
        bytes_moved: int,
        flops: int = 0,
        check: Callable[[Any], None],
        make_inputs: Make | None = None,
        peers: dict[str, Callable] | None = None,
        backend: str | None = None,
        **info: Any,
    ) -> dict[str, Any]:
        make = make_inputs or (lambda i: ())
        inputs = make(0)
        contestants = {"kernel": fn, **(peers or {})}
        with poisoned_memory():
            for name, contestant in contestants.items():
                with lrc_backend.record() as ran:
                    output = contestant(*inputs)
                check(output)
                if name == "kernel":
                    backends = sorted({used for _, used in ran})
        if backend is None:
            assert "reference" not in backends, (
                "an op fell back to the reference: name it with backend= if that is meant"
            )
        else:
            assert backends == [backend], f"expected every op on {backend!r}, got {ran_names(backends)}"
        num_sets = num_input_sets(inputs)
        timers = {name: Timer(contestant, make, num_sets) for name, contestant in contestants.items()}
        for _ in range(ROUNDS_CUDA if device.type == "cuda" else ROUNDS_CPU):
            for timer in timers.values():
                timer.sample()
        record = {**info, "backend": "+".join(backends) or "none", "bytes": bytes_moved, "flops": flops}
        record.update(timers["kernel"].summary(), input_sets=num_sets, **machine())
        record.update(rates(record, ceiling))
        record["peers"] = {name: timers[name].summary() for name in contestants if name != "kernel"}
        benchmark.extra_info.update(record)
        # pytest-benchmark's own table wants a timing of its own; the report reads extra_info.
        benchmark.pedantic(fn, args=inputs, rounds=3, iterations=1, warmup_rounds=0)
        return record

    return run


def ran_names(backends: list[str]) -> str:
    return ", ".join(backends) or "no op of lrc_kernels at all"


def rates(record: dict[str, Any], ceiling: dict[str, float]) -> dict[str, float]:
    """GB/s, TFLOP/s, and the share of the roofline: the least time that this device needs, over the median."""
    seconds = record["median_us"] / 1e6
    least = max(record["bytes"] / (ceiling["gbps"] * 1e9), record["flops"] / (ceiling["tflops"] * 1e12))
    return {
        "gbps": record["bytes"] / seconds / 1e9,
        "tflops": record["flops"] / seconds / 1e12,
        "ceiling_gbps": ceiling["gbps"],
        "ceiling_tflops": ceiling["tflops"],
        "fraction_of_ceiling": least / seconds,
    }
