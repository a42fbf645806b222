"""The commands compare and score: real models, what they print, and the number against other code's."""

import json
import re
import shlex
import subprocess
import sys

import chat_server
import pytest
import tiny_training
from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import resolve_model
from chatlm.common.text.load import open_tokenizer
from chatlm.front.evals.bits import score_text, windows_of
from chatlm.front.evals.scores import PoolScorer
from chatlm.front.pool.many import many_models
from chatlm.terminal.side_by_side import compare, score
from chatlm.worker.weights.formats.nanochat.checkpoint import read_nanochat_tokenizer
from chatlm.worker.weights.load import open_model
from command_line import parse_command_line
from fake_pool import serving
from forked import DYING

TEXT = "What is two plus two? " * 42 + "\u00e9\u65e5 \n" * 9


def command(line):
    return parse_command_line(shlex.split(line), {})


@pytest.mark.parametrize("line, words", [
    ("compare a -p x", "takes 2 to 8 MODELs, not 1"), (f"compare {'a b c ' * 3} -p x", "not 9"), ("compare a a -p x", "must be different"),
    ("score a", "needs --text"), ("score a --text /nowhere", "No such file"), ("score a --text /dev/null", "the file is empty")])
def test_a_wrong_comparison_is_one_line_and_status_2(line, words, capsys):
    """What cannot be compared or scored is one line and status 2."""
    assert chat_server.main(shlex.split(line)) == 2
    assert re.search(words, capsys.readouterr().err) and capsys.readouterr().out == ""


@pytest.mark.parametrize("flag", ["--watch-text", "--watch-prompts", "--watch-suite", "--run-log"])
def test_comparing_checkpoints_needs_the_folder(flag):
    """What is done with checkpoints needs the folder."""
    with pytest.raises(ConfigError, match=f"{flag} is for the checkpoints of --watch"):
        command(f"serve {flag} book.txt")


@pytest.mark.parametrize("length, context", [(1, 16), (2, 16), (16, 16), (17, 16), (24, 16), (25, 16), (100, 16), (33, 17), (50, 2)])
def test_windows_score_each_token_once(length, context):
    """Windows score each token once after at least half a context."""
    ids, scored = list(range(length)), []
    for window in windows_of(ids, context):
        assert len(window.ids) <= context and (window.first >= context // 2 or window.ids[0] == 0)
        scored += window.ids[window.first:]
    assert scored == ids[1:]


async def test_two_models_compare_alike_here_and_remotely(nanochat_fixtures, capsys):
    """Two models are compared here and at a server with equal answers."""
    names = [str(nanochat_fixtures / name) for name in ("gen1", "gen5")]
    flags = "-p 'hello there' --seed 4 -t 1 -m 16"
    settings = command(f"compare {names[0]} {names[1]} {flags} --dtype float32 --json")
    assert await compare(settings) == 0
    here = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["model"] for line in here] == names and len({line["text"] for line in here}) == 2
    assert here[0]["differs"] is None and len(here[1]["differs"]["probabilities"]) == 2 and {line["seed"] for line in here} == {4}
    models = many_models(Settings(several=settings.several, dtype="float32"), DYING)
    await models.start()
    await models.wait_ready()
    try:
        async with serving(models, models.settings) as url:
            assert await compare(command(f"compare {names[0]} {names[1]} {flags} --url {url}")) == 0
            out, err = capsys.readouterr()
            assert out == f"== {names[0]}\n{here[0]['text']}\n== {names[1]}\n{here[1]['text']}\n"
            assert f"differs from the first answer from token {here[1]['differs']['position']} on: " in err
    finally:
        await models.close()


async def test_the_score_is_plain_torch_s_in_any_batch(nanochat_fixtures, tmp_path, capsys, start_pool):
    (tmp_path / "text").write_text(TEXT)
    base = nanochat_fixtures / "gen1"
    [path] = base.rglob("model_*.pt")
    assert await score(command(f"score {path} {base} --text {tmp_path / 'text'} --dtype float32 --json")) == 0
    one, other = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (one["model"], other["model"]) == (str(path), str(base)) and one["bits"] == other["bits"]
    step = int(path.stem.removeprefix("model_"))
    assert [[each[key] for key in ("tag", "stage", "step")] for each in (one, other)] == [["d4", "mid", step]] * 2
    model, spec = tiny_training.load(path), read_nanochat_tokenizer(path, 283)
    ids = [spec.bos_token, *open_tokenizer(spec).encode(TEXT)]
    assert len(ids) > 512 + 256 and one["tokens"] == len(ids) - 1 and one["bytes"] == len(TEXT.encode())
    assert one["bits_per_byte"] == pytest.approx(tiny_training.bits_per_byte(model, ids, len(TEXT.encode())), abs=1e-4)
    pool = await start_pool(generation="gen1", max_batch=73)        # 512 - 1 = 7 x 73: the last token of a window is computed by itself
    [bits] = {(await score_text(PoolScorer(pool), TEXT, windows=windows)).bits for windows in (1, 3)}
    assert round(bits, 3) == one["bits"]


@pytest.mark.slow
def test_the_default_score_is_that_of_transformers(default_model_path, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM
    text = "The Apollo program was a human spaceflight program. It landed the first humans on the Moon in 1969. " * 12
    (tmp_path / "text").write_text(text)
    done = subprocess.run([sys.executable, chat_server.__file__, "score", default_model_path, "--text", tmp_path / "text",
                           "--context-length", "128", "--json"], capture_output=True, text=True, timeout=300)
    scored = json.loads(done.stdout)
    settings = Settings(model=str(default_model_path))
    spec = open_model(resolve_model(settings), settings).text
    ids = [spec.bos_token, *open_tokenizer(spec).encode(text)]
    model, logprobs = AutoModelForCausalLM.from_pretrained(default_model_path.parent, gguf_file=default_model_path.name).eval(), 0.0
    begin, done = 0, 1
    while done < len(ids):
        window = torch.tensor([ids[begin:begin + 128]])
        with torch.no_grad():
            lines = model(window).logits[0, :-1].double().log_softmax(-1)
        for position in range(done - begin, window.shape[1]):
            logprobs += lines[position - 1, window[0, position]].item()
        done, begin = begin + window.shape[1], begin + 64
    assert scored["tokens"] == len(ids) - 1
    assert scored["bits_per_byte"] == pytest.approx(-logprobs / 0.6931471805599453 / len(text), rel=0.01)
