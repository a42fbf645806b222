"""Weight matrices in tiles and their products: checked calls of the compiled kernels, for numpy arrays and
torch CPU tensors.

    arena = Arena(100 << 20)                                    # memory in huge pages; one for a model,
    filled in the order of use
    qkv = Matrix(arena, "q4_1", 960, 576)                       # (N, K), in tiles of 16 rows
    qkv.fill(q, "q4_1"); qkv.fill(k, "q4_1", first_tile=36)     # GGUF's blocks as uint8 rows, or floats that
    are quantized
    qkv = Matrix(arena, ["q4_k"] * 48 + ["q6_k"] * 12, 960, 576)    # a type for each tile
    multiply(x, qkv, norm=(weight, 1e-5), out=out)              # out = norm(x) W^T

For q types, x is rounded to int8 with a scale for 32 columns, and to 16 bits in blocks that stand out of
their row. For float types it stays float32. A row's bits depend on that row alone. A wrong argument raises a
ValueError that names it.
"""

import numpy
from chatlm.worker.kernels.arrays import FLOAT32, look_at, vector, vector_or_none
from chatlm.worker.kernels.library import _core

KINDS = {name: number for number, (name, _) in enumerate(_core.weight_types())}     # tiles.h's Weight
COLUMNS = dict(_core.weight_types())            # of a block in a file; a matrix has a multiple of them
# kinds that only blocks of a file can fill: nothing quantizes to them
FROM_FILES = tuple(_core.file_types())
# kind of floats -> types of its rows
SOURCES = {"f32": ("float32",), "f16": ("float16",), "bf16": ("bfloat16", "uint16")}
# as csrc/activations.def lists them
ACTIVATIONS = {None: 0} | {name: number for number, (name, _) in enumerate(_core.activations(), 1)}
GATES = tuple(name for name, gated in _core.activations() if gated)
TILE_ROWS = 16
LIMIT = 1 << 31


def _kind(name: str, kind) -> int:
    if kind not in KINDS:
        raise ValueError(f"{name}: must be one of {', '.join(KINDS)}, not {kind!r}")
    return KINDS[kind]


def _integer(name: str, value, least: int, most: int) -> int:
    if not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}: must be an integer from {least} to {most}, not {value!r}")
    return value


class Arena:
    """Memory for matrices, in huge pages where the system has them. It grows when it is full; unfilled memory
    costs nothing."""

    def __init__(self, size: int):
        self._arena = _core.Arena(_integer("size", size, 1, 1 << 46))

    @property
    def used_bytes(self) -> int:
        return self._arena.used

    @property
    def reserved_bytes(self) -> int:
        return self._arena.reserved


class Matrix:
    """Weights (rows, columns) in an arena, zeros until they are filled. `tiles` is what the compiled half
    takes.

    kind: the type of all weights, or a list with a q type for each tile.
    """

    def __init__(self, arena: Arena, kind: str | list, rows: int, columns: int):
        if not isinstance(arena, Arena):
            raise ValueError(f"arena: must be an Arena, not {type(arena).__name__}")
        _integer("rows", rows, 1, LIMIT)
        _integer("columns", columns, 1, LIMIT)
        self.kinds = list(kind) if isinstance(kind, (list, tuple)) else [kind]
        codes = [_kind("kind", name) for name in self.kinds]
        for name in set(self.kinds):
            if columns % COLUMNS[name]:
                raise ValueError(f"columns: must be a multiple of {COLUMNS[name]} for {name}, not {columns}")
        if len(codes) == 1:
            self.tiles = arena._arena.allocate(codes[0], rows, columns)
        elif len(codes) != -(-rows // TILE_ROWS) or set(self.kinds) & set(SOURCES):
            raise ValueError(f"kind: must be one for each of {-(-rows // TILE_ROWS)} tiles, and none of "
                             f"{', '.join(SOURCES)}")
        else:
            self.tiles = arena._arena.allocate_mixed(codes, rows, columns)
        self.rows = rows
        self.columns = columns
        self.arena = arena
        self.finite = True          # no NaN or infinity was filled in, or came of it
        self.kind = " with ".join(sorted(set(self.kinds)))

    @property
    def nbytes(self) -> int:
        return self.tiles.bytes

    def fill(self, source, source_kind: str, first_tile: int = 0, tile_step: int = 1) -> None:
        """Rows 16 i .. 16 i + 15 of `source` -> tile first_tile + i * tile_step. Floats are rounded or
        quantized to the tile's kind.

        source      (n, columns) floats of source_kind, or uint8 (n, bytes of a row) as GGUF has them. Blocks
                    of a q type go only into tiles of that type, and tiles of FROM_FILES take nothing else
        """
        code = _kind("source_kind", source_kind)
        if source_kind not in SOURCES and source_kind not in self.kinds:
            raise ValueError(f"source_kind: {source_kind} blocks fit {source_kind} tiles only, not "
                             f"{self.kind}")
        address, kind, (rows, columns), stride = look_at("source", source,
                                                         (*SOURCES.get(source_kind, ()), "uint8"), None, None,
                                                         rows_apart=True)
        raw = _core.row_bytes(code, self.columns)
        expected = raw if kind == "uint8" else self.columns
        if columns != expected:
            raise ValueError(f"source: must have {expected} columns ({kind}), not {columns}")
        tiles = -(-rows // TILE_ROWS)
        _integer("tile_step", tile_step, 1, LIMIT)
        _integer("first_tile", first_tile, 0, self.tiles.count - 1)
        if tiles and first_tile + (tiles - 1) * tile_step >= self.tiles.count:
            raise ValueError(f"source: its {rows} rows reach beyond the matrix' {self.tiles.count} tiles")
        into = set(self.kinds)
        if len(self.kinds) > 1:
            into = set(self.kinds[first_tile:first_tile + tiles * tile_step:tile_step])
        only_blocks = into & set(FROM_FILES)
        if source_kind in SOURCES and only_blocks:
            raise ValueError(f"source_kind: nothing here quantizes to {' and '.join(sorted(only_blocks))}: "
                             f"give blocks of a file, not {source_kind}")
        if source_kind not in SOURCES and into - {source_kind}:
            raise ValueError(f"source_kind: {source_kind} blocks fit {source_kind} tiles only, not "
                             f"{' and '.join(sorted(into))}")
        if source_kind == "i8_row":
            check_row_scales(source, rows)
        row_bytes = stride if kind == "uint8" else stride * raw // self.columns
        self.finite &= self.tiles.fill(address, code, row_bytes, rows, first_tile, tile_step)

    def dequantize(self):
        """Exactly the values that the tiles hold: a numpy array (rows, columns) float32."""
        out = numpy.empty((self.rows, self.columns), numpy.float32)
        embed(self, numpy.arange(self.rows), out)
        return out


def check_row_scales(source, rows: int) -> None:
    """Blocks of i8_row begin with their scale, and a row of tiles has one."""
    scales = numpy.asarray(source).reshape(rows, -1, 260)[:, :, :4]
    if (scales != scales[:, :1]).any():
        raise ValueError("source: all blocks of a row of i8_row must have the same scale")


def check_matrix(matrix, name: str = "matrix") -> None:
    if not isinstance(matrix, Matrix):
        raise ValueError(f"{name}: must be a Matrix, not {type(matrix).__name__}")


def embed(matrix: Matrix, ids, out) -> None:
    """Row ids[i] of the matrix -> out[i]; ids (n,) int64, out (n, columns) float32."""
    check_matrix(matrix)
    out_at, _, (rows, _), stride = look_at("out", out, FLOAT32, None, matrix.columns, rows_apart=True,
                                           writable=True)
    ids_at = vector("ids", ids, "int64", rows)
    if rows and not (0 <= int(ids.min()) and int(ids.max()) < matrix.rows):
        raise ValueError(f"ids: each must be a row of the matrix' {matrix.rows}")
    matrix.tiles.embed(ids_at, rows, out_at, stride)


def check_linear(matrix, width: int, norm, bias, activation) -> tuple[tuple[bool, int, float, int], int, int]:
    """Check what a product takes besides x and out. x has `width` columns.

    -> (is there a norm?, address of its weight, eps, address of the bias), the activation's code, the most
    columns of out
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: must be one of {', '.join(map(repr, ACTIVATIONS))}, not "
                         f"{activation!r}")
    if activation in GATES and matrix.tiles.count % 2:
        raise ValueError(f"matrix: {activation} takes an even number of tiles, not {matrix.tiles.count}")
    if norm is not None and (not isinstance(norm, tuple) or len(norm) != 2):
        raise ValueError(f"norm: must be None or (weight, eps), not {norm!r}")
    weight, eps = norm or (None, 0.0)
    weight_at = vector_or_none("norm", weight, "float32", width)
    bias_at = vector_or_none("bias", bias, "float32", matrix.rows)
    most = matrix.tiles.count // 2 * TILE_ROWS if activation in GATES else matrix.rows
    return (norm is not None, weight_at, float(eps), bias_at), ACTIVATIONS[activation], most


def multiply(x, matrix: Matrix, *, norm=None, bias=None, activation=None, residual=None, out, fine=False,
             _tiles_at_once=0, _groups_at_once=0):
    """out = residual + activation(norm(x) W^T + bias), all float32.

    x           (T, K); it may not share memory with out
    out         (T, up to N), or with gates up to N / 2
    norm        None, or (weight (K,) or None, eps): RMS norm of each row of x
    bias        None, or (N,), in the order of the tiles' rows
    activation  None or one of ACTIVATIONS. With one of GATES ("geglu" by tanh, "gelu" by erf) tiles alternate
                gate and up, 16 rows each
    residual    None, or as out, which it may be
    fine        quantized matrices round every block of 32 columns of x to 16 bits, not only those that stand
                out
    """
    check_matrix(matrix)
    x_at, _, (rows, columns), x_stride = look_at("x", x, FLOAT32, None, matrix.columns, rows_apart=True)
    before, code, most = check_linear(matrix, columns, norm, bias, activation)
    _integer("_tiles_at_once", _tiles_at_once, 0, LIMIT)
    _integer("_groups_at_once", _groups_at_once, 0, LIMIT)
    if activation in GATES and _tiles_at_once % 2:
        raise ValueError(f"_tiles_at_once: must be even for {activation}, not {_tiles_at_once}")
    out_at, _, (_, width), out_stride = look_at("out", out, FLOAT32, rows, None, rows_apart=True,
                                                writable=True)
    if not 1 <= width <= most:
        raise ValueError(f"out: must have 1 to {most} columns, not {width}")
    residual_at = 0
    residual_stride = 0
    if residual is not None:
        residual_at, _, _, residual_stride = look_at("residual", residual, FLOAT32, rows, width,
                                                     rows_apart=True)
    matrix.tiles.multiply(x_at, rows, x_stride, *before, residual_at, residual_stride, code, out_at,
                          out_stride, width, bool(fine), _tiles_at_once, _groups_at_once)
