"""Vectors and scores of tiny random models of each architecture, beside those of sentence-transformers itself, from text on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from encoders import MODELS, OF_PIECES, TEXTS, cosine, make_encoder, save_folder, write_tokenizer
from peer_packages import made_venv
from real_server import post, server
from retrieval import POOLING, QWEN, embedder_folder, write_json

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent
PAIRS = [("the cat", "the dogs and 12 mice"), ("query: abc", "abc xyz. " * 20), ("a", "a")]
DENSE = {"gemma": [(96, 64, "Identity", False), (64, 96, "Identity", False)], "bert": [(48, 64, "Tanh", True)]}
REAL_WORDS = ("The library opens at nine and closes at six. Whoever borrows a book brings it back within a month. " * 12).split()
RANKERS = "bert", "roberta", "xlm-roberta", "mpnet", "modernbert"


@pytest.fixture(scope="module")
def python():
    """The Python of a venv that has sentence-transformers and sees this environment's torch and transformers."""
    python = made_venv("sentence_transformers", "sentence_transformers.txt")
    [packages] = (python.parent.parent / "lib").glob("python*/site-packages")
    (packages / "ours.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return python


def theirs(python, jobs):
    done = subprocess.run([python, HERE / "sentence_transformers_peer.py"], input=json.dumps(jobs), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def name_tokenizer(folder, name):
    """Which class of transformers reads the tokenizer: its own guess, by the model, would make another of it."""
    pad = "<pad>" if name in OF_PIECES else "[PAD]"
    write_json(folder, tokenizer_config={"model_max_length": 512, "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad,
                                         "model_input_names": ["input_ids", *["token_type_ids"] * (name == "bert"), "attention_mask"]})


def write_models(folder):
    """{name: folder} of embedders, {name: folder} of rerankers."""
    embedders, rankers = {}, {}
    for name in MODELS:
        for pooling in ("mean", "cls") if name == "bert" else ("cls",) if name in ("xlm-roberta", "gte") else ("mean",):
            place = embedders[f"{name}-{pooling}"] = folder / f"{name}-{pooling}"
            place.mkdir()
            save_folder(place, name, make_encoder(name), pooling, DENSE.get(name, ()))
            name_tokenizer(place, name)
    embedders["qwen3"] = folder / "qwen3"
    embedders["qwen3"].mkdir()
    embedder_folder(embedders["qwen3"], pooling=POOLING | {"word_embedding_dimension": QWEN["hidden_size"]})
    for name in RANKERS:
        place = rankers[name] = folder / f"rank-{name}"
        place.mkdir()
        make_encoder(name, ranks=True).save_pretrained(place)
        write_tokenizer(place, name)
        name_tokenizer(place, name)
    raw = rankers["bert raw"] = folder / "rank-bert-raw"       # as ms-marco's, whose scores are no probabilities
    raw.mkdir()
    make_encoder("bert", ranks=True).save_pretrained(raw)
    write_tokenizer(raw, "bert")
    name_tokenizer(raw, "bert")
    config = json.loads((raw / "config.json").read_text())
    write_json(raw, config=config | {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.0.1"}})
    return embedders, rankers


def test_vectors_of_the_real_minilm_are_sentence_transformers_own(python, default_embedder_path):
    """Texts that it reads whole, of 1 to 256 tokens."""
    texts = [*TEXTS, "日本の首都は東京です。", *[" ".join(REAL_WORDS[:count]) for count in (1, 7, 60, 200)]]
    [wanted] = theirs(python, [{"folder": str(default_embedder_path), "texts": texts}])
    with server(default_embedder_path, "--dtype", "float32") as (_, url):
        answer = json.load(post(f"{url}/v1/embeddings", {"input": texts}))["data"]
    assert min(cosine(item["embedding"], vector) for item, vector in zip(answer, wanted, strict=True)) > 1 - 1e-6


def test_vectors_are_sentence_transformers_own(python, tmp_path):
    """Scores are too."""
    embedders, rankers = write_models(tmp_path)
    jobs = [{"folder": str(place), "texts": TEXTS} for place in embedders.values()]
    jobs += [{"folder": str(embedders["qwen3"]), "texts": TEXTS, "prompt_name": "query"}]
    jobs += [{"folder": str(place), "pairs": PAIRS} for place in rankers.values()]
    found = theirs(python, jobs)
    skipped, wrong = {}, []
    with server(*embedders.values(), *rankers.values(), "--dtype", "float32") as (_, url):
        for job, wanted in zip(jobs, found):
            name = Path(job["folder"]).name
            if isinstance(wanted, str):
                skipped[name] = wanted
            elif "pairs" in job:
                for (query, document), score in zip(PAIRS, wanted):
                    body = {"model": name, "text_1": query, "text_2": document}
                    ours = json.load(post(f"{url}/v1/score", body))["data"][0]["score"]
                    wrong += [(name, query, ours, score)] if abs(ours - score) > 1e-4 else []
            else:
                more = {"prompt_name": job["prompt_name"]} if "prompt_name" in job else {}
                answer = json.load(post(f"{url}/v1/embeddings", {"model": name, "input": TEXTS, **more}))["data"]
                for text, item, vector in zip(TEXTS, answer, wanted):
                    wrong += [(name, text, cosine(item["embedding"], vector))] if cosine(item["embedding"], vector) < 0.99999 else []
    assert (wrong, skipped) == ([], {})
