"""Windows in memory, and the passages whose windows are nearest to a vector.

A window is a vector of D int8 numbers and a scale. The vector that is asked about becomes whole numbers too,
small enough that a sum of its products stays within 2**24. float32 has all whole numbers up to there, so a
score has the same bits on every machine, whatever adds the products in whatever order. (For D = 384 that is
341 steps to each side, where the windows have 127.)"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence as Seq
from functools import cached_property
from typing import NamedTuple

import numpy

from chatlm.front.annexes.knowledge.vectors.messages import Near

EXACT = 1 << 24            # float32 has all whole numbers up to here
ADDED = 512                # products that are added as float32, at most; sums of these are added as float64
BLOCK_NUMBERS = 1 << 21    # of the vectors of a block


class Block:
    """Windows that are compared together, by passage.

    vectors: (N, D) int8; scales: (N,) float64; passages, files: (N,) int64."""

    def __init__(self, vectors: numpy.ndarray, scales: numpy.ndarray, passages: numpy.ndarray,
                 files: numpy.ndarray):
        if len(passages) > 1 and (numpy.diff(passages) < 0).any():
            order = numpy.argsort(passages, kind="stable")
            vectors, scales, passages, files = (each[order] for each in (vectors, scales, passages, files))
        self.vectors = vectors
        self.scales = scales
        self.passages = passages
        self.files = files

    def __len__(self) -> int:
        return len(self.scales)

    @property
    def bytes(self) -> int:
        return self.vectors.nbytes + self.scales.nbytes + self.passages.nbytes + self.files.nbytes

    @cached_property
    def firsts(self) -> numpy.ndarray:
        """The index of each passage's first window."""
        changes = numpy.flatnonzero(numpy.diff(self.passages)) + 1
        return numpy.concatenate([numpy.zeros(1, numpy.int64), changes])

    def joined(self, other: Block) -> Block:
        return Block(*(numpy.concatenate([getattr(self, name), getattr(other, name)])
                       for name in ("vectors", "scales", "passages", "files")))


def rows_of_block(size: int) -> int:
    """How many vectors of `size` numbers a block has."""
    return max(1, BLOCK_NUMBERS // size)


class Question:
    """A vector in whole numbers, as float32: times `scale`."""

    def __init__(self, vector: numpy.ndarray):
        """vector: (D,) float32."""
        self.size = len(vector)
        self.added = math.ceil(self.size / math.ceil(self.size / ADDED))
        steps = EXACT // (128 * self.added)
        largest = float(numpy.abs(vector).max(initial=0.0))
        self.scale = largest / steps or 1.0
        self.numbers = numpy.rint(vector.astype(numpy.float64) / self.scale).astype(numpy.float32)
        self.room = numpy.empty((0, self.size), numpy.float32)

    def scores(self, block: Block) -> numpy.ndarray:
        """The cosine with each window: (N,) float64."""
        rows = len(block)
        if rows > len(self.room):
            self.room = numpy.empty((rows, self.size), numpy.float32)
        numbers = self.room[:rows]
        numpy.copyto(numbers, block.vectors)
        sums = numpy.zeros(rows)
        for begin in range(0, self.size, self.added):
            part = slice(begin, begin + self.added)
            sums += numbers[:, part] @ self.numbers[part]
        return sums * (block.scales * self.scale)


class Candidate(NamedTuple):
    """Passages of a block with their best scores: three arrays of the same length."""

    scores: numpy.ndarray
    files: numpy.ndarray
    passages: numpy.ndarray


class Best:
    """The passages that are nearest, while blocks are compared one after another."""

    def __init__(self, question: Question, most: int, others: Seq[int] = ()):
        """others: passages that are scored in any case."""
        self.question = question
        self.most = most
        self.others = numpy.unique(numpy.array(others, numpy.int64))
        self.nearest: list[Candidate] = []
        self.wanted: list[Candidate] = []
        self.windows = 0

    def compare(self, block: Block, of_files: numpy.ndarray):
        """of_files: the numbers of the files that count, ascending."""
        firsts = block.firsts
        files = block.files[firsts]
        counts = is_among(files, of_files)
        if not counts.any():
            return
        scores = numpy.maximum.reduceat(self.question.scores(block), firsts)
        passages = block.passages[firsts]
        self.windows += int(numpy.diff(firsts, append=len(block))[counts].sum())
        whole = Candidate(scores, files, passages)
        wanted = numpy.flatnonzero(counts & is_among(passages, self.others))
        if len(wanted):
            self.wanted.append(taken(whole, wanted))
        near = numpy.flatnonzero(counts)
        if len(near) > self.most:  # and all that are as near as the last of them
            least = -numpy.partition(-scores[near], self.most - 1)[self.most - 1]
            near = near[scores[near] >= least]
        self.nearest.append(ordered([taken(whole, near)], self.most))

    def result(self) -> tuple[tuple[Near, ...], tuple[Near, ...]]:
        """The passages that are nearest, and those of `others`."""
        nearest = as_near(ordered(self.nearest, self.most))
        return nearest, as_near(ordered(self.wanted, len(self.others)))


def is_among(values: numpy.ndarray, sorted_values: numpy.ndarray) -> numpy.ndarray:
    """Which of `values` are in `sorted_values`, which ascend."""
    if not len(sorted_values):
        return numpy.zeros(len(values), bool)
    places = numpy.searchsorted(sorted_values, values)
    return sorted_values[numpy.minimum(places, len(sorted_values) - 1)] == values


def taken(candidate: Candidate, indices: numpy.ndarray) -> Candidate:
    return Candidate(*(values[indices] for values in candidate))


def ordered(candidates: Iterable[Candidate], most: int) -> Candidate:
    """The first passages, by score, then by file and number. A passage that is in two blocks has its better
    score."""
    scores, files, passages = (numpy.concatenate([numpy.zeros(0), *values]) for values in zip(
        Candidate(*(numpy.zeros(0, kind) for kind in (float, numpy.int64, numpy.int64))), *candidates))
    order = numpy.lexsort((passages, files, -scores))
    _, first = numpy.unique(passages[order], return_index=True)
    order = order[numpy.sort(first)][:most]
    return Candidate(scores[order], files[order], passages[order])


def as_near(candidate: Candidate) -> tuple[Near, ...]:
    scores, files, passages = (values.tolist() for values in candidate)
    return tuple(Near(int(passage), int(file), score)
                 for score, file, passage in zip(scores, files, passages))
