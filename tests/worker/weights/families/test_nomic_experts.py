"""NomicBERT with experts (v2-moe), against its formulas: as a folder, and as GGUF files, which lack the experts' bias."""

import numpy as np
import pytest

from chatlm.common.errors import ConfigError
from chatlm.worker.kernels import choosing
from encoders import TEXTS, cosine, engine_of, framed, vectors
import nomic_experts
from retrieval import write_json

BACKENDS = [pytest.param("decode_core", marks=pytest.mark.skipif(choosing.decode_core() is None, reason="not built")), "reference"]


@pytest.fixture(scope="module")
def state():
    return nomic_experts.weights()


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(choosing, "decode_core", lambda: None)
    return request.param


def compared(path, state, dtype="float32"):
    model, engine = engine_of(path, dtype)
    ids = [framed(model.text.embedder, engine.tokenizer, text) for text in TEXTS]
    found = vectors(engine, ids, pooling="mean")
    return min(cosine(vector, nomic_experts.expected(state, tokens)) for vector, tokens in zip(found, ids)), engine, ids, found


def test_a_folder_gives_its_formula_s_vectors(state, backend, tmp_path):
    nomic_experts.save_folder(tmp_path, state)
    close, engine, ids, found = compared(tmp_path, state)
    assert close > 0.999999 and engine.kernels.row_invariant == (backend == "decode_core")
    if backend == "decode_core":
        assert np.array_equal(vectors(engine, ids, together=False, pooling="mean"), found)


@pytest.mark.parametrize("kind, least", [("F32", 0.999999), ("F16", 0.99999), ("Q8_0", 0.999)])
def test_a_nomic_gguf_does_without_its_lacking_bias(state, backend, kind, least, tmp_path):
    """A GGUF file gives them without the bias that it lacks."""
    if kind != "F32":       # with other bits a near tie of experts is decided otherwise: here all are chosen
        state = nomic_experts.weights(experts=nomic_experts.CHOSEN)
    nomic_experts.save_gguf(tmp_path / "model.gguf", state, kind)
    without = {name: tensor for name, tensor in state.items() if not name.endswith("experts.bias")}
    close, *_ = compared(tmp_path / "model.gguf", without, None)
    assert close > (least if backend == "decode_core" else min(least, 0.9999))     # torch computes F16 files in float16
    assert compared(tmp_path / "model.gguf", state, None)[0] < 0.99      # the bias is seen


@pytest.mark.parametrize("change, words", [
    ({"moe_normalize_expert_weights": True}, "moe_normalize_expert_weights is true; in a nomic_bert model it must be false"),
    ({"activation_function": "swiglu"}, 'activation_function is "swiglu"; in a nomic_bert model it must be "gelu"'),
    ({"moe_top_k": 9}, "num_experts_per_tok is 9; it must be an integer from 1 to 8"), ({"moe_every_n_layers": 0}, "moe_every_n_layers is 0"),
    ({"num_shared_experts": 1}, "num_shared_experts is 1"), ({"num_experts": 1 << 40}, "num_experts is 1099511627776"), ({"type_vocab_size": 2}, "type_vocab_size is 2")])
def test_other_forms_are_refused(state, change, words, tmp_path):
    nomic_experts.save_folder(tmp_path, state)
    write_json(tmp_path, config=nomic_experts.CONFIG | change)
    with pytest.raises(ConfigError, match=words):
        engine_of(tmp_path)
