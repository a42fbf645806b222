"""One stream of a packed folder in the shape of bench/large_model.py beside that shape's GGUF file: speed in turns, and memory at load.

    python bench/packed_model.py FOLDER [--group 128] [--beside FOLDER/large-Q4_K_M.gguf] [--turns 6] [--tokens 64]

makes FOLDER/awq-GROUP unless it exists: AWQ with random codes, 1.1 billion weights, an embedding in bfloat16 that is the head too. Each model has
a process of its own; while one computes the others wait. Printed are the seconds and the memory of loading (its own, and the peak with mapped
files) beside the files' bytes, then of each turn the tokens a second of each, and the median ratio to the first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests" / "support")]
from large_model import FFN, HEADS, KV_HEADS, LAYERS, WIDTH    # noqa: E402

SHAPES = {"self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (KV_HEADS * WIDTH // HEADS, WIDTH),
          "self_attn.v_proj": (KV_HEADS * WIDTH // HEADS, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH),
          "mlp.gate_proj": (FFN, WIDTH), "mlp.up_proj": (FFN, WIDTH), "mlp.down_proj": (WIDTH, FFN)}


def make(folder, group):
    import torch
    from chatlm.common.hub.default_model import fetch_default_model
    from families import load
    from packers import AWQ
    from safetensors.torch import save_file
    text, dice, tensors = load(fetch_default_model()).text, numpy.random.default_rng(0), {}
    tokens = 49_152
    for layer in range(LAYERS):
        for name, (rows, columns) in SHAPES.items():
            module, groups = f"model.layers.{layer}.{name}.", columns // group
            words, zeros = (dice.integers(-2**31, 2**31, (count, rows // 8)).astype(numpy.int32) for count in (columns, groups))
            scales = dice.uniform(0.1, 0.3, (groups, rows)) / columns**0.5
            tensors |= {module + "qweight": torch.from_numpy(words), module + "qzeros": torch.from_numpy(zeros & 0x77777777),
                        module + "scales": torch.from_numpy(scales.astype(numpy.float16))}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
    tensors["model.norm.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
    tensors["model.embed_tokens.weight"] = (torch.randn(tokens, WIDTH) * 2.5 / WIDTH**0.5).bfloat16()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "tokenizer.json").write_bytes(text.payload)
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": tokens, "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "quantization_config": AWQ | {"group_size": group}}))


def status(key):
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))


def answer(path, tokens, more):
    """A model's process: a line in, the tokens a second of an answer out."""
    from chatlm.common.config import Settings
    from chatlm.common.hub.find import resolve_model
    from chatlm.common.messages.requests import SamplingParams
    from chatlm.worker.arrays.kinds import Device
    from chatlm.worker.build import build_engine
    from works import assignment
    settings = Settings(model=path, kv_cache_memory=64 << 20, max_batch=4, drafts=False, **more)
    begin = time.perf_counter()
    model, engine = build_engine(resolve_model(settings), settings, Device("cpu"))
    print(json.dumps([time.perf_counter() - begin, status("RssAnon"), status("VmHWM"), f"{model.description}; {engine.transformer.weight_types}"]), flush=True)
    for count, _ in enumerate(sys.stdin):
        engine.add(assignment(str(count), (5, 6, 7, 8), SamplingParams(temperature=1.0, seed=count), tokens, ignore_eos=True))
        engine.step()
        begin, steps = time.perf_counter(), 0
        while engine.busy:
            engine.step()
            steps += 1
        print(json.dumps((tokens - 1) / (time.perf_counter() - begin)), flush=True)


def contestant(path, tokens, more):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))}
    return subprocess.Popen([sys.executable, __file__, "--answer", str(path), "--tokens", str(tokens), "--settings", json.dumps(more)], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--group", type=int, nargs="*", default=[128])
    parser.add_argument("--beside", type=Path, nargs="*", default=[])
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--settings", type=json.loads, default={}, help="of each model, as {\"quantize\": \"q8_0\"}: what is float")
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.answer:
        return answer(asked.answer, asked.tokens, asked.settings)
    paths = [asked.folder / f"awq-{group}" for group in asked.group]
    for path, group in zip(paths, asked.group):
        if not path.exists():
            make(path, group)
    paths, running = [*asked.beside, *paths], []
    for path in paths:
        running.append(contestant(path, asked.tokens, asked.settings))
        seconds, own, peak, words = json.loads(running[-1].stdout.readline())
        size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
        print(f"{path.name}: {words}\n  loaded in {seconds:.1f} s; files {size / 1e6:,.0f} MB, memory {own / 1e6:,.0f}, peak with mapped files {peak / 1e6:,.0f}", flush=True)
    rates = [[] for _ in paths]
    for _ in range(asked.turns):
        for process, its in zip(running, rates):
            print("go", file=process.stdin, flush=True)
            its.append(json.loads(process.stdout.readline()))
        print("  ".join(f"{its[-1]:.1f}" for its in rates), "tokens/s", flush=True)
    for path, its in zip(paths, rates):
        print(f"{path.name}: {statistics.median(its):.1f} tokens/s, {statistics.median(a / b for a, b in zip(its, rates[0])):.2f} of {paths[0].name}'s")
    for process in running:
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    main()
