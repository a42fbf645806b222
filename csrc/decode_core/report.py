"""`chat_server.py check`: compares every op that can run on this machine with its reference, and measures its speed.

A line tells of an op what was measured, microseconds, GB/s of the bytes that it must move, and their share of
the limit, which is measured first: on a CPU the same threads read memory, on a GPU a copy reads and writes
it. What a cache holds passes the limit: >100%.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from . import _core, cuda
from .cpu_proof import prove_cpu
from .proof import prove_cuda
from .timing import LARGE, MIXTURE, Timed, copy_bandwidth, read_bandwidth, time_cpu, time_cuda

LINE = "{:20} {:34} {:>10} {:>8} {:>6}  {}"
CUDA_OPS = ("linear", "adapters", "experts", "rope_append", "paged_attention", "prompt_attention", "sample")


class Report:
    """Says it line by line. `run` tells whether no op was found wrong."""

    def __init__(self, script: SimpleNamespace, threads: int, say: Callable[[str], None]):
        self.script, self.threads, self.say = script, threads, say
        self.wrong = 0

    def run(self) -> bool:
        self.on_cpu()
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            self.on_gpu(index)
        self.say(f"\n{self.wrong} ops are wrong" if self.wrong else "\nno op is wrong")
        return not self.wrong

    def on_cpu(self) -> None:
        torch.set_num_threads(1)            # the references' threads would spin and compete with ours
        _core.set_threads(self.threads)
        limit = read_bandwidth()
        self.say(f"\nCPU: {self.threads} threads read {limit / 1e9:.1f} GB/s")
        self.table(prove_cpu(self.script), time_cpu(self.script), limit)

    def on_gpu(self, index: int) -> None:
        """Where kernels cannot run, nothing is wrong: torch computes there."""
        from .cuda_backend import CudaBackend
        from .cuda_steps import CudaQueue
        device = torch.device("cuda", index)
        gpu = f"{device}: {torch.cuda.get_device_name(index)}"
        kernels = cuda.CudaOps(_core)
        if why := kernels.refusal(index) if _core.cuda_compiled else "decode_core was compiled without CUDA":
            return self.say(f"\n{gpu}: references only, {why}")
        with torch.cuda.device(index):
            backend = CudaBackend(self.script.ModelSpec(**LARGE | MIXTURE), self.script, kernels, device=device)
            self.with_cuda(backend, lambda: CudaQueue(device), gpu)

    def with_cuda(self, backend: Any, make_queue: Callable[[], Any], gpu: str, **sizes) -> None:
        """`sizes`: of time_cuda."""
        faults = dict.fromkeys(CUDA_OPS, "")
        try:
            queue = make_queue()
            limit = copy_bandwidth(queue, sizes.get("cold", 1 << 30))
            self.say(f"\n{gpu} copies {limit / 1e9:.1f} GB/s, read and written")
            faults |= prove_cuda(backend, backend.device)
            right = [op for op, fault in faults.items() if not fault]
            with torch.inference_mode():
                self.table(faults, time_cuda(backend, queue, right, **sizes), limit)
        except Exception as error:          # a graph that cannot be captured, or a device that is lost
            self.wrong += 1
            self.say(f"{gpu}: WRONG: {type(error).__name__}: {error}")

    def table(self, faults: Mapping[str, str | None], times: Iterable[Timed], limit: float) -> None:
        """`faults`: for every op, "" if it matches its reference, None if that could not be proved."""
        self.wrong += sum(map(bool, faults.values()))
        said = {None: "not proved: the gguf package is missing", "": "as its reference"}
        self.say(LINE.format("op", "measured", "us", "GB/s", "limit", "").rstrip())
        left = dict(faults)
        for op, what, seconds, moved in times:
            rate, fault = moved / seconds, left.pop(op, faults[op])
            share = f"{rate / limit:.0%}" if rate <= limit else ">100%"
            self.say(LINE.format(op, what, f"{seconds * 1e6:.1f}", f"{rate / 1e9:.1f}", share,
                                 said.get(fault, f"WRONG: {fault}")))
        for op, fault in left.items():
            self.say(LINE.format(op, "", "", "", "", said.get(fault, f"WRONG: {fault}")))
