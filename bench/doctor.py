"""What does the doctor (`chat_server.py check MODEL`) find, and what does it say of good models?

    python bench/doctor.py                      every fault, in a tiny model of its own
    python bench/doctor.py --good FILE ...      and false alarms: what it says of these, and of the tiny models without their faults

A fault is found if a check that it names yields an error or a warning, or if the model is refused. An error or a warning about a
good model is a false alarm.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from sick_models import OF_TEXT, diagnose      # noqa: E402

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
    parser.add_argument("--families", action="store_true", help="also the tiny model of each family that tests write, as a folder and a GGUF file")
    options = parser.parse_args()
    found = 0
    print("| fault | found by | s |\n|---|---|---|")
    for fault in FAULTS:
        checks, took_s = tried(fault)
        found += bool(checks)
        print(f"| {fault.name} | {', '.join(checks) or '**not found**'} | {took_s:.1f} |", flush=True)
    print(f"\n{found} of {len(FAULTS)} faults found\n")
    alarms = count = 0
    models = [*good_models(options.good), *(families() if options.families else ())]
    for name, make in models:
        said = false_alarms(make)
        count, alarms = count + 1, alarms + bool(said)
        for line in said:
            print(f"{name}: {line}", flush=True)
    print(f"{alarms} of {count} good models with a false alarm")


def families():
    """Tiny models of every family, as tests write them."""
    from families import GGUF_MODELS, MODELS, as_gguf, make_model, save
    for name in MODELS:
        yield f"{name} folder", lambda folder, name=name: save(make_model(name), folder / "model")
    for name, changes in GGUF_MODELS.items():
        def make(folder, name=name, changes=changes):
            as_gguf(folder / "model.gguf", make_model(name, **changes))
            return folder / "model.gguf"
        yield f"{name} GGUF", make


if __name__ == "__main__":
    main()
