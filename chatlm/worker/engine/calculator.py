"""nanochat's calculator, a tool whose results a model reads as forced tokens."""

from __future__ import annotations

import ast
import operator
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chatlm.common.text.tokenizer import Tokenizer, ToolTokens


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

    def continue_prompt(self, prompt_ids: Seq[int]) -> list[int]:
        """Read the call that a prompt ends in, if it does; returns the tokens to force behind the prompt."""
        latest, forced = prompt_ids[-CALCULATOR_CHARACTERS:], list[int]()
        end = len(latest) - (latest[-1:] == (self.ids.python_end,))
        for place in range(end - 1, -1, -1):
            if latest[place] in self.tokenizer.special_names:
                for token in latest[place:] if latest[place] == self.ids.python_start else ():
                    forced = self.feed(token)
                break
        return forced

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
