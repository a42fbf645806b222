"""What each layer adds for a token of its own: rows of a table in a file, their mixture and its gate, and experts with scales."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

compiled = pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)

from chatlm.worker.ops.basic import gate_input_reference, layer_inputs_reference  # noqa: E402
from core_settings import usual_settings  # noqa: E402, F401
from chatlm.worker.kernels.cpu_proof import FileRows  # noqa: E402
from chatlm.worker.kernels.proof import Dice  # noqa: E402
from chatlm.worker.kernels.tiles import COLUMNS  # noqa: E402
from instruction_sets import ISAS  # noqa: E402

ROWS, L, P = 40, 4, 64
IDS = [3, 0, 39, 7, 7, 12]
pytestmark = pytest.mark.usefixtures("usual_settings")


def made(kind, ids):
    """(rows of the table, what layers get of them, the second layer's after its gate) of these ids; and the table."""
    dice, T = Dice(torch.device("cpu"), 6), len(ids)
    table = FileRows(kind, ROWS, L * P, dice)
    projected, weight, gates = dice.normal(ROWS, L * P), dice.normal(P), dice.normal(ROWS, P)
    program = compiled.Program(64, 1)
    rows, inputs, gated, x, gate = (np.zeros((64, columns), np.float32) for columns in (L * P, L * P, P, L * P, P))
    program.embed(projected.numpy(), program.token_ids, x)
    program.embed(gates.numpy(), program.token_ids, gate)
    program.look_up(table, program.token_ids, rows)
    program.layer_inputs(x, rows, weight.numpy(), 1e-3, inputs)
    program.gate_input(gate, inputs, P, gated)
    program.finish(program.start(ids, [-1, *ids[:-1]], [0, T], [T], [list(range(5))], []))
    return [torch.from_numpy(part[:T].copy()) for part in (rows, inputs, gated)], table, projected[ids], weight, gates[ids]


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_table_in_a_file_gives_its_values(kind):
    """A table in a file gives its values, and layers give what the references make of them."""
    if kind in ("f32", "f16", "bf16") or 256 % COLUMNS[kind] == 0:
        (rows, inputs, gated), table, projected, weight, gates = made(kind, IDS)
        torch.testing.assert_close(rows, table.values[IDS].float(), rtol=1e-6, atol=0)
        expected, after = torch.empty_like(inputs), torch.empty_like(gated)
        layer_inputs_reference(projected, rows, weight, 1e-3, out=expected)
        torch.testing.assert_close(inputs, expected, rtol=1e-5, atol=1e-5)
        gate_input_reference(gates, inputs, P, out=after)
        torch.testing.assert_close(gated, after, rtol=1e-5, atol=1e-5)


def test_layer_inputs_have_the_same_bits_anywhere():
    """Their bits are the same alone or beside others, on every instruction set and by any number of
    threads."""
    many = [i % ROWS for i in range(50)]
    expected = None
    for isa in ISAS:
        compiled.set_isa(isa)
        for threads in (1, 3):
            compiled.set_threads(threads)
            found, *_ = made("q6_k", many)
            expected = expected or found
            assert all(torch.equal(one, other) for one, other in zip(found, expected))
    for i in (0, 17, 49):
        alone, *_ = made("q6_k", many[i:i + 1])
        assert all(torch.equal(one[0], other[i]) for one, other in zip(alone, expected))


@pytest.mark.parametrize("op, change, words", [
    ("look_up", dict(table=SimpleNamespace(kind="q9_k", table=torch.zeros(3, 84, dtype=torch.uint8))),
     "table: must be of a type among f32, .*not 'q9_k'"),
    ("look_up", dict(table=SimpleNamespace(kind="q8_0", table=torch.zeros(3, 67, dtype=torch.uint8))), "table: must have the shape"),
    ("look_up", dict(out=np.zeros((8, 33), np.float32)), "out: must have a multiple of 32 columns"), ("look_up", dict(ids=[1]), "ids: must be"),
    ("layer_inputs", dict(weight=np.ones(48, np.float32)), "weight: must have a multiple of 16 values that divides 64"),
    ("layer_inputs", dict(rows=np.ones((8, 64), np.float32)), "rows: no op has written it"), ("layer_inputs", dict(out="rows"), "out: may not be rows"),
    ("gate_input", dict(first=33), "first: must be a multiple of 16"),
    ("gate_input", dict(first=48), "first: must be a multiple of 16 that leaves 32 of 64"),
    ("gate_input", dict(out=np.zeros((8, 48), np.float32)), "out: must have the shape")])
def test_what_is_wrong_is_a_value_error(op, change, words):
    program, rows, x, gate = compiled.Program(8, 2), *(np.zeros((8, columns), np.float32) for columns in (64, 64, 32))
    table = SimpleNamespace(kind="q8_0", table=torch.zeros(3, 68, dtype=torch.uint8))
    program.embed(np.zeros((3, 64), np.float32), program.token_ids, x)
    program.embed(np.zeros((3, 32), np.float32), program.token_ids, gate)
    program.look_up(table, program.token_ids, rows)
    good = {"look_up": dict(table=table, ids=program.token_ids, out=rows), "gate_input": dict(gate=gate, inputs=rows, first=32, out=gate),
            "layer_inputs": dict(projected=x, rows=rows, weight=np.ones(32, np.float32), eps=1e-5, out=x)}[op]
    with pytest.raises(ValueError, match=words):
        getattr(program, op)(**good | {key: rows if isinstance(value, str) else value for key, value in change.items()})
    getattr(program, op)(**good)
