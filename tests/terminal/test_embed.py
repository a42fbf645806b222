"""The command `embed`: a file of texts becomes a file of vectors, whole or not at all."""

import json
import os

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from chatlm.common.core import decode_core
from retrieval import embedder_folder, last_state, make_qwen, reranker_folder, unit, write_qwen_tokenizer
from run_here import run_forked, run_here


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = make_qwen()
    return made, embedder_folder(tmp_path_factory.mktemp("embedder"), made, sentence_bert_config={"max_seq_length": 60})


def embed(*words, given=""):
    """(exit status, stdout, the last line of stderr). Beside other tests the usual niceness of 19 would take half a minute."""
    ended = run_forked("embed", *words, "--dtype", "float32", "--nice", "0", given=given)
    return ended.returncode, ended.stdout, (ended.stderr.splitlines() or [""])[-1]


@pytest.fixture
def refusal(capfd):
    """The same of a command that this process runs."""
    def refusal(*words):
        status, out, said = run_here(capfd, "embed", *words, "--dtype", "float32", "--nice", "0")
        return status, out, (said.splitlines() or [""])[-1]
    return refusal


def write_lines(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def expected(made, folder, text):
    tokenizer = write_qwen_tokenizer(folder)
    return unit(last_state(made, tokenizer.encode(text).ids))


def test_vectors_keep_the_order_of_the_texts(model, tmp_path):
    """One vector a line, or numpy's format, in the order of the texts."""
    made, folder = model
    texts = [f"text {number} " * (number % 4 + 1) for number in range(600)]          # in three requests
    source = write_lines(tmp_path / "texts.jsonl", *[{"id": 5, "text": text} if number % 2 else text for number, text in enumerate(texts)])
    source.write_text("\n" + source.read_text().removesuffix("\n"))         # an empty line, and no end of the last one
    status, out, last = embed(folder, source, "-o", tmp_path / "vectors.npy")
    assert (status, out) == (0, "") and "600 vectors of 64 numbers" in last
    array = np.load(tmp_path / "vectors.npy")
    assert array.shape == (600, 64) and array.dtype == np.dtype("<f4") and array.flags.c_contiguous
    assert embed(folder, source, "-o", tmp_path / "vectors.jsonl")[0] == 0
    lines = np.array([json.loads(line) for line in (tmp_path / "vectors.jsonl").read_text().splitlines()], "<f4")
    assert lines.shape == array.shape and np.abs(lines - array).max() <= (0 if decode_core() else 1e-5)
    for number in (0, 1, 255, 256, 599):
        assert array[number] @ expected(made, tmp_path, texts[number]) > 0.99999
    assert sorted(path.name for path in tmp_path.iterdir() if "part" in path.name) == []


def test_embed_reads_stdin_with_all_its_options(model, tmp_path):
    """Prompts, dimensions and cuts, from stdin to stdout."""
    made, folder = model
    status, out, _ = embed(folder, "-", "-o", "-", "--prompt-name", "query", "--dimensions", 40, "--truncate", given=json.dumps("x" * 500))
    [vector] = map(json.loads, out.splitlines())
    prompt = "Instruct: Find it\nQuery:"
    whole = last_state(made, write_qwen_tokenizer(tmp_path).encode(prompt + "x" * (59 - len(prompt))).ids)
    assert status == 0 and len(vector) == 40 and np.array(vector) @ unit(whole[:40]) > 0.99999


@pytest.mark.parametrize("lines, words, message, wanted", [
    (["a", "b", 5], [], "line 3 is 5; it must be a text that is not empty, or an object with such a `text`", 2), ([{"txt": "a"}], [], "line 1 is an object of 1", 2),
    (["a", " "], [], 'line 2 is " "', 2), (["a", "x" * 100], [], "lines 1 to 2 of", 1), (["a"], ["--dimensions", 65], "dimensions must be from 32 to 64, not 65", 1),
    (["a"], ["--prompt-name", "no\x07ne"], 'prompt_name must be one of "query", "document"', 1), (["a"], ["--url", "x"], "--url is a flag of", 2)])
def test_a_wrong_line_is_named_and_leaves_no_file(lines, words, message, wanted, model, tmp_path, refusal):
    """What cannot be embedded is said with its line and leaves no file."""
    source, target = write_lines(tmp_path / "texts.jsonl", *lines), tmp_path / "vectors.npy"
    status, _, last = refusal(model[1], source, "-o", target, *words)
    assert status == wanted and message in last, last
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_embed_refuses_bad_files_and_models(model, tmp_path, refusal):
    """Files that cannot be read or written and other models are refused."""
    source = write_lines(tmp_path / "texts.jsonl", "a")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('"a"\n{"text": \n')
    made = reranker_folder(tmp_path)
    for words, message in (((model[1], tmp_path / "none", "-o", "x"), "No such file"), ((model[1], source, "-o", tmp_path / "no" / "x"), "-o "),
                           ((model[1], source), "embed takes a FILE of JSON lines and -o FILE"), ((model[1], "a", "b", "-o", "x"), "unrecognized arguments: a"),
                           ((model[1], "-o", tmp_path / "x"), f"; {model[1]} was taken as FILE"), ((source,), f"; {source} was taken as FILE"),
                           ((model[1], broken, "-o", tmp_path / "x"), "line 2 is not valid JSON"), ((made, source, "-o", tmp_path / "x"), "it makes no vectors of texts")):
        status, _, last = refusal(*words)
        assert status and message in last, (words, last)
    assert not (tmp_path / "x").exists()


def test_embed_refuses_an_output_of_a_wrong_kind(model, tmp_path, small_disk, refusal):
    """An output is no device, no folder and not the input."""
    source, link = write_lines(tmp_path / "texts.jsonl", *["a"] * 300), tmp_path / "link"
    link.symlink_to(source)
    os.mkfifo(tmp_path / "fifo")
    for name, message in ((source, "is the input"), (link, "is the input"), (".", "is a folder"), (tmp_path, "is a folder"), ("/", "is a folder"), (tmp_path / "fifo", "must be a regular file"),
                          ("/dev/null", "must be a regular file")):
        status, _, last = refusal(model[1], source, "-o", name)
        assert status == 2 and message in last, last
    disk, sized = small_disk
    sized("64k")
    for name in ("vectors.npy", "vectors.jsonl"):
        status, _, last = refusal(model[1], source, "-o", disk / name)
        assert status == 2 and f"-o {disk / name}: No space left on device" in last, last
    assert os.listdir(disk) == [] and source.read_text().count("a") == 300 and not os.path.isfile("/dev/null")


# The default embedder: the real all-MiniLM-L6-v2

SENTENCES = ["The cat sits outside", "A man is playing guitar", "Ein Mann spielt Gitarre", "x", "日本の首都は東京です。", "Two words. " * 80]


def of_transformers(folder, texts):
    """What sentence-transformers computes of each text: the mean of the last hidden states, of length 1."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vectors = []
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=256)).last_hidden_state
        vectors.append(unit(states[0].mean(0).numpy().astype(np.float64)))
    return np.stack(vectors)


@pytest.fixture(scope="module")
def wanted(default_embedder_path):
    return of_transformers(default_embedder_path, SENTENCES)


@pytest.mark.parametrize("words", [("FILE",), ("--texts", "FILE"), ("FOLDER", "FILE"), ("FOLDER", "--texts", "FILE")])
def test_one_word_is_the_file_and_the_default_embedder_reads_it(words, wanted, default_embedder_path, tmp_path):
    source = write_lines(tmp_path / "texts.jsonl", *SENTENCES)
    places = {"FILE": source, "FOLDER": default_embedder_path}
    status, out, last = embed(*[places.get(word, word) for word in words], "-o", tmp_path / "vectors.npy", "--truncate")
    assert status == 0 and "6 vectors of 384 numbers" in last, last
    vectors = np.load(tmp_path / "vectors.npy").astype(np.float64)
    assert (vectors * wanted).sum(1).min() > 1 - 1e-6


def test_the_default_embedder_stands_beside_checkpoints(wanted, nanochat_fixtures, tmp_path, monkeypatch):
    """A checkpoint of nanochat is what other commands open where no MODEL is named."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(nanochat_fixtures / "gen5"))
    status, out, _ = embed("-", "-o", "-", given=json.dumps(SENTENCES[0]))
    assert status == 0 and unit(np.array(json.loads(out))) @ wanted[0] > 1 - 1e-6


def test_the_default_embedder_that_cannot_be_had_is_one_line(tmp_path, monkeypatch, refusal):
    """Neither pip nor the hub has it."""
    source = write_lines(tmp_path / "texts.jsonl", "a")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    status, _, last = refusal(source, "-o", tmp_path / "x", "--no-downloads")
    assert status == 2 and "the default embedder is not here, and --no-downloads is set" in last, last
    assert "Nor is it here from the hub: " in last and "sentence-transformers/all-MiniLM-L6-v2" in last
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["texts.jsonl"]
