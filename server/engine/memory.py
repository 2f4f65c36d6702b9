"""How much memory is free, and how many processors there are, for this process."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on `device`: on the CPU what the system has, within the control group's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = _lines(_CGROUP / "memory.max"), _lines(_CGROUP / "memory.current")
    if limit and used and limit[0] != "max":
        available = min(available, max(0, int(limit[0]) - int(used[0])))
    return available


def processors() -> int:
    """Physical cores that this process may run on; logical ones where the system does not tell."""
    allowed = os.sched_getaffinity(0)
    cores = set()
    for processor in allowed:
        siblings = _lines(Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list"))
        cores.add(siblings[0] if siblings else str(processor))
    return max(1, len(cores))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
