"""A command is a row: help, guesses and the parser know it, and its modules are imported when it runs."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import toy_command
from chatlm.commands import COMMANDS, program_of
from chatlm.common.commands import Command, chosen_command
from chatlm.common.config import FLAGS
from chatlm.front.annex import Annex
from chatlm.front.annexes import ANNEXES
from real_server import SCRIPT
from toy_annex import TOY
from toy_command import COUNT, COUNTING

TOYS = *ANNEXES, TOY, COUNTING
FOLDERS = [str(Path(toy_command.__file__).parent), str(SCRIPT.parent)]


def run(*words, script=toy_command.__file__, status=0, **environment):
    """(stdout, stderr) of a program of the tests."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(FOLDERS), "COLUMNS": "200"} | environment
    done = subprocess.run([sys.executable, str(script), *words], env=environment, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


def test_a_toy_command_runs_with_settings():
    for name in ("count", "number"):
        told, _ = run(name, "a.gguf", "--context-length", "64", "b.gguf", status=2)
        assert told == f"count: ['a.gguf', 'b.gguf'] of context 64, among {len(COMMANDS) + 1}\n"
    assert "unrecognized arguments: --port" in run("count", "--port", "3", status=2)[1]


def test_its_help_has_what_its_row_says():
    told, _ = run("count", "--help")
    assert " count MODEL ... [flags]\n\nCount models.\n" in told and "\n\nIt is a toy.\n" in told
    assert "What is counted:\n" in told and "a text that is not read" in told
    assert "MODEL may be: a nanochat base folder" in told and told.endswith(" count a.gguf b.gguf\n")


def test_the_help_lists_commands_of_annexes():
    told, _ = run("--help")
    assert told.split("\n\n")[0].endswith(" count MODEL ... [flags]")
    assert "--prefix-store; count, which counts models." in " ".join(told.split())
    told, _ = run("--help", script=Path(toy_command.__file__).with_name("toy_annex.py"))
    assert told.split("\n\n")[0].endswith(" toy WORDS")
    assert "; toy, which says its words." in " ".join(told.split())


def test_a_mistyped_command_of_an_annex_gets_a_guess():
    assert "did you mean the command count?" in run("cuont", "--port", "0", status=2)[1]


def test_every_row_is_in_the_help_and_each_has_a_help_of_its_own(capsys):
    told, _ = run("--help", script=SCRIPT)
    for command in COMMANDS[1:]:
        assert f"{command.name}, {command.brief}" in " ".join(told.split())
        assert command.run is None or command.opening and command.examples
    usage = told.split("\n\n")[0]
    assert {*usage.replace("[", "|").replace("]", "|").replace(" ", "|").split("|")} > {
        command.name for command in COMMANDS}


def row(name, **more):
    return Annex(name, lambda: lambda front: None, command=Command(name, "which is wrong", **more))


@pytest.mark.parametrize("annexes, why", [
    ([row("chat", run=toy_command.count)], "two commands are called chat"),
    ([row("server", run=toy_command.count)], "two commands are called server"),
    ([COUNTING, replace(COUNTING, name="other")], "two commands are called count"),
    ([row("none")], "the command none must have either `run` or `lines`"),
    ([row("both", run=toy_command.count, lines=lambda words, program: ())], "both must have either")])
def test_a_row_that_cannot_be_is_refused_at_the_start(annexes, why):
    with pytest.raises(ValueError, match=why):
        program_of((*ANNEXES, *annexes))


def test_flags_name_commands_that_have_settings():
    named = {name for flag in FLAGS for name in flag.commands.split()}
    assert named == {command.name for command in COMMANDS if command.run}


def test_the_first_word_chooses_the_command():
    commands = program_of(TOYS).commands
    chosen = {words: chosen_command(words.split(), commands) for words in (
        "", "x.gguf chat", "server x", "number a", "toy a", "export a -o b.gguf", "export a -o b")}
    assert {words: (command.name, [*rest]) for words, (command, rest) in chosen.items()} == {
        "": ("serve", []), "x.gguf chat": ("serve", ["x.gguf", "chat"]), "server x": ("serve", ["x"]),
        "number a": ("count", ["a"]), "toy a": ("toy", ["a"]),
        "export a -o b.gguf": ("quantize", ["a", "-o", "b.gguf"]),
        "export a -o b": ("export", ["a", "-o", "b"])}
    assert chosen["number a"][0] is COUNT


LOADED = """
import atexit, sys
def tell():
    with open({path!r}, "w") as file:
        print(*sys.modules, file=file)
atexit.register(tell)
"""


def loaded(folder, *words, **more):
    """What a command of the program imports."""
    path = folder / "loaded"
    (folder / "sitecustomize.py").write_text(LOADED.format(path=str(path)))
    run(*words, script=SCRIPT, PYTHONPATH=str(folder), **more)
    return {*path.read_text().split()}


def test_a_command_imports_its_own_modules_alone(tmp_path):
    """Nothing of it is imported for --help."""
    others = {"chatlm.bundling", "chatlm.export", "chatlm.front.front", "chatlm.front.serve"}
    for words in (["--help"], ["generate", "--help"], ["--version"]):
        modules = loaded(tmp_path, *words)
        assert not others & modules and not any(name.startswith("chatlm.terminal") for name in modules)
    terminal = "chatlm.terminal", "chatlm.terminal.store"
    modules = loaded(tmp_path, "store", "nowhere", status=2)
    assert not others & modules
    assert {name for name in modules if name.startswith("chatlm.terminal")} == {*terminal}


def test_the_table_of_commands_imports_next_to_nothing():
    """It is read before the first worker is started."""
    code = "import sys, chatlm.commands; print(*(name for name in sys.modules if name.startswith('chatlm.')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert done.stdout.split() == ["chatlm.common", "chatlm.common.commands", "chatlm.commands"]
