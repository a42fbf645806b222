"""The cost of adapters: steps of 32 rows with 1, 8 and 32 different adapters, compared with the base alone. Without front and HTTP.

    python bench/adapters.py [MODEL] [--rows 32] [--rank 16] [--adapters 1,8,32] [--context 200] [--rounds 40] [--dtype bfloat16]

The default model unless MODEL names another. Each adapter changes every linear layer. With N adapters each has 32 / N rows of
the step; "one row" is a step in which one of 32 rows has an adapter. All kinds of steps take turns; the least and the median time
of each, and the median of the processors' time, are shown, also relative to the base alone. A prompt of 256 tokens with one adapter is measured in the same way.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch    # noqa: E402
from safetensors.torch import save_file    # noqa: E402

from chatlm.common.config import Settings    # noqa: E402
from chatlm.common.hub.find import resolve_model    # noqa: E402
from chatlm.common.hub.local import no_progress    # noqa: E402
from chatlm.common.processes.start import threads_per_worker    # noqa: E402
from chatlm.worker.build import build_transformer    # noqa: E402
from chatlm.worker.model.batch import Batch    # noqa: E402
from chatlm.worker.ranks.alone import RankAlone    # noqa: E402
from chatlm.worker.weights.load import open_model    # noqa: E402

PAGE, PROMPT = 16, 256


def random_adapter(folder, model, rank, dtype, seed):
    """A peft folder of an adapter for every linear layer of a llama."""
    layer = model.layers[0]
    C, F, random = model.width, layer.feed.width, torch.Generator().manual_seed(seed)
    q, kv, _ = (run.length for run in layer.mixer.runs)
    shapes = {"self_attn.q_proj": (q, C), "self_attn.k_proj": (kv, C), "self_attn.v_proj": (kv, C), "self_attn.o_proj": (C, q),
              "mlp.gate_proj": (F, C), "mlp.up_proj": (F, C), "mlp.down_proj": (C, F)}
    tensors = {f"base_model.model.model.layers.{layer}.{module}.lora_{which}.weight": (0.01 * torch.randn(shape, generator=random)).to(dtype)
               for layer in range(len(model.layers)) for module, (rows, columns) in shapes.items()
               for which, shape in (("A", (rank, columns)), ("B", (rows, rank)))}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": [name.rpartition(".")[2] for name in shapes]}))
    return folder


def decode_batch(adapters, context):
    """A row for each of `adapters`, 0 for the base, after `context` tokens."""
    rows, pages = len(adapters), -(-context // PAGE)
    return Batch([100 + row for row in range(rows)], [99] * rows, [*range(rows + 1)], [context] * rows,
                 [[*range(row * pages, (row + 1) * pages)] for row in range(rows)], [*range(rows)], adapters=adapters if any(adapters) else [])


def prompt_batch(adapter):
    ids = [100 + n for n in range(PROMPT)]
    return Batch(ids, [-1, *ids[:-1]], [0, PROMPT], [PROMPT], [[*range(PROMPT // PAGE)]], [PROMPT - 1], adapters=[adapter] if adapter else [])


def beside(word, of, taken, base):
    return f"{word} {of(taken):8.2f} ms ({100 * of(taken) / of(base) - 100:+5.1f} %)"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", default="1,8,32")
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--threads", type=int, help="with one, the processors' time tells of the work alone: several threads wait for each other")
    args = parser.parse_args()
    counts, device = [int(word) for word in args.adapters.split(",")], torch.device("cpu")
    torch.set_num_threads(args.threads or threads_per_worker(1))
    settings = Settings(model=args.model, max_batch=args.rows, kv_cache_memory=1 << 30, adapter=("random",))
    source = resolve_model(settings, no_progress)
    _, transformer, pages, *_ = build_transformer(open_model(source, settings, device), source, settings, device, no_progress, RankAlone())
    assert pages >= args.rows * -(-args.context // PAGE), f"{pages} pages are too few for --rows and --context"
    with tempfile.TemporaryDirectory() as folder:
        sizes = [transformer.load_adapter(slot, random_adapter(Path(folder, str(slot)), transformer.unpadded, args.rank, getattr(torch, args.dtype), slot))
                 for slot in range(1, max(counts) + 1)]
    steps = {"base alone": decode_batch([0] * args.rows, args.context), "one row": decode_batch([1] + [0] * (args.rows - 1), args.context)}
    steps |= {f"{count} adapters": decode_batch([1 + row * count // args.rows for row in range(args.rows)], args.context) for count in counts}
    steps |= {"prompt, base": prompt_batch(0), "prompt, adapter": prompt_batch(1)}
    times, processors = {name: [] for name in steps}, {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, batch in steps.items():
            begin, busy = time.perf_counter(), time.process_time()
            transformer.forward(batch)
            times[name].append(1e3 * (time.perf_counter() - begin))
            processors[name].append(1e3 * (time.process_time() - busy))
    print(f"{source.name}, rank {args.rank}, {args.dtype}, {sizes[0] / 1e6:.1f} MB an adapter; {args.rows} rows after {args.context} tokens, "
          f"a prompt of {PROMPT}; {transformer.kernels.backend.name}, {torch.get_num_threads()} threads")
    for name, taken in times.items():
        base = "prompt, base" if name.startswith("prompt") else "base alone"
        print(f"{name:16} {beside('least', min, taken, times[base])}   {beside('median', statistics.median, taken, times[base])}   "
              f"{beside('processors, median', statistics.median, processors[name], processors[base])}")


if __name__ == "__main__":
    main()
