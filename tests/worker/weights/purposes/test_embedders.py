"""Qwen3-Embedding and Qwen3-Reranker from folders and GGUF files: what their files say, and vectors and scores as transformers computes them."""

import base64
import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from chatlm.common.errors import ConfigError
from chatlm.common.messages.requests import AnswerParams, Request, Retrieval, SamplingParams
from chatlm.common.text.load import open_tokenizer
from chatlm.front.admission.prompts import PromptMaker
from chatlm.worker.weights.purposes.embedders import frame_of
from engines import load, make_engine, pieces
from families import make_model, save, write_tokenizer
from retrieval import (
    END, MODULES, POOLING, YES, NO, embedder_folder, gguf_of, last_state, make_qwen, reranker_folder, score, unit, write_qwen_tokenizer)
from works import assignment

TEXTS = ["The cat sat on the mat.", "a", "Stock markets fell. " * 12, "<|endoftext|> is a name here"]


@pytest.fixture(scope="module")
def qwen():
    return make_qwen("Qwen3ForCausalLM", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """As its makers use it: the library alone. Names of special tokens are text, as they are to a server."""
    tokenizer = write_qwen_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizer.encode_special_tokens = True
    return tokenizer


async def ids_of(path, texts, pooling, **retrieval):
    """The prompts that a front makes of texts."""
    maker = PromptMaker(open_tokenizer(load(path).text), load(path).context_length)
    request = Request(prompts=tuple(texts), params=AnswerParams(pooling=pooling), retrieval=Retrieval(**retrieval))
    return (await maker.admit(request)).prompt_ids


def numbers(engine, works):
    """The vector, or the score, of each."""
    found = pieces(engine, works)
    return [np.frombuffer(base64.b64decode(found[work.id].others[0].vector), "<f4") for work in works]


def work(name, ids, pooling, **more):
    return assignment(name, tuple(ids), SamplingParams(), 0, pooling=pooling, **more)


@pytest.mark.parametrize("form", ["folder", "folder without a head", "gguf", "q8_0"])
async def test_qwen3_embedding_s_vectors_match_transformers(form, qwen, tokenizer, tmp_path):
    """The vectors of Qwen3-Embedding are those of transformers of the end token."""
    model = make_qwen(tie_word_embeddings="without" not in form)
    path = tmp_path / "tiny.gguf"
    if form.startswith("folder"):
        path = embedder_folder(tmp_path, model)
    else:
        model = make_qwen("Qwen3ForCausalLM", scale=0.08, tie_word_embeddings=True) if form == "q8_0" else qwen     # else Q8_0's rounding alone leaves 0.998
        gguf_of(path, model, form == "q8_0", **{"qwen3.pooling_type": 3, "general.name": "Qwen3 Embedding 0.6B"})
    embedder = load(path).text.embedder
    assert (embedder.pooling, embedder.size, embedder.least, embedder.ends) == ("last", 64, 32, (END,))
    assert dict(embedder.prompts)["query"].startswith("Instruct: ") and load(path).text.chat_template is None
    engine = make_engine(path, num_pages=100, max_batch=4, as_stored=form == "q8_0")
    ids = await ids_of(path, TEXTS, "last")
    assert [list(each) for each in ids] == [tokenizer.encode(text).ids for text in TEXTS]
    for own, vector in zip(ids, numbers(engine, [work(f"{i}", own, "last") for i, own in enumerate(ids)]), strict=True):
        assert vector @ unit(last_state(model, list(own))) > (0.999 if form == "q8_0" else 0.99999)


@pytest.mark.parametrize("form", ["folder", "gguf of a chat model", "gguf", "classifier"])
async def test_qwen3_reranker_s_scores_are_its_makers(form, qwen, tokenizer, tmp_path):
    """The scores of Qwen3-Reranker are those of its makers' code."""
    rows = qwen.model.embed_tokens.weight.detach()[[NO, YES]].numpy()
    path = tmp_path / "tiny.gguf"
    if form == "folder":
        path = reranker_folder(tmp_path, qwen)
    elif form == "classifier":      # Qwen3ForSequenceClassification, of one row
        path = reranker_folder(tmp_path, qwen)
        from safetensors.numpy import load_file, save_file
        state = {name: tensor for name, tensor in load_file(path / "model.safetensors").items()}
        save_file(state | {"score.weight": rows[1:] - rows[:1]}, path / "model.safetensors")
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3ForSequenceClassification"], "num_labels": 1}))
        path = path.rename(tmp_path / "other")
    elif form == "gguf":
        gguf_of(path, qwen, classes=rows, **{"qwen3.pooling_type": 4, "qwen3.classifier.output_labels": ["no", "yes"]})
    else:
        gguf_of(path, qwen, **{"general.name": "Qwen3 Reranker 0.6B"})
    assert load(path).text.embedder.pooling == "rank"
    engine, query = make_engine(path, num_pages=200, max_batch=4), "where is {document}? <|im_end|>"
    tokenizer = write_qwen_tokenizer(tmp_path, ends=False)
    documents = ["in the sea", "{query} and {instruction}", ""]
    ids = await ids_of(path, documents, "rank", queries=(query,))
    found = numbers(engine, [work(f"{i}", own, "rank") for i, own in enumerate(ids)])
    for own, document, [mine] in zip(ids, documents, found, strict=True):
        tokenizer.encode_special_tokens = False
        if "<|" not in query:
            assert len(own) == score(qwen, tokenizer, query, document)[1]
        text = query.replace("<|im_end|>", "<|im_\ue000end|>")      # to its makers' tokenizer, a name in a query is the token
        theirs, _ = score(qwen, Escaped(tokenizer), text, document)
        assert abs(mine - theirs) < 1e-4


class Escaped:
    """Encodes what is before and after U+E000 as text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def encode(self, text):
        self.tokenizer.encode_special_tokens = "\ue000" in text
        return self.tokenizer.encode(text.replace("\ue000", ""))


async def test_vectors_and_scores_ignore_their_neighbours(qwen, tmp_path):
    """Vectors and scores do not depend on what is computed beside them."""
    folder = reranker_folder(tmp_path, qwen)
    engine = make_engine(folder, num_pages=400, max_batch=8, prefill_chunk=64)
    documents = [f"document number {i} " * (i % 7 + 1) for i in range(24)]
    ids = await ids_of(folder, documents, "rank", queries=("which?",))
    works = [work(f"{i}", own, "rank") for i, own in enumerate(ids)]
    alone = []
    for each in works:
        engine.pool.forget_cached()
        alone += numbers(engine, [each])
    engine.pool.forget_cached()
    for _ in range(2):      # cold, then with what is kept of the first time
        together = numbers(engine, works)
        if engine.kernels.row_invariant:
            assert [each.tobytes() for each in together] == [each.tobytes() for each in alone]
        assert max(abs(a - b).max() for a, b in zip(together, alone)) < 1e-5


def test_a_vector_is_cut_before_it_is_scaled(tmp_path):
    """A vector is cut before it is scaled, and stays as it is if asked."""
    engine = make_engine(embedder_folder(tmp_path), num_pages=60, max_batch=4)
    ids = [5, 6, 7, END]
    whole, raw, cut = numbers(engine, [work("a", ids, "last"), work("b", ids, "last", normalized=False), work("c", ids, "last", dimensions=40)])
    assert len(whole) == len(raw) == 64 and len(cut) == 40 and abs(np.linalg.norm(raw) - 1) > 0.1
    assert np.abs(unit(raw) - whole).max() < 1e-6 and np.abs(unit(whole[:40]) - cut).max() < 1e-6


@pytest.mark.parametrize("changes, pooling", [
    ({}, None), ({"qwen3.pooling_type": 0, "tokenizer.ggml.add_eos_token": True}, None), ({"qwen3.attention.causal": True}, None),
    ({"qwen3.pooling_type": 1}, ("mean", ())), ({"qwen3.pooling_type": 1, "tokenizer.ggml.add_eos_token": True}, ("mean", (END,))),
    ({"qwen3.pooling_type": 3}, ("last", (END,))), ({"qwen3.pooling_type": 3, "tokenizer.ggml.add_eos_token": False}, ("last", ()))])
def test_a_gguf_s_pooling_and_end_token_are_honoured(changes, pooling, qwen, tmp_path):
    embedder = load(gguf_of(tmp_path / "tiny.gguf", qwen, **changes)).text.embedder
    assert (embedder and (embedder.pooling, embedder.ends)) == pooling


def test_an_odd_description_of_a_reranker_is_refused(qwen, tmp_path):
    rows, rank = np.zeros((3, 64), np.float32), {"qwen3.pooling_type": 4}
    for changes, words in (
            (dict(classes=rows), r"cls.output.weight is \(3, 64\) and .*output_labels is a list of 2"),
            (dict(classes=rows[:2], **{"qwen3.classifier.output_labels": ["a", "b"]}), "must have a row of 64 each"),
            ({"tokenizer.chat_template.rerank": "{query} {query} {document}"}, "rerank` is .*; it must have {query} and then {document}, once each"),
            ({"tokenizer.chat_template.rerank": "no places"}, "once each, and no other braces")):
        with pytest.raises(ConfigError, match=words):
            load(gguf_of(tmp_path / f"{len(words)}.gguf", qwen, **rank, **changes))
    folder = reranker_folder(tmp_path, qwen)
    config = json.loads((folder / "config.json").read_text())
    for value, words in (("yes", "it must be a list of two"), (["yes", "nonsense"], '"nonsense" is not one token'), (["a", 5], "it must be a list of two")):
        (folder / "config.json").write_text(json.dumps(config | {"classifier_from_token": value}))
        load.cache_clear()
        with pytest.raises(ConfigError, match=words):
            load(folder)


LAST = POOLING | {"pooling_mode_lasttoken": True}


@pytest.mark.parametrize("changes, words", [
    ({"pooling": LAST | {"pooling_mode_mean_tokens": True}}, "pooling_mode is a list of 2; of a model with causal attention it must be mean or lasttoken"),
    ({"pooling": {"pooling_mode": "weightedmean"}}, 'pooling_mode is "weightedmean"'), ({"pooling": {"pooling_mode": "cls"}}, 'pooling_mode is "cls"'),
    ({"pooling": dict.fromkeys(POOLING, False)}, "pooling_mode is"), ({"pooling": {"pooling_mode": 5}}, "pooling_mode is 5"),
    ({"pooling": LAST | {"include_prompt": "no"}}, 'include_prompt is "no"; it must be true or false'),
    ({"config_sentence_transformers": {"truncate_dim": 65}}, "truncate_dim is 65; it must be an integer from 1 to 64"),
    ({"config_sentence_transformers": {"truncate_dim": "all"}}, 'truncate_dim is "all"; it must be'),
    ({"modules": [*MODULES, {"type": "sentence_transformers.models.Dense", "path": "3_Dense"}]}, r"modules.json: \[3\].type is .*Dense.*this server has"),
    ({"modules": [*MODULES, {"type": "evil.Module\x07", "path": ""}]}, r"\[3\].type is \"evil.Module\\u0007\""),
    ({"modules": [{**MODULES[0], "path": "0_Transformer"}]}, r"\[0\].type is .* in 0_Transformer"),
    ({"modules": [*MODULES, {"type": "a.Pooling", "path": "../../etc"}]}, r"\[3\].path is \"../../etc\"; it must be the name of a folder there"),
    ({"modules": [{"type": "a.Pooling", "path": "a\0b"}]}, r"\[0\].path is"), ({"modules": [{"type": "a.Pooling", "path": 5}]}, r"\[0\].path is 5"),
    ({"modules": {"a": 1}}, "modules.json holds an object of 1; it must hold a list of objects"),
    ({"config_sentence_transformers": {"prompts": ["a"]}}, "prompts is a list of 1"), ({"config_sentence_transformers": {"prompts": {"a": 5}}}, "prompts.a is 5"),
    ({"config_sentence_transformers": {"prompts": {"a": "x" * 3000}}}, "prompts.a has 3,000 characters; 2,000 are the most allowed"),
    ({"config_sentence_transformers": {"prompts": {"a": "x"}, "default_prompt_name": "b"}}, 'default_prompt_name is "b"; it must be one of a'),
    ({"config_sentence_transformers": {"similarity_fn_name": "hamming"}}, "similarity_fn_name is"),
    ({"sentence_bert_config": {"do_lower_case": True}}, "do_lower_case is true"), ({"sentence_bert_config": {"max_seq_length": 0}}, "max_seq_length is 0")])
def test_a_folder_of_another_kind_of_vector_is_refused(changes, words, tmp_path):
    """Its vectors are made otherwise than here."""
    with pytest.raises(ConfigError, match=words) as caught:
        load(embedder_folder(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_folder_s_prompts_and_lengths_are_read(tmp_path):
    """Its similarity is read too."""
    folder = embedder_folder(tmp_path, sentence_bert_config={"max_seq_length": 40, "do_lower_case": False}, config_sentence_transformers={
        "prompts": {"query": "q: "}, "default_prompt_name": "query", "similarity_fn_name": "dot"})
    embedder = load(folder).text.embedder
    assert (embedder.longest, embedder.prompts, embedder.default_prompt, embedder.similarity) == (40, (("query", "q: "),), "query", "dot")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"matryoshka_dimensions": [48, 16]}))
    load.cache_clear()
    assert load(folder).text.embedder.least == 16


def test_a_tokenizer_s_frame_is_around_texts(tmp_path):
    """The frame of a tokenizer is what it puts around texts."""
    from tokenizers.processors import TemplateProcessing
    write_tokenizer(tmp_path)
    pipeline = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    pipeline.post_processor = TemplateProcessing(single="<s> $A <|end|>", pair="<s> $A <|end|> <|end|> $B <|end|>", special_tokens=[("<s>", 256), ("<|end|>", 257)])
    assert frame_of(tmp_path, pipeline) == ((256,), (257, 257), (257,))
    pipeline.post_processor = TemplateProcessing(single="<s>", pair="$A $B", special_tokens=[("<s>", 256)])
    with pytest.raises(ConfigError, match="it must only put others around them"):
        frame_of(tmp_path, pipeline)


def test_a_chat_model_s_folder_stays_one(tmp_path):
    """Also where its names lack `model.`, and where its tokenizer ends texts."""
    save(make_model("qwen3"), tmp_path)
    assert load(tmp_path).text.embedder is None and load(tmp_path).ranking is None
