"""The text of an answer, from its tokens; nanochat's calculator."""

from __future__ import annotations

import ast
import operator
import sys
from collections.abc import Callable, Sequence as Seq
from contextlib import suppress
from typing import TYPE_CHECKING

from chatlm.common.messages.requests import Delta
from chatlm.common.text.formats import with_markers
from chatlm.common.text.reader import StopFinder, StreamDecoder, answer_reader

if TYPE_CHECKING:
    from chatlm.common.text.tokenizer import Tokenizer, ToolTokens
    from chatlm.worker.engine.grammar import Grammar
    from chatlm.worker.engine.sequence import Assignment


CALCULATOR_CHARACTERS = 1_000  # also bounds the digits of an integer and the length of a text
CALCULATOR_DEPTH = 50
CALCULATOR_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> str | None:
    """nanochat's calculator: numbers, + - * / // and parentheses, or "text".count("x"); None if no result.

    Drops commas first, as upstream does. Walks the syntax tree and never evaluates code. Size, depth and time
    are bounded (without powers a product has no more digits than the expression), so any thread may run it.
    """
    expression = expression.replace(",", "").strip(" \t")
    if len(expression) > CALCULATOR_CHARACTERS:
        return None
    try:
        value = evaluate_node(ast.parse(expression, mode="eval").body, CALCULATOR_DEPTH)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    return None if isinstance(value, str) else str(value)


def evaluate_node(node: ast.expr, depth: int) -> int | float | str:
    """The value of one node of the calculator's syntax tree; ValueError for anything it does not support."""
    if depth == 0:
        raise ValueError("nested too deeply")
    match node:
        case ast.Constant(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return value
        case ast.UnaryOp() | ast.BinOp() if type(node.op) in CALCULATOR_OPERATORS:
            parts = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
            values = [evaluate_node(part, depth - 1) for part in parts]
            if not any(isinstance(value, str) for value in values):
                return CALCULATOR_OPERATORS[type(node.op)](*values)
        case ast.Call(ast.Attribute(text, "count"), [part], []):
            text, part = evaluate_node(text, depth - 1), evaluate_node(part, depth - 1)
            if isinstance(text, str) and isinstance(part, str):
                return text.count(part)
    raise ValueError("not arithmetic and not a count")


class CalculatorTool:
    """nanochat's tool protocol: `<|python_start|>` expression `<|python_end|>` is answered by forced tokens
    `<|output_start|>` result `<|output_end|>` (upstream nanochat/engine.py, Engine.generate)."""

    def __init__(self, tokenizer: Tokenizer, ids: ToolTokens):
        self.tokenizer, self.ids = tokenizer, ids
        self.expression: list[int] | None = None  # tokens since python_start

    def feed(self, token: int) -> list[int]:
        """Read one token of the answer; returns the tokens to force after it (usually none)."""
        ids, expression = self.ids, self.expression
        if token == ids.python_start:
            self.expression = []
        elif token == ids.python_end:
            self.expression = None
            if (expression is not None
                    and (result := calculate(self.tokenizer.decode(expression))) is not None):
                return [ids.output_start, *self.tokenizer.encode(result), ids.output_end]
        elif expression is not None:
            expression.append(token)
        return []


class RepeatedCalls:
    """Holds back a call as long as it repeats the one before it: a model that must call functions, and may
    call several, repeats itself when it has nothing to add."""

    def __init__(self):
        self.before = ("", "")     # the name and the arguments of the previous call
        self.name, self.parts = "", []
        self.repeated = 0          # how many characters of the previous call were repeated
        self.holding = self.complete = False  # complete: all of them were

    def push(self, more: Delta) -> Delta:
        """What can be sent now."""
        if more.name:
            self.before, self.name, self.parts = (self.name, "".join(self.parts)), more.name, []
            self.repeated, self.holding = 0, self.name == self.before[0]
        self.parts.append(more.text)
        if not self.holding:
            return more
        arguments = self.before[1]
        self.holding = arguments.startswith(more.text, self.repeated)
        self.repeated += len(more.text)
        self.complete = self.holding and self.repeated == len(arguments)
        return Delta("call", "") if self.holding else Delta("call", "".join(self.parts), self.name)


class Answer:
    """The text side of a sequence: token ids in, deltas out, and the decision to stop.

    Rebuilt from the ids alone when a sequence is resumed after a worker died. Stop strings are searched for
    only in the content, not in reasoning or calls. `most`: the most tokens it may have, if the context has no
    room for max_tokens."""

    NEAR = 32  # spare tokens below which an answer in a format computes its way to an end after every token

    def __init__(self, work: Assignment, tokenizer: Tokenizer, grammar: Grammar | None = None,
                 compiled: Callable[[str], Grammar] | None = None, most: int | None = None):
        self.work, self.grammar, params = work, grammar, work.params
        self.compiled = compiled       # makes a grammar from its source
        self.closes = bool(params.grammar) and params.grammar_param != "tools"  # see `_closing`
        self.closing_room = sys.maxsize  # room left at which it next computes its way to an end
        self.way_to_end: list[int] | None = None  # tokens with which it could end now, if computed
        self.call_grammars = {name: with_markers(source, tokenizer.markers) for name, source in zip(
            params.tool_names, params.call_grammars) if source}
        self.reader = answer_reader(tokenizer, params, work.prompt_ids)
        marks = tokenizer.marks(bool(self.reader.names)) if self.reader else {}
        self.decoder, self.stops = StreamDecoder(tokenizer, marks), StopFinder(params.stop)
        self.unsent: list[Delta] = []
        self.calls = 0
        self.reasoning_tokens = self.count = 0  # count: all tokens so far
        self.thoughts = 0              # tokens of reasoning, without its markers
        self.thinking_ends = work.thinking_ends  # its reasoning ends after this many tokens; None: no limit
        self.thinking_ended = False    # did `_end_of_thinking` end it?
        self.tool = CalculatorTool(tokenizer, tokenizer.tool_tokens) if tokenizer.tool_tokens else None
        self.eos_tokens = frozenset() if params.ignore_eos else tokenizer.stop_tokens
        self.stop_tokens = self.eos_tokens | frozenset(params.stop_token_ids)
        self.reason: str | None = None  # finish_reason; stop_reason is its cause
        self.stop_reason: str | None = None
        self.repeated = RepeatedCalls() if params.grammar and params.grammar_param == "tools" else None
        self.misfit = False            # do the tokens that its client chose break the grammar?
        for count, token in enumerate(work.resumed_ids, 1):
            if self.tool:
                self.tool.feed(token)  # the resumed ids already contain what it forced
            if self.grammar and not self.grammar.feed(token) and not work.resumed_sent:
                self.misfit, self.grammar = True, None
            if self.grammar:
                self._closing(token, (work.max_tokens if most is None else most) - count)
            self._read(token)
            self._end_of_thinking()    # only sets thinking_ended
            if self.awaits_grammar:
                self.hold_call()
        if work.resumed_sent:
            self.take()                # it was sent together with the ids

    def _read(self, token: int):
        """Turn a token into reasoning, content or calls; counts those of reasoning and its markers."""
        text, thinking = self.decoder.push(token), self.reader and self.reader.thinking
        self.count += 1
        if not self.reader:  # everything is content
            return self._add_text(text)
        self.reader.push(text)
        self.thoughts += bool(thinking)
        self.reasoning_tokens += thinking or self.reader.thinking
        if self.grammar and self.call_grammars:
            self.reader.deltas.begun_call = None  # that call is within this grammar
            if self.grammar.complete:
                self.grammar = None
        return self._add_read()

    @property
    def awaits_grammar(self) -> bool:
        """Has a call begun whose arguments must match a grammar?"""
        begun = self.reader.deltas.begun_call if self.call_grammars and self.reader else None
        return bool(begun and begun.name in self.call_grammars)

    def hold_call(self):
        """Hold the arguments that begin here to their grammar, unless their first token already broke it."""
        assert self.reader and self.reader.deltas.begun_call and self.compiled
        (_, read, name), self.reader.deltas.begun_call = self.reader.deltas.begun_call, None
        grammar = self.compiled(self.call_grammars[name])
        if grammar.feed_text(read):
            self.grammar = grammar

    def end_thinking(self) -> int | None:
        """End its reasoning with the next token. Returns the number of that token; None if it is not
        reasoning now. With this number in the assignment, another worker ends it at the same position."""
        if not (self.reader and self.reader.thinking):
            return None
        if self.thinking_ends is None:
            self.thinking_ends = self.count + 1
        return self.thinking_ends

    def _end_of_thinking(self) -> list[int]:
        """The tokens that end its reasoning here, if it has used up its budget or the client asked to end it;
        usually none. Never in the middle of a character."""
        reader, params = self.reader, self.work.params
        if not (reader and reader.thinking) or self.decoder.utf8.getstate()[0]:
            return []
        asked = self.thinking_ends is not None and self.count >= self.thinking_ends
        if not asked and (params.thinking_budget is None or self.thoughts < params.thinking_budget):
            return []
        again = self.thinking_ended
        tokens = reader.end_of_thinking("" if again else params.last_thought, again)
        if self.grammar and self.grammar.matcher.validate_tokens(tokens) < len(tokens):
            return []  # the grammar allows no end of reasoning here
        self.thinking_ended = True
        return tokens

    def _add_read(self):
        """Add the reader's new deltas, up to a stop string."""
        for delta in self.reader.take() if self.reader else ():
            self.calls += bool(delta.name)
            if self.over_calls or self.repeated and self.repeated.complete:
                return
            if self.repeated and delta.kind == "call":
                delta = self.repeated.push(delta)
            if delta.kind == "text":
                self._add_text(delta.text)
                continue
            self._add(Delta("text", self.stops.finish()))  # no stop string spans reasoning or a call
            if self.stops.stopped_by is None:
                self._add(delta)

    @property
    def over_calls(self) -> bool:
        """Has a second call begun although only one is allowed?"""
        return self.calls > 1 and not self.work.params.parallel_calls

    def _add_text(self, text: str):
        """Add text up to a stop string; stop strings in the first `min_tokens` tokens are ignored."""
        if self.count > self.work.params.min_tokens:
            text = self.stops.push(text)
        self._add(Delta("text", text))

    def _add(self, delta: Delta):
        """Append to the unsent deltas, merging with the last one of the same kind; calls are not merged."""
        if not delta.text and not delta.name:
            return
        if self.unsent and self.unsent[-1].kind == delta.kind != "call":
            delta = Delta(delta.kind, self.unsent.pop().text + delta.text)
        self.unsent.append(delta)

    def take(self) -> tuple[Delta, ...]:
        """What is new since the last call."""
        unsent, self.unsent = tuple(self.unsent), []
        return unsent

    def _closing(self, token: int, room: int) -> list[int] | None:
        """The tokens to write in place of this one to complete the format, if the `room` tokens left after it
        would be too few to do so; None if the token may stay.

        So an answer in a format is complete even if the model would never end it. Calls are not completed
        this way: a truncated call must not be made."""
        if not self.closes or not self.grammar or token in self.grammar.ends:
            return None
        before, self.way_to_end = self.way_to_end, None
        if room > self.closing_room:
            return None
        with suppress(LookupError):
            if (way := self.grammar.way_to_end(room)) is None and before is not None:
                return before
            self.way_to_end = way
        spare = room - len(self.way_to_end or ())
        self.closing_room = room - (spare // 4 if spare > self.NEAR else 1)
        return None

    def push(self, token: int, generated: int, room: int) -> list[int]:
        """Add the `generated`-th token and its text, with room for `room` more; it may end the answer.
        Returns the tokens added: it and any forced after it; near the limit, those forced in its place."""
        last = "max_tokens" if generated + room >= self.work.max_tokens else "context_length"
        if self.misfit:
            self._end("refused", f"prefix_token_ids do not follow {self.work.params.grammar_param}")
        elif self.grammar and not self.grammar.feed(token):
            self._end("refused", f"no answer can follow {self.work.params.grammar_param}: nothing satisfies "
                                 "it, or it is too large")
        elif self.grammar and (closing := self._closing(token, room)) is not None:
            self.grammar.take_back()
            self._force(closing, room + 1)
            self._end("stop", last)
            return closing
        else:
            self._add_token(token, generated)
        if self.reason is not None:
            return [token]
        forced = ((self.tool.feed(token) if self.tool else []) or self._end_of_thinking())[:room]
        self._force(forced, room)
        if len(forced) >= room:
            self._end("length", last)
        return [token, *forced]

    def _add_token(self, token: int, generated: int):
        """Add the text of a drawn token, which may end the answer."""
        if token in self.stop_tokens and generated >= self.work.params.min_tokens:
            return self._end("stop", "eos" if token in self.eos_tokens else str(token))
        self._read(token)
        if self.stops.stopped_by is not None:
            self._end("stop", self.stops.stopped_by)
        elif self.over_calls:
            self._end("stop", "parallel_tool_calls")
        elif self.repeated and self.repeated.complete:
            self._end("stop", "repeated call")
        elif self.grammar and self.grammar.complete:
            self._end("stop", "grammar")

    def _force(self, tokens: Seq[int], room: int):
        for count, token in enumerate(tokens, 1):
            if self.grammar:
                self.grammar.feed(token)
                self._closing(token, room - count)
            self._read(token)

    def _end(self, reason: str, cause: str):
        self.reason, self.stop_reason = reason, cause
        if self.reader:
            self.reader.finish(cut=reason == "length")
            self._add_read()
        self._add(Delta("text", self.stops.finish()))
        if reason == "length" and self.stops.stopped_by is not None:
            self.reason, self.stop_reason = "stop", self.stops.stopped_by
