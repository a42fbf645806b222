"""Sums of squares of what the matrices of experts read: `ExpertSums`.

One op computes a whole mixture, so a step can copy only its input and its router's logits. Which experts a
token has follows from the logits. What an expert's `down` reads is made within the op; it is computed again
here, with the expert's weights as floats. For that many tokens wait, because each expert is unpacked once for
all that wait."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TYPE_CHECKING

import numpy

from chatlm.common.processes.start import own_threads
from chatlm.export.gguf.activations import GATES, UNGATED, sigmoid
from chatlm.export.gguf.importance import SquareSums
from chatlm.worker.arrays.kinds import floats
from chatlm.worker.model.tensors import Cut

if TYPE_CHECKING:
    from chatlm.worker.model.tensors import Unread

MOST_WAITING = 1 << 27  # values of inputs, 0.5 GB


class ExpertLayer(NamedTuple):
    """A layer's experts."""

    up: str                       # our names of their matrices
    down: str
    activation: str
    options: Mapping[str, Any]    # how a token's experts are chosen, as the op `experts` gets it


class RoutedTokens(NamedTuple):
    """What a step gave a mixture."""

    x: numpy.ndarray       # (T, C) float32, after the norm
    chosen: numpy.ndarray  # (T, E) bool: which experts each token has


@dataclass
class ExpertSums:
    """Adds up, for each expert, the squares of what its matrices read of the tokens that it gets."""

    tensors: Mapping[str, Unread]   # the model's, which become float32 when they are read
    sums: dict[str, SquareSums] = field(default_factory=dict)  # our matrix -> float64 (E, K), and tokens (E,)
    mixtures: dict[str, ExpertLayer] = field(default_factory=dict)      # by the name of their first matrix
    waiting: dict[str, list[RoutedTokens]] = field(default_factory=dict)  # likewise
    held: int = 0                   # values of inputs in `waiting`

    def add(self, mixture: ExpertLayer, x: numpy.ndarray, logits: numpy.ndarray):
        """x (T, >= C) after the norm, and the router's logits (T, E), of a step's tokens."""
        columns = self.tensors[mixture.up].cut.full[1]
        x = x[:, :columns].astype(numpy.float32)
        self.mixtures[mixture.up] = mixture
        routed = RoutedTokens(x, chosen_experts(logits, mixture.options))
        self.waiting.setdefault(mixture.up, []).append(routed)
        self.held += x.size
        if self.held >= MOST_WAITING:
            self.finish()

    def finish(self):
        """Count all tokens that wait."""
        for name, steps in self.waiting.items():
            x, chosen = map(numpy.concatenate, zip(*steps))
            self.count(self.mixtures[name], x, chosen)
        self.waiting.clear()
        self.held = 0

    def count(self, mixture: ExpertLayer, x: numpy.ndarray, chosen: numpy.ndarray):
        experts = chosen.shape[1]
        tokens = chosen.sum(0)
        of_up = chosen.T.astype(numpy.float64) @ numpy.square(x, dtype=numpy.float64)
        of_down = numpy.zeros((experts, self.tensors[mixture.down].cut.full[1]))

        def squares_of(expert: int) -> numpy.ndarray:
            hidden = self.hidden(mixture, x[chosen[:, expert]], expert, experts)
            return numpy.square(hidden, dtype=numpy.float64).sum(0)

        used = numpy.flatnonzero(tokens).tolist()
        with ThreadPoolExecutor(own_threads()) as pool:
            for expert, squares in zip(used, pool.map(squares_of, used)):
                of_down[expert] = squares
        for name, squares in ((mixture.up, of_up), (mixture.down, of_down)):
            if name not in self.sums:
                self.sums[name] = SquareSums(numpy.zeros_like(squares), numpy.zeros(experts))
            self.sums[name].squares += squares
            self.sums[name].counts += tokens

    def hidden(self, mixture: ExpertLayer, x: numpy.ndarray, expert: int, experts: int) -> numpy.ndarray:
        """(T, F): what an expert's `down` reads of x (T, C)."""
        is_gated = mixture.activation in GATES
        shares = experts * 2 if is_gated else experts
        bias = f"{mixture.up}_bias"
        parts = []
        for index in range(expert, shares, experts):  # the rows of all gates come before all ups
            part = x @ self.share(mixture.up, index, shares).T
            if bias in self.tensors:
                part = part + self.share(bias, index, shares)
            parts.append(part)
        return GATES[mixture.activation](*parts) if is_gated else UNGATED[mixture.activation](*parts)

    def share(self, name: str, index: int, count: int) -> numpy.ndarray:
        """The rows `index` of `count` equal shares of a tensor."""
        tensor = self.tensors[name]
        full = tensor.cut.full
        rows = full[0] // count
        cut = Cut(full, (rows, *full[1:]), 0, (range(index * rows, (index + 1) * rows),))
        read = tensor.less(cut).read()
        return floats(numpy.concatenate(read) if isinstance(read, tuple) else read)


def chosen_experts(logits: numpy.ndarray, options: Mapping[str, Any]) -> numpy.ndarray:
    """bool (T, E): the experts that each row of logits chooses, as in the op `experts` with these options."""
    scores = logits.astype(numpy.float32)
    groups, kept = options.get("groups", (1, 1))
    bias = options.get("correction_bias")
    if options.get("sigmoids"):
        scores = sigmoid(scores)
    elif kept < groups or bias is not None:  # which count with an expert's part in a softmax
        powers = numpy.exp(scores - scores.max(1, keepdims=True))
        scores = powers / powers.sum(1, keepdims=True)
    if bias is not None:
        scores = scores + numpy.asarray(bias, numpy.float32)
    if kept < groups:
        scores = within_groups(scores, groups, kept, options.get("group_best", 2))
    count = 2 if options.get("jitter") is not None else options["chosen"]
    return first_ones(scores, count)


def within_groups(scores: numpy.ndarray, count: int, kept: int, group_best: int) -> numpy.ndarray:
    """The scores, but -inf outside the `kept` of `count` groups whose `group_best` best experts have the
    largest sums."""
    groups = scores.reshape(len(scores), count, -1)
    best = numpy.sort(groups, axis=2)[:, :, -group_best:].sum(2)
    is_kept = first_ones(best, kept)
    return numpy.where(is_kept[:, :, None], groups, -numpy.inf).reshape(scores.shape)


def first_ones(scores: numpy.ndarray, count: int) -> numpy.ndarray:
    """bool, as scores (T, E): True for the `count` largest of a row; of equal ones the first."""
    found = numpy.zeros(scores.shape, bool)
    numpy.put_along_axis(found, numpy.argsort(-scores, axis=1, kind="stable")[:, :count], True, 1)
    return found
