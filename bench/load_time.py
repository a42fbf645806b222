"""How long a large model takes to load, compared with reading it from disk, and the peak memory.

    python bench/load_time.py FOLDER [--gigabytes 10] [--rounds 3] [flags of serve]
    python bench/load_time.py MODEL.gguf

makes FOLDER unless it exists (random bfloat16 weights in Llama 8B's shape, with as many layers as the size allows). Then, in each
round, it drops the files from the page cache, reads them with read(2), drops them again, and loads the model in a fresh process;
with the files now in the page cache, it reads and loads once more. The peak is the process's VmHWM, including mapped files; its own
memory (RssAnon, sampled every 10 ms) is shown too. It first writes as much new memory as the files have bytes, in huge pages:
no loader can avoid the time that the system takes to provide that. Delete FOLDER afterwards.
"""

import argparse
import json
import mmap
import os
import re
import subprocess
import sys
import time
from pathlib import Path

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)     # with it each process that starts compiles our modules anew
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
    give_every_token_a_text(folder / "tokenizer.json")


def give_every_token_a_text(path):
    """Random weights draw any id of the vocabulary; a server that sends no text for most of them cannot be measured."""
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens([f" word{number}" for number in range(tokenizer.get_vocab_size(), VOCABULARY)])
    tokenizer.save(str(path))


def drop(files):
    """Drop the files from the page cache."""
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


def new_memory(size):
    """Seconds to write `size` bytes of memory new to this process, on one core."""
    import numpy
    memory, begin = mmap.mmap(-1, size), time.perf_counter()
    memory.madvise(mmap.MADV_HUGEPAGE)
    numpy.frombuffer(memory, numpy.uint8)[::4096] = 1
    return time.perf_counter() - begin


def memory(pid, name):
    """A line of /proc/PID/status in bytes; 0 if the process has ended."""
    try:
        found = re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def load(folder, flags):
    """In a process of its own: build the engine as a worker does, but with a small KV cache."""
    import torch

    from chatlm.cli import parse_command_line
    from chatlm.commands import COMMANDS
    from chatlm.common.hub.find import resolve_model
    from chatlm.worker.build import build_engine
    settings = parse_command_line(["serve", str(folder), "--kv-cache-memory", "64M", *flags], os.environ, COMMANDS)
    before, begin, used = memory("self", "VmRSS"), time.perf_counter(), time.process_time()
    with torch.inference_mode():
        _, engine = build_engine(resolve_model(settings), settings, torch.device("cpu"))
    seconds = time.perf_counter() - begin, time.process_time() - used
    print(json.dumps([*seconds, before, memory("self", "VmHWM"), memory("self", "VmRSS"), engine.transformer.weight_types]))


def measure(folder, flags):
    """load() in a fresh process -> what it prints, and its largest RssAnon."""
    child = subprocess.Popen([sys.executable, __file__, str(folder), "--load", *flags], stdout=subprocess.PIPE, text=True,
                             stderr=subprocess.DEVNULL)
    own = 0
    while child.poll() is None:
        own = max(own, memory(child.pid, "RssAnon"))
        time.sleep(0.01)
    return *json.loads(child.stdout.read().splitlines()[-1]), own


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
    files = sorted(options.folder.glob("*.safetensors")) if options.folder.is_dir() else [options.folder]
    size = sum(path.stat().st_size for path in files)
    print(f"{size / 1e9:.2f} GB in {len(files)} files; as much new memory takes {new_memory(size):.1f} s", flush=True)
    for cached in (False, True) * options.rounds:
        if not cached:
            drop(files)
        disk_s = read(files)
        if not cached:
            drop(files)
        load_s, cpu_s, before, peak, after, kinds, own = measure(options.folder, flags)
        print(f"{'cached' if cached else 'cold  '} read(2) {disk_s:.1f} s ({size / 1e9 / disk_s:.2f} GB/s), load {load_s:.1f} s "
              f"({load_s / disk_s:.2f} times; {cpu_s:.1f} s of CPU), peak {peak / 1e9:.2f} GB, the files and {(peak - size) / 1e9:.2f} GB; "
              f"without mapped files {own / 1e9:.2f}; loaded {after / 1e9:.2f}, {before / 1e9:.2f} before; {kinds}", flush=True)
    return None


if __name__ == "__main__":
    main()
