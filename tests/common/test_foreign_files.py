"""Files that others wrote: whatever lies in place of one, reading it costs little and ends in one line."""

import base64
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from chatlm.common.errors import ConfigError
from chatlm.common.files import MOST_OBJECT, copy_file, opened, read_object, read_small
from chatlm.common.hub import archives, trainers
from chatlm.common.hub.adapter_folders import base_of, is_other_base, short_name
from chatlm.common.hub.folder import find_models, trouble_with
from chatlm.common.hub.trainers import names_in
from chatlm.common.messages.requests import TextSpec
from chatlm.common.text.charsmap import check_charsmap
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.weights.text.sentencepiece_file import model_of, sentencepiece_json
from chatlm.worker.weights.text.tiktoken_file import tekken_json
from foreign_folders import KINDS, tekken, write_json
from patching import patch
from tiny_gguf import LLAMA_NUMBERS, random_llama, write_gguf

SUPPORT = Path(__file__).parents[1] / "support"
FIXTURES = Path(__file__).parents[1] / "fixtures"
INSTEAD = "pipe", "socket", "folder", "sparse", "/dev/zero", "/dev/stdin", "/dev/tty", "/proc/kmsg"


@pytest.mark.parametrize(("name", "trouble"), [
    ("file", ""), ("link", ""), ("folder", "{} is not a regular file"), ("missing", "{} is missing"), ("broken", "{} is a link to a missing file"),
    ("file/below", "{}: Not a directory"), ("x" * 300, "{}: File name too long"), ("itself", "{}: Too many levels of symbolic links")])
def test_why_a_file_cannot_be_read_is_said(tmp_path, name, trouble):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for link, target in (("link", "file"), ("broken", "missing"), ("itself", "itself")):
        (tmp_path / link).symlink_to(target)
    assert trouble_with(tmp_path / name) == trouble.format(tmp_path / name)


def read_all(folder, cases):
    """(the files that were opened in another way than ours, the fault of each case)"""
    done = subprocess.run([sys.executable, str(SUPPORT / "read_foreign.py"), str(folder)],
                          input=json.dumps(cases), capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-4000:]
    *opened_files, faults = done.stdout.splitlines()
    return opened_files, json.loads(faults)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_s_files_are_opened_in_one_way(kind, tmp_path):
    """The one that waits for nobody and takes regular files only, as each `open` below the folder shows."""
    folder = tmp_path / "models"
    folder.mkdir()
    model = KINDS[kind](folder / "one")
    other_ways, faults = read_all(folder, [[str(model), "", ""]])
    assert other_ways == [] and faults == [""]


def odd_cases(kind, folder, chosen=INSTEAD):
    model = KINDS[kind](folder / "one")
    names = sorted(path for path in (folder / "one").rglob("*") if path.is_file())
    return [[str(model), str(name), what] for name in names for what in chosen]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipe_or_an_endless_file_in_place_of_any_is_refused(kind, tmp_path):
    """Nothing waits for a writer or is read for ever; by night sockets, folders and huge files, too."""
    folder = tmp_path / "models"
    folder.mkdir()
    cases = odd_cases(kind, folder, ("pipe", "/dev/zero"))
    _, faults = read_all(folder, cases)
    assert len(cases) > 1
    assert [(case[1:], fault) for case, fault in zip(cases, faults) if fault] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_place_of_any_file_is_more_than_a_line(kind, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    cases = odd_cases(kind, folder)
    _, faults = read_all(folder, cases)
    assert [(case[1:], fault) for case, fault in zip(cases, faults) if fault] == []


# --- the one way -------------------------------------------------------------------------------


def test_a_small_file_has_a_limit(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"12345")
    assert read_small(path, 5) == b"12345"
    with pytest.raises(ConfigError, match="has 5 bytes; the limit for such files is 4"):
        read_small(path, 4)
    path.write_bytes(b"[" * (MOST_OBJECT + 1))
    with pytest.raises(ConfigError, match="the limit for such files"):
        read_object(path)
    for text in ("[1]", "{", "[" * 100_000, "{\"a\": " + "9" * 5000 + "}"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="config.json"):
            read_object(path)


def test_a_copy_replaces_nothing(tmp_path):
    """And is none of a file that never ends."""
    (tmp_path / "one").write_bytes(b"1")
    copy_file(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two").read_bytes() == b"1"
    with pytest.raises(FileExistsError):
        copy_file(tmp_path / "one", tmp_path / "two")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="is a device; it must be a regular file"):
        copy_file(tmp_path / "zero", tmp_path / "three")
    assert not (tmp_path / "three").exists()


def test_a_file_without_a_size_is_empty():
    """Some of the system's have no end either."""
    with opened(Path("/proc/self/status")) as file:
        assert file.read() == b""


# --- adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("base, short", [
    ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "llama321binstruct"),
    ("models--org--Name-2/snapshots/abc", "name2"), ("Qwen3-0.6B-Q4_K_M-GGUF", "qwen306b"),
    ("/home/me/.cache/hub/models--org--Some--Name/snapshots/0f/", "somename"),
    ("snapshots/one", "one"), ("models--one/snapshots/two", "two"), ("", "")])
def test_the_name_of_a_base_is_cut_to_what_counts(base, short):
    assert short_name(base) == short


@pytest.mark.parametrize("part", [
    "models--a--", "_q4_", "-4bit", "-", "models--", "/snapshots/", "\u00e9-fp8"])
def test_a_long_name_of_a_base_is_looked_at_in_part(part, tmp_path):
    """Two patterns took 26 s for 45 KB. Now they see a file name's length at most."""
    base = part * (45_000 // len(part)) + "!"
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": base})
    assert base_of(tmp_path) == ""
    assert len(short_name(base)) <= 255
    is_other_base(base, [base, "org/llama"])


# --- files of torch.save -----------------------------------------------------------------------


def archive(path, method=zipfile.ZIP_STORED, pickled=b"\x80\x02X\x05\0\0\0model.", members=0):
    with zipfile.ZipFile(path, "w", method) as made:
        made.writestr("archive/data.pkl", pickled * 50)
        for number in range(members):
            made.writestr(f"archive/data/{number}", b"")
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_damaged_archive_keeps_no_model_from_being_found(method, tmp_path):
    """zlib and lzma have errors of their own, which ended the start of the server, or all later scans."""
    write_gguf(tmp_path / "tiny.gguf", random_llama(), LLAMA_NUMBERS)
    path = archive(tmp_path / "model.pt", method)
    whole = path.read_bytes()
    dice = random.Random(1)
    for _ in range(20):
        data = bytearray(whole)
        for _ in range(4):
            data[dice.randrange(30, len(data))] = dice.randrange(256)
        path.write_bytes(data)
        assert "tiny" in {files.name for files in find_models(tmp_path)}
    path.write_bytes(whole)
    assert names_in(path) == ({}, set())        # torch.save never compresses


def test_a_long_table_of_contents_is_not_read(tmp_path, monkeypatch):
    path = archive(tmp_path / "model.pt", members=2000)
    assert "model" in names_in(path)[0]
    with opened(path) as file, zipfile.ZipFile(path) as made:
        size = archives.listed_bytes(file)
        assert size == path.stat().st_size - made.start_dir - archives.END.size
    monkeypatch.setattr(archives, "MOST_LISTED", size - 1)
    assert names_in(path) == ({}, set())
    large = archive(tmp_path / "large.pt", members=70_000)       # it needs the end of zip64
    with opened(large) as file:
        assert archives.listed_bytes(file) > 70_000 * 46


def test_a_pickle_is_looked_at_up_to_a_number_of_opcodes(tmp_path, monkeypatch):
    path = archive(tmp_path / "model.pt", pickled=b"\x80\x02" + b"N0" * 20 + b"X\x05\0\0\0model.")
    assert "model" in names_in(path)[0]
    monkeypatch.setattr("chatlm.common.hub.trainers.MOST_OPCODES", 30)
    assert names_in(path) == ({}, set())


def test_a_folder_that_breaks_our_reading_keeps_no_other_from_being_served(tmp_path, monkeypatch):
    """What was found before in it stays, too."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_gguf(tmp_path / name / f"{name}.gguf", random_llama(), LLAMA_NUMBERS)

    def broken(path, original=trainers.foreign):
        if path.name == "a":
            raise RuntimeError("boom")
        return original(path)

    patch(monkeypatch, trainers, "foreign", broken)
    found = find_models(tmp_path)
    assert {files.name for files in found if files.stamp} == {"a", "b"}
    assert [files.trouble for files in found if files.trouble] == [f"{tmp_path / 'a'} cannot be read: boom"]


def test_yaml_that_would_take_years_to_print_is_not_printed(tmp_path):
    """Sixty lists, each of two times the one before."""
    folder = tmp_path / "models"
    folder.mkdir()
    model = KINDS["litgpt_folder"](folder / "one")
    lists = ", ".join(["&l0 [x, x]", *(f"&l{n} [*l{n - 1}, *l{n - 1}]" for n in range(1, 60))])
    (model / "prompt_style.yaml").write_text(f"class_path: [{lists}]\n")
    _, first = read_all(folder, [[str(model), "", ""]])
    config = (model / "model_config.yaml").read_text()
    (model / "model_config.yaml").write_text(f"{config}\nnorm_class_name: [{lists}]\n")
    _, second = read_all(folder, [[str(model), "", ""]])
    assert first == [""] and "norm_class_name" in second[0] and "Traceback" not in second[0]


# --- tokenizers --------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, words", [
    ({"default_num_special_tokens": 10**9}, "default_num_special_tokens is 1000000000; it must be"),
    ({"default_num_special_tokens": 1e999}, "default_num_special_tokens is Infinity; it must be"),
    ({"default_vocab_size": 10**400}, "it must be an integer from 2 to"),
    ({"default_vocab_size": "276"}, 'default_vocab_size is "276"; it must be an integer'),
    ({"pattern": ["a"]}, "config.pattern is a list of 1; it must be a text")])
def test_the_sizes_of_a_tekken_json_are_checked(changes, words, tmp_path):
    path = tmp_path / "tekken.json"
    write_json(path, tekken(**changes))
    with pytest.raises(ConfigError, match="tekken.json") as caught:
        tekken_json(path, {})
    assert words in str(caught.value)


@pytest.mark.parametrize("length", [20_000, 600_000])
def test_a_long_token_is_refused_before_it_is_cut(length, tmp_path):
    """All cuts of 600 KB are 180 GB of text."""
    content = tekken(default_vocab_size=277)
    content["vocab"].append({"rank": 256, "token_bytes": base64.b64encode(b"a" * length).decode()})
    write_json(tmp_path / "tekken.json", content)
    with pytest.raises(ConfigError, match=f"tekken.json: its tokens are too long: one has {length:,} char"):
        tekken_json(tmp_path / "tekken.json", {})


CHARSMAP = model_of((FIXTURES / "tokenizers/trimmed.model").read_bytes()).charsmap


def test_a_published_charsmap_is_taken():
    assert len(CHARSMAP) > 100_000
    check_charsmap(CHARSMAP)


def tokenizer_with(charsmap, key="precompiled_charsmap"):
    made = json.loads(sentencepiece_json(FIXTURES / "tokenizers/trimmed.model", {}))
    made["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    return TextSpec("hf", json.dumps(made).replace("precompiled_charsmap", key).encode())


@pytest.mark.parametrize("key", ["precompiled_charsmap", "precom\\u0070iled\\u005fcharsmap"])
@pytest.mark.parametrize("charsmap", [
    b"\xff\xff\xff\xff" + bytes(60), b"\0\0\0\0" + bytes(60), b"\x01", bytes([0, 4, 0, 0]) + b"\xff" * 1024,
    bytes([0, 4, 0, 0]) + bytes(1020) + b"\xff\xff\xff\x80"])
def test_a_broken_charsmap_is_refused_before_the_library_reads_it(charsmap, key):
    """64 bytes asked for 4 GiB; other places lie outside of the table."""
    with pytest.raises(ConfigError, match="precompiled_charsmap"):
        open_tokenizer(tokenizer_with(charsmap, key))


@pytest.mark.slow
def test_no_charsmap_that_is_taken_panics():
    """Mutated ones, for every character that exists."""
    everything = [chr(number) for number in range(1, 0x110000) if not 0xD800 <= number < 0xE000]
    texts = ["".join(everything[begin:begin + 5000]) for begin in range(0, len(everything), 5000)]
    dice = random.Random(7)
    size = int.from_bytes(CHARSMAP[:4], "little")
    taken = 0
    for _ in range(150):
        data = bytearray(CHARSMAP)
        for _ in range(dice.choice([1, 1, 2])):
            where = dice.choice([range(4), range(4, 1100), range(4, 4 + size), range(4 + size, len(data))])
            data[dice.choice(where)] = dice.randrange(256)
        try:
            tokenizer = open_tokenizer(tokenizer_with(bytes(data)))
        except ConfigError:
            continue
        taken += 1
        for text in texts:
            tokenizer.pipeline.normalizer.normalize_str(text)
    assert taken > 5
