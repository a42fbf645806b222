"""The device that a worker or a rank computes on: getting it ready, and what its memory allows."""

from __future__ import annotations

import math
import os
import re
from typing import TYPE_CHECKING

from chatlm.common.config import size
from chatlm.common.errors import ConfigError, require_library
from chatlm.common.processes.nodes import place
from chatlm.common.processes.launch import ranks_here, torchrun
from chatlm.worker.arrays.kinds import Device

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.protocol import WorkerConfig
    from chatlm.worker.ranks.messages import RankConfig


def prepare_device(config: WorkerConfig | RankConfig) -> Device:
    """The device of a worker or a rank, made the current one. ConfigError if it cannot be used."""
    os.environ["OMP_NUM_THREADS"] = str(config.threads)
    device = Device(config.device)
    if device.type != "cpu":
        torch = require_library("torch", f"--device-type {device.type}")
    if device.type == "cuda":
        check_gpu(device)
        torch.cuda.set_device(device)  # decode_core launches on the current device
    return device


def bind_to_node(config: WorkerConfig | RankConfig, rank: int) -> str:
    """Bind a rank that computes on a CPU to its NUMA node, if several processes compute on several nodes.
    Returns a line for the log, or "". Before it loads: what it touches first lies on that node."""
    if Device(config.device).type != "cpu":
        return ""
    here = ranks_here(config.settings)
    started = torchrun(config.settings)
    index = config.place[0] * here + (started.local_rank if started else rank)
    return place(index, config.place[1] * here, config.threads)


def check_gpu(device: Device):
    """ConfigError if this GPU is missing, too old for this torch, or cannot be used now."""
    torch = require_library("torch", "--device-type cuda")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    among = "" if visible is None else f", with CUDA_VISIBLE_DEVICES={visible}"
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
            why = "no GPU is available"
        except (RuntimeError, AssertionError) as error:  # a build without CUDA, no driver or an old one
            why = str(error).splitlines()[0]
        raise ConfigError(f"torch {torch.__version__} cannot use {device}{among}: {why.rstrip('.')}. Install "
                          "a torch and a driver that match, or use --device-type cpu")
    count = torch.cuda.device_count()
    if device.index >= count:
        raise ConfigError(f"{device} is missing: the driver shows {count} GPU(s){among}")
    try:
        name = torch.cuda.get_device_name(device)
        has = torch.cuda.get_device_capability(device)
        built_for = [int(version) for version in re.findall("[0-9]+", " ".join(torch.cuda.get_arch_list()))]
        needs = divmod(min(built_for), 10) if built_for else (0, 0)
        if has < needs:
            raise ConfigError("{} ({}) is too old: its compute capability is {}.{}, this torch needs {}.{}"
                              .format(device, name, *has, *needs))
        torch.zeros(1, device=device)
    except RuntimeError as error:  # used exclusively by another program, off the bus, ...
        raise ConfigError(f"{device} cannot be used: {str(error).splitlines()[0]}") from None


def gpu_memory(device: Device) -> tuple[int, int]:
    """(free bytes, total bytes) of a GPU."""
    return require_library("torch", "--device-type cuda").cuda.mem_get_info(device)


def remedy_for_gpu(lacking: int, total: int, settings: Settings) -> str:
    """The flag and value that leave so many more of a GPU's bytes free."""
    cache = settings.kv_cache_memory
    share = math.floor(100 * (settings.gpu_memory_utilization - lacking / total)) / 100
    too_small = lacking >= cache if cache else share < 0.05
    if too_small:
        return "The model needs a larger GPU"
    if cache:
        return f"--kv-cache-memory {cache - lacking >> 20}M would leave it free"
    return f"--gpu-memory-utilization {share:.2f} would leave it free"


def lack_of_gpu_memory(error: Exception, config: WorkerConfig) -> ConfigError | None:
    """Advice if torch ran out of GPU memory: the flag and value that leave room. None for other errors."""
    match = re.search(r"CUDA out of memory. Tried to allocate ([\d.]+ [KMGT]?i?B)", str(error))
    if not match:
        return None
    wanted = size(match[1])
    free, total = gpu_memory(Device(config.device))
    lacking = max(wanted - free, 0) + total // 100  # 1 % for what fragmentation loses
    remedy = remedy_for_gpu(lacking, total, config.settings)
    return ConfigError(f"{config.device} is out of memory: {wanted / 1e9:,.2f} GB more were needed; of "
                       f"its {total / 1e9:,.2f} GB {free / 1e9:,.2f} are free. {remedy}")
