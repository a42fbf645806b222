"""text_attention in recorded steps: against float64, and the same bits on every instruction set, for any threads and beside any other texts."""

from functools import cache

import numpy as np
import pytest

compiled = pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)
from core_settings import usual_settings  # noqa: E402, F401
from instruction_sets import ISAS  # noqa: E402
from nightly import by_day  # noqa: E402

PAGE, ROWS, VOCABULARY = 16, 1200, 400
LENGTHS = (1, 2, 12, 13, 16, 17, 40, 255, 256, 257, 300, 3)
REACH = 512
pytestmark = pytest.mark.usefixtures("usual_settings")


@cache
def weights(H, Hkv, D):
    rng = np.random.default_rng(0)
    return rng.standard_normal((VOCABULARY, (H + 2 * Hkv) * D), np.float32), rng.standard_normal((H, 2 * REACH), np.float32)


class Texts:
    """A program that looks up q, k and v of each token and attends, layer after layer, over the same memory."""

    def __init__(self, H, Hkv, D, window=0, distances=None, layers=1):
        self.H, self.Hkv, self.D, self.program = H, Hkv, D, compiled.Program(ROWS, 8)
        table, _ = weights(H, Hkv, D)
        pages = ROWS // PAGE + 32
        self.cache, self.out = np.full((pages, Hkv, 2, PAGE * D), np.nan, np.float32), np.zeros((ROWS, H * D), np.float32)
        qkv, q = np.zeros((ROWS, table.shape[1]), np.float32), np.zeros((ROWS, H * D), np.float32)
        cos, sin = np.ones((REACH, 1), np.float32), np.zeros((REACH, 1), np.float32)
        for _ in range(layers):
            self.program.embed(table, self.program.token_ids, qkv)
            self.program.rope_append(qkv, cos, sin, self.program.positions, self.program.slots, self.cache, q)
            self.program.text_attention(q, self.cache, self.program.attention, window, self.out, distances=distances)

    def run(self, texts, lengths=None):
        starts, tables, page = [0], [], 0
        for text in texts:
            starts.append(starts[-1] + len(text))
            tables.append(list(range(page, page := page + -(-len(text) // PAGE))))
        ids = [token for text in texts for token in text]
        self.program.finish(self.program.start(ids, [0] * len(ids), starts, lengths or [*map(len, texts)], tables, []))
        return [self.out[first:last].copy() for first, last in zip(starts, starts[1:])]


def texts(lengths=LENGTHS, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, length).tolist() for length in lengths]


def float64s(text, H, Hkv, D, window, distances):
    table, _ = weights(H, Hkv, D)
    q, k, v = np.split(table[text].astype(np.float64), (H * D, (H + Hkv) * D), axis=1)
    q, k, v = (part.reshape(len(text), -1, D) for part in (q, k, v))
    position, outs = np.arange(len(text)), []
    distance = position - position[:, None]
    for h in range(H):
        scores = q[:, h] @ k[:, h // (H // Hkv)].T / D**0.5
        scores += 0 if distances is None else distances[h, distance + REACH]
        scores[(np.abs(distance) > window) & (window > 0)] = -np.inf
        shares = np.exp(scores - scores.max(1, keepdims=True))
        outs.append(shares / shares.sum(1, keepdims=True) @ v[:, h // (H // Hkv)])
    return np.concatenate(outs, axis=1)


SEEN = [(biased, window, *heads) for biased in (False, True) for window in (0, 1, 20, 300) for heads in ((4, 4, 32), (12, 12, 64), (3, 1, 80), (2, 2, 16))]


# Each window with and without distances, in one of three shapes; of the largest shape one case
SEEN_BY_DAY = [SEEN[4 * number + (0, 3, 2)[number % 3]] for number in range(8)] + [(True, 20, 12, 12, 64)]


@pytest.mark.parametrize("biased, window, H, Hkv, D", by_day(SEEN, *SEEN_BY_DAY))
def test_a_row_sees_all_of_its_text(H, Hkv, D, window, biased):
    distances = weights(H, Hkv, D)[1] if biased else None
    for text, out in zip(texts(), Texts(H, Hkv, D, window, distances).run(texts())):
        np.testing.assert_allclose(out, float64s(text, H, Hkv, D, window, distances), rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", by_day([0, 20], 20))
def test_the_bits_of_a_text_are_its_own(window):
    distances = weights(4, 4, 32)[1]
    expected = None
    for isa in ISAS:
        compiled.set_isa(isa)
        made = Texts(4, 4, 32, window, distances)
        for threads in (1, 2, 3):
            compiled.set_threads(threads)
            found = [out.tobytes() for out in made.run(texts())]
            expected = expected or found
            assert found == expected
            assert [out.tobytes() for out in made.run(texts()[::-1])] == expected[::-1]
        assert [made.run([text])[0].tobytes() for text in texts()] == expected


def test_layers_share_the_memory_of_keys_and_values():
    once, thrice = (Texts(4, 2, 32, layers=layers).run(texts()) for layers in (1, 3))
    assert [out.tobytes() for out in once] == [out.tobytes() for out in thrice]


def test_a_text_must_be_whole_in_a_step():
    with pytest.raises(ValueError, match="lengths: a text must be whole in one step"):
        Texts(4, 4, 32).run([[1] * 20], lengths=[21])


def test_wrong_arguments_are_named():
    made = Texts(4, 4, 32)
    with pytest.raises(ValueError, match="distances"):
        Texts(4, 4, 32, distances=np.zeros((4, 33), np.float32))
    with pytest.raises(ValueError, match="distances"):
        Texts(4, 4, 32, distances=np.zeros((3, 64), np.float32))
    with pytest.raises(ValueError, match="lengths: must not pass"):
        Texts(4, 4, 32, distances=np.zeros((4, 128), np.float32)).run([[1] * 49])
    with pytest.raises(ValueError, match="window"):
        Texts(4, 4, 32, window=1.5)
    assert "of texts" in "".join(made.program.describe())
