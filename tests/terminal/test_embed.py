"""The command `embed`: a file of texts becomes a file of vectors, whole or not at all."""

import json
import os

import numpy as np
import pytest

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
                           ((model[1], source), "embed takes a MODEL, a FILE of JSON lines and -o FILE"), ((model[1], "a", "b", "-o", "x"), "unrecognized arguments: b"),
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
