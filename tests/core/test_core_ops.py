"""csrc/ops.def, the one list of recorded ops: what Python reads of it, records by it, and refuses."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest

compiled = pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)
from chatlm.worker.kernels.library import _core  # noqa: E402
from chatlm.worker.ops.references import REFERENCES

ROOT = Path(__file__).resolve().parents[2]


def test_the_compiled_list_is_the_one_of_the_file():
    """Else another version of it is installed; `pip install .` compiles this one."""
    text = re.sub(r"//.*", "", (ROOT / "csrc/ops.def").read_text(encoding="utf-8"))
    rows = re.findall(r"^OP\((\w+), \w+, (\w+)((?:,?\s*[A-Z_]+\([^()]*\)\s*)*)\)$", text, re.MULTILINE)
    said = {}
    for name, has, fields in rows:
        parts = [(role.lower().replace("_", " "), inside.split(", ")) for role, inside in re.findall(r"([A-Z_]+)\(([^()]*)\)", fields)]
        said[name] = has, [(role, inside[1 if role in ("field", "option") else 0]) for role, inside in parts]
    assert said == {name: (has, [field[:2] for field in fields]) for name, (has, fields) in _core.OPS.items()}
    assert len(said) == text.count("\nOP(") > 25


def test_every_row_has_known_words():
    for name, (has, fields) in _core.OPS.items():
        assert has in ("CPU", "CUDA") and len({field for _, field, _ in fields}) == len(fields), name
        assert {role for role, _, _ in fields} <= {"reads", "writes", "weights", "weights or none", "states", "field", "option"}, name
        assert not any(role == "states" for role, _, _ in fields) or "num_slots" in [field for _, field, _ in fields], name


def test_a_program_records_every_reference():
    """A program records all references but those that are no part of a step or left to torch."""
    program = compiled.Program(8, 2)
    assert {name for name in REFERENCES if not hasattr(program, name)} == {"pack", "make_cache", "plan_attention"}
    assert {name for name in _core.OPS if hasattr(program, name)} - REFERENCES.keys() == {"all_reduce", "all_gather"}


def test_ops_recorded_by_row_take_their_arguments():
    """Ops that are recorded by their row alone take what their references take."""
    by_row = {name: method for name in _core.OPS if hasattr(method := getattr(compiled.Program, name, None), "__signature__")}
    assert by_row.keys() == {"rms_norm", "copy", "mix", "gated_add", "clamp"}
    for name, method in by_row.items():
        assert list(inspect.signature(method).parameters) == ["self", *inspect.signature(REFERENCES[name]).parameters]


def recorded(width=16):
    program, x = compiled.Program(8, 2), np.zeros((8, width), np.float32)
    program.embed(np.ones((3, width), np.float32), program.token_ids, x)
    return program, x


@pytest.mark.parametrize("change, words", [
    (dict(x=np.zeros((8, 16), np.float32)), "x: no op has written it"), (dict(x0=np.zeros((8, 16), np.float32)), "x0: no op has written it"),
    (dict(out=np.zeros((8, 32), np.float32)), "out: must have the shape"), (dict(out=np.zeros((4, 16), np.float32)), "out: must have the shape")])
def test_what_a_row_says_of_its_buffers_is_checked(change, words):
    program, x = recorded()
    good = dict(x=x, x0=x, resid_lambda=0.5, x0_lambda=np.float32(2), out=np.zeros((8, 16), np.float32))
    with pytest.raises(ValueError, match=words):
        program.mix(**good | change)
    program.mix(**good)
    assert program.describe() == ["embed", "mix"]


def test_columns_and_weights_of_a_row_are_checked():
    program, x = recorded(width=24)
    with pytest.raises(ValueError, match="x: must have a multiple of 16 columns, not 24"):
        program.mix(x, x, 1.0, 1.0, x)
    program.copy(x, x)                                  # whose columns may be any
    program, x = recorded()
    for weight in (np.ones(15, np.float32), np.ones(16)):
        with pytest.raises(ValueError, match="weight: must"):
            program.rms_norm(x, weight, 1e-5, x)
    program.rms_norm(x, None, 1e-5, out=x)
    with pytest.raises(ValueError, match="gate: must be .max_tokens = 8, 1."):
        program.gated_add(x, x, x, x)
    with pytest.raises(TypeError, match="x0_lambda"):
        program.mix(x, x, 1.0, out=x)


def test_the_compiled_half_refuses_wrong_fields():
    """The compiled half refuses fields that an op has not and values of another type."""
    program, x = recorded()
    at, buffer = (x.ctypes.data, 16), _core.Program(8, 2)
    good = dict(logits=at, cap=2.0, out=at)
    for op, fields, words in (("nothing", {}, "record: no op nothing"), ("softcap", dict(logits=at, cap=2.0), "softcap: no out"),
                              ("softcap", good | dict(bias=0), "softcap: has no bias"), ("softcap", good | dict(cap="2"), "softcap: cap is of another type"),
                              ("softcap", good | dict(out=x.ctypes.data), "softcap: out is of another type")):
        with pytest.raises(TypeError, match=words):
            buffer.record(op, False, **fields)
    assert buffer.describe() == []
    buffer.record("softcap", True, **good)
    assert buffer.describe() == ["softcap (logit rows)"]
