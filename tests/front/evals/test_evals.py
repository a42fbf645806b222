"""Suites are judged as nanochat judges them, answers outlive their run, and what is broken is named in one line."""

import asyncio
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from bundles import TASKS, rows_of, run_eval, silent, write_bundle
from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.common.messages.requests import TokenLogprob
from chatlm.front.evals.bundle import drawn_rows, read_rows, read_suite
from chatlm.front.evals.items import NEAR_TIE, BadItem, ScoredSpan, examples_of, fitted, prompts_of, spans_of, verdict_of
from chatlm.front.evals.answers_file import AnswersFile, answers_file_name
from chatlm.front.evals.run import as_json, mean_of, run_task
from chatlm.front.evals.scores import PoolScorer
from forked import fork_front
from nightly import WHOLE, by_day
from openai_routes import call
from real_server import SCRIPT, server
from run_here import run_here

# What core_eval.py at 92d63d4 finds with gpt.py at each fixture's commit, in float32 on a CPU: 1 where an item of a task of
# write_bundle is right, of all its items or of the 6 that --max-per-task leaves
EXPECTED = {
    "gen1": {"choose/all": "1100000101000010", "choose/6": "110100", "answer/all": "0111000101001010", "answer/6": "011100", "who/all": "1100001100", "who/6": "100100", "go on/all": "000000000000", "go on/6": "000000", "odd/all": "01100"},
    "gen2": {"choose/all": "1000100001100101", "choose/6": "100010", "answer/all": "0000100111100111", "answer/6": "000010", "who/all": "0001101100", "who/6": "000110", "go on/all": "000000000000", "go on/6": "000000", "odd/all": "01100"},
    "gen3": {"choose/all": "1011000010001000", "choose/6": "100100", "answer/all": "0011010000101000", "answer/6": "001101", "who/all": "0011011010", "who/6": "001001", "go on/all": "000000000000", "go on/6": "000000", "odd/all": "01100"},
    "gen4": {"choose/all": "0011000000101011", "choose/6": "001100", "answer/all": "0010000000101011", "answer/6": "001000", "who/all": "1111100111", "who/6": "111110", "go on/all": "000000000000", "go on/6": "000000", "odd/all": "01100"},
    "gen5": {"choose/all": "0001000101001111", "choose/6": "000100", "answer/all": "0001100100000011", "answer/6": "000110", "who/all": "0010011011", "who/6": "000001", "go on/all": "000000000000", "go on/6": "000000", "odd/all": "01100"},
}


@pytest.fixture
def suite(tmp_path):
    return read_suite(str(write_bundle(tmp_path / "bundle")))


@pytest.mark.parametrize("generation", by_day(EXPECTED, "gen1"))
async def test_each_item_is_judged_as_upstream_does(start_pool, suite, tmp_path, generation):
    """Among them an empty range, equal options, a single one, and numbers; with all items, and with a cut."""
    pool = await start_pool(generation=generation, source="mid" if generation == "gen1" else None)
    for most in (None, 6):
        kept = AnswersFile(tmp_path, f"{most}")
        results = [await run_task(PoolScorer(pool), task, most, kept, silent) for task in suite.tasks]
        for task, result in zip(suite.tasks, results):
            rows = drawn_rows(task, most)
            items = [kept.find(task.label, index) for index in range(len(rows))]
            wanted = EXPECTED[generation].get(f"{task.label}/{most or 'all'}", EXPECTED[generation][f"{task.label}/all"])
            close = [item["margin"] is not None and item["margin"] <= NEAR_TIE for item in items]
            assert [item["correct"] for item, near in zip(items, close) if not near] == [
                right == "1" for right, near in zip(wanted, close, strict=True) if not near], task.label
            assert result.near == sum(close) <= 1 and result.items == len(rows) and result.right == sum(item["correct"] for item in items)
        body = as_json(suite, results)
        for task, result in zip(suite.tasks, results):
            assert body["centered_results"][task.label] == round((result.accuracy - task.baseline) / (1 - task.baseline), 6)
        assert body["core_metric"] == round(mean_of(results)[0], 6) == pytest.approx(sum(body["centered_results"].values()) / 5, abs=1e-5)


async def test_only_a_text_the_model_continues_is_right(start_pool, tmp_path):
    """A text that the model continues so is right and another is not."""
    pool = await start_pool()
    scorer, rows = PoolScorer(pool), []
    for context in ("the cat sat on", "rain fell over all", "a town by the"):
        text = await scorer.complete(context, 1)
        rows += [{"context": context, "continuation": text}, {"context": context, "continuation": text + "~"}]
    (tmp_path / "say.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task, = read_suite(str(tmp_path / "say.jsonl")).tasks
    task = task._replace(delimiter="")
    kept = AnswersFile(tmp_path, "x")
    await run_task(scorer, task, None, kept, silent)
    found = {json.dumps(row): kept.find("say", index)["correct"] for index, row in enumerate(drawn_rows(task, None))}
    assert [found[json.dumps(row)] for row in rows] == [True, False] * 3


# what is on disk


@pytest.mark.parametrize("file, text, words", [
    ("core.yaml", None, ["core.yaml"]), ("core.yaml", "- [", ["core.yaml", "icl_tasks"]), ("core.yaml", "icl_tasks: []", ["icl_tasks"]),
    ("core.yaml", "icl_tasks: [{label: a, icl_task_type: chess}]", ["chess", "multiple_choice"]),
    ("core.yaml", "icl_tasks: [{label: a, icl_task_type: schema, num_fewshot: 3}]", ["num_fewshot", "3"]),
    ("core.yaml", "icl_tasks: [{label: choose, icl_task_type: schema, num_fewshot: [3], dataset_uri: ../../x}]", ["../../x", "eval_data"]),
    ("core.yaml", "icl_tasks: [{label: new, icl_task_type: schema, num_fewshot: [0], dataset_uri: part/who.jsonl}]", ["eval_meta_data.csv", "new"]),
    ("core.yaml", "icl_tasks: [{label: 2026-99-99}]", ["core.yaml", "icl_tasks", "month"]), ("core.yaml", "icl_tasks: [{label: 2026-01-01T99:00:00Z}]", ["core.yaml", "hour"]),
    ("core.yaml", "[" * 1500, ["core.yaml", "icl_tasks"]), ("core.yaml", "icl_tasks: " + "{a: " * 3000, ["core.yaml", "icl_tasks"]), ("core.yaml", "icl_tasks: [" + "9" * 5000 + "]", ["core.yaml", "icl_tasks"]),
    ("core.yaml", "? [a]\n: b", ["core.yaml"]), ("core.yaml", "!!python/object/apply:os.system [true]", ["core.yaml"]), ("core.yaml", "&a [*a]", ["core.yaml"]), ("core.yaml", "\0", ["core.yaml"]),
    *[("eval_meta_data.csv", "Eval Task,Random baseline\n" + "".join(f"{task[0]},{number}\n" for task in TASKS), ["choose", "from 0 to below 100 percent"])
      for number in ("-inf", "inf", "nan", "-1", "-1e308", "1e400", "100.0")],
    ("eval_meta_data.csv", None, ["eval_meta_data.csv"]), ("eval_meta_data.csv", "a,b\n1,2\n", ["Eval Task"]),
    ("eval_meta_data.csv", "Eval Task,Random baseline\nchoose,many\n", ["eval_meta_data.csv", "many"]),
    ("eval_meta_data.csv", "Eval Task,Random baseline\n" + "".join(f"{task[0]},100\n" for task in TASKS), ["choose", "100"]),
    ("eval_data/part/who.jsonl", None, ["who.jsonl"])])
def test_an_incomplete_bundle_is_refused_in_one_line(tmp_path, file, text, words):
    """The line names what it lacks."""
    folder = write_bundle(tmp_path / "bundle")
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    with pytest.raises(ConfigError) as error:
        read_suite(str(folder))
    assert "\n" not in str(error.value) and [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize("line, words", [
    ("{", "not JSON"), ("", "not JSON"), ("[]", "query"), ('{"query": "a", "choices": "bc", "gold": 0}', "choices"), ("[" * 100_000, "not JSON"),
    ('{"query": "a", "choices": ["b"], "gold": 1}', "gold is 1"), ('{"query": "a", "choices": [], "gold": 0}', "choices"),
    ('{"query": "a", "choices": ["b"], "gold": true}', "gold"), ('{"query": null, "choices": ["b"], "gold": 0}', "query")])
def test_a_broken_row_names_its_file_and_line(suite, line, words):
    task = suite.tasks[0]
    lines = task.path.read_text().splitlines()
    task.path.write_text("\n".join([*lines[:3], line, *lines[3:]]))
    with pytest.raises(ConfigError, match=rf"choose\.jsonl: line 4.*{re.escape(words)}") as error:
        read_rows(task)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_cut_below_the_examples_says_what_is_left(suite):
    """It says how many items are left."""
    task = suite.tasks[3]
    assert len(drawn_rows(task, 4)) == 4
    with pytest.raises(ConfigError, match="go on needs 3 examples before each item, but only 2 other items are left by --max-per-task"):
        drawn_rows(task, 3)
    task.path.write_text("")
    with pytest.raises(ConfigError, match="has no rows"):
        drawn_rows(task, None)


def test_a_file_of_rows_is_a_task(tmp_path):
    """Its baseline is the chance of its options."""
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps({"query": "a", "choices": ["b", "c", "d", "e"], "gold": 1}) for _ in range(3)))
    task, = read_suite(str(tmp_path / "q.jsonl")).tasks
    assert (task.label, task.shots, task.baseline, task.delimiter) == ("q", 0, 0.25, " ")
    (tmp_path / "q.jsonl").write_text(json.dumps({"context": "a", "continuation": "b"}))
    assert read_suite(str(tmp_path / "q.jsonl")).tasks[0].baseline == 0.0
    for text in ("", "5", '{"a": 1}', "\0"):
        (tmp_path / "q.jsonl").write_text(text)
        with pytest.raises(ConfigError, match="its first line is not a row"):
            read_suite(str(tmp_path / "q.jsonl"))
    for word in ("nothing", str(tmp_path / "none.jsonl"), str(tmp_path)):
        with pytest.raises(ConfigError):
            read_suite(word)


def test_without_a_bundle_core_names_how_to_get_it(tmp_path, monkeypatch):
    """Without a bundle core names what fetches it."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match=r"eval_bundle; in nanochat's checkout, `python -m scripts\.base_eval --eval core` fetches it"):
        read_suite("core")
    write_bundle(tmp_path / "eval_bundle")
    assert read_suite("core").name == "core" and len(read_suite("core").tasks) == len(TASKS)


# prompts and spans


def test_prompts_are_those_of_upstream_s_templates(suite):
    choose, answer, who, go_on, odd = suite.tasks
    row = {"query": "Q", "choices": ["a", "b"], "gold": 1}
    assert prompts_of(choose, row, [row | {"gold": 0}, row]) == ["Q a\n\nQ b\n\nQ a", "Q a\n\nQ b\n\nQ b"]
    assert prompts_of(answer, row, []) == ["Q\nAnswer: a", "Q\nAnswer: b"]
    pair = {"context_options": ["x", "y"], "continuation": "z", "gold": 1}
    assert prompts_of(who, pair, [pair]) == ["y z\n\nx z", "y z\n\ny z"]
    line = {"context": " c \n", "continuation": "d "}
    assert prompts_of(go_on, line, [line]) == ["c d \n\nc", "c d \n\nc d "]
    assert prompts_of(odd, rows_of("odd", "")[4], []) == [f"the <|bos|> {{{{ sea }}}} & town {end}" for end in ("7", "2.5", "a\n")]
    rows = [{"n": n} for n in range(9)]
    assert examples_of(rows * 9, 4, 3) != examples_of(rows, 4, 3) != examples_of(rows, 5, 3)
    assert all({"n": index} not in examples_of(rows, index, 8) for index in range(9))


def test_spans_are_those_of_upstream():
    assert spans_of("multiple_choice", [[0, 1, 2, 3], [0, 1, 4]]) == [ScoredSpan((0, 1, 2, 3), 2), ScoredSpan((0, 1, 4), 2)]
    assert [span.empty for span in spans_of("multiple_choice", [[0, 1], [0, 1, 4], [0, 1]])] == [True, False, True]
    assert spans_of("schema", [[0, 1, 5, 6], [0, 2, 3, 5, 6]]) == [ScoredSpan((0, 1, 5, 6), 2), ScoredSpan((0, 2, 3, 5, 6), 3)]
    assert spans_of("language_modeling", [[0, 1], [0, 1, 2]]) == [ScoredSpan((0, 1, 2), 2)]
    for tokens in ([[0, 1], [0, 2, 3]], [[0, 1], [0, 1]], [[0, 1, 2], [0, 1]]):
        with pytest.raises(BadItem):
            spans_of("language_modeling", tokens)
    assert fitted(ScoredSpan(tuple(range(10)), 7), 5) == ScoredSpan((5, 6, 7, 8, 9), 2) and fitted(ScoredSpan((1, 2), 1), 5) == ScoredSpan((1, 2), 1)
    with pytest.raises(BadItem, match="9 tokens are scored, but the context holds 9"):
        fitted(ScoredSpan(tuple(range(10)), 1), 9)


def option(*logprobs):
    return [TokenLogprob(5, logprob) for logprob in logprobs]


@pytest.mark.parametrize("scores, chosen", [
    ([option(-1, -3), option(-1.5)], 1), ([option(-1), option(-1)], 0), ([[], option(-1)], 0), ([option(-9), [], option(-1)], 2), ([[], []], 0),
    ([option(-2)], 0)])
def test_the_least_mean_wins(scores, chosen):
    """It is the first one on ties; no mean wins only as the first option."""
    verdict = verdict_of("multiple_choice", {"gold": 1}, scores)
    assert (verdict.chosen, verdict.correct) == (chosen, chosen == 1) and verdict.margin >= 0


def test_a_continuation_needs_every_likeliest_token():
    """Its margin is the least lead."""
    right, wrong = TokenLogprob(5, -0.1, ((5, -0.1), (6, -0.6))), TokenLogprob(6, -0.75, ((5, -0.25), (6, -0.75)))
    assert verdict_of("language_modeling", {}, [[right, right]]) == (True, None, 0.5)
    assert verdict_of("language_modeling", {}, [[right, wrong]]) == (False, None, 0.5)


# answers that are kept


async def test_other_arithmetics_answers_are_kept_apart(start_pool, suite):
    """Here and behind a URL alike: the scorer says which it is, not this command's flags."""
    scorers = [PoolScorer(await start_pool(arithmetic=arithmetic)) for arithmetic in ("fast", "fine")]
    assert [scorer.arithmetic for scorer in scorers] == ["fast", "fine"]
    assert len({answers_file_name(Settings(), scorer, "m", suite, None) for scorer in scorers}) == 2


async def test_a_second_run_asks_nothing_again(start_pool, suite, tmp_path):
    """One after a kill asks only what remains."""
    pool, task = await start_pool(), suite.tasks[0]
    asked = []

    class Counting(PoolScorer):
        async def score(self, prompts, starts, top):
            asked.append(len(prompts))
            return await super().score(prompts, starts, top)

    first = await run_task(Counting(pool), task, None, kept := AnswersFile(tmp_path, "a"), silent)
    kept.close()
    assert len(asked) == first.items == 16 and kept.path.stat().st_mode & 0o777 == 0o600
    again = await run_task(Counting(pool), task, None, AnswersFile(tmp_path, "a"), silent)
    assert len(asked) == 16 and again._replace(seconds=0) == first._replace(seconds=0)
    data = kept.path.read_bytes()
    kept.path.write_bytes(data[:len(data) // 2] + b'\x00{"item": []}\n{"task": "choose"}\n{"cut o')     # by a kill, and by others
    rest = await run_task(Counting(pool), task, None, other := AnswersFile(tmp_path, "a"), silent)
    assert 16 < len(asked) <= 16 + 9 and rest._replace(seconds=0) == first._replace(seconds=0)
    other.close()
    assert len(AnswersFile(tmp_path, "a").items) == 16


async def test_a_cancelled_run_leaves_no_answer_running(start_pool, suite, tmp_path):
    pool = await start_pool()
    began = asyncio.Event()
    run = asyncio.ensure_future(run_task(PoolScorer(pool), suite.tasks[1], None, AnswersFile(tmp_path, "a"), lambda stage, fraction: began.set()))
    await began.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert pool.dispatcher.jobs == {}


async def test_a_too_long_item_loses_its_beginning(start_pool, tmp_path):
    """It is counted."""
    pool = await start_pool(context_length=64)
    rows = [{"query": " ".join(["sea"] * 90), "choices": ["a", "the cat"], "gold": 0}, {"query": "sea", "choices": ["a", "b"], "gold": 0}]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task, = read_suite(str(tmp_path / "long.jsonl")).tasks
    assert (await run_task(PoolScorer(pool), task, None, AnswersFile(tmp_path, "x"), silent)).cut == 1


# the command


def test_the_eval_command_prints_a_table_or_json(nanochat_fixtures, float_url, tmp_path):
    """It runs here or through a server."""
    bundle, model = write_bundle(tmp_path / "bundle"), nanochat_fixtures / "gen5"
    code, table, errors = run_eval(model, "--dtype", "float32", "--suite", bundle, home=tmp_path)
    assert code == 0, errors
    lines = table.splitlines()
    assert lines[0] == f"== {model} (d4, sft, step 650): bundle" and [line.split()[0] for line in lines[2:8]] == ["choose", "answer", "who", "go", "odd", "CORE"]
    kept, = (tmp_path / "chat_server/evals").iterdir()
    assert kept.parent.stat().st_mode & 0o777 == 0o700 and len(kept.read_text().splitlines()) == 59
    code, line, _ = run_eval(model, "--dtype", "float32", "--suite", bundle, "--json", home=tmp_path)       # of the answers that are kept
    here = json.loads(line)
    assert code == 0 and here["suite"] == "bundle" and f"{here['core_metric']:.4f}" in lines[7]
    code, line, errors = run_eval("tiny", "--suite", bundle, "--json", "--url", float_url, home=tmp_path)
    assert code == 0, errors
    assert {name: value for name, value in json.loads(line).items() if name not in ("model", "seconds")} == {
        name: value for name, value in here.items() if name not in ("model", "seconds")}
    there = None
    if WHOLE:
        line = run_eval("tiny", "--suite", "sample", "--url", float_url, "--json", home=tmp_path)[1]
        there = json.loads(line)["free_samples"]
    code, text, _ = run_eval("tiny", "--suite", "sample", "--url", float_url, home=tmp_path)
    samples = text.splitlines()[1:]
    assert len(samples) >= 15 and samples[7].startswith("without a prompt, 1: ")
    assert samples[0].startswith("The capital of France is ->")
    asked = {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}
    answer = call(float_url, "/v1/completions", asked)[2]["choices"][0]["text"]
    code, line, _ = run_eval(model, "--dtype", "float32", "--suite", "sample", "--json", home=tmp_path)
    body = json.loads(line)
    assert body["samples"][0] == {"prompt": "The capital of France is", "text": answer}
    assert len({*body["free_samples"]}) == 8 and there in (None, body["free_samples"])


@pytest.mark.parametrize("words, named", [
    ((), "eval needs --suite"), (("--suite", "core"), "base_eval --eval core"), (("--suite", "x.jsonl"), "x.jsonl: No such file"),
    (("--suite", "core", "--max-per-task", "0"), "--max-per-task")])
def test_wrong_eval_words_are_one_line_and_status_2(tmp_path, monkeypatch, capfd, words, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    status, out, said = run_here(capfd, "eval", *words)
    assert status == 2 and out == "" and named in said and len(said.splitlines()) == 1, said


def test_a_killed_run_goes_on(nanochat_fixtures, tmp_path):
    """No item is asked twice; a name with control characters cannot write to the terminal."""
    rows = [{"query": f"the cat {number}", "choices": ["sat", "ran on"], "gold": 0} for number in range(200)]
    (tmp_path / "q\x1b[31m\n.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--suite", str(tmp_path / "q\x1b[31m\n.jsonl"), "--results", str(tmp_path / "kept"), "--dtype", "float32"]

    def lines():
        return [line for path in (tmp_path / "kept").glob("*.jsonl") for line in path.read_text().splitlines()]

    def interrupted(model, end, *more):
        """Let it answer some items, then end something."""
        with open(os.devnull, "wb") as nowhere, open(tmp_path / "said", "wb") as said:
            child = fork_front(SCRIPT, ["eval", str(model), *words, *more], os.environ, nowhere.fileno(), said.fileno())
        begun = len(lines())
        while len(lines()) < begun + 5 and child.poll() is None:
            time.sleep(0.01)
        end(child)
        code = child.wait(60)
        return (tmp_path / "said").read_text(), code

    model = nanochat_fixtures / "gen5"
    assert interrupted(model, lambda child: child.kill())[1] == -signal.SIGKILL and 5 <= len(lines()) < 200
    code, table, _ = run_eval(model, *words, home=tmp_path)
    assert code == 0 and "\x1b" not in table and len(table.splitlines()) == 3
    assert sorted(json.loads(line)["item"] for line in lines()) == list(range(200))
    # one of its own, which is killed
    with server(model, "--dtype", "float32", "--served-model-name", "tiny") as (process, url):
        errors, code = interrupted("tiny", lambda child: process.kill(), "--url", url)
    assert code in (1, 2) and url in errors.splitlines()[-1] and "Traceback" not in errors


def test_an_unwritable_results_folder_is_one_line(nanochat_fixtures, tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    (tmp_path / "file").write_text("")
    code, _, errors = run_eval(nanochat_fixtures / "gen5", "--suite", bundle, "--results", Path(tmp_path / "file"), home=tmp_path)
    assert code == 2 and "--results" in errors and len(errors.splitlines()) == 1
