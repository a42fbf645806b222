"""`chat_server.py check`: compares every op that can run on this machine with its reference, and measures its
speed.

A line says for an op what was measured, the microseconds, the GB/s of the bytes that it must move, and their
share of the limit. The limit is measured first: on a CPU the same threads read memory, on a GPU a copy reads
and writes it. An op whose data a cache holds may pass the limit; its share is then ">100%".

The references need torch. Without it numpy proves the products, and the other ops are only measured.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TYPE_CHECKING

from chatlm.worker.kernels import cuda
from chatlm.worker.kernels.library import _core
from chatlm.worker.kernels.plain_model import plain_model
from chatlm.worker.kernels.product_proof import Unproved, prove_products
from chatlm.worker.kernels.timing import LARGE, Timed, read_bandwidth, time_cpu

if TYPE_CHECKING:
    from chatlm.worker.kernels.cuda_backend import CudaBackend

LINE = "{:20} {:34} {:>10} {:>8} {:>6}  {}"
CUDA_OPS = ("linear", "adapters", "experts", "rope_append", "paged_attention", "prompt_attention", "sample")
# of latent attention (MLA)
LATENT_OPS = ("append_latents", "absorb", "by_head", "paged_attention", "prompt_attention")


class Report:
    """Says its lines by `say`. `run` returns whether no op is wrong."""

    def __init__(self, threads: int, say: Callable[[str], None]):
        self.threads = threads
        self.say = say
        self.wrong = 0

    def run(self) -> bool:
        with_torch = importlib.util.find_spec("torch") is not None
        self.on_cpu(self.prove_with_torch if with_torch else prove_products)
        if with_torch:
            self.on_gpus()
        self.say(f"\n{self.wrong} ops are wrong" if self.wrong else "\nno op is wrong")
        if not with_torch:
            self.say(f"{sys.executable} -m pip install torch, and `check` compares the other ops with their "
                     "references too")
        return not self.wrong

    def on_cpu(self, prove: Callable[[], dict[str, str]]) -> None:
        _core.set_threads(self.threads)
        limit = read_bandwidth()
        self.say(f"\nCPU: {self.threads} threads read {limit / 1e9:.1f} GB/s")
        self.table(prove(), time_cpu(), limit)

    def prove_with_torch(self) -> dict[str, str]:
        import torch
        from chatlm.worker.kernels.cpu_proof import prove_cpu
        torch.set_num_threads(1)            # more threads of torch would spin beside decode_core's
        return prove_cpu()

    def on_gpus(self) -> None:
        import torch
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            self.on_gpu(index)

    def on_gpu(self, index: int) -> None:
        """Prove and measure on one GPU. Where the kernels cannot run, nothing is wrong: torch computes
        there."""
        import torch
        from chatlm.worker.kernels.cuda_backend import CudaBackend
        from chatlm.worker.kernels.cuda_runner import CudaQueue
        from chatlm.worker.kernels.cuda_timing import LATENTS, MIXTURE, latent_model
        device = torch.device("cuda", index)
        gpu = f"{device}: {torch.cuda.get_device_name(index)}"
        kernels = cuda.CudaOps(_core)
        why = "decode_core was compiled without CUDA (DECODE_CORE_CUDA=1 pip install . compiles it)"
        if _core.cuda_compiled:
            why = kernels.refusal(index)
        if why:
            return self.say(f"\n{gpu}: references only, {why}")
        with torch.cuda.device(index):
            backend = CudaBackend(plain_model(**LARGE | MIXTURE), kernels,
                                  device=device)
            self.with_cuda(backend, lambda: CudaQueue(device), gpu)
            latent = CudaBackend(latent_model(**LATENTS), kernels, device=device)
            self.with_cuda(latent, lambda: CudaQueue(device), f"{gpu}, latent attention:", LATENT_OPS)

    def with_cuda(self, backend: CudaBackend, make_queue: Callable[[], Any], gpu: str,
                  ops: tuple[str, ...] = CUDA_OPS, **sizes) -> None:
        """Prove and measure these ops of a backend. `sizes` go to time_cuda."""
        import torch
        from chatlm.worker.kernels.cuda_timing import copy_bandwidth, time_cuda
        from chatlm.worker.kernels.proof import prove_cuda
        faults = dict.fromkeys(ops, "")
        try:
            queue = make_queue()
            limit = copy_bandwidth(queue, sizes.get("cold", 1 << 30))
            self.say(f"\n{gpu} copies {limit / 1e9:.1f} GB/s, read and written")
            faults |= prove_cuda(backend, backend.device, ops)
            right = [op for op, fault in faults.items() if not fault]
            with torch.inference_mode():
                self.table(faults, time_cuda(backend, queue, right, **sizes), limit)
        except Exception as error:          # a graph that cannot be captured, or a device that is lost
            self.wrong += 1
            self.say(f"{gpu}: WRONG: {type(error).__name__}: {error}")

    def table(self, faults: Mapping[str, str], times: Iterable[Timed], limit: float) -> None:
        """Say a line for each op.

        faults: op -> what is wrong, "" if it matches its reference, or an Unproved"""
        self.wrong += sum(bool(fault) and not isinstance(fault, Unproved) for fault in faults.values())
        self.say(LINE.format("op", "measured", "us", "GB/s", "limit", "").rstrip())
        left = dict(faults)
        for op, what, seconds, moved in times:
            rate = moved / seconds
            fault = left.pop(op, faults.get(op, Unproved("torch is missing")))
            share = f"{rate / limit:.0%}" if rate <= limit else ">100%"
            self.say(LINE.format(op, what, f"{seconds * 1e6:.1f}", f"{rate / 1e9:.1f}", share,
                                 verdict(fault)))
        for op, fault in left.items():
            self.say(LINE.format(op, "", "", "", "", verdict(fault)))


def verdict(fault: str) -> str:
    if not fault:
        return "as its reference"
    return f"not proved: {fault}" if isinstance(fault, Unproved) else f"WRONG: {fault}"
