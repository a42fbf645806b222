"""nanochat checkpoints as Hugging Face folders: transformers computes what this server computes."""

import itertools
import json
import shutil

import pytest
import torch

from chatlm.common.errors import ConfigError
from chatlm.common.messages.requests import Message
from exported import export, greedy, loaded, opened, our_logits
from generations import GENERATIONS
from lora import random_adapter
from nightly import by_day

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="session", params=GENERATIONS)
def exported(request, nanochat_fixtures, tmp_path_factory):
    """(the folder of a generation's checkpoint, what was exported of it)."""
    folder = tmp_path_factory.mktemp("exported") / request.param
    source = nanochat_fixtures / request.param
    export(source, "-o", folder, "--shard-size", "400k")
    return source, folder


def cases_of(source):
    return json.loads((source / "oracle.json").read_text())["cases"]


def test_transformers_computes_the_same_logits(exported):
    source, folder = exported
    model = loaded(folder, trust=True)
    for case in cases_of(source):
        ids = case["prompt_ids"] + case["greedy"]
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits[0]
        assert (theirs - our_logits(source, ids)).abs().max() <= 1e-5


@pytest.mark.parametrize("exported", by_day(GENERATIONS, "gen4", "gen6"), indirect=True)
def test_windows_are_the_same_beyond_the_context(exported):
    """A text of 700 tokens is longer than all windows."""
    source, folder = exported
    ids = torch.randint(0, 256, (700,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        theirs = loaded(folder, trust=True)(torch.tensor([ids])).logits[0]
    assert (theirs - our_logits(source, ids)).abs().max() <= 1e-5


@pytest.mark.parametrize("exported", by_day(GENERATIONS, "gen5"), indirect=True)
def test_greedy_tokens_are_upstream_s_with_a_cache_and_without(exported):
    source, folder = exported
    model = loaded(folder, trust=True)
    for case in cases_of(source):
        for use_cache in (True, False):
            assert greedy(model, [case["prompt_ids"]], len(case["greedy"]), use_cache=use_cache) == [case["greedy"]]


@pytest.mark.parametrize("exported, attention", by_day(
    [*itertools.product(GENERATIONS, ("sdpa", "eager"))], ("gen1", "sdpa"), ("gen6", "eager")), indirect=["exported"])
def test_a_left_padded_batch_answers_as_each_text_alone(exported, attention):
    source, folder = exported
    model = loaded(folder, trust=True)
    model.set_attn_implementation(attention)
    cases = cases_of(source)
    longest = max(len(case["prompt_ids"]) for case in cases)
    padding = [longest - len(case["prompt_ids"]) for case in cases]
    ids = [[7] * count + case["prompt_ids"] for count, case in zip(padding, cases)]
    mask = [[0] * count + [1] * (longest - count) for count in padding]
    assert greedy(model, ids, 30, mask) == [case["greedy"][:30] for case in cases]
    with torch.no_grad():       # without generate, which counts positions itself
        logits = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits[:, -1]
        alone = torch.stack([model(torch.tensor([case["prompt_ids"]])).logits[0, -1] for case in cases])
    assert (logits - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("exported", by_day(GENERATIONS, "gen1", "gen6"), indirect=True)
def test_a_text_that_comes_in_pieces_gives_the_same_logits(exported):
    """Several tokens at a time go through a cache, as with a prompt that is cached."""
    source, folder = exported
    model = loaded(folder, trust=True)
    ids = torch.tensor([cases_of(source)[2]["prompt_ids"]])
    with torch.no_grad():
        whole = model(ids).logits
        cache = transformers.DynamicCache(config=model.config)
        pieces = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([1, 2, 130, ids.shape[1] - 133], 1)]
    assert (torch.cat(pieces, 1) - whole).abs().max() <= 1e-5


@pytest.mark.parametrize("exported", by_day(GENERATIONS, "gen6"), indirect=True)
def test_beams_keep_what_belongs_to_them(exported):
    """Beam search reorders the cache; the smear's tokens must move along."""
    source, folder = exported
    model = loaded(folder, trust=True)
    ids = [cases_of(source)[1]["prompt_ids"]]
    beams = {"num_beams": 3, "num_return_sequences": 3}
    assert greedy(model, ids, 20, use_cache=True, **beams) == greedy(model, ids, 20, use_cache=False, **beams)


def test_the_chat_template_gives_our_tokens(exported):
    source, folder = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for case in cases_of(source):
        made = tokenizer.apply_chat_template(case["messages"], add_generation_prompt=True, return_dict=True)
        assert made["input_ids"] == case["prompt_ids"]
    ours = opened(source).text
    assert tokenizer("Hello.")["input_ids"][0] == tokenizer.bos_token_id == ours.bos_token
    assert tokenizer.eos_token_id == ours.eos_token


@pytest.mark.parametrize("exported", by_day(GENERATIONS, "gen5"), indirect=True)
def test_several_turns_and_a_system_message_are_rendered_as_here(exported):
    from chatlm.common.text.load import open_tokenizer
    source, folder = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    turns = [("system", "Be short."), ("user", "{{ 1 }} \n"), ("assistant", " A\n"), ("user", ""), ("assistant", "B"), ("user", "C")]
    messages = [{"role": role, "content": content} for role, content in turns]
    ours = open_tokenizer(opened(source).text).render([Message(role, content) for role, content in turns])
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"] == ours
    with pytest.raises(Exception, match="system message only as the first"):
        tokenizer.apply_chat_template([messages[1], messages[0]])


@pytest.mark.parametrize("exported", by_day(GENERATIONS, "gen5"), indirect=True)
def test_nobody_gets_another_model_without_its_code(exported):
    """transformers would load a `nanochat` of its own with random weights, silently."""
    _, folder = exported
    with pytest.raises(ValueError, match="trust_remote_code|custom code"):
        transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_answers_end_where_they_end_here(exported):
    source, folder = exported
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert set(ends) == opened(source).text.stop_tokens


def test_large_weights_are_in_numbered_files(exported):
    _, folder = exported
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = set(index["weight_map"].values())
    assert len(names) > 1 and {path.name for path in folder.glob("*.safetensors")} == names
    assert index["metadata"]["total_size"] < sum((folder / name).stat().st_size for name in names)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_smaller_type_is_what_transformers_loads(nanochat_fixtures, tmp_path, dtype):
    export(nanochat_fixtures / "gen5", "-o", tmp_path / "m", "--dtype", dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True)
    assert model.dtype == getattr(torch, dtype) and model.model.scalars["resid_lambdas"].dtype == torch.float32
    case = cases_of(nanochat_fixtures / "gen5")[1]
    logits = model(torch.tensor([case["prompt_ids"]])).logits[0, -1].float()
    assert (logits - torch.tensor(case["next_logits"])).abs().max() < 0.3


def test_embeddings_alone_are_refused_where_tokens_are_looked_up(exported):
    source, folder = exported
    model = loaded(folder, trust=True)
    embeds = model.get_input_embeddings()(torch.tensor([[1, 2, 3]]))
    if model.config.value_embed_layers:
        with pytest.raises(ValueError, match="give input_ids"):
            model(inputs_embeds=embeds)
    else:
        assert (model(inputs_embeds=embeds).logits - model(torch.tensor([[1, 2, 3]])).logits).abs().max() == 0


@pytest.mark.parametrize("exported", by_day(GENERATIONS, "gen1", "gen6"), indirect=True)
def test_a_copy_can_be_trained(exported):
    """A loss flows back to every weight that this text uses."""
    _, folder = exported
    model = loaded(folder, trust=True)
    ids = torch.arange(5, 25)[None]
    model(ids, labels=ids).loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


def test_an_adapter_is_merged(nanochat_fixtures, tmp_path):
    source = nanochat_fixtures / "gen4"
    adapter = random_adapter(tmp_path / "adapter", 4, {"self_attn.q_proj": (64, 64), "mlp.fc1": (256, 64)}, size=0.2)
    export(source, "-o", tmp_path / "m", "--lora", adapter)
    ids = cases_of(source)[1]["prompt_ids"]
    with torch.no_grad():
        theirs = loaded(tmp_path / "m", trust=True)(torch.tensor([ids])).logits[0]
    assert (theirs - our_logits(source, ids, lora=(str(adapter),))).abs().max() <= 1e-5
    assert (theirs - our_logits(source, ids)).abs().max() > 1e-3
    assert "LoRA adapter adapter is merged" in (tmp_path / "m" / "README.md").read_text()


def test_the_folder_runs_here_with_the_same_bits(exported):
    """Served, checked and evaluated like the checkpoint, also with --softcap; exported again it is the same."""
    source, folder = exported
    for case in cases_of(source):
        ids = case["prompt_ids"] + case["greedy"]
        assert torch.equal(our_logits(folder, ids), our_logits(source, ids))
    theirs, ours = opened(folder), opened(source)
    assert theirs.family == "nanochat" and theirs.text.stop_tokens == ours.text.stop_tokens and theirs.text.bos_token == ours.text.bos_token
    again = folder.with_name(folder.name + "-again")
    export(folder, "-o", again, "--shard-size", "400k")
    for path in folder.iterdir():
        assert path.name == "README.md" or path.is_dir() or path.read_bytes() == (again / path.name).read_bytes()


@pytest.mark.parametrize("exported", ["gen5"], indirect=True)
@pytest.mark.parametrize("changes, said", [
    ({"generation": 7}, "generation"), ({"generation": 4}, "rope_theta|qk_scale|value_gate|smear"), ({"qk_scale": 2.0}, "qk_scale is 2.0, and generation 5"), ({"layer_types": ["full_attention"]}, "layer_types must have"),
    ({"layer_types": ["x"] * 4}, "layer_types must have"), ({"sliding_window": "5"}, "sliding_window"), ({"hidden_size": 63}, "hidden_size"), ({"vocab_size": 5}, "has|vocab"), ({"rope_bfloat16": True}, "rope_bfloat16"),
    ({"num_attention_heads": 0}, "num_attention_heads"), ({"final_logit_softcapping": None}, "final_logit_softcapping"), ({"max_position_embeddings": 256}, "is")])
def test_a_folder_that_says_something_else_is_refused(exported, tmp_path, changes, said):
    _, folder = exported
    shutil.copytree(folder, tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=said):
        opened(tmp_path / "x")
