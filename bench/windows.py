"""The KV cache of a long context where most layers have a sliding window, beside the same without giving pages back.

    python bench/windows.py [--tokens 32000]

The model has Gemma 3 1B's layers as the cache sees them (26, of which 22 have a window of 512 keys; one kv head of 256 values), and
otherwise a random one that is quick to compute: width 64, 288 tokens.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests" / "support")]

CONFIG = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 288, "num_hidden_layers": 26, "num_attention_heads": 4,
          "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512, "max_position_embeddings": 32768, "query_pre_attn_scalar": 256,
          "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None}


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(folder, tokens, apart):
    import numpy
    import torch

    import chat_server as cs
    if not apart:
        cs.group_layers = lambda windows, layers, context, apart=True, group=cs.group_layers: group((), layers, context)
    settings = cs.Settings(model=folder, kv_cache_memory=1 << 30, max_batch=2)
    ids = tuple(numpy.random.default_rng(1).integers(0, 256, tokens).tolist())
    most = 0
    with torch.inference_mode():
        model, engine = cs.build_engine(cs.resolve_model(settings), settings, torch.device("cpu"))
        before = resident()
        engine.add(cs.Assignment("long", ids, cs.AnswerParams(), 64))
        while engine.busy:
            engine.step()
            most = max(most, sum(map(engine.scheduler._held, engine.scheduler.running)))
    groups = engine.transformer.groups
    page = cs.Transformer.page_bytes(model.spec, engine.transformer.dtype, groups)
    print(json.dumps({"groups": len(groups.windows), "pages": most, "MiB of pages": round(most * page / 2**20, 1),
                      "pages_for": engine.pool.pages_for(tokens + 64, 256), "the process grew by MiB": round((resident() - before) / 2**20, 1),
                      "longest context in 256 MiB": cs.longest_context(cs.PagePool((256 << 20) // page, groups.windows), 1 << 20, 256)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32000)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        return measure(options.folder, options.tokens, not options.whole)
    import transformers
    from families import save
    with tempfile.TemporaryDirectory() as folder:
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("gemma3_text", **CONFIG))
        save(model, Path(folder))
        for flags in ([], ["--whole"]):
            subprocess.run([sys.executable, __file__, "--tokens", str(options.tokens), "--folder", folder, *flags], check=True)
    return None


if __name__ == "__main__":
    main()
