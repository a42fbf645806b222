"""The container's file, built by podman and asked. Where no registry of images can be reached, its base is made of Debian's packages and this Python."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

import chat_server
from real_server import free_port

ROOT = Path(chat_server.__file__).resolve().parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800),
              pytest.mark.skipif(not shutil.which("podman") or os.geteuid() != 0, reason="podman is not here, or this user is not root")]
# As it is, and for a machine whose limits root cannot raise and whose cgroups are of both versions
WAYS = ((), ()), (("--runtime", "runc", "--cgroup-manager", "cgroupfs"), ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4000:4000"))
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"


def done(*words, seconds=900, **more):
    return subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=seconds, **more)


def succeeded(*words, **more):
    """What a command prints, which has to succeed."""
    ended = done(*words, **more)
    assert ended.returncode == 0, (words, ended.stdout[-2000:], ended.stderr[-4000:])
    return ended.stdout.decode()


def make_base(podman, folder):
    """Debian with pip and this Python, where Docker's image has its own."""
    if not shutil.which("mmdebstrap") or sys.base_prefix == "/usr":
        pytest.skip("no registry of images can be reached, and no base image made: that needs mmdebstrap and a Python that is not the system's")
    release = re.search(r"VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text())[1]
    root, version = folder / "root", "python{}.{}".format(*sys.version_info)
    succeeded("mmdebstrap", "--quiet", "--variant=minbase", "--include=ca-certificates,python3", release, root)     # whose libraries this one needs
    shutil.copytree(sys.base_prefix, root / "usr/local", symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("site-packages", "test", "__pycache__"))
    shutil.copy(f"/{CERTIFICATES}", root / CERTIFICATES)
    succeeded("chroot", root, "ldconfig")
    succeeded("chroot", root, f"/usr/local/bin/{version}", "-m", "ensurepip", "--default-pip")
    (root / "usr/local/bin/python").unlink(missing_ok=True)
    (root / "usr/local/bin/python").symlink_to(version)
    succeeded("tar", "cf", folder / "base.tar", "-C", root, ".")
    succeeded(*podman, "import", "--change", f"ENV PIP_CERT=/{CERTIFICATES}", folder / "base.tar", "localhost/base")
    (folder / "base.tar").unlink()
    shutil.rmtree(root)
    return "localhost/base"


@pytest.fixture
def podman(tmp_path):
    """The command, with images and containers of its own; what `run` needs; the base image."""
    running = tempfile.mkdtemp(prefix="pod-")       # podman takes at most 50 characters
    stores = "--root", tmp_path / "images", "--runroot", running
    command, limits, base = ("podman", *stores), (), "docker.io/library/" + re.search(r"FROM (\S+) AS", (ROOT / "Containerfile").read_text())[1]
    try:
        if done("timeout", 60, *command, "pull", "-q", base).returncode:
            base = make_base(command, tmp_path)
        for options, limits in WAYS:
            command = ("podman", *stores, *options)
            if done(*command, "run", "--rm", *limits, "--network", "host", base, "true").returncode == 0:
                break
        else:
            pytest.skip("podman can run no container here")
        yield command, limits, base
    finally:
        done(*command, "rm", "-f", "-a")
        done(*command, "system", "reset", "-f")
        shutil.rmtree(running, ignore_errors=True)


def test_the_image_is_built_and_answers(podman, tmp_path):
    """It has a user of its own and stops at once."""
    command, limits, base = podman
    text = (ROOT / "Containerfile").read_text()
    (tmp_path / "Containerfile").write_text(re.sub(r"(?m)^FROM \S+", f"FROM {base}", text))
    succeeded("git", "clone", "-q", ROOT, tmp_path / "checkout")
    succeeded(*command, "build", "-q", "--network", "host", *limits, "--format", "docker", "-f", tmp_path / "Containerfile", "-t", "chat_server", ".",
              cwd=tmp_path / "checkout")
    port = free_port()
    succeeded(*command, "run", "-d", "--name", "asked", *limits, "-p", f"127.0.0.1:{port}:8000", "-v", "kept:/home/chat", "-e", "CHAT_SERVER_API_KEY=0123456789abcdef",
              "chat_server", "--max-batch", "3")
    deadline_s = time.monotonic() + 300
    while done(*command, "healthcheck", "run", "asked").returncode:      # as podman asks where systemd runs its timers
        assert time.monotonic() < deadline_s, done(*command, "logs", "asked").stderr
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", headers={"Authorization": "Bearer 0123456789abcdef"}, data=json.dumps(
        {"messages": [{"role": "user", "content": "What is the capital of Japan?"}], "temperature": 0}).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        assert json.load(response)["choices"][0]["message"]["content"] == "The capital of Japan is Tokyo."
    inside = succeeded(*command, "exec", "asked", "sh", "-c", "id -u; ls ~/.cache/chat_server; which gcc g++ cc || echo no compiler")
    assert inside.split("\n")[0] == "10001" and "SmolLM2-135M-Instruct.Q4_1.gguf" in inside and "no compiler" in inside
    succeeded(*command, "stop", "-t", "45", "asked")
    assert succeeded(*command, "inspect", "asked", "--format", "{{.State.ExitCode}}").strip() == "0"
