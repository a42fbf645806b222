"""A file appears whole or not at all, goes on after a kill, and leaves the model as it was."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from chatlm.common.errors import ConfigError
from chatlm.common.messages.requests import ModelSource
from chatlm.export.gguf.export import export_gguf
from chatlm.export.gguf.importance import Importance, write_importance
from chatlm.export.gguf.unfinished import UnfinishedFile
from chatlm.worker.weights.formats.gguf.file import read_gguf
from tiny_gguf import LLAMA_NUMBERS, random_llama, write_gguf

REPOSITORY = Path(__file__).parents[3]


def source_of(path):
    return ModelSource("gguf", Path(path), Path(path).stem, "")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny llama in float32."""
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


def tiny_model(path, seed=0):
    write_gguf(path, random_llama(seed), LLAMA_NUMBERS)
    return path


def contents(path):
    return {name: (tensor.tensor_type.name, bytes(tensor.data)) for name, tensor in read_gguf(path)[1].items()}


def test_the_model_and_its_metadata_are_kept(model, tmp_path):
    before = model.read_bytes()
    result = export_gguf(source_of(model), tmp_path / "out.gguf", type="Q8_0")
    metadata, stored = read_gguf(tmp_path / "out.gguf")
    original, tensors = read_gguf(model)
    assert model.read_bytes() == before and stored.keys() == tensors.keys()
    assert metadata["general.file_type"] == 7 and metadata["general.quantization_version"] == 2
    ignored = {"general.file_type", "general.quantization_version", "GGUF.kv_count", "GGUF.version"}
    assert all(metadata[key] == value for key, value in original.items() if key not in ignored)
    assert result.n_bytes == (tmp_path / "out.gguf").stat().st_size
    assert os.listdir(tmp_path) == ["out.gguf"]


def test_float32_gives_the_same_tensors(model, tmp_path):
    export_gguf(source_of(model), tmp_path / "out.gguf", type="F32")
    assert contents(tmp_path / "out.gguf") == contents(model)


def test_many_threads_write_the_same_file(model, tmp_path):
    for threads in (1, 4):
        export_gguf(source_of(model), tmp_path / f"{threads}.gguf", type="Q4_K_M", threads=threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "4.gguf").read_bytes()


class Stop(BaseException):
    pass


def stopped_after(count):
    """A progress that ends the writing after so many reports."""
    calls = []

    def progress(stage, fraction):
        calls.append(stage)
        if len(calls) == count:
            raise Stop
    return progress


def test_an_interrupted_file_goes_on(model, tmp_path, monkeypatch):
    monkeypatch.setattr("chatlm.export.gguf.unfinished.SAFE_EVERY", 1)
    output = tmp_path / "out.gguf"
    with pytest.raises(Stop):
        export_gguf(source_of(model), output, type="Q8_0", progress=stopped_after(5))
    assert not output.exists()
    pieces = json.loads((tmp_path / "out.gguf.part.json").read_text())["pieces"]
    done = []
    export_gguf(source_of(model), output, type="Q8_0", progress=lambda stage, fraction: done.append(stage))
    assert pieces == 6 and len(done) == len(read_gguf(model)[1]) - 5  # the header is a piece too
    whole = tmp_path / "whole.gguf"
    export_gguf(source_of(model), whole, type="Q8_0")
    assert output.read_bytes() == whole.read_bytes() and {*os.listdir(tmp_path)} == {"out.gguf", "whole.gguf"}


@pytest.mark.parametrize("change", ("type", "model", "note", "cut"))
def test_what_another_job_has_left_is_begun_anew(change, tmp_path, monkeypatch):
    monkeypatch.setattr("chatlm.export.gguf.unfinished.SAFE_EVERY", 1)
    model = tiny_model(tmp_path / "tiny.gguf")
    output = tmp_path / "out.gguf"
    with pytest.raises(Stop):
        export_gguf(source_of(model), output, type="Q8_0", progress=stopped_after(5))
    kind = "Q8_0"
    if change == "type":
        kind = "Q4_0"
    if change == "model":
        tiny_model(model, seed=1)
    if change == "note":
        (tmp_path / "out.gguf.part.json").write_text('{"job": "another", "pieces": 3, "at": 9}')
    if change == "cut":
        os.truncate(tmp_path / "out.gguf.part", 10)
    export_gguf(source_of(model), output, type=kind)
    export_gguf(source_of(model), tmp_path / "whole.gguf", type=kind)
    assert output.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_an_earlier_file_stays_until_the_new_one_is_complete(model, tmp_path):
    output = tmp_path / "out.gguf"
    output.write_bytes(b"earlier")
    with pytest.raises(Stop):
        export_gguf(source_of(model), output, type="Q8_0", progress=stopped_after(3))
    assert output.read_bytes() == b"earlier"
    export_gguf(source_of(model), output, type="Q8_0")
    assert read_gguf(output)


def test_two_commands_do_not_write_one_file(model, tmp_path):
    output = tmp_path / "out.gguf"
    first = UnfinishedFile(output, "job")
    try:
        with pytest.raises(ConfigError, match="another command is writing it"):
            export_gguf(source_of(model), output, type="Q8_0")
    finally:
        first.close()
    export_gguf(source_of(model), output, type="Q8_0")


def test_the_model_is_no_output(model, tmp_path):
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    before = model.read_bytes()
    for path in (model, link):
        with pytest.raises(ConfigError, match="is what is read"):
            export_gguf(source_of(model), path, type="Q8_0")
    assert model.read_bytes() == before


def test_a_missing_folder_is_said_in_one_line(model, tmp_path):
    with pytest.raises(ConfigError, match="No such file or directory") as refused:
        export_gguf(source_of(model), tmp_path / "none" / "out.gguf", type="Q8_0")
    assert "\n" not in str(refused.value)


@contextmanager
def small_disk(folder, kilobytes):
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder],
                          capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_said_before_anything_is_written(model, tmp_path):
    with small_disk(tmp_path / "disk", 64) as disk:
        with pytest.raises(ConfigError, match="no room for the file's .* MB are free") as refused:
            export_gguf(source_of(model), disk / "out.gguf", type="F32")
        assert "\n" not in str(refused.value)
        assert not (disk / "out.gguf").exists()


def test_a_disk_that_fills_up_meanwhile_leaves_what_is_there(model, tmp_path, monkeypatch):
    monkeypatch.setattr(UnfinishedFile, "reserve", lambda file, size: None)
    with small_disk(tmp_path / "disk", 64) as disk:
        (disk / "earlier.gguf").write_bytes(b"earlier")
        with pytest.raises(ConfigError, match="No space left on device; make room and run the same command"):
            export_gguf(source_of(model), disk / "out.gguf", type="F32")
        assert (disk / "earlier.gguf").read_bytes() == b"earlier" and not (disk / "out.gguf").exists()


def test_a_tensor_that_is_not_finite_is_named(tmp_path):
    tensors = random_llama()
    tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"].copy()
    tensors["blk.0.ffn_up.weight"][1, 1] = np.nan
    write_gguf(tmp_path / "nan.gguf", tensors, LLAMA_NUMBERS)
    with pytest.raises(ConfigError, match=r"blk\.0\.ffn_up\.weight.* not finite"):
        export_gguf(source_of(tmp_path / "nan.gguf"), tmp_path / "out.gguf", type="Q8_0")
    assert not (tmp_path / "out.gguf").exists()


def test_a_model_that_is_written_to_meanwhile_is_refused(tmp_path):
    model = tiny_model(tmp_path / "tiny.gguf")

    def progress(stage, fraction):
        with model.open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(b"other")

    with pytest.raises(ConfigError, match="have changed while they were read"):
        export_gguf(source_of(model), tmp_path / "out.gguf", type="Q8_0", progress=progress)
    assert not (tmp_path / "out.gguf").exists()
    export_gguf(source_of(model), tmp_path / "out.gguf", type="Q8_0")  # it begins anew
    export_gguf(source_of(model), tmp_path / "whole.gguf", type="Q8_0")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("change", ("replaced", "removed"))
def test_a_model_replaced_meanwhile_is_written_as_it_was(change, tmp_path):
    model = tiny_model(tmp_path / "tiny.gguf")
    export_gguf(source_of(model), tmp_path / "whole.gguf", type="Q8_0")

    def progress(stage, fraction):
        if change == "replaced":
            os.replace(tiny_model(tmp_path / "other.gguf", seed=1), model)
        else:
            model.unlink(missing_ok=True)

    export_gguf(source_of(model), tmp_path / "out.gguf", type="Q8_0", progress=progress)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


CUT = """
import os, sys
from pathlib import Path
from chatlm.common.errors import ConfigError
from chatlm.common.messages.requests import ModelSource
from chatlm.export.gguf.export import export_gguf
source = ModelSource("gguf", Path(sys.argv[1]), "tiny", "")
try:
    export_gguf(source, Path(sys.argv[2]), type="F32", progress=lambda *_: os.truncate(source.path, 9000))
except ConfigError as error:
    print(error)
"""


def test_a_model_that_is_cut_meanwhile_is_refused(tmp_path):
    model = tiny_model(tmp_path / "tiny.gguf")
    done = subprocess.run([sys.executable, "-c", CUT, model, tmp_path / "out.gguf"], cwd=REPOSITORY, check=False,
                          env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGBUS or "have changed while they were read" in done.stdout
    assert not (tmp_path / "out.gguf").exists()


SPLIT = (1, 4)  # of the parts that a model is split into: where the second begins, and the third


def test_a_split_model_becomes_one_file(model, tmp_path):
    tensors = [*random_llama().items()]
    bounds = (0, *SPLIT, len(tensors))
    for number in range(3):
        own = dict(tensors[bounds[number]:bounds[number + 1]])
        numbers = LLAMA_NUMBERS | {"split.count": 3, "split.no": number, "split.tensors.count": len(tensors)}
        write_gguf(tmp_path / f"tiny-{number + 1:05}-of-00003.gguf", own, numbers)
    export_gguf(source_of(tmp_path / "tiny-00001-of-00003.gguf"), tmp_path / "out.gguf", type="Q8_0")
    export_gguf(source_of(model), tmp_path / "whole.gguf", type="Q8_0")
    assert contents(tmp_path / "out.gguf") == contents(tmp_path / "whole.gguf")
    assert not any(key.startswith("split.") for key in read_gguf(tmp_path / "out.gguf")[0])


KILLED = """
import os, signal, sys
from pathlib import Path
from chatlm.common.messages.requests import ModelSource
from chatlm.export.gguf import unfinished
from chatlm.export.gguf.export import export_gguf
unfinished.SAFE_EVERY = 1
left = int(sys.argv[3])
def progress(stage, fraction):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
source = ModelSource("gguf", Path(sys.argv[1]), "tiny", "")
export_gguf(source, Path(sys.argv[2]), type="Q4_K_M", progress=progress)
"""


def test_a_process_killed_again_and_again_ends_with_the_same_file(model, tmp_path):
    output = tmp_path / "out.gguf"
    ends = []
    for count in (1, 2, 4, 3, 1000):
        done = subprocess.run([sys.executable, "-c", KILLED, model, output, str(count)], cwd=REPOSITORY,
                              env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=False)
        ends.append(done.returncode)
    export_gguf(source_of(model), tmp_path / "whole.gguf", type="Q4_K_M")
    assert ends == [-signal.SIGKILL] * 4 + [0]
    assert output.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_a_job_goes_on_after_no_pieces_of_another(tmp_path, monkeypatch):
    """One is interrupted, then another at a later place: its bytes are not the first one's."""
    monkeypatch.setattr("chatlm.export.gguf.unfinished.SAFE_EVERY", 1)
    model = tiny_model(tmp_path / "tiny.gguf")
    output = tmp_path / "out.gguf"
    with pytest.raises(Stop):
        export_gguf(source_of(model), output, type="Q8_0", progress=stopped_after(3))
    monkeypatch.setattr("chatlm.export.gguf.unfinished.SAFE_EVERY", 1 << 40)
    with pytest.raises(Stop):
        export_gguf(source_of(model), output, type="F32", progress=stopped_after(8))
    export_gguf(source_of(model), output, type="Q8_0")
    export_gguf(source_of(model), tmp_path / "whole.gguf", type="Q8_0")
    assert output.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def odd_part(kind, part, theirs):
    """Something of somebody else that has the name of the unfinished file, or of its note."""
    if kind == "link":
        part.symlink_to(theirs)
    elif kind == "broken link":
        part.symlink_to(theirs.with_name("new"))
    elif kind == "hard link":
        os.link(theirs, part)
    elif kind == "pipe":
        os.mkfifo(part)
    elif kind == "folder":
        part.mkdir()
    else:
        part.write_bytes({"text": b"mine", "other object": b'{"a": 1}', "empty": b""}[kind])


ODD_PARTS = "link", "broken link", "hard link", "pipe", "folder", "text", "empty", "other object"


@pytest.mark.parametrize("name", ["out.gguf.part", "out.gguf.part.json"])
@pytest.mark.parametrize("kind", ODD_PARTS)
@pytest.mark.parametrize("command", ["quantize", "imatrix"])
def test_nothing_of_others_is_emptied_or_followed(command, kind, name, model, tmp_path):
    """Neither by `quantize` nor by `imatrix`."""
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"GGUF of somebody else")
    part = tmp_path / name
    odd_part(kind, part, theirs)
    before = part.read_bytes() if part.is_file() else b""
    with pytest.raises(ConfigError, match=r"out.gguf.part(.json)?( exists, and no unfinished|: Is a dir)"):
        if command == "quantize":
            export_gguf(source_of(model), tmp_path / "out.gguf", type="Q8_0")
        else:
            write_importance(Importance({}), tmp_path / "out.gguf")
    assert theirs.read_bytes() == b"GGUF of somebody else" and not (tmp_path / "new").exists()
    assert os.path.lexists(part) and (part.read_bytes() if part.is_file() else b"") == before
    assert {*os.listdir(tmp_path)} == {"theirs", name}


def test_a_part_of_somebody_else_is_not_ours_by_a_note(model, tmp_path):
    """An earlier run's note is there, but what has the part's name now is no GGUF file."""
    (tmp_path / "out.gguf.part.json").write_text(json.dumps({"job": "a" * 64, "pieces": 1, "at": 3}))
    (tmp_path / "out.gguf.part").write_bytes(b"my diary")
    with pytest.raises(ConfigError, match="no unfinished run has written it"):
        export_gguf(source_of(model), tmp_path / "out.gguf", type="Q8_0")
    assert (tmp_path / "out.gguf.part").read_bytes() == b"my diary"
