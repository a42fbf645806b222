"""Answers, logprobs and embeddings of a worker on a CPU are those of one that computed with torch's tensors.

bits.json was written by the program of commit cafc3b0, whose workers imported torch, by `CHAT_SERVER_DIR=THAT_CHECKOUT python
tests/worker/test_bits.py`. Texts are equal; numbers to 1e-5, because numpy's logarithm depends on the CPU. CI runs this twice: here,
and in an environment without torch."""

import importlib.util
import json
import re
from pathlib import Path

import numpy
import psutil
import pytest
from safetensors.numpy import save_file

from generations import GENERATIONS
from nightly import by_day
from openai_routes import TEMPLATE_SYSTEM
from real_server import get, post, server

NOTED = Path(__file__).parent / "bits.json"
CASES = {**{name: (name,) for name in GENERATIONS}, "q8_0": ("gen4", "--quantize", "q8_0"),
         "float32": ("gen3", "--dtype", "float32"), "two ranks": ("gen5", "--tp", "2"), "two stages": ("gen5", "--pp", "2"), "GGUF": ("default",),
         "GGUF, q8_0 KV": ("default", "--kv-cache-dtype", "q8_0"), "GGUF, adapter": ("default", "--adapter", "tuned=ADAPTER"),
         "GGUF, merged adapter": ("default", "--lora", "ADAPTER")}
PROMPT = "The capital of France is Paris. The capital of Japan is"
SCHEMA = {"type": "json_schema", "json_schema": {"name": "city", "schema": {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 12}, "size": {"type": "integer"}}, "required": ["city", "size"]}}}


def adapter(folder):
    """A LoRA adapter of the default model with random matrices."""
    dice, tensors = numpy.random.RandomState(3), {}
    for layer in range(30):
        for module, rows, columns in (("self_attn.q_proj", 576, 576), ("self_attn.v_proj", 192, 576), ("mlp.down_proj", 576, 1536)):
            name = f"base_model.model.model.layers.{layer}.{module}.lora_"
            tensors[f"{name}A.weight"] = dice.standard_normal((4, columns)).astype(numpy.float32) / 8
            tensors[f"{name}B.weight"] = dice.standard_normal((rows, 4)).astype(numpy.float32) / 8
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": [
        "q_proj", "v_proj", "down_proj"], "base_model_name_or_path": None}))
    return folder


def answers(url, model, is_default):
    """What this server says to a few questions: texts, and numbers rounded to six places. Of what the server or a model's files may say about
    drawing and the system prompt, all is asked for, as it was when the answers were noted."""
    top_p = 0.9 if is_default else 1
    city = [*[TEMPLATE_SYSTEM] * is_default, {"role": "user", "content": "A city?"}]
    drawing = {"top_p": top_p, "min_p": 0, "frequency_penalty": 0, "presence_penalty": 0}

    def ask(route, **body):
        return json.load(post(url + route, {"model": model, "seed": 5, **(drawing if "temperature" in body else {}), **body}))

    greedy = ask("/v1/completions", prompt=PROMPT, max_tokens=24, temperature=0, logprobs=3)["choices"][0]
    drawn = ask("/v1/completions", prompt=PROMPT, max_tokens=24, temperature=1.2, top_k=40, repetition_penalty=1.1, n=2)["choices"]
    json_text = ask("/v1/chat/completions", messages=city, max_tokens=48, temperature=0.8, response_format=SCHEMA)
    echoed = ask("/v1/completions", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)["choices"][0]
    embedded = ask("/v1/embeddings", input=PROMPT)["data"][0]["embedding"]
    return {"greedy": greedy["text"], "drawn": [each["text"] for each in drawn], "json": json_text["choices"][0]["message"]["content"],
            "logprobs": rounded(greedy["logprobs"]["token_logprobs"]), "scores": rounded(echoed["logprobs"]["token_logprobs"][1:]),
            "embedding": rounded(embedded[:16])}


def rounded(numbers):
    return [round(number, 6) for number in numbers]


def said(case, fixtures, default, folder):
    """The answers of a server for this case, and the files that its workers have mapped."""
    model, *flags = CASES[case]
    flags = [flag.replace("ADAPTER", str(adapter(folder / "lora"))) for flag in flags]
    with server(default if model == "default" else fixtures / model, *flags, forked="front") as (process, url):
        names = [each["id"] for each in get(url + "/v1/models")["data"]]
        found = answers(url, names[-1], model == "default")
        mapped = {row.path for child in psutil.Process(process.pid).children(recursive=True) for row in child.memory_maps()}
    return found, mapped


BY_DAY = ("gen5", "two ranks", "GGUF, merged adapter") if importlib.util.find_spec("torch") else CASES      # CI's other run has all


@pytest.mark.parametrize("case", by_day(CASES, *BY_DAY))
def test_a_worker_without_torch_answers_the_same(case, nanochat_fixtures, default_model_path, tmp_path):
    found, mapped = said(case, nanochat_fixtures, default_model_path, tmp_path)
    noted = json.loads(NOTED.read_text())[case]
    for name, value in noted.items():
        assert found[name] == (pytest.approx(value, abs=1e-5) if isinstance(value[0], float) else value), name
    assert any("decode_core" in path for path in mapped) and not [path for path in mapped if re.search("/torch/|libtorch", path)]


if __name__ == "__main__":
    import sys
    import tempfile
    from chatlm.common.hub.default_model import fetch_default_model
    fixtures = Path(__file__).resolve().parents[1] / "fixtures/nanochat"
    with tempfile.TemporaryDirectory() as folder:
        cases = {case: said(case, fixtures, fetch_default_model(), Path(folder))[0] for case in CASES}
    NOTED.write_text("{%s}\n" % ",\n".join(f"{json.dumps(case)}: {json.dumps(found)}" for case, found in cases.items()))
    sys.stdout.write(f"{len(cases)} cases\n")
