"""Loads mutations of good model files: `mutate_models.py KIND SEED COUNT FOLDER`, which forked.py starts, with little memory. For the
kind `packed` FOLDER/packed has good folders.

Each file must become a model that answers, or a ConfigError of one line. Anything else ends the process: a
traceback, SIGALRM when a load takes 30 s, a MemoryError when it takes a GiB. The last line printed names the
mutation.
"""

import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, os.environ.get("CHAT_SERVER_DIR") or str(Path(__file__).resolve().parents[2]))

import torch    # noqa: E402
from safetensors.torch import load_file, save_file    # noqa: E402

from chatlm.common.config import Settings    # noqa: E402
from chatlm.common.errors import ConfigError    # noqa: E402
from chatlm.common.hub.find import resolve_model    # noqa: E402
from chatlm.common.messages.requests import SamplingParams    # noqa: E402
from chatlm.worker.build import build_engine    # noqa: E402
from chatlm.worker.engine.warm_up import WarmUp    # noqa: E402
from works import assignment    # noqa: E402
from tiny_gguf import (LLAMA_NUMBERS, gguf_bytes, random_llama, sentencepiece_metadata,     # noqa: E402
                       small_gguf_metadata)

MEMORY = 1 << 30        # bytes that loads may take on top of the libraries
SECONDS = 30
TINY = LLAMA_NUMBERS | {"llama.embedding_length": 64, "llama.feed_forward_length": 96}
MORE_KEYS = [       # metadata that a file may have on top of a tiny GGUF's
    "general.name", "general.alignment", "llama.attention.key_length", "llama.attention.value_length",
    "llama.rope.dimension_count", "llama.rope.scaling.type", "llama.rope.scaling.factor", "tokenizer.chat_template",
    "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id",
    "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.scores", "tokenizer.ggml.merges"]
NUMBERS = [0, 1, -1, 2, 3, 7, 8, 16, 33, 64, 127, 255, 2**15, 2**16, *(2**n + d for n in (31, 32, 63) for d in (-1, 0)),
           2**53, 2**62]
FLOATS = [0.0, -0.0, 0.5, -1.0, 1e-38, 1e38, 1e300, float("nan"), float("inf"), float("-inf")]
TEXTS = ["", "llama", "gpt2", "linear", "none", "a" * 100, "\x00\x1b[31m\n", "{{ messages }}", "{% for", "日本", "1"]
LISTS = [[], [1], [1] * 8, ["a", "b"], [0.5] * 4, [True], [[1], [2]]]
POOLS = {int: NUMBERS, float: FLOATS, str: TEXTS, bool: [True, False]}


def any_value(dice, good):
    """A value of any type, sometimes close to the right one."""
    if isinstance(good, list) and good and dice.random() < 0.5:
        items = list(good)
        items[dice.randrange(len(items))] = dice.choice(items)
        return dice.choice([items, items[:dice.randrange(len(items))], len(items) * [dice.choice(POOLS[type(good[0])])]])
    if type(good) is int and dice.random() < 0.3:
        return good + dice.choice([-2, -1, 1, 2, 64])
    return dice.choice(dice.choice([*POOLS.values(), LISTS]))


def with_bytes_changed(dice, data, where):
    """Replace some bytes at the positions `where`, or cut off the rest."""
    data = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 4, 8])):
        at = dice.choice(where)
        number = dice.choice([each for each in NUMBERS if each >= 0]).to_bytes(8, "little")
        new = dice.choice([bytes([dice.randrange(256)]), bytes([data[at] ^ 1 << dice.randrange(8)]), b"\xff" * 8, number])
        data[at:at + len(new)] = new
    return bytes(data[:dice.choice(where)] if dice.random() < 0.1 else data)


def mutate_gguf(dice, folder):
    """A tiny GGUF in which some values, or some bytes before the tensors, are changed."""
    text = sentencepiece_metadata() | {"general.architecture": "llama"}
    if dice.random() < 0.7:
        text = small_gguf_metadata(dice.choice(["gpt-2", "llama-bpe", "qwen2"]))
    metadata, by_value = {**TINY, **text}, dice.random() < 0.6
    tensors = random_llama(vocab=len(text["tokenizer.ggml.tokens"]), numbers=TINY)
    for key in dice.sample([*metadata, *MORE_KEYS], dice.choice([1, 1, 2, 3])) if by_value else ():
        metadata[key] = any_value(dice, metadata.get(key))
        if dice.random() < 0.1:
            del metadata[key]
    data = gguf_bytes(metadata, tensors)
    if not by_value:
        header = len(data) - sum(tensor.nbytes for tensor in tensors.values())
        data = with_bytes_changed(dice, data, range(4, header))
    path = folder / "tiny.gguf"
    path.write_bytes(data)
    return path


def mutate_nanochat(dice, folder, good=Path(__file__).parents[1] / "fixtures/nanochat"):
    """A copy of a nanochat checkpoint with a change in the meta file, the pickle or the tensors' table."""
    base = shutil.copytree(good / f"gen{dice.randrange(1, 7)}", folder / "base")
    model, meta, pickled = (next(base.rglob(name)) for name in ("model_*.pt", "meta_*.json", "*.pkl"))
    path = dice.choice([None, meta, pickled, model])
    if path is None:
        found = json.loads(meta.read_text())
        config = found["model_config"]
        for key in dice.sample([*config, "more"], dice.choice([1, 1, 2])):
            config[key] = any_value(dice, config.get(key))
        meta.write_text(json.dumps(found))
        return base
    data = path.read_bytes()
    where = range(len(data))
    if path == model:       # the list of tensors is the zip's first file; its directory is at the end
        where = [*range(data.index(b"PK\x03\x04", 100)), *range(data.index(b"PK\x01\x02", len(data) - 20_000), len(data))]
    path.write_bytes(with_bytes_changed(dice, data, where))
    return base


def changed_tensor(dice, tensor):
    """A tensor of another type or shape, or with other bytes: NaN, groups, zero points and codes out of range."""
    how = dice.choice(["type", "shape", "bytes", "bytes", "bytes", "flat", "none"])
    if how == "type":
        return tensor.to(dice.choice([torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64]))
    if how == "shape" and tensor.ndim:
        axis = dice.randrange(tensor.ndim)
        return tensor.narrow(axis, 0, dice.choice([0, 1, max(tensor.shape[axis] - 1, 0)]) if tensor.shape[axis] else 0).contiguous()
    if how == "flat":
        return tensor.reshape(dice.choice([(-1,), (1, -1), (-1, 1), (1, *tensor.shape)])).contiguous()
    data = bytearray(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if how == "bytes" and data:
        data = with_bytes_changed(dice, data, range(len(data)))[:len(data)].ljust(len(data), b"\xff")[:len(data)]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(tensor.dtype).view(tensor.shape) if data else tensor


def mutate_packed(dice, folder):
    """A folder of packed weights, of those in `packed`, in which some settings, or some tensors, are changed, missing or called otherwise."""
    base = shutil.copytree(dice.choice(sorted((folder.parent / "packed").iterdir())), folder / "base")
    if dice.random() < 0.4:
        found = json.loads((base / "config.json").read_text())
        config = found["quantization_config"]
        config = config["config_groups"]["group_0"]["weights"] if "config_groups" in config and dice.random() < 0.7 else config
        for key in dice.sample([*config, "group_size", "dynamic"], dice.choice([1, 1, 2])):
            config[key] = any_value(dice, config.get(key))
        (base / "config.json").write_text(json.dumps(found))
        return base
    tensors = load_file(base / "model.safetensors")
    packed = [name for name in tensors if "_proj." in name]
    for name in dice.sample(packed, dice.choice([1, 1, 2])):
        tensor = tensors.pop(name)
        if dice.random() < 0.8:
            tensors[name if dice.random() < 0.95 else dice.choice(packed)] = changed_tensor(dice, tensor)
    save_file(tensors, base / "model.safetensors")
    return base


def outcome_of(path):
    """Load a file: "model" if that answers, otherwise the line of the ConfigError."""
    settings = Settings(model=str(path), kv_cache_memory=4 << 20, max_batch=4, prefill_chunk=16)
    source = resolve_model(settings)
    try:
        _, engine = build_engine(source, settings, torch.device("cpu"))
    except ConfigError as error:
        assert str(error).isprintable() and str(path) in str(error), str(error)
        assert "not enough memory" not in str(error), str(error)
        return str(error)
    WarmUp(engine).complete(lambda fraction: None)
    prompt = tuple(engine.tokenizer.encode_prompt("hello 12"))[:8] or (0,)
    engine.add(assignment("a", prompt, SamplingParams(temperature=0.0), 3))
    while engine.busy:
        engine.step()
    return "model"


def main(kind, seed, count, folder):
    dice, models = random.Random(int(seed)), 0
    mutate = {"gguf": mutate_gguf, "nanochat": mutate_nanochat, "packed": mutate_packed}[kind]
    torch.set_num_threads(1)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    with torch.inference_mode():
        for number in range(int(count)):
            place = Path(folder, str(number))
            place.mkdir()
            path = mutate(dice, place)
            print("mutation", number, flush=True)
            signal.alarm(SECONDS)
            outcome = outcome_of(path)
            signal.alarm(0)
            models += outcome == "model"
            print(outcome, flush=True)
            shutil.rmtree(place)
            gc.collect()        # engines refer to themselves
    print(f"{models} of {count} became models", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:5])
