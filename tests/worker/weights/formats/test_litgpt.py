"""litgpt's folders, against the logits of litgpt itself (tests/fixtures/litgpt/make.py) and a Hugging Face folder of the same weights."""

import json
import shutil
from datetime import date
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from safetensors.torch import save_file

from chatlm.common.config import Settings
from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import resolve_model
from chatlm.common.hub.folder import find_models
from chatlm.common.hub.stamps import Changed, files_of, refuse_changed
from chatlm.common.hub.run_checkpoints import find_steps
from chatlm.common.messages.requests import Message
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.doctor.examined_model import ExaminedModel
from chatlm.worker.doctor.stated import stated_scaling
from chatlm.worker.doctor.tokenizer import key_of_eos
from chatlm.worker.weights.load import open_model
from chatlm.worker.weights.loaded.digest import sampled_digest
from engines import forward_logits, make_batch
from families import kernels_of, load, transformer, write_tokenizer
from lora import random_adapter
from real_server import ask, get, post, server

pytestmark = pytest.mark.usefixtures("one_thread")
MADE = Path(__file__).parents[3] / "fixtures" / "litgpt"
FAMILIES = {"llama3": "llama", "llama-biases": "llama", "tinyllama-of-2024": "llama", "qwen2.5": "qwen2", "qwen3": "qwen3", "mistral": "mistral",
            "mixtral": "mixtral", "qwen3-moe": "qwen3_moe", "pythia": "gpt_neox", "pythia-of-2024": "gpt_neox"}
BACKENDS = ["reference", pytest.param("decode_core", marks=pytest.mark.skipif(decode_core() is None, reason="not built"))]


def copy_of(name, tmp_path, template=None):
    folder = tmp_path / name
    shutil.copytree(MADE / name, folder)
    write_tokenizer(folder, template)
    return folder


def change(folder, **values):
    path = folder / "model_config.yaml"
    path.write_text(yaml.dump(yaml.safe_load(path.read_text()) | values))


def as_hugging_face(folder, to):
    """The same weights as a Hugging Face folder, by a table of its own: what litgpt's convert_from_litgpt writes."""
    config = yaml.safe_load((folder / "model_config.yaml").read_text())
    state = torch.load(folder / "lit_model.pth", weights_only=False)
    state = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.get("model", state).items()}
    H, G, D = config["n_head"], config["n_query_groups"], config["head_size"]
    to.mkdir()
    write_tokenizer(to, None)
    if FAMILIES[folder.name] == "gpt_neox":
        return as_neox(config, state, to)
    names = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj",
             "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj", "attn.norm_q": "self_attn.q_norm", "attn.norm_k": "self_attn.k_norm"}
    made = {"model.embed_tokens.weight": state["transformer.wte.weight"], "lm_head.weight": state["lm_head.weight"], "model.norm.weight": state["transformer.ln_f.weight"]}
    for name, tensor in state.items():
        if name.startswith("transformer.h."):
            _, _, layer, part = name.split(".", 3)
            part, _, kind = part.rpartition(".")
            if part == "attn.attn":     # group by group
                heads = tensor.view(G, H // G + 2, D, -1)
                tensor = torch.cat([heads[:, :-2].flatten(0, 2), heads[:, -2].flatten(0, 1), heads[:, -1].flatten(0, 1)])
            if part in ("attn.qkv", "attn.attn"):
                for which, rows in zip("qkv", tensor.split((H * D, G * D, G * D))):
                    made[f"model.layers.{layer}.self_attn.{which}_proj.{kind}"] = rows.clone()
            elif folder.name == "mixtral" and part.startswith("mlp."):
                part = part.replace("mlp.", "block_sparse_moe.").replace("fc_1", "w1").replace("fc_2", "w3").replace("proj", "w2")
                made[f"model.layers.{layer}.{part}.{kind}"] = tensor
            elif folder.name == "qwen3-moe" and part.startswith("mlp."):
                part = part.replace("proj", "down_proj").replace("fc_1", "gate_proj").replace("fc_2", "up_proj")
                made[f"model.layers.{layer}.{part}.{kind}"] = tensor
            else:
                made[f"model.layers.{layer}.{names[part]}.{kind}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, to / "model.safetensors")
    raw = {"model_type": FAMILIES[folder.name], "vocab_size": 272, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": config["n_layer"], "num_attention_heads": H,
           "num_key_value_heads": G, "head_dim": D, "max_position_embeddings": 256, "rms_norm_eps": 1e-3, "rope_theta": config["rope_base"],
           "tie_word_embeddings": False}
    own = {"llama3": {"rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
           "llama-biases": {"attention_bias": True, "mlp_bias": True, "partial_rotary_factor": 0.5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
           "qwen2.5": {"use_sliding_window": True, "sliding_window": 20, "layer_types": ["full_attention", "sliding_attention"]},
           "qwen3": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}, "mistral": {"sliding_window": 20},
           "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
           "qwen3-moe": {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True}}
    (to / "config.json").write_text(json.dumps(raw | own.get(folder.name, {})))
    return to


def as_neox(config, state, to):
    H, D, made = config["n_head"], config["head_size"], {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:     # q, k and v of all heads become those of each head
            tensor = tensor.view(3, H, D, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
        name = name.replace("transformer.h.", "gpt_neox.layers.").replace("transformer.wte", "gpt_neox.embed_in").replace("transformer.ln_f", "gpt_neox.final_layer_norm")
        for ours, theirs in {"lm_head": "embed_out", "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.qkv": "attention.query_key_value",
                             "attn.attn": "attention.query_key_value", "attn.proj": "attention.dense", "mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h"}.items():
            name = name.replace(ours, theirs)
        made[name] = tensor.contiguous()
    save_file(made, to / "model.safetensors")
    (to / "config.json").write_text(json.dumps({
        "model_type": "gpt_neox", "vocab_size": 272, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": H, "layer_norm_eps": 1e-3,
        "max_position_embeddings": 256, "rotary_pct": 0.25, "rotary_emb_base": 10_000, "use_parallel_residual": config["parallel_residual"],
        "hidden_act": "gelu_new" if config["gelu_approximate"] == "tanh" else "gelu"}))
    return to


def bits(model):
    return {name: [numpy.asarray(part).tobytes() for part in unread.read()] for name, unread in model.tensors.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_computes_litgpts_logits(name, backend, tmp_path):
    model = load(copy_of(name, tmp_path))
    assert model.family == FAMILIES[name] and model.context_length == 256 and not model.spec.tied_head
    said = json.loads((MADE / name / "answers.json").read_text())
    computes, pages = transformer(model, kernels_of(backend, model.spec)), list(range(80))
    for row, logits in said["logits"].items():
        found = forward_logits(computes, make_batch((said["ids"], 0, int(row) + 1, pages)))[0]
        assert (found - torch.tensor(logits)).abs().max() < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_a_litgpt_folder_equals_hugging_face_s(name, tmp_path):
    """A folder is the same model as a Hugging Face folder of its weights."""
    folder = copy_of(name, tmp_path)
    ours, theirs = load(folder), load(as_hugging_face(folder, tmp_path / "hf"))
    assert ours.spec == theirs.spec and bits(ours) == bits(theirs)
    packed = [load(path, quantize="q8_0") for path in (folder, tmp_path / "hf")]
    assert packed[0].spec == packed[1].spec and packed[0].description == packed[1].description


@pytest.mark.parametrize("as_saved", [lambda tensor: tensor, torch.clone], ids=["one storage, as litgpt converts it", "two"])
def test_a_head_equal_to_the_embedding_is_read_once(as_saved, tmp_path):
    folder = copy_of("llama3", tmp_path)
    state = torch.load(folder / "lit_model.pth")
    torch.save(state | {"lm_head.weight": as_saved(state["transformer.wte.weight"])}, folder / "lit_model.pth")
    model = load(folder)
    assert model.spec.tied_head and "head" not in model.tensors


def test_a_hugging_face_adapter_is_merged(tmp_path):
    folder = copy_of("llama3", tmp_path)
    random_adapter(tmp_path / "adapter", 2, {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (16, 32), "mlp.down_proj": (32, 48)})
    merged = [load(path, lora=(str(tmp_path / "adapter"),)) for path in (folder, as_hugging_face(folder, tmp_path / "hf"))]
    assert bits(merged[0]) == bits(merged[1]) != bits(load(folder))


@pytest.mark.parametrize("changes, words", [
    (dict(norm_class_name="LayerNorm"), 'norm_class_name is "LayerNorm"; it must be "RMSNorm"'), (dict(mlp_class_name="GemmaMLP"), 'mlp_class_name is "GemmaMLP"; it must be one of LLaMAMLP, LLaMAMoE, GptNeoxMLP'),
    (dict(mlp_class_name="GptNeoxMLP"), 'norm_class_name is "RMSNorm"; it must be "LayerNorm"'), (dict(mlp_class_name=["LLaMAMLP"]), "mlp_class_name is a list of 1"),
    (dict(mlp_class_name="GptNeoxMLP", norm_class_name="LayerNorm"), "bias is false; it must be true"),
    (dict(mlp_class_name="GptNeoxMLP", norm_class_name="LayerNorm", bias=True), "n_query_groups is 2; it must be n_head in a model with GptNeoxMLP"),
    (dict(mlp_class_name="LLaMAMoE", n_expert=4), "n_expert_per_token is 0; it must be an integer from 1 to 4"), (dict(mlp_class_name="LLaMAMoE"), "n_expert is 0"),
    (dict(mlp_class_name="LLaMAMoE", n_shared_expert=1), "n_shared_expert is 1; it must be null"), (dict(mlp_class_name="LLaMAMoE", routed_scaling_factor=2.5), "routed_scaling_factor is 2.5"),
    (dict(mlp_class_name="LLaMAMoE", n_expert=4, n_expert_per_token=2, bias=True), "bias is true; it must be false"),
    (dict(parallel_residual=True), "parallel_residual is true; it must be false"), (dict(post_attention_norm=True), "post_attention_norm is true"),
    (dict(scale_embeddings=True), "scale_embeddings is true"), (dict(final_logit_softcapping=30.0), "final_logit_softcapping is 30.0; it must be null"),
    (dict(latent_attention={"q_lora_rank": 3}), "latent_attention is an object of 1"), (dict(rope_interleave=True), "rope_interleave is true"),
    (dict(name="CodeGemma-7b-it"), "name is \"CodeGemma-7b-it\"; it must be a name without Gemma"), (dict(attention_scores_scalar=20), "attention_scores_scalar is 20"),
    (dict(rope_adjustments={"factor": 4.0, "beta_fast": 32.0}), "rope_adjustments is a list of 2; it must be missing, or have only factor"),
    (dict(rope_adjustments={"factor": 4.0, "low_freq_factor": 1.0}), "rope_adjustments lacks high_freq_factor, original_max_seq_len"),
    (dict(rope_adjustments=[1]), "rope_adjustments is a list of 1"), (dict(rope_adjustments={"factor": "x"}), 'rope_adjustments.factor is "x"'),
    (dict(rope_condense_ratio=2), "rope_condense_ratio is 2; it must be 1 beside rope_adjustments"),
    (dict(sliding_window_size=20, sliding_window_indices=[0, 1]), "sliding_window_indices is a list of 2; it must be 1 for all layers"),
    (dict(sliding_window_size=20, sliding_window_indices=[1]), "has 1 entries, and n_layer is 2"), (dict(sliding_window_size=20, bias=True), "bias is true; it must be false in a model with sliding"),
    (dict(norm_qk=True, attn_bias=True), "attn_bias is true; it must be false in a model with norm_qk"), (dict(norm_qk=True, norm_qk_type="olmo2"), 'norm_qk_type is "olmo2"'),
    (dict(norm_qk=True, rotary_percentage=0.5), "rotary_percentage is 0.5; it must be 1.0"), (dict(a_new_key=3), 'the key "a_new_key" is not known'),
    (dict(n_layer="2"), 'n_layer is "2"; it must be an integer'), (dict(n_layer=date(2026, 1, 1)), 'n_layer is "date"'), (dict(intermediate_size=None), "intermediate_size is missing"),
    (dict(n_query_groups=3), "n_head is 4; it must be a multiple of 3"), (dict(head_size=None, n_head=5, n_query_groups=5), "n_embd is 32; it must be a multiple of 5"),
    (dict(rotary_percentage=0.4), "rotary_percentage of head_size is 3; it must be a multiple of 2"), (dict(n_layer=3), "missing model.layers.2.input_layernorm.weight"),
    (dict(n_query_groups=4), "unknown transformer.h.0.attn.qkv.weight (64, 32)")])
def test_what_is_not_served_is_refused_by_its_key(changes, words, tmp_path):
    folder = copy_of("llama3", tmp_path)
    change(folder, **changes)
    with pytest.raises(ConfigError) as caught:
        load(folder)
    assert words in str(caught.value) and str(folder) in str(caught.value) and str(caught.value).isprintable()


def test_foreign_keys_that_are_off_change_nothing(tmp_path):
    """Keys of other models and unknown ones that are off change nothing."""
    folder = copy_of("llama3", tmp_path)
    before = load(folder)
    change(folder, gelu_approximate="tanh", n_expert_per_token=2, a_new_key=False, another=None, sliding_window_size=256)
    assert load(folder).spec == before.spec


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("content, words", [
    (b"- 1\n", "holds a list of 1; it must hold keys and values"), (b"a: [\n", "is not valid YAML"), (b"", "holds null"), (b"\xff\xfe\x00", "is not valid YAML"),
    (b"!!python/object/apply:os.system ['touch run']\n", "is not valid YAML"), (b"n_layer: 2\n", "the tensors do not match this model: missing gpt_neox."), (b"[" * 50_000, "is not valid YAML"),
    (b"a: [" + b"1, " * 100_000 + b"]", "has 300,005 bytes; the limit for such files is 65,536"),
    (b"a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + b"".join(b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 10)) for c in range(98, 120)), 'the key "a" is not known'),
    (b"sliding_window_indices: &a [*a, *a]\nparallel_residual: false\nnorm_class_name: RMSNorm\nmlp_class_name: LLaMAMLP\n", 'sliding_window_indices[0] is "list"'),
    (b"n_layer: .nan\nmlp_class_name: LLaMAMLP\nnorm_class_name: RMSNorm\nparallel_residual: false\n", "n_layer is NaN")])
def test_a_hostile_config_is_one_line(content, words, tmp_path):
    folder = copy_of("llama3", tmp_path)
    (folder / "model_config.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(folder)
    assert words in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("state, words", [
    ([1], "holds list instead of a state dict"), ({"model": Evil()}, "model is StandIn"), ({"x": torch.zeros(3)}, "missing model.embed_tokens.weight"),
    ({"lm_head.weight": torch.zeros(3, dtype=torch.int64)}, "lm_head.weight is int64"), ({"transformer.h.0.attn.qkv.weight": torch.tensor(1.0)}, "missing model.embed_tokens.weight"),
    ({"transformer.h.0.attn.attn.weight": torch.zeros(64)}, "q_proj.weight is (32,) instead of (32, 32)"), ({"lm_head.weight": torch.tensor(1.0), "transformer.wte.weight": torch.tensor(1.0)}, "missing")])
def test_a_hostile_weights_file_is_one_line(state, words, tmp_path, capfd):
    """A hostile file of weights is one line, and runs nothing."""
    folder = copy_of("llama3", tmp_path)
    torch.save(state, folder / "lit_model.pth")
    with pytest.raises(ConfigError) as caught:
        load(folder)
    assert words in str(caught.value) and str(caught.value).isprintable() and capfd.readouterr().out == ""


def test_objects_of_a_training_are_passed_over(tmp_path, capfd):
    folder = copy_of("llama3", tmp_path)
    state = torch.load(folder / "lit_model.pth")
    before = bits(load(folder))
    torch.save({"model": state, "optimizer": Evil(), "hparams": {"out_dir": Path("out"), "device": torch.device("cpu"), "type": torch.bfloat16}}, folder / "lit_model.pth")
    assert bits(load(folder)) == before and capfd.readouterr().out == ""


def test_a_cut_file_of_weights_is_named(tmp_path):
    folder = copy_of("llama3", tmp_path)
    data = (folder / "lit_model.pth").read_bytes()
    (folder / "lit_model.pth").write_bytes(data[:len(data) // 2])
    with pytest.raises(ConfigError, match="lit_model.pth is truncated"):
        load(folder)


def test_a_missing_tokenizer_json_says_how_to_get_one(tmp_path):
    folder = copy_of("llama3", tmp_path)
    (folder / "tokenizer.json").rename(folder / "spiece.model")
    with pytest.raises(ConfigError, match="has no tokenizer.json; it has spiece.model, which this server does not read"):
        load(folder)


def test_folders_and_files_lead_to_the_model(tmp_path):
    """The folder, its file and folders of folders find the model."""
    folder = copy_of("qwen3", tmp_path)
    for path in (folder, folder / "lit_model.pth"):
        source = resolve_model(Settings(model=str(path)))
        assert (source.kind, source.path, source.name, source.chosen) == ("litgpt", folder, "qwen3", f"litgpt folder {folder}")
    [found] = find_models(tmp_path)
    assert (found.path, found.name, found.trouble) == (folder, "qwen3", "") and {Path(each[0]).name for each in found.stamp} >= {
        "model_config.yaml", "lit_model.pth", "prompt_style.yaml", "tokenizer.json"}
    with pytest.raises(ConfigError, match=f"{folder} is a folder of litgpt: give it"):
        resolve_model(Settings(model=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"-s 5: only for nanochat checkpoints, and .*qwen3 is a litgpt folder"):
        resolve_model(Settings(model=str(folder), step=5))


def test_a_run_s_steps_are_watched_and_named(tmp_path):
    """Steps of a run are watched, and its folder names them."""
    run = tmp_path / "out"
    for name in ("step-000002", "step-000004", "final"):
        shutil.copytree(copy_of("llama3", tmp_path / "made" / name), run / name)
    (run / "final" / "lit_model.pth.lora").write_bytes(b"x")
    (run / "step-000006").mkdir()
    shutil.copy(run / "final" / "lit_model.pth", run / "step-000006")
    assert [(step.path.name, step.run, step.step, step.missing, step.trouble) for step in find_steps(run)] == [
        ("step-000002", run, 2, "", ""), ("step-000004", run, 4, "", ""), ("step-000006", run, 6, "model_config.yaml", "")]
    assert {Path(each[0]).name for each in find_steps(run)[0].stamp} == {"lit_model.pth", "model_config.yaml", "tokenizer.json", "tokenizer_config.json"}
    with pytest.raises(ConfigError, match="out has folders of litgpt; give one of them: .*/final, .*/step-000002, .*/step-000004"):
        resolve_model(Settings(model=str(run)))


def test_other_weights_are_noticed(tmp_path):
    folder = copy_of("llama3", tmp_path)
    source, settings, digest = resolve_model(Settings(model=str(folder))), Settings(model=str(folder)), sampled_digest(folder)
    refuse_changed(source, settings)
    assert folder / "lit_model.pth" in files_of(folder)
    state = torch.load(folder / "lit_model.pth")
    torch.save({name: 2 * tensor for name, tensor in state.items()}, folder / "lit_model.pth")
    assert sampled_digest(folder) != digest
    with pytest.raises(Changed):
        refuse_changed(source, settings)


def test_the_original_s_files_count_where_they_lie(tmp_path):
    """Hugging Face files that it was made from count where they still lie beside."""
    folder = copy_of("llama3", tmp_path)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(as_hugging_face(copy_of("llama3", tmp_path / "again"), tmp_path / "hf") / name if name == "config.json" else tmp_path / "hf" / name, folder / name)
    assert resolve_model(Settings(model=str(folder))).kind == "hf" and len(find_models(folder)) == 1


def test_a_tuning_dataset_decides_the_chat_format(tmp_path):
    """A dataset that a model was tuned with decides how chats are written."""
    folder = copy_of("qwen3", tmp_path, template="{{ 'another' }}")
    tokenizer = open_tokenizer(load(folder).text)
    preamble = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    asked = tokenizer.render([Message("user", "Why?")])
    assert tokenizer.decode(asked).removeprefix("<s>") == f"{preamble}### Instruction:\nWhy?\n\n### Response:\n"
    turns = [Message("system", "Be brief. "), Message("user", "Why?"), Message("assistant", "So."), Message("user", "Why not?")]
    ids = tokenizer.render(turns)
    assert b"".join(map(tokenizer.piece, ids)).decode() == (    # special tokens have no bytes
        "Be brief. ### Instruction:\nWhy?\n\n### Response:\nSo.\n\n### Instruction:\nWhy not?\n\n### Response:\n")
    assert [token for token in ids if token > 255] == [256, 257]
    (folder / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Qwen3\n")
    assert load(folder).text.chat_template == "{{ 'another' }}"


def test_a_folder_is_served_quantized_with_an_adapter(tmp_path):
    folder = copy_of("qwen3", tmp_path)
    random_adapter(tmp_path / "tuned", 2, {"self_attn.q_proj": (64, 32), "mlp.down_proj": (32, 48)}, size=1.0)
    hf = as_hugging_face(folder, tmp_path / "hf")
    texts = {}
    for path in (folder, hf):
        with server(path, "--quantize", "q8_0", "--adapter", f"tuned={tmp_path / 'tuned'}") as (_, url):
            names = [each["id"] for each in get(url + "/v1/models")["data"]]
            texts[path] = [json.loads(post(url + "/v1/completions", {"model": name, "prompt": "To be", "max_tokens": 24, "temperature": 0}).read())["choices"][0]["text"]
                           for name in names]
            if path == folder:
                chat = json.loads(post(url + "/v1/chat/completions", ask("Why?", max_tokens=8, temperature=0)).read())
                assert chat["usage"]["prompt_tokens"] > 140     # the preamble, byte by byte
    assert len(texts[folder]) == 2 and texts[folder] == texts[hf] and texts[folder][0] != texts[folder][1]


def test_check_examines_a_folder(tmp_path):
    folder = copy_of("llama3", tmp_path)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "a"}')
    found = ExaminedModel(resolve_model(Settings(model=str(folder))), Settings(model=str(folder)))
    assert stated_scaling(found) == {"type": "llama3", "factor": 32.0, "where": "rope_scaling", "original": 64}
    assert "eos_token of tokenizer_config.json" in key_of_eos(found) and found.json("tokenizer_config.json")["eos_token"] == "a"
