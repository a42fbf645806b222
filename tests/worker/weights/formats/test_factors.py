"""Factors beside the matrices of a GGUF file: NAME.scale multiplies, NAME.input_scale changes nothing."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf
import torch

from chatlm.common.errors import ConfigError
from chatlm.worker.arrays.gguf_types import TYPES
from chatlm.worker.arrays.packed import dequantize
from chatlm.worker.weights.formats.gguf.factors import with_factors
from chatlm.worker.weights.formats.gguf.header import GgufTensor
from families import as_gguf, load, make_model


def tensor(name, kind, data, shape):
    return GgufTensor(name, TYPES[kind], np.array(shape, np.uint64), int(np.prod(shape)), data.nbytes, 0, data)


def nvfp4(name, rows, columns, experts=1, seed=0):
    """Random blocks, whose four scales are small e4m3 numbers."""
    blocks = np.random.default_rng(seed).integers(0, 256, (experts * rows, columns // 64, 36), np.uint8)
    blocks[:, :, :4] = blocks[:, :, :4] % 16 + 24
    data = blocks.reshape(*([experts] if experts > 1 else []), rows, -1)
    return tensor(name, "NVFP4", data, [columns, rows, *([experts] if experts > 1 else [])])


def factor(name, *values):
    return tensor(name, "F32", np.array(values, np.float32), [len(values)])


@pytest.mark.parametrize("experts, factors", [(1, (0.37,)), (3, (0.5, -2.0, 1e-3)), (3, (7.0,))])
def test_packed_matrices_take_their_factor(experts, factors):
    """Packed matrices are multiplied by their factor or by that of each expert."""
    matrix = nvfp4("m.weight", 5000, 64, experts)       # in two pieces
    found = with_factors(Path("f"), {"m.weight": matrix, "m.scale": factor("m.scale", *factors), "m.input_scale": factor("m.input_scale", 9.0)})
    assert found.keys() == {"m.weight"} and found["m.weight"].tensor_type.name == "Q8_0" and found["m.weight"].data.shape[:-1] == matrix.data.shape[:-1]
    flat = gguf.dequantize(matrix.data.reshape(-1, 36), gguf.GGMLQuantizationType.NVFP4).reshape(experts, -1)
    wanted = flat * np.resize(np.array(factors, np.float32), experts)[:, None]
    ours = dequantize(TYPES["Q8_0"], found["m.weight"].data).reshape(experts, -1)
    assert (np.abs(ours - wanted).max(1) < 0.005 * np.abs(wanted).max(1)).all()


def test_a_factor_of_one_changes_nothing():
    """A factor of one and names without a matrix change nothing."""
    stored = {"m.weight": nvfp4("m.weight", 16, 64), "m.scale": factor("m.scale", 1.0), "other.scale": factor("other.scale", 2.0)}
    assert with_factors(Path("f"), stored) == {"m.weight": stored["m.weight"], "other.scale": stored["other.scale"]}


@pytest.mark.parametrize("values", [(1.0, 2.0), (float("nan"),), (float("inf"),), ()])
def test_factors_that_are_impossible_are_named(values):
    with pytest.raises(ConfigError, match=r"f: m.scale has \d numbers; it must have 1, and none may be NaN"):
        with_factors(Path("f"), {"m.weight": nvfp4("m.weight", 16, 64), "m.scale": factor("m.scale", *values)})


def test_factors_multiply_a_model_s_matrices(tmp_path, monkeypatch):
    """A model with factors is the model whose matrices are multiplied."""
    model, write, name = make_model("llama3.1"), tiny_gguf.write_gguf, "blk.0.ffn_up"
    rows, columns = model.model.layers[0].mlp.up_proj.weight.shape
    blocks = nvfp4("m", rows, columns).data
    values = gguf.dequantize(blocks, gguf.GGMLQuantizationType.NVFP4)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:] = torch.from_numpy(0.25 * values)
    multiplied = load(as_gguf(tmp_path / "multiplied.gguf", model))
    packed = {f"{name}.weight": (blocks, gguf.GGMLQuantizationType.NVFP4), f"{name}.scale": np.float32([0.25]), f"{name}.input_scale": np.float32([3])}
    monkeypatch.setattr(tiny_gguf, "write_gguf", lambda path, tensors, *more, **options: write(path, tensors | packed, *more, **options))
    with_them = load(as_gguf(tmp_path / "factors.gguf", model))
    key = next(key for key in multiplied.tensors if key.startswith("0.") and "gate_up" in key)
    ours, wanted = (np.asarray(each.tensors[key].read()) for each in (with_them, multiplied))
    assert np.abs(ours - wanted).max() < 0.005 * np.abs(wanted).max()
