"""A worker on a GPU of a made-up box: `python tests/support/gpu_box_worker.py worker FD PARENT`.

torch.cuda says what $GPU_BOX says of each GPU; a worker whose GPU is good computes on the CPU. An answer whose id begins
with `large` asks for more memory than its GPU has, in its prefill.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, os.environ.get("CHAT_SERVER_DIR") or str(Path(__file__).resolve().parents[2]))

from chatlm.common.processes.child import run_role    # noqa: E402
from chatlm.worker import process    # noqa: E402
from chatlm.worker.device import check_gpu    # noqa: E402
from chatlm.worker.engine.engine import Engine    # noqa: E402
from patching import replace_everywhere    # noqa: E402

TOTAL = 80 << 30


def fake_cuda(box):
    """The functions of torch.cuda that a worker asks. `box`: a word for each GPU, such as busy or fine."""
    import torch

    def capability(device):
        if box[device.index] == "lost":
            raise RuntimeError("CUDA error: unknown error\nCompile with `TORCH_USE_CUDA_DSA`")
        return (6, 1) if box[device.index] == "old" else (9, 0)

    def zeros(count, device, original=torch.zeros):
        if getattr(device, "type", "") == "cuda":
            if box[device.index] == "busy":
                raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nmore")
            return None
        return original(count, device=device)

    torch.zeros = zeros
    return SimpleNamespace(
        is_available=lambda: True, device_count=lambda: len(box), get_device_name=lambda device: f"GPU of {device}",
        get_device_capability=capability, get_arch_list=lambda: ["sm_75", "sm_90", "compute_120"], empty_cache=lambda: None,
        mem_get_info=lambda device=None: (1 << 30, TOTAL), set_device=lambda device: None,
        memory_allocated=lambda device: 60 << 30, get_device_properties=lambda device: SimpleNamespace(uuid=f"uuid-{device.index}"))


def start_engine(channel, config, original=process.start_engine):
    """Judge the GPU as it is, then go on as on a CPU."""
    import torch
    check_gpu(torch.device(config.device))
    return original(channel, replace(config, device="cpu"))


def start(engine, plan, original=Engine._start):
    if any(chunk.sequence.work.id.startswith("large") and chunk.sequence.prefilling for chunk in plan):
        raise RuntimeError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total capacity of 80.00 GiB of which 1.00 GiB is free.")
    return original(engine, plan)


if __name__ == "__main__":
    import torch
    torch.cuda = fake_cuda(json.loads(os.environ["GPU_BOX"]))
    replace_everywhere(process, "start_engine", start_engine)
    Engine._start = start
    sys.exit(run_role(*sys.argv[1:]))
