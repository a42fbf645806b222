"""Whole conversations of coding agents, in tests/fixtures/agents/conversations: all requests of one run, no one's prose.

A line of a long text is only its length and a digest here, from which `prose` makes other words: equal lines stay equal, and so do
the beginnings of texts. Names, types, numbers, short texts and calls are as sent. What stands in a file twice is there once.

To record a program's next version, give its path; npm's packages are in tests/peers/agents.json. It runs in a repository of two
files, against a server whose model says what SCRIPTS has. No real model is needed, and nothing of the program's own home is read.

    python tests/support/agent_conversations.py claude build-peers/agents/node_modules/.bin/claude
"""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from http.server import ThreadingHTTPServer
from pathlib import Path

from agent_requests import EVER_NEW, FOLDER, HEADERS, LONG, Recorder
from fake_pool import serving
from scripted_pool import ScriptedPool

CONVERSATIONS = FOLDER / "conversations"
TASK = "Add a function subtract(a, b) to calc.py."
FILES = {"calc.py": "def add(a, b):\n    return a + b\n", "test_calc.py": "from calc import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n"}
NEW = "\n\n\ndef subtract(a, b):\n    return a - b\n"
WORDS = ("the a of to and in is that for it as with on be by this from are or an at not have which can one all will use when file code line "
         "tool path name text call user value only before after more than into each other same next read write run test list must may").split()
SIGN = "\u2261 "  # begins a text that is not as it was sent
SMALL = 120       # characters of JSON; what is larger and stands in a file twice is a part


# what is recorded


def hidden(value, name=""):
    """A body without its prose. name: the member whose value this is."""
    if isinstance(value, dict):
        return {key: hidden(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [hidden(inner, name) for inner in value]
    if not isinstance(value, str):
        return value
    if name == "arguments":
        with contextlib.suppress(ValueError):
            return json.dumps(hidden(json.loads(value)))
    if len(value) > LONG and name not in ("$schema", "pattern", "tool_name", "call_id", "tool_use_id", "tool_call_id", "id"):
        return SIGN + " ".join(f"{hashlib.sha256(line.encode()).hexdigest()[:6]}:{len(line)}" for line in value.split("\n"))
    return EVER_NEW.sub("an-id", value)


def prose(value):
    """A recorded body with other words in the place of its prose."""
    if isinstance(value, dict):
        return {key: prose(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [prose(inner) for inner in value]
    if isinstance(value, str) and value.startswith(SIGN):
        return "\n".join(line_of(*line.split(":")) for line in value[len(SIGN):].split(" "))
    if isinstance(value, str) and value.startswith("{"):
        with contextlib.suppress(ValueError):
            return json.dumps(prose(json.loads(value)))
    return value


def line_of(digest, length):
    chosen, line = random.Random(digest), ""
    while len(line) < int(length):
        line += chosen.choice(WORDS) + " "
    return line[:int(length)]


def packed(rows):
    """Rows, and the parts to which they refer: {"$": number}."""
    counts, parts, numbers = Counter(), [], {}

    def count(value):
        if isinstance(value, (dict, list)):
            for inner in value.values() if isinstance(value, dict) else value:
                count(inner)
        counts[json.dumps(value)] += 1

    def put(value):
        text = json.dumps(value)
        if text in numbers:
            return {"$": numbers[text]}
        inner = value
        if isinstance(value, dict):
            inner = {key: put(member) for key, member in value.items()}
        elif isinstance(value, list):
            inner = [put(member) for member in value]
        if len(text) <= SMALL or counts[text] < 2:
            return inner
        numbers[text] = len(parts)
        parts.append(inner)
        return {"$": numbers[text]}

    count(rows)
    return put(rows), parts


def unpacked(value, parts):
    if isinstance(value, dict):
        return unpacked(parts[value["$"]], parts) if "$" in value else {key: unpacked(inner, parts) for key, inner in value.items()}
    return [unpacked(inner, parts) for inner in value] if isinstance(value, list) else value


def conversations():
    """(short name, program and version, its requests as they can be sent again) of every recorded file."""
    for path in sorted(CONVERSATIONS.glob("*.json")):
        record = json.loads(path.read_text())
        yield path.stem, record["program"], prose(unpacked(record["requests"], record["parts"]))


# recording


def call(tool, **arguments):
    return f'<tool_call>\n{json.dumps({"name": tool, "arguments": arguments})}\n</tool_call>'


def claude_script(folder):
    calc = str(folder / "calc.py")
    return ["Let me look.\n" + call("ToolSearch", query="select:WebFetch,NotebookEdit", max_results=5), call("Read", file_path=calc),
            call("Edit", file_path=calc, old_string="    return a + b\n", new_string="    return a + b\n" + NEW[1:]), call("ToolSearch", query="select:WebFetch,TaskCreate"),
            call("Bash", command="cat calc.py", description="Shows the file"), "Done."]


def codex_script(folder):
    return ["Let me look.\n" + call("exec_command", cmd="cat calc.py"), call("exec_command", cmd=f"cat >> calc.py << 'END'{NEW}END"),
            call("exec_command", cmd="cat calc.py"), call("get_goal"), "Done."]


def opencode_script(folder):
    calc = str(folder / "calc.py")
    return ["Let me look.\n" + call("read", filePath=calc), call("edit", filePath=calc, oldString="    return a + b\n", newString="    return a + b\n" + NEW[1:]),
            call("bash", command="cat calc.py", description="Shows the file"), call("grep", pattern="def "), "Done."]


def claude(program, url):
    return [program, "-p", TASK, "--permission-mode", "acceptEdits", "--allowedTools", "Bash"], {
        "ANTHROPIC_BASE_URL": url, "ANTHROPIC_AUTH_TOKEN": "none", "ANTHROPIC_MODEL": "default", "ANTHROPIC_DEFAULT_HAIKU_MODEL": "default"}


def codex(program, url):
    provider = f'{{name="here", base_url="{url}/v1", env_key="KEY"}}'
    return [program, "exec", "--sandbox", "workspace-write", "-c", "model=default", "-c", "model_provider=here", "-c", f"model_providers.here={provider}", TASK], {"KEY": "none"}


def opencode(program, url):
    model = {"name": "default", "limit": {"context": 200_000, "output": 4096}}
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "here", "options": {"baseURL": url + "/v1", "apiKey": "none", "timeout": False}, "models": {"default": model}}
    return [program, "run", "--model", "here/default", TASK], {"OPENCODE_CONFIG_CONTENT": json.dumps({"provider": {"here": provider}})}


AGENTS = {"claude": ("Claude Code", claude, claude_script), "codex": ("Codex", codex, codex_script), "opencode": ("opencode", opencode, opencode_script)}


class Scripted(ScriptedPool):
    """A model that says what its script has, and a title where it has no tools."""

    context_length = 1 << 20

    def __init__(self, *texts):
        super().__init__(*texts)
        self.prompts.context_length = self.context_length

    async def answer(self, request):
        script = self.texts
        self.texts = script if request.params.tool_names else ["A title"]
        async for event in super().answer(request):
            yield event
        self.texts = script


@contextlib.contextmanager
def repository():
    """A folder with a new repository of two files."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "repository"
        folder.mkdir()
        for name, text in FILES.items():
            (folder / name).write_text(text)
        for command in (["init", "-q", "-b", "main"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "first"]):
            subprocess.run(["git", *command], cwd=folder, check=True)
        yield folder


async def run(name, program, folder):
    """The rows of all requests of one run."""
    title, command, script = AGENTS[name]
    async with serving(Scripted(*script(folder))) as upstream:
        Recorder.upstream, Recorder.rows, Recorder.row_of = upstream, [], staticmethod(row)
        with ThreadingHTTPServer(("127.0.0.1", 0), Recorder) as listener:
            threading.Thread(target=listener.serve_forever, daemon=True).start()
            words, more = command(program, f"http://127.0.0.1:{listener.server_address[1]}")
            home = folder.parent / "home"
            home.mkdir()
            env = {"PATH": os.environ["PATH"], "HOME": str(home), "TERM": "dumb", **more}
            done = await asyncio.to_thread(subprocess.run, words, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
            listener.shutdown()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "def subtract" in (folder / "calc.py").read_text(), done.stdout + done.stderr
    return Recorder.rows


def row(method, target, headers, body):
    kept = {name: value for name, value in headers.items() if name.lower() in HEADERS}
    return {"method": method, "path": target, "headers": kept, "body": hidden(json.loads(body or "null"))}


def main(name, program):
    program = str(Path(program).resolve())
    version = re.search(r"\d+\.\d+\.\d+", subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout)[0]
    with repository() as folder:
        rows, parts = packed(asyncio.run(run(name, program, folder)))
    CONVERSATIONS.mkdir(exist_ok=True)
    record = {"program": f"{AGENTS[name][0]} {version}", "parts": parts, "requests": rows}
    (CONVERSATIONS / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
