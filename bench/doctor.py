"""What does the doctor (`chat_server.py check MODEL`) find, and what does it say of good models?

    python bench/doctor.py                      every fault, in a tiny model of its own
    python bench/doctor.py --good FILE ...      and false alarms: what it says of these, and of the tiny models without their faults
    python bench/doctor.py --requantized FILE   and of this one requantized by our `quantize` to every type, which takes an hour for 1 GB
    python bench/doctor.py --requantized FILE --llama-cpp LIBLLAMA.so       by llama.cpp's instead (bench/llama_cpp_quantize.py)

A fault is found if a check that it names yields an error or a warning, or if the model is refused. An error or a warning about a
good model is a false alarm.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from llama_cpp_quantize import TYPES as LLAMA_CPP_TYPES      # noqa: E402
from sick_models import NUMBERS, OF_TEXT, diagnose, small_bytes      # noqa: E402
from tiny_gguf import gguf_bytes, random_llama, small_gguf_metadata      # noqa: E402

try:
    from sick_weights import OF_WEIGHTS      # noqa: E402
except ImportError:
    OF_WEIGHTS = ()
FAULTS = (*OF_TEXT, *OF_WEIGHTS)


def tried(fault):
    """The checks that find a fault, and the seconds that this took."""
    with tempfile.TemporaryDirectory() as folder:
        path = fault.mutate(fault.make(Path(folder)))
        began = time.monotonic()
        return diagnose(path, against=fault.against and fault.against()).finds(fault), time.monotonic() - began


def good_models(named):
    """(name, how to make it) of every good model: those named, and each that a fault is made in."""
    yield from ((name, lambda folder, name=name: Path(name)) for name in named)
    for make in dict.fromkeys(fault.make for fault in FAULTS):
        yield make.__name__, make
    for path in sorted((ROOT / "tests/fixtures/nanochat").iterdir()):
        yield f"nanochat {path.name}", lambda folder, path=path: path


def false_alarms(make):
    with tempfile.TemporaryDirectory() as folder:
        diagnosis = diagnose(make(Path(folder)))
        return [f"{finding.severity}: {finding.check}: {finding.what}" for finding in diagnosis.serious] + (
            [diagnosis.refused] if diagnosis.refused else [])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--good", nargs="*", default=(), metavar="MODEL")
    parser.add_argument("--requantized", nargs="*", default=(), metavar="GGUF", help="also each file requantized to every type")
    parser.add_argument("--llama-cpp", metavar="LIBLLAMA", help="a shared library of llama.cpp, whose quantize then writes them")
    parser.add_argument("--types", nargs="*", default=(), help="and only to these types")
    parser.add_argument("--only-good", action="store_true", help="leave out the faults")
    parser.add_argument("--vocabularies", nargs="*", default=(), metavar="GGUF", help="also a tiny model with the tokenizer of each file, which may "
                        "have no tensors, as llama.cpp's ggml-vocab-*.gguf")
    parser.add_argument("--templates", nargs="*", default=(), metavar="JINJA", help="also a tiny model with each chat template, and a tokenizer of "
                        "bytes that has the names in the template as tokens")
    parser.add_argument("--families", action="store_true", help="also the tiny model of each family that tests write, as a folder and a GGUF file")
    options = parser.parse_args()
    found = 0
    print("| fault | found by | s |\n|---|---|---|")
    for fault in () if options.only_good else FAULTS:
        checks, took_s = tried(fault)
        found += bool(checks)
        print(f"| {fault.name} | {', '.join(checks) or '**not found**'} | {took_s:.1f} |", flush=True)
    print(f"\n{found} of {len(FAULTS)} faults found\n")
    alarms = count = 0
    models = [*good_models(options.good), *requantized(options.requantized, options.llama_cpp, options.types),
              *(families() if options.families else ()), *map(of_vocabulary, options.vocabularies),
              *map(of_template, options.templates)]
    for name, make in models:
        said = false_alarms(make)
        count, alarms = count + 1, alarms + bool(said)
        print(f"{count} {name}: {len(said)} alarms", flush=True)
        for line in said:
            print(f"{name}: {line}", flush=True)
    print(f"{alarms} of {count} good models with a false alarm")


TYPES = ("bf16", "q8_0", "q6_k", "q5_k_m", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs",
         "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "iq3_s", "mxfp4_moe")


def requantized(paths, library, types):
    """Each file in every type that needs no importance, by our `quantize` or by llama.cpp's `library`."""
    for path in paths:
        for kind in types or (LLAMA_CPP_TYPES if library else TYPES):
            def make(folder, path=path, kind=kind):
                target = folder / f"{kind}.gguf"
                command = [ROOT / "chat_server.py", "quantize", path, "-o", target, "--type", kind]
                if library:
                    command = [ROOT / "bench/llama_cpp_quantize.py", library, path, target, kind]
                subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
                return target
            yield f"{Path(path).name} as {kind}{' by llama.cpp' if library else ''}", make


def of_vocabulary(path):
    def make(folder):
        (folder / "model.gguf").write_bytes(small_bytes(path))
        return folder / "model.gguf"
    return Path(path).name, make


NAMES = re.compile(r"<[|｜][^<>\s|｜]{1,60}[|｜]>|</?s>|<(?:start|end)_of_turn>|<turn\|>|<\|[a-z_]+>|<eos>|<bos>|\[/?[A-Z_]{3,}\]|</?think>|</?tool_call>")
ENDS = re.compile(r"(?i)end.of(?!.role)|eot|eom|turn\|>$|return|role_end|message_sep|assistant_end|eos|</s>|im_end|<\|end\|>|<\|user\|>|im_assistant_end")


def of_template(path):
    """The ends of answers are guessed by their names: a wrong guess is an alarm too."""
    def make(folder):
        template = Path(path).read_text()
        names = ["<first>", "<last>", *dict.fromkeys(NAMES.findall(template))]
        ends = [name for name in names if ENDS.search(name)][:2] or ["<last>"]
        letters, metadata = small_gguf_metadata("gpt-2")["tokenizer.ggml.tokens"][:256], {}
        for key, name in zip(("eos", "eot"), ends):
            metadata[f"tokenizer.ggml.{key}_token_id"] = 256 + names.index(name)
        (folder / "model.gguf").write_bytes(gguf_bytes({
            "general.architecture": "llama", **NUMBERS, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": [*letters, *names], "tokenizer.ggml.token_type": [1] * 256 + [3] * len(names), "tokenizer.ggml.merges": [],
            "tokenizer.ggml.bos_token_id": 256, "tokenizer.chat_template": template, **metadata},
            random_llama(vocab=256 + len(names), numbers=NUMBERS)))
        return folder / "model.gguf"
    return Path(path).name, make


def families():
    """Tiny models of every family, as tests write them."""
    import encoders
    from families import GGUF_MODELS, MODELS, as_gguf, make_model, save
    for name in encoders.MODELS:
        yield f"{name} embedder", lambda folder, name=name: encoders.save_folder(folder / "model", name, encoders.make_encoder(name)) or folder / "model"
    for name in MODELS:
        yield f"{name} folder", lambda folder, name=name: save(make_model(name), folder / "model")
    for name, changes in GGUF_MODELS.items():
        def make(folder, name=name, changes=changes):
            as_gguf(folder / "model.gguf", make_model(name, **changes))
            return folder / "model.gguf"
        yield f"{name} GGUF", make


if __name__ == "__main__":
    main()
