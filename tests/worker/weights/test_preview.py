"""What is reported about a model whose weights are not here yet."""

import json

import pytest

from chatlm.common.errors import ConfigError
from chatlm.common.files import Truncated
from chatlm.worker.weights.families.table import FAMILIES, GGUF_FAMILIES, VISION
from chatlm.worker.weights.formats.refused import REFUSED, ROWS
from chatlm.worker.weights.preview import preview_folder, preview_gguf, preview_main
from chatlm.worker.weights.towers.table import FILE_TOWERS
from families import make_model, save
from packers import PACKED
from tiny_gguf import LLAMA_NUMBERS, gguf_bytes, random_llama, small_gguf_metadata

GOOD = {**LLAMA_NUMBERS, **small_gguf_metadata("gpt-2")}


def test_the_header_of_a_gguf_is_enough(tmp_path, default_model_path):
    """The header of a GGUF file is enough, and less is too little."""
    path, whole = tmp_path / "part", default_model_path.read_bytes()
    for size in (10, 100_000, 1_000_000):
        path.write_bytes(whole[:size])
        with pytest.raises(Truncated):
            preview_gguf(path, len(whole))
        assert preview_main([str(path), str(len(whole))]) == 2
    path.write_bytes(whole[:4 << 20])
    assert preview_main([str(path), str(len(whole))]) == 0
    with pytest.raises(ConfigError, match="the tensor .* ends at"):     # the file itself is cut
        preview_gguf(path, 5 << 20)


@pytest.mark.parametrize("metadata, said", [
    ({"general.architecture": "rwkv7"}, "this server cannot run rwkv7 yet"), ({"tokenizer.ggml.pre": "unheard-of"}, "tokenizer.ggml.pre"),
    ({"llama.attention.odd": 3}, "llama.attention.odd is 3; this key is not supported"), ({"llama.block_count": -1}, "llama.block_count"),
    ({"split.count": 3, "general.architecture": "rwkv7"}, "this server cannot run rwkv7 yet")])
def test_a_gguf_file_is_refused_by_its_header(tmp_path, capsys, metadata, said):
    data, path = gguf_bytes(GOOD | metadata, random_llama()), tmp_path / "part"
    path.write_bytes(data[:-100_000])
    assert preview_main([str(path), str(len(data))]) == 1 and said in capsys.readouterr().out


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.types.split()[0])
def test_what_is_not_computed_is_refused_early(tmp_path, row):
    """By a folder's config.json alone, packed or not, and by a GGUF file's header; each with what is missing."""
    for name in row.types.split():
        (tmp_path / "config.json").write_text(json.dumps({"model_type": name, "quantization_config": {"quant_method": "unheard-of"}}))
        with pytest.raises(ConfigError, match=f"config.json: this server cannot run {name}: ") as refusal:
            preview_folder(tmp_path)
        assert row.reason in str(refusal.value) and "\n" not in str(refusal.value)
    for name in row.files.split():
        data, path = gguf_bytes(GOOD | {"general.architecture": name}, random_llama()), tmp_path / "part"
        path.write_bytes(data[:-100_000])
        with pytest.raises(ConfigError, match=f"this server cannot run {name}: ") as refusal:
            preview_gguf(path, len(data))
        assert row.reason in str(refusal.value)


def test_nothing_is_both_served_and_refused():
    assert not REFUSED.keys() & (FAMILIES.keys() | VISION.keys() | GGUF_FAMILIES.keys())
    assert len(REFUSED) == len({name for row in ROWS for name in (*row.types.split(), *row.files.split())})


def test_an_image_model_s_text_model_is_refused(tmp_path):
    """A model with images is refused for what its text model lacks."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral3", "text_config": {"model_type": "mistral_large4_text"}}))
    with pytest.raises(ConfigError, match="cannot run mistral_large4_text: beyond index_topk"):
        preview_folder(tmp_path)


@pytest.mark.parametrize("kind", FILE_TOWERS)
def test_a_seeing_model_is_known_by_its_tokens(tmp_path, capsys, kind):
    """A model that may see is known by its architecture and its tokens."""
    family, path = FILE_TOWERS[kind], tmp_path / "model.gguf"
    assert {*family.architectures} <= {*GGUF_FAMILIES}
    for architecture, last, status in (*((each, family.token, 0) for each in family.architectures), ("qwen2vl", family.token, 1), (family.architectures[0], "<|other|>", 1)):
        tokens = [*GOOD["tokenizer.ggml.tokens"][:-1], last]
        path.write_bytes(gguf_bytes(GOOD | {"general.architecture": architecture, "tokenizer.ggml.tokens": tokens}, random_llama()))
        assert preview_main([str(path), str(path.stat().st_size), "tower"]) == status
        assert capsys.readouterr().out.startswith("what models of the architecture") == bool(status)


def test_a_folder_without_weights_is_enough(tmp_path):
    folder = save(make_model("qwen3"), tmp_path / "made")
    for weights in folder.glob("*.safetensors*"):
        weights.unlink()
    preview_folder(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="tokenizer.json"):
        preview_folder(folder)
    (folder / "config.json").write_text('{"model_type": "rwkv7"}')
    with pytest.raises(ConfigError, match="cannot run rwkv7 yet; it runs: Llama"):
        preview_folder(folder)


def test_a_folder_s_packing_needs_no_weights(tmp_path, capsys):
    folder = save(make_model("qwen3"), tmp_path / "made")
    for weights in folder.glob("*.safetensors*"):
        weights.unlink()
    config = json.loads((folder / "config.json").read_text())
    for name, row in PACKED.items():
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": row.config}))
        assert preview_main([str(folder)]) == 0, name
    for odd, said in (({"quant_method": "awq", "version": "gemv"}, 'version is "gemv", of which only gemm is read'),
                      ({"quant_method": "torchao"}, 'quant_method is "torchao"; these packed weights are read: AWQ'),
                      (PACKED["ct-4"].config | {"format": "marlin-24"}, 'of format "marlin-24"')):
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": odd}))
        assert preview_main([str(folder)]) == 1 and said in capsys.readouterr().out
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_method": "modelopt_w4a8_mystery?", "quant_algo": "X"}}))
    assert preview_main([str(folder)]) == 1 and 'hf_quant_config.quant_method is "modelopt_w4a8_mystery?"' in capsys.readouterr().out
