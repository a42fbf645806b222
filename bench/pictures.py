"""How long a model of SmolVLM-256M's or LFM2-VL-450M's shape, with random weights, takes to its first token about a photo.

    python bench/pictures.py [--shape lfm2-vl-450m] [--width 1152] [--height 864] [--rounds 3] [--dtype bfloat16] [--prefill-chunk 256]

An engine in this process: each round has a new picture; the same picture is then asked about again, once with its pages in the
prefix cache and once with its rows alone. Printed: seconds to the first token of each, of resizing, and of the longest part between
which steps of other answers come, beside two chunks of a prompt. The vocabulary is small, so the head costs little.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests" / "support")]
from chatlm.common.config import Settings    # noqa: E402
from chatlm.common.hub.find import resolve_model    # noqa: E402
from chatlm.common.messages.requests import AnswerParams, Message, Piece, SamplingParams    # noqa: E402
from chatlm.common.text.load import open_tokenizer    # noqa: E402
from chatlm.worker.arrays.kinds import Device    # noqa: E402
from chatlm.worker.build import build_engine    # noqa: E402
from chatlm.worker.engine.sequence import Assignment    # noqa: E402
from chatlm.worker.model.tower import tiles_of    # noqa: E402

TEXT = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192)
TOWER = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512, patch_size=16)


LFM2_TEXT = dict(hidden_size=1024, intermediate_size=6656, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=8, max_position_embeddings=8192,
                 full_attn_idxs=[2, 5, 8, 10, 12, 14])


def write_lfm2_vl(folder):
    import sight_families
    import torch
    import transformers
    vision = dict(model_type="siglip2_vision_model", hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, num_patches=256, patch_size=16)
    config = transformers.Lfm2VlConfig(text_config=sight_families.TEXT | LFM2_TEXT | {"model_type": "lfm2"}, vision_config=vision, image_token_id=258, projector_hidden_size=2560)
    torch.manual_seed(0)
    sight_families.save_family(folder, "lfm2_vl", transformers.Lfm2VlForConditionalGeneration(config).bfloat16(), tile_size=512, max_image_tokens=256, min_image_tokens=64, max_tiles=10,
                               encoder_patch_size=16)


def write_smolvlm(folder):
    import tiny_sight
    import torch
    import transformers
    tiny_sight.SHAPES["bench"], tiny_sight.LONGEST = (512, 16, 4, 768, 12), 4
    config = transformers.SmolVLMConfig(
        text_config=dict(model_type="llama", vocab_size=tiny_sight.VOCABULARY, rms_norm_eps=1e-5, rope_parameters=dict(rope_type="default", rope_theta=100_000.0), pad_token_id=None, **TEXT),
        vision_config=TOWER, scale_factor=4, image_token_id=258, pad_token_id=0, tie_word_embeddings=False)
    torch.manual_seed(0)
    tiny_sight.save_sight(folder, "bench", transformers.SmolVLMForConditionalGeneration(config).bfloat16())


SHAPES = {"smolvlm-256m": write_smolvlm, "lfm2-vl-450m": write_lfm2_vl}


def first_token_s(engine, ids, picture, name):
    engine.add(Assignment(name, ids, AnswerParams(sampling=SamplingParams(temperature=0.0), ignore_eos=True), 1, pictures=(picture,)))
    began_s, longest_s, seen = time.perf_counter(), 0.0, False
    while engine.busy:
        step_s = time.perf_counter()
        seen = any(isinstance(event, Piece) for _, event in engine.step()) or seen
        longest_s = max(longest_s, time.perf_counter() - step_s)
    assert seen
    return time.perf_counter() - began_s, longest_s


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("width", 1152), ("height", 864), ("rounds", 3), ("prefill-chunk", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype")
    parser.add_argument("--shape", choices=SHAPES, default="smolvlm-256m")
    asked = parser.parse_args()
    from image_conversations import picture_of_size
    with tempfile.TemporaryDirectory() as folder:
        SHAPES[asked.shape](Path(folder))
        settings = Settings(model=folder, dtype=asked.dtype, prefill_chunk=asked.prefill_chunk, kv_cache_memory=512 << 20)
        model, engine = build_engine(resolve_model(settings), settings, Device("cpu"))
    tokenizer, found = open_tokenizer(model.text), {}
    for number in range(asked.rounds + 1):      # the first one warms up
        picture = picture_of_size(asked.width, asked.height, seed=number)
        ids = tuple(tokenizer.render([Message("user", "What is this?", None, (picture,), (0, "What is this?"))]))
        seen = engine.pictures.sight(Assignment("x", ids, AnswerParams(), 1, pictures=(picture,)), model.text.vision).seen[0]
        began_s = time.perf_counter()
        tiles_of(picture, seen.layout, engine.pictures.tower.eyes.filter)
        took = {"resizing": time.perf_counter() - began_s}
        took["a new picture"], took["its longest step"] = first_token_s(engine, ids, picture, "new")
        took["again, from the prefix cache"], _ = first_token_s(engine, ids, picture, "cached")
        engine.pool.forget_cached()
        took["again, from its rows"], took["its longest chunk"] = first_token_s(engine, ids, picture, "rows")
        for name, seconds in took.items() if number else ():
            found.setdefault(name, []).append(seconds)
    print(f"{asked.width} x {asked.height}: {seen.layout.tiles} tiles, {len(ids):,} tokens; the tower has {len(engine.pictures.tower.stages)} parts; {model.description}")
    for name, seconds in found.items():
        print(f"{name}: {statistics.median(seconds):.3f} s")


if __name__ == "__main__":
    main()
