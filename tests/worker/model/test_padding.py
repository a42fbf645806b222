"""Models whose heads and widths are no multiples of 16, from their files: decode_core computes them with zeros between."""

import pytest
import torch

from chatlm.common.core import decode_core
from families import answers, as_gguf, check, clear_cases, kernels_of, load, make_model, save, transformer
from nightly import by_day

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.skipif(decode_core() is None, reason="not built")]

ODD = {     # a family -> what is odd about it
    "llama3.1": dict(head_dim=20, hidden_size=72, intermediate_size=100), "qwen3": dict(head_dim=24, hidden_size=60),
    "gemma2": dict(head_dim=40, intermediate_size=90), "cohere2": dict(head_dim=20, hidden_size=72), "gpt2": dict(hidden_size=60, num_attention_heads=3),
    "pythia": dict(hidden_size=72), "gpt-oss": dict(head_dim=40), "qwen3moe": dict(head_dim=20, hidden_size=72, moe_intermediate_size=20),
    "olmo2": dict(hidden_size=72), "lfm2": dict(hidden_size=72)}


@pytest.fixture
def odd(request):
    return make_model(request.param, **ODD[request.param])


@pytest.mark.parametrize("odd", by_day(ODD, "llama3.1", "gpt2", "pythia", "gpt-oss", "qwen3moe", "lfm2"), indirect=True)
def test_a_padded_folder_matches_transformers(odd, tmp_path):
    """A folder computes what transformers computes."""
    cases, model = clear_cases(odd), load(save(odd, tmp_path))
    kernels = kernels_of("decode_core", model.architecture)
    assert kernels.row_invariant and model.architecture.padded() != model.architecture
    check(answers(transformer(model, kernels), cases), cases)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_gguf_with_odd_heads_computes_its_floats(quantized, tmp_path):
    """Packed, its output matrix is divided between blocks: it is multiplied out and packed again as Q8_0."""
    model = make_model("llama2", hidden_size=96, head_dim=24)
    cases = clear_cases(model, lengths=(9, 40))
    ours = load(as_gguf(tmp_path / "tiny.gguf", model, quantized=quantized), dtype=None if quantized else "float32")
    made = transformer(ours, kernels_of("decode_core", ours.architecture))
    if not quantized:
        return check(answers(made, cases), cases)
    assert made.matrix_types == ["q8_0"] and made.model.attentions[0].head_size == 32
    reference = load(tmp_path / "tiny.gguf", dtype="float32")       # multiplied out: no error but that of 8 bits
    wanted = answers(transformer(reference, kernels_of("reference", reference.architecture)), cases, count=1)
    for (_, logits), (_, theirs) in zip(answers(made, cases, count=1), wanted):
        assert (logits - theirs).norm() < 0.08 * theirs.norm()      # activations are int8; a wrong row would make it 1


def test_a_fault_in_a_padded_matrix_is_named(tmp_path):
    model = make_model("llama2", head_dim=20)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 5] = torch.nan
    ours = load(save(model, tmp_path))
    with pytest.raises(Exception, match="o_proj"):
        transformer(ours, kernels_of("decode_core", ours.architecture))
