"""A worker on emulated CUDA kernels, of which attention is wrong, and whose largest graph cannot be captured:
`EMULATION=library python tests/support/faulty_worker.py worker FD PARENT`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, os.environ.get("CHAT_SERVER_DIR") or str(Path(__file__).resolve().parents[2]))

from chatlm.common.processes.child import run_role    # noqa: E402
from chatlm.worker.engine.warm_up import WarmUp     # noqa: E402
from cuda_backends import Emulated, HostQueue, wrong_ops        # noqa: E402
from chatlm.worker.kernels import cuda, cuda_runner, devices  # noqa: E402


class SmallQueue(HostQueue):
    captured = 0

    def capture(self, work):
        self.captured += 1
        if self.captured == 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().capture(work)


if __name__ == "__main__":
    emulated = Emulated(os.environ["EMULATION"], wrong_ops(paged_attention=lambda out: out.add_(1)))
    devices.backend_for = lambda spec, device: emulated.backend(spec)
    cuda_runner.CudaQueue, cuda.SAMPLE_THREADS = lambda device: SmallQueue(), 32
    WarmUp.begin = lambda warm_up: warm_up.complete(lambda fraction: None)     # as on a GPU
    sys.exit(run_role(*sys.argv[1:]))
