"""The ops of csrc/cuda: checked calls of the kernels, for torch CUDA tensors.

No call allocates, reads back or waits, and grids depend on shapes alone. So every call may be captured in a
CUDA graph and replayed on whatever the tensors then hold. Values on the device cannot be checked here: the
kernels skip slots, pages, positions and ids that are out of range, and rows marked inactive. A wrong argument
raises a ValueError that names it. torch is not imported: a tensor is anything with is_cuda, device, dtype,
shape, stride() and data_ptr().
"""

from types import SimpleNamespace

PAGE_SIZE = 16
CHUNK_SIZE = 64
# parts of a row that attention computes side by side, and that one merge takes; a row's bits depend on both
MOST_SPANS = 128
MERGED = 16
MAX_VOCABULARY = 1 << 18
MAX_ROWS = 65535
MAX_HEAD_SIZE = 256
MAX_LATENT_KEY = 576                    # numbers that a token keeps of latent attention
MAX_LATENT_VALUE = 512                  # so many of them are the value
LATENT_HEADS = 16                       # query heads that a block attends for
# ten times the lowest compute capability that setup.py's NVCC_FLAGS compile for
LEAST_CAPABILITY = 80
# of the block that samples a row; tests try other numbers, with the same tokens
SAMPLE_THREADS = 1024
SAMPLE_ROW_BYTES = 72                   # dc::SampleRow of csrc/contract.h
CODES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3}          # only pages are int8
PACKED_BLOCK = 32                       # numbers that share a scale in pages of int8
MAX_RANKS = 1024                        # of an adapter on a matrix
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int64": 8, "uint8": 1, "int8": 1}
NORMS = {"none": 0, "before_rope": 1, "after_rope": 2}
# quantized type -> (columns, bytes) of a block in a GGUF file, in the order of csrc/weights.def, as a test
# checks
BLOCKS = {
    "q8_0": (32, 34), "q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22), "q5_1": (32, 24),
    "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210), "iq4_nl": (32, 18), "iq4_xs": (256, 136),
    "mxfp4": (32, 17), "u4_g32": (32, 19), "u4_g128": (128, 67), "q2_k": (256, 84), "q3_k": (256, 110)}
OWN = ("u4_g32", "u4_g128")              # of these, types that no GGUF file has
FLOATS = {"bfloat16": (8, 16), "float16": (8, 16), "float32": (8, 32)}          # the same for float matrices
BLOCK_CODES = {kind: code for code, kind in enumerate([*BLOCKS, *FLOATS])}
MAX_PRODUCT_ROWS = 8                    # of x in one multiply
MAX_EXPERTS = 1024
FEW_PAIRS = 4                           # of an item, with x in float32
MANY_PAIRS = 64                         # of an item, with x in bfloat16
GATES = {None: 0, "swiglu": 1, "geglu": 2, "clamped_swiglu": 3}
ACTIVATIONS = GATES | {"relu2": 4}
LOGITS = ("float32", "bfloat16")
FLOAT_CACHES = ("float32", "float16", "bfloat16")
CACHES = (*FLOAT_CACHES, "int8")


def attention_workspace(rows: int, heads: int, kv_heads: int, head_size: int,
                        table_width: int) -> tuple[int, int]:
    """(float32 elements, int32 elements) that paged_attention needs for up to `rows` rows of up to
    `table_width` pages each.

    The integers must be zero before the first call, and each call leaves them zero. Calls that run in order
    may share both.
    """
    spans = min(max_chunks(table_width, 0), MOST_SPANS)
    groups = -(-spans // MERGED)
    return rows * heads * (spans + groups) * (2 + head_size), rows * kv_heads * (1 + groups)


def latent_workspace(rows: int, heads: int, value_size: int, table_width: int) -> tuple[int, int]:
    """The same for latent_attention."""
    return attention_workspace(rows, heads, -(-heads // LATENT_HEADS), value_size, table_width)


def max_chunks(table_width: int, window: int) -> int:
    """Most chunks of 64 positions that a row of up to `table_width` pages sees through `window` (0: all)."""
    chunks = -(-table_width * PAGE_SIZE // CHUNK_SIZE)
    return min(chunks, (window + CHUNK_SIZE - 2) // CHUNK_SIZE + 1) if window else chunks


def most_items(experts: int, pairs: int, item_pairs: int) -> int:
    """The most items that `group` can need for this many pairs, whichever experts they have."""
    active = min(experts, pairs)
    return active + (pairs - active) // item_pairs


class CudaOps:
    """The ops with their checks. `core` has the functions of csrc/cuda/launch.h, named without their
    prefix."""

    def __init__(self, core):
        self.core = core

    def refusal(self, device: int = 0) -> str:
        """Why the kernels cannot run on a device; "" if they can. It never raises."""
        if not device < self.core.cuda_devices():
            return "no such device, or a driver that is too old"
        capability = self.core.cuda_capability(device)
        if capability >= LEAST_CAPABILITY:
            return ""
        least = "decode_core's CUDA kernels need {}.{}".format(*divmod(LEAST_CAPABILITY, 10))
        return "{}, the GPU has {}.{}".format(least, *divmod(capability, 10))

    def available(self, device: int = 0) -> bool:
        """Can the kernels run on this device?"""
        return not self.refusal(device)

    def tensor(self, name: str, tensor, dtypes: tuple, *shape, loose=0) -> SimpleNamespace:
        """(address, dtype, shape, strides) of a tensor on the current device. None in `shape` admits any
        size.

        The tensor must be contiguous, except along its first `loose` axes, whose strides the kernels get.
        """
        try:
            on_device = tensor.is_cuda
            dtype = str(tensor.dtype).removeprefix("torch.")
            size = tuple(tensor.shape)
            strides = tuple(tensor.stride())
            address = tensor.data_ptr()
            device = tensor.device.index
        except (AttributeError, TypeError):
            raise ValueError(f"{name}: must be a CUDA tensor, not {type(tensor).__name__}") from None
        if not on_device or device != self.core.cuda_current_device():
            raise ValueError(f"{name}: must be on the current CUDA device, not on {tensor.device}")
        if getattr(tensor, "requires_grad", False):
            raise ValueError(f"{name}: must not require gradients")
        if dtype not in dtypes:
            raise ValueError(f"{name}: must be {' or '.join(dtypes)}, not {dtype}")
        fits = len(size) == len(shape) and all(want in (None, have) for want, have in zip(shape, size))
        if not fits:
            wanted = ", ".join("any" if want is None else str(want) for want in shape)
            raise ValueError(f"{name}: must have shape ({wanted}), not {size}")
        expected = 1
        for axis in reversed(range(loose, len(size))):
            if size[axis] > 1 and strides[axis] != expected and 0 not in size:
                raise ValueError(f"{name}: must be contiguous{f' from axis {loose} on' if loose else ''}")
            expected *= size[axis]
        if any(n > 1 and step < expected for n, step in zip(size[:loose], strides)):
            raise ValueError(f"{name}: rows must not overlap")
        if address % SIZES[dtype] or address == 0 and 0 not in size:
            raise ValueError(f"{name}: is not aligned to its elements")
        return SimpleNamespace(address=address, dtype=dtype, shape=size, strides=strides)

    def address_or_0(self, name: str, tensor, dtypes: tuple, *shape) -> int:
        """The address of a contiguous tensor, 0 for None."""
        return 0 if tensor is None else self.tensor(name, tensor, dtypes, *shape).address

    def pages(self, name: str, pages, like=None) -> SimpleNamespace:
        """The K or V pages of a layer (P, Hkv, 16, D).

        Strides may be any, but the D values of a slot lie together, at a multiple of 16 bytes."""
        dtypes = (like.dtype,) if like else CACHES
        shape = like.shape if like else (None, None, PAGE_SIZE, None)
        cache = self.tensor(name, pages, dtypes, *shape, loose=3)
        per_load = 16 // SIZES[cache.dtype]
        if cache.shape[3] % 16 or not 0 < cache.shape[3] <= MAX_HEAD_SIZE:
            raise ValueError(f"{name}: must be (P, Hkv, 16, D), D a multiple of 16 up to 256, not "
                             f"{cache.shape}")
        D = cache.shape[3]
        packed = cache.dtype == "int8"
        if packed and (D < PACKED_BLOCK or D & (D - 1) or any(step % PACKED_BLOCK
                                                              for step in cache.strides[:3])):
            raise ValueError(f"{name}: of int8 must have a D that is a power of two from {PACKED_BLOCK}, not "
                             f"{D}")
        if cache.address % 16 or any(step % per_load for step in cache.strides[:3]):
            raise ValueError(f"{name}: pages, heads and slots must start at multiples of 16 bytes")
        if like and cache.strides != like.strides:
            raise ValueError(f"{name}: must have the strides of k_pages, {like.strides}, not {cache.strides}")
        return cache

    def scales(self, name: str, scales, pages: SimpleNamespace) -> int:
        """The address of the scales of int8 pages (P, Hkv, 16, D / 32) float16, 0 for pages of floats.

        Scales have the strides of the pages, divided by 32."""
        if (scales is None) != (pages.dtype != "int8"):
            raise ValueError(f"{name}: must come with pages of int8, and with no others")
        if scales is None:
            return 0
        *shape, D = pages.shape
        blocks = self.tensor(name, scales, ("float16",), *shape, D // PACKED_BLOCK, loose=3)
        if any(n > 1 and step * PACKED_BLOCK != apart
               for n, step, apart in zip(shape, blocks.strides, pages.strides)):
            raise ValueError(f"{name}: must have the strides of the pages by {PACKED_BLOCK}, not "
                             f"{blocks.strides}")
        return blocks.address

    def turn(self, x, out, *, stream: int):
        """x (B, H, D) float32 times the normalized Hadamard matrix -> out (B, H, D) float32 or bfloat16; D is
        a power of two."""
        heads = self.tensor("x", x, ("float32",), None, None, None)
        y = self.tensor("out", out, LOGITS, *heads.shape)
        D = heads.shape[2]
        if not PACKED_BLOCK <= D <= MAX_HEAD_SIZE or D & (D - 1):
            raise ValueError(f"x: must have a D that is a power of two from {PACKED_BLOCK} to "
                             f"{MAX_HEAD_SIZE}, not {D}")
        call(self.core.cuda_turn, heads.address, heads.shape[0] * heads.shape[1], D, y.address,
             CODES[y.dtype], stream)

    def sample(self, logits, params, tokens, *, count_ids=None, counts=None, bias_ids=None, bias_values=None,
               stream: int):
        """One token for each row of logits (B, V) float32 or bfloat16 -> tokens (B,) int32.

        params      (B * 72,) uint8: the bytes of SampleBatch.records (sampling.py), copied to the device
        count_ids, counts       (N,) int32, and bias_ids (M,) int32, bias_values (M,) float32: the batch's
                                lists, or longer
                    buffers that begin with them. Rows that they name are changed in place, so logits must
                    then be float32
        A row with a negative position gets token -1.
        """
        x = self.tensor("logits", logits, LOGITS, None, None, loose=1)
        B, V = x.shape
        if not 0 < V <= MAX_VOCABULARY:
            raise ValueError(f"logits: must have 1 to {MAX_VOCABULARY} columns, not {V}")
        rows = self.tensor("params", params, ("uint8",), B * SAMPLE_ROW_BYTES)
        if rows.address % 8:
            raise ValueError("params: must be aligned to 8 bytes")
        lists = [*self.pair("counts", count_ids, counts, "int32", x.dtype),
                 *self.pair("bias_values", bias_ids, bias_values, "float32", x.dtype)]
        out = self.tensor("tokens", tokens, ("int32",), B)
        call(self.core.cuda_sample, x.address, CODES[x.dtype], x.strides[0], B, V, rows.address, *lists,
             out.address, SAMPLE_THREADS, stream)

    def pair(self, name, ids, values, dtype, logits_dtype) -> tuple[int, int, int]:
        """(address of ids, address of values, how many) of a list; zeros without one."""
        if (ids is None) != (values is None):
            raise ValueError(f"{name}: ids and values come together or not at all")
        if ids is None:
            return 0, 0, 0
        ids = self.tensor(f"the ids of {name}", ids, ("int32",), None)
        values = self.tensor(name, values, (dtype,), *ids.shape)
        if ids.shape[0] and logits_dtype != "float32":
            raise ValueError(f"{name}: needs float32 logits, which are changed in place")
        return ids.address, values.address, ids.shape[0]

    def rope_append(self, qkv, cos, sin, positions, slots, k_pages, v_pages, q_out, *, norm="none",
                    q_norm=None, k_norm=None, eps=1e-5, post_scale=1.0, q_scale=1.0, value_embed=None,
                    gate=None, gate_scale=1.0, k_scales=None, v_scales=None, stream: int):
        """Everything between the qkv product and attention: q -> q_out (B, H, D) float32, k and v -> pages.

        As attention.rope_append, except for the cache:
        k_pages, v_pages        (P, Hkv, 16, D), two tensors or two views of one
        k_scales, v_scales      of int8 pages, (P, Hkv, 16, D / 32) float16; q, k and v are then turned
        A row with a slot or a position out of range (padding has -1) is left alone.
        """
        k = self.pages("k_pages", k_pages)
        v = self.pages("v_pages", v_pages, like=k)
        P, Hkv, _, D = k.shape
        q = self.tensor("q_out", q_out, ("float32",), None, None, D)
        B, H = q.shape[:2]
        if B > MAX_ROWS or H == 0:
            raise ValueError(f"q_out: must have at most {MAX_ROWS} rows and at least one head, not {q.shape}")
        x = self.tensor("qkv", qkv, LOGITS, B, (H + 2 * Hkv) * D, loose=1)
        table = self.tensor("cos", cos, ("float32",), None, None)
        if not 2 * table.shape[1] <= D:             # without columns nothing turns
            raise ValueError(f"cos: must be (max_positions, rot / 2) with rot <= {D}, not {table.shape}")
        sines = self.tensor("sin", sin, ("float32",), *table.shape)
        if norm not in NORMS:
            raise ValueError(f"norm: must be one of {', '.join(NORMS)}, not {norm!r}")
        if (q_norm is None) != (k_norm is None):
            raise ValueError("k_norm: q_norm and k_norm come together or not at all")
        if (value_embed is None) != (gate is None):
            raise ValueError("gate: value_embed and gate come together or not at all")
        q_weight = self.address_or_0("q_norm", q_norm, ("float32",), D)
        k_weight = self.address_or_0("k_norm", k_norm, ("float32",), D)
        embeds = [0, 0, 0, 0]
        if value_embed is not None:
            e = self.tensor("value_embed", value_embed, (x.dtype,), B, Hkv * D, loose=1)
            g = self.tensor("gate", gate, (x.dtype,), B, Hkv, loose=1)
            embeds = [e.address, e.strides[0], g.address, g.strides[0]]
        positions_at = self.tensor("positions", positions, ("int64",), B).address
        slots_at = self.tensor("slots", slots, ("int64",), B).address
        scales = [self.scales("k_scales", k_scales, k), self.scales("v_scales", v_scales, k)]
        call(self.core.cuda_rope_append, x.address, CODES[x.dtype], x.strides[0], B, H, Hkv, D, positions_at,
             slots_at, table.shape[0], P * PAGE_SIZE, table.address, sines.address, table.shape[1],
             NORMS[norm], q_weight, k_weight, float(eps), float(post_scale), float(q_scale * D**-0.5),
             *embeds, float(gate_scale), q.address, k.address, v.address, *scales, CODES[k.dtype],
             *k.strides[:3], stream)

    def paged_attention(self, q, k_pages, v_pages, block_table, lengths, states, tickets, out, *, window=0,
                        softcap=0.0, sinks=None, k_scales=None, v_scales=None, stream: int):
        """Attention of decode rows: q (B, H, D) float32, scaled already -> out (B, H * D) float32 or
        bfloat16.

        block_table     (B, W) int32: the pages of each row
        lengths         (B,) int32: how many keys each row has, its own included; 0: inactive, and its output
                        is left alone
        window          how many keys a row sees, its own included; 0: all
        softcap         c > 0: scores become c * tanh(scores / c)
        sinks           None, or (H,) float32: one more score for each query head, neither scaled nor capped,
                        whose value is 0
        k_scales, v_scales      of int8 pages. q must be turned, and so is out: call `turn` after it
        states, tickets float32, and int32 zeros: the workspace, see attention_workspace
        A row's bits depend on nothing else in the batch.
        """
        k = self.pages("k_pages", k_pages)
        v = self.pages("v_pages", v_pages, like=k)
        P, Hkv, _, D = k.shape
        query = self.tensor("q", q, ("float32",), None, None, D)
        B, H = query.shape[:2]
        if B > MAX_ROWS or H == 0 or H % Hkv or Hkv > MAX_ROWS:
            raise ValueError(f"q: must have at most {MAX_ROWS} rows and a multiple of {Hkv} heads, not "
                             f"{query.shape}")
        table, sizes = self.rows_of_pages(block_table, lengths, B)
        W = table.shape[1]
        check_window(window)
        if not 0 <= float(softcap) < float("inf"):
            raise ValueError(f"softcap: must be 0 or a positive number, not {softcap}")
        workspace = self.workspace(states, tickets, attention_workspace(B, H, Hkv, D, W))
        sinks_at = self.address_or_0("sinks", sinks, ("float32",), H)
        y = self.tensor("out", out, LOGITS, B, H * D)
        scales = [self.scales("k_scales", k_scales, k), self.scales("v_scales", v_scales, k)]
        call(self.core.cuda_paged_attention, query.address, B, H, Hkv, D, k.address, v.address, *scales,
             CODES[k.dtype], P, *k.strides[:3], table.address, table.strides[0], W, sizes.address, window,
             float(softcap), sinks_at, max_chunks(W, window), MOST_SPANS, *workspace,
             y.address, CODES[y.dtype], stream)

    def latents(self, pages) -> SimpleNamespace:
        """The pages of a layer with latent attention (P, 16, D) of floats; the D numbers of a slot lie
        together."""
        cache = self.tensor("pages", pages, FLOAT_CACHES, None, PAGE_SIZE, None, loose=2)
        D = cache.shape[2]
        if D % 16 or not 0 < D <= MAX_LATENT_KEY:
            raise ValueError(
                f"pages: must be (P, 16, D), D a multiple of 16 up to {MAX_LATENT_KEY}, not {cache.shape}")
        if cache.address % 16 or any(step * SIZES[cache.dtype] % 16 for step in cache.strides[:2]):
            raise ValueError("pages: pages and slots must start at multiples of 16 bytes")
        return cache

    def turning(self, cos, sin, positions, rows: int) -> tuple:
        """(cos, sin, half, positions, max_positions) of numbers that turn, as the launchers take them."""
        table = self.tensor("cos", cos, ("float32",), None, None)
        sines = self.tensor("sin", sin, ("float32",), *table.shape)
        places = self.tensor("positions", positions, ("int64",), rows)
        return table.address, sines.address, table.shape[1], places.address, table.shape[0]

    def append_latents(self, x, weight, cos, sin, positions, slots, pages, *, eps=1e-6, adjacent=False,
                       stream: int):
        """x (B, kept + turned) float32 or bfloat16 -> the slots (B,) of pages (P, 16, kept + turned).

        The first numbers get an RMS norm with weight (kept,), and the others turn by the rows `positions` of
        cos and sin (.., turned / 2).
        adjacent    numbers that turn together are neighbours in x; else turned / 2 apart, as they always are
                    in pages
        A row with a slot or a position out of range (padding has -1) is left alone.
        """
        cache = self.latents(pages)
        P, _, D = cache.shape
        rows = self.tensor("x", x, LOGITS, None, D, loose=1)
        B = rows.shape[0]
        factors = self.tensor("weight", weight, ("float32",), None)
        cos_at, sin_at, half, positions_at, most = self.turning(cos, sin, positions, B)
        if factors.shape[0] + 2 * half != D:
            raise ValueError(
                f"weight: must have {D - 2 * half} numbers beside {2 * half} that turn, "
                f"not {factors.shape[0]}")
        slots_at = self.tensor("slots", slots, ("int64",), B).address
        call(self.core.cuda_append_latents, rows.address, CODES[rows.dtype],
             rows.strides[0], B, factors.shape[0], factors.address, float(eps), cos_at, sin_at, half,
             int(bool(adjacent)), positions_at, slots_at, most, P * PAGE_SIZE, cache.address,
             CODES[cache.dtype], *cache.strides[:2], stream)

    def heads(self, x, width: int, alone: bool = False) -> SimpleNamespace:
        """x (B, H * width) float32 of a product by head. Heads start at multiples of 16 bytes, unless x is
        read number by number."""
        rows = self.tensor("x", x, ("float32",), None, None, loose=1)
        if not width or rows.shape[1] % width or not rows.shape[1] or rows.shape[1] // width > MAX_ROWS:
            raise ValueError(f"x: must have a multiple of {width} columns, not {rows.shape[1]}")
        if not alone and (rows.address % 16 or width % 4 or rows.shape[0] > 1 and rows.strides[0] % 4):
            raise ValueError("x: rows and heads must start at multiples of 16 bytes")
        return rows

    def head_matrices(self, blocks, kind: str, heads: int, columns: int,
                      outputs: int | None = None) -> tuple[int, int]:
        """(address, outputs of a head) of the heads' matrices (H * outputs, columns), one below the other."""
        w, has = self.packed(blocks, kind, BLOCKS | FLOATS)
        if has != columns or w.shape[0] % heads or outputs not in (None, w.shape[0] // heads):
            raise ValueError(
                f"blocks: must be {heads} matrices of {outputs or 'as many'} rows and {columns} columns, not "
                f"{w.shape[0]} rows of {has}")
        if kind in FLOATS and w.address % 16:
            raise ValueError("blocks: floats must start at a multiple of 16 bytes")
        return w.address, w.shape[0] // heads

    def by_head(self, x, blocks, out, *, kind: str, columns: int, stream: int):
        """Each head's part of x (B, H * columns) float32 times its own matrix -> out (B, H * N) float32 or
        bfloat16.

        blocks      (H * N, bytes of a row) uint8, as `multiply` takes them
        """
        rows = self.heads(x, columns)
        B = rows.shape[0]
        H = rows.shape[1] // columns
        blocks_at, outputs = self.head_matrices(blocks, kind, H, columns)
        y = self.tensor("out", out, LOGITS, B, H * outputs, loose=1)
        call(self.core.cuda_by_head, rows.address, rows.strides[0], columns, B, H, blocks_at,
             BLOCK_CODES[kind], outputs, columns, y.address, CODES[y.dtype], y.strides[0], stream)

    def absorb(self, x, blocks, cos, sin, positions, out, *, kind: str, kept: int, plain: int, scale=1.0,
               adjacent=False, stream: int):
        """Queries of heads -> queries of latents: x (B, H * (plain + turned)) float32 -> out (B, H * (kept +
        turned)) float32.

        blocks      (H * kept, bytes of a row) uint8: a matrix for each head, times which its plain numbers
                    become `kept`; None: these are left alone
        The other numbers turn, as in `append_latents`. All of out is `scale` times larger.
        A row whose position is out of range does not get its turned numbers.
        """
        half = self.tensor("cos", cos, ("float32",), None, None).shape[1]
        rows = self.heads(x, plain + 2 * half, alone=blocks is None)
        B = rows.shape[0]
        H = rows.shape[1] // (plain + 2 * half)
        blocks_at = 0
        if blocks is not None:
            blocks_at, _ = self.head_matrices(blocks, kind, H, plain, kept)
        y = self.tensor("out", out, ("float32",), B, H * (kept + 2 * half))
        cos_at, sin_at, half, positions_at, most = self.turning(cos, sin, positions, B)
        call(self.core.cuda_absorb, rows.address, rows.strides[0], B,
             H, blocks_at, BLOCK_CODES[kind], kept, plain, float(scale), cos_at, sin_at, half,
             int(bool(adjacent)), positions_at, most, y.address, stream)

    def latent_attention(self, q, pages, block_table, lengths, states, tickets, out, *, window=0,
                         stream: int):
        """`paged_attention` where all heads share the keys of pages (P, 16, D), and a value is the beginning
        of its key.

        q (B, H, D) float32, scaled already -> out (B, H * Dv) float32 or bfloat16. The workspace is that of
        latent_workspace.
        """
        cache = self.latents(pages)
        P, _, D = cache.shape
        query = self.tensor("q", q, ("float32",), None, None, D)
        B, H = query.shape[:2]
        if B > MAX_ROWS or not 0 < H <= MAX_ROWS:
            raise ValueError(f"q: must have at most {MAX_ROWS} rows and at least one head, not {query.shape}")
        y = self.tensor("out", out, LOGITS, B, None)
        Dv = y.shape[1] // H
        if y.shape[1] % H or Dv % 16 or not 0 < Dv <= min(D, MAX_LATENT_VALUE):
            raise ValueError(
                f"out: must have a multiple of 16 columns for each of {H} heads, up to "
                f"{min(D, MAX_LATENT_VALUE)}, not {y.shape[1]}")
        table, sizes = self.rows_of_pages(block_table, lengths, B)
        W = table.shape[1]
        check_window(window)
        workspace = self.workspace(states, tickets, latent_workspace(B, H, Dv, W))
        call(self.core.cuda_latent_attention, query.address, B, H, D, Dv, cache.address, CODES[cache.dtype],
             P, *cache.strides[:2], table.address, table.strides[0], W, sizes.address, window,
             max_chunks(W, window), MOST_SPANS, *workspace, y.address, CODES[y.dtype], stream)

    def rows_of_pages(self, block_table, lengths, rows: int) -> tuple[SimpleNamespace, SimpleNamespace]:
        """The tensors that say which pages each row has, and how many keys."""
        table = self.tensor("block_table", block_table, ("int32",), rows, None, loose=1)
        if not 0 < table.shape[1] <= (1 << 31) // PAGE_SIZE - CHUNK_SIZE:
            raise ValueError(f"block_table: must have at least one column, not {table.shape[1]}")
        return table, self.tensor("lengths", lengths, ("int32",), rows)

    def workspace(self, states, tickets, needed: tuple[int, int]) -> tuple[int, int]:
        """The addresses of attention's workspace, which must be as large as `needed`."""
        found = []
        for name, tensor, dtype, size in (
                ("states", states, "float32", needed[0]), ("tickets", tickets, "int32", needed[1])):
            memory = self.tensor(name, tensor, (dtype,), None)
            if memory.shape[0] < size:
                raise ValueError(f"{name}: needs {size} elements, has {memory.shape[0]}")
            found.append(memory.address)
        return found[0], found[1]

    def multiply(self, x, blocks, out, *, kind: str, norm=None, bias=None, activation=None, residual=None,
                 stream: int):
        """residual + activation(norm(x) W^T + bias) -> out (B, N) float32 or bfloat16, B up to
        MAX_PRODUCT_ROWS.

        x           (B, >= K) float32 or bfloat16; its first K columns are multiplied
        blocks      the rows of W, uint8: N, or with a gate 2 N. `kind` is their type, as a GGUF file has it
                    or floats; see `packed`
        norm        None, or (weight float32 or None, eps): RMS norm of all columns of x
        bias        None, or float32, an element for each row of W
        residual    None, or (B, N) float32
        """
        w, columns = self.packed(blocks, kind, BLOCKS | FLOATS)
        x_at = self.tensor("x", x, LOGITS, None, None, loose=1)
        B, width = x_at.shape
        per_load = 16 // SIZES[x_at.dtype]
        if width < columns:
            raise ValueError(f"x: must have at least {columns} columns, not {width}")
        if B > MAX_PRODUCT_ROWS:
            raise ValueError(f"x: must have at most {MAX_PRODUCT_ROWS} rows, not {B}")
        if x_at.address % 16 or width % 8 or B > 1 and x_at.strides[0] % per_load:
            raise ValueError("x: rows must start at multiples of 16 bytes and have a multiple of 8 columns")
        if kind in FLOATS and w.address % 16:
            raise ValueError("blocks: floats must start at a multiple of 16 bytes")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: must be one of {', '.join(map(str, ACTIVATIONS))}, not "
                             f"{activation!r}")
        halves = 2 if GATES.get(activation) else 1
        if w.shape[0] % halves:
            raise ValueError(f"blocks: must be gates and as many ups, not {w.shape[0]} rows")
        y = self.tensor("out", out, LOGITS, B, w.shape[0] // halves, loose=1)
        weight, eps = norm or (None, 0.0)
        weight_at = self.address_or_0("norm", weight, ("float32",), width)
        bias_at = self.address_or_0("bias", bias, ("float32",), w.shape[0])
        residual_at, residual_stride = self.rows_or_0("residual", residual, y.shape)
        call(self.core.cuda_multiply, x_at.address, CODES[x_at.dtype], x_at.strides[0], B,
             int(norm is not None), width, weight_at, float(eps), w.address, BLOCK_CODES[kind], y.shape[1],
             columns, bias_at, ACTIVATIONS[activation], residual_at, residual_stride, y.address,
             CODES[y.dtype], y.strides[0], stream)

    def rows_or_0(self, name: str, rows, shape: tuple) -> tuple[int, int]:
        """(address, stride) of float32 rows that may be apart; zeros for None."""
        if rows is None:
            return 0, 0
        found = self.tensor(name, rows, ("float32",), *shape, loose=1)
        return found.address, found.strides[0]

    def dequantize(self, blocks, out, *, kind: str, stream: int):
        """Packed weights (N, bytes of a row) -> out (N, K) float32 or bfloat16."""
        w, columns = self.packed(blocks, kind)
        y = self.tensor("out", out, LOGITS, w.shape[0], columns)
        call(self.core.cuda_dequantize, w.address, BLOCK_CODES[kind], w.shape[0], columns, y.address,
             CODES[y.dtype], stream)

    def route(self, logits, ids, shares, *, sum_to_one: bool, slots=None, stream: int):
        """The n largest logits of each row (T, E) float32 -> ids (T, n) int32 and shares (T, n) float32.

        Of equal logits the lower id comes first. Shares are the softmax over the n, or over all E unless
        sum_to_one.
        slots       None, or (T,) int64: a row whose slot is below 0 is padding. Its ids are -1, its shares
                    are left alone
        """
        logits_at = self.tensor("logits", logits, ("float32",), None, None)
        T, E = logits_at.shape
        chosen = self.tensor("ids", ids, ("int32",), T, None)
        if not 0 < chosen.shape[1] <= E <= MAX_EXPERTS:
            raise ValueError(f"ids: must have 1 to {E} columns, of at most {MAX_EXPERTS} experts, not "
                             f"{chosen.shape[1]}")
        weights = self.tensor("shares", shares, ("float32",), *chosen.shape)
        slots_at = self.address_or_0("slots", slots, ("int64",), T)
        call(self.core.cuda_route, logits_at.address, slots_at, T, E, chosen.shape[1], int(bool(sum_to_one)),
             chosen.address, weights.address, stream)

    def group(self, ids, order, items, *, experts: int, item_pairs: int, stream: int):
        """Sort pairs by their expert: ids (P,) int32 -> order (P,) and items (most_items(experts, P,
        item_pairs), 3) int32.

        An item is (expert, first place in `order`, how many pairs: up to item_pairs, 0 in an unused item). A
        pair whose id is no expert is in no item.
        """
        if not 0 < experts <= MAX_EXPERTS or item_pairs not in (FEW_PAIRS, MANY_PAIRS):
            raise ValueError(
                f"experts: must be 1 to {MAX_EXPERTS} in items of {FEW_PAIRS} or {MANY_PAIRS} pairs, "
                f"not {experts} of {item_pairs}")
        ids_at = self.tensor("ids", ids, ("int32",), None)
        pairs = ids_at.shape[0]
        by_expert = self.tensor("order", order, ("int32",), pairs)
        made = self.tensor("items", items, ("int32",), most_items(experts, pairs, item_pairs), 3)
        call(self.core.cuda_group, ids_at.address, pairs, experts, item_pairs, by_expert.address,
             made.address, made.shape[0], stream)

    def multiply_experts(self, x, order, items, blocks, out, *, kind: str, gate=None, bias=None, shares=None,
                         stream: int):
        """Each pair's x times its expert's weights -> out (P, N) float32 or bfloat16.

        x               (T or P, K), T dividing P: pair p has row p // (P / T). float32 with items of
                        FEW_PAIRS, bfloat16 with MANY_PAIRS
        order, items    what `group` gives
        blocks          (E * N, bytes of a row) uint8, as `multiply` takes them; with a `gate` (2 * E * N,
                        ..), the ups of all experts below all gates
        bias            None, or float32, an element for each row of blocks
        shares          None, or (P,) float32, factors of the output
        """
        w, columns = self.packed(blocks, kind, BLOCKS | FLOATS)
        if gate not in GATES:
            raise ValueError(f"gate: must be one of {', '.join(map(str, GATES))}, not {gate!r}")
        pairs = self.tensor("order", order, ("int32",), None)
        made = self.tensor("items", items, ("int32",), None, 3)
        x_at = self.tensor("x", x, LOGITS, None, columns)
        y = self.tensor("out", out, LOGITS, *pairs.shape, None, loose=1)
        P = pairs.shape[0]
        rows = x_at.shape[0]
        N = y.shape[1] * (2 if gate else 1)
        if made.shape[0] > MAX_ROWS:
            raise ValueError(f"items: must be at most {MAX_ROWS}, not {made.shape[0]}")
        if x_at.address % 16 or columns % 8 or not rows or P % rows:
            raise ValueError("x: must have rows at multiples of 16 bytes, of which each has as many of the "
                             f"{P} pairs, not {x_at.shape}")
        if not N or w.shape[0] % N or kind in FLOATS and w.address % 16:
            raise ValueError(f"blocks: must have a multiple of {N} rows at a multiple of 16 bytes, not "
                             f"{w.shape[0]}")
        bias_at = self.address_or_0("bias", bias, ("float32",), w.shape[0])
        shares_at = self.address_or_0("shares", shares, ("float32",), P)
        call(self.core.cuda_multiply_experts, x_at.address, CODES[x_at.dtype], P // rows, pairs.address,
             made.address, made.shape[0], w.address, BLOCK_CODES[kind], w.shape[0] // N, y.shape[1], columns,
             GATES[gate], bias_at, shares_at, y.address, CODES[y.dtype], y.strides[0], stream)

    def shrink(self, adapters, matrix: int, x, sums, *, norm=None, stream: int):
        """The first half of what adapters add to the product with a matrix: scales * (A norm(x)) -> sums (B,
        MAX_RANKS) float32.

        A row's sums are as many as its adapter has ranks; the rest of the row is left alone.
        adapters    (B,) int64: the address of each row's adapter table (csrc/cuda/launch.h), or 0
        x           (B, K) float32 or bfloat16
        norm        as in `multiply`
        """
        x_at = self.tensor("x", x, LOGITS, None, None, loose=1)
        B, width = x_at.shape
        if B > MAX_ROWS:
            raise ValueError(f"x: must have at most {MAX_ROWS} rows, not {B}")
        tables = self.tensor("adapters", adapters, ("int64",), B)
        made = self.tensor("sums", sums, ("float32",), B, MAX_RANKS)
        weight, eps = norm or (None, 0.0)
        weight_at = self.address_or_0("norm", weight, ("float32",), width)
        call(self.core.cuda_shrink, tables.address, matrix, x_at.address, CODES[x_at.dtype], x_at.strides[0],
             B, int(norm is not None), width, weight_at, float(eps), made.address, MAX_RANKS, stream)

    def expand(self, adapters, matrix: int, sums, y, out, *, activation=None, residual=None, stream: int):
        """The second half: residual + activation(y + B sums) -> out (B, N) float32 or bfloat16.

        sums        what `shrink` gave
        y           (B, N), or with a gate (B, 2 N), float32: the product with its bias
        residual    None, or (B, N) float32
        """
        made = self.tensor("sums", sums, ("float32",), None, MAX_RANKS)
        before = self.tensor("y", y, ("float32",), None, None, loose=1)
        B = made.shape[0]
        tables = self.tensor("adapters", adapters, ("int64",), *made.shape[:1])
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: must be one of {', '.join(map(str, ACTIVATIONS))}, not "
                             f"{activation!r}")
        halves = 2 if GATES.get(activation) else 1
        if before.shape[0] != B or B > MAX_ROWS or before.shape[1] % halves:
            raise ValueError(f"y: must have {B} rows, at most {MAX_ROWS}, and gates and as many ups, not "
                             f"{before.shape}")
        to = self.tensor("out", out, LOGITS, B, before.shape[1] // halves, loose=1)
        residual_at, residual_stride = self.rows_or_0("residual", residual, to.shape)
        call(self.core.cuda_expand, tables.address, matrix, B, made.address, MAX_RANKS, before.address,
             before.strides[0], to.shape[1], ACTIVATIONS[activation], residual_at, residual_stride,
             to.address, CODES[to.dtype], to.strides[0], stream)

    def packed(self, blocks, kind: str, kinds=BLOCKS) -> tuple[SimpleNamespace, int]:
        """(the rows of a matrix, its columns). `blocks` are of the type `kind`, one of `kinds`."""
        if kind not in kinds:
            raise ValueError(f"kind: must be one of {', '.join(kinds)}, not {kind!r}")
        columns, size = kinds[kind]
        rows = self.tensor("blocks", blocks, ("uint8",), None, None)
        if not rows.shape[1] or rows.shape[1] % size:
            raise ValueError(f"blocks: must be rows of blocks of {size} bytes, not {rows.shape}")
        if rows.address % 2 and size % 2 == 0:
            raise ValueError("blocks: must begin at an even address")
        return rows, rows.shape[1] // size * columns


def check_window(window: int) -> None:
    if not isinstance(window, int) or not 0 <= window < 1 << 31:
        raise ValueError(f"window: must be an integer from 0, not {window!r}")


def call(function, *arguments) -> None:
    if message := function(*arguments):
        raise RuntimeError(f"CUDA: {message}")
