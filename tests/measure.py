"""Measuring for bench.py: sides that take turns in processes of their own, whole processes, and the table of all."""

import contextlib
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from notes import Notes

ROOT = Path(__file__).resolve().parent.parent

Numbers = dict[str, float]
Work = Callable[[], Numbers]  # something to measure; gives what it measured itself
works: dict[str, Work] = {}   # what a worker process has made


@dataclass
class Row:
    """A line of the table: what was measured of ours and, where there is one, of what it is compared with."""

    what: str
    ours: list[float]
    base: list[float] | None = None
    against: str = "reference"
    unit: str = "s"
    note: str = ""

    def ratio(self) -> float | None:
        """How many times faster or smaller ours is."""
        return statistics.median(self.base) / statistics.median(self.ours) if self.base and self.unit in ("s", "GB") else None

    def cells(self) -> list[str]:
        def spread(values: list[float]) -> str:
            low, middle, high = (f"{x:.0f}" if x >= 1000 else f"{x:.3g}" for x in (min(values), statistics.median(values), max(values)))
            return f"{middle} {self.unit} [{low}..{high}]"
        compared = [self.against, spread(self.base)] if self.base else ["", ""]
        return [self.what, spread(self.ours), *compared, f"{ratio:.3g}" if (ratio := self.ratio()) else "", self.note]


def work_once(name: str, make: Callable[[], Work]) -> Numbers:
    """In a worker process: what it measures and its seconds. Its work is made at the first time."""
    work = works.get(name) or works.setdefault(name, make())
    start = time.perf_counter()
    numbers = work()
    return {"seconds": time.perf_counter() - start, **numbers}


def take_turns(rounds: int, makers: dict[str, Callable[[], Work]], unmeasured: int = 1) -> dict[str, dict[str, list[float]]]:
    """What each side's work measured in each round, by its name; one side works while the others wait."""
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit our heap, and ours tunes its allocator
    with contextlib.ExitStack() as stack:
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, spawn)) for name in makers}
        answers = [{name: pools[name].submit(work_once, name, make).result() for name, make in makers.items()}
                   for _ in range(rounds + unmeasured)][unmeasured:]
    return {name: {key: [answer[name][key] for answer in answers] for key in answers[0][name]} for name in makers}


def in_stages(**stages: Callable[[Any], Any]) -> Work:
    """Work in stages, each timed, that hand on what they make; where the last makes notes, their number too."""
    def work() -> Numbers:
        made, numbers = None, {}
        for name, stage in stages.items():
            start = time.perf_counter()
            made = stage(made)
            numbers[name] = time.perf_counter() - start
        return {**numbers, "notes": len(made)} if isinstance(made, Notes) else numbers
    return work


def run_process(*command: str, **environment: str) -> tuple[float, float]:
    """Wall seconds and peak resident GB of a Python process. The system counts from our own size on, so that stays small."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise OSError(f"{' '.join(command)} ended with {process.returncode}: {error.decode(errors='replace')}")
    return time.perf_counter() - start, peak_gb(usage)


def peak_gb(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss * (1 if platform.system() == "Darwin" else 1024) / 1e9  # in bytes there, in KiB here


def machine() -> dict[str, Any]:
    """What is measured on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        cpu = next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load before": round(os.getloadavg()[0], 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none", "python": platform.python_version(),
            "torch": str(torch.__version__), "system": platform.platform(terse=True)}


def format_table(rows: list[Row]) -> str:
    lines = [["what", "ours", "against", "", "ratio", ""], *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
