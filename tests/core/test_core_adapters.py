"""What adapters add to products in a recorded step: against float64, with equal bits wherever and next to whatever rows it is computed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

compiled = pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)
from chatlm.worker.kernels.library import _core  # noqa: E402

C, N, F, V, MOST = 64, 48, 32, 40, 96
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def adapter(seed, ranks, dtype="f32", names=("qkv", "gate_up", "head"), parts=True):
    """Matrices of this many ranks, whose B has no rows for some of them, as when q, k and v have adapters of their own."""
    random, matrices = torch.Generator().manual_seed(seed), {}
    for name, (rows, columns) in {"qkv": (N, C), "gate_up": (2 * F, C), "head": (V, F)}.items():
        if name in names:
            b = torch.randn(rows, ranks, generator=random)
            if parts and ranks > 1:
                b[:rows // 2, ranks // 2:] = 0
                b[rows // 2:, :ranks // 2] = 0
            matrices[name] = SimpleNamespace(a=torch.randn(ranks, columns, generator=random).to(DTYPES[dtype]), b=b.to(DTYPES[dtype]),
                                             scales=torch.rand(ranks, generator=random) + 0.5)
    return matrices


class Model:
    """embed; qkv = norm(x) Q^T; hidden = swiglu of norm(x) G^T; of some rows hidden H^T."""

    def __init__(self, kind="q8_0"):
        random = np.random.default_rng(3)
        self.table = random.normal(size=(50, C)).astype(np.float32)
        self.norm = random.normal(size=C).astype(np.float32)
        self.arena, self.weights, self.plain = compiled.Arena(1 << 20), {}, {}
        for name, shape in {"qkv": (N, C), "gate_up": (2 * F, C), "head": (V, F)}.items():
            self.plain[name] = random.normal(size=shape).astype(np.float32)
            self.weights[name] = matrix = compiled.Matrix(self.arena, kind if name != "head" else "f32", *shape)
            halves = np.split(self.plain[name], 2) if name == "gate_up" else [self.plain[name]]
            for first, half in enumerate(halves):
                matrix.fill(half, "f32", first_tile=first, tile_step=len(halves))
        self.buffers = {name: np.zeros((MOST, columns), np.float32)
                        for name, columns in {"x": C, "qkv": N, "hidden": F, "last": F, "logits": V}.items()}
        p, b, norm = compiled.Program(MOST, MOST), self.buffers, (self.norm, 1e-5)
        p.embed(self.table, p.token_ids, b["x"])
        p.linear(b["x"], self.weights["qkv"], b["qkv"], norm=norm, adapted="qkv")
        p.linear(b["x"], self.weights["gate_up"], b["hidden"], norm=norm, activation="swiglu", adapted="gate_up")
        p.gather_rows(b["hidden"], p.logit_rows, b["last"])
        p.linear(b["last"], self.weights["head"], b["logits"], adapted="head")
        self.program = p

    def step(self, rows, adapters):
        """qkv and logits of single rows (ids), whose adapters these are, or None."""
        count = len(rows)
        self.program.finish(self.program.start(list(rows), [-1] * count, [*range(count + 1)], [1] * count, [[0]] * count, [*range(count)],
                                               adapters=adapters))
        return self.buffers["qkv"][:count].copy(), self.buffers["logits"][:count].copy()

    def exact(self, row, matrices):
        """The same of one row in float64."""
        def product(name, x):
            y = self.plain[name].astype(np.float64) @ x
            if name in matrices:
                its = matrices[name]
                y = y + its.b.double().numpy() @ (its.scales.double().numpy() * (its.a.double().numpy() @ x))
            return y

        x = self.table[row].astype(np.float64)
        x = x / np.sqrt((x * x).mean() + 1e-5) * self.norm
        gate, up = np.split(product("gate_up", x), 2)
        return product("qkv", x), product("head", gate / (1 + np.exp(-gate)) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 5, 16])
def test_an_adapter_adds_what_float64_says(ranks, dtype):
    model, matrices = Model("f32"), adapter(ranks, ranks, dtype)
    qkv, logits = model.step([7, 8], [model.program.adapters.pack(matrices), None])
    for found, expected in zip((qkv[0], logits[0]), model.exact(7, matrices)):
        assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()
    for found, expected in zip((qkv[1], logits[1]), model.exact(8, {})):
        assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["q8_0", "q4_1", "f16"])
def test_an_adapter_s_row_has_the_same_bits_anywhere(kind):
    """A row has the same bits with any others on any threads and instructions."""
    model, isa, threads = Model(kind), _core.isa(), compiled.get_threads()
    adapters = [None, *(model.program.adapters.pack(adapter(seed, ranks, dtype, names)) for seed, (ranks, dtype, names) in enumerate([
        (16, "bf16", ("qkv", "gate_up", "head")), (3, "f16", ("gate_up",)), (5, "f32", ("qkv", "head"))]))]
    random = np.random.default_rng(1)
    alone = {}
    try:
        for name in dict.fromkeys((isa, "portable", *_core.isas_for_tests())):
            _core.set_isa(name)
            for count in (1, 2, 3, 7, 16, 33, MOST):
                for some in (1, 2):
                    compiled.set_threads(some)
                    ids, owners = random.integers(0, 50, count).tolist(), random.integers(0, 4, count).tolist()
                    qkv, logits = model.step(ids, [adapters[owner] for owner in owners])
                    for i, key in enumerate(zip(ids, owners)):
                        own = qkv[i].tobytes() + logits[i].tobytes()
                        assert alone.setdefault(key, own) == own, (name, count, some, key)
    finally:
        _core.set_isa(isa)
        compiled.set_threads(threads)


def test_adapters_leave_other_steps_bits_alone():
    """A step without adapters has the bits of a program that knows none."""
    model, ids = Model(), [3, 9, 9, 1]
    plain = model.step(ids, ())
    for adapters in ([None] * 4, [None, model.program.adapters.pack(adapter(1, 4)), None, None]):
        for found, expected in zip(model.step(ids, adapters), plain):
            assert np.array_equal(found[[0, 2, 3]], expected[[0, 2, 3]])
            assert np.array_equal(found[1], expected[1]) == (adapters[1] is None)


def test_an_adapter_may_go_while_its_step_runs():
    model = Model()
    matrices = adapter(2, 8)
    expected = model.step([4], [model.program.adapters.pack(matrices)])[1]
    tickets = model.program.start([4], [-1], [0, 1], [1], [[0]], [0], adapters=[model.program.adapters.pack(matrices)])
    model.program.finish(tickets)
    assert np.array_equal(model.buffers["logits"][:1], expected)


def test_wrong_adapters_are_errors_without_effect():
    """Wrong adapters are value errors and change nothing."""
    model, other = Model(), compiled.Program(4, 4)
    pack = model.program.adapters.pack
    with pytest.raises(ValueError, match="the program has no such matrix"):
        pack({"down": adapter(1, 2)["qkv"]})
    with pytest.raises(ValueError, match=r"qkv: a is \(2, 64\) and b \(48, 3\)"):
        pack({"qkv": SimpleNamespace(a=torch.zeros(2, C), b=torch.zeros(N, 3), scales=torch.ones(2))})
    with pytest.raises(ValueError, match="must be one, or None, for each of lengths"):
        model.step([1, 2], [None])
    with pytest.raises(ValueError, match="is of another program"):
        model.step([1], [other.adapters.pack({})])
    with pytest.raises(ValueError, match="was recorded already"):
        model.program.linear(model.buffers["x"], model.weights["qkv"], model.buffers["qkv"], adapted="qkv")
    model.step([1], ())
