"""What this machine is, in words."""

import os
import platform
from pathlib import Path

__all__ = ["cores", "processor"]


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The CPU and all of its cores, whoever asks: "2 cores of AMD EPYC"."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{os.cpu_count()} cores of {next(named, platform.processor() or platform.machine())}"
