"""What adapters add to products on CUDA: in the emulation (and on a GPU) against float64, with the same bits next to any other rows."""

import pytest
import torch


from chatlm.worker.arrays.kinds import AdapterMatrix, Norm

backends = pytest.importorskip("cuda_backends", exc_type=ImportError, reason="no compiled core is installed")
from chatlm.worker.kernels import cuda, cuda_adapters, cuda_weights  # noqa: E402

ORDERS, gpu = backends.ORDERS, backends.gpu
N, K, WIDTH = 200, 72, 80           # more outputs than a block makes; the norm has more columns than the matrix
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def adapter(seed, ranks, dtype="f32"):
    random = torch.Generator().manual_seed(seed)
    a, b, scales = (torch.randn(shape, generator=random) for shape in ((ranks, K), (N, ranks), (ranks,)))
    return AdapterMatrix(a.to(DTYPES[dtype]), b.to(DTYPES[dtype]), scales)


MATRICES = [adapter(1, 1), adapter(2, 16, "bf16"), adapter(3, 150, "f16")]      # more ranks than a pass of all warps makes


def added(gpu, owners, x, y, norm=None, order=0):
    """y and what the adapters of its rows add: owners[i] is a number of MATRICES, or None."""
    ops = cuda_adapters.AdapterOps(gpu.ops, gpu.stream)
    ops.pack({"other": MATRICES[0]}, gpu.device)
    packed = [ops.pack({"it": matrix}, gpu.device) for matrix in MATRICES]
    rows = torch.tensor([0 if owner is None else packed[owner].table.data_ptr() for owner in owners], device=gpu.device)
    x, y = x.to(gpu.device), y.to(gpu.device)
    out = torch.empty_like(y)
    gpu.order(order)
    ops.finish(x, norm and Norm(norm.weight.to(gpu.device), norm.eps), y, cuda_adapters.RowsOfMatrix(ops.numbers["it"], rows), out)
    return out.cpu()


def expected(owners, x, y, norm=None):
    x, y = x.double(), y.double()
    if norm:
        x = x / (x.square().mean(1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    for row, owner in enumerate(owners):
        if owner is not None:
            a, b, scales = (tensor.double() for tensor in MATRICES[owner])
            y[row] += b @ (scales * (a @ x[row, :K]))
    return y


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_rows_of_mixed_adapters_are_near_float64(gpu, dtype):
    """Rows of several adapters and of none are within rounding of float64."""
    random = torch.Generator().manual_seed(4)
    x, y = torch.randn(5, WIDTH, generator=random).to(DTYPES[dtype]), torch.randn(5, N, generator=random)
    owners = [2, None, 0, 1, 2]
    for norm in (None, Norm(torch.randn(WIDTH, generator=random), 1e-5)):
        want, outs = expected(owners, x, y, norm), [added(gpu, owners, x, y, norm, order) for order in ORDERS]
        assert all(torch.equal(out, outs[0]) for out in outs) and torch.equal(outs[0][1], y[1])
        assert (outs[0] - want).abs().max() < 2e-6 * want.abs().max()


def test_a_row_beside_adapters_has_the_same_bits(gpu):
    """A row has the same bits alone and beside rows of any adapter."""
    random = torch.Generator().manual_seed(5)
    x, y = torch.randn(32, WIDTH, generator=random), torch.randn(32, N, generator=random)
    owners, norm = [(0, 1, 2, None)[i % 4] for i in range(32)], Norm(torch.ones(WIDTH), 1e-5)
    together = added(gpu, owners, x, y, norm)
    for row in (0, 1, 2, 3, 30):
        assert torch.equal(added(gpu, owners[row:row + 1], x[row:row + 1], y[row:row + 1], norm), together[row:row + 1])
    assert torch.equal(added(gpu, owners[::-1], x.flip(0), y.flip(0), norm), together.flip(0))


def test_a_product_with_adapters_ends_as_without(gpu):
    """Norm, bias, gate and residual are as of the reference, which knows the rows on the host; a matrix that no adapter has adds nothing."""
    random = torch.Generator().manual_seed(6)
    products = cuda_weights.ProductOps(gpu.ops, gpu.stream)
    x, weight, bias, residual = (torch.randn(shape, generator=random).to(gpu.device) for shape in ((3, WIDTH), (N, WIDTH), (N,), (3, N // 2)))
    wide = AdapterMatrix(torch.randn(4, WIDTH, generator=random), torch.randn(N, 4, generator=random), torch.rand(4, generator=random))
    packed, norm = products.adapters.pack({"it": wide}, gpu.device), Norm(torch.ones(WIDTH, device=gpu.device), 1e-5)
    rows = torch.tensor([0, packed.table.data_ptr(), 0], device=gpu.device)
    outs = []
    for adapted in ([([1], packed["it"])], cuda_adapters.RowsOfMatrix(0, rows), [], cuda_adapters.RowsOfMatrix(1, rows)):
        out = torch.empty(3, N // 2, device=gpu.device)
        products.linear(x, weight, out, norm, bias, "swiglu", residual, adapted=adapted)
        outs.append(out.cpu())
    assert (outs[0] - outs[1]).abs().max() < 1e-5 * outs[0].abs().max() and (outs[2] - outs[3]).abs().max() < 1e-5 * outs[2].abs().max()
    assert (outs[0][1] - outs[2][1]).abs().max() > 1 and torch.equal(outs[1][::2], outs[3][::2])


def test_adapters_of_too_many_ranks_have_no_table(gpu):
    """Adapters of more ranks than a kernel takes have no table."""
    ops = cuda_adapters.AdapterOps(gpu.ops, gpu.stream)
    large = AdapterMatrix(torch.zeros(cuda.MAX_RANKS + 1, 8), torch.zeros(8, cuda.MAX_RANKS + 1), torch.ones(cuda.MAX_RANKS + 1))
    assert ops.pack({"it": large}, gpu.device).table is None and ops.pack({"it": adapter(1, 3)}, gpu.device).table is not None


@pytest.mark.parametrize("op, wrong, message", [
    ("shrink", dict(x=torch.zeros(3, WIDTH)), r"adapters: must have shape \(3\)"), ("shrink", dict(sums=torch.zeros(2, 7)), r"sums: must have shape \(2, 1024\)"),
    ("shrink", dict(x=torch.zeros(2, WIDTH).double()), "x: must be float32 or bfloat16"), ("expand", dict(y=torch.zeros(3, N)), "y: must have 2 rows"),
    ("expand", dict(activation="swiglu"), rf"out: must have shape \(2, {N // 2}\)"), ("expand", dict(activation="relu"), "activation: must be one of"),
    ("shrink", dict(adapters=torch.zeros(2, dtype=torch.int32)), "adapters: must be int64")])
def test_a_wrong_argument_is_named(emulation_library, op, wrong, message):
    ops = backends.Emulated(emulation_library).ops
    given = dict(adapters=torch.zeros(2, dtype=torch.int64), matrix=0, sums=torch.zeros(2, cuda.MAX_RANKS), stream=0)
    given |= dict(x=torch.zeros(2, WIDTH)) if op == "shrink" else dict(y=torch.zeros(2, N), out=torch.zeros(2, N))
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(**given | wrong)
