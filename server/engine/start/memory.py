"""How much memory is free, and how many processors there are, for this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

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


class DeviceMemory(Protocol):
    """A GPU's memory in bytes, as this process sees it. Tests have one without a GPU."""

    @property
    def total(self) -> int: ...

    @property
    def free(self) -> int:
        """What nobody holds."""
        ...

    @property
    def held(self) -> int:
        """What this process holds for tensors, once what it keeps for later ones is given back."""
        ...

    def peak(self, run: Callable[[], object]) -> int:
        """The most that `run` takes beside what is held."""
        ...


class CudaMemory:
    """DeviceMemory of one GPU, by torch's books; each question waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def total(self) -> int:
        return torch.cuda.mem_get_info(self._device)[1]

    @property
    def free(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]

    @property
    def held(self) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device)

    def peak(self, run: Callable[[], object]) -> int:
        """In segments, as the device is asked for them, so that what they waste counts too."""
        held = self.held
        torch.cuda.reset_peak_memory_stats(self._device)
        run()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device) - held


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
