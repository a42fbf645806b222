"""The text of an answer, from its tokens, and where it ends."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence as Seq
from contextlib import suppress
from typing import TYPE_CHECKING

from chatlm.common.messages.requests import Delta
from chatlm.common.text.answer_decoder import answer_decoder, parts_of, without_calls
from chatlm.common.text.formats import with_markers
from chatlm.common.text.reader import StopFinder, answer_reader
from chatlm.worker.engine.line_ends import LineEnds
from chatlm.worker.engine.repetition import RepetitionFinder

if TYPE_CHECKING:
    from chatlm.common.messages.requests import AnswerParams
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.worker.engine.calculator import CalculatorTool
    from chatlm.worker.engine.grammar import Grammar
    from chatlm.worker.engine.sequence import Assignment


class RepeatedCalls:
    """Holds back a call as long as it repeats the one before it. A model that must call functions, and may
    call several, repeats itself when it has nothing to add."""

    def __init__(self):
        self.before = ("", "")     # the name and the arguments of the previous call
        self.name = ""
        self.parts = []
        self.repeated = 0          # how many characters of the previous call were repeated
        self.holding = False       # does the call repeat the previous one so far?
        self.complete = False      # were all of its characters repeated?

    def push(self, more: Delta) -> Delta:
        """What can be sent now."""
        if more.name:
            self.before = (self.name, "".join(self.parts))
            self.name = more.name
            self.parts = []
            self.repeated = 0
            self.holding = self.name == self.before[0]
        self.parts.append(more.text)
        if not self.holding:
            return more
        arguments = self.before[1]
        self.holding = arguments.startswith(more.text, self.repeated)
        self.repeated += len(more.text)
        self.complete = self.holding and self.repeated == len(arguments)
        return Delta("call", "") if self.holding else Delta("call", "".join(self.parts), self.name)


class AnswerText:
    """Turns tokens into reasoning, content, calls of functions and of the calculator.

    Stop strings are searched for only in the content. Calls of the calculator do not separate it: a client
    that gets only the text does not see them."""

    def __init__(self, work: Assignment, tokenizer: Tokenizer):
        self.params = params = work.params
        self.reader = answer_reader(tokenizer, params, work.prompt_ids)
        marks = tokenizer.marks(bool(self.reader.names)) if self.reader else {}
        self.decoder = answer_decoder(tokenizer, marks, params.skip_special_tokens)
        self.stops = StopFinder(params.stop, params.owner)
        limited = params.line_indent or params.line_limit_ms
        self.lines = LineEnds(params.line_indent, params.line_limit_ms) if limited else None
        self.unsent: list[Delta] = []
        # the calculator's calls behind text that is held back, each with the number of characters before it
        self.pinned: deque[tuple[int, Delta]] = deque()
        self.read = 0    # characters of content so far,
        self.shown = 0   # and those of them that could be sent
        self.count = 0   # tokens so far
        self.calls = 0   # calls so far
        self.reasoning_tokens = 0  # tokens of reasoning, with its markers,
        self.thoughts = 0          # and without
        self.repeated = RepeatedCalls() if params.grammar and params.grammar_param == "tools" else None

    @property
    def thinking(self) -> bool:
        return bool(self.reader and self.reader.thinking)

    @property
    def cut_by(self) -> str | None:
        """Why the text ends here, if it does: a stop string, or a call too many."""
        if self.stops.stopped_by is not None:
            return self.stops.stopped_by
        if self.over_calls:
            return "parallel_tool_calls"
        return "repeated call" if self.repeated and self.repeated.complete else None

    @property
    def over_calls(self) -> bool:
        """Has a second call begun although only one is allowed?"""
        return self.calls > 1 and not self.params.parallel_calls

    def push(self, token: int):
        """Turn a token into reasoning, content or calls."""
        text = self.decoder.push(token)
        reader = self.reader
        self.count += 1
        if not reader:  # everything is content
            return self._add_content(text)
        thinking = reader.thinking
        reader.push(text)
        self.thoughts += thinking
        self.reasoning_tokens += thinking or reader.thinking
        return self._add_read()

    def finish(self, cut: bool):
        """The answer ends here, perhaps `cut` by a limit."""
        rest = self.decoder.finish()
        if self.reader:
            self.reader.push(rest)
            self.reader.finish(cut=cut)
            self._add_read()
        else:
            self._add_content(rest)
        self._show(self.stops.finish())

    def take(self) -> tuple[Delta, ...]:
        """What is new since the last call."""
        unsent = tuple(self.unsent)
        self.unsent = []
        return unsent

    def _add_read(self):
        """Add the reader's new deltas, up to a stop string."""
        for delta in self.reader.take() if self.reader else ():
            self.calls += bool(delta.name)
            if self.over_calls or self.repeated and self.repeated.complete:
                return
            if self.repeated and delta.kind == "call":
                delta = self.repeated.push(delta)
            if delta.kind == "text":
                self._add_content(delta.text)
                continue
            self._show(self.stops.finish())  # no stop string spans reasoning or a call
            if self.stops.stopped_by is None:
                self._add(delta._replace(text=without_calls(delta.text)))

    def _add_content(self, text: str):
        """Add text up to a stop string. Stop strings in the first `min_tokens` tokens are ignored."""
        for delta in parts_of(self.decoder, text):
            if delta.kind == "calculator":
                self.pinned.append((self.read, delta))
                self._show("")
                continue
            text = self.lines.push(delta.text) if self.lines else delta.text
            self.read += len(text)
            self._show(self.stops.push(text) if self.count > self.params.min_tokens else text)

    def _show(self, text: str):
        """Send content, with the calculator's calls between its characters. Calls behind a stop string are
        never sent."""
        end = self.shown + len(text)
        while self.pinned and self.pinned[0][0] <= end:
            place, call = self.pinned.popleft()
            before = text[:place - self.shown]
            text = text[place - self.shown:]
            self._add(Delta("text", before))
            self._add(call)
            self.shown = place
        self._add(Delta("text", text))
        self.shown = end

    def _add(self, delta: Delta):
        if delta.text or delta.name:
            append_delta(self.unsent, delta)


def append_delta(deltas: list[Delta], delta: Delta):
    """Append it, merged with the last one of the same kind; calls are not merged."""
    if deltas and deltas[-1].kind == delta.kind and delta.kind in ("text", "reasoning"):
        delta = Delta(delta.kind, deltas.pop().text + delta.text)
    deltas.append(delta)


class Constraint:
    """The grammar that an answer's tokens must follow: that of its whole format, or of the call being
    written.

    An answer in a format is completed even if the model would never end it: when room is about to run out,
    its end is written in place of a token. A call is not: a truncated call must not be made."""

    NEAR = 32  # spare tokens below which the way to the end is computed after every token

    def __init__(self, params: AnswerParams, tokenizer: Tokenizer, grammar: Grammar | None,
                 compiled: Callable[[str], Grammar] | None):
        self.grammar = grammar
        self.param = params.grammar_param
        self.compiled = compiled       # makes a grammar from its source
        self.of_calls = {name: with_markers(source, tokenizer.markers) for name, source in zip(
            params.tool_names, params.call_grammars) if source}
        self.misfit = False            # do tokens that the client chose break the grammar?
        self.closes = bool(params.grammar) and params.grammar_param != "tools"
        self.closing_room = sys.maxsize  # room left at which it next computes its way to an end
        self.way_to_end: list[int] | None = None  # tokens with which it could end now, if computed

    @property
    def holds(self) -> bool:
        return self.grammar is not None or self.misfit

    def refusal(self, token: int) -> str | None:
        """Feed the grammar a token that its mask allows. Returns why the answer cannot go on, None if it can.

        A grammar that breaks at such a token is renewed before the next mask (`AnswerMaker.masked`). Raises
        RuntimeError if its matcher broke by no fault of the client's."""
        if self.misfit:
            return f"prefix_token_ids do not follow {self.param}"
        grammar = self.grammar
        if not grammar or grammar.feed(token) or grammar.may_renew:
            return None
        if grammar.fault:
            raise RuntimeError(f"the matcher of {self.param} broke: {grammar.fault}")
        return f"no answer can follow {self.param}: nothing satisfies it, or it is too large"

    def resume(self, token: int, room: int, chosen: bool):
        """Feed the grammar a token of an earlier worker, or one that the client has chosen."""
        if self.grammar and not self.grammar.feed(token) and chosen:
            self.misfit = True
            self.grammar = None
        self.closing(token, room)

    def closing(self, token: int, room: int) -> list[int] | None:
        """The tokens that complete the format, to be written in place of this one, if the `room` tokens left
        after it would be too few for that; None if the token may stay."""
        if not self.closes or not self.grammar or token in self.grammar.ends:
            return None
        before = self.way_to_end
        self.way_to_end = None
        if room > self.closing_room:
            return None
        with suppress(LookupError):
            if (way := self.grammar.way_to_end(room)) is None and before is not None:
                return before
            self.way_to_end = way
        spare = room - len(self.way_to_end or ())
        self.closing_room = room - (spare // 4 if spare > self.NEAR else 1)
        return None

    def force(self, token: int, room: int):
        if self.grammar:
            self.grammar.feed(token)
            self.closing(token, room)

    def allows(self, tokens: Seq[int]) -> bool:
        return not self.grammar or self.grammar.matcher.validate_tokens(tokens) == len(tokens)


class Answer:
    """The text side of a sequence: token ids in, deltas out, and the decision to stop. When a sequence is
    resumed after a worker died, it is rebuilt from the ids alone."""

    def __init__(self, work: Assignment, tokenizer: Tokenizer, grammar: Grammar | None = None,
                 compiled: Callable[[str], Grammar] | None = None, most: int | None = None,
                 tool: CalculatorTool | None = None):
        """most: tokens that it may have, where the context has no room for max_tokens. tool: of its own, with
        whose results it goes on."""
        self.work = work
        self.text = AnswerText(work, tokenizer)
        self.constraint = Constraint(work.params, tokenizer, grammar, compiled)
        self.thinking_ends = work.thinking_ends  # its reasoning ends after this many tokens; None: no limit
        self.thinking_ended = False    # did `_end_of_thinking` end it?
        self.tool = tool
        # tokens to write before any is drawn: the calculator's result for the prompt or a chosen beginning
        self.owed = self.tool.continue_prompt(work.prompt_ids) if self.tool else []
        self.repetition = RepetitionFinder() if work.params.stop_on_repetition else None
        self.repeats_itself = False
        self.eos_tokens = frozenset() if work.params.ignore_eos else tokenizer.stop_tokens
        self.stop_tokens = self.eos_tokens | frozenset(work.params.stop_token_ids)
        self.reason: str | None = None  # finish_reason; stop_reason is its cause
        self.stop_reason: str | None = None
        for count, token in enumerate(work.resumed_ids, 1):
            if self.tool:
                self.owed = self.tool.feed(token)  # of all but the last the resumed ids contain it
            room = (work.max_tokens if most is None else most) - count
            self.constraint.resume(token, room, not work.resumed_sent)
            self._read(token)
            self._end_of_thinking()    # only sets thinking_ended
            if self.awaits_grammar:
                self.hold_call()
        if self.text.lines:
            self.text.lines.resume()
        if work.resumed_sent:
            self.take()                # it was sent together with the ids

    @property
    def grammar(self) -> Grammar | None:
        """What its next token must follow."""
        return self.constraint.grammar

    @property
    def reasoning_tokens(self) -> int:
        return self.text.reasoning_tokens

    def take(self) -> tuple[Delta, ...]:
        """What is new since the last call."""
        return self.text.take()

    def push(self, token: int, generated: int, room: int) -> list[int]:
        """Add the `generated`-th token and its text, with room for `room` more; it may end the answer.

        Returns the tokens added: this one and any forced after it; near the limit, those forced in its
        place."""
        limit = "max_tokens" if generated + room >= self.work.max_tokens else "context_length"
        if self.owed and not self.constraint.holds:
            owed = self.owed[:room + 1]
            self.owed = []
            self._force(owed, room + 1)
            if len(owed) > room:
                self._end("length", limit)
            return owed
        if self.constraint.holds:
            ended = self._constrained(token, room, limit)
            if ended:
                return ended
        may_stop = generated >= self.work.params.min_tokens
        if may_stop and token in self.stop_tokens:
            self._end("stop", "eos" if token in self.eos_tokens else str(token))
        else:
            self._read(token)
            self._end_if_complete(may_stop)
        if self.reason is not None:
            return [token]
        forced = self.tool.feed(token) if self.tool else []
        forced = (forced or self._end_of_thinking())[:room]
        self._force(forced, room)
        if len(forced) >= room:
            self._end("length", limit)
        return [token, *forced]

    def _end_if_complete(self, may_stop: bool):
        """End the answer if its text, its grammar or its repetitions say so. may_stop: has it so many tokens
        that a repetition may end it?"""
        cause = self.text.cut_by
        if cause:
            self._end("stop", cause)
        elif self.text.lines and self.text.lines.ended_by:
            self._end("length", self.text.lines.ended_by)
        elif self.grammar and self.grammar.complete:
            self._end("stop", "grammar")
        elif may_stop and self._may_end_as_repetition:
            self._end("stop", "repetition")

    @property
    def _may_end_as_repetition(self) -> bool:
        """Formats have as many equal parts as they want, and half a call should not be made."""
        return self.repeats_itself and not self.grammar and not self.text.calls

    def _constrained(self, token: int, room: int, limit: str) -> list[int] | None:
        """Feed the constraint a token. If that ends the answer, the tokens added instead of it."""
        constraint = self.constraint
        refusal = constraint.refusal(token)
        if refusal is not None:
            self._end("refused", refusal)
            return [token]
        closing = constraint.closing(token, room)
        if closing is None:
            return None
        assert constraint.grammar
        constraint.grammar.take_back()
        self._force(closing, room + 1)
        self._end("stop", limit)
        return closing

    def _end(self, reason: str, cause: str):
        self.reason = reason
        self.stop_reason = cause
        self.text.finish(cut=reason == "length")
        if reason == "length" and self.text.stops.stopped_by is not None:
            self.reason = "stop"
            self.stop_reason = self.text.stops.stopped_by

    def _force(self, tokens: Seq[int], room: int):
        for count, token in enumerate(tokens, 1):
            self.constraint.force(token, room - count)
            self._read(token)

    def _read(self, token: int):
        self.text.push(token)
        if self.repetition:
            self.repeats_itself = self.repetition.push(token)
        constraint = self.constraint
        if constraint.of_calls and constraint.grammar and self.text.reader:
            self.text.reader.deltas.begun_call = None  # that call is within this grammar
            if constraint.grammar.complete:
                constraint.grammar = None

    # calls whose arguments follow a grammar

    @property
    def awaits_grammar(self) -> bool:
        """Has a call begun whose arguments must follow a grammar?"""
        if not (of_calls := self.constraint.of_calls) or not self.text.reader:
            return False
        begun = self.text.reader.deltas.begun_call
        return begun is not None and begun.name in of_calls

    def hold_call(self):
        """Have the arguments that begin here follow their grammar, unless their first token already broke
        it."""
        constraint = self.constraint
        reader = self.text.reader
        assert reader and reader.deltas.begun_call and constraint.compiled
        (_, read, name), reader.deltas.begun_call = reader.deltas.begun_call, None
        grammar = constraint.compiled(constraint.of_calls[name])
        if grammar.feed_text(without_calls(read)):
            constraint.grammar = grammar

    # the end of reasoning

    def end_thinking(self) -> int | None:
        """End its reasoning with the next token. Returns the number of that token, None if it is not
        reasoning now. With this number in the assignment, another worker ends the reasoning at the same
        position."""
        if not self.text.thinking:
            return None
        if self.thinking_ends is None:
            self.thinking_ends = self.text.count + 1
        return self.thinking_ends

    def _end_of_thinking(self) -> list[int]:
        """The tokens that end its reasoning here, usually none: if it has used up its budget, or the client
        asked to end it. They never come in the middle of a character."""
        text = self.text
        params = self.work.params
        if not text.reader or not text.thinking or text.decoder.utf8.getstate()[0]:
            return []
        asked = self.thinking_ends is not None and text.count >= self.thinking_ends
        if not asked and (params.thinking_budget is None or text.thoughts < params.thinking_budget):
            return []
        again = self.thinking_ended
        tokens = text.reader.end_of_thinking("" if again else params.last_thought, again)
        if not self.constraint.allows(tokens):
            return []  # the grammar allows no end of reasoning here
        self.thinking_ended = True
        return tokens
