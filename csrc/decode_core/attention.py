"""rope_append and paged_attention: checked calls of the compiled kernels, for numpy arrays and torch CPU tensors.

A layer's KV cache is one array (P, Hkv, 2, 16 * D) of float32, float16 or bfloat16: P pages of 16 positions; of the two
blocks of a page and kv head the first is K transposed, [D][16], the second V, [16][D]. `plan_attention` once per step, then per
layer `rope_append` and `paged_attention`; a wrong argument is a ValueError that names it.
"""

from . import _core

PAGE_SIZE = 16
MAX_HEAD_SIZE = 256
FLOAT32, FLOAT16, BFLOAT16, INT64 = 0, 1, 2, 3
NORMS = {"none": 0, "before_rope": 1, "after_rope": 2}
_CODES = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16, "int64": INT64}


def _pointer(name: str, array, codes: tuple, *, rows_only: bool = False, writable: bool = False) -> tuple:
    """(address, type code, shape, elements between rows) of a CPU array with one of the types `codes`.

    It must be contiguous, or with `rows_only` only within each row of a matrix.
    """
    try:
        shape, dtype = array.shape, array.dtype
        if hasattr(array, "data_ptr"):
            if array.device.type != "cpu":
                raise ValueError(f"{name}: must be on the CPU, not on {array.device}")
            address, stride, width = array.data_ptr(), array.stride(), 1
            contiguous = array.is_contiguous()
        else:
            interface = array.__array_interface__
            address, read_only = interface["data"]
            if writable and read_only:
                raise ValueError(f"{name}: is read-only")
            stride, width, contiguous = array.strides, array.itemsize, array.flags.c_contiguous
    except AttributeError:
        raise ValueError(f"{name}: must be a numpy array or a torch tensor, not {type(array).__name__}") from None
    code = _CODES.get(str(dtype).removeprefix("torch."), -1)
    if code not in codes:
        raise ValueError(f"{name}: must be {' or '.join(n for n, c in _CODES.items() if c in codes)}, not {dtype}")
    if address % (2 if code in (FLOAT16, BFLOAT16) else 8 if code == INT64 else 4):
        raise ValueError(f"{name}: is not aligned to its elements")
    if contiguous:
        return address, code, shape, shape[-1] if len(shape) > 1 else 1
    if not rows_only or len(shape) != 2 or stride[1] != width or stride[0] < shape[1] * width or stride[0] % width:
        raise ValueError(f"{name}: must be contiguous{' within each row' if rows_only else ''}")
    return address, code, shape, stride[0] // width


def _cache(cache) -> tuple:
    """(address, type code, P, Hkv, D) of one layer's cache."""
    address, code, shape, _ = _pointer("cache", cache, (FLOAT32, FLOAT16, BFLOAT16), writable=True)
    if len(shape) != 4 or shape[-2] != 2 or shape[-1] % (PAGE_SIZE * 16) or not 0 < shape[-1] <= PAGE_SIZE * MAX_HEAD_SIZE:
        raise ValueError(f"cache: must be (P, Hkv, 2, 16 * D) with D a multiple of 16 up to 256, not {tuple(shape)}")
    return address, code, shape[-4], shape[-3], shape[-1] // PAGE_SIZE


def _vector(name: str, array, code: int, size: int) -> int:
    address, _, shape, _ = _pointer(name, array, (code,))
    if tuple(shape) != (size,):
        raise ValueError(f"{name}: must be ({size},), not {tuple(shape)}")
    return address


def _norms(q_norm, k_norm, size: int) -> tuple:
    if (q_norm is None) != (k_norm is None):
        raise ValueError("k_norm: q_norm and k_norm come together or not at all")
    return (0, 0) if q_norm is None else (_vector("q_norm", q_norm, FLOAT32, size), _vector("k_norm", k_norm, FLOAT32, size))


def _matrix(name: str, array, code: int, rows: int, columns: int) -> tuple:
    address, _, shape, stride = _pointer(name, array, (code,), rows_only=True)
    if tuple(shape) != (rows, columns):
        raise ValueError(f"{name}: must be ({rows}, {columns}), not {tuple(shape)}")
    return address, stride


def rope_append(qkv, cos, sin, positions, slots, cache, q_out, *, norm="none", q_norm=None, k_norm=None, eps=1e-5,
                post_scale=1.0, q_scale=None, interleaved=False, direction=1, value_embed=None, gate=None, gate_scale=1.0):
    """Everything between the qkv product and attention: q -> q_out (T, H, D) float32, k and v -> the pages of `cache`.

    qkv (T, (H + 2 Hkv) * D) float32 or bfloat16, rows may be apart; positions, slots (T,) int64, slot = page * 16 + offset,
    -1 leaves a row alone; cos, sin (max_positions, rot / 2) float32, rot <= D; norm "none", "before_rope", "after_rope" with
    q_norm, k_norm (D,) float32 or None; then q and k times post_scale, q also times q_scale (None: D ** -0.5);
    v += gate_scale * sigmoid(gate) * value_embed with gate (T, Hkv) and value_embed (T, Hkv * D) in qkv's type.
    """
    _core.rope_append(_rope_job(_cache(cache), qkv, cos, sin, positions, slots, q_out, norm, q_norm, k_norm, eps, post_scale,
                                q_scale, interleaved, direction, value_embed, gate, gate_scale))


def _rope_job(cache: tuple, qkv, cos, sin, positions, slots, q_out, norm, q_norm, k_norm, eps, post_scale, q_scale,
              interleaved, direction, value_embed, gate, gate_scale):
    """All of rope_append's arguments, checked, as the kernel reads them; `cache` as from _cache."""
    cache_at, cache_code, pages, Hkv, D = cache
    q_at, _, q_shape, _ = _pointer("q_out", q_out, (FLOAT32,), writable=True)
    if len(q_shape) != 3 or q_shape[2] != D or not q_shape[1]:
        raise ValueError(f"q_out: must be (T, H, {D}), not {tuple(q_shape)}")
    T, H = q_shape[0], q_shape[1]
    qkv_at, code, shape, row_stride = _pointer("qkv", qkv, (FLOAT32, BFLOAT16), rows_only=True)
    if tuple(shape) != (T, (H + 2 * Hkv) * D):
        raise ValueError(f"qkv: must be ({T}, {(H + 2 * Hkv) * D}), not {tuple(shape)}")
    if (value_embed is None) != (gate is None):
        raise ValueError("gate: value_embed and gate come together or not at all")
    value = (0, 0) if value_embed is None else _matrix("value_embed", value_embed, code, T, Hkv * D)
    strength = (0, 0) if gate is None else _matrix("gate", gate, code, T, Hkv)
    indices = _vector("positions", positions, INT64, T), _vector("slots", slots, INT64, T)
    return _rope_job_of(cache, (qkv_at, code, row_stride), (q_at, T, H), cos, sin, indices, norm, q_norm, k_norm, eps, post_scale, q_scale,
                        interleaved, direction, value, strength, gate_scale)[0]


def _rope_job_of(cache: tuple, qkv: tuple, q: tuple, cos, sin, indices: tuple, norm, q_norm, k_norm, eps, post_scale, q_scale, interleaved,
                 direction, value: tuple, gate: tuple, gate_scale) -> tuple:
    """(job, max_positions); cache as from _cache, qkv (address, type, row stride), q (address, T, H), value and gate (address, stride)."""
    (cache_at, cache_code, pages, Hkv, D), (qkv_at, code, row_stride), (q_at, T, H) = cache, qkv, q
    cos_at, _, table, _ = _pointer("cos", cos, (FLOAT32,))
    sin_at, _, sin_table, _ = _pointer("sin", sin, (FLOAT32,))
    if len(table) != 2 or not 0 < 2 * table[1] <= D:
        raise ValueError(f"cos: must be (max_positions, rot / 2) with rot <= {D}, not {tuple(table)}")
    if tuple(sin_table) != tuple(table):
        raise ValueError(f"sin: must be like cos, {tuple(table)}, not {tuple(sin_table)}")
    if norm not in NORMS:
        raise ValueError(f"norm: must be one of {', '.join(NORMS)}, not {norm!r}")
    if direction not in (1, -1):
        raise ValueError(f"direction: must be 1 or -1, not {direction!r}")
    q_norm_at, k_norm_at = _norms(q_norm, k_norm, D)
    job = _core.rope_job(
        T, row_stride, code, H, Hkv, D, table[1], interleaved, direction, NORMS[norm], eps, post_scale,
        D**-0.5 if q_scale is None else q_scale, gate_scale, value[1], gate[1], cache_code, table[0], pages, qkv_at,
        *indices, cos_at, sin_at, q_norm_at, k_norm_at, value[0], gate[0], q_at, cache_at)
    return job, table[0]


def plan_attention(tables, lengths, starts, heads: int, kv_heads: int, num_pages: int):
    """What a step's attention reads, checked once and used by every layer.

    Rows starts[i] .. starts[i + 1] of the step are the newest of the lengths[i] positions of sequence i, whose pages are
    tables[i]; length 0 is padding, whose rows become 0. Lists of integers; a page must be below num_pages.
    """
    return _core.plan_attention(tables, lengths, starts, heads, kv_heads, num_pages)


def paged_attention(q, cache, plan, out, *, window=0):
    """softmax(q k) v of each row over its own pages: q (T, H, D) float32 as rope_append left it -> out (T, H * D).

    out is float32 or bfloat16; window counts the keys that a row sees, itself included, 0 or -1 = all. The bits of a row
    depend on its own q, keys and values alone: not on the batch, the chunk, the threads or the instruction set.
    """
    cache_at, cache_code, pages, Hkv, D = _cache(cache)
    _check_plan(plan, pages, Hkv)
    q_at, _, shape, _ = _pointer("q", q, (FLOAT32,))
    if tuple(shape) != (plan.rows, plan.heads, D):
        raise ValueError(f"q: must be ({plan.rows}, {plan.heads}, {D}), not {tuple(shape)}")
    out_at, out_code = _output(out, plan, D)
    if window < -1 or window > 2**31 - 1:
        raise ValueError(f"window: must be a number of keys, 0 or -1, not {window}")
    _core.paged_attention(plan, max(window, 0), q_at, cache_at, cache_code, out_at, out_code, D)


def _check_plan(plan, pages: int, kv_heads: int) -> None:
    if not isinstance(plan, _core.AttentionPlan):
        raise ValueError(f"plan: must come from plan_attention, not {type(plan).__name__}")
    if plan.num_pages != pages or plan.kv_heads != kv_heads:
        raise ValueError(f"cache: the plan is for {plan.num_pages} pages of {plan.kv_heads} kv heads, not {pages} of {kv_heads}")


def _output(out, plan, size: int) -> tuple:
    address, code, shape, _ = _pointer("out", out, (FLOAT32, BFLOAT16), writable=True)
    if tuple(shape) != (plan.rows, plan.heads * size):
        raise ValueError(f"out: must be ({plan.rows}, {plan.heads * size}), not {tuple(shape)}")
    return address, code
