"""Heads that the config says are the embedding: what the files and adapters have instead, against transformers and peft."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.worker.doctor.examined_model import ExaminedModel
from chatlm.worker.doctor.stated import check_head
from chatlm.worker.kernels.limits import not_compiled
from chatlm.worker.weights.formats.folder.description import hf_blocks
from engines import tensors_of
from families import answers, as_gguf, check, clear_cases, kernels_of, load, make_model, save, transformer
from fp8 import save_fp8
from nightly import by_day

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = ["reference", pytest.param("decode_core", marks=pytest.mark.skipif(decode_core() is None, reason="not built"))]
HEADS = {"llama3.2": ("model.embed_tokens.weight", "lm_head.weight"), "gpt2": ("transformer.wte.weight", "lm_head.weight"),
         "gptneox-serial": ("gpt_neox.embed_in.weight", "embed_out.weight"), "cohere2": ("model.embed_tokens.weight", "lm_head.weight"),
         "gemma2": ("model.embed_tokens.weight", "lm_head.weight")}


def changed_file(folder, change):
    """The folder with `change` done to its tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_head(name, folder, head=None):
    """A tied model's folder with a head besides the embedding: `head`, or a random one."""
    embed, own = HEADS[name]

    def add(tensors):
        tensors[own] = torch.randn(tensors[embed].shape, generator=torch.Generator().manual_seed(8)) * 0.4 if head is None else head(tensors[embed])
    return changed_file(folder, add)


def theirs(folder):
    import transformers
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", by_day(["llama3.2", "gpt2", "gptneox-serial", "cohere2"], "gpt2", "gptneox-serial"))
def test_a_differing_head_beats_the_config(name, backend, tmp_path, caplog):
    """A head that differs from the embedding is used, though the config says they are tied."""
    folder = with_head(name, save(make_model(name), tmp_path))
    cases = clear_cases(theirs(folder), lengths=(9, 40), count=16)
    ours = load(folder)
    assert f"{HEADS[name][1]} differs from {HEADS[name][0]}: the file's own head is used" in caplog.text
    check(answers(transformer(ours, kernels_of(backend, ours.architecture)), cases, count=16), cases, count=16)


def test_a_head_that_differs_in_one_row_is_used_too(tmp_path):
    def almost(embed):
        return torch.cat([embed[:-1], embed[-1:] * 1.5])
    folder = with_head("gemma2", save(make_model("gemma2"), tmp_path), almost)
    ours = load(folder)
    own = tensors_of(ours)
    assert not ours.architecture.tied and torch.equal(own["head"][:-1], own["embed"][:-1]) and not torch.equal(own["head"], own["embed"])


def test_a_head_equal_to_the_embedding_is_held_once(tmp_path, caplog):
    folder = with_head("llama3.2", save(make_model("llama3.2"), tmp_path), torch.clone)
    assert load(folder).architecture.tied and "differs" not in caplog.text


@pytest.mark.parametrize("name", ["llama3.2", "gpt2", "gptneox-serial"])
def test_a_tied_model_saved_with_its_head_opens(name, tmp_path):
    model, (embed, head) = make_model(name), HEADS[name]
    folder = changed_file(save(model, tmp_path), lambda tensors: tensors.update({head: tensors.pop(embed)}))
    cases = clear_cases(theirs(folder), lengths=(9,), count=16)
    ours = load(folder)
    check(answers(transformer(ours, kernels_of("reference", ours.architecture)), cases, count=16), cases, count=16)


def test_fp8_heads_are_compared_with_their_scales(tmp_path):
    folder = save_fp8(make_model("llama3.2"), tmp_path, "deepseek")
    tensors = load_file(folder / "model.safetensors")
    embed = tensors["model.embed_tokens.weight"].float()
    scale, weight = torch.tensor(0.5), (embed / 0.5).to(torch.float8_e4m3fn)
    for changes, tied in (({"lm_head.weight": weight, "lm_head.weight_scale_inv": scale}, False), ({"lm_head.weight": embed.clone()}, True)):
        save_file(tensors | changes, folder / "model.safetensors")
        ours = load(folder)
        assert ours.architecture.tied == tied
        if not tied:
            assert torch.equal(tensors_of(ours)["head"], weight.float() * 0.5)


def test_a_head_of_another_shape_is_named(tmp_path):
    folder = with_head("llama3.2", save(make_model("llama3.2"), tmp_path), lambda embed: embed[:-5].clone())
    with pytest.raises(ConfigError, match=r"lm_head.weight is \(283, 64\) instead of \(288, 64\)"):
        load(folder)
    changed_file(folder, lambda tensors: [tensors.pop(name) for name in HEADS["llama3.2"]])
    with pytest.raises(ConfigError, match=r"missing model.embed_tokens.weight \(288, 64\)"):
        load(folder)


@pytest.mark.parametrize("root, inner, tied", [(True, None, True), (None, True, True), (True, False, True), (False, True, True), (False, False, False), (None, None, False)])
def test_root_or_text_config_may_tie_the_head(root, inner, tied, tmp_path):
    """The root or the text part of a config may say that the head is the embedding."""
    model = make_model("llama3.2")
    folder = save(model, tmp_path)
    changed_file(folder, lambda tensors: [tensors.update({f"language_model.{name}": tensors.pop(name)}) for name in list(tensors)])
    path = folder / "config.json"
    text = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("tie_word_embeddings", "architectures")}
    text |= {} if inner is None else {"tie_word_embeddings": inner}
    config = {"model_type": "llava", "text_config": text} | ({} if root is None else {"tie_word_embeddings": root})
    path.write_text(json.dumps(config))
    assert hf_blocks(path, None)[1].tied == tied
    if tied:
        plain = load(folder)
        changed_file(folder, lambda tensors: tensors.update({"language_model.lm_head.weight": 2 * tensors["language_model.model.embed_tokens.weight"]}))
        own = load(folder)
        assert plain.architecture.tied and not own.architecture.tied and torch.equal(tensors_of(own)["head"], 2 * tensors_of(plain)["embed"])


def test_the_doctor_names_a_head_of_its_own(tmp_path):
    from chatlm.common.config import Settings
    from chatlm.common.hub.find import resolve_model
    settings = Settings(model=str(with_head("llama3.2", save(make_model("llama3.2"), tmp_path))))
    [found] = check_head(ExaminedModel(resolve_model(settings), settings))
    assert found.severity == "error" and "the files have another lm_head.weight, which is used" in found.what


# --- adapters ------------------------------------------------------------------------------------------------------


ADAPTERS = {"head": dict(modules_to_save=["lm_head"]), "embedding": dict(modules_to_save=["embed_tokens"]), "both": dict(modules_to_save=["embed_tokens", "lm_head"]),
            "together": dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
            "products of the head": dict(more=["lm_head"]), "products of the embedding": dict(more=["embed_tokens"]), "products of both": dict(more=["embed_tokens", "lm_head"]),
            "products together": dict(more=["embed_tokens"], ensure_weight_tying=True)}


def adapted(model, folder, more=(), **options):
    """The model with a random adapter, which peft has also saved. Not merged: peft would add an adapter of one of both to both."""
    peft = pytest.importorskip("peft", reason="pip install '.[test]' brings it")
    made = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", *more], r=4, lora_alpha=6, **options))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.normal_(0, 0.2)
    made.save_pretrained(folder, save_embedding_layers=False)
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", by_day(ADAPTERS.values(), *(ADAPTERS[name] for name in ("head", "embedding", "together", "products of both"))), ids=ADAPTERS)
def test_an_adapter_of_the_head_changes_it_alone(options, tmp_path):
    """An adapter of the head or the embedding changes that matrix alone."""
    model = make_model("llama3.2")
    paths = save(model, tmp_path / "base"), as_gguf(tmp_path / "base.gguf", model)
    plain = tensors_of(load(paths[0]))["embed"]
    cases = clear_cases(adapted(model, tmp_path / "adapter", **options).eval(), lengths=(9, 40), count=16)
    for path in paths:
        ours = load(path, lora=(str(tmp_path / "adapter"),))
        for backend in ("reference", "decode_core") if decode_core() and not not_compiled(ours.architecture) else ("reference",):
            check(answers(transformer(ours, kernels_of(backend, ours.architecture)), cases, count=16), cases, count=16)
        own, names = tensors_of(ours), " ".join([*options.get("more", ()), *options.get("modules_to_save", ())])
        alone = "ensure_weight_tying" not in options
        assert torch.equal(own["embed"], plain) == ("embed_tokens" not in names)
        assert torch.equal(own.get("head", own["embed"]), plain) == (alone and "lm_head" not in names)


def test_unchanged_copies_keep_one_matrix(tmp_path):
    from lora import adapt
    folder = save(make_model("llama3.2"), tmp_path / "base")
    adapt(make_model("llama3.2"), tmp_path / "adapter", targets=["q_proj"], embeddings=True)
    assert load(folder, lora=(str(tmp_path / "adapter"),)).architecture.tied
    weights = tmp_path / "adapter/adapter_model.safetensors"
    tensors, head = load_file(weights), "base_model.model.lm_head.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != head}, weights)      # of a vocabulary that was resized
    assert load(folder, lora=(str(tmp_path / "adapter"),)).architecture.tied
    save_file(tensors | {head: tensors[head] + 1}, weights)
    assert not load(folder, lora=(str(tmp_path / "adapter"),)).architecture.tied


@pytest.mark.filterwarnings("ignore")
def test_an_unmerged_adapter_of_a_tied_head_is_refused(tmp_path):
    """An adapter of a tied head is refused where it is not merged."""
    model = make_model("llama3.2")
    paths = save(model, tmp_path / "base"), as_gguf(tmp_path / "base.gguf", model)
    for name in ("products of the head", "head"):
        adapted(make_model("llama3.2"), tmp_path / name, **ADAPTERS[name])
        for path in paths:
            ours = load(path)
            with pytest.raises(ConfigError, match="lm_head.*cannot be .* without merging; --lora merges it"):
                transformer(ours, kernels_of("reference", ours.architecture)).load_adapter(1, tmp_path / name)


@pytest.mark.parametrize("ranks", by_day([1, 2], 2), ids=["alone", "two ranks"])
def test_an_adapter_of_a_head_spares_the_embedding(ranks, tmp_path, default_model_path):
    """One that adds nothing changes no answer, although the head is now a matrix of its own."""
    from real_server import ask, post, server
    random, answers = torch.Generator().manual_seed(0), []
    save_file({"base_model.model.lm_head.lora_A.weight": torch.randn(2, 576, generator=random),
               "base_model.model.lm_head.lora_B.weight": torch.zeros(49_152, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["lm_head"]}))
    for more in ((), ("--lora", tmp_path)):
        with server(default_model_path, "--tensor-parallel-size", str(ranks), *more) as (_, url):
            answers.append(json.load(post(url + "/v1/chat/completions", ask("What is the capital of Japan?", max_tokens=16)))["choices"][0]["message"]["content"])
    assert answers[0] == answers[1] and "Tokyo" in answers[0]
