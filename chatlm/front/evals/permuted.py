"""The order in which nanochat's chat tasks take their rows: numpy's `default_rng(seed).permutation(n)`.

The front has no numpy; these are its SeedSequence, PCG64 (O'Neill, 2014) and Fisher-Yates, for seeds below
2**32."""

from __future__ import annotations

from collections.abc import Iterator

LOW_32 = (1 << 32) - 1
LOW_64 = (1 << 64) - 1
LOW_128 = (1 << 128) - 1
MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645


class Hash:
    """SeedSequence's hash of 32-bit words, whose constant changes with each of them."""

    def __init__(self, constant: int, multiplier: int):
        self.constant = constant
        self.multiplier = multiplier

    def __call__(self, word: int) -> int:
        word ^= self.constant
        self.constant = self.constant * self.multiplier & LOW_32
        word = word * self.constant & LOW_32
        return word ^ word >> 16


def mixed(first: int, second: int) -> int:
    word = (0xCA01F9DD * first - 0x4973F715 * second) & LOW_32
    return word ^ word >> 16


def seed_words(seed: int) -> list[int]:
    """The eight words with which PCG64 begins."""
    hashed = Hash(0x43B0D7E5, 0x931E8875)
    pool = [hashed(word) for word in (seed, 0, 0, 0)]
    for source in range(4):
        for target in range(4):
            if source != target:
                pool[target] = mixed(pool[target], hashed(pool[source]))
    hashed = Hash(0x8B51F9DD, 0x58F38DED)
    return [hashed(pool[place % 4]) for place in range(8)]


def random_words(seed: int) -> Iterator[int]:
    """PCG64's numbers of 32 bits: of each of 64 the low half first."""
    words = seed_words(seed)
    high, low, *stream = (words[place] | words[place + 1] << 32 for place in (0, 2, 4, 6))
    increment = (stream[0] << 64 | stream[1]) << 1 & LOW_128 | 1
    state = (increment + (high << 64 | low)) * MULTIPLIER + increment & LOW_128
    while True:
        state = state * MULTIPLIER + increment & LOW_128
        turn = state >> 122
        value = (state >> 64 ^ state) & LOW_64
        value = value >> turn | value << (64 - turn) & LOW_64
        yield value & LOW_32
        yield value >> 32


def permutation(seed: int, count: int) -> list[int]:
    """The numbers below `count`, which is below 2**32, in the order of numpy's generator."""
    order = list(range(count))
    words = random_words(seed)
    for last in range(count - 1, 0, -1):
        mask = (1 << last.bit_length()) - 1
        other = next(word & mask for word in words if word & mask <= last)
        order[last], order[other] = order[other], order[last]
    return order
