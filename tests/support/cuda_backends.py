"""What tests/core/test_cuda_steps.py runs on: decode_core's CUDA kernels emulated on CPU tensors, or a GPU.

The stand-in for a CUDA stream runs its work as late as possible: when somebody waits for it. So if `start`
does on the host what it should leave to the device (reading a token, or using memory that the previous step
still needs), the tokens are wrong. Its graph is the list of operations that ran during the capture, replayed
on the same memory: no decision of Python is made again.
"""

from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.ops.basic import linear_reference
from attention_kinds import blocks_of
from emulated_core import EmulatedCore
from nightly import WHOLE

compiled = pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)
from chatlm.worker.kernels import devices, proof  # noqa: E402
from chatlm.worker.kernels.cuda_backend import CudaBackend, current_stream  # noqa: E402, F401
from chatlm.worker.kernels.cuda_runner import CudaQueue  # noqa: E402

HOST_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "lift_fresh", "lift_fresh_copy"}


class Recording(TorchDispatchMode):
    """Records what torch and decode_core compute as a list of calls; refuses reads by the host and data from
    the host."""

    active = None

    def __init__(self):
        super().__init__()
        self.calls = []

    def __enter__(self):
        Recording.active = self
        return super().__enter__()

    def __exit__(self, *error):
        Recording.active = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in HOST_READS, f"{func} can not be captured"
        result = func(*args, **(kwargs or {}))
        self.calls.append(lambda: self.repeat(func, args, kwargs or {}, result))
        return result

    @staticmethod
    def repeat(func, args, kwargs, result):
        """Copy a result into the memory of the first one; views and given outputs are there already."""
        again = func(*args, **kwargs)
        for old, new in zip(*((x if isinstance(x, (tuple, list)) else [x]) for x in (result, again))):
            if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)

    def replay(self):
        for call in self.calls:
            call()


class HostQueue:
    """CudaQueue without CUDA."""

    def __init__(self):
        self.waiting, self.submitted, self.run, self.replays = deque(), 0, 0, 0

    def pinned(self, size, dtype):
        return torch.empty(size, dtype=dtype)

    def submit(self, work):
        self.waiting.append(work)
        self.submitted += 1
        return self.submitted

    @torch.inference_mode()
    def wait(self, done):
        while self.run < done:
            self.waiting.popleft()()
            self.run += 1

    def capture(self, work):
        self.wait(self.submit(work))
        recording = Recording()
        with recording:
            work()

        def replay():
            self.replays += 1
            recording.replay()
        return replay


class RecordedCore(EmulatedCore):
    """While there is a recording, launches go into it too."""

    def launch(self, work):
        if Recording.active:
            Recording.active.calls.append(work)
        return work()


class AsCuda:
    """A CPU tensor that looks like one on the GPU."""

    is_cuda, device = True, SimpleNamespace(type="cuda", index=0)

    def __init__(self, tensor):
        assert tensor.device.type == "cpu"
        self.tensor = tensor

    def __getattr__(self, name):
        return getattr(self.tensor, name)


class EmulatedOps(compiled.cuda.CudaOps):
    def tensor(self, name, tensor, *args, **kwargs):
        return super().tensor(name, AsCuda(tensor) if isinstance(tensor, torch.Tensor) else tensor, *args, **kwargs)


class WrongOps(EmulatedOps):
    """Ops that compute, draw or store something else than they should, or raise: the names in `wrong`."""

    wrong = {}

    def rope_append(self, qkv, cos, sin, positions, slots, k_pages, *rest, **options):
        super().rope_append(qkv, cos, sin, positions, slots, k_pages, *rest, **options)
        self.spoil("rope_append", k_pages)

    def paged_attention(self, q, *rest, **options):
        super().paged_attention(q, *rest, **options)
        self.spoil("paged_attention", rest[-1])

    def multiply(self, x, blocks, out, **options):
        super().multiply(x, blocks, out, **options)
        self.spoil("multiply", out)

    def multiply_experts(self, x, order, items, blocks, out, **options):
        super().multiply_experts(x, order, items, blocks, out, **options)
        self.spoil("multiply_experts", out)

    def dequantize(self, blocks, out, **options):
        super().dequantize(blocks, out, **options)
        self.spoil("dequantize", out)

    def sample(self, logits, params, tokens, **options):
        super().sample(logits, params, tokens, **options)
        self.spoil("sample", tokens)

    def spoil(self, name, result):
        if how := self.wrong.get(name):
            how(result)


def wrong_ops(**how):
    """A class of ops of which those named spoil their result by a function."""
    return type("WrongOps", (WrongOps,), {"wrong": how})


class TorchProducts(CudaBackend):
    """The products of floats in torch: emulated ones would take most of a test's time. They are proved nevertheless."""

    few_rows_invariant = False

    def ops(self, *sizes):
        found = super().ops(*sizes)
        return found | ({"linear": self.linear} if "linear" in found else {})

    def linear(self, x, weight, *rest, adapted=(), **more):
        if adapted:
            return self.products.adapted(x, weight, *rest, adapted=adapted, linear=self.linear, **more)
        product = linear_reference if isinstance(weight, torch.Tensor) else self.products.linear
        product(x, weight, *rest, **more)


def with_windows(spec, windows):
    """A spec with these windows, one for each layer."""
    return replace(spec, windows=windows)


def prove_experts_of_some_types(backend, device):
    """What proves each type of experts, for two packed ones and floats: a type takes half a second in the emulation."""
    with pytest.MonkeyPatch.context() as patch:
        some = {kind: proof.cuda.BLOCKS[kind] for kind in ("mxfp4", "q4_k")}
        patch.setattr(proof, "cuda", SimpleNamespace(FLOATS=("bfloat16",), BLOCKS=some))
        return proof.prove_experts(backend, device)


class Emulated:
    name, device = "emulation", torch.device("cpu")
    right = set()       # (library, op, sizes) of what was proved; with matrices of its own, which are the same for all models: (library, op, None)

    def __init__(self, library, ops=EmulatedOps, faults=(), products=False):
        """`faults`: the ops of the class `ops` that must be found wrong, and no others. products: emulate those of floats too."""
        self.library, self.ops, self.faults = str(library), ops(RecordedCore(library)), {*faults}
        self.made = CudaBackend if products else TorchProducts

    def backend(self, spec):
        return self.made(blocks_of(spec), self.ops, stream=lambda: 0, device=self.device)

    def kernels(self, spec):
        """The kernels that load_kernels chooses for CUDA. What is right the process proves once for models of the same sizes, or for all."""
        backend = self.backend(spec)
        alike = {"linear", "experts"} if backend.model.experts else {"linear"}
        keys = {op: (self.library, op, None if op in alike else backend.model) for op in proof.CUDA_PROOFS}
        proofs = {op: prove for op, prove in proof.CUDA_PROOFS.items() if op in self.faults or keys[op] not in self.right}
        if "experts" in proofs and not WHOLE:
            proofs["experts"] = prove_experts_of_some_types
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(proof, "CUDA_PROOFS", proofs)
            kernels = replace(load_kernels("cpu"), **backend.ops(0, 0, None), backend=backend)
        assert {*backend.faults} == self.faults, backend.faults
        self.right.update(keys[op] for op in proofs.keys() - self.faults)
        return kernels

    def queue(self):
        return HostQueue()


class CountingQueue(CudaQueue):
    """CudaQueue that counts replays and fails if anything that is submitted waits for the device."""

    replays = 0

    def submit(self, work):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return super().submit(work)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def capture(self, work):
        replay = super().capture(work)

        def counted():
            self.replays += 1
            replay()
        return counted


class Gpu:
    name = "gpu"

    def __init__(self):
        self.device = torch.device("cuda", 0)

    def kernels(self, spec):
        return load_kernels(self.device, blocks_of(spec))

    def queue(self):
        return CountingQueue(self.device)


def has_gpu():
    return torch.cuda.is_available() and devices.cuda_ops() is not None


ORDERS = (0, 1, 2)          # of the emulation: ascending, descending, random


@pytest.fixture(params=["emulation", "gpu"])
def gpu(request):
    """ops, device and a function that sets the order in which blocks and threads run."""
    if request.param == "emulation":
        emulated = Emulated(request.getfixturevalue("emulation_library"))
        emulated.order = lambda order: emulated.ops.core.library.dc_emulation_order(order, 7)
        emulated.stream = lambda: 0
        yield emulated
        return emulated.order(0)
    if not has_gpu():
        pytest.skip("no GPU here, or decode_core was compiled without CUDA")
    real = Gpu()
    real.ops, real.order, real.stream = devices.cuda_ops(), lambda order: None, current_stream
    yield real
