"""An output of `batch` says what it is of, survives a kill at any moment, and no file of others is touched."""

import contextlib
import itertools
import json
import os

import pytest

from chatlm.common.errors import ConfigError
from chatlm.terminal.batch_files import OutputFile, BatchResult, InputFile

OF = {"model": "a", "weights": "0"}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"n": 1}\n\n{"n": 2}\n{"n": 3}\n')
    return path


def written(source, out, of=OF, numbers=(4, 1, 3)):
    """Run a batch that answers the lines in this order, and goes on where another ended."""
    with OutputFile(str(out), InputFile(source)) as output:
        output.begin(of)
        if output.complete:
            return None
        for number in numbers:
            if number not in output.done:
                output.write(BatchResult(number, json.dumps({"line": number}), number == 3))
        return output.finish()


def refusal(*arguments, **more):
    with pytest.raises(ConfigError) as refused:
        written(*arguments, **more)
    return str(refused.value)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


WHOLE = '{"line": 1}\n{"line": 3}\n{"line": 4}\n'


def test_only_an_output_of_the_same_work_is_done(source, tmp_path):
    """The input, the model and the settings must all be the same."""
    out = tmp_path / "out.jsonl"
    assert written(source, out) == 1 and out.read_text() == WHOLE
    assert written(source, out) is None
    there = contents(tmp_path)
    assert sorted(there) == ["in.jsonl", "out.jsonl", "out.jsonl.of"]
    assert 'has answers with model "a", not "b"; move it away' in refusal(source, out, of=OF | {"model": "b"})
    assert 'has answers with weights "0", not "1"' in refusal(source, out, of=OF | {"weights": "1"})
    assert 'has answers with quantize null, not "q8_0"' in refusal(source, out, of=OF | {"quantize": "q8_0"})
    source.write_text('{"n": 1}\n\n{"n": 2}\n{"n": 4}\n')
    assert "is not the output for this file but for another input" in refusal(source, out)
    source.write_bytes(there["in.jsonl"])
    out.write_text(WHOLE.replace("4", "5"))
    assert "has changed since it was written" in refusal(source, out)
    out.write_text(WHOLE)
    assert written(source, out) is None and contents(tmp_path) == there


@pytest.mark.parametrize("side", [None, "", "no JSON", "[1]", '{"input": "x"}', "[" * 100_000])
def test_an_output_without_a_record_is_not_ours(source, tmp_path, side):
    out, beside = tmp_path / "out.jsonl", tmp_path / "out.jsonl.of"
    out.write_text(WHOLE)
    if side is not None:
        beside.write_text(side)
    there = contents(tmp_path)
    assert "out.jsonl exists, and no " in refusal(source, out)
    assert contents(tmp_path) == there
    out.unlink()
    if side is not None:        # nor is what lies where we would write
        assert "out.jsonl.of exists, and no batch has written it" in refusal(source, out)
        assert beside.read_text() == side


def test_another_model_s_part_is_not_resumed(source, tmp_path):
    out = tmp_path / "out.jsonl"
    with contextlib.suppress(KeyboardInterrupt), OutputFile(str(out), InputFile(source)) as output:
        output.begin(OF)
        output.write(BatchResult(3, "{}", False))
        raise KeyboardInterrupt
    there = contents(tmp_path)
    assert 'out.jsonl.part has answers with model "a", not "b"; delete it to begin again' in refusal(source, out, of=OF | {"model": "b"})
    source.write_text('{"n": 0}\n\n{"n": 2}\n{"n": 3}\n')
    assert "is of another input; delete it" in refusal(source, out)
    source.write_bytes(there["in.jsonl"])
    assert contents(tmp_path) == there
    assert written(source, out) == 0 and out.read_text() == '{"line": 1}\n{}\n{"line": 4}\n'


def foreign_file(path, kind):
    match kind:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "link":
            path.with_name("theirs").write_text(json.dumps(HEAD))
            path.symlink_to("theirs")
        case "dangling link":
            path.symlink_to("nothing")
        case _:
            path.write_text(kind)


HEAD = {"chat_server": "batch", "input": "x", "created": 1, "run": "0123456789abcdef"}


@pytest.mark.parametrize("kind", [
    "folder", "fifo", "link", "dangling link", "", "\n", "mine", '{"input": "x", "model": "a", "created": 1}\n', "[1]\n", "[" * 100_000, json.dumps(HEAD | {"run": "../../x"}), json.dumps(HEAD | {"created": "x"})])
def test_a_part_of_someone_else_is_left_alone(source, tmp_path, kind):
    part = tmp_path / "out.jsonl.part"
    foreign_file(part, kind)
    before, status = contents(tmp_path), os.lstat(part)
    assert "out.jsonl.part exists, and no batch has written it; choose another -o" in refusal(source, tmp_path / "out.jsonl")
    assert contents(tmp_path) == before and os.lstat(part).st_ino == status.st_ino and not (tmp_path / "out.jsonl").exists()


def test_no_output_can_be_the_input(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    os.link(source, tmp_path / "other")
    (tmp_path / "x.part").symlink_to(source)
    (tmp_path / "y.of").symlink_to(source)
    before = contents(tmp_path)
    for name in ("in.jsonl", "link", "other", "x", "y"):
        assert "is the input" in refusal(source, tmp_path / name)
    for path in (source.rename(tmp_path / "z.part"), source.with_name("z.part").rename(tmp_path / "z.of")):
        assert "is the input" in refusal(path if path.exists() else tmp_path / "z.of", tmp_path / "z")
    assert {*contents(tmp_path).values()} == {*before.values()}


@pytest.mark.parametrize("name, said", [
    (".", "is a folder; name a file in it"), ("..", "is a folder"), ("/", "is a folder"), ("", "is a folder"), ("folder", "is a folder"), ("new/", "is no name of a file"), ("fifo", "must be a regular file"),
    ("/dev/null", "must be a regular file"), ("loop", "Too many levels"), ("in.jsonl/out", "Not a directory"), ("no/out", "No such file"), ("n" * 252, "File name too long")])
def test_an_impossible_output_is_refused(source, tmp_path, monkeypatch, name, said):
    """What cannot become a file is refused with the reason."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(os.listdir())
    assert said in refusal(source, name)
    assert sorted(os.listdir()) == before


def test_an_input_that_reads_once_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name in (tmp_path / "fifo", tmp_path, "/dev/null"):
        with pytest.raises(ConfigError, match="so it must be a regular file"):
            InputFile(tmp_path / name)


def test_an_input_that_changes_gets_no_output(source, tmp_path):
    with pytest.raises(ConfigError, match="in.jsonl has changed while its lines were answered"), OutputFile(str(tmp_path / "out"), InputFile(source)) as output:
        output.begin(OF)
        output.write(BatchResult(1, "{}", False))
        with source.open("a") as file:
            file.write('{"n": 9}\n')
        output.finish()
    assert not (tmp_path / "out").exists() and (tmp_path / "out.part").exists()


def test_a_link_s_target_gets_the_output(source, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/out")
    assert written(source, tmp_path / "link") == 1 and written(source, tmp_path / "link") is None
    assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path / "there")) == ["out", "out.of"]


def test_two_runs_at_once_are_one_run(source, tmp_path):
    with OutputFile(str(tmp_path / "out"), InputFile(source)) as output:
        assert "another run writes" in refusal(source, tmp_path / "out")
        output.begin(OF)
        assert "another run writes" in refusal(source, tmp_path / "out")
    assert written(source, tmp_path / "out") == 1


def test_files_that_appear_meanwhile_stay(source, tmp_path):
    out, part = tmp_path / "out", tmp_path / "out.part"
    with pytest.raises(ConfigError, match="out has appeared meanwhile"), OutputFile(str(out), InputFile(source)) as output:
        output.begin(OF)
        output.write(BatchResult(1, "{}", False))
        out.write_text("mine")
        output.finish()
    assert out.read_text() == "mine" and part.exists()
    out.unlink()
    with OutputFile(str(out), InputFile(source)) as output:
        output.begin(OF)
        part.unlink()
        part.write_text("mine")
        output.write(BatchResult(3, "{}", False))
        output.finish()
    assert part.read_text() == "mine" and out.exists()
    part.unlink()
    with OutputFile(str(tmp_path / "new"), InputFile(source)):
        (tmp_path / "new.part").unlink()
        (tmp_path / "new.part").write_text("mine")
    assert (tmp_path / "new.part").read_text() == "mine"


def test_a_run_that_began_nothing_leaves_nothing(source, tmp_path):
    with OutputFile(str(tmp_path / "out"), InputFile(source)):
        pass
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl"]


# kills and full disks


def dies_at(step):
    """In this process from now on, the call number `step` of these that change files does not happen: it dies."""
    left = step

    def counted(call):
        def counting(*arguments, **more):
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(9)
            return call(*arguments, **more)
        return counting

    for name in ("write", "link", "unlink", "replace", "rename", "fsync", "ftruncate", "open"):
        setattr(os, name, counted(getattr(os, name)))


def test_a_run_killed_at_any_moment_resumes(source, tmp_path):
    """A run that is killed at any moment goes on to the same output."""
    for step in itertools.count():
        folder = tmp_path / str(step)
        folder.mkdir()
        child = os.fork()
        if child == 0:
            dies_at(step)
            with contextlib.suppress(BaseException):
                written(source, folder / "out")
                os._exit(0)
            os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        assert written(source, folder / "out") in (1, None) and (folder / "out").read_text() == WHOLE
        assert not (folder / "out.part").exists() and written(source, folder / "out") is None
        assert {"out", "out.of"} <= {*os.listdir(folder)} and [name for name in os.listdir(folder) if name.endswith((".new", ".of")) and name != "out.of"] == []
        if status == 0:     # it ended before it came to that moment
            break
    assert 10 < step < 40


def test_a_full_disk_costs_no_answer(source, small_disk):
    folder, sized = small_disk
    out, long = folder / "out", "x" * 25_000

    def run():
        with OutputFile(str(out), InputFile(source)) as output:
            output.begin(OF)
            had = {*output.done}
            for number in {1, 3, 4} - had:
                output.write(BatchResult(number, json.dumps({"line": number, "long": long}), False))
            return output.finish(), had

    with pytest.raises(ConfigError, match="out.part: No space left on device; 2 of 3 lines are answered, and the same command goes on"):
        run()
    assert os.listdir(folder) == ["out.part"]
    sized("96k")
    with pytest.raises(ConfigError, match="out: No space left on device; all lines are answered, and the same command writes them again"):
        run()
    assert os.listdir(folder) == ["out.part"]
    sized("256k")
    assert run() == (0, {1, 3, 4}) and [json.loads(line)["line"] for line in out.read_text().splitlines()] == [1, 3, 4]
    assert sorted(os.listdir(folder)) == ["out", "out.of"]
    sized("256k")
    (folder / "filling").write_bytes(bytes(os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize))
    assert "No space left on device" in refusal(source, folder / "other")
    assert sorted(os.listdir(folder)) == ["filling", "out", "out.of"]


@pytest.mark.parametrize("word", ["new", "of"])
def test_a_link_that_has_a_temporary_name_is_not_followed(word, source, tmp_path):
    """Whoever reads the part knows the name that its run will write to."""
    theirs = tmp_path / "theirs"
    theirs.write_text("mine")
    with OutputFile(str(tmp_path / "out"), InputFile(source)) as output:
        output.begin(OF)
        for number in (1, 3, 4):
            output.write(BatchResult(number, json.dumps({"line": number}), number == 3))
        (tmp_path / f".out.{output.run}.{word}").symlink_to(theirs)
        output.finish()
    assert theirs.read_text() == "mine" and (tmp_path / "out").read_text() == WHOLE
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out", "out.of", "theirs"]
