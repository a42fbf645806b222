"""Models of the Hugging Face hub: `python chat_server.py org/name` as a user runs it, beside a server on loopback that plays the hub."""

import json
import os
import resource
import subprocess
import sys

import families
import pytest
import real_server
from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import resolve_model
from chatlm.common.hub.repository import hub_files, hub_model, mmproj_for
from chatlm.common.hub.short_names import SHORT_NAMES
from fake_hub import fake_hub
from forked import run_command
from nightly import by_day
from tiny_gguf import LLAMA_NUMBERS, gguf_bytes, random_llama, small_gguf_metadata

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
TINY = gguf_bytes({**LLAMA_NUMBERS, **small_gguf_metadata("gpt-2"), "tokenizer.chat_template": TEMPLATE}, random_llama())
LARGE_NUMBERS = LLAMA_NUMBERS | {"llama.feed_forward_length": 8192}      # the library keeps no less than 10 MB of a download
LARGE = gguf_bytes({**LARGE_NUMBERS, **small_gguf_metadata("gpt-2"), "tokenizer.chat_template": TEMPLATE}, random_llama(numbers=LARGE_NUMBERS))
FLAGS = ("--kv-cache-memory", "8M")


def environment(folder, hub, **more):
    """The variables of a user whose hub this is, with a cache of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "CHAT_SERVER_"))}
    return kept | {"HF_ENDPOINT": hub if isinstance(hub, str) else hub.url, "HF_HOME": str(folder / "hf"), **more}


def refused(model, env, limit=None):
    """What a server that cannot get its model says: one line, and exit status 2."""
    words = [model, "--port", "0", "--host", "127.0.0.1", *FLAGS]
    if limit is None and sys.platform == "linux":
        done = run_command(real_server.SCRIPT, words, env)
    else:
        done = subprocess.run([sys.executable, str(real_server.SCRIPT), *words], env=env, capture_output=True, text=True, timeout=150, stdin=subprocess.DEVNULL,
                              preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))
    lines = [line for line in done.stderr.splitlines() if line.startswith("chat_server: ")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


def answer(url, model="default"):
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0}
    return json.loads(real_server.post(url + "/v1/chat/completions", body).read())


@pytest.mark.slow
def test_an_id_becomes_a_server_that_answers(tmp_path):
    """The next start needs no hub."""
    log = []
    with fake_hub(org__tiny={"README.md": b"# x", "tiny-Q4_K_M.gguf": TINY, "tiny-Q8_0.gguf": TINY[:100]}) as hub:
        env = environment(tmp_path, hub, HF_TOKEN="hf_mine")
        with real_server.server("org/tiny", *FLAGS, env=env, log=log) as (_, url):
            assert real_server.get(url + "/v1/models")["data"][0]["id"] == "org/tiny"
            assert answer(url, "org/tiny")["usage"]["completion_tokens"] == answer(url, "tiny")["usage"]["completion_tokens"] == 4
        assert hub.fetched() == ["tiny-Q4_K_M.gguf", "files/org/tiny/tiny-Q4_K_M.gguf"]
        assert {sent for _, name, _, sent in hub.requests if name in ("api/models/org/tiny", "tiny-Q4_K_M.gguf")} == {"Bearer hf_mine"}
        text = "".join(log)
        assert "downloading org/tiny" in text and "org/tiny of the Hugging Face hub: GGUF file" in text
        hub.requests.clear()
        with real_server.server("org/tiny", *FLAGS, env=env) as (_, url):       # cached: only looked for
            answer(url)
        assert hub.fetched() == [] and hub.requests
        hub.requests.clear()
        with real_server.server("org/tiny", *FLAGS, env=env | {"HF_HUB_OFFLINE": "1"}) as (_, url):
            answer(url)
        assert hub.requests == []
    log = []
    gone = env | {"HF_ENDPOINT": "http://localhost:9"}
    with real_server.server("org/tiny", *FLAGS, env=gone, log=log) as (_, url):
        answer(url)
    assert "cannot be reached" in "".join(log) and "serving the cached files of org/tiny" in "".join(log)


@pytest.mark.parametrize("model, file", [pytest.param("org/many:b-Q8_0.gguf", "b-Q8_0.gguf", marks=pytest.mark.slow), ("org/many:q8_0", "b-Q8_0.gguf"),
                                         pytest.param("org/many:sub/c.gguf", "sub/c.gguf", marks=pytest.mark.slow)])
def test_a_file_of_several_is_named_after_a_colon(tmp_path, model, file):
    with fake_hub(org__many={"a-Q4_0.gguf": b"x", "b-Q8_0.gguf": b"x", "sub/c.gguf": b"x"}) as hub:
        hub.repositories["org/many"][file] = TINY
        with real_server.server(model, *FLAGS, env=environment(tmp_path, hub)) as (_, url):
            assert real_server.get(url + "/v1/models")["data"][0]["id"] == model
            answer(url, model)
        assert set(hub.fetched()) == {file, f"files/org/many/{file}"}


@pytest.mark.slow
def test_a_short_name_is_another_name_of_the_model(tmp_path):
    with fake_hub(Qwen__Qwen3_06={}) as hub:
        hub.repositories[SHORT_NAMES["qwen3-0.6b"]] = {"any.gguf": TINY}
        with real_server.server("qwen3:0.6b", *FLAGS, env=environment(tmp_path, hub)) as (_, url):
            for name in ("qwen3:0.6b", "Qwen/Qwen3-0.6B", "Qwen3-0.6B"):
                assert answer(url, name)["model"] == "Qwen/Qwen3-0.6B"
            with pytest.raises(real_server.urllib.error.HTTPError, match="404"):
                answer(url, "qwen3-8b")


def test_embedders_and_rerankers_have_short_names():
    """With their short names come the files of their modules."""
    wanted = ("all-minilm", "bge-m3", "nomic-embed-text", "nomic-embed-text-v2-moe", "mxbai-embed-large", "snowflake-arctic-embed", "embeddinggemma", "qwen3-embedding",
              "multilingual-e5", "bge-reranker-v2-m3", "qwen3-reranker")
    assert [name for name in wanted if name not in SHORT_NAMES] == []
    assert hub_model("BGE-M3") == ("gpustack/bge-m3-GGUF", "Q8_0") and hub_model("all-minilm:l12") == ("sentence-transformers/all-MiniLM-L12-v2", "")
    needed = ["1_Pooling/config.json", "config.json", "modules.json", "2_Dense/config.json", "2_Dense/model.safetensors", "3_Dense/config.json", "3_Dense/model.safetensors",
              "model.safetensors"]
    found = hub_files("org/name", "", [*needed, "onnx/model.onnx", "2_Dense/pytorch_model.bin", "openvino/model.safetensors", "README.md"])
    assert sorted(found) == sorted(needed) and found.index("2_Dense/model.safetensors") > found.index("modules.json")


def test_a_folder_comes_with_shards_and_sampling(tmp_path):
    """A folder of safetensors comes with its shards and its makers' sampling."""
    model = families.make_model("qwen3")
    model.generation_config.update(do_sample=True, temperature=0.6, top_k=20)
    folder = families.save(model, tmp_path / "made", max_shard_size="300KB")
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"README.md": b"#", "pytorch_model.bin": b"x", "x.gguf": b"x"}
    shards = {name for name in files if name.startswith("model-")}
    assert len(shards) > 1
    with fake_hub(org__folder=files) as hub:
        env = environment(tmp_path, hub)
        with real_server.server("org/folder", "--dtype", "float32", *FLAGS, env=env) as (_, url):
            assert answer(url, "org/folder")["model"] == "org/folder"
            assert real_server.get(url + "/stats")["sampling"]["top_k"] == {"value": 20, "from": "generation_config.json"}
        assert set(hub.fetched()) == shards | {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                                               "chat_template.jinja", "model.safetensors.index.json"}
        (tmp_path / "hf" / "hub" / "models--org--folder" / "snapshots" / hub.revision("org/folder") / min(shards)).unlink()
        assert "does not have all files of that model" in refused("org/folder", env | {"HF_HUB_OFFLINE": "1"})


def test_an_index_of_absent_shards_hides_no_file(tmp_path):
    """As caches have it that were filled before: today the index is left out where there is a whole file."""
    folder = families.save(families.make_model("qwen3"), tmp_path / "made")
    index = json.dumps({"weight_map": {"lm_head.weight": SHARDS[0]}}).encode()
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"model.safetensors.index.json": index}
    with fake_hub(org__both=files) as hub:
        env = environment(tmp_path, hub)
        with real_server.server("org/both", "--dtype", "float32", *FLAGS, env=env) as (_, url):
            assert answer(url, "org/both")["model"] == "org/both"
        assert "model.safetensors" in hub.fetched() and "model.safetensors.index.json" not in hub.fetched()
        snapshot = tmp_path / "hf" / "hub" / "models--org--both" / "snapshots" / hub.revision("org/both")
        (snapshot / "model.safetensors.index.json").write_bytes(index)
        with real_server.server("org/both", "--dtype", "float32", *FLAGS, env=env | {"HF_HUB_OFFLINE": "1"}) as (_, url):
            assert answer(url, "org/both")["model"] == "org/both"


WEIGHTS = b"x" * (2 << 20)
SMALL = {"tokenizer.json": b"{}", "config.json": json.dumps({"model_type": "mamba2"}).encode()}


@pytest.mark.parametrize("changes, said", [
    ({}, "org/odd is not downloaded: config.json: this server cannot run mamba2 yet; it runs: "),
    *(pytest.param(changes, said, marks=pytest.mark.slow) for changes, said in (
        ({"config.json": {}}, "config.json: model_type is "), ({"config.json": {"attention_sinks": 4}}, "config.json: attention_sinks is 4; this key is not supported in a qwen3 model"),
        ({"config.json": {"quantization_config": {"quant_method": "awq", "version": "gemv"}}}, "gemv"), ({"tokenizer.json": b'{"model": {"type": "Odd"}}'}, "tokenizer.json: "),
        ({"tokenizer.json": None, "spiece.model": b"x"}, "it has no tokenizer.json; it has spiece.model, which this server does not read")))])
def test_an_unrunnable_folder_is_not_downloaded(tmp_path, changes, said):
    """A folder that no server can run is refused before its weights are asked for."""
    files = {path.name: path.read_bytes() for path in families.save(families.make_model("qwen3"), tmp_path / "made").iterdir()} if changes else dict(SMALL)
    for name, change in changes.items():
        files[name] = json.dumps((json.loads(files[name]) if change else {}) | change).encode() if isinstance(change, dict) else change
    files = {name: data for name, data in files.items() if data is not None} | {"model.safetensors": WEIGHTS}
    with fake_hub(org__odd=files) as hub:
        assert said in refused("org/odd", environment(tmp_path, hub))
        assert "config.json" in hub.fetched() and "model.safetensors" not in hub.fetched()


def test_a_config_alone_refuses_a_download(tmp_path):
    """A family that is known and not computed is refused after its config.json, in one line that says what is missing."""
    files = SMALL | {"config.json": json.dumps({"model_type": "kimi_linear"}).encode(), "chat_template.jinja": b"x", "model.safetensors": WEIGHTS}
    with fake_hub(org__odd=files) as hub:
        said = refused("org/odd", environment(tmp_path, hub))
        assert "org/odd is not downloaded: config.json: this server cannot run kimi_linear: most of its layers are Kimi Delta Attention (KDA)" in said
        assert hub.fetched() == ["config.json"]


@pytest.mark.slow
@pytest.mark.parametrize("metadata, said", [
    ({"general.architecture": "llama4"}, "org/odd:odd.gguf is not downloaded: its file: this server cannot run llama4: its layers see only their own chunk"),
    ({"general.architecture": "rwkv7"}, "org/odd:odd.gguf is not downloaded: its file: this server cannot run rwkv7 yet; it runs: "),
    ({"tokenizer.ggml.pre": "unheard-of"}, "tokenizer.ggml.pre"), ({"llama.attention.odd": 3}, "llama.attention.odd is 3; this key is not supported in a llama model")])
def test_an_unrunnable_gguf_is_refused_early(tmp_path, metadata, said):
    """A GGUF file that no server can run is refused by its beginning."""
    odd = gguf_bytes({**LARGE_NUMBERS, **small_gguf_metadata("gpt-2"), **metadata}, random_llama(numbers=LARGE_NUMBERS)) + bytes(40 << 20)
    with fake_hub(org__odd={"odd.gguf": odd}) as hub:
        hub.cuts = {"odd.gguf": 25 << 20}       # a refusal comes before
        assert said in refused("org/odd", environment(tmp_path, hub))
        assert not [*(tmp_path / "hf").rglob("*.gguf")] + [*(tmp_path / "hf").rglob(".chat_server.*")]


@pytest.mark.parametrize("text, found", [
    ("gpt-oss:120b", ("openai/gpt-oss-120b", "")), ("GPT-OSS-20b", ("openai/gpt-oss-20b", "")), ("llama3.1", ("meta-llama/Llama-3.1-8B-Instruct", "")),
    ("llama3.2-1b", ("meta-llama/Llama-3.2-1B-Instruct", "")), ("org/name", ("org/name", "")), ("org/name:a/b.gguf", ("org/name", "a/b.gguf")),
    ("models/x.gguf", None), ("./org/name", None), ("/org/name", None), ("a/b/c", None), ("../name", None), ("llama99", None), ("org/na me", None)])
def test_what_has_the_form_of_an_id(text, found):
    assert hub_model(text) == found


def test_a_folder_or_file_here_wins_over_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_bytes(TINY)
    assert resolve_model(Settings(model="org/name")).path == tmp_path / "org" / "name"


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]

LOUD_PARTS = ["A-Q8_0-00001-of-00002.GGUF", "A-Q8_0-00002-of-00002.GGUF"]

PARTS = ["q8/a-Q8_0-00001-of-00002.gguf", "q8/a-Q8_0-00002-of-00002.gguf"]


@pytest.mark.parametrize("file, names, found", [
    ("", ["README.md", "config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin", "onnx/model.onnx", "tokenizer_config.json",
          "consolidated.safetensors", "original/params.json"], ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]),
    ("", ["config.json", *SHARDS, "model.safetensors.index.json", "generation_config.json", "chat_template.jinja", "x.gguf"],
     ["config.json", "chat_template.jinja", "generation_config.json", "model.safetensors.index.json", *SHARDS]),
    ("", ["config.json", *SHARDS, "model.safetensors.index.json", "model.safetensors", "special_tokens_map.json", "added_tokens.json"],
     ["config.json", "added_tokens.json", "special_tokens_map.json", "model.safetensors"]),
    ("x", ["config.json", "model.safetensors", "x.gguf"], ["x.gguf"]), ("", ["config.json", "only.gguf"], ["only.gguf"]),
    ("", ["a-Q8_0.gguf", "a-Q4_K_M.gguf"], ["a-Q4_K_M.gguf"]), ("q8_0", ["a-Q4_0.gguf", *PARTS], PARTS),
    ("q8_0", ["a-Q8_0.gguf", "mmproj-a-Q8_0.gguf"], ["a-Q8_0.gguf"]), ("", ["a.gguf", "a-mmproj-f16.gguf", "x/imatrix_x.gguf"], ["a.gguf"]),
    ("", [*LOUD_PARTS, "A-mmproj.GGUF"], LOUD_PARTS), ("mmproj-f16.gguf", ["a.gguf", "mmproj-f16.gguf"], ["mmproj-f16.gguf"]),
    ("", [*PARTS, "a-q4_k_m-00001-of-00001.gguf"], ["a-q4_k_m-00001-of-00001.gguf"]), (PARTS[1], [*PARTS, "b.gguf"], PARTS)])
def test_only_the_files_of_a_model_are_fetched(file, names, found):
    assert hub_files("org/name", file, names) == found


@pytest.mark.parametrize("model, names, found", [
    ("a-Q8_0.gguf", ["mmproj-a-Q8_0.gguf", "mmproj-a-F16.gguf", "README.md"], ["mmproj-a-F16.gguf"]), ("a.gguf", ["x/mmproj-f16.gguf", "mmproj.txt"], []),
    ("x/a.gguf", ["x/mmproj-f16.gguf", "mmproj-f16.gguf"], ["x/mmproj-f16.gguf"]), ("mmproj-f16.gguf", ["mmproj-f16.gguf", "mmproj-f32.gguf"], []),
    ("config.json", ["mmproj-f16.gguf"], []), ("A-1b-Q8_0.GGUF", ["a-1b-mmproj.gguf", "b-mmproj.gguf"], ["a-1b-mmproj.gguf"]),
    ("b.gguf", ["a-mmproj-f16.gguf"], []), ("b.gguf", ["b.mmproj-q8_0.gguf", "b-mmproj-F16.gguf"], ["b-mmproj-F16.gguf"])])
def test_a_model_sees_with_its_folder_s_best_file(model, names, found):
    assert mmproj_for(model, [model, *names]) == found


SEEING = gguf_bytes({**LLAMA_NUMBERS, **small_gguf_metadata("gpt-2", **{"tokenizer.ggml.tokens": [*small_gguf_metadata("gpt-2")["tokenizer.ggml.tokens"][:-1], "<fake_token_around_image>"]})},
                    random_llama())


def fetched_files(tmp_path, hub, *models, before="", **bounds):
    """The paths of models of org/seeing, and what the log said."""
    code = (f"{before}\nfrom chatlm.common.hub.huggingface import DownloadLimits, fetch_from_hub\n"
            f"for file in {models!r}: print(fetch_from_hub('org/seeing', file, lambda *_: None, DownloadLimits(**{bounds!r})))")
    done = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path, hub), capture_output=True, text=True, cwd=real_server.SCRIPT.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


def test_an_mmproj_comes_and_goes_with_its_models(tmp_path, monkeypatch):
    """A repository of two quantizations: the second download needs no second mmproj."""
    from chatlm.common.hub.offers import delete_model
    with fake_hub(org__seeing={"a-Q8_0.gguf": SEEING, "a-Q4_0.gguf": SEEING + b" ", "mmproj-a-f16.gguf": b"GGUF eyes", "mmproj-a-q8_0.gguf": b"GGUF others"}) as hub:
        folder = os.path.dirname(fetched_files(tmp_path, hub, "a-Q8_0.gguf", "a-Q4_0.gguf")[0][0])
        assert mmproj_for("a-Q8_0.gguf", os.listdir(folder)) == ["mmproj-a-f16.gguf"]
        assert hub.fetched().count("mmproj-a-f16.gguf") == 1 and "mmproj-a-q8_0.gguf" not in hub.fetched()
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.delenv("HF_HUB_CACHE", raising=False)
        delete_model("org/seeing", "a-Q8_0.gguf")
        assert sorted(os.listdir(folder)) == ["a-Q4_0.gguf", "mmproj-a-f16.gguf"]
        delete_model("org/seeing", "a-Q4_0.gguf")
        assert not [*tmp_path.glob("hf/hub/models--*")]


NO_PILLOW = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.split(".")[0] == "PIL" else find(name, *more)"""


@pytest.mark.parametrize("model, before, bounds, said", [
    (TINY, "", {}, "mmproj.gguf is not downloaded: what models of the architecture \"llama\" with its tokens see images with is not known"),
    (SEEING, NO_PILLOW, {}, "mmproj.gguf is not downloaded: images are read with the Python package Pillow, which is not installed"),
    (SEEING, "", {"images": False}, "")], ids=["another family", "without Pillow", "unwanted"])
def test_a_useless_mmproj_is_not_downloaded(tmp_path, model, before, bounds, said):
    with fake_hub(org__seeing={"a.gguf": model, "mmproj.gguf": b"GGUF eyes"}) as hub:
        before = f"{before}\nimport logging; logging.basicConfig(level=logging.INFO)"
        (path, again), log = fetched_files(tmp_path, hub, "a.gguf", "a.gguf", before=before, **bounds)
        assert os.listdir(os.path.dirname(path)) == ["a.gguf"] and said in log and ("mmproj" in log) == bool(said)
        # what is missing is no reason to fetch again
        assert again == path and hub.fetched() == ["a.gguf", "files/org/seeing/a.gguf"]


@pytest.mark.parametrize("file, names, words", [
    ("z.gguf", ["a.gguf", "b.gguf"], "org/name has no single file z.gguf; its GGUF files: a.gguf, b.gguf. Name one: org/name:FILE"),
    ("", ["a.gguf", "b.gguf"], "has several GGUF files; its GGUF files: a.gguf, b.gguf"),
    ("q8_0", ["a-q8_0.gguf", "b-q8_0.gguf"], "no single file q8_0"), ("", ["pytorch_model.bin", "config.json"], "no model.safetensors; it has no GGUF file")])
def test_a_repository_without_the_file_says_what_it_has(file, names, words):
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        hub_files("org/name", file, names)


@pytest.mark.parametrize("model, words", by_day([
    ("org/nothing", "org/nothing cannot be downloaded: no file or folder of that name is here, and {url} has no such model"),
    ("org/closed", "org/closed cannot be downloaded: it is gated: accept its licence at {url}/org/closed, then run `"),
    ("org/tiny:other.gguf", "org/tiny has no single file other.gguf; its GGUF files: tiny.gguf"),
    ("org/large", "no room for org/large in "), ("lama3.1", "no model at 'lama3.1'; did you mean llama3.1?")],
    ("org/large", "no room for org/large in "), ("lama3.1", "no model at 'lama3.1'; did you mean llama3.1?")))
def test_a_model_that_cannot_be_had_is_one_line(tmp_path, model, words):
    with fake_hub(org__tiny={"tiny.gguf": TINY}, org__closed={"tiny.gguf": TINY}, org__large={"large.gguf": TINY}) as hub:
        hub.gated, hub.sizes = {"org/closed"}, {"large.gguf": 10**17}
        said = refused(model, environment(tmp_path, hub))
        assert words.format(url=hub.url) in said and ("gated" not in said or "hf auth login` or set HF_TOKEN" in said)
        assert hub.fetched() == []


def test_a_token_unknown_to_the_hub_is_named(tmp_path):
    with fake_hub(org__tiny={"tiny.gguf": TINY}) as hub:
        hub.token = "hf_other"
        assert "HTTP status 401; check HF_TOKEN" in refused("org/tiny", environment(tmp_path, hub, HF_TOKEN="hf_mine"))


@pytest.mark.parametrize("url, more, words", [
    ("http://127.0.0.1:9", {}, "http://127.0.0.1:9 cannot be reached"), ("http://127.0.0.1:9", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set")])
def test_offline_an_uncached_model_is_one_line(tmp_path, url, more, words):
    line = refused("org/tiny", environment(tmp_path, url, **more))
    assert words in line and f"the cache {tmp_path}/hf/hub does not have all files" in line


def test_a_hub_that_fails_is_one_line(tmp_path):
    with fake_hub(org__tiny={"tiny.gguf": TINY}) as hub:
        hub.status = 500
        assert "cannot be reached" in refused("org/tiny", environment(tmp_path, hub))


@pytest.mark.slow
@pytest.mark.parametrize("reset", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_broken_download_resumes_where_it_broke(tmp_path, reset):
    with fake_hub(org__tiny={"tiny.gguf": LARGE}) as hub:
        hub.cuts, hub.reset = {"tiny.gguf": 12 << 20}, reset
        with real_server.server("org/tiny", *FLAGS, env=environment(tmp_path, hub)) as (_, url):
            answer(url)
        starts = [int(sent[6:-1]) for *_, sent, _ in hub.requests if sent]
        assert starts and sorted(set(starts)) == list(dict.fromkeys(starts)) and max(starts) > len(LARGE) // 2


@pytest.mark.slow
def test_the_next_start_continues_one_that_failed(tmp_path):
    with fake_hub(org__tiny={"tiny.gguf": LARGE}) as hub:
        env = environment(tmp_path, hub)
        assert "no room for org/tiny" in refused("org/tiny", env, limit=15 << 20)        # as on a full disk
        (part,) = (tmp_path / "hf" / "hub" / "models--org--tiny").glob(".chat_server.*")
        kept = part.stat().st_size
        assert kept > 9 << 20
        hub.requests.clear()
        with real_server.server("org/tiny", *FLAGS, env=env) as (_, url):
            answer(url)
        assert f"bytes={kept}-" in [sent for *_, sent, _ in hub.requests]
        assert not part.exists()


@pytest.mark.slow
def test_parts_that_do_not_fit_are_not_used(tmp_path):
    with fake_hub(org__tiny={"tiny.gguf": LARGE}) as hub:
        env = environment(tmp_path, hub)
        refused("org/tiny", env, limit=15 << 20)
        (part,) = (tmp_path / "hf" / "hub" / "models--org--tiny").glob(".chat_server.*")
        part.write_bytes(part.read_bytes()[:-1000] + b"x" * 1000)
        assert "parts that do not fit together" in refused("org/tiny", env)
        with real_server.server("org/tiny", *FLAGS, env=env) as (_, url):
            answer(url)


def test_a_missing_hub_library_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"^the Hugging Face model org/name needs the Python package.* huggingface_hub.*pip install"):
        resolve_model(Settings(model="org/name"))


@pytest.mark.parametrize("flag", [{"source": "sft"}, {"model_tag": "d20"}, {"step": 4}])
def test_nanochat_flags_are_refused_for_an_id(flag):
    with pytest.raises(ConfigError, match="only for nanochat checkpoints, and org/name is a Hugging Face id"):
        resolve_model(Settings(model="org/name", **flag))


# --- checkpoints of nanochat's -----------------------------------------------------------------------------------------


CHECKPOINT, META, TOKENIZER = "model_000650.pt", "meta_000650.json", "tokenizer.pkl"


@pytest.mark.parametrize("file, names, found", [
    ("", [CHECKPOINT, META, TOKENIZER, "token_bytes.pt", "README.md"], [META, TOKENIZER, CHECKPOINT]),
    ("", ["model_000010.pt", "meta_000010.json", CHECKPOINT, META, "tokenizer/tokenizer.pkl"], [META, "tokenizer/tokenizer.pkl", CHECKPOINT]),
    ("model_000010.pt", ["model_000010.pt", "meta_000010.json", CHECKPOINT, META, TOKENIZER], ["meta_000010.json", TOKENIZER, "model_000010.pt"]),
    ("", [f"base_checkpoints/d4/{CHECKPOINT}", f"base_checkpoints/d4/{META}", "chatsft_checkpoints/d4/model_000009.pt",
          "chatsft_checkpoints/d4/meta_000009.json", "tokenizer/tokenizer.pkl"],
     ["chatsft_checkpoints/d4/meta_000009.json", "tokenizer/tokenizer.pkl", "chatsft_checkpoints/d4/model_000009.pt"]),
    ("", [f"experiments/x/d4/chat/{CHECKPOINT}", f"experiments/x/d4/chat/{META}", "datasets/climbmix/tokenizer/tokenizer.pkl"],
     [f"experiments/x/d4/chat/{META}", "datasets/climbmix/tokenizer/tokenizer.pkl", f"experiments/x/d4/chat/{CHECKPOINT}"]),
    ("", [CHECKPOINT, META, TOKENIZER, "only.gguf"], ["only.gguf"]), (CHECKPOINT, [CHECKPOINT, META, TOKENIZER, "only.gguf"], [META, TOKENIZER, CHECKPOINT])])
def test_a_published_checkpoint_s_files_are_fetched(file, names, found):
    assert hub_files("org/name", file, names) == found


@pytest.mark.parametrize("names", [[CHECKPOINT, META], [CHECKPOINT, TOKENIZER], [META, TOKENIZER]])
def test_a_published_checkpoint_needs_all_its_files(names):
    with pytest.raises(ConfigError, match="org/name has no model.safetensors; it has no GGUF file"):
        hub_files("org/name", "", names)


def test_a_published_checkpoint_is_served_by_its_id(tmp_path, nanochat_fixtures):
    """A published checkpoint is served by its id, and again without the hub."""
    [folder] = (nanochat_fixtures / "gen5").glob("*/d4")
    files = {TOKENIZER: (nanochat_fixtures / "gen5" / "tokenizer" / "tokenizer.pkl").read_bytes(), "README.md": b"# x",
             **{path.name: path.read_bytes() for path in folder.iterdir()}}
    expected = None
    with fake_hub(org__tiny=files) as hub:
        env = environment(tmp_path, hub)
        with real_server.server("org/tiny", "--dtype", "float32", *FLAGS, env=env) as (_, url):
            expected = answer(url, "org/tiny")["choices"][0]["message"]["content"]
        assert hub.fetched()[-1].endswith(CHECKPOINT) and "README.md" not in hub.fetched()
    with real_server.server("org/tiny", "--dtype", "float32", "--no-downloads", *FLAGS, env=env) as (_, url):
        assert answer(url, "org/tiny")["choices"][0]["message"]["content"] == expected
    with real_server.server(folder.parent.parent, "--dtype", "float32", *FLAGS) as (_, url):
        assert answer(url)["choices"][0]["message"]["content"] == expected
