"""The same files about the same pictures, in chat_server and in llama-server (mtmd): how near the probabilities of the next tokens are.

    python bench/beside_mtmd.py --llama-server PATH [--pictures 4] [--tokens 4]

Tiny random models in float32, as the tests have them, in the shapes that llama.cpp expects. For each size of a picture: the largest difference of
the logarithms of probabilities, scaled to be 1 together, over the likeliest tokens that both name, at each token of an answer of As, which a bias
makes such. The sizes: one that no server resizes, one in tiles, and others.
Stretched: the makers' processor makes the picture fill a square or its tiles, where mtmd adds a black border. The last column shows how much a picture matters here: the difference to the next picture's.
"""

import argparse
import math
import shlex
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "bench")]
from image_conversations import byte_tokenizer     # noqa: E402
from pictures import LFM2_TILES, photo     # noqa: E402
from servers import started     # noqa: E402

LETTER = byte_tokenizer().token_to_id("a")
QUESTION = "What is this?"
# as the tests' template makes it; each server puts a picture's marks around it, but the line feeds of Gemma 3's makers, which llama-server leaves out
PROMPTS = {name: f"<|im_start|>User:{space}<MARKER>{space}{QUESTION}<end_of_utterance>\nAssistant:"
           for name, space in (("smolvlm", ""), ("lfm2_vl", ""), ("gemma3", "\n\n"), ("qwen3_vl", ""))}
MOST = 20       # likeliest tokens


def smolvlm(folder):
    import tiny_sight
    model = tiny_sight.make_smolvlm()
    tiny_sight.write_model(folder / "tiny.gguf", model)
    tiny_sight.write_mmproj(folder / "mmproj.gguf", model)
    return folder / "tiny.gguf", folder / "mmproj.gguf", {"tiles": (192, 128), "resized": (170, 100), "smaller": (400, 300)}


def lfm2_vl(folder):
    import sight_families
    model = sight_families.make_lfm2_vl(patch=16, places=256)
    model_path = sight_families.write_family(folder, "lfm2_vl", model, **{f"clip.vision.{key}": value for key, value in LFM2_TILES.items()})
    return model_path, folder / "mmproj-tiny-F32.gguf", {"whole": (512, 256), "tiles": (1024, 1024), "resized": (500, 333), "resized tiles": (1200, 800), "stretched": (1152, 864)}


def gemma3(folder):
    import sight_families
    model = sight_families.FAMILIES["gemma3"][0]()
    return sight_families.write_family(folder, "gemma3", model), folder / "mmproj-tiny-F32.gguf", {"whole": (64, 64), "resized": (170, 170), "stretched": (170, 100)}


def qwen3_vl(folder):
    import sight_qwen
    return sight_qwen.write_qwen(folder, sight_qwen.make_qwen("qwen3_vl")), folder / "mmproj-tiny-F32.gguf", {"whole": (64, 64), "resized": (60, 60)}


def ours(server, uri, tokens):
    """For each token of an answer of As {id of a token: logarithm of its probability}."""
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": QUESTION}]}], "max_tokens": tokens, "temperature": 0,
            "logit_bias": {str(LETTER): 100}, "logprobs": True, "top_logprobs": MOST}
    return steps_of(server.post("/v1/chat/completions", body)["choices"][0]["logprobs"]["content"])


def theirs(server, uri, tokens, prompt):
    marker = server.get("/props")["media_marker"]
    body = {"prompt": {"prompt_string": prompt.replace("<MARKER>", marker), "multimodal_data": [uri.partition(",")[2]]}, "n_predict": tokens, "temperature": 0, "n_probs": MOST,
            "cache_prompt": False, "logit_bias": [[LETTER, 100]]}
    return steps_of(server.post("/completion", body)["completion_probabilities"])


def steps_of(content):
    return [{each["id"]: each["logprob"] for each in one["top_logprobs"]} for one in content]


def difference(one, other):
    """The largest of two answers, and how many logarithms were compared."""
    largest, count = 0.0, 0
    for some, others in zip(one, other):
        if not (both := (some.keys() & others.keys()) - {LETTER}):
            continue
        scales = [math.log(sum(math.exp(each[token]) for token in both)) for each in (some, others)]
        largest, count = max(largest, *(abs(some[token] - scales[0] - others[token] + scales[1]) for token in both)), count + len(both)
    return largest, count


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--llama-server", required=True)
    parser.add_argument("--ours", default=f"{sys.executable} {ROOT / 'chat_server.py'}")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--families", nargs="*", default=[*PROMPTS])
    parser.add_argument("--log", help="the servers' logs go into this file")
    asked = parser.parse_args()
    makers = {maker.__name__: maker for maker in (smolvlm, lfm2_vl, gemma3, qwen3_vl)}
    print("family, picture: largest difference, of how many; difference between two pictures")
    for name in asked.families:
        with tempfile.TemporaryDirectory() as folder:
            model, eyes, sizes = makers[name](Path(folder))
            our_command = [*shlex.split(asked.ours), "serve", model, "--mmproj", eyes, "--drafts", "none", "--dtype", "float32"]
            their_command = [asked.llama_server, "-m", model, "--mmproj", eyes, "-t", "2", "-c", "8192", "-np", "1", "-fa", "off", "-ctk", "f32", "-ctv", "f32"]
            with started(our_command, "chat_server", log=asked.log) as us, started(their_command, "llama-server", log=asked.log) as them:
                for size, (width, height) in sizes.items():
                    uris = [photo(width, height, seed) for seed in range(asked.pictures)]
                    mine = [ours(us, uri, asked.tokens) for uri in uris]
                    found = [difference(each, theirs(them, uri, asked.tokens, PROMPTS[name])) for each, uri in zip(mine, uris)]
                    matter = min(difference(a, b)[0] for a, b in zip(mine, mine[1:])) if len(mine) > 1 else 0.0
                    print(f"{name}, {width} x {height} ({size}): {max(each for each, _ in found):.2e}, {sum(count for _, count in found)}; {matter:.2e}", flush=True)


if __name__ == "__main__":
    main()
