"""Workers that die or hang at every moment of an answer: real processes with a tiny real nanochat model."""

import asyncio
import contextlib
import functools
import json
import re
import signal
import sys
import time
from dataclasses import replace

import aiohttp
import psutil
import pytest

from chatlm.common import program
from chatlm.common.config import Settings
from chatlm.common.errors import EngineFailure, Overloaded, RequestError
from chatlm.common.messages.protocol import Loading
from chatlm.common.messages.requests import DraftCounts, Embedding, Finished, Message, Piece, PromptScores, SamplingParams
from chatlm.common.messages.wire import BadMessage
from chatlm.common.processes.start import PROCESS_COMMAND, patient
from chatlm.common.text.formats import HARMONY
from chatlm.common.text.grammar import check_grammar, json_grammar
from chatlm.front.admission import prompts
from chatlm.front.api.call_grammars import tool_grammar
from chatlm.front.pool import local_devices
from chatlm.front.pool.pool import make_pool
from answers import asked, calls_of
from draft_heads import Head, save_with_head
from fake_pool import conversation, frames, serving
import families
import pools
from nightly import WHOLE, by_day
from patching import patch
from pools import collect, idle
import tiny_gguf

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
async def start_pool(start_pool, tmp_path, monkeypatch):
    """A function that starts a WorkerPool whose workers die when a request says so (see dying_worker.py).

    No drafts from earlier answers: one that is said again would pass the moment of its worker's death in one step."""
    monkeypatch.setenv("STRUCK", str(tmp_path))
    return functools.partial(start_pool, prefill_chunk=16, stream_interval=0.0, draft_memory=0, kv_cache_memory=2 << 20)


greedy = functools.partial(pools.greedy, ignore_eos=True)


def drawn_from(tokens, **changes):
    """Parameters of a request that draws almost at random from these tokens only."""
    bias = tuple((token, 100.0) for token in tokens)
    return dict(sampling=SamplingParams(temperature=8.0, top_k=0, seed=3, logit_bias=bias), max_tokens=150) | changes


async def told(pool, name, request):
    """The pieces of an answer, and its Usage."""
    events = [event async for event in pool.answer(asked(name, **request))]
    pieces = [event._replace(gpu=0) for event in events if isinstance(event, Piece)]
    return [*pieces, replace(events[-1].usage, cached_tokens=0, drafted=DraftCounts(), accepted=DraftCounts())]


def whole(said):
    """What `told` returns with its pieces as one: how many tokens a step adds depends on drafts."""
    deltas = []
    for delta in (delta for piece in said[:-1] for delta in piece.deltas):
        if deltas and deltas[-1].kind == delta.kind and not delta.name:
            delta = deltas[-1]._replace(text=deltas.pop().text + delta.text)
        deltas.append(delta)
    return [token for piece in said[:-1] for token in piece.tokens], deltas, said[-1]


PLAIN = dict(sampling=SamplingParams(temperature=1.0, seed=5), max_tokens=60)
LONG_PROMPT = dict(prompts=(tuple(range(100, 220)),), max_tokens=40, ignore_eos=True, sampling=SamplingParams(temperature=0.0))
GRAMMAR = json_grammar({"type": "array", "items": {"enum": ["ab", "c"]}, "minItems": 9}, "")
PENALTIES = SamplingParams(temperature=0.7, seed=5, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.3)
ON_HOST = SamplingParams(temperature=0.9, seed=5, top_k=0, top_n_sigma=2.0, typical_p=0.8, xtc_probability=0.5,
                         dry_multiplier=2.0, dry_allowed_length=1, dry_penalty_last_n=-1)
PYTHON_START, PYTHON_END, OUTPUT_START = 280, 281, 282
CALLS = drawn_from([PYTHON_START, PYTHON_END, *b"12+"], max_tokens=100)
CASES = {       # moment and request: the state that another worker must rebuild from the ids alone
    "queued": PLAIN,
    "queued with a chosen beginning": PLAIN | dict(prefix_token_ids=tuple(b"Well, ")),
    "decode after a chosen beginning": PLAIN | dict(prefix_token_ids=tuple("日".encode()[:2])),
    "queued for a grammar": dict(sampling=SamplingParams(temperature=1.0, seed=3), max_tokens=60, grammar=GRAMMAR),
    "prefill": LONG_PROMPT | dict(messages=None),
    "decode": PLAIN,
    "decode with penalties": PLAIN | dict(sampling=PENALTIES),
    "decode with draws on the host": PLAIN | dict(sampling=ON_HOST),
    "decode before min_tokens": drawn_from([*b"abc"], min_tokens=30, stop_token_ids=(97,)),
    "decode of the third of three": PLAIN | dict(n=3),
    "decode in a grammar": dict(sampling=SamplingParams(temperature=1.0, seed=3), max_tokens=60, grammar=GRAMMAR),
    "decode with log-probabilities": PLAIN | dict(prompts=(tuple(range(100, 140)),), messages=None, logprobs=2, prompt_logprobs=1),
    "prefill of a scored prompt": LONG_PROMPT | dict(messages=None, logprobs=0, prompt_logprobs=1),
    "prefill of an embedding": LONG_PROMPT | dict(messages=None, pooling="mean"),
    "unsent": PLAIN,
    "character": drawn_from("日".encode(), max_tokens=60),
    "stop": drawn_from(b"abc", stop=("cbabcc", "zzz")),
    "call": CALLS,
    "result of a call": CALLS,
    "lost result of a call": CALLS,
}
FEW = ["queued with a chosen beginning", "decode with draws on the host", "queued for a grammar", "prefill of a scored prompt", "decode of the third of three", "character", "lost result of a call"]


async def answers(pool, request):
    """{choice: (text, tokens, tokens with log-probabilities, reason, cause)} of all answers to a request."""
    found, ends = {}, {}
    async for event in pool.answer(request):
        text, tokens, scored = found.get(getattr(event, "choice", 0), ("", (), ()))
        if isinstance(event, (Piece, PromptScores)):
            scored += tuple(entry.token for entry in event.logprobs)
        if isinstance(event, Piece):
            text, tokens = text + "".join(delta.text for delta in event.deltas), tokens + event.tokens
        if isinstance(event, Finished):
            ends[event.choice] = event.reason, event.stop_reason
        elif isinstance(event, (Piece, PromptScores, Embedding)):
            found[event.choice] = text + getattr(event, "vector", ""), tokens, scored
    return {choice: (*said, *ends[choice]) for choice, said in found.items()}


@pytest.mark.parametrize("cases", [FEW, pytest.param([*CASES], marks=pytest.mark.slow)], ids=["few", "all"])
async def test_a_killed_worker_costs_no_word(start_pool, tmp_path, cases):
    """It may be killed at any moment: there is a pause."""
    pool = await start_pool(num_workers=2, stream_interval=8.0, draft_memory=32 << 20)     # as in a server
    for number, (case, changes) in enumerate((case, CASES[case]) for case in cases):
        request = dict(messages=(Message("user", "hello"),), ignore_eos=True) | changes
        name = f"kill-{case.split()[0]}-{number}"
        # first, since the other request finds the prompt in the prefix cache
        disturbed = await answers(pool, asked(name, **request))
        undisturbed = await answers(pool, asked(f"undisturbed {number}", **request))
        assert disturbed == undisturbed, case
        assert [path for path in tmp_path.iterdir() if path.name.split("#")[0] == name], f"{case}: no worker was killed"
        text, tokens, _, reason, cause = undisturbed[0]
        assert "chosen" not in case or text.startswith(("Well, ", "日", "\ufffd"))
        assert "call" not in case or OUTPUT_START in tokens
        assert case != "character" or any(character in text for character in "日楥旗")
        assert case != "stop" or (reason, cause) == ("stop", "cbabcc")
    assert sum(worker.restarts + (worker.state != "ready") for worker in pool.workers) >= len(cases)
    await idle(pool)


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [*((name, "auto") for name in ("lfm2", "lfm2moe", "qwen3.5", "qwen3.5moe", "qwen3next", "granite4h", "granite4h-dense", "gemma4", "gemma4moe")),
                                        ("gemma4", "q8_0"), ("gpt-oss", "q8_0")])
async def test_a_killed_mixed_layer_worker_costs_no_word(start_pool, tmp_path, name, kind):
    """Keys and states are lost with it: the other one computes them again, from the prompt and the tokens that arrived."""
    folder = tmp_path / "model"
    folder.mkdir()
    pool = await start_pool(model=str(families.save(families.make_model(name), folder)), num_workers=2, kv_cache_dtype=kind)
    for moment in ("prefill", "decode"):
        disturbed = await answers(pool, asked(f"kill-{moment}", **LONG_PROMPT))
        undisturbed = [await answers(pool, asked(f"{number} undisturbed at {moment}", **LONG_PROMPT)) for number in range(2)]
        assert undisturbed == [disturbed, disturbed] and (tmp_path / f"kill-{moment}").exists()
    assert len(disturbed[0][1]) == LONG_PROMPT["max_tokens"]
    await idle(pool)


async def test_a_killed_drafting_worker_costs_no_word(start_pool, tmp_path, nanochat_fixtures):
    """The other worker's draft model computes the prompt and the tokens that arrived again. Without drafts the answers are the same."""
    plain = await start_pool(drafts="none")
    (tmp_path / "draft-always").touch()
    pool = await start_pool(num_workers=2, draft_model=str(nanochat_fixtures / "gen5"), drafts="model")
    cases = {"kill-decode": PLAIN | dict(messages=(Message("user", "hello"),)), "kill-prefill": LONG_PROMPT}
    if WHOLE:
        cases["kill-decode-more"] = PLAIN | dict(messages=(Message("user", "hello"),), n=3)
    for name, request in cases.items():
        disturbed = await answers(pool, asked(name, **request))
        undisturbed = await answers(pool, asked(f"undisturbed {name}", **request))
        assert (tmp_path / name).exists() and disturbed == undisturbed == await answers(plain, asked(f"plain {name}", **request))
    events = [event async for event in pool.answer(asked("counted", **cases["kill-decode"]))]
    assert events[-1].usage.accepted.model > 0
    await idle(pool)


@pytest.mark.slow
async def test_a_killed_worker_with_a_head_costs_no_word(start_pool, tmp_path):
    """The model's own head drafts."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_with_head(families.make_model("qwen3.5"), Head("qwen3.5"), folder)
    pool = await start_pool(model=str(folder), num_workers=2, drafts="mtp")
    for moment in ("prefill", "decode"):
        disturbed = await answers(pool, asked(f"kill-{moment}", **LONG_PROMPT))
        undisturbed = await answers(pool, asked(f"undisturbed at {moment}", **LONG_PROMPT))
        assert disturbed == undisturbed and (tmp_path / f"kill-{moment}").exists()
    assert any(line.startswith("Draft head: one layer") for line in pool.describe())
    await idle(pool)


@pytest.mark.slow
async def test_workers_with_amx_continue_those_without(start_pool, tmp_path, monkeypatch, default_model_path):
    """Those without continue theirs as well."""
    core = pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)
    emulated, best = next((name for name in core._core.isas_for_tests() if name.startswith("amx")), None), core.info()["offered_isas"][0]
    if emulated is None:
        pytest.skip("no AMX here, and decode_core was compiled without DECODE_CORE_TEST_SETS=1")
    started = []

    def environment(threads, nice, original=local_devices.process_environment):
        started.append(best if started == [emulated] else emulated)
        return original(threads, nice) | {"DECODE_CORE_ISA": started[-1]}
    patch(monkeypatch, local_devices, "process_environment", environment)
    pool = await start_pool(num_workers=2, model=str(default_model_path))
    request = dict(messages=(Message("user", "Tell me of rivers. " * 4),), chat=True, ignore_eos=True, max_tokens=20,
                   sampling=SamplingParams(temperature=1.0, seed=3))
    disturbed = await answers(pool, asked("kill-decode", **request))
    assert (tmp_path / "kill-decode").exists()
    # both at once: a worker each, of which one has the prompt in its prefix cache
    undisturbed = await asyncio.gather(*(answers(pool, asked(name, **request)) for name in ("one", "other")))
    assert undisturbed == [disturbed, disturbed] and started == [emulated, best, emulated]


LONG = 200     # tokens: more than a worker computes before a signal reaches it


def thinking_model(tmp_path):
    """A tiny model that draws letters at random, and marks of reasoning: its path, and such a request."""
    metadata = tiny_gguf.small_gguf_metadata("gpt-2")
    first = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += ["<think>", "</think>"]
    metadata["tokenizer.ggml.token_type"] += [3, 3]
    metadata["tokenizer.chat_template"] = "{{ messages[0].content }}<think>{# </think> #}"
    path = tiny_gguf.write_gguf(tmp_path / "thinks.gguf", tiny_gguf.random_llama(vocab=first + 2),
                                tiny_gguf.LLAMA_NUMBERS | {"llama.context_length": 2048}, metadata)
    letters = [metadata["tokenizer.ggml.tokens"].index(letter) for letter in "abcdefgh"]
    return path, drawn_from([*letters, first], messages=(Message("user", "hello"),), chat=True, ignore_eos=True, max_tokens=80, last_thought="hello")


async def test_a_killed_worker_keeps_a_thinking_budget(start_pool, tmp_path):
    """The reasoning ends at the same letter."""
    path, request = thinking_model(tmp_path)
    pool = await start_pool(model=str(path))
    request |= dict(thinking_budget=20)
    disturbed, undisturbed = [await told(pool, name, request) for name in ("kill-reasoning", "undisturbed")]
    assert (tmp_path / "kill-reasoning").exists() and whole(disturbed) == whole(undisturbed)
    together = await asyncio.gather(*(told(pool, name, request | dict(thinking_budget=budget)) for name, budget in (("kill-reasoning-2", 20), ("other", 3))))
    assert (tmp_path / "kill-reasoning-2").exists()
    letters, other = (["".join(piece.joined(kind) for piece in pieces[:-1]) for kind in ("reasoning", "text")] for pieces in together)
    assert letters == ["".join(piece.joined(kind) for piece in undisturbed[:-1]) for kind in ("reasoning", "text")]
    assert re.match("[a-h]{10,20}\n\nhello", letters[0]) and letters[1] and re.match("[a-h]{3}\n\nhello", other[0])
    await idle(pool)


async def test_an_answer_goes_on_from_tokens_it_is_given(start_pool, tmp_path):
    """They end in its reasoning or after it."""
    path, request = thinking_model(tmp_path)
    pool = await start_pool(model=str(path))
    request |= dict(thinking_budget=20)

    async def words(name, **changes):
        *pieces, usage = await told(pool, name, request | changes)
        return ["".join(piece.joined(kind) for piece in pieces) for kind in ("reasoning", "text")], sum((piece.tokens for piece in pieces), ()), usage

    said, tokens, usage = await words("whole")
    assert all(said) and len(tokens) == 80
    for count in (5, 40):
        assert await words(f"from {count}", prefix_token_ids=tokens[:count]) == (said, tokens[count:], usage)
    await idle(pool)


@pytest.mark.parametrize("killed", by_day([False, True], True), ids=["alive", "killed"])
async def test_thinking_is_ended_once_despite_a_death(start_pool, tmp_path, client, killed):
    """It ends where it did, also across a dead worker."""
    path, request = thinking_model(tmp_path)
    request |= dict(max_tokens=LONG)
    pool = await start_pool(model=str(path))
    process = pool.workers[0].process
    name, tokens, asking = "kill-hurried" if killed else "alive", [], None
    async for event in pool.answer(asked(name, **request)):
        if isinstance(event, Piece):
            tokens += event.tokens
            if asking is None and len(tokens) > 9:
                process.send_signal(signal.SIGSTOP)     # the answer would be done before a busy machine asks
                asking, [job] = asyncio.ensure_future(pool.end_thinking(name)), pool.dispatcher.jobs.values()
                await asyncio.sleep(0)
                process.send_signal(signal.SIGCONT)
    assert await asking and (tmp_path / "kill-hurried").exists() == killed and not await pool.end_thinking(name)
    # another run, in which it is known from the start where the reasoning ends
    submit = pool.dispatcher._submit

    def submit_knowing(jobs):
        for each in jobs:
            each.thinking_ends = job.thinking_ends
        submit(jobs)
    pool.dispatcher._submit = submit_knowing
    *pieces, usage = await told(pool, "knowing", request)
    assert [token for piece in pieces for token in piece.tokens] == tokens and 9 < job.thinking_ends < LONG - 20
    assert "".join(piece.joined("reasoning") for piece in pieces).endswith("hello") and usage.reasoning_tokens < LONG - 20
    await idle(pool)


async def test_a_waiting_answer_can_end_its_thinking(start_pool, tmp_path):
    """It ends where it was heard last."""
    path, request = thinking_model(tmp_path)
    request |= dict(max_tokens=2 * LONG)
    pool = await start_pool(model=str(path))
    worker, asking, tokens = pool.workers[0], None, 0
    async for event in pool.answer(asked("lost", **request)):
        tokens += len(event.tokens) if isinstance(event, Piece) else 0
        if asking is None and tokens > 9:
            worker.process.send_signal(signal.SIGSTOP)         # it hears no more
            asking, [job] = asyncio.ensure_future(pool.end_thinking("lost")), pool.dispatcher.jobs.values()
            await asyncio.sleep(0)
            worker.kill()
    assert await asking and job.thinking_ends <= tokens and worker.restarts == 1
    gone = asyncio.ensure_future(collect(pool, asked("cancelled", **request)))
    while not worker.jobs:
        await asyncio.sleep(0.01)
    worker.process.send_signal(signal.SIGSTOP)
    late = asyncio.ensure_future(pool.end_thinking("cancelled"))
    await asyncio.sleep(0)
    pool.cancel("cancelled")                # nobody waits for what will never come
    worker.process.send_signal(signal.SIGCONT)
    assert not await late
    with pytest.raises(RequestError, match="cancelled"):
        await gone
    await idle(pool)


@pytest.mark.parametrize("moment", by_day(["arguments", "reasoning"], "arguments"))
async def test_a_killed_worker_costs_no_letter_of_a_call(start_pool, tmp_path, moment):
    """The tags are special tokens; letters and other tokens are drawn at random, as are these tags in ordinary tokens."""
    words = ['{"name": "f", "arguments": {"', "<tool", "_call>"]
    metadata = tiny_gguf.small_gguf_metadata("gpt-2")
    first = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += ["<tool_call>", "</tool_call>", *words, "<think>", "</think>"]
    metadata["tokenizer.ggml.token_type"] += [3, 3, 4, 4, 4, 3, 3]
    metadata["tokenizer.chat_template"] = "{% if tools %}<tool_call>{% endif %}<think></think>"
    path = tiny_gguf.write_gguf(tmp_path / "tags.gguf", tiny_gguf.random_llama(vocab=first + 7), tiny_gguf.LLAMA_NUMBERS, metadata)
    pool = await start_pool(model=str(path))
    letter = metadata["tokenizer.ggml.tokens"].index("h")
    request = drawn_from([letter, *range(first, first + 7 if moment == "reasoning" else first + 5)], prompts=((1, 2),), tool_names=("f",),
                         chat=True, ignore_eos=True, max_tokens=110)

    disturbed, undisturbed = [await told(pool, name, request) for name in (f"kill-{moment}", "undisturbed")]
    assert (tmp_path / f"kill-{moment}").exists() and whole(disturbed) == whole(undisturbed)
    *pieces, done = disturbed
    if moment == "arguments":
        calls = calls_of(pieces)
        assert any(call.name for call in calls) and sum(not call.name for call in calls) > 3
        assert "<tool_call>" in "".join(piece.text for piece in pieces)
    else:
        assert sum(bool(piece.joined("reasoning")) for piece in pieces) > 3 and 0 < done.reasoning_tokens <= 110
    await idle(pool)


HARMONY_TEMPLATE = ("{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}{% for tool in tools or [] %}"
                    "{{ tool.function.name }}{% endfor %}<|start|>assistant{# <|channel|> #}")
TOOL = {"function": {"name": "f", "parameters": {"type": "object", "properties": {"city": {"type": "string", "minLength": 20, "maxLength": 30}},
                                                 "required": ["city"], "additionalProperties": False}}}


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["reasoning", "arguments"])
async def test_a_killed_worker_costs_no_harmony_letter(start_pool, tmp_path, moment):
    """A tiny gpt-oss with experts in MXFP4 thinks in the analysis channel, then calls a function in the commentary channel."""
    metadata = tiny_gguf.small_gguf_metadata("gpt-4o", **{"tokenizer.chat_template": HARMONY_TEMPLATE})
    metadata["tokenizer.ggml.tokens"] += [name for name in HARMONY if name not in metadata["tokenizer.ggml.tokens"]]
    vocab, analysis, end = (len(metadata["tokenizer.ggml.tokens"]), *map(metadata["tokenizer.ggml.tokens"].index, ("a", "<|end|>")))
    metadata["tokenizer.ggml.token_type"] += [3] * (vocab - len(metadata["tokenizer.ggml.token_type"]))
    metadata["tokenizer.ggml.eos_token_id"] = metadata["tokenizer.ggml.tokens"].index("<|return|>")
    model = families.make_model("gpt-oss", vocab_size=vocab)
    path = families.as_gguf(tmp_path / "tiny.gguf", model, quantized=True, metadata=metadata)
    pool = await start_pool(model=str(path), kv_cache_memory=32 << 20)
    request = dict(messages=(Message("user", "hello"),), chat=True, tool_names=("f",), tools=(TOOL,), max_tokens=300, grammar_param="tools",
                   grammar=tool_grammar([TOOL], "harmony", False),
                   sampling=SamplingParams(temperature=1.0, seed=1, logit_bias=((analysis, 4.0), (end, 4.0))))

    disturbed, undisturbed = [await told(pool, name, request) for name in (f"kill-{moment}", "undisturbed")]
    assert (tmp_path / f"kill-{moment}").exists() and whole(disturbed) == whole(undisturbed)
    *pieces, _ = disturbed
    calls = calls_of(pieces)
    assert [call.name for call in calls if call.name] == ["f"] and len(calls) > 10
    assert 20 <= len(json.loads("".join(call.text for call in calls))["city"]) <= 30
    assert sum(bool(piece.joined("reasoning")) for piece in pieces) > 3 and not any(piece.text for piece in pieces)
    await idle(pool)


@pytest.mark.slow
async def test_a_killed_worker_costs_no_letter_in_tags(start_pool, tmp_path):
    """It is in one of several calls, whose text is JSON."""
    metadata = tiny_gguf.small_gguf_metadata("gpt-2")
    metadata["tokenizer.chat_template"] = "{% if tools %}<tool_call><function=f><parameter=city>{% endif %}"
    vocab = len(metadata["tokenizer.ggml.tokens"])
    path = tiny_gguf.write_gguf(tmp_path / "tags.gguf", tiny_gguf.random_llama(vocab=vocab), tiny_gguf.LLAMA_NUMBERS | {"llama.context_length": 1024}, metadata)
    pool = await start_pool(model=str(path))
    properties = {"days": {"type": "integer", "minimum": 100, "maximum": 999}, **TOOL["function"]["parameters"]["properties"]}
    tool = {"function": {"name": "f", "parameters": TOOL["function"]["parameters"] | {"required": ["days", "city"], "properties": properties}}}
    grammar = tool_grammar([tool], "qwen tags", True).replace('("\\n" call){0,63}', '"\\n" call "\\n" call')
    check_grammar(grammar, "tools")
    request = dict(prompts=((1, 2),), chat=True, tool_names=("f",), tool_types=({"days": "integer", "city": "string"},), grammar_param="tools",
                   grammar=grammar, max_tokens=600, sampling=SamplingParams(temperature=1.0, seed=1))

    disturbed, undisturbed = [await told(pool, name, request) for name in ("kill-arguments", "undisturbed")]
    assert (tmp_path / "kill-arguments").exists() and whole(disturbed) == whole(undisturbed)
    *pieces, _ = disturbed
    calls = calls_of(pieces)
    assert [call.name for call in calls if call.name] == ["f"] * 3 and len(calls) > 40
    arguments = [json.loads(text) for text in "".join(("|" * bool(call.name)) + call.text for call in calls)[1:].split("|")]
    assert all(20 <= len(each["city"]) <= 30 and 100 <= each["days"] <= 999 for each in arguments) and not any(piece.text for piece in pieces)
    await idle(pool)


async def test_one_worker_s_streams_wait_for_its_restart(start_pool):
    """They go on then."""
    pool = await start_pool(max_batch=2)
    names = ["kill-prefill", "kill-decode", "bystander 1", "bystander 2"]       # two in the batch, two in the queue
    got = await asyncio.gather(*(answers(pool, asked(name, **LONG_PROMPT)) for name in names))
    assert got == [await answers(pool, asked("undisturbed", **LONG_PROMPT))] * 4
    assert pool.workers[0].restarts == 2
    await idle(pool)


async def test_an_eviction_and_a_kill_cost_no_word(start_pool, tmp_path):
    """An answer is set aside for its pages, and its worker is killed then."""
    pool = await start_pool(kv_cache_memory=37 * 16_384, max_batch=4)       # for some 150 tokens of each, and they share none
    works = [LONG_PROMPT | {"max_tokens": 90, "prompts": (tuple(range(100 + i, 220 + i)),)} for i in range(4)]
    worker = pool.workers[0]
    # until it has all four; the last is then set aside after some 45 tokens
    worker.process.send_signal(signal.SIGSTOP)
    running = asyncio.gather(*(answers(pool, asked(name, **work)) for name, work in zip(("a", "b", "c", "kill-aside"), works)))
    while len(worker.jobs) < 4:
        await asyncio.sleep(0.01)
    worker.process.send_signal(signal.SIGCONT)
    together = await running
    assert (tmp_path / "kill-aside").exists() and worker.restarts == 1        # it was set aside; the next worker may set none aside
    assert together == [await answers(pool, asked("undisturbed", **work)) for work in works]
    await idle(pool)


async def test_a_stream_outlasts_a_worker_and_a_connection(start_pool):
    """A stream goes on across a dead worker and a lost connection."""
    pool = await start_pool()
    body = conversation("Why? " * 20) | {"temperature": 1, "seed": 5, "max_tokens": 60, "ignore_eos": True, "stream": True, "resumable": True}
    async with serving(pool) as url, aiohttp.ClientSession() as client:
        undisturbed = await (await client.post(url + "/chat/completions", json=body)).read()
        response = await client.post(url + "/chat/completions", json=body, headers={"X-Request-Id": "kill-decode-http"})
        seen = b"".join([await response.content.readuntil(b"\n\n") for _ in range(2)])
        response.close()
        while not pool.workers[0].crashes_in_row:           # reconnect while no worker computes
            await asyncio.sleep(0.02)
        async with client.get(url + "/v1/streams/kill-decode-http", headers={"Last-Event-ID": "1"}) as again:
            rest = await again.read()
        whole = await client.post(url + "/v1/chat/completions", json=body | {"stream": False}, headers={"X-Request-Id": "kill-queued-http"})
        assert (await whole.json())["choices"][0]["message"]["content"] == text_of(undisturbed)
    numbers = [int(number) for number in re.findall(rb"id: (\d+)", seen + rest)]
    assert numbers == [*range(len(numbers))] and len(numbers) > 5
    assert text_of(seen + rest) == text_of(undisturbed) and pool.workers[0].restarts == 2


def text_of(stream):
    return "".join(event.get("token", "") for event in frames(re.sub(rb"id: \d+\n", b"", stream)))


async def stopped_worker(pool):
    """The worker whose process is stopped, as soon as there is one."""
    while True:
        for worker in pool.workers:
            with contextlib.suppress(psutil.NoSuchProcess):     # a thread may have seen its end before poll()
                if worker.process and worker.process.poll() is None and \
                        psutil.Process(worker.process.pid).status() == psutil.STATUS_STOPPED:
                    return worker
        await asyncio.sleep(0.02)


async def out_of_time(worker):
    """Let the time of a stopped worker run out: again, if what it said before its stop is read only now."""
    process = worker.process
    while worker.process is process:
        if worker.awaited_s is not None:
            worker.awaited_s -= max(patient(worker.HANG_S), 20 * worker.slowest_step_s)
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("workers", by_day([1, 2], 1))
async def test_a_worker_that_hangs_in_an_answer_is_replaced(start_pool, workers):
    pool = await start_pool(num_workers=workers)
    disturbed = asyncio.ensure_future(answers(pool, asked("hang-decode", **LONG_PROMPT)))
    worker = await stopped_worker(pool)
    assert worker.jobs and not worker.hung
    await out_of_time(worker)
    assert await disturbed == await answers(pool, asked("undisturbed", **LONG_PROMPT))
    await idle(pool)
    assert [each.restarts for each in pool.workers] == [int(each is worker) for each in pool.workers]


@pytest.mark.slow
async def test_an_idle_hanging_worker_is_replaced(start_pool):
    """That happens before anybody asks."""
    pool = await start_pool(worker_command=(sys.executable, "-B", *PROCESS_COMMAND[1:]))        # not a forked one
    (worker,) = pool.workers
    worker.process.send_signal(signal.SIGSTOP)
    assert await stopped_worker(pool) is worker
    while worker.awaited_s is None:                 # until the next ping
        await asyncio.sleep(0.02)
    worker.awaited_s -= patient(worker.HANG_S)
    while worker.restarts == 0 or worker.state != "ready":
        await asyncio.sleep(0.02)
    assert (await collect(pool, greedy("after")))[2].usage.completion_tokens == 40


async def test_an_idle_worker_with_pings_lives_on(start_pool):
    """An idle worker that answers pings lives on."""
    pool = await start_pool()
    (worker,) = pool.workers
    while worker.awaited_s is not None:             # an answer to an earlier ping may be on its way
        await asyncio.sleep(0.01)
    worker.check_health()
    worker.awaited_s -= 1000
    assert worker.hung                              # until it answers
    while worker.awaited_s is not None:
        await asyncio.sleep(0.01)
    assert not worker.hung and worker.restarts == 0


async def test_a_worker_hanging_in_its_load_is_replaced(start_pool, tmp_path, caplog):
    """It is the first load."""
    (tmp_path / "hang-load").touch()
    pool = await start_pool(wait=False)
    worker = await stopped_worker(pool)
    worker.check_health()
    assert (pool.health()[0], worker.state) == (503, "loading") and not caplog.text        # it may take long
    worker.awaited_s -= patient(worker.LOAD_HANG_S)
    await pool.wait_ready()
    assert pool.stats()["workers"][0]["restarts"] == 1 and "worker 0 has made no progress while loading" in caplog.text
    await idle(pool)


@pytest.mark.slow
async def test_a_worker_hanging_in_a_load_holds_nobody_up(start_pool, tmp_path):
    """An answer goes on while a worker loads again."""
    pool = await start_pool()
    (worker,) = pool.workers
    undisturbed = await answers(pool, asked("undisturbed", **LONG_PROMPT))
    (tmp_path / "hang-load").touch()
    disturbed = asyncio.ensure_future(answers(pool, asked("kill-decode", **LONG_PROMPT)))
    assert await stopped_worker(pool) is worker and worker.state == "loading"
    worker.awaited_s -= patient(worker.LOAD_HANG_S)
    while worker.crashes_in_row < 2:
        await asyncio.sleep(0.02)
    assert pool.health() == (503, {"status": "unavailable", "ready": False, "num_gpus": 1, "available_workers": 0,
                                   "crash_loops": [{"gpu_id": 0, "crashes_in_row": 2}]})
    assert await disturbed == undisturbed
    assert pool.stats()["workers"][0]["restarts"] == 2
    await idle(pool)


def test_each_load_report_renews_its_time():
    """Each report of a load gives it the whole time again."""
    pool = make_pool(Settings())
    (worker,) = pool.workers
    worker.awaited_s = time.monotonic() - patient(worker.LOAD_HANG_S) - 1
    assert worker.state == "loading" and worker.hung
    worker.hear(Loading("weights", 0.5), pool.supervisor.handle)
    assert not worker.hung


async def test_only_the_request_that_kills_is_given_up(start_pool):
    """Those beside it are not."""
    pool = await start_pool()
    undisturbed = await collect(pool, greedy("undisturbed", max_tokens=30))
    names = ["a", "b", "poison", "c"]
    got = await asyncio.gather(*(collect(pool, greedy(name, max_tokens=30)) for name in names), return_exceptions=True)
    poisoned = got.pop(2)
    assert isinstance(poisoned, EngineFailure) and "3 workers died" in str(poisoned)
    assert [answer[:2] for answer in got] == [undisturbed[:2]] * 3
    await idle(pool)


@pytest.mark.slow
async def test_an_answer_survives_many_deaths(start_pool):
    """They are more than a request may cause."""
    pool = await start_pool(num_workers=2)
    pool.dispatcher.MAX_FAILOVERS, deaths = 2, []
    undisturbed = await collect(pool, greedy("undisturbed", max_tokens=200))

    def kill(piece, count):     # the worker that sent a piece, unless it is dead already
        worker = pool.workers[piece.gpu]
        if len(deaths) < 3 and worker.state == "ready" and worker.process.pid not in deaths:
            deaths.append(worker.process.pid)
            worker.process.kill()

    assert (await collect(pool, greedy("b", max_tokens=200), on_piece=kill))[:2] == undisturbed[:2]
    assert len(deaths) == 3
    await idle(pool)


async def test_a_death_says_that_the_program_has_changed(start_pool, caplog, monkeypatch):
    """Its successor is of another version, which may send messages that the front does not know; that is a death too."""
    pool = await start_pool()
    (worker,) = pool.workers
    changed = "the program has changed since this server started: restart the server"
    patch(monkeypatch, program, "program_stamp", lambda: (0, 0))

    def hear(message, handle):
        del worker.hear
        raise BadMessage("unknown message 99")
    worker.hear = hear
    while worker.restarts != 1 or worker.state != "ready":
        await asyncio.sleep(0.02)
    assert changed in caplog.text and "worker 0 (cpu): unknown message 99" in caplog.text and worker.crashes_in_row == 1


async def test_a_crash_loop_backs_off(start_pool, caplog):
    """It shows until an answer is finished."""
    pool = await start_pool()
    (worker,) = pool.workers
    for crash in (1, 2):
        worker.process.kill()
        while worker.crashes_in_row != crash or worker.state != "ready":
            await asyncio.sleep(0.02)
        status, body = pool.health()
        loops = [{"gpu_id": 0, "crashes_in_row": crash}] if crash > 1 else None
        assert (status, body["status"], body.get("crash_loops")) == (200, "degraded" if crash > 1 else "ok", loops)
    assert "has changed" not in caplog.text
    assert [record.getMessage().split()[-2] for record in caplog.records if "restarting it" in record.message] == ["0.5", "1.0"]
    await collect(pool, greedy("a", max_tokens=3))
    assert pool.health()[1]["status"] == "ok" and pool.stats()["workers"][0]["crashes_in_row"] == 0


async def test_a_worker_that_can_start_is_not_waited_for(start_pool):
    """It has died often, though never while it loaded."""
    pool = await start_pool()
    (worker,) = pool.workers
    worker.crashes_in_row = 20
    worker.process.kill()
    async with asyncio.timeout(20):     # it would rest for 30 seconds
        while worker.state == "ready":
            await asyncio.sleep(0.01)
        await collect(pool, greedy("a", max_tokens=3))


async def test_an_answer_whose_text_fails_fails_alone(start_pool):
    pool = await start_pool()
    undisturbed = await collect(pool, greedy("undisturbed", max_tokens=100))
    names = ["a", "untranslatable", "b"]
    got = await asyncio.gather(*(collect(pool, greedy(name, max_tokens=100)) for name in names), return_exceptions=True)
    failed = got.pop(1)
    assert isinstance(failed, EngineFailure) and "failed while computing this answer (RuntimeError)" in str(failed)
    assert [each[:2] for each in got] == [undisturbed[:2]] * 2 and pool.workers[0].restarts == 0
    await idle(pool)


async def test_a_failed_step_fails_only_its_cause(start_pool, monkeypatch):
    """A step that fails fails only the request that is its cause."""
    pool = await start_pool()
    patch(monkeypatch, prompts, "checked_ids", lambda ids, *request: tuple(ids))
    undisturbed = await collect(pool, greedy("undisturbed", max_tokens=100))
    pid = pool.workers[0].process.pid
    bad = asked("bad", prompts=((10**9,),), max_tokens=5)         # a token id that the model does not have
    running = [asyncio.ensure_future(collect(pool, greedy(name, max_tokens=100))) for name in "abc"]
    with pytest.raises(EngineFailure, match="failed while computing"):
        await collect(pool, bad)
    assert [(await each)[:2] for each in running] == [undisturbed[:2]] * 3
    assert pool.workers[0].process.pid == pid
    await idle(pool)


async def stopped_in_an_answer(pool):
    """An answer under way whose worker is stopped: otherwise it could finish before a busy machine kills it."""
    stream = pool.answer(greedy("hang-decode", max_tokens=60))
    await anext(stream), await anext(stream)
    await stopped_worker(pool)
    return stream


async def test_requests_without_a_worker_get_an_error(start_pool, tmp_path):
    """It hangs in its load, and nothing is known of why."""
    pool = await start_pool()
    pool.supervisor.CRASHING_S = pool.supervisor.ORPHAN_S = pool.supervisor.load_s = 0.0
    stream = await stopped_in_an_answer(pool)
    (tmp_path / "hang-load").touch()
    pool.workers[0].process.kill()
    with pytest.raises(EngineFailure, match="no worker came back within 0 s; the last one ended: killed by SIGKILL"):
        async for event in stream:
            assert isinstance(event, Piece)
    assert not pool.dispatcher.jobs and pool.health()[1]["status"] == "unavailable"


@pytest.mark.parametrize("cause", ["it dies", "it says why"])
async def test_without_any_worker_requests_get_the_reason(start_pool, caplog, cause):
    """They are served once one can start."""
    pool = await start_pool()
    (worker,), placement = pool.workers, pool.placement
    undisturbed = await collect(pool, greedy("undisturbed"))
    command, settings = placement.command, placement.settings
    stream = await stopped_in_an_answer(pool)
    if cause == "it dies":
        placement.command, reason = (sys.executable, "-c", "raise SystemExit(3)"), "exit status 3"
    else:
        placement.settings, reason = replace(settings, kv_cache_memory=1), "1 bytes for the KV cache hold 0 pages of 16 tokens"
    worker.process.kill()
    with pytest.raises(EngineFailure, match=f"the model cannot be loaded again: {reason}"):
        async for event in stream:
            assert isinstance(event, Piece)
    assert worker.failed_starts == (2 if cause == "it dies" else 1) and not pool.dispatcher.jobs
    with pytest.raises(Overloaded, match=f"the model cannot be loaded again: {reason}"):
        await collect(pool, greedy("at once"))
    assert reason in pool.stats()["workers"][0]["problem"]
    ends = [record.getMessage() for record in caplog.records if "restarting it" in record.getMessage()]
    assert "killed by SIGKILL" in ends[0] and all(f"worker 0 (cpu) died ({reason}" in end for end in ends[1:])
    placement.command, placement.settings = command, settings
    while worker.state != "ready":
        await asyncio.sleep(0.02)
    assert (await collect(pool, greedy("after")))[:2] == undisturbed[:2] and pool.stats()["workers"][0]["problem"] == ""
    await idle(pool)


async def test_a_hang_is_not_taken_for_lack_of_memory(start_pool, tmp_path, caplog):
    """The worker is killed since it hangs."""
    pool = await start_pool()
    (worker,) = pool.workers
    stream = await stopped_in_an_answer(pool)
    await out_of_time(worker)
    async for _ in stream:
        pass
    [end] = [record.getMessage() for record in caplog.records if "restarting it" in record.getMessage()]
    assert "died (it made no progress while answering, and was killed for that)" in end and "memory" not in end
