"""Models that embed or rank whole texts, as folders and as GGUF files, against transformers: vectors, scores, tokens, and what is refused."""

import itertools
import json
import os
import signal
import threading
from urllib.error import HTTPError

import numpy as np
import pytest
import tokenizers
import torch

from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.common.messages.requests import AnswerParams, Failed
from chatlm.worker.engine.sequence import Assignment
from chatlm.worker.kernels import choosing
from chatlm.worker.kernels.limits import not_compiled
from chatlm.worker.weights.formats.folder.description import hf_blocks
import encoders
from encoders import (
    FILES, MODELS, PIECES, TEXTS, cosine, engine_of, expected, expected_score, framed, make_encoder, modules, save_folder, save_gguf, vectors, write_json,
    write_tokenizer)
from nightly import by_day
from real_server import get, post, server

pytestmark = pytest.mark.usefixtures("one_thread")
COMPILED = pytest.mark.skipif(decode_core() is None, reason="not built")
BACKENDS = ["reference", pytest.param("decode_core", marks=COMPILED)]
DENSE = ((48, 64, "Tanh", True), (32, 48, "GELU", False))
CLOSE = 1 - 1e-9         # cosines of float32 models; the issue asks for 0.99999


@pytest.fixture(scope="module")
def made():
    known = {}

    def make(name, ranks=False):
        if (name, ranks) not in known:
            known[name, ranks] = make_encoder(name, ranks)
        return known[name, ranks]
    return make


@pytest.fixture
def backend(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(choosing, "decode_core", lambda: None)
    return request.param


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("name", MODELS)
def test_an_encoder_folder_matches_transformers(made, name, backend, tmp_path):
    """A folder gives the vectors of transformers."""
    save_folder(tmp_path, name, made(name))
    model, engine = engine_of(tmp_path)
    assert engine.kernels.row_invariant == (backend == "decode_core") and not not_compiled(model.architecture)
    ids = [framed(model.text.embedder, engine.tokenizer, text) for text in TEXTS]
    for pooling in ("mean", "cls", "last"):
        for vector, tokens in zip(vectors(engine, ids, pooling=pooling), ids):
            assert cosine(vector, expected(made(name), tokens, pooling)) > CLOSE
            assert abs(np.linalg.norm(vector) - 1) < 1e-6


@COMPILED
@pytest.mark.parametrize("name", MODELS)
def test_odd_sizes_are_padded_with_zeros(name, tmp_path):
    """Sizes that are no multiples of 16 are computed with zeros between."""
    model = make_encoder(name, hidden_size=88, intermediate_size=104, **{"head_dim": 20, "query_pre_attn_scalar": 20} if name == "gemma" else {})
    save_folder(tmp_path, name, model)
    loaded, engine = engine_of(tmp_path)
    assert engine.kernels.row_invariant and not not_compiled(loaded.architecture)
    ids = [framed(loaded.text.embedder, engine.tokenizer, text) for text in TEXTS]
    for pooling in ("mean", "cls"):
        found = vectors(engine, ids, pooling=pooling)
        assert all(len(vector) == 88 and cosine(vector, expected(model, tokens, pooling)) > CLOSE for vector, tokens in zip(found, ids))
        assert np.array_equal(vectors(engine, ids, together=False, pooling=pooling), found)


@pytest.mark.parametrize("name", MODELS)
def test_the_tokens_are_those_of_its_makers(made, name, tmp_path):
    save_folder(tmp_path, name, made(name))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model, engine = engine_of(tmp_path)
    for text in (*TEXTS, "The [SEP] Caf\u00e9 </s> 12", ""):
        written = text.replace("[SEP]", "").replace("</s>", "")       # what names a special token is text for us
        ours = framed(model.text.embedder, engine.tokenizer, text)
        assert ours == tuple(theirs.encode(text).ids) if written == text else ours != tuple(theirs.encode(text).ids)


@COMPILED
@pytest.mark.parametrize("name", MODELS)
def test_a_vector_s_bits_ignore_its_neighbours(made, name, tmp_path):
    """The bits of a vector do not depend on what is computed beside it."""
    save_folder(tmp_path, name, made(name))
    _, engine = engine_of(tmp_path, max_batch=16)
    dice = np.random.default_rng(3)
    ids = [dice.integers(5, 50, length).tolist() for length in (1, 2, 12, 13, 16, 17, 31, 64, 100, 255, 256, 257, 300, 512, 3, 1, 40)]
    together, alone = vectors(engine, ids, pooling="mean"), vectors(engine, ids, together=False, pooling="mean")
    for one, other in zip(together, alone):
        assert one.tobytes() == other.tobytes()
    assert [one.tobytes() for one in vectors(engine, ids[::-1], pooling="mean")] == [one.tobytes() for one in together[::-1]]


@pytest.mark.parametrize("pooling, dense", [("mean", ()), ("cls", DENSE), ("last", DENSE[:1])])
def test_a_folder_s_modules_follow_the_model(made, pooling, dense, tmp_path):
    """The modules of a folder decide what follows the model."""
    after = save_folder(tmp_path, "bert", made("bert"), pooling, dense)
    model, engine = engine_of(tmp_path)
    embedder = model.text.embedder
    assert (embedder.pooling, embedder.size) == (pooling, dense[-1][0] if dense else 64)
    ids = [framed(embedder, engine.tokenizer, text) for text in TEXTS]
    for vector, tokens in zip(vectors(engine, ids, pooling=pooling), ids):
        assert cosine(vector, expected(made("bert"), tokens, pooling, after)) > CLOSE


def test_a_vector_that_is_not_normalized_is_a_mean(made, tmp_path):
    save_folder(tmp_path, "bert", made("bert"))
    model, engine = engine_of(tmp_path)
    ids = framed(model.text.embedder, engine.tokenizer, TEXTS[3])
    [raw] = vectors(engine, [ids], pooling="mean", normalized=False)
    import torch
    with torch.no_grad():
        states = made("bert")(input_ids=torch.tensor([ids])).last_hidden_state[0]
    assert np.abs(raw - states.mean(0).numpy()).max() < 1e-5


@pytest.mark.parametrize("kind, least", [("F32", CLOSE), ("F16", 1 - 2e-6), ("Q8_0", 0.999)])
@pytest.mark.parametrize("name", FILES)
def test_an_encoder_gguf_matches_transformers(made, name, kind, least, tmp_path):
    """A GGUF file gives the vectors of transformers."""
    path = tmp_path / "model.gguf"
    save_gguf(path, name, made(name), kind)
    model, engine = engine_of(path, None)
    if decode_core():
        assert engine.transformer.matrix_types[0] in (kind.lower(), "float32")
    embedder = model.text.embedder
    ids = [framed(embedder, engine.tokenizer, text) for text in TEXTS]
    if name not in ("gemma", "modernbert"):     # whose files have other vocabularies than their folders here
        write_tokenizer(tmp_path, name)
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert [list(each) for each in ids] == [theirs.encode(text).ids for text in TEXTS]
    for vector, tokens in zip(vectors(engine, ids, pooling=embedder.pooling), ids):
        assert cosine(vector, expected(made(name), tokens)) > least


def test_dense_layers_of_a_gguf_follow_the_mean(made, tmp_path, caplog):
    after = save_folder(tmp_path, "gemma", made("gemma"), dense=((96, 64, "Identity", False), (64, 96, "Identity", False)))
    for dense in (after, ()):
        save_gguf(tmp_path / "model.gguf", "gemma", made("gemma"), dense=dense)
        model, engine = engine_of(tmp_path / "model.gguf", None)
        ids = framed(model.text.embedder, engine.tokenizer, "hello world")
        assert ids[0] == 1 and ids[-1] == 2
        [vector] = vectors(engine, [ids], pooling="mean")
        assert cosine(vector, expected(made("gemma"), ids, "mean", dense)) > CLOSE
    assert "lacks the dense layers" in caplog.text


PAIRS = [("the cat", "a dog"), ("query", "abc xyz. " * 20), ("a", "b")]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("gemma", "nomic", "gte")])
def test_a_cross_encoder_s_scores_match_transformers(made, name, backend, tmp_path):
    reranker = made(name, True)
    reranker.save_pretrained(tmp_path)
    theirs = write_tokenizer(tmp_path, name)
    model, engine = engine_of(tmp_path)
    embedder = model.text.embedder
    assert (embedder.pooling, embedder.size, embedder.sigmoid) == ("rank", 1, True)
    ids = [framed(embedder, engine.tokenizer, *pair) for pair in PAIRS]
    assert [list(each) for each in ids] == [theirs.encode(*pair).ids for pair in PAIRS]
    scores = [float(vector[0]) for vector in vectors(engine, ids, pooling="rank")]
    assert scores == pytest.approx([expected_score(reranker, theirs.encode(*pair)) for pair in PAIRS], abs=1e-4)
    assert len({round(score, 2) for score in scores}) == len(PAIRS)


def test_a_gguf_cross_encoder_matches_transformers(made, tmp_path):
    """A GGUF file of a cross-encoder gives the scores of transformers."""
    reranker, path = made("xlm-roberta", True), tmp_path / "model.gguf"
    save_gguf(path, "xlm-roberta", reranker, pooling="rank")
    theirs = write_tokenizer(tmp_path, "xlm-roberta")
    model, engine = engine_of(path, None)
    ids = [framed(model.text.embedder, engine.tokenizer, *pair) for pair in PAIRS]
    scores = [float(vector[0]) for vector in vectors(engine, ids, pooling="rank")]
    assert scores == pytest.approx([expected_score(reranker, theirs.encode(*pair)) for pair in PAIRS], abs=1e-4)


def test_the_config_says_if_scores_are_probabilities(made, tmp_path):
    """Whether a score is a probability is what the config says."""
    made("bert", True).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, "bert")
    config = json.loads((tmp_path / "config.json").read_text())
    for more, words in (({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, ""),
                        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, ""),
                        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Softmax"}, "config.json: .* must be Sigmoid or Identity")):
        write_json(tmp_path, config=config | more)
        if words:
            with pytest.raises(ConfigError, match=words):
                engine_of(tmp_path)
        else:
            assert not engine_of(tmp_path)[0].text.embedder.sigmoid


@pytest.mark.parametrize("change, words", [
    ({"modules": modules("Pooling", "LayerNorm")}, r"\[2\].type is .*LayerNorm"),
    ({"modules": modules("Pooling", "Normalize", "Dense")}, r"\[3\].type is .*Dense"),
    ({"1_Pooling__config": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}}, "pooling_mode is a list of 2; of a model with attention to both sides"),
    ({"1_Pooling__config": {"pooling_mode_max_tokens": True}}, 'pooling_mode is "max_tokens"'),
    ({"2_Dense__config": {"in_features": 63, "out_features": 48}}, "in_features is 63; it must be 64"),
    ({"2_Dense__config": {"in_features": 64, "out_features": 47}}, r"2_Dense has the tensors linear.bias \(48,\), linear.weight \(48, 64\); it must have"),
    ({"2_Dense__config": {"in_features": 64, "out_features": 48, "activation_function": "torch.nn.Softmax"}}, 'activation_function is "softmax"; it must be one of'),
    ({"config": {"model_type": "bert", "position_embedding_type": "relative_key", **{}}}, "position_embedding_type"),
])
def test_a_folder_computed_otherwise_is_refused(made, change, words, tmp_path):
    save_folder(tmp_path, "bert", made("bert"), dense=DENSE[:1])
    if "config" in change:
        change["config"] = json.loads((tmp_path / "config.json").read_text()) | change["config"]
    write_json(tmp_path, **change)
    with pytest.raises(ConfigError, match=words) as caught:
        engine_of(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes, words", [
    ({"pooling_type": 0}, r"bert.pooling_type is 0 \(none\); in a bert model it must be 1 \(mean\), 2"),
    ({"pooling_type": 4}, r"pooling_type is 4 \(rank\), but the file lacks a part of the head"),
    ({"pooling_type": 7}, r"is 7 \(unknown\)"),
    ({"attention.causal": True}, "bert.attention.causal is true: such embeddings are not supported; this server computes bert models with attention to both sides")])
def test_a_gguf_computed_otherwise_is_refused(made, changes, words, tmp_path):
    save_gguf(tmp_path / "model.gguf", "bert", made("bert"), **changes)
    with pytest.raises(ConfigError, match=words):
        engine_of(tmp_path / "model.gguf", None)


@pytest.mark.parametrize("key, value, words", [
    ("precompiled_charsmap", [255] * 400, "model.gguf: its precompiled_charsmap"),
    ("scores", [0.0], "tokenizer.ggml.scores is a list of 256; it must be a list of 320 finite numbers"),
    ("unknown_token_id", 999, "tokenizer.ggml.unknown_token_id is 999; it must be an integer from 0 to 319")])
def test_a_broken_vocabulary_is_one_line(made, key, value, words, tmp_path, monkeypatch):
    metadata = encoders.vocabulary("xlm-roberta") | {f"tokenizer.ggml.{key}": value}
    monkeypatch.setattr(encoders, "vocabulary", lambda name: metadata)
    save_gguf(tmp_path / "model.gguf", "xlm-roberta", made("xlm-roberta"))
    with pytest.raises(ConfigError, match=words) as caught:
        engine_of(tmp_path / "model.gguf", None)
    assert "\n" not in str(caught.value)


def test_a_unigram_vocabulary_normalizes_as_its_file(made, tmp_path, monkeypatch):
    """With runs of spaces trimmed or kept, and with and without a space before the text."""
    found = {}
    for trims in (True, False):
        metadata = encoders.vocabulary("xlm-roberta") | {"tokenizer.ggml.remove_extra_whitespaces": trims, "tokenizer.ggml.add_space_prefix": trims}
        monkeypatch.setattr(encoders, "vocabulary", lambda name: metadata)
        save_gguf(tmp_path / "model.gguf", "xlm-roberta", made("xlm-roberta"))
        model, engine = engine_of(tmp_path / "model.gguf", None)
        found[trims] = [PIECES[token] for token in framed(model.text.embedder, engine.tokenizer, "the  cat ")]
    assert found[True] == ["<s>", "\u2581the", "\u2581cat", "</s>"]
    assert found[False][1:4] == ["t", "h", "e"] and found[False].count("\u2581") == 2


def test_older_names_of_tensors_are_read(made, tmp_path):
    """Heads for other tasks are passed over."""
    from safetensors.torch import load_file, save_file
    import torch
    save_folder(tmp_path, "bert", made("bert"))
    state = load_file(tmp_path / "model.safetensors")
    old = {f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor for name, tensor in state.items()}
    old |= {"bert.embeddings.position_ids": torch.arange(512)[None], "cls.predictions.bias": torch.zeros(320), "cls.seq_relationship.weight": torch.zeros(2, 64)}
    save_file(old, tmp_path / "model.safetensors")
    model, engine = engine_of(tmp_path)
    ids = framed(model.text.embedder, engine.tokenizer, TEXTS[2])
    assert cosine(vectors(engine, [ids], pooling="mean")[0], expected(made("bert"), ids)) > CLOSE


def test_a_worker_refuses_answers_and_long_texts(made, tmp_path):
    """A worker refuses answers and texts that are too long."""
    save_folder(tmp_path, "bert", made("bert"))
    _, engine = engine_of(tmp_path)
    engine.add(Assignment("answer", (5, 6), AnswerParams(), 4))
    engine.add(Assignment("long", (5,) * 513, AnswerParams(pooling="mean"), 0))
    assert [(name, event.message) for name, event in engine.step()] == [
        ("answer", "this model embeds texts and gives no answers"), ("long", "the text has 513 tokens; this model takes at most 512")]
    assert all(isinstance(event, Failed) for _, event in engine.step()) and not engine.busy


def test_a_cancelled_text_leaves_its_place_to_others(made, tmp_path):
    save_folder(tmp_path, "bert", made("bert"))
    _, engine = engine_of(tmp_path)
    for name in "abc":
        engine.add(Assignment(name, (5,) * 400, AnswerParams(pooling="mean"), 0))
    assert engine.cancel("b")
    assert {name for _ in range(3) for name, _ in engine.step()} == {"a", "c"} and not engine.busy
    assert engine.pool.available == engine.pool.num_pages


def test_unsaid_prompts_are_those_of_the_makers(made, tmp_path):
    """Prompts that no file says are those of its makers."""
    folder = tmp_path / "multilingual-e5-small"
    folder.mkdir()
    save_folder(folder, "xlm-roberta", made("xlm-roberta"))
    assert engine_of(folder)[0].text.embedder.prompts == (("query", "query: "), ("passage", "passage: "))




BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02, "torch_dtype": "float32", "transformers_version": "4.40.0", "architectures": ["X"]}
PUBLISHED = {       # the forms in which makers write configs -> (tokens of the longest text, width)
    "minilm": ({**BASE, "model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536, "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2,
                "layer_norm_eps": 1e-12, "gradient_checkpointing": False, "pad_token_id": 0, "position_embedding_type": "absolute", "use_cache": True}, 512, 384),
    "bge-m3": ({**BASE, "model_type": "xlm-roberta", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096, "vocab_size": 250002,
                "max_position_embeddings": 8194, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "output_past": True,
                "position_embedding_type": "absolute", "classifier_dropout": None, "use_cache": True}, 8192, 1024),
    "multilingual-bert": ({**BASE, "model_type": "bert", "vocab_size": 119547, "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "directionality": "bidi",
                           "pooler_fc_size": 768, "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3, "pooler_size_per_head": 128, "pooler_type": "first_token_transform"}, 512, 768),
    "nomic-v1.5": ({"activation_function": "swiglu", "attn_pdrop": 0.0, "auto_map": {"AutoModel": "x"}, "causal": False, "dense_seq_output": True, "embd_pdrop": 0.0, "fused_bias_fc": True,
                    "fused_dropout_add_ln": True, "layer_norm_epsilon": 1e-12, "max_trained_positions": 2048, "mlp_fc1_bias": False, "mlp_fc2_bias": False, "model_type": "nomic_bert", "n_embd": 768,
                    "n_head": 12, "n_inner": 3072, "n_layer": 12, "n_positions": 8192, "pad_vocab_size_multiple": 64, "parallel_block": False, "parallel_block_tied_norm": False, "prenorm": False,
                    "qkv_proj_bias": False, "reorder_and_upcast_attn": False, "resid_pdrop": 0.0, "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False,
                    "rotary_emb_scale_base": None, "rotary_scaling_factor": None, "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "summary_activation": None,
                    "summary_first_dropout": 0.0, "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True, "type_vocab_size": 2, "use_cache": True,
                    "use_flash_attn": True, "use_rms_norm": False, "use_xentropy": True, "vocab_size": 30528}, 8192, 768),
    "gte-multilingual": ({**BASE, "model_type": "new", "layer_norm_eps": 1e-12, "layer_norm_type": "layer_norm", "logn_attention_clip1": False, "logn_attention_scale": False,
                          "max_position_embeddings": 8192, "pack_qkv": True, "pad_token_id": 1, "position_embedding_type": "rope", "rope_scaling": {"factor": 8.0, "type": "ntk"},
                          "rope_theta": 20000, "type_vocab_size": 1, "unpad_inputs": False, "use_memory_efficient_attention": False, "vocab_size": 250048}, 8192, 768),
    "modernbert": ({**BASE, "model_type": "modernbert", "num_hidden_layers": 22, "intermediate_size": 1152, "vocab_size": 50368, "max_position_embeddings": 8192, "hidden_activation": "gelu",
                    "norm_eps": 1e-5, "norm_bias": False, "attention_bias": False, "mlp_bias": False, "global_attn_every_n_layers": 3, "local_attention": 128, "global_rope_theta": 160000.0,
                    "local_rope_theta": 10000.0, "classifier_pooling": "mean", "decoder_bias": True, "deterministic_flash_attn": False, "initializer_cutoff_factor": 2.0,
                    "sparse_pred_ignore_index": -100, "sparse_prediction": False, "reference_compile": None, "repad_logits_with_grad": False, "position_embedding_type": "absolute"}, 8192, 768),
    "mpnet": ({**BASE, "model_type": "mpnet", "vocab_size": 30527, "max_position_embeddings": 514, "layer_norm_eps": 1e-5, "relative_attention_num_buckets": 32, "pad_token_id": 1, "bos_token_id": 0,
               "eos_token_id": 2}, 512, 768),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_as_their_makers_write_them_are_read(name, tmp_path):
    config, longest, width = PUBLISHED[name]
    write_json(tmp_path, config=config)
    _, spec = hf_blocks(tmp_path / "config.json", None)
    assert spec.of_texts and (spec.max_positions, spec.width) == (longest, width) and not not_compiled(spec)
    if name == "modernbert":
        assert spec.windows[:4] == (0, 64, 64, 0) and [spec.by_layer[layer].rope.base for layer in (0, 1)] == [160000.0, 10000.0]
    if name == "nomic-v1.5":
        assert (spec.by_layer[0].rope.base, spec.feed.activation, spec.token_types) == (1000.0, "swiglu", 2)


@pytest.mark.parametrize("change, words", [({"rotary_scaling_factor": 2}, "rotary_scaling_factor is 2; in a nomic_bert model it must be null"),
                                           ({"num_experts": 8, "moe_every_n_layers": 2}, "activation_function is \"swiglu\"; in a nomic_bert model it must be \"gelu\""),
                                           ({"activation_function": "gelu"}, 'activation_function is "gelu"; in a nomic_bert model it must be "swiglu"')])
def test_a_nomic_bert_of_another_form_is_refused(change, words, tmp_path):
    write_json(tmp_path, config=PUBLISHED["nomic-v1.5"][0] | change)
    with pytest.raises(ConfigError, match=words):
        hf_blocks(tmp_path / "config.json", None)


# --- as sentence-transformers 6 writes them: its vectors and scores were compared with ours (6.2.0, 2026-11-26, within 7e-7) -----------

SIX = {"modules": [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
                   {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling"}],
       "sentence_bert_config": {"transformer_task": "feature-extraction", "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
                                "module_output_name": "token_embeddings"}}


def six(folder, name, model, pooling="mean", **more):
    """An embedder with `more` in its config, whose prompt is read but not pooled."""
    model.save_pretrained(folder)
    pipeline = write_tokenizer(folder, name)
    write_json(folder, **SIX, **{"1_Pooling__config": {"embedding_dimension": 64, "pooling_mode": pooling, "include_prompt": False}}, config_sentence_transformers={
        "model_type": "SentenceTransformer", "prompts": {"query": "query: the ", "document": ""}, "default_prompt_name": None, "similarity_fn_name": "cosine", **more})
    return pipeline


@torch.no_grad()
def without_prompt(model, pipeline, prompt, text, pooling="mean"):
    """sentence-transformers' vector: of the tokens after those of [CLS] and the prompt."""
    ids = pipeline.encode(prompt + text).ids
    first = len(pipeline.encode(prompt).ids) - 1 if prompt else 0
    states = model(input_ids=torch.tensor([ids])).last_hidden_state[0].double()
    pooled = {"mean": states[first:].mean(0), "cls": states[first], "lasttoken": states[-1]}[pooling].numpy()
    return pooled / np.linalg.norm(pooled)


@pytest.mark.parametrize("name, pooling", by_day(itertools.product(["bert", "modernbert", "xlm-roberta"], ["mean", "cls", "lasttoken"]),
                                                 ("bert", "mean"), ("modernbert", "cls"), ("xlm-roberta", "lasttoken")))
def test_prompt_tokens_are_read_but_not_pooled(made, name, pooling, tmp_path):
    """The tokens of a prompt are read but not pooled where a folder says so."""
    pipeline = six(tmp_path, name, made(name), pooling)
    with server(tmp_path, "--dtype", "float32") as (_, url):
        for prompt_name, prompt in (("query", "query: the "), ("document", ""), (None, "")):
            body = {"input": TEXTS} | ({"prompt_name": prompt_name} if prompt_name else {})
            for text, item in zip(TEXTS, json.load(post(f"{url}/v1/embeddings", body))["data"], strict=True):
                assert cosine(item["embedding"], without_prompt(made(name), pipeline, prompt, text, pooling)) > CLOSE - 1e-9
        ids = pipeline.encode("query: the cats").ids        # these have no prompt
        [item] = json.load(post(f"{url}/v1/embeddings", {"input": [ids], "prompt_name": "query"}))["data"]
        assert cosine(item["embedding"], expected(made(name), ids, {"lasttoken": "last"}.get(pooling, pooling))) > CLOSE - 1e-9


def test_a_filling_prompt_leaves_its_last_token(made, tmp_path):
    """A prompt that fills the longest text leaves its last token."""
    six(tmp_path, "bert", made("bert"), prompts={"query": "cat " * 40})
    write_json(tmp_path, sentence_bert_config=SIX["sentence_bert_config"] | {"max_seq_length": 12})
    with server(tmp_path, "--dtype", "float32") as (_, url):
        [item] = json.load(post(f"{url}/embed", {"inputs": "dog", "prompt_name": "query", "truncate": True}))
        assert abs(np.linalg.norm(item) - 1) < 1e-5


def test_a_causal_prompt_is_left_out_of_the_mean(tmp_path):
    """The prompt of a causal model is left out of the mean, however it is chunked."""
    from engines import make_engine
    from families import make_model, save
    from works import assignment
    model = make_model("llama2")
    text = list(range(3, 103))
    engine = make_engine(save(model, tmp_path), num_pages=60, max_batch=4, prefill_chunk=16)
    with torch.no_grad():
        states = model.model(torch.tensor([text])).last_hidden_state[0].double()
    for unpooled, wanted in ((0, states.mean(0)), (37, states[37:].mean(0)), (99, states[99]), (500, states[99])):
        [vector] = vectors(engine, [text], pooling="mean", unpooled=unpooled)
        assert cosine(vector, wanted) > 0.999999


def test_a_folder_s_vector_length_is_the_usual_one(made, tmp_path):
    pipeline = six(tmp_path, "bert", made("bert"), truncate_dim=24)
    whole = without_prompt(made("bert"), pipeline, "", "the cats")
    with server(tmp_path, "--dtype", "float32") as (_, url):
        for asked, size in (({}, 24), ({"dimensions": 64}, 64), ({"dimensions": 32}, 32)):
            [item] = json.load(post(f"{url}/v1/embeddings", {"input": "the cats"} | asked))["data"]
            assert len(item["embedding"]) == size and cosine(item["embedding"], whole[:size]) > CLOSE - 1e-9
        with pytest.raises(HTTPError) as caught:
            post(f"{url}/v1/embeddings", {"input": "the cats", "dimensions": 23})
        assert caught.value.code == 400 and "from 24 to 64" in caught.value.read().decode()
        [model] = get(f"{url}/v1/models")["data"]
        assert (model["embedder"]["dimensions"], model["embedder"]["least_dimensions"]) == (24, 24)
        found = json.load(post(f"{url}/v1/score", {"text_1": "the cats", "text_2": ["the cats, the dog"]}))["data"][0]["score"]
        other = without_prompt(made("bert"), pipeline, "", "the cats, the dog")
        assert found == pytest.approx(cosine(whole[:24], other[:24]), abs=1e-5)


def test_the_latest_place_makes_scores_probabilities(made, tmp_path):
    """What makes scores probabilities is read from the latest place."""
    made("bert", True).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, "bert")
    write_json(tmp_path, modules=SIX["modules"][:1], config_sentence_transformers={"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.linear.Identity"})
    assert not engine_of(tmp_path)[0].text.embedder.sigmoid
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path, config=config | {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
               config_sentence_transformers={"activation_fn": "torch.nn.modules.activation.Sigmoid"})
    assert engine_of(tmp_path)[0].text.embedder.sigmoid
    for named in ("torch.nn.modules.activation.Softmax", 7):
        write_json(tmp_path, config_sentence_transformers={"activation_fn": named})
        with pytest.raises(ConfigError, match="config_sentence_transformers.json: the activation of its scores is .*; it must be Sigmoid or Identity"):
            engine_of(tmp_path)


def test_gte_s_ntk_is_a_larger_base_and_slower_turn(tmp_path):
    write_json(tmp_path, config=PUBLISHED["gte-multilingual"][0])
    _, spec = hf_blocks(tmp_path / "config.json", None)
    frequencies = spec.by_layer[0].rope.frequencies
    assert frequencies == pytest.approx((20000 * 8) ** (-np.arange(0, 64, 2) / 64) / 8 ** (2 / 64))


def test_a_server_embeds_and_ranks(made, tmp_path):
    """Whole: text in, tokens, vectors and scores out, of an embedder and a cross-encoder beside each other."""
    embedder, ranker = tmp_path / "embedder", tmp_path / "ranker"
    for folder in (embedder, ranker):
        folder.mkdir()
    save_folder(embedder, "xlm-roberta", made("xlm-roberta"), "cls")
    made("bert", True).save_pretrained(ranker)
    theirs = write_tokenizer(ranker, "bert")
    pieces = tokenizers.Tokenizer.from_file(str(embedder / "tokenizer.json"))
    with server(embedder, ranker) as (_, url):
        answer = json.load(post(f"{url}/v1/embeddings", {"model": "embedder", "input": TEXTS}))
        for text, item in zip(TEXTS, answer["data"]):
            assert cosine(item["embedding"], expected(made("xlm-roberta"), pieces.encode(text).ids, "cls")) > CLOSE - 1e-9
        assert answer["usage"]["prompt_tokens"] == sum(len(pieces.encode(text).ids) for text in TEXTS)
        documents = [document for _, document in PAIRS]
        found = json.load(post(f"{url}/v1/rerank", {"model": "ranker", "query": "the cat", "documents": documents}))["results"]
        scores = [expected_score(made("bert", True), theirs.encode("the cat", document)) for document in documents]
        for result in found:
            assert result["relevance_score"] == pytest.approx(1 / (1 + np.exp(-scores[result["index"]])), abs=1e-5)
        assert [result["index"] for result in found] == sorted(range(len(scores)), key=lambda i: -scores[i])
        with pytest.raises(HTTPError) as caught:
            post(f"{url}/v1/chat/completions", {"model": "embedder", "messages": [{"role": "user", "content": "a"}]})
        assert caught.value.code == 400


def test_a_worker_killed_in_embedding_costs_no_vector(made, tmp_path):
    save_folder(tmp_path, "bert", made("bert"))
    texts = [f"the cat and {number} dogs " * 24 for number in range(200)]

    def embed(url):
        return [item["embedding"] for item in json.load(post(f"{url}/v1/embeddings", {"input": texts, "encoding_format": "base64"}))["data"]]

    with server(tmp_path, "--dtype", "float32") as (_, url):
        wanted, found = embed(url), []
        asking = threading.Thread(target=lambda: found.append(embed(url)))
        asking.start()
        while not (worker := get(f"{url}/stats")["workers"][0])["running"]:
            assert asking.is_alive()
        os.kill(worker["pid"], signal.SIGKILL)
        asking.join()
        assert found == [wanted] and get(f"{url}/stats")["workers"][0]["restarts"] == 1
