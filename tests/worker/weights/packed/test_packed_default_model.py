"""The default model's weights, packed again as AWQ, GPTQ and compressed-tensors folders, beside what these mean."""

import shutil

import pytest
import torch

from chatlm.common.core import decode_core
from engines import chat_work, make_batch, make_engine, forward_logits, run
from nightly import WHOLE, by_day
from packers import AWQ, INT8_INPUTS, ct_config, default_model_folder, gptq_config, pack_awq, pack_ct, pack_ct_int8, pack_folder, pack_gptq, row

pytestmark = [pytest.mark.skipif(decode_core() is None, reason="weights stay packed only where decode_core runs")]
WAYS = {"awq": (row(pack_awq, AWQ | {"group_size": 64}, group=64), "u4_g32"),
        "gptq": (row(pack_gptq, gptq_config(group=64, symmetric=True), group=64, symmetric=True), "q4_0"),
        "ct": (row(pack_ct, ct_config("pack-quantized", num_bits=4, strategy="channel", symmetric=False), group=0, symmetric=False), "u4_g32"),
        "desc_act": (row(pack_gptq, gptq_config(group=64, desc_act=True), group=64, desc_act=True), "bf16"),
        "w8a8": (row(pack_ct_int8, ct_config("int-quantized", INT8_INPUTS, num_bits=8, strategy="channel")), "q8_0")}
QUESTIONS = "What is the capital of France?", "Name three colours.", "Write one sentence about the sea."


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    return default_model_folder(tmp_path_factory.mktemp("default") / "floats")


@pytest.mark.parametrize("way", by_day(WAYS, "w8a8"))
def test_the_default_model_answers_packed(way, floats, tmp_path):
    """The default model answers packed as what its weights mean does."""
    scheme, kind = WAYS[way]
    plain = shutil.copytree(floats, tmp_path / "plain")
    folder = pack_folder(plain, tmp_path / "packed", scheme)
    meant, packed = make_engine(plain, num_pages=60), make_engine(folder, num_pages=60, as_stored=True, fine=True)
    assert packed.transformer.weights["3.output"].kind == kind
    if way == "w8a8":
        assert packed.transformer.weights["3.down"].kind == "i8_row"        # 1,536 columns
    works = [chat_work(meant, question, question, 40 if WHOLE else 12) for question in QUESTIONS]
    ids, logits = list(works[0].prompt_ids), []
    for engine in (meant, packed):
        logits.append(forward_logits(engine.transformer, make_batch((ids, 0, len(ids), list(range(8)))))[0].log_softmax(-1))
    # float16 keys and values, 16 bits of activations, and with bfloat16 what it rounds of the weights
    kl = float((logits[0].exp() * (logits[0] - logits[1])).sum())
    assert kl < (1e-3 if kind == "bf16" else 1e-5), kl
    want, got = run(meant, works), run(packed, works)
    close = {question: min(want.gaps[question]) for question in QUESTIONS}      # of the two likeliest tokens
    for question in QUESTIONS:
        assert got.tokens[question] == want.tokens[question] or close[question] < 0.02, (question, close, got.text[question], want.text[question])
    assert any(got.tokens[question] == want.tokens[question] for question in QUESTIONS)
    if way == "w8a8":       # as its config asks, x of `down` has 8 bits with one scale for 256 columns
        usual = make_engine(folder, num_pages=60, as_stored=True)
        rough = forward_logits(usual.transformer, make_batch((ids, 0, len(ids), list(range(8)))))[0].log_softmax(-1)
        assert kl < float((logits[0].exp() * (logits[0] - rough)).sum()) < 0.05
