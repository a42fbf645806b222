"""The time to the first token about a new photo, with random weights of SmolVLM-256M's or LFM2-VL-450M's shape: chat_server beside llama-server, in turns.

    python bench/pictures.py [--llama-server PATH] [--tower f16|q8_0|f32] [--shape lfm2-vl-450m] [--width 1152] [--height 864] [--rounds 3] [--ours "PYTHON SCRIPT"]

Both have the same files, which this program writes: a GGUF model in Q8_0, and an mmproj whose matrices are of the type --tower. Each round
asks one and then the other about a photo that neither has seen; the first round warms up. Then the same photo again, which is cached. Then a
chat streams while a prompt of as many tokens as a photo has comes, and while a new photo comes: the longest time between two of its tokens. The
vocabulary is small, so the head costs little. Medians.
"""

import argparse
import base64
import io
import json
import shlex
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from servers import started

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

TEXT = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192)
TOWER = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512, patch_size=16)
LFM2_TEXT = dict(hidden_size=1024, intermediate_size=6656, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=8, max_position_embeddings=8192,
                 full_attn_idxs=[2, 5, 8, 10, 12, 14])
LFM2_TOWER = dict(model_type="siglip2_vision_model", hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, num_patches=256, patch_size=16)
LFM2_TILES = dict(tile_size=512, max_image_tokens=256, min_image_tokens=64, min_tiles=2, max_tiles=10)      # as llama.cpp has them, which reads no such keys


def in_type(kind):
    """As what a tensor is written: matrices in `kind`, all else in float32."""
    import gguf
    import numpy as np

    def store(name, weight):
        if weight.ndim != 2 or kind == "f32" or name == "v.position_embd.weight":
            return weight
        return weight.astype(np.float16) if kind == "f16" else (gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0)
    return store


def write_smolvlm(folder, tower):
    import tiny_sight
    import transformers
    config = transformers.SmolVLMConfig(
        text_config=dict(model_type="llama", vocab_size=tiny_sight.VOCABULARY, rms_norm_eps=1e-5, rope_parameters=dict(rope_type="default", rope_theta=100_000.0), pad_token_id=None, **TEXT),
        vision_config=TOWER, scale_factor=4, image_token_id=258, pad_token_id=0, tie_word_embeddings=False)
    model = transformers.SmolVLMForConditionalGeneration(config)
    return (tiny_sight.write_model(folder / "bench-Q8_0.gguf", model, in_type("q8_0")),
            tiny_sight.write_mmproj(folder / "mmproj-bench.gguf", model, longest=2048, store=in_type(tower)))


def write_lfm2_vl(folder, tower):
    import sight_families
    import transformers
    config = transformers.Lfm2VlConfig(text_config=sight_families.TEXT | LFM2_TEXT | {"model_type": "lfm2"}, vision_config=LFM2_TOWER, image_token_id=258, projector_hidden_size=2560)
    model = transformers.Lfm2VlForConditionalGeneration(config)
    path = sight_families.write_family(folder, "lfm2_vl", model, quantized=True, store=in_type(tower), **{f"clip.vision.{key}": value for key, value in LFM2_TILES.items()})
    return path, folder / "mmproj-tiny-F32.gguf"


# shape -> what writes its files, tokens of a text that is as long as a photo of a megapixel
SHAPES = {"smolvlm-256m": (write_smolvlm, 900), "lfm2-vl-450m": (write_lfm2_vl, 1780)}


def photo(width, height, seed):
    """A data URI of a PNG that compresses as photos do."""
    import numpy as np
    from PIL import Image
    rough = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC).save(file, "png", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


class Contestant:
    """What is measured of a server."""

    def __init__(self, server):
        self.server, self.name = server, server.name

    def ask(self, content, tokens=1, stream=False):
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0, "stream": stream,
                "ignore_eos": True, "logit_bias": {str(LETTER): 100}}
        return self.server.open("/v1/chat/completions", body)

    def first_token_s(self, content):
        began_s = time.perf_counter()
        with self.ask(content) as response:
            usage = json.load(response)["usage"]
        return time.perf_counter() - began_s, usage["prompt_tokens"]

    def longest_gap_s(self, content):
        """Of the tokens of another chat, while this is asked; None: for a second."""
        times, done = [], threading.Event()

        def chat():
            with self.ask("Count.", 6000, stream=True) as response:
                for line in response:
                    if b'"content"' in line:
                        times.append(time.perf_counter())
                    if done.is_set():
                        return

        reader = threading.Thread(target=chat)
        reader.start()
        while len(times) < 20:
            time.sleep(0.01)
        began_s = time.perf_counter()
        if content is None:
            time.sleep(1)
        else:
            self.first_token_s(content)
        ended_s = time.perf_counter()
        time.sleep(0.1)
        done.set()
        reader.join()
        inside = [at for at in times if began_s <= at <= ended_s]
        return max(b - a for a, b in zip([began_s, *inside], [*inside, ended_s]))


def about(uri):
    return [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "What is this?"}]


def measure(contestants, asked, tokens_of_text):
    found, seed = {}, 0
    keep = lambda what, server, value: found.setdefault((what, server.name), []).append(value)     # noqa: E731
    for number in range(asked.rounds + 1):
        uri = photo(asked.width, asked.height, number)
        for server in contestants:
            first_s, tokens = server.first_token_s(about(uri))
            again_s, _ = server.first_token_s(about(uri))
            if number:
                keep("first token, new photo", server, first_s)
                keep("first token, the same again", server, again_s)
                keep("tokens", server, tokens)
    for number in range(asked.rounds):
        for server in contestants:
            keep("longest gap, alone", server, server.longest_gap_s(None))
            keep("longest gap, beside a text", server, server.longest_gap_s(f"{number}{server.name}" + "a" * tokens_of_text))
            keep("longest gap, beside a photo", server, server.longest_gap_s(about(photo(asked.width, asked.height, 1000 + number))))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("width", 1152), ("height", 864), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tower", choices=("f16", "q8_0", "f32"), default="f16")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="smolvlm-256m")
    parser.add_argument("--llama-server")
    parser.add_argument("--ours", default=f"{sys.executable} {ROOT / 'chat_server.py'}")
    parser.add_argument("--log", help="the servers' logs go into this file")
    asked, contestants = parser.parse_args(), []
    global LETTER
    import torch
    from image_conversations import byte_tokenizer
    torch.manual_seed(0)
    LETTER = byte_tokenizer().token_to_id("a")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write, tokens_of_text = SHAPES[asked.shape]
        model, eyes = write(Path(folder), asked.tower)
        commands = {"chat_server": [*shlex.split(asked.ours), "serve", model, "--drafts", "none"]}
        if asked.llama_server:
            commands["llama-server"] = [asked.llama_server, "-m", model, "--mmproj", eyes, "-t", "2", "-c", "16384", "-np", "2"]
        for name, command in commands.items():
            contestants.append(Contestant(stack.enter_context(started(command, name, log=asked.log, cwd=ROOT))))
        found = measure(contestants, asked, tokens_of_text)
    print(f"{asked.shape}, {asked.width} x {asked.height}, tower in {asked.tower}, {asked.rounds} rounds; medians")
    for what in dict.fromkeys(what for what, _ in found):
        values = {name: statistics.median(found[what, name]) for each, name in found if each == what}
        print(f"{what}: " + ", ".join(f"{name} {value:,.0f}" if what == "tokens" else f"{name} {value:.3f} s" for name, value in values.items()))


if __name__ == "__main__":
    main()
