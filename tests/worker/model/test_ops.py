"""Every torch op against its definition in float64 numpy, and the writing into given outputs."""

import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from chatlm.common.config import PAGE_SIZE
from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.arrays.kinds import Norm
from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.ops import attention
from chatlm.worker.ops.basic import GATES
from chatlm.worker.ops.rows import SampleRow
from chatlm.worker.ops.tensors import rope_tables
from patching import patch

KERNELS = load_kernels("cpu")


def random(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def f64(tensor):
    return tensor.to(torch.float64).numpy()


def close(actual, expected, tolerance=2e-6):
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(f64(actual) - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def rms(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# --- the small ops -----------------------------------------------------------------------------------------------


def test_embed_takes_rows_and_widens_them():
    """Embed takes rows and widens them, and survives the id before the first."""
    table, out = random(10, 6, dtype=torch.bfloat16), torch.full((3, 6), math.nan)
    KERNELS.embed(table, torch.tensor([7, -1, 2]), out=out)
    assert torch.equal(out[[0, 2]], table[[7, 2]].float()) and out.isfinite().all()


@pytest.mark.parametrize("rows", [4, 5, 9])
def test_rank_embeddings_add_up_to_the_whole_table(rows):
    """The embeddings of ranks add up to the bits of the whole table."""
    table, ids = random(10, 6, dtype=torch.bfloat16), torch.tensor([7, -1, 2, 0, 9, 3, 4])
    table[3, 2], table[4, :2] = -0.0, torch.tensor([-0.0, 0.0])
    whole, parts = torch.empty(7, 6), torch.empty(-(-10 // rows), 7, 6)
    KERNELS.embed(table, ids, out=whole)
    for i, part in enumerate(parts):
        KERNELS.embed(table[i * rows:(i + 1) * rows], ids, out=part, part=(i * rows, 10))
        own = (ids.clamp(min=0) // rows == i)[:, None]
        assert torch.equal(part.signbit() & (part == 0) | own, torch.ones(7, 6, dtype=torch.bool))
    first, *others = parts
    assert torch.equal(sum(others, first).view(torch.int32), whole.view(torch.int32))


@pytest.mark.parametrize("weight", [None, random(24, seed=3)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_rms_norm(weight, kind):
    x, out = random(5, 24, seed=1), torch.empty(5, 24, dtype=kind)
    KERNELS.rms_norm(x, weight, 1e-5, out=out)
    close(out, rms(f64(x)) * (1 if weight is None else f64(weight)), 2e-6 if kind == torch.float32 else 5e-3)


@pytest.mark.parametrize("bias", [None, random(24, seed=4)])
def test_layer_norm(bias):
    x, weight, out = random(5, 24, seed=1) + 3, random(24, seed=3), torch.empty(5, 24)
    KERNELS.layer_norm(x, weight, bias, 1e-5, out=out)
    centred = f64(x) - f64(x).mean(-1, keepdims=True)
    close(out, rms(centred) * f64(weight) + (0 if bias is None else f64(bias)), 2e-6)


@pytest.mark.parametrize("rows", [1, 3, 16, 70])
@pytest.mark.parametrize("kind, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("bias", [None, 1.0])
def test_packed_and_plain_products_are_products(rows, kind, tolerance, bias):
    x, weight = random(rows, 96, seed=1, dtype=kind), random(80, 96, seed=2, dtype=kind)
    bias = None if bias is None else random(80, seed=3, dtype=kind)
    expected = f64(x) @ f64(weight).T + (0 if bias is None else f64(bias))
    for matrix in (weight, KERNELS.pack("up", weight)):
        out = torch.full((rows, 80), math.nan)
        KERNELS.linear(x, matrix, bias=bias, out=out)
        close(out, expected, tolerance)


@pytest.mark.parametrize("norm", [None, Norm(None, 1e-5), Norm(random(96, seed=7), 1e-5)])
@pytest.mark.parametrize("activation", [None, "relu2", "swiglu", "geglu"])
@pytest.mark.parametrize("channels", [96, 12])
def test_linear_norms_then_activates_then_adds(norm, activation, channels):
    x, weight, residual = random(5, 96, seed=1), random(80, channels, seed=2), random(5, 80, seed=3)
    normed = f64(x) if norm is None else rms(f64(x)) * (1 if norm.weight is None else f64(norm.weight))
    y = normed[:, :channels] @ f64(weight).T
    if activation == "relu2":
        y = np.maximum(y, 0) ** 2
    if activation in GATES:
        g = y[:, :40]
        gate = g * sigmoid(g) if activation == "swiglu" else g / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (g + 0.044715 * g**3)))
        y, residual = gate * y[:, 40:], residual[:, :40].contiguous()
    for matrix in (weight, KERNELS.pack("up", weight)):
        out = torch.full(y.shape, math.nan)
        KERNELS.linear(x, matrix, out=out, norm=norm, activation=activation)
        close(out, y)
        KERNELS.linear(x, matrix, out=out, norm=norm, activation=activation, residual=residual)
        close(out, y + f64(residual))


def test_elementwise_ops():
    x, y, first = random(4, 8, seed=1), random(4, 8, seed=2), torch.tensor([0, 1, 1, 1])
    a, b = torch.tensor(0.7), torch.tensor(-0.3)
    gate = random(1, 5, seed=3)
    out = torch.empty(4, 8)
    cases = [
        (lambda: KERNELS.copy(x, out=out), f64(x)),
        (lambda: KERNELS.mix(x, y, a, b, out=out), 0.7 * f64(x) - 0.3 * f64(y)),
        (lambda: KERNELS.backout(x, y, a, out=out), f64(x) - 0.7 * f64(y)),
        (lambda: KERNELS.softcap(x * 20, 15.0, out=out), 15 * np.tanh(f64(x) * 20 / 15)),
        (lambda: KERNELS.smear(x, y, first - 1, gate, a, out=out),
         f64(x) + 0.7 * sigmoid(f64(x)[:, :5] @ f64(gate).T) * f64(y) * f64(first)[:, None]),
        (lambda: KERNELS.gather_rows(x, torch.tensor([3, 0, 0, 1]), out=out), f64(x)[[3, 0, 0, 1]]),
    ]
    for op, expected in cases:
        out.fill_(math.nan)
        op()
        close(out, expected)


# --- rotary, norms and the append --------------------------------------------------------------------------------


def rope_reference(qkv, positions, spec, q_norm, k_norm, value_embed, gate):
    """The definition, head by head and pair by pair, in float64; returns q (T, H, D), k and v (T, Hkv, D)."""
    H, Hkv, D = spec.heads, spec.kv_heads, spec.head_size
    x = f64(qkv).reshape(len(positions), H + 2 * Hkv, D)
    qk, v = x[:, :H + Hkv], x[:, H + Hkv:]
    norm_weights = np.stack([f64(q_norm)] * H + [f64(k_norm)] * Hkv) if q_norm is not None else 1.0
    if spec.qk_norm == "before_rope":
        qk = rms(qk) * norm_weights
    rot = spec.rope_size
    angle = np.outer(positions, spec.rope_base ** (-np.arange(0, rot, 2) / rot)) / np.array(spec.rope_factors or 1.0)
    cos, sin = np.cos(angle)[:, None], spec.rope_direction * np.sin(angle)[:, None]
    if spec.rope_bfloat16:
        cos, sin = (f64(torch.from_numpy(t).float().bfloat16()) for t in (cos, sin))
    a, b = qk[..., :rot // 2], qk[..., rot // 2:rot]
    qk = np.concatenate((a * cos - b * sin, b * cos + a * sin, qk[..., rot:]), -1)
    if spec.qk_norm == "after_rope":
        qk = rms(qk) * norm_weights
    if value_embed is not None:
        v = v + spec.gate_scale * sigmoid(f64(gate))[..., None] * f64(value_embed).reshape(v.shape)
    return qk[:, :H] * spec.qk_scale, qk[:, H:] * spec.qk_scale, v


ROPE_CALL = dict(heads=4, kv_heads=2, head_size=8, max_positions=400, norm_eps=1e-5, qk_norm="none", qk_norm_weights=False,
                 rope_size=8, rope_base=10_000.0, rope_factors=None, rope_direction=1, rope_bfloat16=False, qk_scale=1.0,
                 embeds_values=False, gate_scale=2.0)
ROPE_VARIANTS = {
    "plain": {},
    "other direction, rounded, scaled, norm after": dict(rope_direction=-1, rope_bfloat16=True, qk_norm="after_rope",
                                                         qk_scale=1.2),
    "norm before with weights": dict(qk_norm="before_rope", qk_norm_weights=True),
    "part of the head": dict(rope_size=4, rope_base=100_000.0),
    "stretched frequencies": dict(rope_factors=(1.0, 1.0, 4.0, 8.0)),
    "value embedding": dict(embeds_values=True, gate_scale=3.0),
}


@pytest.mark.parametrize("variant", ROPE_VARIANTS)
def test_rope_append_rotates_and_appends(variant):
    """rope_append normalizes, rotates, gates and appends."""
    spec = SimpleNamespace(**ROPE_CALL | ROPE_VARIANTS[variant])
    spec.attention = SimpleNamespace(rope=Rope(spec.rope_size, spec.rope_base, spec.rope_factors, 1.0, spec.rope_direction, spec.rope_bfloat16))
    positions, slots = [0, 5, 6, 399], torch.tensor([40, 3, 17, 18])
    qkv, cache = random(4, 64, seed=1), torch.full((64, 2, 2, 8), 7.0)
    q_norm, k_norm = (random(8, seed=s) for s in (2, 3)) if spec.qk_norm_weights else (None, None)
    value_embed, gate = (random(4, 16, seed=4), random(4, 2, seed=5)) if spec.embeds_values else (None, None)
    q, k, v = rope_reference(qkv, positions, spec, q_norm, k_norm, value_embed, gate)
    rotated = torch.full((4, 32), math.nan)
    KERNELS.rope_append(qkv, *rope_tables(spec, "cpu"), torch.tensor(positions), slots, cache, out=rotated, norm=spec.qk_norm,
                        q_norm=q_norm, k_norm=k_norm, eps=spec.norm_eps, post_scale=spec.qk_scale, value_embed=value_embed,
                        gate=gate, gate_scale=spec.gate_scale)
    close(rotated.reshape(4, 4, 8), q)
    close(cache[slots, 0], k)
    close(cache[slots, 1], v)
    untouched = np.setdiff1d(np.arange(64), slots)
    assert (cache[untouched] == 7).all()


# --- paged attention ---------------------------------------------------------------------------------------------


def attention_reference(q, cache, batch, window, scale):
    """softmax(q k) v in float64, one query and head at a time, with keys looked up slot by slot."""
    T, H, D = q.shape
    group = H // cache.shape[2]
    out = np.zeros((T, H, D))
    for i, table in enumerate(batch.tables):
        for row in range(batch.starts[i], batch.starts[i + 1]):
            position = batch.lengths[i] - batch.starts[i + 1] + row
            seen = range(max(0, position - window + 1) if window else 0, position + 1)
            kv = f64(cache[[table[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in seen]])
            for h in range(H):
                score = kv[:, 0, h // group] @ f64(q[row, h]) * scale
                weight = np.exp(score - score.max())
                out[row, h] = weight @ kv[:, 1, h // group] / weight.sum()
    return out.reshape(T, H * D)


def paged_batch(rng, sequences, num_pages, scattered):
    """A Batch of sequences (new tokens, length after the step); attention does not read the other fields."""
    pages = rng.permutation(num_pages).tolist() if scattered else list(range(num_pages))
    starts, positions, lengths, tables = [0], [], [], []
    for new, length in sequences:
        starts.append(starts[-1] + new)
        positions += range(length - new, length)
        lengths.append(length)
        tables.append([pages.pop(0) for _ in range(-(-length // PAGE_SIZE))])
    return SimpleNamespace(positions=torch.tensor(positions), starts=starts, lengths=lengths, tables=tables, ahead=[])


@pytest.mark.parametrize("scattered", [False, True], ids=["consecutive pages", "scattered pages"])
@pytest.mark.parametrize("window", [0, 1, 17, 32, 100])
@pytest.mark.parametrize("sequences", [
    [(1, 1)], [(1, 16)], [(1, 75)], [(1, 5), (1, 90), (1, 32), (1, 33)], [(1, 40), (1, 40)],
    [(7, 7)], [(60, 60)], [(9, 41)], [(20, 52)], [(1, 33), (1, 2), (30, 70), (5, 5), (1, 64), (16, 16)],
], ids=str)
def test_paged_attention_stays_on_each_row_s_pages(sequences, window, scattered, monkeypatch):
    """Paged attention is attention over each row's own pages."""
    rng = np.random.default_rng(5)
    batch = paged_batch(rng, sequences, 40, scattered)
    q, cache = random(batch.starts[-1], 6, 8, seed=1), random(40 * PAGE_SIZE, 2, 2, 8, seed=2)
    expected = attention_reference(q, cache, batch, window, 8**-0.5)
    used = {table[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE
            for table, length in zip(batch.tables, batch.lengths) for p in range(length)}
    cache[[slot for slot in range(40 * PAGE_SIZE) if slot not in used]] = 1e4       # others' keys must not leak in
    out = torch.full((len(q), 48), math.nan)
    patch(monkeypatch, attention, "SCRATCH_SCORES", 4 * 3 * 90)       # four queries at once of the longest
    plan = KERNELS.plan_attention(batch, batch.positions, [window, 0], "float32")
    KERNELS.paged_attention(q.reshape(len(q), 48), cache, plan, window, out=out)
    close(out, expected)


def test_a_window_reads_only_the_pages_it_reaches():
    batch = paged_batch(np.random.default_rng(0), [(1, 1600), (1, 1600), (20, 800)], 300, scattered=True)
    spans = KERNELS.plan_attention(batch, batch.positions, [64], "float32")[64]
    assert [span.mask.shape[-1] for span in spans] == [64, 96]        # 800 - 20 + 1 - 64 = 717, in the page that begins at 704


def test_threads_do_not_share_memory_for_scores():
    """Ranks that are threads of one process compute at the same time."""
    def memory():
        scores = attention.scores_scratch(torch.float32, 64)
        assert attention.scores_scratch(torch.float32, 64) is scores
        return scores

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(memory).result().data_ptr() != memory().data_ptr()


# --- the table of kernels ----------------------------------------------------------------------------------------


def test_every_op_has_an_implementation_and_a_name():
    names = KERNELS.names
    assert all(callable(getattr(KERNELS, name)) for name in names)
    assert {"sample", "paged_attention", "linear"} <= names.keys() and names["linear"] == "torch/reference"
    assert KERNELS.row_invariant is False


def test_sampling_takes_any_logits_and_gives_ints():
    """Sampling takes logits of any type, and returns plain ints."""
    logits = torch.tensor([[0.0, 9, 1], [5, 0, 0]], dtype=torch.bfloat16)
    rows = [SampleRow(SamplingParams(temperature=0), 0)] * 2
    tokens = KERNELS.sample(logits, rows)
    assert tokens == [1, 0] and all(type(token) is int for token in tokens)
