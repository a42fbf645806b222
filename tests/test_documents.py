"""What the documents say is so: their links lead somewhere, their commands and flags exist, their tables are
the program's."""

import importlib.util
import json
import re
import shlex
import textwrap
from functools import cache
from pathlib import Path

import pytest

from chatlm.bundling import parse_bundle_words
from chatlm.commands import COMMANDS
from chatlm.common.commands import chosen_command
from chatlm.common.config import FLAGS
from chatlm.common.errors import ConfigError
from chatlm.common.hub.short_names import SHORT_NAMES
from chatlm.common.messages.requests import SAMPLING_FLAGS
from chatlm.export.command import parse_export_words
from chatlm.export.push import parse_push_words
from chatlm.front.api.dialects.openai import OPENAI_FIELDS
from chatlm.front.api.dialects.retrieval import EMBEDDING_FIELDS, RERANK_FIELDS, SCORE_FIELDS
from chatlm.front.api.field_types import CONSTRAINT_FIELDS
from chatlm.front.api.kept_fields import STORE_FIELDS
from chatlm.front.api.knowledge_fields import KNOWLEDGE_FIELDS
from chatlm.front.api.tables import SAMPLED
from chatlm.front.front import ROUTES
from chatlm.terminal.store import parse_store_words
from chatlm.worker.weights.families.table import FAMILIES, GGUF_FAMILIES, VISION
from command_line import parse_command_line

ROOT = Path(__file__).resolve().parent.parent
TODAY = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "bench").glob("*.md")),
    ROOT / "csrc" / "README.md",
    ROOT / "static" / "README.md",
]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
OTHERS_FLAGS = {  # of torchrun, Docker, apt, pip, xcode-select, Ray, pytest, vLLM and nanochat, and of the program without a row in FLAGS
    "compile",
    "nnodes",
    "node-rank",
    "master-addr",
    "nproc-per-node",
    "cache-dir",
    "install-recommends",
    "create-home",
    "max-num-seqs",
    "max-model-len",
    "head",
    "address",
    "dist",
    "quick",
    "build-base",
    "build-lib",
    "benchmark-enable",
    "version",
    "help",
    "without-core",
    "prune",
    "deps",
    "force-reinstall",
    "with-libraries",
    "pythons",
    "wheels",
    "with-model",
    "args",
    "verify",
    "unpack",
    "from",
    "spec",
    "upgrade",
    "now",
    "format",
    "machine",
    "wheel",
    "install",
    "license",
    "shard-size",
    "public",
    "model",
    "depth",
    "save-every",
    "eval",
    "logdir",
}  # the last five of aider, nanochat's scripts and TensorBoard


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as the common hosts of repositories make them."""
    found = set()
    for title in re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        number = next(
            number for number in range(len(found) + 1) if f"{name}-{number}".removesuffix("-0") not in found
        )
        found.add(f"{name}-{number}" if number else name)
    return found


def broken_links(path: Path, text: str) -> list[str]:
    """Links, and pictures, to what is not there; those to other sites are not looked at."""
    targets = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", FENCED.sub("", text))
    broken = []
    for target in map("".join, targets):
        name, _, anchor = target.partition("#")
        place = path.parent / name if name else path
        if not (
            target.startswith("https://")
            or place.exists()
            and (not anchor or anchor in anchors(text if place == path else text_of(place)))
        ):
            broken.append(target)
    return broken


def commands(text: str) -> list[str]:
    """The lines of fenced blocks and the inline code that start a program of this repository."""
    lines = [line for block in FENCED.findall(text) for line in block.split("\n")]
    lines += re.findall(r"`([^`]+)`", FENCED.sub("", text))
    return [part.strip() for line in lines for part in re.split(r"&&|\|", line.replace("\n", " "))]


@pytest.mark.parametrize("path", TODAY, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_in_the_repository_leads_somewhere(path):
    assert broken_links(path, text_of(path)) == []


def test_a_link_that_leads_nowhere_is_found():
    text = (
        "# One\n## A b: `c`\n[a](#a-b-c) [b](#nothing) [c](SECURITY.md#limits) [d](SECURITY.md#x) [e](no.md)"
        " ![f](docs/light.png)\n<img src=\"docs/no.png\">\n```\n# no heading [x](y)\n```\n[g](#no-heading-xy)"
    )
    assert broken_links(ROOT / "README.md", text) == [
        "#nothing",
        "SECURITY.md#x",
        "no.md",
        "docs/no.png",
        "#no-heading-xy",
    ]
    assert anchors("# A\n# A\n# B_c (d.e)") == {"a", "a-1", "b_c-de"}


@pytest.mark.parametrize("path", TODAY, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(path):
    names = re.findall(
        r"(?<![\w/.-])((?:bench|chatlm|csrc|docs|static|tests|\.ci)/[\w./{},-]*[\w/])", text_of(path)
    )
    made = set(
        re.findall(r"^--- /dev/null\n\+\+\+ b/(\S+)$", text_of(path), re.MULTILINE)
    )  # by a diff in the document
    assert [
        name for name in names if "{" not in name and name not in made and not (ROOT / name).exists()
    ] == []


def words_of_benches(*names: str) -> set[str]:
    """What may be a flag of these benches, since they declare some in loops."""
    return {
        word.replace("_", "-")
        for name in names
        for word in re.findall(r"[a-z][a-z_-]*", text_of(ROOT / name))
    }


@pytest.mark.parametrize("path", TODAY, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_that_are_named_exist(path):
    text, ours = text_of(path), {name for flag in FLAGS for name in flag.names} | OTHERS_FLAGS
    if path.name == "agents.md":  # of the agents themselves
        ours |= {"yes-always", "message", "auto", "auth-type", "yolo", "core-tools", "permission-mode", "bare"}
    if path.parent.name == "bench":  # where one program's flags are named apart from it
        ours |= words_of_benches(*(f"bench/{bench.name}" for bench in (ROOT / "bench").glob("*.py")))
    text = re.sub(r"^.*python bench/.*$|```", "", text, flags=re.MULTILINE) if "```" in text else text
    text = re.sub(r"`[^`]*`", lambda code: "" if "bench/" in code[0] else code[0], text)
    named = re.findall(r"(?<![\w-])--([a-z]+(?:-[a-z]+)*)", text)
    assert [name for name in named if name.removeprefix("no-") not in ours] == []


WORDS_OF = {"export": parse_export_words, "push": parse_push_words, "store": parse_store_words}


@pytest.mark.parametrize("path", TODAY, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_are_shown_are_understood(path):
    for command in commands(text_of(path)):
        if match := re.search(r"(?:python3?|torchrun .*) chat_server\.pyz?\b(.*)", command):
            line = shlex.split(match[1].replace("...", "x"), comments=True)
            command, words = chosen_command(line, COMMANDS)
            if command.name == "bundle":
                parse_bundle_words(words, COMMANDS)
            elif command.lines:
                WORDS_OF[command.name](words)
            elif not {"--help", "--version"} & set(words):
                parse_command_line(line, {})  # a ConfigError names what is wrong
        elif match := re.search(r"python (bench/\w+\.py)([^#\"]*)", command):
            more = (
                ["bench/compare.py"] if "--compare" in match[2] else []
            )  # which gets the flags that are not its own
            assert set(re.findall(r" --([a-z-]+)", match[2])) <= words_of_benches(match[1], *more), command


def test_a_command_that_is_wrong_is_found(monkeypatch):
    wrong = [
        "python chat_server.py serve --no-such-flag",
        "python chat_server.pyz --port x",
        "python bench/load.py URL --wrong 1",
        "python bench/nothing.py",
    ]
    for command in wrong:
        path = Path("wrong.md")
        monkeypatch.setattr(
            f"{__name__}.text_of", lambda name: f"```\n{command}\n```" if name == path else name.read_text()
        )
        with pytest.raises((ConfigError, AssertionError, FileNotFoundError)):
            test_commands_that_are_shown_are_understood(path)


def script_of_docs(name):
    made = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    return module


def test_the_page_has_the_parameters_of_the_table():
    module = script_of_docs("parameters")
    assert text_of(ROOT / "static/parameters.js") == module.script(), "run python docs/parameters.py"
    rows = [module.row(field) for field in OPENAI_FIELDS if field.name in (*SAMPLED, "max_tokens")]
    assert {"xtc_probability", "dry_multiplier", "typical_p", "top_n_sigma", *SAMPLING_FLAGS} <= {
        each["name"] for each in rows
    }
    assert len({each["command"] for each in rows}) == len(rows)


def test_the_page_of_flags_is_made_from_the_table():
    module = script_of_docs("flags")
    assert text_of(ROOT / "docs/flags.md") == module.page(), "run python docs/flags.py"
    assert all(f"| `--{flag.names[0]}`" in module.page() for flag in FLAGS)


def test_every_route_is_in_the_page_of_apis():
    """Its curls send fields that exist."""
    pages = {path.stem: text_of(path) for path in (ROOT / "docs/api").glob("*.md")}
    index = text_of(ROOT / "docs/api.md")
    routes = {}
    for route in ROUTES:
        routes.setdefault(route.pattern, set()).update(field.name for field in route.fields)
    assert [pattern for pattern in routes if f"{pattern}`" not in index] == []
    examples = re.findall(r"^curl .*:8000(\S+) -d '(.*)'$", "\n".join([index, *pages.values()]), re.MULTILINE)
    assert len(examples) > 5 and all(json.loads(body).keys() <= routes[path] for path, body in examples)
    named = set(re.findall(r"\w+", pages["answers"]))
    retrieval = {field.name for field in (*EMBEDDING_FIELDS, *RERANK_FIELDS, *SCORE_FIELDS)} - named
    of_tools = routes["/v1/tools/call"]
    of_store = {field.name for fields in STORE_FIELDS.values() for field in fields} | {"store"}
    of_knowledge = {field.name for fields in KNOWLEDGE_FIELDS.values() for field in fields}
    assert {
        name for path, names in routes.items() if path.startswith(("/chat", "/v1")) for name in names
    } - named == {
        # refused, or without an effect here
        "best_of",
        "modalities",
        # on pages of their own
        *retrieval,
        *({field.name for field in CONSTRAINT_FIELDS} - named),
        *(of_store - named),
        *(of_tools - named),
    }
    assert of_tools <= {*re.findall(r"\w+", text_of(ROOT / "docs/tools.md"))}
    assert of_store - of_knowledge <= {*re.findall(r"\w+", pages["batches-and-kept"])}
    assert of_knowledge <= {*re.findall(r"\w+", pages["knowledge"])}
    assert retrieval <= {*re.findall(r"\w+", pages["embeddings-and-ranking"])}
    assert {field.name for field in CONSTRAINT_FIELDS} <= {*re.findall(r"\w+", pages["formats"])}


def test_the_table_of_families_is_made_from_rows():
    """They are those of the program and of the tests."""
    module, text = script_of_docs("families"), text_of(ROOT / "docs/models/families.md")
    readme = text_of(ROOT / "README.md")
    assert (text, readme) == (module.page(text), module.readme(readme)), "run python docs/families.py"
    assert f"[all {module.count()} families]" in readme
    table = text.split("| family |")[1].split("\n\n")[0]
    assert {*FAMILIES, *VISION, *GGUF_FAMILIES} - {*re.findall(r"`([a-z0-9_-]+)`", table)} == set()
    assert {*module.NOTES, *module.LIKE_OTHERS} <= {*FAMILIES}


@pytest.mark.parametrize("name", ["README.md", "docs/models.md"])
def test_short_names_that_are_shown_are_known(name):
    names = re.findall(r"`((?:llama|qwen|gemma|smollm|mistral|phi|gpt-oss)[\w.:-]*)`(?!\.\.)", text_of(ROOT / name))     # `part1`.. is a package
    assert len(names) > 5 and [name for name in names if name.replace(":", "-") not in SHORT_NAMES] == []


@pytest.mark.parametrize("path", [path for path in TODAY if "```python" in path.read_text()], ids=str)
def test_examples_in_python_are_python(path):
    for code in re.findall(r"^ *```python\n(.*?)^ *```", path.read_text(), re.DOTALL | re.MULTILINE):
        compile(textwrap.dedent(code), str(path), "exec")
