"""Each tensor gets the type that llama-quantize gives it; `tests/support/ggml_blocks.py` recorded what it says."""

import json

import pytest

from chatlm.common.errors import ConfigError
from chatlm.export.gguf.mixes import MIXES, ModelShape, TensorInfo, TypeRules, mix_of
from ggml_blocks import MIX_RECORD, MODELS, exceptions, matrices_of

RECORDED = json.loads(MIX_RECORD.read_text())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("with_importance", (False, True), ids=("plain", "important"))
def test_types_are_llama_quantizes(model, with_importance):
    changes, heads, kv_heads = MODELS[model]
    matrices = [TensorInfo(name, sizes, "F32") for name, sizes in matrices_of(**changes).items()]
    shape = ModelShape("llama", changes.get("layers", 33), heads, kv_heads, changes.get("experts", 0))
    for name, mix in MIXES.items():
        if mix.needs_importance and not with_importance:
            continue
        types = TypeRules(mix, shape, with_importance).types_of(reversed(matrices))
        recorded = RECORDED[model][f"{name}, important" if with_importance else name]
        assert exceptions(types, mix.main) == recorded, name


def test_a_fused_matrix_counts_as_values():
    matrices = [TensorInfo(name, sizes, "F16") for name, sizes in matrices_of(layers=8, qkv=True).items()]
    types = TypeRules(MIXES["Q4_K_M"], ModelShape("phi3", 8, 4, 4), False).types_of(matrices)
    assert {types[f"blk.{layer}.attn_qkv.weight"] for layer in (0, 7)} == {"Q6_K"}
    assert types["blk.1.attn_qkv.weight"] == "Q4_K"


def test_70b_gets_better_values():
    sizes = matrices_of(layers=80)
    matrices = [TensorInfo(name, shape, "F16") for name, shape in sizes.items()]
    types = TypeRules(MIXES["Q4_K_M"], ModelShape("llama", 80, 64, 8), False).types_of(matrices)
    values = {types[name] for name in sizes if "attn_v" in name}
    assert values == {"Q5_K", "Q6_K"}


def test_nanochats_own_tensors_keep_enough():
    names = ("value_embd.weight", "blk.1.value_embd.weight", "blk.1.ve_gate.weight", "smear_gate.weight")
    matrices = [TensorInfo(name, (256, 64), "F32") for name in (*names, "output.weight", "token_embd.weight")]
    types = TypeRules(MIXES["Q4_K_M"], ModelShape("nanochat5", 4, 4, 4), False).types_of(matrices)
    assert types["blk.1.value_embd.weight"] == "Q8_0"
    assert types["blk.1.ve_gate.weight"] == types["smear_gate.weight"] == "F32"
    assert types["output.weight"] == "Q6_K" and types["token_embd.weight"] == "Q4_K"


def test_names_of_types_may_be_short_or_in_small_letters():
    assert [mix_of(name)[0] for name in ("q4_k_m", "Q4_K", "Q3_K", "mxfp4")] == [
        "Q4_K_M", "Q4_K_M", "Q3_K_M", "MXFP4_MOE"]


@pytest.mark.parametrize("name, words", (
    ("Q4_KM", "did you mean Q4_K_M"), ("IQ1_L", "did you mean"), ("", "allowed are"),
    ("int4", "allowed are"), ("Q9_0", "Q8_0")))
def test_an_unknown_type_is_refused_in_one_line(name, words):
    with pytest.raises(ConfigError) as refused:
        mix_of(name)
    assert words in str(refused.value) and "\n" not in str(refused.value)
