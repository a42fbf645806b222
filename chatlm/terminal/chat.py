"""The commands `chat` and `generate`: what the user types, and how it is handled."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Mapping, Sequence as Seq
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TYPE_CHECKING

from chatlm.common.config import DEFAULT_MAX_TOKENS, with_own_sampling
from chatlm.common.core import decode_core, kernels_line
from chatlm.common.errors import ChatServerError, ConfigError, did_you_mean, shown
from chatlm.common.invocation import program_command
from chatlm.common.jsontext import as_json, whole_unicode
from chatlm.common.messages.requests import (
    SAMPLING_DEFAULTS, AnswerParams, Finished, Message, Piece, PromptProgress, Request)
from chatlm.common.standard_streams import lack_of_space
from chatlm.common.text.calculations import calculations_of, shift_calls, without_unfinished
from chatlm.front.aio import interruptible
from chatlm.front.api.answer_state import AnswerState, ChoiceState
from chatlm.front.api.encode import calculator_member, timings_body
from chatlm.front.api.readers import sampling_params, with_thinking_budget
from chatlm.front.pool.pool import default_sampling
from chatlm.front.server.watching import watched
from chatlm.front.tools.rules import CANCELLED, CUT_OFF, DENIED
from chatlm.terminal.attached import (
    decoded, document_text, is_document, is_picture, picture_file, read_user_file)
from chatlm.terminal.calculator import as_code, marked
from chatlm.terminal.conversation import PARAMETERS, SETTABLE, Conversation, calls_in, read_chats
from chatlm.terminal.knowing import Knowing, passages_line
from chatlm.terminal.remote import RemotePool, open_pool
from chatlm.terminal.terminal import PlainWriter, Terminal, state_file
from chatlm.terminal.tools import ToolUse, open_tools, shown_call, with_tools as with_tools_of

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.terminal.remote import Pool


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds * 1e3:.0f} ms"


def summary(done: Finished, seconds: float) -> str:
    """For example: 156 tokens in 4.2 s, 37 tok/s, first token after 0.2 s."""
    count = done.usage.completion_tokens
    speed = done.tokens_per_second
    parts = [f"{count} {'token' if count == 1 else 'tokens'} in {duration(seconds)}"]
    if speed:
        parts.append(f"{speed:.{0 if speed >= 10 else 1}f} tok/s")
    parts.append(f"first token after {duration(done.ttft_ms / 1e3)}")
    if done.reason == "length":
        parts.append("cut at the length limit")
    elif done.stop_reason == "repetition":
        parts.append("ended because it repeats itself")
    if done.dropped_messages:
        parts.append(f"without the {done.dropped_messages} oldest messages, which no longer fit")
    return ", ".join(parts)


CONTINUES = "it continues the text that you type, without earlier messages or a system message"
CONTINUES_TEXTS = f"This model has no chat template: {CONTINUES}"
IS_BASE = (f"This is a base checkpoint, which was not taught to chat: {CONTINUES}. /conversation (or "
           "--conversation) chats with it all the same")
NO_ROLES = "--system has no effect: the model continues the text, without roles (--conversation: with roles)"
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}


def new_request(settings: Settings, parameters: Mapping | None = None, progress: bool = False,
                **source) -> Request:
    """A Request. Its answer may fill the context; a completion may never end, so its length is capped."""
    parameters = parameters or {}
    unset = tuple(name for name in SAMPLING_DEFAULTS
                  if name not in parameters and getattr(settings, name, None) is None)
    length = settings.max_tokens or (DEFAULT_MAX_TOKENS if "prompts" in source else None)
    params = AnswerParams(sampling=sampling_params(parameters, settings), progress=progress,
                          stop=tuple(parameters.get("stop", ())), chat="messages" in source,
                          stop_on_repetition="messages" in source)
    params, options = with_thinking_budget(params, {}, settings)
    source["template_options"] = {**source.get("template_options", {}), **options}
    return Request(id=secrets.token_hex(16), params=params, unset=unset, truncate="messages" in source,
                   max_tokens=parameters.get("max_tokens", length), **source)


def json_line(reply: ChoiceState, request: Request) -> str:
    """An answer that has ended, as a line of --json output."""
    reasoning = reply.text("reasoning")
    return as_json({"text": reply.text(), **({"reasoning": reasoning} if reasoning else {}),
                    **calculator_member(reply.calculations),
                    "finish_reason": reply.done.reason, "seed": request.params.sampling.seed,
                    "usage": usage_of(reply.done), "timings": timings_body(reply.done)})


def usage_of(done: Finished) -> dict[str, int]:
    return {name: getattr(done.usage, name)
            for name in ("prompt_tokens", "completion_tokens", "cached_tokens")}


async def receive(pool: Pool, request: Request, state: AnswerState, writer):
    """Show an answer as it arrives; its state has what arrived, even if the answer fails or is cancelled."""
    try:
        async with aclosing(watched(pool.answer(request), state)) as events:
            async for event in events:
                if isinstance(event, Piece):
                    writer.push(event)
                elif isinstance(event, PromptProgress):
                    writer.progress(event)
    finally:
        writer.close()


def settable(word: str) -> str | None:
    """The parameter that a word names, however it is spelled: top_p, top-p, TopP; None for others."""
    return {name.replace("_", ""): name for name in SETTABLE}.get(re.sub("[-_]", "", word.lower()))


def chats_in_turns(settings: Settings, pool: Pool) -> bool:
    """Whether messages are turns of a conversation, not texts to continue. ConfigError if the user wants
    turns of a model without a chat template."""
    if settings.conversation and not pool.chats:
        raise ConfigError("--conversation: this model has no chat template, so it can only continue texts")
    by_default = pool.chats and not pool.continues_texts
    return by_default if settings.conversation is None else settings.conversation


class Chat:
    """The `chat` command. The user types messages or COMMANDS; each command is a method here."""

    def __init__(self, pool: Pool, settings: Settings, conversation: Conversation | None = None,
                 tools: ToolUse | None = None):
        self.pool = pool
        self.tools = tools
        self.settings = settings
        self.in_turns = chats_in_turns(settings, pool)
        self.terminal = Terminal(settings, [*(f"/{name} " for name in COMMANDS),
                                            *(f"/set {name} " for name in SETTABLE)])
        self.note = self.terminal.note
        self.knowing = Knowing(pool, self.note)
        self.conversation = conversation or Conversation(settings.system or "")
        self.kept = settings.history and (self.terminal.interactive or settings.continue_)
        self.temporary = False         # is nothing of this chat kept, here and on the server?
        self.files: set[Path] = set()  # files that hold only this conversation: /save may overwrite them
        self.draft = ""                # the initial text of the next prompt
        self.failed = False
        self.left = False
        self.answers = 0
        self.tokens = 0

    async def run(self) -> int:
        """Run until the user leaves. Returns the exit status: 1 if a message from a pipe failed."""
        about = [] if self.in_turns else [self._about_texts()]
        about.append("/help lists the commands; Ctrl-C stops the answer")
        if self.tools and self.tools.tools:
            about.append(await self.tools.about())
        self.note("\n".join([*self.pool.describe(), *about, *self.conversation.lines()]))
        while not self.left:
            draft = self.draft
            self.draft = ""
            if (text := await self.terminal.read(draft)) is None:
                break
            try:
                await self.take(whole_unicode(text).strip())
            except (ChatServerError, OSError, ValueError) as error:
                if isinstance(error, BrokenPipeError) or lack_of_space(error):
                    raise
                self.failed = True
                self.note(f"error: {error}", "red")
                if self.settings.json:
                    print(as_json({"error": {"message": str(error)}}), flush=True)
        return int(self.failed and not self.terminal.interactive)

    def _about_texts(self) -> str:
        """Why what the user types is continued as a text."""
        if not self.pool.chats:
            return CONTINUES_TEXTS
        return IS_BASE if self.pool.continues_texts else f"Not a conversation: {CONTINUES}"

    async def take(self, text: str):
        """Handle a message, a command, or one of the words that need no slash."""
        name, _, value = text.removeprefix("/").partition(" ")
        if text.startswith('"""'):
            await self.ask(text[3:].removesuffix('"""').strip("\n"))
        elif text.startswith("//"):
            await self.ask(text[1:])
        elif text.startswith("/") or text.lower() in ("clear", "quit", "exit"):
            if (command := COMMANDS.get(name.lower())) is None and settable(name):
                return self.slash_set(f"{name} {value}")
            if command is None:
                near = did_you_mean(name, (*COMMANDS, *SETTABLE), "/")
                raise ValueError(f"there is no command /{name}{near}; /help lists them, "
                                 "and // sends text that begins with a slash")
            if asyncio.iscoroutine(work := command(self, value.strip())):
                await work
        elif text:
            await self.ask(text)

    async def ask(self, text: str, parent: str | None = "", pictures: Seq[dict] = ()):
        """Send a message below the leaf, or below `parent`. It is dropped if there is no answer."""
        chat = self.conversation
        before = self.conversation.leaf
        parent = before if parent == "" else parent
        question = chat.add({"role": "user", "content": text, "parent": parent,
                             **({"pictures": [*pictures]} if pictures else {})})
        try:
            await self.answer_with_tools(question)
        finally:
            if chat.leaf == question["id"]:
                del chat.nodes[question["id"]]
                chat.leaf = before

    async def answer_with_tools(self, last: dict):
        """Answer a question, and run the tools that the answers call, until one calls none.

        After --tool-rounds rounds the model must answer without tools."""
        rounds = 0
        earlier: list[dict] = []
        while True:
            await self.answer(last, with_tools=rounds < self.settings.tool_rounds)
            node = self.conversation.path()[-1]
            if node is last or not node.get("calls") or "note" in node:
                return
            if not await self.run_calls(node, earlier):
                return
            earlier += node["calls"]
            last = node
            rounds += 1

    async def run_calls(self, node: dict, earlier: Seq[dict]) -> bool:
        """Give each call of an answer its result. False if the user has cancelled one."""
        assert self.tools
        calls = node["calls"]
        is_cut = node["timings"]["finish_reason"] == "length"
        for number, call in enumerate(calls):
            refusal = self.tools.refusal(call, [*earlier, *calls[:number]])
            if is_cut and number == len(calls) - 1:
                refusal = CUT_OFF
            if refusal:
                call["result"] = refusal
            elif await self.allows(call):
                self.note(f"calling {shown_call(call)}; Ctrl-C cancels it")
                await self.tools.run(call)
            else:
                call["result"] = DENIED
            self.note(call["result"][:500])
        if not self.pool.sees and any(call.get("images") for call in calls):
            self.note("this model cannot see images; it is told that there were some")
        return all(call["result"] != CANCELLED for call in calls)

    async def allows(self, call: dict) -> bool:
        """Whether the user lets a call run: y, n, or a for all calls of this tool in this chat. Where nobody
        can be asked, only what the operator allows runs."""
        assert self.tools
        tool = self.tools.tools[call["name"]]
        if not self.tools.needs_approval(tool):
            return True
        if not self.terminal.interactive:
            return False
        self.note(f"{tool.server} wants to run {shown_call(call)}\n{tool.description.splitlines()[0][:300]}"
                  if tool.description else f"{tool.server} wants to run {shown_call(call)}")
        while True:
            self.note("Run it? y = yes, n = no, a = always in this chat")
            typed = await self.terminal.read(leaves=False)
            answer = (typed or "n").strip().lower()[:1]
            if answer == "a":
                self.tools.allowed[tool.name] = tool.digest
            if answer in ("y", "a", "n"):
                return answer != "n"

    async def answer(self, last: dict, with_tools: bool = False):
        """Answer a question, or continue an answer. If this stops or fails, what arrived is kept."""
        chat = self.conversation
        before = self.conversation.leaf
        chat.leaf = last["id"]
        cut = last["role"] == "assistant" and not last.get("calls")
        seed = {"seed": last["seed"]} if cut and type(last.get("seed")) is int else {}
        messages = chat.messages(self.pool.sees)
        if any((message.more or {}).get("pictures") for message in messages):
            if not self.pool.sees:
                raise ValueError("this model cannot see images; /clear begins a chat without them")
            messages = messages if isinstance(self.pool, RemotePool) else await decoded(messages, self.pool)
        source = {"messages": messages, "template_options": CONTINUE if cut else {}}
        if not self.in_turns:
            source = {"prompts": (chat.last_text(),)}
        request = new_request(with_own_sampling(self.settings, self.pool), seed | chat.parameters,
                              progress=self.terminal.interactive, **source)
        if with_tools and self.in_turns and self.tools and self.tools.chosen:
            request = with_tools_of(request, self.tools.chosen, self.pool)
        request = replace(request, params=replace(request.params, temporary=self.temporary))
        chat.leaf = before
        state = AnswerState(request)
        reply = state.choices[0]
        began_s = time.monotonic()
        note = "interrupted"
        try:
            with self.terminal.unechoed(partial(self.pool.end_thinking, request.id)):
                begun = marked(last["content"], calls_in(last), as_code) if cut else ""
                writer = self.terminal.writer(begun, self.pool.ends_thinking)
                await interruptible(receive(self.pool, request, state, writer))
            note = "stopped"
        finally:
            seconds = time.monotonic() - began_s
            if reply.parts or reply.done:
                self.keep(last, request, reply, note)
        line = summary(reply.done, seconds) if reply.done else "[stopped]"
        is_cut = reply.done and (reply.done.reason == "length" or reply.done.stop_reason == "repetition")
        hint = "; /continue continues it" if is_cut else ""
        if isinstance(self.pool, RemotePool) and self.pool.passages:
            line = f"{passages_line(self.pool.passages)}\n{line}"
        self.note(line + hint + ("\n" if self.terminal.interactive else ""))
        if self.settings.json and reply.done:
            print(json_line(reply, request), flush=True)

    def keep(self, last: dict, request: Request, reply: ChoiceState, note: str):
        """Store a reply as an answer to the question `last`, or as the rest of the answer `last`."""
        text = reply.text()
        node = {"role": "assistant", "content": text, "parent": last["id"],
                "model": self.pool.model_name, "seed": request.params.sampling.seed,
                "parameters": dict(self.conversation.parameters)}
        if reasoning := reply.text("reasoning"):
            node["reasoning"] = reasoning
        if reply.calls:
            node["calls"] = [{"id": f"call_{call.place}", "name": call.name, "arguments": call.text}
                             for call in reply.calls]
        calls = reply.calculations
        continues = last["role"] == "assistant" and not last.get("calls")
        if continues:
            begun = Message("assistant", last["content"], {"calculator": calls_in(last)})
            # a call that was cut is written again
            calls = [*calculations_of(without_unfinished(begun)), *shift_calls(calls, len(last["content"]))]
        if calls or "calculator" in last:
            node["calculator"] = calls
        if reply.done:
            node["timings"] = timings_body(reply.done) | usage_of(reply.done) | {
                "finish_reason": reply.done.reason}
            self.answers = self.answers + 1
            self.tokens = self.tokens + reply.done.usage.completion_tokens
        else:
            node["note"] = note
        if not continues:
            self.conversation.add(node)
        else:
            last.pop("note", None)
            last |= node | {"content": last["content"] + text, "parent": last["parent"]}
        if self.kept and not self.temporary:
            try:
                self.conversation.write(state_file(LAST_CHAT), 0o600)
            except OSError as error:
                self.kept = False
                self.note(f"this chat is not kept for --continue: {error}")

    # commands

    def slash_help(self, value: str):
        """/help: this list"""
        rows = [run.__doc__.split(": ", 1) for run in dict.fromkeys(COMMANDS.values())]
        self.note("\n".join(self.terminal.row(name, help) for name, help in [*rows, *KEYS]))

    def slash_clear(self, value: str):
        """/clear: start a new conversation"""
        self._begin_anew()
        self.note("The conversation has been cleared.")

    def _begin_anew(self, temporary: bool = False):
        self.conversation = Conversation(self.conversation.system, self.conversation.parameters)
        self.files = set()
        self.be_temporary(temporary)

    def be_temporary(self, temporary: bool):
        self.temporary = temporary
        self.terminal.keeps_history = not temporary

    def slash_temporary(self, value: str):
        """/temporary: start a chat of which nothing is kept; /clear ends it"""
        if isinstance(self.pool, RemotePool) and not self.pool.forgets:
            raise ValueError("this server is another program, which may keep what it is asked")
        self._begin_anew(temporary=True)
        self.note("Nothing of this chat is kept, here or on the server, unless you /save it.")

    def slash_system(self, value: str):
        """/system TEXT: set the system message; no TEXT: none"""
        self.conversation.system = value
        self.note(f"The system message is now {shown(value) if value else 'empty'}.")

    def slash_set(self, value: str):
        """/set NAME VALUE: like /NAME VALUE; /show lists them; no VALUE: the default"""
        name, _, text = re.sub(r"^parameter\s+", "", value).partition(" ")  # as ollama's terminal has it
        if name.lower() == "system":
            return self.slash_system(text.strip())
        text = text.strip()
        known = settable(name)
        if known is None:
            raise ValueError(f"/set takes one of {', '.join(SETTABLE)}{did_you_mean(name, SETTABLE)}")
        chosen = {}
        try:
            if text:
                chosen[known] = PARAMETERS[known](text) if known in PARAMETERS else [text]
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"/set {name}: {error}") from None
        self.conversation.parameters.pop(known, None)
        self.conversation.parameters |= chosen
        self.note(f"{known} is now {text or 'the default'}.")

    def slash_show(self, value: str):
        """/show: model, system message, parameters, context"""
        chat = self.conversation
        default: dict[str, Any] = dataclasses.asdict(self.settings)
        for name, (usual, origin) in default_sampling(self.pool, self.settings).items():
            if origin != "usual" or not self.settings.url:
                default[name] = usual
        rows = {"model": self.pool.model_name, "system": chat.system, "messages": len(chat.path())}
        rows |= {name: chat.parameters.get(name, default.get(name)) for name in SETTABLE}
        facts = [node["timings"] for node in chat.path() if isinstance(node.get("timings"), dict)] or [{}]
        used = [facts[-1].get(name, 0) for name in ("prompt_tokens", "completion_tokens")]
        length = self.pool.context_length
        used = sum(count for count in used if isinstance(count, int))
        rows["context"] = f"{used:,}{f' of {length:,}' if isinstance(length, int) else ''} tokens"
        self.note("\n".join(f"{name:12} {'-' if row in (None, '') else row}" for name, row in rows.items()))

    def slash_save(self, value: str):
        """/save FILE: save the conversation; the page can import it"""
        title = re.sub(r"\W+", "-", self.conversation.title).strip("-") or "chat"
        path = Path(value or f"{title}.json").expanduser()
        if path.exists() and path.resolve() not in self.files:
            raise ValueError(f"{path} exists: choose another name")
        try:
            self.conversation.write(path)
        except OSError as error:  # of this file, not of stdout
            raise ValueError(f"cannot write {path}: {error.strerror}") from None
        self.files.add(path.resolve())
        self.note(f"Saved as {path}; /load and the page's Import can read it.")

    def slash_load(self, value: str):
        """/load FILE: continue a saved or exported chat; FILE N: its Nth chat"""
        [(name, number)] = re.findall(r"\A(.*?)(?:\s+(\d+))?\Z", value, re.DOTALL)
        name, number = (value, "") if Path(value).expanduser().exists() else (name, number)
        try:
            chats = read_chats(read_user_file(name))
        except ValueError as error:
            raise ValueError(f"{name} is not a conversation: {error}") from None
        if len(chats) > 1 and not number:
            rows = [f"{index}  {chat.title}" for index, chat in enumerate(chats, 1)]
            return self.note("\n".join([f"{name} has {len(chats)} chats: /load {name} N", *rows]))
        if not 1 <= int(number or 1) <= len(chats):
            raise ValueError(f"{name} has {len(chats)} chats")
        self.conversation = chats[int(number or 1) - 1]
        self.be_temporary(False)
        self.files = {Path(name).expanduser().resolve()} if len(chats) == 1 else set()
        self.note("\n".join([*self.conversation.lines(), f"Loaded “{self.conversation.title}”."]))

    def slash_conversation(self, value: str):
        """/conversation: chat with a base checkpoint in turns, or go back to texts"""
        if not self.pool.chats:
            raise ValueError("this model has no chat template, so it can only continue texts")
        self.in_turns = not self.in_turns
        self.note("What you type is now a message of a conversation." if self.in_turns else
                  f"Now {CONTINUES}; /conversation goes back.")

    def _question(self) -> dict:
        if (question := self.conversation.last("user")) is None:
            raise ValueError("there is no message yet")
        return question

    async def slash_retry(self, value: str):
        """/retry: get another answer to the last message"""
        await self.answer_with_tools(self._question())

    async def slash_edit(self, value: str):
        """/edit TEXT: change the last message and send it again"""
        question = self._question()
        if not value and self.terminal.session:
            value = await self.terminal.read(question["content"], leaves=False) or ""
        if not value.strip():
            raise ValueError("/edit TEXT: the new text of your last message")
        await self.ask(value, question["parent"], question.get("pictures") or ())

    async def slash_continue(self, value: str):
        """/continue: continue an answer that was cut off"""
        path = self.conversation.path()
        if not path or path[-1]["role"] != "assistant":
            raise ValueError("there is no answer to continue")
        last = path[-1]
        has_text = last["content"] or calls_in(last)
        if has_text and (self.pool.continues or not self.in_turns):
            await self.answer(last)
        else:
            await self.ask("Please continue.")

    async def slash_file(self, value: str):
        """/file FILE TEXT: send a file or image with a question; also /image, /read"""
        name, question = file_and_rest(value)
        if is_picture(name):
            if not self.pool.sees:
                raise ValueError("this model cannot see images")
            return await self.ask(question, pictures=[picture_file(name)])
        if is_document(name):
            text, about = await document_text(name)
            self.note(about)
        else:
            text = read_user_file(name)
        if not question and self.terminal.interactive:
            self.note(f"Your question about {name}? Enter sends only its text, Ctrl-C sends nothing.")
            if (typed := await self.terminal.read(leaves=False)) is None:
                return
            question = whole_unicode(typed).strip()
        await self.ask(f"{text.rstrip()}\n\n{question}" if question else text)

    slash_read = slash_image = slash_file

    async def slash_tools(self, value: str):
        """/tools on|off NAME: a tool, a server, or all; without words: list them"""
        if self.tools is None:
            raise ValueError("there are no tools; --mcp-config FILE names the servers that have some")
        await self.tools.read()
        word, *names = value.split() or [""]
        if word in ("on", "off") and names:
            self.tools.choose(names, word == "on")
        elif word:
            raise ValueError("/tools, /tools on NAME, or /tools off NAME")
        rows = [self.terminal.row(f"{'*' if name in self.tools.on else ' '} {name}",
                                  tool.description.partition("\n")[0][:200])
                for name, tool in sorted(self.tools.tools.items())]
        mark = " (*)" if self.tools.on else ""
        self.note("\n".join([*rows, *self.tools.troubles, await self.tools.about() + mark]))

    async def slash_know(self, value: str):
        """/know FOLDER: ask its documents; also NAME, off; alone: list collections"""
        await self.knowing.take(value)

    async def slash_passages(self, value: str):
        """/passages N [LEAST]: read so many of a collection at most; also off"""
        self.knowing.limit(value)

    async def slash_stats(self, value: str):
        """/stats: answers, tokens and workers"""
        stats = await self.pool.get("stats") if isinstance(self.pool, RemotePool) else self.pool.stats()
        names = {"gpu_id": "worker", "state": "", "device": "on",
                 "running": "running", "kv_pages_used": "KV pages"}
        rows = [" ".join(f"{name} {worker[key]}".strip() for key, name in names.items() if key in worker)
                for worker in stats.get("workers") or ()]
        self.note("\n".join([f"answers {self.answers}, tokens {self.tokens:,}", *rows]))

    def slash_quit(self, value: str):
        """/quit, /exit: leave"""
        self.left = True

    slash_exit = slash_quit


COMMANDS = {name.removeprefix("slash_"): run for name, run in vars(Chat).items() if name.startswith("slash_")}


KEYS = (  # what else can be typed
    ("// ...", "send text that begins with a slash"),
    ("Alt-Enter", "start a new line"),
    ('""" ... """', "a message of several lines"),
    ("Tab", "complete a command; while it thinks: answer now"),
    ("Ctrl-C", "stop the answer or clear the line; twice if empty: leave"),
    ("Ctrl-D", "leave"),
)
LAST_CHAT = "last-chat.json"


def last_chat(settings: Settings) -> Conversation:
    """The previous chat, as `chat` stored it. ConfigError if there is none."""
    path = None
    try:
        path = state_file(LAST_CHAT)
        text = path.read_text(encoding="utf-8")
        chat = read_chats(text)[0] if text else None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--continue: cannot read {path or 'the last chat'}: {error}") from None
    if chat is None:
        raise ConfigError("--continue: there is no chat to continue (--no-history keeps none)")
    chat.system = chat.system if settings.system is None else settings.system
    return chat


def file_and_rest(value: str) -> tuple[str, str]:
    """A file's name, which may have spaces, and the words after it: the longest name of an existing file,
    else the first word."""
    ends = [match.start() for match in itertools.islice(re.finditer(r"\s+|\Z", value), 64)]
    names = [value[:end] for end in ends if os.path.isfile(os.path.expanduser(value[:end]))]
    name = names[-1] if names else value[:ends[0]]
    return name, value[len(name):].strip()


async def chat(settings: Settings) -> int:
    """The `chat` command: answer messages until the user leaves; with `-p`, answer once."""
    if settings.prompt is not None:
        if settings.continue_:
            raise ConfigError("--continue reads messages from the terminal or a pipe: leave out --prompt")
        return await generate(settings)
    conversation = last_chat(settings) if settings.continue_ else None
    async with open_pool(settings) as pool, open_tools(settings, pool) as tools:
        return await Chat(pool, settings, conversation, tools).run()


def prompt_text(settings: Settings) -> str:
    """--prompt, or stdin for `-` and for a pipe. ConfigError if there is no text."""
    if settings.prompt is None and sys.stdin.isatty():
        raise ConfigError(f"nothing to answer: {taken_as_model(settings)}give --prompt TEXT, or pipe text to "
                          "stdin")
    text = settings.prompt if settings.prompt not in (None, "-") else sys.stdin.read().removesuffix("\n")
    if not text.strip():
        taken = taken_as_model(settings) if settings.prompt is None else ""
        raise ConfigError(f"nothing to answer: {taken}the prompt is empty")
    return whole_unicode(text)


def taken_as_model(settings: Settings) -> str:
    """The beginning of the error when there is no prompt: names a word that may have been meant as one."""
    if settings.model is None:
        return ""
    example = f"{program_command()} {settings.command} -p {shlex.quote(settings.model)}"
    return f"{settings.model} was taken as MODEL (a prompt of one word needs -p: `{example}`); "


async def generate(settings: Settings) -> int:
    """The `generate` command: one answer on stdout, its speed on stderr. No template: text completion."""
    text = prompt_text(settings)
    writer = PlainWriter(silent=settings.json)
    turns = [Message("system", settings.system)] if settings.system else []
    async with open_pool(settings) as pool:
        settings = with_own_sampling(settings, pool)
        if not settings.url and decode_core() is None:
            print(kernels_line(), file=sys.stderr)
        in_turns = chats_in_turns(settings, pool)
        if turns and not in_turns:
            print(NO_ROLES, file=sys.stderr)
        request = (new_request(settings, messages=(*turns, Message("user", text))) if in_turns else
                   new_request(settings, prompts=(text,)))
        state = AnswerState(request)
        began_s = time.monotonic()
        await receive(pool, request, state, writer)
        seconds = time.monotonic() - began_s
    [reply] = state.choices
    assert reply.done  # an answer that does not fail ends with Finished
    if settings.json:
        print(json_line(reply, request), flush=True)
    print(summary(reply.done, seconds), file=sys.stderr)
    return 0
