"""lm-eval's local-completions against the server at argv[1], and its `hf` backend on a twin of the same checkpoint.

The checkpoint is nanochat's first generation, in the folder argv[2], which transformers' NanoChat computes too. The
server is asked for its tokenizer (`remote`); the twin has one made of the same file. The tasks' items are written into
the folder argv[3]. torch comes from the folder argv[4], after this environment's own packages. Prints, for each backend
and task, what each item got, as JSON.
"""

import json
import pickle
import sys
from pathlib import Path

sys.path.append(sys.argv[4])

import lm_eval  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from transformers.convert_slow_tokenizer import TikTokenConverter  # noqa: E402

WINDOW = 64      # tokens that either backend gives the model at most
NAMES = {"model.embed_tokens": "transformer.wte", "model.layers": "transformer.h", "self_attn.q_proj": "attn.c_q",
         "self_attn.k_proj": "attn.c_k", "self_attn.v_proj": "attn.c_v", "self_attn.o_proj": "attn.c_proj", "mlp.fc1": "mlp.c_fc",
         "mlp.fc2": "mlp.c_proj"}
WORDS = "the cat sat on a mat and the dog ran to it while rain fell over all of the old town by the sea".split()


def twin(folder):
    """The checkpoint as transformers' model."""
    (meta,), (weights,) = folder.glob("meta_*.json"), folder.glob("model_*.pt")
    config = json.loads(meta.read_text())["model_config"]
    model = transformers.NanoChatForCausalLM(transformers.NanoChatConfig(
        vocab_size=config["vocab_size"], hidden_size=config["n_embd"], intermediate_size=4 * config["n_embd"],
        num_hidden_layers=config["n_layer"], num_attention_heads=config["n_head"], num_key_value_heads=config["n_kv_head"],
        max_position_embeddings=config["sequence_len"], rms_norm_eps=1.1920929e-07, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}))
    state = {name.removeprefix("_orig_mod."): tensor for name, tensor in torch.load(weights, weights_only=True).items()}
    named = {}
    for name in model.state_dict():
        upstream = name
        for theirs, ours in NAMES.items():
            upstream = upstream.replace(theirs, ours)
        named[name] = state.pop(upstream).float()
    assert not state
    model.load_state_dict(named)
    # upstream's tables of this generation are rounded to bfloat16
    model.model.rotary_emb.register_forward_hook(lambda module, inputs, tables: tuple(table.bfloat16().float() for table in tables))
    return model.eval()


def fast_tokenizer(pickled):
    encoding = pickle.loads(pickled.read_bytes())      # the fixture's own

    class Converter(TikTokenConverter):
        load_tiktoken_bpe = staticmethod(lambda file: encoding._mergeable_ranks)

    made = Converter("", encoding._pat_str, extra_special_tokens=encoding._special_tokens).converted()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|bos|>", eos_token="<|assistant_end|>")


def write_items(path):
    """Some short, some longer than the window."""
    lines = []
    for item in range(24):
        text = " ".join(WORDS[(item * 7 + place * (item % 5 + 1)) % len(WORDS)] for place in range(4 + 5 * (item % 6)))
        lines.append({"prompt": text, "choices": [f" {WORDS[item % 19]}", f" {WORDS[(item + 3) % 19]} {WORDS[item % 7]}", "."], "label": item % 3,
                      "page": " ".join([text] * (1 + item % 4))})
    path.write_text("\n".join(map(json.dumps, lines)))


def tasks_of(items):
    def task(name, output_type, **more):
        return {"task": name, "output_type": output_type, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(items)}},
                "test_split": "test", "num_fewshot": 0, **more}

    return [task("choose", "multiple_choice", doc_to_text="{{prompt}}", doc_to_choice="{{choices}}", doc_to_target="{{label}}", target_delimiter="",
                 metric_list=[{"metric": "acc"}]),
            task("roll", "loglikelihood_rolling", doc_to_text="", doc_to_target="{{page}}", metric_list=[{"metric": "bits_per_byte"}]),
            task("go_on", "generate_until", doc_to_text="{{prompt[:40]}}", doc_to_target="{{choices[label]}}",
                 generation_kwargs={"until": ["."], "max_gen_toks": 8, "do_sample": False}, metric_list=[{"metric": "exact_match"}])]


def main():
    url, folder, work = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    write_items(work / "items.jsonl")
    model = twin(next((folder / "mid_checkpoints").iterdir()))
    tokenizer = fast_tokenizer(folder / "tokenizer/tokenizer.pkl")
    bos, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<|bos|>", "<|assistant_end|>"))
    model.generation_config = transformers.GenerationConfig(eos_token_id=[bos, end], pad_token_id=end)
    # either window has room for what the other backend adds: a token that is drawn, and one that is only a target
    here = HFLM(pretrained=model, tokenizer=tokenizer, max_length=WINDOW, batch_size=1, backend="causal")
    from lm_eval.api.registry import get_model
    there = get_model("local-completions")(base_url=url + "/v1/completions", model="default", tokenizer_backend="remote", num_concurrent=8,
                                           max_length=WINDOW + 2, max_retries=1)
    found = {}
    for backend, lm in (("hf", here), ("server", there)):
        samples = lm_eval.simple_evaluate(model=lm, tasks=tasks_of(work / "items.jsonl"), bootstrap_iters=0, log_samples=True,
                                          task_manager=TaskManager(include_defaults=False))["samples"]
        found[backend] = {name: [sample["filtered_resps"] for sample in sorted(samples[name], key=lambda sample: sample["doc_id"])] for name in samples}
    print(json.dumps(found))


main()
