"""Interleaved timing by process CPU time, and what a reader must know about the run."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import torch  # noqa: E402

__all__ = ["Timing", "facts", "interleave", "last_gap", "steady_allocator", "table", "write_json"]

_DIVERGED = 1000.0  # nats
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "268435456", "MALLOC_MMAP_THRESHOLD_": "268435456"}


def steady_allocator() -> None:
    """Start the program again with an allocator that keeps freed memory.

    glibc gives freed memory back to the system and fetches it again, page by page. Whether that
    happens depends on what ran before; it can cost a third of a forward pass, in any library.
    """
    if any(os.environ.get(name) != value for name, value in _KEEP_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_KEEP_MEMORY})


@dataclass
class Timing:
    """Timings of one function, in seconds of process CPU time."""

    samples: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None

    def record(self) -> dict[str, Any]:
        """Plain numbers for a JSON file, in milliseconds."""
        if not self.samples:
            return {"error": self.error}
        milliseconds = [1e3 * s for s in self.samples]
        return {
            "median": round(statistics.median(milliseconds), 3),
            "least": round(min(milliseconds), 3),
            "runs": len(milliseconds),
        }


def interleave(
    cases: Mapping[Hashable, Callable[[], object]], repeats: int, slow: float = 1.0
) -> dict[Hashable, Timing]:
    """Time functions in turn, round after round, so that a busy spell hits all of them.

    Args:
        cases: the functions by name.
        repeats: number of rounds after one warm-up call each.
        slow: a function whose warm-up takes longer than this many seconds is not run again; the
            warm-up is its one sample.
    """
    timings = {name: Timing() for name in cases}
    live = []
    for name, function in cases.items():
        try:
            first = _seconds(function)
        except Exception as error:  # a peer that fails must not end the whole run
            timings[name].error = f"{type(error).__name__}: {error}"
            continue
        if first > slow:
            timings[name].samples.append(first)
        else:
            live.append(name)
    for _ in range(repeats):
        for name in live:
            timings[name].samples.append(_seconds(cases[name]))
    return timings


def _seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def facts(*packages: str) -> dict[str, Any]:
    """Versions, processor and command line; nothing that names the machine."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_arguments()]),
        "clock": "process CPU time",
        "allocator": _KEEP_MEMORY,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "processor": _processor(),
        "versions": versions,
    }


def _arguments() -> list[str]:
    """The command line's, with a word for what lies elsewhere on this machine."""
    words = {True: "FOLDER", False: "FILE"}
    return [words[Path(a).is_dir()] if Path(a).is_absolute() else a for a in sys.argv[1:]]


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * w for w in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def last_gap(curve: Sequence[Sequence[float]]) -> str:
    """Cell for the end of a curve of seconds, gaps in nats and their errors."""
    seconds, gap, _ = curve[-1]
    return f"{f'{gap:.3f}' if gap < _DIVERGED else 'diverged'} ({seconds:.0f} s)"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
