"""The doctor: each fault of a table is found, good models have none, and hostile ones end in a sentence."""

import json
import os
import random
import sys
from pathlib import Path

import pytest

import chat_server as cs
import forked
import sick_models
from chatlm.common.config import Settings
from chatlm.common.hub.find import resolve_model
from chatlm.common.hub.local import no_progress
from chatlm.common.messages.doctor import DoctorConfig, Examined, Finding
from chatlm.front.admission.admission import Admission
from chatlm.front.intake.sandboxed import PREPARE_S
from chatlm.terminal import check as check_command
from chatlm.terminal.check import Examination, ModelReport
from chatlm.worker.doctor import examine, template
from chatlm.worker.doctor.checks import CHECKS, Check
from chatlm.worker.doctor.findings import error, note, worst
from chatlm.worker.doctor.fingerprints import fingerprint, likeness, packed
from chatlm.worker.doctor.hard_texts import FINGERPRINTED
from chatlm.worker.doctor.known_tokenizers import KNOWN
from families import make_model, save
from nightly import WHOLE, by_day
from sick_models import CHATML, NUMBERS, OF_TEXT, diagnose, pieces_gguf, rewritten, small_gguf
from tiny_gguf import gguf_bytes, letter_of, random_llama, small_gguf_metadata

SCRIPT = Path(cs.__file__).resolve()


def check(*words, **environment):
    return forked.run_command(SCRIPT, ["check", *map(str, words)], os.environ | environment)


@pytest.mark.parametrize("fault", OF_TEXT, ids=lambda fault: fault.name)
def test_each_tokenizer_or_template_fault_is_found(fault, tmp_path):
    diagnosis = diagnose(fault.mutate(fault.make(tmp_path)), only=fault.finds)
    assert diagnosis.finds(fault), [finding.what for finding in diagnosis.findings]


MAKES = dict.fromkeys(fault.make for fault in OF_TEXT)


# by day without the default model's tokenizer in GGUF, of which the command says so
@pytest.mark.parametrize("make", by_day(MAKES, *(make for make in MAKES if make is not small_gguf)))
def test_the_models_without_their_faults_are_fine(make, tmp_path):
    diagnosis = diagnose(make(tmp_path))
    assert (diagnosis.serious, diagnosis.refused) == ([], "")


@pytest.mark.parametrize("written, switch", [
    ("{% if enable_thinking %}<think>{% else %}</think>{% endif %}", "is off unless a request turns it on"),        # Laguna
    ("{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}", "can be turned off"),
    ("<think>{# </think> #}", "cannot be turned off")])
def test_a_report_says_if_thinking_can_be_switched(written, switch, tmp_path):
    save(make_model("llama2"), tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}<|assistant|>" + written)
    (note_of_template,) = [finding.what for finding in diagnose(tmp_path, only=["template"]).findings if "thinking: " in finding.what]
    assert f"thinking: <think> to </think>, which {switch};" in note_of_template


def test_nanochat_and_the_default_model_are_fine(nanochat_fixtures, default_model_path):
    """nanochat's checkpoints (by day the oldest and the newest) and the default model are fine. By day each check of the default model's copies is test_doctor_weights'."""
    for path in (*sorted(nanochat_fixtures.iterdir())[::1 if WHOLE else 5], *[default_model_path] * WHOLE):
        diagnosis = diagnose(path)
        assert (diagnosis.serious, diagnosis.refused) == ([], ""), path
    assert not WHOLE or "encodes like the tokenizer of SmolLM2" in [finding.what for finding in diagnosis.findings]


def folder_with(tmp_path, name, data):
    """A folder whose only tokenizer is this file."""
    folder = save(make_model("llama3.2", vocab_size=1024), tmp_path / "folder")
    (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(data)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}))
    return folder


TOKENIZERS = Path(__file__).parents[1] / "fixtures" / "tokenizers"
KINDS = {
    "GGUF": (small_gguf, "byte-level BPE with words cut as by", "tokenizer.ggml.model \"gpt2\""),
    "GGUF of pieces": (pieces_gguf, "sentencepiece's BPE", "tokenizer.ggml.model \"llama\""),
    "folder": (lambda tmp_path: save(make_model("llama3.2"), tmp_path / "folder"), "byte-level BPE, 260 tokens", "tokenizer.json"),
    "tokenizer.model": (lambda tmp_path: folder_with(tmp_path, "tokenizer.model", (TOKENIZERS / "llama.model").read_bytes()),
                        "sentencepiece's BPE", "tokenizer.model"),
    "unigram": (lambda tmp_path: folder_with(tmp_path, "tokenizer.model", (TOKENIZERS / "unigram.model").read_bytes()),
                "sentencepiece's unigram", "tokenizer.model"),
    "nanochat": (lambda tmp_path: TOKENIZERS.parent / "nanochat" / "gen6", "tiktoken's byte-level BPE", "tokenizer.pkl")}


@pytest.mark.parametrize("kind", KINDS)
def test_check_says_which_tokenizer_a_model_has(kind, tmp_path):
    make, words, where = KINDS[kind]
    [finding] = diagnose(make(tmp_path), only=["tokenizer"]).findings
    assert finding.severity == "note" and words in finding.what and finding.where == where, finding


@pytest.mark.parametrize("key, name", (("tokenizer.ggml.pre", "no-such-cut"), ("tokenizer.ggml.model", "rwkv")))
def test_a_tokenizer_that_is_not_known_is_named(key, name, tmp_path):
    refused = diagnose(rewritten(small_gguf(tmp_path), {key: name})).refused
    assert name in refused and key in refused and "\n" not in refused


def from_ranks(folder, with_merges):
    """A whole model with a small vocabulary: each token joins two earlier ones at random, as in ranks that
    nobody trained on words, so that many cannot come from any text."""
    dice = random.Random(5)
    metadata = small_gguf_metadata("qwen2")
    letters = [letter_of(byte) for byte in range(33, 127)]
    made, merges = list(letters), []
    while len(merges) < 200:
        first, second = dice.choice(made), dice.choice(made)
        if first + second not in made:
            made.append(first + second)
            merges.append(f"{first} {second}")
    tokens = [*map(letter_of, range(256)), *made[len(letters):], "<|end|>"]
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
                 "tokenizer.ggml.merges": merges if with_merges else merges[:20],
                 "tokenizer.ggml.eos_token_id": len(tokens) - 1}
    path = folder / "ranks.gguf"
    path.write_bytes(gguf_bytes({**metadata, **NUMBERS}, random_llama(vocab=len(tokens), numbers=NUMBERS)))
    return path


def test_a_small_vocabulary_of_ranks_is_no_fault(tmp_path):
    """What cannot come from any text is a note there, unless its merges are missing."""
    whole = diagnose(from_ranks(tmp_path, with_merges=True), only=["reach"])
    assert [finding.severity for finding in whole.findings] == ["note"]
    broken = diagnose(from_ranks(tmp_path, with_merges=False), only=["reach"])
    assert [finding.severity for finding in broken.findings] == ["error"]


@pytest.mark.parametrize("model", by_day(["nanochat-d4-sft", "SmolLM2-135M-Instruct.Q4_1"], "nanochat-d4-sft"))
def test_the_command_has_a_verdict_and_a_status(model, default_model_path, nanochat_fixtures, tmp_path):
    """By day the default model's likeness is asked for in this process."""
    fine = check(nanochat_fixtures / "gen5" if "nanochat" in model else default_model_path)
    assert (fine.returncode, fine.stderr) == (0, "") and fine.stdout.startswith(f"{model}: fine (")
    assert "nanochat" in model or "encodes like the tokenizer of SmolLM2" in fine.stdout
    assert "encodes like the tokenizer of SmolLM2" in [finding.what for finding in diagnose(default_model_path, only=["likeness"]).findings]
    sick = check(rewritten(small_gguf(tmp_path), {"tokenizer.ggml.eos_token_id": 260}), "--json")
    body = json.loads(sick.stdout)
    assert (sick.returncode, sick.stderr, body["verdict"], body["counts"]["error"]) == (1, "", "error", 1)
    assert [one["name"] for one in body["checks"]][0] == "opening" and {"tokenizer", "template"}.isdisjoint(body["findings"][0])
    assert body["findings"][0]["check"] == "ends" and '" the"' in body["findings"][0]["what"]


def test_another_process_s_template_cannot_hang_it(tmp_path):
    """A loop without end, and one that fills memory, are findings; the checks after them are made."""
    for body, limit_s, words in (
            ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", 0.5, "of the processor"),
            ("{% set a = namespace(b='x' * 1000000) %}{% for i in range(20) %}{% set a.b = a.b + a.b %}{% endfor %}",
             60, "takes more memory")):
        path = rewritten(small_gguf(tmp_path), {"tokenizer.chat_template": CHATML + body})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sick_models, "CHECKS", tuple(row._replace(limit_s=limit_s, memory=256 << 20)
                                                       for row in CHECKS if row.name == "template"))
            [finding] = diagnose(path).serious
        assert finding.severity == "error" and words in finding.what, finding


def test_a_template_has_the_time_a_server_gives_it():
    assert (template.COMPILE_S, template.FILL_S) == (PREPARE_S, Admission.TEMPLATE_S)


def test_a_check_that_breaks_is_a_finding():
    def broken(examined):
        yield note("before")
        raise KeyError("x")

    found = examine.findings_of(Check("broken", broken), None)
    assert [finding.severity for finding in found] == ["note", "warning"] and "KeyError: 'x'" in found[1].what
    assert worst(found) == "warning"


SICK = f"""
import os, signal, sys, threading
sys.path.insert(0, {str(SCRIPT.parent)!r})
from chatlm.common.processes.child import run_role
from chatlm.worker.doctor import examine
from chatlm.worker.doctor.checks import Check
from chatlm.worker.doctor.findings import note
examine.CHECKS = (Check("first", lambda examined: [note("before")]), Check("dies", lambda examined: os.kill(os.getpid(), signal.SIGKILL)),
                  Check("hangs", lambda examined: threading.Event().wait(), limit_s=0.05), Check("last", lambda examined: [note("after")]))
sys.exit(run_role(*sys.argv[1:]))
"""


async def test_a_check_that_dies_or_hangs_is_a_finding(monkeypatch, nanochat_fixtures):
    """A check that ends its process or hangs is a finding, and the others are made."""
    monkeypatch.setattr(check_command, "PROCESS_COMMAND", (sys.executable, "-c", SICK))
    settings = Settings(command="check", model=str(nanochat_fixtures / "gen5"))
    report = await Examination(DoctorConfig(settings, resolve_model(settings), None, 1), no_progress).run()
    found = {one.check: [(finding.severity, finding.what) for finding in one.findings] for one in report.examined}
    assert [*found] == ["opening", "first", "dies", "hangs", "last"] and found["first"] == [("note", "before")] and found["last"] == [("note", "after")]
    [(severity, what)] = found["dies"]
    assert severity == "error" and "killed by SIGKILL" in what and found["hangs"] == [("error", "the check has no result: it takes too long")]


def test_names_in_a_report_cannot_move_the_cursor():
    finding = examine.labelled("ends", [error("bad \x1b[31mred\u202e", "a\nb")])
    text = "\n".join(ModelReport("\x1b]0;x\x07m", "\x9b", (Examined("ends", 0.1, finding),)).lines())
    assert not any(ord(character) < 32 and character != "\n" or character in "\x9b\u202e" for character in text)
    assert text.count("\n") == 2 and "\\x1b[31mred\\u202e (a b)" in text


def test_the_worst_finding_comes_first_and_decides():
    found = tuple(Finding("a", severity, severity) for severity in ("note", "warning", "error"))
    report = ModelReport("m", "d", (Examined("a", 0.0, found),))
    assert [finding.severity for finding in report.findings] == ["error", "warning", "note"] and report.verdict == "error"
    assert ModelReport("m", "d", (Examined("a", 0.0, found[:1]),)).verdict == "fine"


def test_a_fingerprint_names_the_texts_that_differ():
    hashes = fingerprint(lambda text: list(text.encode()))
    known = {"mine": packed([*hashes[:-2], b"abc", b"def"]), "other": KNOWN["SmolLM2"]}
    found = likeness(hashes, lambda text: False, known)
    assert found.name == "mine" and found.different == FINGERPRINTED[-2:] and found.compared == len(FINGERPRINTED)
    assert likeness(hashes, lambda text: True, known).compared == 0
    assert likeness(fingerprint(lambda text: [len(text)]), lambda text: False, known) is None


@pytest.mark.parametrize("make, words", [
    (lambda folder: Path("/dev/zero"), "a device"), (lambda folder: folder, "MODEL may be"),
    (lambda folder: cut(pieces_gguf(folder)), "bytes"), (lambda folder: folder / "missing\x1b[2J.gguf", "\\x1b[2J")])
def test_what_cannot_be_opened_is_one_line(make, words, tmp_path):
    run = check(make(tmp_path))
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1) and words in run.stderr and "\x1b" not in run.stderr


def cut(path):
    os.truncate(path, path.stat().st_size // 2)
    return path
