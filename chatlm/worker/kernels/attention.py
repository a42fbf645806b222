"""rope_append and paged_attention: checked calls of the compiled kernels, for numpy arrays and torch CPU
tensors.

A layer's KV cache is one array (P, Hkv, 2, 16 * D) of float32, float16 or bfloat16: P pages of 16 positions,
with gaps between pages or without. A page has two blocks for each kv head: K transposed, [D][16], then V,
[16][D]. A cache of uint8, (P, Hkv, 2, 17 * D) with D a power of two from 32 on, is of the type q8_0: its keys
and values are turned by a Hadamard matrix, as attention.h says.

Call `plan_attention` once a step, then `rope_append` and `paged_attention` for each layer. A wrong argument
raises a ValueError that names it.
"""

from chatlm.worker.kernels.arrays import CACHE_CODES, FLOAT32, look_at, vector, vector_or_none
from chatlm.worker.kernels.library import _core

PAGE_SIZE = 16
MAX_HEAD_SIZE = 512
MAX_LATENT_SIZE = 576       # of latent attention
PACKED_BLOCK = 32           # numbers that share a scale in pages of q8_0
MAX_GROUP = 16              # query heads that share a kv head, or go through latents together
NORMS = {"none": 0, "before_rope": 1, "after_rope": 2}


def check_cache(cache) -> tuple:
    """(address, type code, P, Hkv, D, elements from page to page) of one layer's cache."""
    address, kind, (P, Hkv, _, size), apart = look_at("cache", cache, tuple(CACHE_CODES), None, None, 2, None,
                                                      rows_apart=True, writable=True)
    if kind == "uint8":
        D, rest = divmod(size, PAGE_SIZE + 1)
        if rest or D & (D - 1) or not 32 <= D <= MAX_HEAD_SIZE:
            raise ValueError("cache: of uint8 must be (P, Hkv, 2, 17 * D) with D a power of two from 32 to "
                             f"{MAX_HEAD_SIZE}, not {(P, Hkv, 2, size)}")
        return address, CACHE_CODES[kind], P, Hkv, D, apart
    if size % (PAGE_SIZE * 16) or not 0 < size <= PAGE_SIZE * MAX_HEAD_SIZE:
        raise ValueError(f"cache: must be (P, Hkv, 2, 16 * D) with D a multiple of 16 up to {MAX_HEAD_SIZE}, "
                         f"not {(P, Hkv, 2, size)}")
    return address, CACHE_CODES[kind], P, Hkv, size // PAGE_SIZE, apart


def check_latents(cache) -> tuple:
    """(address, type code, P, D, elements from page to page) of the cache of a layer with latent attention.

    It is (P, 16, D), or (P, 17, D) of uint8 for the type q8_0."""
    address, kind, (P, rows, D), apart = look_at("cache", cache, tuple(CACHE_CODES), None, None, None,
                                                 rows_apart=True, writable=True)
    wanted = PAGE_SIZE + (kind == "uint8")
    if rows != wanted or D % 16 or not 0 < D <= MAX_LATENT_SIZE:
        raise ValueError(
            f"cache: of latents must be (P, {wanted}, D) with D a multiple of 16 up to "
            f"{MAX_LATENT_SIZE}, not {(P, rows, D)}")
    return address, CACHE_CODES[kind], P, D, apart


def check_parts(kind: int, values: int, others: int) -> None:
    """Can the pages have keys of so many numbers that are a value, and others after them?"""
    sizes = [size for size in (values, others) if size < PACKED_BLOCK or size & (size - 1)]
    if kind == CACHE_CODES["uint8"] and sizes:
        raise ValueError(
            f"cache: of uint8 must have keys of two parts whose sizes are powers of two from "
            f"{PACKED_BLOCK} on, not {values} and {others}")


def groups_of(heads: int) -> int:
    """The fewest equal groups of heads that go through latents together."""
    fewest = -(-heads // MAX_GROUP)
    return next(count for count in range(fewest, heads + 1) if heads % count == 0)


def appended(columns: int, H: int, Hkv: int, D: int) -> tuple[int, bool] | None:
    """(kv heads that go into the cache, is v made from k?) for a qkv of this many columns; None if no qkv has
    so many."""
    return {0: (0, False), Hkv * D: (Hkv, True), 2 * Hkv * D: (Hkv, False)}.get(columns - H * D)


def rope_append(qkv, cos, sin, positions, slots, cache, q_out, *, value_embed=None, gate=None, **options):
    """Everything between the qkv product and attention: q -> q_out (T, H, D) float32, k and v -> the pages of
    `cache`.

    qkv         (T, (H + 2 Hkv) * D) float32, rows may be apart. With (H + Hkv) * D columns, v is made of what
                k is made of. With H * D columns, nothing goes into the pages, which belong to another layer
    cos, sin    (max_positions, rot / 2) float32, rot <= D
    positions   (T,) int64
    slots       (T,) int64: page * 16 + offset; -1 leaves a row alone
    gate, value_embed   (T, Hkv) and (T, Hkv * D) float32, or None: v += gate_scale * sigmoid(gate) *
                        value_embed
    options     those of rope_job
    """
    layer = _, _, _, Hkv, D, _ = check_cache(cache)
    q_at, _, (T, H, _), _ = look_at("q_out", q_out, FLOAT32, None, None, D, writable=True)
    if not H:
        raise ValueError("q_out: must have heads")

    qkv_at, _, (_, columns), stride = look_at("qkv", qkv, FLOAT32, T, None, rows_apart=True)
    if (appends := appended(columns, H, Hkv, D)) is None:
        raise ValueError(f"qkv: must have the shape ({T}, {(H + 2 * Hkv) * D}), not {(T, columns)}")
    check_together("value_embed", value_embed, "gate", gate)
    value = strength = (0, 0)
    if gate is not None:
        value = look_at("value_embed", value_embed, FLOAT32, T, Hkv * D, rows_apart=True)
        strength = look_at("gate", gate, FLOAT32, T, Hkv, rows_apart=True)
    indices = vector("positions", positions, "int64", T), vector("slots", slots, "int64", T)
    job, _ = rope_job(layer, (qkv_at, stride), (q_at, T, H), cos, sin, indices, (value[0], value[-1]),
                      (strength[0], strength[-1]), appends, **options)
    _core.rope_append(job)


def rope_job(cache: tuple, qkv: tuple, q: tuple, cos, sin, indices: tuple[int, int], value: tuple,
             gate: tuple, appends: tuple[int, bool], *, norm="none", q_norm=None, k_norm=None, eps=1e-5,
             post_scale=1.0, q_scale=1.0, gate_scale=1.0, value_norm=False):
    """What the kernel reads, and max_positions. The caller has checked the arrays:

    cache           what check_cache gives
    qkv, value, gate    (address, stride) of each
    q               (address, T, H)
    indices         addresses of positions and slots
    appends         what `appended` gives

    norm            "none", "before_rope" or "after_rope", with q_norm and k_norm (D,) float32 or None
    post_scale      a factor of q and of k after norm and rotation
    q_scale         another factor of q, besides 1 / sqrt(D)
    value_norm      is v normalized, without weights?
    """
    cache_at, cache_code, pages, _, D, apart = cache
    kv_heads, from_keys = appends
    qkv_at, row_stride = qkv
    q_at, T, H = q
    cos_at, _, table, _ = look_at("cos", cos, FLOAT32, None, None)
    if not 0 < 2 * table[1] <= D:
        raise ValueError(f"cos: must be (max_positions, rot / 2) with rot <= {D}, not {table}")
    sin_at = look_at("sin", sin, FLOAT32, *table)[0]
    if norm not in NORMS:
        raise ValueError(f"norm: must be one of {', '.join(NORMS)}, not {norm!r}")
    if kv_heads:
        check_together("q_norm", q_norm, "k_norm", k_norm)
    q_norm_at = vector_or_none("q_norm", q_norm, "float32", D)
    k_norm_at = vector_or_none("k_norm", k_norm, "float32", D)
    job = _core.rope_job(T, row_stride, H, kv_heads, D, table[1], NORMS[norm], eps, post_scale,
                         q_scale * D**-0.5, gate_scale, value[1], gate[1], cache_code, table[0], pages,
                         qkv_at, *indices, cos_at, sin_at, q_norm_at, k_norm_at, value[0], gate[0], q_at,
                         cache_at, apart, bool(value_norm), from_keys)
    return job, table[0]


def check_together(one: str, first, other: str, second) -> None:
    if (first is None) != (second is None):
        raise ValueError(f"{other}: {one} and {other} come together or not at all")


def sinks_at(sinks, heads: int) -> int:
    return vector_or_none("sinks", sinks, "float32", heads)


def check_softcap(softcap) -> float:
    if not 0 <= float(softcap) < float("inf"):
        raise ValueError(f"softcap: must be 0 or a positive number, not {softcap}")
    return float(softcap)


def plan_attention(tables, lengths, starts, heads: int, kv_heads: int, num_pages: int):
    """What the attention of a step reads. It is checked once and used by every layer.

    All are lists of integers. Rows starts[i] .. starts[i + 1] of the step are the newest of the lengths[i]
    positions of sequence i. Its pages are tables[i], each below num_pages. Length 0 is padding, whose rows
    become 0.
    """
    return _core.plan_attention(tables, lengths, starts, heads, kv_heads, num_pages)


def paged_attention(q, cache, plan, out, *, window=0, softcap=0.0, sinks=None):
    """softmax(q k) v of each row over the pages of its sequence -> out (T, H * D) float32.

    q           (T, H, D) float32, as rope_append left it
    window      how many keys a row sees, its own included; 0 or -1: all
    softcap     c > 0: scores become c * tanh(scores / c)
    sinks       None, or (H,) float32: one more score for each head, whose value is 0
    The bits of a row depend on its own q, keys and values alone: not on the batch, the chunk, the threads or
    the instruction set.
    """
    cache_at, cache_code, pages, Hkv, D, apart = check_cache(cache)
    if not isinstance(plan, _core.AttentionPlan):
        raise ValueError(f"plan: must come from plan_attention, not {type(plan).__name__}")
    if plan.num_pages != pages or plan.kv_heads != Hkv:
        raise ValueError(f"cache: the plan is for {plan.num_pages} pages of {plan.kv_heads} kv heads, not "
                         f"{pages} of {Hkv}")
    q_at = look_at("q", q, FLOAT32, plan.rows, plan.heads, D)[0]
    out_at, _, _, _ = look_at("out", out, FLOAT32, plan.rows, plan.heads * D, writable=True)
    if window < -1 or window > 2**31 - 1:
        raise ValueError(f"window: must be a number of keys, 0 or -1, not {window}")
    _core.paged_attention(plan, max(window, 0), q_at, cache_at, cache_code, out_at, D, check_softcap(softcap),
                          sinks_at(sinks, plan.heads), apart)
