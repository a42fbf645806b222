"""How much of its device a worker uses: memory, and the share of time in which a GPU was busy."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Sequence as Seq
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.log import log
from chatlm.worker.device import gpu_memory

if TYPE_CHECKING:
    from chatlm.worker.arrays.kinds import Device


class DeviceUse:
    """The use of a GPU, or of the machine's memory by the processes of a worker on a CPU.

    It is read at most once a second, however often somebody asks: reading takes longer than a short step."""

    def __init__(self, device: Device, pids: Seq[str | int] = ("self",)):
        """pids: the worker's processes, as /proc names them."""
        self.device = device
        self.pids = pids
        self.second: int | None = None  # in which it was last read
        self.latest: dict[str, float | None] = {}

    def gauges(self) -> dict[str, float | None]:
        """Bytes used, bytes in all, and the share of time busy; None where nobody measures it."""
        second = int(time.monotonic())
        if second != self.second:
            self.second = second
            self.latest = self._of_gpu() if self.device.type == "cuda" else self._of_machine()
        return self.latest

    def _of_gpu(self) -> dict[str, float | None]:
        free, total = gpu_memory(self.device)
        return {"memory_used": total - free, "memory_total": total, "utilization": self._busy_share()}

    def _of_machine(self) -> dict[str, float | None]:
        """The resident sets of the worker's processes, and the machine's memory."""
        pages = 0
        with suppress(OSError):  # not Linux
            pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.pids)
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        return {"memory_used": pages * page_bytes,
                "memory_total": os.sysconf("SC_PHYS_PAGES") * page_bytes,
                "utilization": None}

    @cached_property
    def _busy_share(self) -> Callable[[], float | None]:
        """Returns the share of time in which the GPU was busy; None without nvidia-ml-py."""
        try:
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
            torch = importlib.import_module("torch")
            uuid = torch.cuda.get_device_properties(self.device).uuid
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            nvml.nvmlDeviceGetUtilizationRates(handle)
        except Exception as error:  # not installed, a driver without support, a slice of a GPU (MIG)
            log.info("no utilization of %s, which needs nvidia-ml-py and a whole GPU: %s", self.device, error)
            return lambda: None
        return lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
