"""The command `eval`: models on tasks, with a table, progress, and answers that are kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence as Seq
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import quote

from chatlm.common.config import ModelChoice
from chatlm.common.errors import ConfigError, visible
from chatlm.common.log import ProgressDisplay
from chatlm.common.messages.requests import TokenLogprob
from chatlm.front.evals.bundle import Suite, read_suite
from chatlm.front.evals.items import NEAR_TIE
from chatlm.front.evals.kept import Kept, kept_name, results_folder
from chatlm.front.evals.run import TaskResult, as_json, core_of, run_task
from chatlm.front.evals.samples import PROMPTS, SAMPLE_TOKENS
from chatlm.front.evals.scores import PoolScorer
from chatlm.terminal.chat import duration
from chatlm.terminal.remote import RemotePool, open_pool
from chatlm.terminal.streams import refusal

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.front.evals.scores import Scorer
    from chatlm.terminal.remote import Pool


class RemoteScorer:
    """A model of the server at --url, with the interface of `PoolScorer`."""

    def __init__(self, pool: RemotePool):
        self.pool, self.begin = pool, list[int]()
        self.digest, self.arithmetic = (str(pool.model.get(name) or "") for name in (
            "weights_digest", "arithmetic"))
        self.longest = pool.context_length or 0

    async def open(self):
        """Ask for the token that begins a text. ConfigError if this server cannot score tokens."""
        info = await self.pool.get(f"tokenizer_info?model={quote(self.pool.model_name)}")
        if not self.digest or "bos_token" not in info:
            raise ConfigError(f"eval --url {self.pool.url}: only a chat_server of this version or a later "
                              "one can be evaluated")
        if name := info["bos_token"] or info["eos_token"]:
            body = await self._post("tokenize", {"prompt": name, "add_special_tokens": False})
            self.begin = body["tokens"]

    async def _post(self, path: str, body: dict) -> dict:
        body = {"model": self.pool.model_name, **body}
        async with await self.pool.ask("POST", path, json=body) as response:
            if response.status != 200:
                raise await refusal(response)
            return await response.json()

    async def encode(self, texts: Seq[str]) -> list[list[int]]:
        bodies = [await self._post("tokenize", {"content": text, "parse_special": False}) for text in texts]
        return [self.begin + body["tokens"] for body in bodies]

    async def score(self, prompts: Seq[Seq[int]], starts: Seq[int], top: int) -> list[list[TokenLogprob]]:
        body = await self._post("v1/completions", {
            "prompt": [list(ids) for ids in prompts], "prompt_logprobs": top,
            "prompt_logprobs_start": list(starts), "max_tokens": 0, "temperature": 0})
        return [[*map(read_entry, ids[start:], choice["prompt_logprobs"][start:])]
                for ids, start, choice in zip(prompts, starts, body["choices"], strict=True)]

    async def complete(self, prompt: str, max_tokens: int) -> str:
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        return (await self._post("v1/completions", body))["choices"][0]["text"]


def read_entry(token: int, entry: dict) -> TokenLogprob:
    """An entry of prompt_logprobs."""
    own, likely = entry[str(token)], sorted(entry.items(), key=lambda one: one[1]["rank"])
    return TokenLogprob(token, own["logprob"], tuple((int(id_), one["logprob"]) for id_, one in likely),
                        own["rank"])


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
        raise ConfigError("eval needs --suite core, sample, a folder, or a .jsonl file")
    suite = None if settings.suite == "sample" else read_suite(settings.suite)
    folder = results_folder(settings.results) if suite else None
    for choice in settings.several or (ModelChoice(""),):
        one_model = replace(settings, model=choice.path or None, several=())
        async with open_scorer(one_model) as (scorer, pool):
            name = choice.path or pool.model_name
            if suite is None or folder is None:
                await show_samples(scorer, name, settings.json)
                continue
            kept = Kept(folder, kept_name(one_model, scorer, name, suite, settings.max_per_task))
            progress = ProgressDisplay()
            try:
                results = [await run_task(scorer, task, settings.max_per_task, kept, progress)
                           for task in suite.tasks]
            finally:
                progress.close()
                kept.close()
        if settings.json:
            print(json.dumps({"model": name, "suite": suite.name, "max_per_task": settings.max_per_task,
                              **as_json(suite, results)}), flush=True)
        else:
            print("\n".join(map(visible, table(name, suite, results))), flush=True)
    return 0


def table(name: str, suite: Suite, results: Seq[TaskResult]) -> list[str]:
    width = max(len("CORE"), *(len(result.task.label) for result in results))
    rows = [("task", "shots", "items", "accuracy", "std. error", "centered", "time")]
    rows += [(one.task.label, f"{one.task.shots}", f"{one.items:,}", f"{one.accuracy:.4f}",
              f"{one.standard_error:.4f}", f"{one.centered:.4f}", duration(one.seconds)) for one in results]
    if suite.is_core:
        core, error = core_of([*results])
        rows.append(("CORE", "", f"{sum(one.items for one in results):,}", "", f"{error:.4f}", f"{core:.4f}",
                     duration(sum(one.seconds for one in results))))
    lines = [f"== {name}: {suite.name}"]
    lines += [f"{first:{width}} {shots:>6} {items:>7} {accuracy:>9} {error:>11} {centered:>9} {time:>9}"
              for first, shots, items, accuracy, error, centered, time in rows]
    if near := sum(result.near for result in results):
        lines.append(f"{near:,} item(s) were decided by at most {NEAR_TIE:g} nats: other arithmetic may "
                     "decide otherwise")
    if cut := sum(result.cut for result in results):
        lines.append(f"{cut:,} item(s) did not fit the context and lost their beginning")
    return lines


async def show_samples(scorer: Scorer, name: str, as_lines: bool):
    """How the model continues the seven prompts."""
    answers = await asyncio.gather(*(scorer.complete(prompt, SAMPLE_TOKENS) for prompt in PROMPTS))
    if as_lines:
        print(json.dumps({"model": name, "suite": "sample", "samples": [
            {"prompt": prompt, "text": text} for prompt, text in zip(PROMPTS, answers)]}), flush=True)
        return
    print(f"== {visible(name)}: sample", flush=True)
    for prompt, text in zip(PROMPTS, answers):
        print(f"{prompt} ->{visible(text)}", flush=True)
