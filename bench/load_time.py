"""How long a large Hugging Face folder takes to load, beside the time that its disk takes, and the memory at the peak.

    python bench/load_time.py FOLDER [--gigabytes 10] [--device-type cpu]

makes FOLDER (random bfloat16 weights of Llama 8B's shape, as many layers as make up the size) unless it is there, then, three
times, drops the files from the page cache, reads them with read(2), drops them again, and loads the model in a fresh process.
Delete FOLDER afterwards.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests" / "support")]

WIDTH, FFN, KEYS, VOCABULARY = 4096, 14336, 1024, 32000
LAYER = {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,), "self_attn.q_proj": (WIDTH, WIDTH),
         "self_attn.k_proj": (KEYS, WIDTH), "self_attn.v_proj": (KEYS, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH),
         "mlp.gate_proj": (FFN, WIDTH), "mlp.up_proj": (FFN, WIDTH), "mlp.down_proj": (WIDTH, FFN)}


def part(random, shape):
    return random[:shape[0]].clone() if len(shape) == 1 else random[:shape[0] * shape[1]].view(shape).clone()


def make(folder, size):
    import torch
    from families import write_tokenizer
    from safetensors.torch import save_file
    folder.mkdir(parents=True)
    random = torch.randn(VOCABULARY * WIDTH).mul_(0.02).bfloat16()
    per_layer = sum(2 * shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in LAYER.values())
    layers = round((size - 4 * VOCABULARY * WIDTH) / per_layer)
    shards = [{"model.embed_tokens.weight": (VOCABULARY, WIDTH), "lm_head.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}]
    shards += [{f"model.layers.{layer}.{name}.weight": shape for name, shape in LAYER.items()} for layer in range(layers)]
    index = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({key: part(random, shape) for key, shape in shard.items()}, folder / name)
        index |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": layers,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}))
    write_tokenizer(folder)


def drop(files):
    """Take the files out of the page cache."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files):
    buffer, begin = bytearray(16 << 20), time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begin


def load(folder, flags):
    """In a process of its own: build the engine as a worker does."""
    import torch

    import chat_server
    settings = chat_server.parse_command_line(["serve", str(folder), "--kv-cache-memory", "64M", *flags], os.environ)
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with torch.inference_mode():
        chat_server.build_engine(chat_server.resolve_model(settings), settings, torch.device("cpu"))
    print(json.dumps([time.perf_counter() - begin, before * 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--make", action="store_true", help="make the folder, measure nothing")
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args()
    if options.load:
        return load(options.folder, flags)
    if not options.folder.exists():
        make(options.folder, options.gigabytes * 1e9)
    if options.make:
        return None
    files = sorted(options.folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    for _ in range(options.rounds):
        drop(files)
        disk_s = read(files)
        drop(files)
        command = [sys.executable, __file__, str(options.folder), "--load", *flags]
        load_s, before, peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(f"{size / 1e9:.2f} GB: read(2) {disk_s:.1f} s ({size / 1e9 / disk_s:.2f} GB/s), load {load_s:.1f} s ({load_s / disk_s:.2f} times), "
              f"peak {peak / 1e9:.2f} GB ({before / 1e9:.2f} before): the files and {(peak - size) / 1e9:.2f} GB", flush=True)
    return None


if __name__ == "__main__":
    main()
