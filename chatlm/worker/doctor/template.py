"""Checks of a chat template: what the server's own rendering makes of conversations whose texts are known."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence as Seq
from functools import cached_property
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import ChatServerError, RequestError
from chatlm.common.messages.requests import Message
from chatlm.common.text.history_forms import differences
from chatlm.common.text.tokenizer import tools_of
from chatlm.worker.doctor.findings import Findings, error, examples, note, quoted, warning

if TYPE_CHECKING:
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.worker.doctor.examined_model import ExaminedModel

WHERE = "chat template"
# what a server's sandbox allows: PREPARE_S, Admission.TEMPLATE_S
COMPILE_S = 5.0
FILL_S = 0.5
# Words that no template has; each must come out exactly once
SYSTEM, FIRST, ANSWER, SECOND, REPLY, THIRD, PARTIAL = (
    f"zq{name}qz" for name in ("system", "first", "answer", "second", "reply", "third", "partial"))
TOOL, TOLD, ARGUMENT, VALUE, RESULT = (
    f"zq{name}qz" for name in ("tool", "told", "argument", "value", "result"))
TOOLS = ({"type": "function", "function": {
    "name": TOOL, "description": TOLD, "parameters": {
        "type": "object", "properties": {ARGUMENT: {"type": "string", "description": "a word"}},
        "required": [ARGUMENT]}}},)
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": TOOL, "arguments": {ARGUMENT: VALUE}}}
GOES_ON = {"continue_final_message": True, "add_generation_prompt": False}
A_NAME = re.compile(r"<[|｜][^<>\s|｜]{1,60}[|｜]>|</?s>|<(?:start|end)_of_turn>"
                    r"|<turn\|>|<\|turn>|<eos>|<bos>")
AN_END = re.compile(r"(?i)end|eot|eom|eos|/s>|stop|return")
CHAT_TOKENS = (("<|im_start|>", "<|im_end|>"), ("<start_of_turn>", "<end_of_turn>"),
               ("<|start_header_id|>", "<|eot_id|>"), ("<|turn>", "<turn|>"))


class Rendered(NamedTuple):
    """A conversation as the model reads it."""

    ids: list[int]
    text: str     # with the names of special tokens
    refused: str  # why it could not be rendered; "" if it could


class Chats:
    """The conversations, rendered when they are first asked for."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def render(self, *messages: Message, tools: Seq[dict] = (), options: Mapping = {}) -> Rendered:
        try:
            ids = self.tokenizer.render(messages, tools, options)
        except RequestError as reason:
            return Rendered([], "", str(reason) or "without a reason")
        return Rendered(ids, self.tokenizer.show(ids), "")

    @cached_property
    def one(self) -> Rendered:
        return self.render(Message("user", FIRST))

    @cached_property
    def unprompted(self) -> Rendered:
        return self.render(Message("user", FIRST), options={"add_generation_prompt": False})

    @cached_property
    def system(self) -> Rendered:
        return self.render(Message("system", SYSTEM), Message("user", FIRST))

    @cached_property
    def turns(self) -> Rendered:
        return self.render(Message("user", FIRST), Message("assistant", ANSWER), Message("user", SECOND),
                           Message("assistant", REPLY), Message("user", THIRD))

    @cached_property
    def thoughtless(self) -> Rendered:
        return self.render(Message("user", FIRST), options={"reasoning_effort": "none"})

    @cached_property
    def thoughtful(self) -> Rendered:
        options = {"chat_template_kwargs": {"enable_thinking": True}}
        return self.render(Message("user", FIRST), options=options)

    @cached_property
    def goes_on(self) -> Rendered:
        return self.render(Message("user", FIRST), Message("assistant", PARTIAL), options=GOES_ON)

    @cached_property
    def tools(self) -> Rendered:
        return self.render(Message("user", FIRST), tools=TOOLS)

    @cached_property
    def results(self) -> Rendered:
        return self.render(
            Message("user", FIRST), Message("assistant", "", {"tool_calls": [CALL]}),
            Message("tool", RESULT, {"tool_call_id": CALL["id"], "name": TOOL}), tools=TOOLS)

    def around(self, before: str, after: str) -> str:
        """What stands between two texts of the conversation of several turns."""
        return self.turns.text.partition(before)[2].partition(after)[0]


def check_template(examined: ExaminedModel) -> Findings:
    tokenizer = examined.tokenizer
    if examined.text.embedder:
        return
    if examined.text.kind == "hf" and not examined.text.chat_template or examined.text.kind == "characters":
        yield note("the model has no chat template, so it cannot chat; it continues texts", WHERE)
        return
    if tokenizer.continues_texts:
        yield note("it is a base checkpoint, which was not taught to chat: it continues texts, unless it is "
                   "asked to chat", WHERE)
    chats = Chats(tokenizer)
    began_s = time.process_time()
    if examined.text.kind == "hf":
        try:
            getattr(tokenizer, "template")
        except ChatServerError as reason:
            yield error(str(reason), WHERE)
            return
        if (took_s := time.process_time() - began_s) > COMPILE_S:
            yield error(f"it takes {took_s:.1f} s of the processor to compile; the server gives up after "
                        f"{COMPILE_S:g}", WHERE)
            return
        began_s = time.process_time()
    if refused := chats.one.refused:
        yield error(f"a user's message cannot be rendered: {refused}", WHERE)
        return
    if (took_s := time.process_time() - began_s) > FILL_S:
        yield error(f"it takes {took_s:.1f} s of the processor to render one message; the server gives up "
                    f"after {FILL_S:g}", WHERE)
        return
    for part in (lost_or_doubled, typed_specials, prompts, ends, begins, unused, features):
        yield from part(examined, chats)


def miscounted(rendered: Rendered, texts: Seq[str]) -> tuple[list[str], list[str]]:
    """The texts that the template loses, and those that it shows more than once."""
    counts = {text: rendered.text.count(text) for text in texts}
    return [text for text in texts if not counts[text]], [text for text in texts if counts[text] > 1]


def lost_or_doubled(examined: ExaminedModel, chats: Chats) -> Findings:
    for what, rendered, texts, weight in (
            ("a user's message", chats.one, (FIRST,), error),
            ("a conversation of several turns", chats.turns, (FIRST, ANSWER, SECOND, REPLY, THIRD), error),
            ("a system message", chats.system, (SYSTEM, FIRST), warning),
            ("a message to continue", chats.goes_on, (FIRST, PARTIAL), warning),
            ("the description of a function", chats.tools, (FIRST, TOLD, ARGUMENT), warning),
            ("a function's result", chats.results, (FIRST, RESULT), warning),
            ("a function's call", chats.results, (VALUE,), note)):
        if rendered.refused:
            if not (rendered is chats.system and "ystem" in rendered.refused or weight is note):
                yield weight(f"{what} cannot be rendered: {rendered.refused}", WHERE)
            continue
        lost, doubled = miscounted(rendered, texts)
        # templates may say a function's description again, and which of its arguments are required
        doubled = [text for text in doubled if text not in (TOLD, ARGUMENT)]
        if lost:
            names = examples([text[2:-2] for text in lost])
            yield weight(f"of {what} the text is lost ({names})", WHERE,
                         "the model never reads it")
        if doubled:
            yield weight(f"of {what} the text is doubled ({examples([text[2:-2] for text in doubled])})",
                         WHERE)


def typed_specials(examined: ExaminedModel, chats: Chats) -> Findings:
    """The name of a special token in a user's message must not become the token."""
    tokenizer = chats.tokenizer
    for name in dict.fromkeys(names_in(tokenizer, chats.one.text)):
        token = tokenizer.specials.get(name)
        typed = chats.render(Message("user", f"{FIRST} {name} {SECOND}"))
        if token is not None and typed.ids.count(token) > chats.one.ids.count(token):
            yield error(f"whoever writes {quoted(name)} in a message ends or begins turns with it", WHERE)


def prompts(examined: ExaminedModel, chats: Chats) -> Findings:
    """Check that the prompt ends where the answer begins."""
    if chats.turns.refused or chats.unprompted.refused:
        return
    before = without_thoughts(chats, chats.around(FIRST, ANSWER))
    prompted = chats.one.text.partition(FIRST)[2]
    opening = before.removeprefix(prompted)
    if prompted == chats.unprompted.text.partition(FIRST)[2] and before.startswith(prompted) and (
            re.search(r"\w", opening)):
        yield warning("the template ignores add_generation_prompt: "
                      f"{quoted(opening.strip())}, which comes before answers, is not in the prompt", WHERE,
                      "the model has to write it, or answers for the user; a newer template has it")
    if not chats.goes_on.refused and not chats.goes_on.text.rstrip().endswith(PARTIAL):
        yield warning("a message that is to be continued does not end the prompt", WHERE)


def without_thoughts(chats: Chats, text: str) -> str:
    """Text without the empty reasoning that templates put before earlier answers."""
    begin, end = chats.tokenizer.thoughts or ("", "")
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}\\s*", "", text, flags=re.DOTALL) if end else text


def ends(examined: ExaminedModel, chats: Chats) -> Findings:
    """Check that the template ends answers with a token that ends them here, and does not begin them with
    one."""
    if chats.turns.refused:
        return
    tokenizer = chats.tokenizer
    named = chats.tokenizer.named_tokens
    stops = {tokenizer.show([token]) for token in tokenizer.stop_tokens}
    after = chats.around(ANSWER, SECOND)
    before = chats.around(FIRST, ANSWER)
    written = names_in(tokenizer, after)
    if not written:
        yield note("the template writes no token after an answer", WHERE)
    elif not stops.intersection(written) and not tokenizer.call_format.stops:  # there, earlier ones differ
        end = written[0]
        split = end not in named
        known = examples([*map(quoted, sorted(stops))]) or "nothing"
        if split:
            why = f"which is no token here: it splits into {len(tokenizer.encode(end))}"
            remedy = "its token has the wrong type, or is missing"
        else:
            why = f"which does not end them here (what does: {known})"
            remedy = "name it as eos or eot"
        yield error(f"the template ends answers with {quoted(end)}, {why}", WHERE,
                    f"answers never end; {remedy}")
    eos = None if examined.text.eos_token is None else tokenizer.show([examined.text.eos_token])
    if eos and stops.intersection(written) and eos not in written:
        yield note(f"the template ends answers with {quoted(written[0])}, not with eos, {quoted(eos)}; both "
                   "end them here", WHERE)
    opening = names_in(tokenizer, before)
    if opening and opening[-1] in stops and opening[-1] not in written[:1]:
        yield error(f"{quoted(opening[-1])} ends answers, but the template begins them with it", WHERE,
                    "the id of eos is another token's")
    for name in dict.fromkeys(names_in(tokenizer, chats.turns.text)):
        if name not in named and (name in examined.vocab or AN_END.search(name) or "start" in name):
            yield error(f"the template writes {quoted(name)}, which "
                        + ("is an ordinary token in the vocabulary" if name in examined.vocab else
                           "is no token here") + f", so it splits into {len(tokenizer.encode(name))}", WHERE,
                        "the type of its token should be control (special)")
    stated = {examined.text.eos_token, *(examined.metadata.get(f"tokenizer.ggml.{name}_token_id")
                                        for name in ("eos", "eot", "eom"))}
    silent = [tokenizer.show([token]) for token in sorted(tokenizer.stop_tokens - stated)
              if tokenizer.show([token]) not in (examined.text.chat_template or "")]
    if silent and examined.kind == "gguf":
        yield note(f"answers end also with {examples([*map(quoted, silent)])}, which the file does not name "
                   "as an end", WHERE)


def names_in(tokenizer: Tokenizer, text: str) -> list[str]:
    """The special tokens in a rendered text, and what looks like one, in order."""
    names = sorted(tokenizer.named_tokens, key=len, reverse=True)
    pattern = "|".join([*map(re.escape, names), A_NAME.pattern])
    return re.findall(pattern, text)


def begins(examined: ExaminedModel, chats: Chats) -> Findings:
    """Check that BOS comes once, where the model expects it."""
    tokenizer = chats.tokenizer
    bos = examined.text.bos_token
    ids = chats.one.ids
    if bos is None:
        return
    name = quoted(tokenizer.show([bos]))
    if ids[:2] == [bos, bos]:
        yield error(f"a chat begins with {name} twice", WHERE,
                    "the model has never seen that; remove it from the template")
    elif ids[:1] != [bos] and expects_bos(examined):
        yield warning(f"a chat does not begin with {name}, with which texts of this vocabulary begin", WHERE,
                      "set tokenizer.ggml.add_bos_token, or write it in the template")


def expects_bos(examined: ExaminedModel) -> bool:
    """Whether texts of this vocabulary begin with BOS, whatever the file says of chats."""
    text = examined.text
    metadata = examined.metadata
    if text.add_bos or examined.kind != "gguf":
        return text.add_bos
    return metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in (
        "llama-bpe", "llama3", "llama-v3", "tekken", "pixtral")


def unused(examined: ExaminedModel, chats: Chats) -> Findings:
    """A template of another model writes none of the tokens that this one was trained to chat with."""
    if examined.text.kind != "hf" or chats.turns.refused:
        return
    named = chats.tokenizer.named_tokens
    missing = next((pair for pair in CHAT_TOKENS if all(name in named for name in pair)), None)
    written = [name for name in names_in(chats.tokenizer, chats.around(FIRST, ANSWER)) if name in named]
    if missing and not written:
        yield warning(f"the template writes none of the vocabulary's tokens for chats, such as {missing[0]}, "
                      "before an answer", WHERE, "it may be another model's, or an old one")


def features(examined: ExaminedModel, chats: Chats) -> Iterator:
    tokenizer = chats.tokenizer
    thinks = chats.tokenizer.thoughts
    for difference in differences(tokenizer.forms):
        yield warning(difference, WHERE, "the model may know another form from its training")
    switched = chats.thoughtless.text not in ("", chats.one.text)
    kind = {"native": f"in the template's own form ({tokenizer.tool_format})",
            "generic": "described by this server, as the template has no place for them"}
    thinking = "no"
    if thinks:
        switch = "can be turned off" if switched else "cannot be turned off"
        if not switched and chats.thoughtful.text not in ("", chats.one.text):
            switch = "is off unless a request turns it on"  # Laguna
        thinking = f"{thinks[0]} to {thinks[1]}, which {switch}"
    features = {
        "system messages": "refused" if chats.system.refused else "yes",
        "functions": kind.get(tools_of(tokenizer) or "", "no"),
        "thinking": thinking,
        "continuing a message": "no" if chats.goes_on.refused else "yes",
    }
    yield note("; ".join(f"{name}: {value}" for name, value in features.items()), WHERE)
