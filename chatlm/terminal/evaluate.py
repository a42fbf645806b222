"""The command `eval`: models on tasks, with a table, progress, and answers that are kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence as Seq
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import aiohttp

from chatlm.common.config import LIMITS, ModelEntry
from chatlm.common.errors import ConfigError, EngineFailure, error_text, shown, visible
from chatlm.common.hub.find import resolve_model
from chatlm.common.jsontext import is_number, is_text
from chatlm.common.log import ProgressDisplay
from chatlm.common.messages.requests import SAMPLING_DEFAULTS, SamplingParams, TokenLogprob
from chatlm.front.evals.bpb import BpbResult, Texts, read_texts, run_bpb
from chatlm.front.evals.bundle import Suite, read_suite
from chatlm.front.evals.chat import chat_suite
from chatlm.front.evals.items import NEAR_TIE
from chatlm.front.evals.answers_file import AnswersFile, answers_file_name, results_folder
from chatlm.front.evals.published import NAME as HUMANEVAL, published_suite
from chatlm.front.evals.run import TaskResult, as_json, mean_of, run_task
from chatlm.front.evals.samples import FREE_SAMPLES, FREE_TOKENS, PROMPTS, SAMPLE_TOKENS
from chatlm.front.evals.scores import FREE, GREEDY, NO_CHAT, PoolScorer, cut_as_upstream
from chatlm.terminal.chat import duration
from chatlm.terminal.programs import Programs
from chatlm.terminal.remote import RemotePool, identified, open_pool
from chatlm.terminal.remote_streams import refusal, strict_object, whole_body

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.front.evals.scores import Scorer
    from chatlm.terminal.remote import Pool


class RemoteScorer:
    """A model of the server at --url, with the interface of `PoolScorer`. EngineFailure for a server that
    does not answer as ours does."""

    def __init__(self, pool: RemotePool):
        self.pool = pool
        self.begin = list[int]()
        self.digest, self.arithmetic = (str(pool.model.get(name) or "") for name in (
            "weights_digest", "arithmetic"))
        self.room = whole_number(pool.context_length)
        self.longest = whole_number(pool.model.get("scored_length")) or self.room
        # an answer comes whole, perhaps after others
        self.patient = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=600)

    async def open(self):
        """Ask for the token that begins a text. ConfigError if this server cannot score tokens."""
        info = await self.pool.get(f"tokenizer_info?model={quote(self.pool.model_name)}")
        if not self.digest or not self.room or "bos_token" not in info:
            raise ConfigError(f"eval --url {self.pool.url}: only a chat_server of this version or a later "
                              "one can be evaluated")
        if name := info["bos_token"] or info.get("eos_token"):
            async with self._post("tokenize", {"prompt": name, "add_special_tokens": False}) as body:
                self.begin = token_ids(body["tokens"])
                if len(self.begin) != 1:
                    raise ValueError(f"{shown(name)} is not one token")

    @asynccontextmanager
    async def _post(self, path: str, body: dict) -> AsyncIterator[dict]:
        """The body of a route's response. What is missing there, or of another type, is the server's
        fault."""
        body = {"model": self.pool.model_name, **body}
        async with await self.pool.ask("POST", path, json=body, timeout=self.patient) as response:
            if response.status != 200:
                raise await refusal(response)
            text = await whole_body(self.pool.url, response)
        try:
            found = strict_object(text)
            if found is None:
                raise ValueError(f"no JSON object but {shown(text[:50].decode('utf-8', 'replace'))}")
            yield found
        except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise EngineFailure(f"{self.pool.url} does not answer like a chat_server: {path}: "
                                f"{error_text(error)}") from None

    async def encode(self, texts: Seq[str]) -> list[list[int]]:
        found = list[list[int]]()
        if not self.begin:
            for text in texts:
                async with self._post("tokenize", {"content": text, "parse_special": False}) as body:
                    found.append(token_ids(body["tokens"]))
            return found
        begin, = self.begin
        for together in in_requests(texts):  # no text becomes this token, so it keeps them apart
            parts = []
            for text in together:
                parts += [begin, text]
            async with self._post("tokenize", {"content": parts, "parse_special": False}) as body:
                found += split_before(begin, token_ids(body["tokens"]), len(together))
        return found

    async def score(self, prompts: Seq[Seq[int]], starts: Seq[int], top: int) -> list[list[TokenLogprob]]:
        async with self._post("v1/completions", {
                "prompt": [list(ids) for ids in prompts], "prompt_logprobs": top,
                "prompt_logprobs_start": list(starts), "max_tokens": 0, "temperature": 0}) as body:
            return [
                [read_entry(token, entry, top) for token, entry in zip(
                    ids[start:], choice["prompt_logprobs"][start:], strict=True)]
                for ids, start, choice in zip(prompts, starts, body["choices"], strict=True)]

    @asynccontextmanager
    async def _complete(self, prompt: str | Seq[int], max_tokens: int, sampling: SamplingParams = GREEDY,
                        n: int = 1, **more) -> AsyncIterator[list[dict]]:
        """The choices of a completion."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "n": n, **drawing(sampling), **more}
        async with self._post("v1/completions", body) as found:
            choices = found["choices"]
            if len(choices) != n:
                raise ValueError(f"{len(choices)} choices, not {n}")
            yield choices

    async def complete(self, prompt: str, max_tokens: int) -> str:
        async with self._complete(prompt, max_tokens) as choices:
            return a_text(choices[0]["text"])

    async def samples(self, count: int, max_tokens: int) -> list[str]:
        if not self.begin:
            return []
        async with self._complete(self.begin, max_tokens, FREE, n=count) as choices:
            return [a_text(choice["text"]) for choice in choices]

    async def chat(self, text: str) -> list[int]:
        if not self.pool.chats:
            raise ConfigError(NO_CHAT)
        async with self._post("tokenize", {"messages": [{"role": "user", "content": text}]}) as body:
            ids = token_ids(body["tokens"])
            return cut_as_upstream(ids) if self.pool.model.get("family") == "nanochat" else ids

    async def likelihoods(self, prompt: Seq[int], ids: Seq[int]) -> list[float]:
        async with self._complete(prompt, 1, logprobs=1, logprob_token_ids=ids, ignore_eos=True,
                                  return_token_ids=True) as choices:
            listed = choices[0]["logprobs"]["content"][0]["top_logprobs"]
            found = {one["id"]: a_number(one["logprob"]) for one in listed}
            return [found[token] for token in ids]

    async def answer(self, prompt: Seq[int], max_tokens: int) -> str:
        async with self._complete(prompt, max_tokens, return_token_ids=True) as choices:
            ids = token_ids(choices[0]["token_ids"])
            if ids and choices[0]["stop_reason"] == "eos":
                ids = ids[:-1]
        async with self._post("detokenize", {"tokens": ids}) as body:
            return a_text(body["content"])

    async def sizes(self, ids: Seq[int]) -> list[int]:
        async with self._post("tokenize", {"content": list(ids), "with_pieces": True}) as body:
            sizes = [size_of(token) for token in body["tokens"]]
            if len(sizes) != len(ids):
                raise ValueError(f"{len(sizes)} tokens, not {len(ids)}")
            return sizes


def drawing(sampling: SamplingParams) -> dict[str, float]:
    """The fields of a body whose answer is drawn so, whatever the served model's files and the server's flags
    say."""
    return {name: getattr(sampling, name) for name in ("seed", *SAMPLING_DEFAULTS)}


def whole_number(value) -> int:
    """A number of a server's that counts something; 0 for anything else."""
    return value if type(value) is int and value > 0 else 0


def a_number(value) -> float:
    if not is_number(value):
        raise ValueError(f"{shown(value)} is not a number")
    return float(value)


def a_text(value) -> str:
    if not is_text(value):
        raise ValueError(f"{shown(value)} is not a text")
    return value


def token_ids(value) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        raise ValueError(f"{shown(value)} is not a list of tokens")
    return value


def size_of(token: Mapping) -> int:
    """The bytes of a token as /tokenize describes it; 0 for a special one."""
    if token.get("special"):
        return 0
    piece = token["piece"]
    return len(piece.encode() if is_text(piece) else bytes(piece))


def split_before(begin: int, tokens: Seq[int], count: int) -> list[list[int]]:
    """The texts that tokens consist of, each from a `begin` on."""
    found = list[list[int]]()
    for token in tokens:
        if token == begin:
            found.append([])
        found[-1].append(token)
    if len(found) != count:
        raise ValueError(f"{len(found)} texts, not {count}")
    return found


def in_requests(texts: Seq[str]) -> Iterator[list[str]]:
    """Texts that fit one body of /tokenize."""
    together = list[str]()
    size = 0
    for text in texts:
        if together and size + len(text) > LIMITS.tokenized_characters // 2:
            yield together
            together = []
            size = 0
        together.append(text)
        size += len(text)
    yield together


def read_entry(token: int, entry: dict | None, top: int) -> TokenLogprob:
    """An entry of prompt_logprobs, which lists the `top` likeliest tokens at least; None for a first
    token."""
    if entry is None:
        return TokenLogprob(token, None)
    listed = [(whole_number(one["rank"]), int(id_), a_number(one["logprob"])) for id_, one in entry.items()]
    own = next((one for one in listed if one[1] == token), None)
    if own is None or len(listed) < top:
        raise ValueError(f"prompt_logprobs lists {len(listed)} tokens, of which {token} must be one")
    likely = tuple([(id_, logprob) for _, id_, logprob in sorted(listed, key=lambda one: one[0])])
    return TokenLogprob(token, own[2], likely, own[0])


@asynccontextmanager
async def open_scorer(settings: Settings) -> AsyncIterator[tuple[Scorer, Pool]]:
    async with open_pool(settings) as pool:
        if isinstance(pool, RemotePool):
            remote = RemoteScorer(pool)
            await remote.open()
            yield remote, pool
        else:
            yield PoolScorer(pool), pool


async def evaluate(settings: Settings) -> int:
    """The `eval` command: a table, or with --json a line, for each model."""
    if settings.suite is None:
        raise ConfigError("eval needs --suite core, chat, humaneval, bpb, sample, a folder, or a .jsonl file")
    for name, suites in (("text", ("bpb",)), ("confirm_run_unsafe_code", ("chat", HUMANEVAL))):
        if getattr(settings, name) and settings.suite not in suites:
            raise ConfigError(f"--{name.replace('_', '-')} is for --suite {' and '.join(suites)}")
    entries = settings.several or (ModelEntry(""),)
    wanted = wanted_of(settings, settings.suite, entries)
    folder = results_folder(settings.results) if wanted[0] else None
    for entry, what in zip(entries, wanted):
        one_model = replace(settings, model=entry.path or None, several=())
        async with open_scorer(one_model) as (scorer, pool):
            name = entry.path or pool.model_name
            if what is None or folder is None:
                await show_samples(scorer, name, pool.checkpoint, settings.json)
                continue
            file_name = answers_file_name(one_model, scorer, name, what, settings.max_per_task)
            kept = AnswersFile(folder, file_name)
            progress = ProgressDisplay()
            try:
                if isinstance(what, Suite):
                    runs = Programs()
                    found = [await run_task(scorer, task, settings.max_per_task, kept, progress, runs=runs)
                             for task in what.tasks]
                else:
                    found = await run_bpb(scorer, what, settings.max_per_task, kept, progress)
            finally:
                progress.close()
                kept.close()
        show(name, pool.checkpoint, what, found, settings)
    return 0


def wanted_of(settings: Settings, suite: str, entries: Seq[ModelEntry]) -> Seq[Suite | Texts | None]:
    """What each entry is evaluated on: tasks, or texts for bits per byte, which a checkpoint may have of its
    own; None for samples."""
    if suite == "bpb":
        return [read_texts(settings.text, checkpoint_of(settings, entry)) for entry in entries]
    if suite == "chat":
        tasks = chat_suite(settings.confirm_run_unsafe_code)
    elif suite == HUMANEVAL:
        tasks = published_suite(settings.confirm_run_unsafe_code)
    else:
        tasks = None if suite == "sample" else read_suite(suite)
    return [tasks] * len(entries)


def checkpoint_of(settings: Settings, entry: ModelEntry) -> Path | None:
    """The file of nanochat's that an entry names; None if it names another model, or one that is not here."""
    if not entry.path or not Path(entry.path).expanduser().exists():
        return None
    source = resolve_model(replace(settings, model=entry.path, several=()))
    return source.path if source.kind == "nanochat" else None


def show(name: str, checkpoint: Mapping[str, str | int], what: Suite | Texts,
         found: list[TaskResult] | BpbResult, settings: Settings):
    """Print a model's result: a line of JSON, or a table."""
    title = identified(name, checkpoint)
    if isinstance(found, BpbResult):
        result = f"{found.bits_per_byte:.6f} bits per byte ({found.texts.metric}): {found.bytes:,} bytes, "
        result += f"{found.rows:,} row(s) of {found.targets:,} tokens, {duration(found.seconds)}"
        body = found.as_json()
        lines = [f"== {title}: {found.texts.name}", result]
    else:
        assert isinstance(what, Suite)
        body = as_json(what, found)
        lines = table(title, what, found)
        if what.left_out:
            body["left_out"] = what.left_out
    if settings.json:
        suite = what.name if isinstance(what, Suite) else "bpb"
        print(json.dumps({"model": name, **checkpoint, "suite": suite,
                          "max_per_task": settings.max_per_task, **body}), flush=True)
    else:
        print("\n".join(visible(line).replace("\n", " ") for line in lines), flush=True)


def table(name: str, suite: Suite, results: Seq[TaskResult]) -> list[str]:
    width = max(len("ChatCORE"), *(len(result.task.label) for result in results))
    rows = [("task", "shots", "items", "accuracy", "std. error", "centered", "time")]
    rows += [(one.task.label, f"{one.task.shots}", f"{one.items:,}", f"{one.accuracy:.4f}",
              f"{one.standard_error:.4f}", f"{one.centered:.4f}", duration(one.seconds)) for one in results]
    if suite.mean:
        mean, error = mean_of([*results])
        items = sum(one.items for one in results)
        rows.append((suite.mean, "", f"{items:,}", "", f"{error:.4f}", f"{mean:.4f}",
                     duration(sum(one.seconds for one in results))))
    lines = [f"== {name}: {suite.name}"]
    lines += [f"{first:{width}} {shots:>6} {items:>7} {accuracy:>9} {error:>11} {centered:>9} {time:>9}"
              for first, shots, items, accuracy, error, centered, time in rows]
    if near := sum(result.near for result in results):
        lines.append(f"{near:,} item(s) were decided by at most {NEAR_TIE:g} nats: other arithmetic may "
                     "decide otherwise")
    if cut := sum(result.cut for result in results):
        lines.append(f"{cut:,} item(s) did not fit the context and lost their beginning")
    return lines + [f"not run: {reason}" for reason in suite.left_out]


async def show_samples(scorer: Scorer, name: str, checkpoint: Mapping[str, str | int], as_lines: bool):
    """How the model continues the seven prompts, and what it writes without one."""
    answers = await asyncio.gather(*(scorer.complete(prompt, SAMPLE_TOKENS) for prompt in PROMPTS))
    free = await scorer.samples(FREE_SAMPLES, FREE_TOKENS)
    if as_lines:
        print(json.dumps({"model": name, **checkpoint, "suite": "sample", "samples": [
            {"prompt": prompt, "text": text} for prompt, text in zip(PROMPTS, answers)],
            "free_samples": free}), flush=True)
        return
    print(f"== {visible(identified(name, checkpoint))}: sample", flush=True)
    for prompt, text in zip(PROMPTS, answers):
        print(f"{prompt} ->{visible(text)}", flush=True)
    for number, text in enumerate(free, 1):
        print(f"without a prompt, {number}: {visible(text)}", flush=True)
