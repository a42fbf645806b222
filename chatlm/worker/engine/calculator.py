"""nanochat's calculator, a tool whose results a model reads as forced tokens."""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Sequence as Seq
from typing import Any, TYPE_CHECKING

if TYPE_CHECKING:
    from chatlm.common.text.tokenizer import Tokenizer, ToolTokens


CALCULATOR_CHARACTERS = 1_000  # also bounds the digits of an integer and the length of a text
CALCULATOR_DEPTH = 200         # as many brackets as Python's own parser allows

# What upstream lets through to Python (nanochat/engine.py, use_calculator).
ARITHMETIC = re.compile(r"[0-9*+\-/.() ]*")
WITH_TEXTS = re.compile(r"[a-zA-Z0-9'\"()._ ]*")
UPSTREAM_REFUSES = (
    "__", "import", "exec", "eval", "compile", "open", "file", "input", "raw_input", "globals", "locals",
    "vars", "dir", "getattr", "setattr", "delattr", "hasattr")

CALCULATOR_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.UAdd: operator.pos, ast.USub: operator.neg, ast.Not: operator.not_}
CALCULATOR_METHODS: dict[type, tuple[str, ...]] = {  # none makes a value that is longer than what it is given
    str: ("count", "find", "rfind", "index", "rindex", "startswith", "endswith", "upper", "lower", "title",
          "capitalize", "swapcase", "casefold", "strip", "lstrip", "rstrip", "removeprefix", "removesuffix",
          "split", "rsplit", "splitlines", "partition", "rpartition", "isalnum", "isalpha", "isascii",
          "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle",
          "isupper"),
    list: ("count", "index"),
    tuple: ("count", "index")}
CALCULATOR_METHODS[bytes] = tuple(name for name in CALCULATOR_METHODS[str] if hasattr(bytes, name))


def calculate(expression: str) -> str | None:
    """nanochat's calculator: arithmetic without powers, or texts of which one is counted; None if no result.

    Checks the characters and words as upstream does, which then calls `eval`. This walks the syntax tree
    instead and never runs code. Size, depth and time are bounded (without powers a product has no more digits
    than the expression, and no method makes anything longer), so any thread may run it.
    docs/models/families.md says what upstream computes and this does not.
    """
    expression = expression.replace(",", "")
    if len(expression) > CALCULATOR_CHARACTERS or not is_allowed(expression):
        return None
    try:
        value = evaluate_node(parse_expression(expression), CALCULATOR_DEPTH)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return None
    return None if value is None else str(value)


def is_allowed(expression: str) -> bool:
    """Whether upstream would evaluate it."""
    if ARITHMETIC.fullmatch(expression):
        return "**" not in expression
    return bool(WITH_TEXTS.fullmatch(expression) and ".count(" in expression
                and not any(word in expression.lower() for word in UPSTREAM_REFUSES))


def parse_expression(expression: str) -> ast.expr:
    """The syntax tree of what Python can compile. It warns of what is odd, such as a call of a number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(expression.lstrip(" "), mode="eval")
        compile(tree, "calculator", "eval")  # finds errors in parts that are never evaluated
    return tree.body


def evaluate_node(node: ast.expr, depth: int) -> Any:
    """The value of one node of the calculator's syntax tree. ValueError for anything it does not support,
    TypeError for values that an operator or method does not take."""
    if depth == 0:
        raise ValueError("nested too deeply")
    match node:
        case ast.Constant(value):
            return value
        case ast.JoinedStr(parts):  # f"text"; no brace is allowed, so no part has to be computed
            return "".join([str(part.value) for part in parts if isinstance(part, ast.Constant)])
        case ast.Tuple([]):
            return ()
        case ast.BinOp():
            return evaluate_sum(node, depth - 1)
        case ast.UnaryOp(operation, operand) if type(operation) in CALCULATOR_OPERATORS:
            return CALCULATOR_OPERATORS[type(operation)](evaluate_node(operand, depth - 1))
        case ast.BoolOp(operation, parts):
            value = None
            for part in parts:
                value = evaluate_node(part, depth - 1)
                if bool(value) == isinstance(operation, ast.Or):
                    break
            return value
        case ast.IfExp(condition, chosen, other):
            return evaluate_node(chosen if evaluate_node(condition, depth - 1) else other, depth - 1)
        case ast.Compare(left, [ast.In() | ast.NotIn() as operation], [right]):
            part = evaluate_node(left, depth - 1)
            whole = evaluate_node(right, depth - 1)
            return operator.contains(whole, part) == isinstance(operation, ast.In)
        case ast.Call(ast.Attribute(owner, name), [] | [_], []):
            value = evaluate_node(owner, depth - 1)
            if name in CALCULATOR_METHODS.get(type(value), ()):
                return getattr(value, name)(*(evaluate_node(each, depth - 1) for each in node.args))
    raise ValueError("neither arithmetic nor a text and its methods")


def evaluate_sum(node: ast.expr, depth: int) -> Any:
    """The value of operators in a row. They nest, as (1+2)+3, and may be more than a stack is deep."""
    terms = []
    while isinstance(node, ast.BinOp):
        terms.append((node.op, node.right))
        node = node.left
    value = evaluate_node(node, depth)
    for operation, right in reversed(terms):
        if type(operation) not in CALCULATOR_OPERATORS:
            raise ValueError("an operator that the calculator does not have")
        value = CALCULATOR_OPERATORS[type(operation)](value, evaluate_node(right, depth))
    return value


class CalculatorTool:
    """nanochat's tool protocol: `<|python_start|>` expression `<|python_end|>` is answered by forced tokens
    `<|output_start|>` result `<|output_end|>` (upstream nanochat/engine.py, Engine.generate)."""

    def __init__(self, tokenizer: Tokenizer, ids: ToolTokens):
        self.tokenizer = tokenizer
        self.ids = ids
        self.expression: list[int] | None = None  # tokens since python_start

    def continue_prompt(self, prompt_ids: Seq[int]) -> list[int]:
        """Read the call that a prompt ends in, if it does; returns the tokens to force behind the prompt."""
        latest = prompt_ids[-CALCULATOR_CHARACTERS:]
        forced = list[int]()
        end = len(latest) - (latest[-1:] == (self.ids.python_end,))
        for place in range(end - 1, -1, -1):
            if latest[place] in self.tokenizer.special_names:
                for token in latest[place:] if latest[place] == self.ids.python_start else ():
                    forced = self.feed(token)
                break
        return forced

    def feed(self, token: int) -> list[int]:
        """Read one token of the answer; returns the tokens to force after it (usually none)."""
        ids = self.ids
        expression = self.expression
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


def calculator_of(tokenizer: Tokenizer) -> CalculatorTool:
    """What reads an answer's calls; its tokens must have a calculator's."""
    assert tokenizer.tool_tokens
    return CalculatorTool(tokenizer, tokenizer.tool_tokens)
