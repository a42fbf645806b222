"""nanochat's chat tasks, its bits per byte and texts beyond sequence_len come out as upstream's code computes them."""

import hashlib
import json
import os

import pytest

from bundles import run_eval, silent
from chat_tasks import LONG_TEXT, PLACES, documents, write_chat_data, write_shard
from chatlm.common.errors import ConfigError, RequestError
from chatlm.front.evals import chat
from chatlm.front.evals.bpb import Packer, read_texts, run_bpb
from chatlm.front.evals.chat import chat_suite, drawn_problems, number_in, program_of
from chatlm.front.evals.data import data_files
from chatlm.front.evals.items import NEAR_TIE
from chatlm.front.evals.answers_file import AnswersFile
from chatlm.front.evals.permuted import permutation
from chatlm.front.evals.run import as_json, mean_of, run_task
from chatlm.front.evals.scores import PoolScorer, cut_as_upstream
from nightly import by_day
from openai_routes import call
from run_here import run_here

# What scripts/chat_eval.py, loss_eval.py and dataloader.py at 92d63d4 find on the data of chat_tasks with gpt.py at each
# fixture's commit, in float32 on a CPU. long: log-probabilities of the 8th to the 5th token from the end of LONG_TEXT and
# of the 101st and 102nd after sequence_len; beyond: nats of all after it; answers: the first 60 characters, hashed
EXPECTED = {
    "gen1": {"ARC-Easy": "000010000100", "ARC-Challenge": "000000000", "MMLU": "11000101010000", "GSM8K": "00000", "long": [-3.86084, -7.5475, -5.60575, -4.75085, -6.75026, -10.43702], "beyond": 10559.623, "bpb": 9.025887, "answers": ["ef09e834", "2c90fd6f", "0f3c2a51", "a6627d9c", "0095cde2"]},
    "gen2": {"ARC-Easy": "010000000000", "ARC-Challenge": "001000001", "MMLU": "01010100000000", "GSM8K": "00000", "long": [-7.82306, -7.25781, -5.57, -3.28476, -11.14235, -15.28463], "beyond": 10894.963, "bpb": 9.033526, "answers": ["111ab935", "edd3f6ad", "2eb0774f", "fe4a15ff", "a8e4b762"]},
    "gen3": {"ARC-Easy": "000000000001", "ARC-Challenge": "000000001", "MMLU": "01010100000000", "GSM8K": "00000", "long": [-8.8708, -5.29635, -8.21976, -7.19248, -8.1093, -7.20852], "beyond": 11389.89, "bpb": 8.490333, "answers": ["62e26281", "f3566ae2", "ac9e9df9", "615b1a3e", "9a28b12e"]},
    "gen4": {"ARC-Easy": "000010010100", "ARC-Challenge": "000100000", "MMLU": "10000001010000", "GSM8K": "00000", "long": [-9.81583, -5.78283, -9.11963, -10.6346, -9.83251, -10.44087], "beyond": 11218.845, "bpb": 9.199195, "answers": ["9a0179c7", "4b67d0d9", "49006cdb", "a9a74350", "38ad0e75"]},
    "gen5": {"ARC-Easy": "111101101000", "ARC-Challenge": "111011010", "MMLU": "00001000001101", "GSM8K": "00000", "long": [-13.24754, -7.62766, -11.80926, -6.06974, -6.20424, -6.28204], "beyond": 11327.754, "bpb": 9.455772, "answers": ["940f6fd6", "8b658b65", "9aeb15e3", "a6c219c5", "3541058a"]},
}


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    return tmp_path / "base"


@pytest.fixture
async def scorer(start_pool, request):
    generation = getattr(request, "param", "gen5")
    return PoolScorer(await start_pool(generation=generation, source="mid" if generation == "gen1" else None))


async def judged_all(scorer, suite, folder, most=None, runs=None):
    kept = AnswersFile(folder, f"{most}")
    return [await run_task(scorer, task, most, kept, silent, runs=runs) for task in suite.tasks], kept


@pytest.mark.parametrize("scorer", by_day(EXPECTED, "gen5"), indirect=True)
async def test_chat_tasks_are_as_upstream_finds_them(scorer, base, tmp_path, request):
    """Long texts are too."""
    wanted = EXPECTED[request.node.callspec.params["scorer"]]
    suite = chat_suite(False) if write_chat_data(base) else None
    assert [task.label for task in suite.tasks] == ["ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K"] and suite.mean == ""
    results, kept = await judged_all(scorer, suite, tmp_path)
    for task, result in zip(suite.tasks, results):
        items = [kept.find(task.label, index) for index in range(len(wanted[task.label]))]
        close = [item["margin"] is not None and item["margin"] <= NEAR_TIE for item in items]
        assert result.items == len(items) and result.near == sum(close) <= 1
        assert [item["correct"] for item, near in zip(items, close) if not near] == [
            right == "1" for right, near in zip(wanted[task.label], close) if not near], task.label
    answers = [(await scorer.answer(await scorer.chat(problem.text), 90))[:60] for problem in drawn_problems(suite.tasks[3], None)]
    assert [hashlib.sha256(answer.encode()).hexdigest()[:8] for answer in answers] == wanted["answers"]
    [ids] = await scorer.encode([LONG_TEXT])
    assert (scorer.room, scorer.longest) == (512, 5120) and 1800 < len(ids) < 2000
    [scores] = await scorer.score([ids], [1], 0)
    found = [one.logprob for one in scores]
    assert [*found[-8:-4], *found[612:614]] == pytest.approx(wanted["long"], abs=1e-3)
    assert -sum(found[512:]) == pytest.approx(wanted["beyond"], rel=1e-5)


# bits per byte


@pytest.mark.parametrize("scorer", by_day(EXPECTED, "gen2"), indirect=True)
async def test_validation_bits_per_byte_are_upstream_s(scorer, base, tmp_path, request):
    """They are those of the validation shard."""
    pytest.importorskip("pyarrow")
    write_shard(base / "base_data_climbmix")
    texts, asked = read_texts(None), []
    assert texts.name == "shard_06542.parquet"
    result = await run_bpb(scorer, texts, 3, kept := AnswersFile(tmp_path, "a"), lambda stage, fraction: asked.append(fraction))
    assert result.bits_per_byte == pytest.approx(EXPECTED[request.node.callspec.params["scorer"]]["bpb"], rel=1e-5)
    assert (result.rows, result.targets, asked[-1]) == (3, 512, 1.0) and result.as_json()["val_bpb"] == round(result.bits_per_byte, 6)
    kept.close()

    class Silent(PoolScorer):
        async def score(self, prompts, starts, top):
            raise AssertionError("a row that is kept was scored again")

    again = await run_bpb(Silent(scorer.pool), texts, 3, AnswersFile(tmp_path, "a"), silent)
    assert again._replace(seconds=0) == result._replace(seconds=0)


def test_the_validation_shard_is_found(base, monkeypatch):
    """It is in today's folder or in one of the two older ones."""
    pytest.importorskip("pyarrow")
    for folder in ("base_data", "base_data_climbmix", "datasets/climbmix"):     # the newest one counts
        write_shard(base / folder)
        assert read_texts(None).path == base / folder / "shard_06542.parquet"
    monkeypatch.setenv("NANOCHAT_DATASET", "remix")                             # and no other one instead of it
    with pytest.raises(ConfigError, match=r"no shard is in .*/datasets/remix; .* --text FILE"):
        read_texts(None)
    write_shard(base / "datasets/remix")
    assert read_texts(None).path == base / "datasets/remix/shard_06542.parquet"


def test_documents_are_packed_as_upstream_does():
    packer, waiting = Packer(), [[document] * length for document, length in enumerate((5, 9, 3, 5, 2, 9, 30))]
    for document in waiting:
        packer.add(document)
    rows = []
    for _ in range(2):
        row = []
        while len(row) < 11:        # upstream's search, over a list
            room = 11 - len(row)
            fitting = [document for document in waiting if len(document) <= room]
            best = max(fitting, key=len) if fitting else min(waiting, key=len)
            waiting.remove(best)
            row += best[:room]
            assert packer.take(room) == best[:room]
        rows.append(row)
    assert rows == [[1] * 9 + [4] * 2, [5] * 9 + [2] * 2]


async def test_a_running_text_is_scored_in_fresh_rows(scorer, base, tmp_path):
    """A running text is scored in rows that begin afresh."""
    (tmp_path / "text.txt").write_text(LONG_TEXT)
    texts = read_texts(str(tmp_path / "text.txt"))
    result = await run_bpb(scorer, texts, None, AnswersFile(tmp_path, "a"), silent)
    begin, whole = await scorer.encode(["", LONG_TEXT])
    assert result.bytes == len(LONG_TEXT.encode()) and result.rows == -(-(len(whole) - 1) // 512) and "bpb" in result.as_json()
    [scores] = await scorer.score([begin + whole[513:1025]], [1], 0)
    assert AnswersFile(tmp_path, "a").find("bpb", 1)["nats"] == pytest.approx(-sum(one.logprob for one in scores))
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents()))
    lines = await run_bpb(scorer, read_texts(str(tmp_path / "lines.jsonl")), 3, AnswersFile(tmp_path, "b"), silent)
    assert lines.bits_per_byte == pytest.approx(EXPECTED["gen5"]["bpb"], rel=1e-5)      # the shard's documents


async def test_unusable_texts_are_one_line(scorer, base, tmp_path):
    """So are texts that are not there."""
    with pytest.raises(ConfigError, match=r"base_data_climbmix, .*base_data; in nanochat's checkout, `python -m nanochat.dataset -n 1` fetches it, NANOCHAT_BASE_DIR names another base folder, or --text"):
        read_texts(None)
    for name, data, words in (("a.txt", b"", "no text"), ("b.txt", b"\xff\xfe\0", "not UTF-8"), ("c.jsonl", b"{", "line 1 is not JSON"),
                              ("d.jsonl", b"[1]", "is not a text"), ("e.jsonl", b"", "no texts"), ("f.parquet", b"PAR1", "cannot read|needs the Python package")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=words) as error:
            await run_bpb(scorer, read_texts(str(tmp_path / name)), 1, AnswersFile(tmp_path, name), silent)
        assert "\n" not in str(error.value)
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", "/dev/zero", tmp_path):
        with pytest.raises(ConfigError, match="it must be a regular file"):
            read_texts(str(path))


# data


def test_rows_come_in_numpy_s_order():
    numpy = pytest.importorskip("numpy")
    for seed in (0, 42, 2**32 - 1):
        for count in (1, 2, 3, 17, 1319, 70_000):
            assert permutation(seed, count) == numpy.random.default_rng(seed).permutation(count).tolist()


def test_data_are_found_where_nanochat_keeps_them(base, tmp_path):
    """They are also found where it kept them earlier."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.ipc
    write_chat_data(base, labels=["GSM8K"])
    lines = drawn_problems(chat_suite(False).tasks[0], None)
    assert [problem.right for problem in lines] == [
        f"{1000 * i + 1}" for i in permutation(42, 5)]
    task = chat_suite(False).tasks[0]
    assert drawn_problems(task, 2) == lines[:2]
    for path in data_files("openai/gsm8k", "main", "test"):
        path.unlink()
    rows = PLACES["GSM8K"][1]()
    folder = tmp_path / "hub/datasets/openai___gsm8k/main/0.0.0/abc"
    folder.mkdir(parents=True)
    for name, part in (("gsm8k-train", rows[:1]), ("gsm8k-test", rows)):
        table = pyarrow.Table.from_pylist(part)
        with pyarrow.OSFile(str(folder / f"{name}.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    assert drawn_problems(chat_suite(False).tasks[0], None) == lines
    (base / "task_data/openai--gsm8k/main/test").rmdir()
    (base / "task_data/openai--gsm8k/main").rmdir()
    (base / "task_data/openai--gsm8k").rmdir()
    write_chat_data(base, parquet=True, labels=["GSM8K"])
    assert drawn_problems(chat_suite(False).tasks[0], None) == lines
    (folder / "gsm8k-test.arrow").write_bytes(b"no arrow")
    (base / "task_data/openai--gsm8k/main/test/manifest.json").unlink()
    with pytest.raises(ConfigError, match="cannot read .*gsm8k-test.arrow"):
        drawn_problems(task, None)


def test_what_is_missing_names_what_fetches_it(base):
    with pytest.raises(ConfigError, match=r"`python -m scripts.chat_eval -i sft -a 'ARC-Easy\|ARC-Challenge\|MMLU\|GSM8K\|HumanEval'` fetches them"):
        chat_suite(True)
    write_chat_data(base, labels=["MMLU", "HumanEval"])
    suite = chat_suite(False)
    assert [task.label for task in suite.tasks] == ["MMLU"] and suite.mean == "" and len(suite.left_out) == 4
    assert suite.left_out[3].startswith("HumanEval: it runs programs") and "-a GSM8K`" in suite.left_out[2]
    write_chat_data(base, labels=["ARC-Easy", "ARC-Challenge", "GSM8K"])
    assert (chat_suite(True).mean, chat_suite(True).left_out) == ("ChatCORE", ())


@pytest.mark.parametrize("label, row, words", [
    ("MMLU", {"question": "a", "choices": ["b"], "answer": 0}, "A"), ("MMLU", {"question": "a", "choices": list("bcde"), "answer": 4}, "IndexError"),
    ("MMLU", {"question": "a", "answer": 1}, "choices"), ("MMLU", [], "TypeError"), ("ARC-Easy", {"question": "a", "choices": {"text": ["b"], "label": ["A"]}, "answerKey": "B"}, "B"),
    ("GSM8K", {"question": "a", "answer": "no number"}, "no ####"), ("GSM8K", {"question": 5, "answer": "#### 1"}, "TypeError"),
    ("HumanEval", {"prompt": "a", "test": None, "entry_point": "x"}, "TypeError")])
def test_a_broken_row_is_named(base, label, row, words):
    write_chat_data(base, labels=[label])
    path, = (base / "task_data").glob("*/*/test/rows.jsonl")
    path.write_text(path.read_text() + "\n" + json.dumps(row))
    task, = chat_suite(True).tasks
    with pytest.raises(ConfigError, match=rf"row {len(path.read_text().splitlines())} is not one of {label}: .*{words}") as error:
        drawn_problems(task, None)
    assert "\n" not in str(error.value)
    path.with_name("manifest.json").write_text('["../../x.parquet"]')
    with pytest.raises(ConfigError, match="manifest.json is not a list of parquet files"):
        chat_suite(True)


# answers


def test_numbers_and_programs_are_found_in_answers(base):
    """Upstream finds the same."""
    assert [number_in(text) for text in ("so\n#### 1,234 #### 5", "#### -7.", "####5", "", "#### x")] == ["1234", "-7.", None, None, None]
    write_chat_data(base, labels=["HumanEval"])
    problem = drawn_problems(chat_suite(True).tasks[0], None)[0]
    ends = "\n\ndef check(candidate):\n    assert candidate(2) == 4\n\ncheck(twice)"
    assert program_of(problem, "Here:\n```python\ndef twice(x): return 2 * x\n```\n```\nno\n```") == "import math\nfrom os import path\n\ndef twice(x): return 2 * x" + ends
    assert program_of(problem, " x = 1 ") == "import math\nfrom os import path\n\nx = 1" + ends
    assert cut_as_upstream([*range(3000), 7]) == [*range(2048), 7] and cut_as_upstream([1, 2, 3]) == [1, 2, 3]


async def test_all_five_tasks_make_chatcore(scorer, base, tmp_path, monkeypatch):
    """Programs are run."""
    monkeypatch.setattr(chat, "ANSWER_TOKENS", 40)
    write_chat_data(base)
    ran = []

    async def runs(program):
        ran.append(program)
        return len(ran) == 1

    suite = chat_suite(True)
    results, _ = await judged_all(scorer, suite, tmp_path, 2, runs)
    body = as_json(suite, results)
    assert len(ran) == 2 and all("check(twice)" in program for program in ran) and body["results"]["HumanEval"] == 0.5
    assert body["chatcore_metric"] == pytest.approx(sum(body["centered_results"].values()) / 5, abs=1e-5) == pytest.approx(mean_of(results)[0], abs=1e-5)


async def test_a_text_beyond_the_context_is_only_scored(start_pool):
    scorer = PoolScorer(await start_pool())
    [ids] = await scorer.encode([LONG_TEXT])
    with pytest.raises(RequestError, match="context length is 512 tokens"):
        await scorer.answer(ids, 1)
    with pytest.raises(RequestError, match="context length is 5120 tokens"):
        await scorer.score([ids * 3], [1], 0)
    small = PoolScorer(await start_pool(context_length=64))
    assert (small.room, small.longest) == (64, 64)


# the command


def test_the_command_answers_chat_tasks(nanochat_fixtures, float_url, base, tmp_path):
    """It scores rows too, here and through a server."""
    write_chat_data(base)
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(text) for text in documents()))
    model, found = nanochat_fixtures / "gen5", {}
    chat, rows = ("--suite", "chat", "--max-per-task", 2), ("--suite", "bpb", "--text", tmp_path / "lines.jsonl", "--max-per-task", 2)
    assert call(float_url, "/v1/models")[2]["data"][0]["scored_length"] == 5120
    for place, words in (("here", (model, "--dtype", "float32")), ("there", ("tiny", "--url", float_url))):
        for suite in (chat, rows):
            code, line, errors = run_eval(*words, *suite, "--json", home=tmp_path)
            assert code == 0, errors
            body = json.loads(line)
            computed = {name: value for name, value in body.items() if name not in ("model", "seconds", "nats", "bpb")}
            found.setdefault(place, []).append(computed)
            found.setdefault("bpb", []).append(body.get("bpb"))
    assert found["here"] == found["there"] and found["bpb"][1] == pytest.approx(found["bpb"][3], rel=1e-6) and found["here"][0]["items"]["GSM8K"] == 2
    assert found["here"][0]["left_out"] == ["HumanEval: it runs programs that the model writes, only with --confirm-run-unsafe-code"]
    code, table, _ = run_eval(model, "--dtype", "float32", "--suite", "chat", "--max-per-task", 1, "--confirm-run-unsafe-code", home=tmp_path)
    assert code == 0 and table.splitlines()[-1].startswith("ChatCORE") and "HumanEval" in table


@pytest.mark.parametrize("words, named", [
    (("--suite", "chat"), "chat_eval -i sft -a"), (("--suite", "bpb"), "nanochat.dataset -n 1"), (("--suite", "bpb", "--text", "none.txt"), "none.txt"),
    (("--suite", "core", "--text", "x"), "--text is for --suite bpb"), (("--suite", "sample", "--confirm-run-unsafe-code"), "--confirm-run-unsafe-code is for --suite chat")])
def test_wrong_words_about_chat_suites_are_one_line(base, tmp_path, monkeypatch, capfd, words, named):
    monkeypatch.chdir(tmp_path)
    status, out, said = run_here(capfd, "eval", *words)
    assert status == 2 and out == "" and named in said and len(said.splitlines()) == 1, said
