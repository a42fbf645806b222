"""Latent attention (MLA) in compiled steps: against its formula in float64, and the same bits anywhere."""

import itertools

import numpy as np
import pytest

compiled = pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)
from core_settings import usual_settings  # noqa: E402, F401
from instruction_sets import ISAS, SOME_ISAS  # noqa: E402
from nightly import WHOLE, by_day  # noqa: E402
from record import agree, exact  # noqa: E402

PAGES, PAGE, IDS = 48, 16, 64
pytestmark = pytest.mark.usefixtures("usual_settings")


class Latents:
    """A step of one layer of latent attention over tables of random numbers, and what its formula gives."""

    def __init__(self, heads, kept, turned, plain, values, kind="f32", cache="float32", adjacent=True, tokens=64, dice=None):
        dice, angles_are_known = dice or np.random.default_rng(heads + kept), not dice
        self.sizes = heads, kept, turned, plain, values
        self.adjacent = adjacent

        def normal(*shape):
            return dice.standard_normal(shape, np.float32)

        self.x, self.kv = normal(IDS, heads * (plain + turned)), normal(IDS, kept + turned)
        self.k_up, self.v_up = normal(heads * kept, plain) / 8, normal(heads * values, kept) / 8
        self.norm, angles = 1 + normal(kept) / 4, normal(PAGES * PAGE, turned // 2)
        self.cos, self.sin = (np.cos(angles), np.sin(angles)) if angles_are_known else (angles, normal(*angles.shape))
        self.cache = np.zeros((PAGES, PAGE + (cache == "uint8"), kept + turned), cache)
        arena = compiled.Arena(1 << 20)

        def packed(weights):
            matrix = compiled.Matrix(arena, kind, *weights.shape)
            matrix.fill(weights, "f32")
            return matrix

        p = self.program = compiled.Program(tokens, 1)
        x, kv, q, seen, self.out = (np.zeros((tokens, columns), np.float32) for columns in (
            heads * (plain + turned), kept + turned, heads * (kept + turned), heads * kept, heads * values))
        p.embed(self.x, p.token_ids, x)
        p.embed(self.kv, p.token_ids, kv)
        p.append_latents(kv, self.norm, 1e-5, self.cos, self.sin, p.positions, p.slots, self.cache, adjacent)
        p.absorb(x, packed(self.k_up), self.cos, self.sin, p.positions, 0.9, self.cache, q, adjacent)
        p.paged_attention(q, self.cache, p.attention, 0, seen)
        p.by_head(seen, packed(self.v_up), self.out)

    def step(self, ids, length, pages):
        """The last `ids` of a text of this length -> what their heads see."""
        count = len(ids)
        self.program.finish(self.program.start(ids, [-1] * count, [0, count], [length], [pages], [], all_rows=True))
        return self.out[:count].copy()

    def whole(self, text, pages, chunk):
        """A text in chunks."""
        return np.concatenate([self.step(text[i:i + chunk], min(i + chunk, len(text)), pages) for i in range(0, len(text), chunk)])

    def turned(self, x):
        half = x.shape[-1] // 2
        return np.concatenate((x[..., 0::2], x[..., 1::2]), -1) if self.adjacent else x, half

    def rotated(self, x):
        x, half = self.turned(x)
        place = np.arange(len(x)).reshape(-1, *[1] * (x.ndim - 2))
        cos, sin = (table.astype(np.float64)[place] for table in (self.cos, self.sin))
        a, b = x[..., :half], x[..., half:]
        return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)

    def formula(self, text):
        H, kept, _, plain, values = self.sizes
        x, kv = self.x.astype(np.float64)[text].reshape(len(text), H, -1), self.kv.astype(np.float64)[text]
        latent = kv[:, :kept]
        latent = latent / np.sqrt((latent**2).mean(1, keepdims=True) + 1e-5) * self.norm
        keys = np.concatenate((latent, self.rotated(kv[:, kept:])), 1)
        absorbed = (x[..., :plain].swapaxes(0, 1) @ self.k_up.astype(np.float64).reshape(H, kept, plain).swapaxes(1, 2)).swapaxes(0, 1)
        q = 0.9 * np.concatenate((absorbed, self.rotated(x[..., plain:])), -1) / np.sqrt(keys.shape[1])
        scores = q.swapaxes(0, 1) @ keys.T                          # (H, T, S)
        scores[:, np.triu(np.ones((len(text), len(text)), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = weights @ latent @ self.v_up.astype(np.float64).reshape(H, values, kept).swapaxes(1, 2)
        return out.swapaxes(0, 1).reshape(len(text), -1)


TEXT = [(7 * place + place // 5) % IDS for place in range(300)]
TABLE = [(5 * page + 3) % PAGES for page in range(19)]
SIZES = {"GLM-4.7-Flash": (20, 512, 64, 192, 256), "Lite": (16, 512, 64, 128, 128), "small": (3, 48, 16, 32, 16), "17 heads": (17, 32, 32, 16, 32), "V3": (128, 512, 64, 128, 128),
         "values above 512": (9, 544, 32, 16, 16)}


@pytest.mark.parametrize("name, adjacent", by_day(itertools.product(SIZES, (True, False)), ("GLM-4.7-Flash", False), ("small", True), ("small", False),
                                                  ("17 heads", True), ("values above 512", False)))
def test_a_step_is_the_formula(name, adjacent):
    """A step in chunks is the formula, in the sizes of published models and in odd ones."""
    text = TEXT[:40] if name == "V3" else TEXT if WHOLE or name != "GLM-4.7-Flash" else TEXT[:80]      # two chunks
    layer = Latents(*SIZES[name], adjacent=adjacent)
    want = layer.formula(text)
    assert np.abs(layer.whole(text, TABLE, 64) - want).max() < 2e-5 * np.abs(want).max()


@pytest.mark.parametrize("name, cache, tolerance", by_day(
    [(name, *own) for name in ("even", "GLM-4.7-Flash") for own in (("float16", 2e-3), ("float32", 2e-5), ("uint8", 3e-2))],
    ("even", "float16", 2e-3), ("even", "float32", 2e-5), ("even", "uint8", 3e-2)))
def test_pages_may_have_any_type(name, cache, tolerance):
    """Pages of floats, and of q8_0 (uint8), whose parts are powers of two."""
    layer = Latents(*{"even": (3, 64, 32, 32, 16)}.get(name) or SIZES[name], cache=cache)
    want = layer.formula(TEXT)
    assert np.abs(layer.whole(TEXT, TABLE, 64) - want).max() < tolerance * np.abs(want).max()


@pytest.mark.parametrize("kind, cache", [*((kind, "float16") for kind in ("f32", "bf16", "q8_0", "q4_0")), ("bf16", "uint8")])
def test_bits_are_the_same_anywhere(kind, cache):
    """The bits of a row are the same in any chunk, on every instruction set and by any number of threads."""
    text, expected = TEXT[:290], None
    for isa in ISAS:
        compiled.set_isa(isa)
        for threads, chunk in ((1, 64), (3, 17), (2, 1)):
            if chunk == 1 and isa not in ISAS[:1]:
                continue
            compiled.set_threads(threads)
            found = Latents(5, 64, 32, 32, 48, kind, cache).whole(text, TABLE, chunk)
            expected = found if expected is None else expected
            assert np.array_equal(found, expected), (isa, threads, chunk)


@pytest.mark.parametrize("isa", SOME_ISAS)
@pytest.mark.parametrize("cache", ["float16", "uint8"])
def test_latents_have_the_bits_of_record(isa, cache):
    """Latent attention and its cache have the bits of record."""
    compiled.set_isa(isa)
    layer = Latents(5, 64, 32, 32, 48, "bf16", cache, dice=exact(11))
    agree(f"latents in {cache}", layer.whole(TEXT[:290], TABLE, 64), layer.cache)


def recorded():
    layer = Latents(2, 32, 16, 16, 16)
    p, x, kv = layer.program, np.zeros((64, 64), np.float32), np.zeros((64, 48), np.float32)
    p.embed(layer.x, p.token_ids, x)
    p.embed(layer.kv, p.token_ids, kv)
    arena = compiled.Arena(1 << 20)
    k_up = compiled.Matrix(arena, "f32", 64, 16)
    good = {"absorb": dict(x=x, k_up=k_up, cos=layer.cos, sin=layer.sin, positions=p.positions, scale=1.0, cache=layer.cache, out=np.zeros((64, 96), np.float32)),
            "append_latents": dict(x=kv, weight=layer.norm, eps=1e-5, cos=layer.cos, sin=layer.sin, positions=p.positions, slots=p.slots, cache=layer.cache),
            "by_head": dict(x=x, up=compiled.Matrix(arena, "f32", 64, 32), out=np.zeros((64, 64), np.float32))}
    return p, good


@pytest.mark.parametrize("op, change, words", [
    ("absorb", dict(out=np.zeros((64, 95), np.float32)), "up: must have a multiple of 16 rows for each head of x, and out another array of the same heads"),
    ("absorb", dict(out=np.zeros((64, 94), np.float32)), "out: must have 96 columns, not 94"),
    ("absorb", dict(positions="slots"), "positions: must be"),
    ("append_latents", dict(cache=np.zeros((4, 16, 40), np.float32)), r"cache: of latents must be \(P, 16, D\) with D a multiple of 16 up to 576"),
    ("append_latents", dict(cache=np.zeros((4, 16, 592), np.float32)), "cache: of latents must be"),
    ("append_latents", dict(cache=np.zeros((4, 16, 48), np.uint8)), r"cache: of latents must be \(P, 17, D\)"),
    ("append_latents", dict(cache=np.zeros((4, 17, 48), np.float32)), r"cache: of latents must be \(P, 16, D\)"),
    ("append_latents", dict(cache=np.zeros((4, 17, 48), np.uint8)), "cache: of uint8 must have keys of two parts whose sizes are powers of two from 32 on, not 32 and 16"),
    ("absorb", dict(cache=np.zeros((4, 17, 48), np.uint8)), "cache: of uint8 must have keys of two parts"),
    ("append_latents", dict(cache=np.zeros((4, 16, 64), np.float32)), "x: must be .max_tokens, 64. of tokens"),
    ("append_latents", dict(weight=np.ones(31, np.float32)), "weight: must"),
    ("by_head", dict(out="x"), "up: must have a multiple of 16 rows for each head of x, and out another array")])
def test_what_is_wrong_with_latents_is_a_value_error(op, change, words):
    program, good = recorded()
    given = good[op]
    changed = {key: given[value] if isinstance(value, str) and value in given else value for key, value in change.items()}
    with pytest.raises(ValueError, match=words):
        getattr(program, op)(**given | changed)
    getattr(program, op)(**given)
