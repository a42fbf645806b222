"""Program: a model's step, recorded once as a list of ops over fixed buffers and then run by compiled threads
alone.

csrc/ops.def has a row for each op. Where the row says all that must be checked, the method that records the
op is made from the row. The other ops have a method here, which checks the rest.

    program = Program(max_tokens=512, max_rows=64)
    program.embed(table, program.token_ids, x)                          # x (512, C) float32: numpy or torch
    CPU, contiguous
    program.linear(x, qkv_matrix, qkv, norm=(weight, 1e-5)); ...        # see each method
    program.gather_rows(x, program.logit_rows, last)                    # last (64, C): from here on, only
    rows that have logits program.linear(last, head_matrix, logits, norm=(weight, 1e-5));
    program.sample(logits)

    ticket = program.start(token_ids, previous, starts, lengths, tables, logit_rows, sampling)
    tokens = program.finish(ticket)

One recording serves every step of T <= max_tokens tokens and R <= max_rows logit rows. An op runs over the
step's T rows. If what it reads came through `gather_rows`, it runs over the R logit rows. The bits of a row
depend on that row alone: not on the batch, the threads or the instruction set. A wrong argument raises a
ValueError that names it while the op is recorded, before anything runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy

from chatlm.worker.kernels.adapters import AdaptedMatrices
from chatlm.worker.kernels.arrays import CACHE_CODES, CODES, FLOAT32, look_at, vector, vector_or_none
from chatlm.worker.kernels.attention import (PAGE_SIZE, appended, check_cache, check_latents, check_parts,
                                             check_softcap, check_together, groups_of, rope_job, sinks_at)
from chatlm.worker.kernels.library import _core
from chatlm.worker.kernels.ranks import Ranks, check_gathered
from chatlm.worker.kernels.sampling import SampleBatch
from chatlm.worker.kernels.tiles import (ACTIVATIONS, COLUMNS, GATES, KINDS, TILE_ROWS, Matrix,
                                         check_linear, check_matrix)

NONE = (0, 0)               # no buffer
KINDS_OF_FLOATS = ("f32", "f16", "bf16")
TOKENS = "max_tokens"
LOGIT_ROWS = "max_rows"
MAX_EXPERTS = _core.MAX_EXPERTS
MAX_CHOSEN = _core.MAX_CHOSEN
MAX_TAPS = _core.MAX_TAPS


def number(value: Any) -> float:
    """The number itself, or the only element of an array."""
    return float(value.item() if hasattr(value, "item") else value)


class Buffers:
    """The arrays that recorded ops read and write.

    They are kept alive. Each has rows of one sort, TOKENS or LOGIT_ROWS, and an op may read only what an
    earlier op wrote."""

    def __init__(self, max_tokens: int, max_rows: int):
        self.limits = {TOKENS: max_tokens, LOGIT_ROWS: max_rows}
        # address of a buffer that an op has written -> the sort of its rows
        self.rows_of: dict[int, str] = {}
        self.lost: set[int] = set()             # addresses of buffers that other ranks may have written since
        self.kept: list = []

    def keep(self, *arrays) -> None:
        self.kept += [array for array in arrays if array is not None]

    def look(self, name: str, array, rows_of: str, columns: int | None = None,
             writable: bool = False) -> tuple[int, int]:
        """(address, columns) of a buffer."""
        address, _, (_, width), _ = look_at(name, array, FLOAT32, self.limits[rows_of], columns,
                                            writable=writable)
        if not width:
            raise ValueError(f"{name}: must have columns")
        return address, width

    def written(self, name: str, array, rows_of: str, columns: int | None = None) -> tuple[int, int]:
        """(address, columns) of a buffer that an op writes, for all rows of this sort."""
        buffer = self.look(name, array, rows_of, columns, writable=True)
        if self.rows_of.setdefault(buffer[0], rows_of) != rows_of:
            raise ValueError(f"{name}: holds rows of {self.rows_of[buffer[0]]} already")
        self.lost.discard(buffer[0])
        return buffer

    def read(self, name: str, array, multiple: int = 1) -> tuple[tuple[int, int], str]:
        """((address, columns), sort of rows) of a buffer that an earlier op wrote."""
        address = look_at(name, array, FLOAT32, None, None)[0]
        if (rows_of := self.rows_of.get(address)) is None:
            raise ValueError(f"{name}: no op has written it yet")
        if address in self.lost:
            raise ValueError(f"{name}: the other ranks have it; no op has written it since")
        buffer = self.look(name, array, rows_of)
        if buffer[1] % multiple:
            raise ValueError(f"{name}: must have a multiple of {multiple} columns, not {buffer[1]}")
        return buffer, rows_of

    def read_like(self, name: str, array, rows_of: str, columns: int) -> tuple[int, int]:
        """(address, columns) of a buffer that must have these rows and columns."""
        buffer, own_rows = self.read(name, array)
        if own_rows != rows_of or buffer[1] != columns:
            raise ValueError(f"{name}: must be ({rows_of} = {self.limits[rows_of]}, {columns}), as what it "
                             "goes with")
        return buffer

    def read_like_or_none(self, name: str, array, rows_of: str, columns: int) -> tuple[int, int]:
        """The same, or NONE without an array."""
        return NONE if array is None else self.read_like(name, array, rows_of, columns)

    def lose(self, buffer: tuple[int, int]) -> None:
        """Other ranks may overwrite the buffer from here on. No op may read it until one writes it again."""
        self.lost.add(buffer[0])


class Marker:
    """Stands for an array that only a step brings, while ops are recorded.

    Slots and attention belong to one group of layers."""

    def __init__(self, name: str, group: int = 0):
        self.name = name
        self.group = group

    def __repr__(self):
        return f"<program.{self.name}>" if not self.group else f"<program.parts[{self.group}].{self.name}>"


MOST_GROUPS = 64            # of layers; the pages of each have tables of their own


class Program:
    """See the module. A Program keeps alive what was recorded, and waits for a running step before it goes.

    Layers may form groups whose pages have tables of their own. `parts[group]` has the slots and attention of
    a group.
    """

    parts: tuple[type[Program] | SimpleNamespace, ...]
    token_ids, previous_token_ids, positions, slots, attention, logit_rows, sequences = map(
        Marker,
        ("token_ids", "previous_token_ids", "positions", "slots", "attention", "logit_rows", "sequences"))
    turns = positions           # rope_append turns by them if a step brings no other rows of cos and sin

    def __init__(self, max_tokens: int, max_rows: int, fine: bool = False):
        """fine: products with quantized matrices round every block of x to 16 bits
        (`multiply`)."""
        self._program = _core.Program(max_tokens, max_rows)
        self.fine = fine
        self._buffers = Buffers(max_tokens, max_rows)
        self.logits = None
        self.adapters = AdaptedMatrices()
        # width -> the result of a mamba2 convolution; all layers of a width share it
        self._convolved: dict[int, numpy.ndarray] = {}

    # ---- recording

    def embed(self, table, ids, out, part=None) -> None:
        """Rows `ids` (token_ids, previous_token_ids or positions) of a table -> out. A negative id gives row
        0.

        table       a Matrix, or plain values (V, C)
        part        (first, V): the table has only the rows from `first` on, of V in all; other ids give -0.0,
                    which changes no sum
        """
        if ids not in (self.token_ids, self.previous_token_ids, self.positions):
            raise ValueError("ids: must be program.token_ids, program.previous_token_ids or "
                             f"program.positions, not {ids!r}")
        if isinstance(table, Matrix):
            own = {"tiles": table.tiles}
            shape = (table.rows, table.columns)
        else:
            address, dtype, shape, _ = look_at("table", table, tuple(CODES), None, None)
            own = {"table": address, "table_type": CODES[dtype]}
        first, vocabulary = part or (0, shape[0])
        if not 0 <= first < vocabulary:
            raise ValueError(f"part: must be a row and a larger number of rows, not {part!r}")
        out_at = self._buffers.written("out", out, TOKENS, shape[1])
        self._record("embed", TOKENS, (table, out), table_rows=shape[0], first_row=first,
                     vocabulary=vocabulary, previous_ids=ids is self.previous_token_ids,
                     by_position=ids is self.positions, out=out_at, **own)

    def look_up(self, table, ids, out, part=None) -> None:
        """Rows `ids` (token_ids or previous_token_ids) of a table that stays in its file -> out (max_tokens,
        K).

        A negative id gives row 0.
        table       .kind is a type of weights, .table its N rows: floats (N, K), or GGUF blocks (N, bytes of
                    a row) uint8
        part        as in `embed`, with `first` 0
        """
        if table.kind in KINDS_OF_FLOATS:
            return self.embed(table.table, ids, out, part)
        if table.kind not in KINDS:
            raise ValueError(f"table: must be of a type among {', '.join(KINDS)}, not {table.kind!r}")
        if ids not in (self.token_ids, self.previous_token_ids):
            raise ValueError(f"ids: must be program.token_ids or program.previous_token_ids, not {ids!r}")
        out_at = self._buffers.written("out", out, TOKENS)
        if out_at[1] % COLUMNS[table.kind]:
            raise ValueError(f"out: must have a multiple of {COLUMNS[table.kind]} columns for {table.kind}, "
                             f"not {out_at[1]}")
        row_bytes = _core.row_bytes(KINDS[table.kind], out_at[1])
        address, _, (rows, _), _ = look_at("table", table.table, ("uint8",), None, row_bytes)
        self._record("embed", TOKENS, (table.table, out), table=address, file_type=KINDS[table.kind],
                     file_row_bytes=row_bytes, table_rows=rows, first_row=0,
                     vocabulary=(part or (0, rows))[1], previous_ids=ids is self.previous_token_ids,
                     out=out_at)

    def layer_inputs(self, projected, rows, weight, eps: float, out) -> None:
        """(weight * rms(each part of projected) + sqrt(P) * rows) / sqrt(2) -> out, which may be projected.

        projected, rows, out    (max_tokens, L * P): a part for each of L layers
        weight                  (P), P a multiple of 16
        """
        x_at, rows_of = self._buffers.read("projected", projected, 16)
        other_at = self._buffers.read_like("rows", rows, rows_of, x_at[1])
        part = len(weight)
        if rows_of != TOKENS or part % 16 or x_at[1] % part:
            raise ValueError(f"weight: must have a multiple of 16 values that divides {x_at[1]} columns of "
                             f"tokens, not {part}")
        weight_at = vector("weight", weight, "float32", part)
        out_at = self._buffers.written("out", out, TOKENS, x_at[1])
        if out_at[0] == other_at[0]:
            raise ValueError("out: may not be rows")
        self._record("layer_inputs", TOKENS, (projected, rows, weight, out), projected=x_at, rows=other_at,
                     weight=weight_at, part=part, eps=float(eps), out=out_at)

    def gate_input(self, gate, inputs, first: int, out) -> None:
        """gelu(gate) * inputs[:, first:first + P] -> out, which may be gate, both (max_tokens, P). gelu is
        that of tanh."""
        x_at, gate_rows = self._buffers.read("gate", gate, 16)
        inputs_at, inputs_rows = self._buffers.read("inputs", inputs, 16)
        fits = first % 16 == 0 and 0 <= first <= inputs_at[1] - x_at[1]
        if gate_rows != TOKENS or inputs_rows != TOKENS or not fits:
            raise ValueError(f"first: must be a multiple of 16 that leaves {x_at[1]} of {inputs_at[1]} "
                             f"columns of tokens, not {first!r}")
        out_at = self._buffers.written("out", out, TOKENS, x_at[1])
        self._record("gate_input", TOKENS, (gate, inputs, out), gate=x_at, inputs=inputs_at, first=first,
                     out=out_at)

    def given(self, x) -> None:
        """The caller writes x (max_tokens, C) itself before it starts a step, while no earlier step is
        running."""
        self._buffers.keep(x)
        self._buffers.written("x", x, TOKENS)

    def gather_rows(self, x, rows, out) -> None:
        """The rows of x that have logits -> out (max_rows, C)."""
        _is_marker("rows", rows, self.logit_rows)
        x_at, rows_of = self._buffers.read("x", x)
        if rows_of != TOKENS:
            raise ValueError("x: was gathered already")
        self._record("gather_rows", LOGIT_ROWS, (x, out), x=x_at,
                     out=self._buffers.written("out", out, LOGIT_ROWS, x_at[1]))

    def linear(self, x, matrix, out, norm=None, bias=None, activation=None, residual=None,
               adapted=None) -> None:
        """out = residual + activation(norm(x) W^T + bias + what the rows' adapters add). residual may be out,
        x may not.

        norm        None, or (weight or None, eps): RMS norm over the whole width of x
        activation  None or one of ACTIVATIONS; with one of GATES, tiles alternate gate and up, and out is
                    half as wide
        adapted     None, or the name that adapters have for the matrix (`make_adapter`)
        A matrix narrower than x takes the first columns of x after the norm.
        """
        check_matrix(matrix)
        x_at, rows_of = self._buffers.read("x", x)
        if x_at[1] < matrix.columns:
            raise ValueError(f"x: must have at least the matrix' {matrix.columns} columns, not {x_at[1]}")
        before, code, most = check_linear(matrix, x_at[1], norm, bias, activation)
        if norm is not None and x_at[1] != matrix.columns and x_at[1] % 16:
            raise ValueError(f"x: must have a multiple of 16 columns, not {x_at[1]}")
        out_at = self._buffers.written("out", out, rows_of)
        if not out_at[1] <= most:
            raise ValueError(f"out: must have 1 to {most} columns, not {out_at[1]}")
        if out_at[0] == x_at[0]:
            raise ValueError("out: may not be x")
        residual_at = self._buffers.read_like_or_none("residual", residual, rows_of, out_at[1])
        number = -1
        if adapted is not None and matrix.columns % 16 == 0:
            number = self.adapters.record(adapted, matrix, activation in GATES)
        has_norm, norm_at, eps, bias_at = before
        self._record("linear", rows_of, (x, matrix, out, norm and norm[0], bias, residual), x=x_at,
                     tiles=matrix.tiles, norm=has_norm, norm_weight=norm_at, eps=eps, bias=bias_at,
                     activation=code, residual=residual_at, adapted=number, fine=self.fine, out=out_at)

    def experts(self, x, logits, gate_up, down, out, *, norm, biases, activation, chosen: int,
                sum_to_one: bool, residual: bool = True, sigmoids: bool = False, correction_bias=None,
                groups: tuple[int, int] = (1, 1), share_scale: float = 1.0, group_best: int = 2, scales=None,
                jitter=None) -> None:
        """x + the sum over a row's experts of share * (activation(norm(x) gate_up^T + bias) down^T + bias) ->
        out.

        out may be x. Without `residual`, x is not added.

        Which experts a row has, and their shares:
        logits      (max_tokens, E): the `chosen` largest of a row, of equal ones the lower ids. Shares are
                    the softmax over the logits of these, or over all E unless `sum_to_one`
        correction_bias
                    None, or (E): added to an expert's part of the softmax over all, or to its sigmoid, when
                    it is chosen
        groups      (n, k): experts are chosen from k of n groups, those whose `group_best` best experts have
                    the largest sum
        share_scale a factor of all shares
        sigmoids    experts and shares are those of `sigmoid_routes`
        jitter      None, or the experts have shares as `sparse_routes` says
        scales      None, or (E): each share is multiplied by the expert's

        What they compute:
        norm        None, or (weight or None, eps): RMS norm of x
        gate_up     (2 * E * F, C): gates and ups of all experts, whose tiles alternate; (E * F, C) with an
                    activation without gates
        down        (E * C, F)
        biases      of gate_up and of down, each None or in the order of the tiles' rows
        """
        for name, matrix in (("gate_up", gate_up), ("down", down)):
            check_matrix(matrix, name)
        x_at, rows_of = self._buffers.read("x", x, 16)
        logits_at, logits_rows = self._buffers.read("logits", logits)
        C = x_at[1]
        F = down.columns
        E = logits_at[1]
        if rows_of != TOKENS or logits_rows != TOKENS or E > MAX_EXPERTS:
            raise ValueError(f"logits: must be of tokens, for at most {MAX_EXPERTS} experts")
        if not isinstance(chosen, int) or not 1 <= chosen <= min(E, MAX_CHOSEN):
            raise ValueError(f"chosen: must be 1 to {min(E, MAX_CHOSEN)} experts, not {chosen!r}")
        if activation not in ACTIVATIONS or activation is None:
            raise ValueError(f"activation: must be one of {', '.join(filter(None, ACTIVATIONS))}, not "
                             f"{activation!r}")
        count, kept_groups = groups
        if kept_groups < 1 or count > 1 and (E % count or E < 2 * count
                                             or not -(-chosen // (E // count)) <= kept_groups <= count):
            raise ValueError(f"groups: must be numbers of groups of at least 2 of {E} experts, of which "
                             f"those kept have {chosen}, not {groups!r}")
        if group_best not in (1, 2):
            raise ValueError(f"group_best: must be 1 or 2, not {group_best!r}")
        halves = 2 if activation in GATES else 1
        for name, matrix, shape in (("gate_up", gate_up, (halves * E * F, C)), ("down", down, (E * C, F))):
            if (matrix.rows, matrix.columns) != shape or F % TILE_ROWS:
                raise ValueError(f"{name}: must be {shape} for {E} experts, F a multiple of {TILE_ROWS}, not "
                                 f"{(matrix.rows, matrix.columns)}")
        weight, eps = norm or (None, 0.0)
        up_bias, down_bias = biases
        norm_at = vector_or_none("norm", weight, "float32", C)
        up_bias_at = vector_or_none("biases", up_bias, "float32", gate_up.rows)
        down_bias_at = vector_or_none("biases", down_bias, "float32", down.rows)
        correction_bias_at = vector_or_none("correction_bias", correction_bias, "float32", E)
        scales_at = vector_or_none("scales", scales, "float32", E)
        out_at = self._buffers.written("out", out, TOKENS, C)
        routing = _core.Routing(E, chosen, bool(sum_to_one), bool(sigmoids), self._buffers.limits[TOKENS])
        kept = x, logits, gate_up, down, out, weight, *biases, correction_bias, scales, routing
        self._record("route", TOKENS, kept, logits=logits_at, routing=routing, bias=correction_bias_at,
                     scales=scales_at, sparse=jitter is not None, farthest=2 * float(jitter or 0),
                     groups=count, kept_groups=kept_groups, group_best=group_best, scale=float(share_scale))
        self._record("group", TOKENS, routing=routing)
        self._record("gate_up", TOKENS, x=x_at, routing=routing, tiles=gate_up.tiles, norm=norm is not None,
                     norm_weight=norm_at, eps=float(eps), bias=up_bias_at, activation=ACTIVATIONS[activation],
                     columns=F, fine=self.fine)
        self._record("down", TOKENS, routing=routing, tiles=down.tiles, bias=down_bias_at, columns=C,
                     fine=self.fine)
        self._record("combine", TOKENS, x=x_at if residual else NONE, routing=routing, out=out_at)

    def backout(self, x, middle, backout_lambda, out) -> None:
        """x - backout_lambda * middle -> out, which may be x."""
        self._record_row(
            "mix",
            {"x": x, "x0": middle, "resid_lambda": 1.0, "x0_lambda": -number(backout_lambda), "out": out})

    def smear(self, x, previous, previous_ids, gate, smear_lambda, out) -> None:
        """x + lambda * sigmoid(x[:, :channels] . gate) * previous -> out, which may be x; gate (1, channels)
        float32."""
        _is_marker("previous_ids", previous_ids, self.previous_token_ids)
        x_at, rows_of = self._buffers.read("x", x, 16)
        previous_at = self._buffers.read_like("previous", previous, rows_of, x_at[1])
        gate_at, _, (_, channels), _ = look_at("gate", gate, FLOAT32, 1, None)
        if rows_of != TOKENS or not 0 < channels <= x_at[1]:
            raise ValueError(f"gate: must be (1, channels) for rows of tokens, not {(1, channels)}")
        out_at = self._buffers.written("out", out, rows_of, x_at[1])
        self._record("smear", TOKENS, (x, previous, gate, out), x=x_at, previous=previous_at, gate=gate_at,
                     channels=channels, smear_lambda=number(smear_lambda), out=out_at)

    def mean_squares(self, qkv, q_norm, k_norm, sizes, out) -> None:
        """Of each row of qkv (max_tokens, q and k and v): the sum of the squares of q, and of k, over `sizes`
        -> out.

        The two sums are the first two columns of out."""
        qkv_at, columns = self._of_whole_heads(qkv, q_norm, k_norm)
        out_at = self._buffers.written("out", out, TOKENS)
        if out_at[1] < 2 or not all(float(size) > 0 for size in sizes):
            raise ValueError(f"out: must have at least 2 columns, and sizes be positive, not {out_at[1]} and "
                             f"{sizes}")
        self._record("mean_squares", TOKENS, (qkv, out), x=qkv_at, q_size=float(sizes[0]),
                     k_size=float(sizes[1]), out=out_at, **columns)

    def norm_qk(self, qkv, q_norm, k_norm, means, eps: float, out) -> None:
        """q of each row of qkv over the root of its mean square, times q_norm, and k likewise -> out, which
        may be qkv.

        means       what mean_squares gives, summed over the ranks"""
        qkv_at, columns = self._of_whole_heads(qkv, q_norm, k_norm)
        means_at, rows_of = self._buffers.read("means", means)
        if rows_of != TOKENS or means_at[1] < 2:
            raise ValueError(f"means: must be (max_tokens, at least 2), not {means_at[1]} columns")
        weights = {"q_norm": vector("q_norm", q_norm, "float32", columns["q_columns"]),
                   "k_norm": vector("k_norm", k_norm, "float32", columns["k_columns"])}
        out_at = self._buffers.written("out", out, TOKENS, qkv_at[1])
        self._record("norm_qk", TOKENS, (qkv, q_norm, k_norm, means, out), x=qkv_at, means=means_at,
                     eps=float(eps), out=out_at, **weights, **columns)

    def norm_heads(self, qkv, q_norm, k_norm, head_size: int, eps: float, out, count: int = 0) -> None:
        """LayerNorm of each head of q and of k in each row of qkv -> out, which may be qkv.

        The weights have each head's own numbers. With `count`, only the first `count` columns of a head
        count, and the others are zeros."""
        qkv_at, columns = self._of_whole_heads(qkv, q_norm, k_norm)
        if head_size < 16 or head_size % 16 or any(
                size % head_size for size in columns.values()) or not 0 <= count <= head_size:
            raise ValueError(
                f"head_size: must be a multiple of 16 that divides {[*columns.values()]} columns, and "
                f"count at most that, not {head_size!r} and {count!r}")
        weights = {"q_norm": vector("q_norm", q_norm, "float32", columns["q_columns"]),
                   "k_norm": vector("k_norm", k_norm, "float32", columns["k_columns"])}
        out_at = self._buffers.written("out", out, TOKENS, qkv_at[1])
        self._record("norm_heads", TOKENS, (qkv, q_norm, k_norm, out), x=qkv_at, head_size=head_size,
                     count=count or head_size, eps=float(eps), out=out_at, **weights, **columns)

    def _of_whole_heads(self, qkv, q_norm, k_norm) -> tuple[tuple[int, int], dict[str, int]]:
        """(address, columns) of qkv, and how many columns q and k have: as many as their weights."""
        qkv_at, rows_of = self._buffers.read("qkv", qkv)
        columns = {"q_columns": len(q_norm), "k_columns": len(k_norm)}
        whole = all(count > 0 and count % 16 == 0 for count in columns.values())
        if rows_of != TOKENS or not whole or sum(columns.values()) > qkv_at[1]:
            raise ValueError("q_norm, k_norm: must have multiples of 16 columns, together at most qkv's "
                             f"{qkv_at[1]}, not {[*columns.values()]}")
        return qkv_at, columns

    def scale_rows(self, x, scales, positions, out) -> None:
        """Each row of x times the scale of its position -> out, which may be x. scales (max_positions)
        float32."""
        _is_marker("positions", positions, self.positions)
        x_at, rows_of = self._buffers.read("x", x, 16)
        scales_at = vector("scales", scales, "float32", len(scales))
        out_at = self._buffers.written("out", out, rows_of, x_at[1])
        self._record("scale_rows", rows_of, (x, scales, out), x=x_at, scales=scales_at,
                     max_positions=len(scales), out=out_at)

    def softcap(self, logits, cap: float, out) -> None:
        """cap * tanh(logits / cap) -> out, which may be logits."""
        x_at, rows_of = self._buffers.read("logits", logits)
        if not float(cap) > 0:
            raise ValueError(f"cap: must be positive, not {cap}")
        out_at = self._buffers.written("out", out, rows_of, x_at[1])
        self._record("softcap", rows_of, (logits, out), logits=x_at, cap=float(cap), out=out_at)

    def short_conv(self, x, taps, states, sequences, out, bias=None) -> None:
        """x (max_tokens, 3 C) = b, c, u;  s = b * u;  c_t * (sum over j of taps[j] * s[t - K + 1 + j] + bias)
        -> out (max_tokens, C).

        taps        (K * C) float32, the oldest token's first; K from 2 to 64
        states      one array (slots, K - 1, C) float32: s of the last K - 1 tokens, oldest first. A step says
                    which slots it reads and writes. A slot that it reads for a sequence it may write for that
                    sequence alone
        bias        (C) float32 or None
        """
        _is_marker("sequences", sequences, self.sequences)
        [state] = states
        address, _, (slots, before, C), _ = look_at("states", state, FLOAT32, None, None, None, writable=True)
        x_at, rows_of = self._buffers.read("x", x)
        if rows_of != TOKENS or x_at[1] != 3 * C or C % 16 or not 1 <= before < MAX_TAPS or not slots:
            raise ValueError(f"states: must be (slots, 1 to {MAX_TAPS - 1}, a third of x's columns, a "
                             f"multiple of 16), not {(slots, before, C)}")
        taps_at = vector("taps", taps, "float32", (before + 1) * C)
        bias_at = vector_or_none("bias", bias, "float32", C)
        out_at = self._buffers.written("out", out, TOKENS, C)
        self._record("short_conv", TOKENS, (x, taps, state, out, bias), x=x_at, taps=taps_at, size=before + 1,
                     bias=bias_at, states=address, num_slots=slots, out=out_at)

    def delta_rule(self, x, weights, mixer, eps: float, states, sequences, out) -> None:
        """x (max_tokens, p and z and b and a) -> out (max_tokens, Hv * Dv), token by token.

        mixer       DeltaRule, which says what is computed

        weights     taps (K * channels), the oldest token's first, decay (Hv), dt_bias (Hv) and mix_norm (Dv),
                    float32
        states      p of the last K - 1 tokens (slots, K - 1, channels), oldest first, and S (slots, Hv, Dk,
                    Dv), float32; slots as in short_conv
        """
        _is_marker("sequences", sequences, self.sequences)
        K = mixer.size
        Hk = mixer.key_heads
        Hv = mixer.value_heads
        Dk = mixer.key_size
        Dv = mixer.value_size
        if not 2 <= K <= MAX_TAPS or min(Hk, Dk, Dv) < 1 or Hv < 1 or Hv % Hk or Dk % 16 or Dv % 16:
            raise ValueError(f"mixer: must have 2 to {MAX_TAPS} taps, heads of multiples of 16, value heads "
                             f"a multiple of key heads, not {mixer}")
        past, S = states
        channels = 2 * Hk * Dk + Hv * Dv
        past_at, _, (slots, *_), _ = look_at("states", past, FLOAT32, None, K - 1, channels, writable=True)
        S_at = look_at("states", S, FLOAT32, slots, Hv, Dk, Dv, writable=True)[0]
        x_at, rows_of = self._buffers.read("x", x)
        if rows_of != TOKENS or x_at[1] != channels + Hv * Dv + 2 * Hv or not slots:
            raise ValueError(f"x: must be (max_tokens, {channels + Hv * Dv + 2 * Hv}), and states have a "
                             f"slot, not {x_at[1]} columns and {slots} slots")
        sized = {"taps": K * channels, "decay": Hv, "dt_bias": Hv, "mix_norm": Dv}
        taps, decay, dt_bias, mix_norm = (vector(name, weights[name], "float32", size)
                                          for name, size in sized.items())
        out_at = self._buffers.written("out", out, TOKENS, Hv * Dv)
        self._record("delta_rule", TOKENS, (x, past, S, out, *(weights[name] for name in sized)), x=x_at,
                     size=K, key_heads=Hk, value_heads=Hv, key_size=Dk, value_size=Dv,
                     alternating=mixer.alternating, gates_by_key=mixer.gates_by_key,
                     heads_by_key=mixer.heads_by_key, taps=taps, decay=decay, dt_bias=dt_bias, norm=mix_norm,
                     epsilon=float(eps), past=past_at, states=S_at, num_slots=slots, out=out_at)

    def mamba2(self, x, weights, mixer, eps: float, states, sequences, out) -> None:
        """x (max_tokens, z and p and dt) -> out (max_tokens, H * P), token by token.

        mixer       Mamba2, which says what is computed

        weights     taps (K * channels), the oldest token's first, taps_bias (channels) if mixer.taps_bias,
                    decay (H), dt_bias (H), skip (H) and mix_norm (H * P), float32. If ranks share groups
                    (mixer.of_heads), out has no norm yet: group_squares and norm_groups make it
        states      p of the last K - 1 tokens (slots, K - 1, channels), oldest first, and S (slots, H, N, P),
                    float32; slots as in short_conv
        """
        _is_marker("sequences", sequences, self.sequences)
        K = mixer.size
        sizes = (mixer.heads, mixer.head_size, mixer.state_size, mixer.groups)
        H, P, N, G = sizes
        inner = H * P
        channels = H * P + 2 * G * N
        all_heads = mixer.of_heads or H
        if (not 2 <= K <= MAX_TAPS or min(sizes) < 1 or all_heads % G or P % 16 or channels % 16
                or not 0 <= mixer.first_head <= all_heads - H):
            raise ValueError(
                f"mixer: must have 2 to {MAX_TAPS} taps, heads a multiple of groups, head_size and "
                f"2 * groups * state_size multiples of 16, not {mixer}")
        past, S = states
        past_at, _, (slots, *_), _ = look_at("states", past, FLOAT32, None, K - 1, channels, writable=True)
        S_at = look_at("states", S, FLOAT32, slots, H, N, P, writable=True)[0]
        x_at, rows_of = self._buffers.read("x", x)
        if rows_of != TOKENS or x_at[1] != inner + channels + H or not slots:
            raise ValueError(f"x: must be (max_tokens, {inner + channels + H}), and states have a slot, not "
                             f"{x_at[1]} columns and {slots} slots")
        sized = {"taps": K * channels, "decay": H, "dt_bias": H, "skip": H, "mix_norm": inner}
        if mixer.taps_bias:
            sized["taps_bias"] = channels
        at = {name: vector(name, weights[name], "float32", size) for name, size in sized.items()}
        if channels not in self._convolved:
            self._convolved[channels] = numpy.empty((self._buffers.limits[TOKENS], channels), numpy.float32)
        u = self._convolved[channels]
        out_at = self._buffers.written("out", out, TOKENS, inner)
        u_at = (u.ctypes.data, channels)
        p_at = (x_at[0] + inner * u.itemsize, x_at[1])
        self._record("convolve", TOKENS, (x, past, S, out, *(weights[name] for name in sized)), x=p_at,
                     taps=at["taps"], size=K, bias=at.get("taps_bias", 0), states=past_at, num_slots=slots,
                     out=u_at)
        self._record("mamba2", TOKENS, x=x_at, u=u_at, heads=H, head_size=P, state_size=N, groups=G,
                     first_head=mixer.first_head, group_heads=all_heads // G, decay=at["decay"],
                     dt_bias=at["dt_bias"], skip=at["skip"], states=S_at, num_slots=slots, out=out_at)
        if not mixer.of_heads:
            self._record("rms_norm", TOKENS, x=out_at, weight=at["mix_norm"], eps=float(eps), groups=G,
                         out=out_at)

    def group_squares(self, x, mixer, out) -> None:
        """The sum of the squares of each group's columns in x (max_tokens, H * P) -> out (max_tokens, >=
        groups).

        x is what mamba2 gave without the norm. A group of which no head is here has the sum 0."""
        x_at, sizes = self._of_groups("x", x, mixer)
        out_at = self._buffers.written("out", out, TOKENS)
        if out_at[1] < mixer.groups:
            raise ValueError(f"out: must have at least {mixer.groups} columns, not {out_at[1]}")
        self._record("group_squares", TOKENS, (x, out), x=x_at, out=out_at, **sizes)

    def norm_groups(self, x, weight, squares, mixer, eps: float, out) -> None:
        """weight (H * P) * x over the root mean square of x's group -> out, which may be x.

        squares     what group_squares gives, summed over the ranks"""
        x_at, sizes = self._of_groups("x", x, mixer)
        squares_at, rows_of = self._buffers.read("squares", squares)
        if rows_of != TOKENS or squares_at[1] < mixer.groups:
            raise ValueError(f"squares: must be (max_tokens, at least {mixer.groups}), not {squares_at[1]} "
                             "columns")
        weight_at = vector("weight", weight, "float32", x_at[1])
        out_at = self._buffers.written("out", out, TOKENS, x_at[1])
        self._record("norm_groups", TOKENS, (x, weight, squares, out), x=x_at, weight=weight_at,
                     squares=squares_at, eps=float(eps), out=out_at, **sizes)

    def _of_groups(self, name: str, x, mixer) -> tuple[tuple[int, int], dict[str, int]]:
        """A buffer of a Mamba layer's heads, and what says to which groups these belong."""
        x_at, rows_of = self._buffers.read(name, x)
        H = mixer.heads
        P = mixer.head_size
        all_heads = mixer.of_heads or mixer.heads
        whole = P % 16 == 0 and all_heads % mixer.groups == 0
        if rows_of != TOKENS or x_at[1] != H * P or not whole or not 0 <= mixer.first_head <= all_heads - H:
            raise ValueError(f"{name}: must be (max_tokens, {H * P}), of heads of a multiple of 16, in whole "
                             f"groups, not {x_at[1]} columns of {mixer}")
        return x_at, {
            "heads": H, "head_size": P, "first_head": mixer.first_head, "group_heads":
            all_heads // mixer.groups
        }

    def split_gates(self, x, head_size: int, gates, out) -> None:
        """Take the gates out of x (max_tokens, 2 * H * D + the rest), where each head's D columns are
        followed by its gate's.

        -> gates (max_tokens, H * D), and out (max_tokens, H * D + the rest)."""
        x_at, rows_of = self._buffers.read("x", x)
        gates_at = self._buffers.written("gates", gates, rows_of)
        if gates_at[1] % head_size or x_at[1] <= 2 * gates_at[1]:
            raise ValueError(f"gates: must have a multiple of {head_size} columns, and x more than twice as "
                             f"many, not {gates_at[1]} and {x_at[1]}")
        out_at = self._buffers.written("out", out, rows_of, x_at[1] - gates_at[1])
        if x_at[0] in (gates_at[0], out_at[0]):
            raise ValueError("out: may not be x")
        self._record("split_gates", rows_of, (x, gates, out), x=x_at, head_size=head_size, gates=gates_at,
                     out=out_at)

    def gate(self, x, gates, out, activation: str = "sigmoid") -> None:
        """x times the sigmoid or softplus of its gates -> out, which may be x. A gate counts for as many
        columns as x has for each."""
        x_at, rows_of = self._buffers.read("x", x, 16)
        gates_at, gate_rows = self._buffers.read("gates", gates)
        size, rest = divmod(x_at[1], gates_at[1])
        if gate_rows != rows_of or rest or size > 1 and size % 16:
            raise ValueError(
                f"gates: must be of the same rows, one for each of {x_at[1]} columns or for a multiple "
                f"of 16, not {gates_at[1]} columns")
        if activation not in ("sigmoid", "softplus"):
            raise ValueError(f"activation: must be sigmoid or softplus, not {activation!r}")
        out_at = self._buffers.written("out", out, rows_of, x_at[1])
        self._record("gate", rows_of, (x, gates, out), x=x_at, gates=gates_at,
                     softplus=activation == "softplus", out=out_at)

    def rope_append(self, qkv, cos, sin, positions, slots, cache, out, *, value_embed=None, gate=None,
                    **options) -> None:
        """rope_append at the step's positions and slots: qkv -> out (max_tokens, H * D) and one
        layer's cache.

        Each layer may have its own numbers of heads and its own head size."""
        _is_marker("positions", positions, self.positions)
        _is_marker("slots", slots, self.parts[getattr(slots, "group", 0)].slots)
        qkv_at, rows_of = self._buffers.read("qkv", qkv)
        layer = _, _, pages, Hkv, D, _ = check_cache(cache)
        if rows_of != TOKENS:
            raise ValueError("qkv: must be of tokens, not gathered")
        out_at = self._buffers.written("out", out, rows_of)
        H, rest = divmod(out_at[1], D)
        if rest:
            raise ValueError(f"out: must have H * {D} columns, not {out_at[1]}")
        if (appends := appended(qkv_at[1], H, Hkv, D)) is None:
            raise ValueError(f"qkv: must be (max_tokens, (H + 2 * {Hkv}) * {D}), not {qkv_at[1]} columns")
        check_together("value_embed", value_embed, "gate", gate)
        value_at = self._buffers.read_like_or_none("value_embed", value_embed, rows_of, Hkv * D)
        gate_at = self._buffers.read_like_or_none("gate", gate, rows_of, Hkv)
        job, max_positions = rope_job(layer, qkv_at, (out_at[0], 0, H), cos, sin, (0, 0),
                                      value_at, gate_at, appends, **options)
        kept = qkv, cos, sin, cache, out, value_embed, gate, options.get("q_norm"), options.get("k_norm")
        self._record("rope_append", TOKENS, kept, qkv=qkv_at, job=job, max_positions=max_positions,
                     num_pages=pages, group=slots.group, out=out_at)

    def by_head(self, x, up, out) -> None:
        """Each head's columns of x, of which the first are read, times its own matrix -> out (max_tokens, H *
        N).

        up      (H * N, K): the matrices of all heads, N a multiple of 16. K numbers of each head of x are
                read"""
        check_matrix(up, "up")
        x_at, rows_of = self._buffers.read("x", x)
        out_at = self._buffers.written("out", out, rows_of)
        heads, rest = divmod(x_at[1], up.columns)
        self._record_by_head(x, x_at, rows_of, up, out, out_at, heads, rest)

    def _record_by_head(self, x, x_at, rows_of: str, up, out, out_at, heads: int, rest: int) -> None:
        if rest or not heads or rows_of != TOKENS or up.rows % (
                heads * TILE_ROWS) or out_at[1] % heads or out_at[0] == x_at[0]:
            raise ValueError(
                f"up: must have a multiple of {TILE_ROWS} rows for each head of x, and out another array "
                f"of the same heads, not {(up.rows, up.columns)}, {x_at[1]} and {out_at[1]} columns")
        self._record("by_head", TOKENS, (x, up, out), x=x_at, tiles=up.tiles, heads=heads, fine=self.fine,
                     out=out_at)

    def absorb(self, x, k_up, cos, sin, positions, scale: float, cache, out, adjacent: bool = False) -> None:
        """Queries for heads' keys become queries for latents, as absorb_reference says, over
        the root of their width.

        x       (max_tokens, H * (plain + turned)), k_up (H * kept, plain) -> out (max_tokens, H * (kept +
                turned))"""
        _is_marker("positions", positions, self.positions)
        check_matrix(k_up, "k_up")
        cos_at, sin_at, (rows, half) = tables_at(cos, sin)
        x_at, rows_of = self._buffers.read("x", x)
        out_at = self._buffers.written("out", out, rows_of)
        heads, rest = divmod(x_at[1], k_up.columns + 2 * half)
        self._record_by_head(x, x_at, rows_of, k_up, out, out_at, heads, rest)
        kept = k_up.rows // heads
        if out_at[1] != heads * (kept + 2 * half) or kept % 16:
            raise ValueError(f"out: must have {heads * (kept + 2 * half)} columns, not {out_at[1]}")
        _, cache_kind, _, _, _ = check_latents(cache)
        check_parts(cache_kind, kept, 2 * half)
        self._record("turn_queries", TOKENS, (cos, sin), x=x_at, cos=cos_at, sin=sin_at, half=half,
                     adjacent=bool(adjacent), heads=heads, scale=float(scale) * (kept + 2 * half)**-0.5,
                     max_positions=rows, packed=cache_kind == CACHE_CODES["uint8"], out=out_at)

    def append_latents(self, x, weight, eps: float, cos, sin, positions, slots, cache,
                       adjacent: bool = False) -> None:
        """x (max_tokens, kept + turned) -> the keys of a cache of latents, as wide: the first numbers get an
        RMS norm, the others turn."""
        _is_marker("positions", positions, self.positions)
        _is_marker("slots", slots, self.parts[getattr(slots, "group", 0)].slots)
        cos_at, sin_at, (rows, half) = tables_at(cos, sin)
        x_at, rows_of = self._buffers.read("x", x)
        cache_at, cache_kind, pages, D, apart = check_latents(cache)
        kept = D - 2 * half
        if rows_of != TOKENS or x_at[1] != D or kept < 16 or kept % 16 or half % 8:
            raise ValueError(
                f"x: must be (max_tokens, {D}) of tokens, the last {2 * half} of which turn, both multiples "
                f"of 16, not {x_at[1]} columns")
        check_parts(cache_kind, kept, 2 * half)
        self._record("append_latents", TOKENS, (x, weight, cos, sin, cache), x=x_at,
                     weight=vector("weight", weight, "float32", kept), eps=float(eps), cos=cos_at, sin=sin_at,
                     half=half, adjacent=bool(adjacent), max_positions=rows, cache=cache_at,
                     cache_type=cache_kind, num_pages=pages, page_stride=apart, group=slots.group)

    def text_attention(self, q, cache, attention, window: int, out, distances=None) -> None:
        """softmax(q k + distances) v of each row over the positions of its text -> out, as wide as q.

        Each sequence of a step is then a whole text: it has as many rows as positions.
        q           (max_tokens, H * D), as rope_append left it
        window      positions farther away are not seen; 0: all are
        distances   None, or (H, 2 * reach) float32: a score gets the element at reach + (the key's position -
                    the row's). A text may then have at most reach - 16 positions
        """
        self._attend(q, cache, attention, window, out, of_texts=True, distances=distances)

    def paged_attention(self, q, cache, attention, window: int, out, softcap: float = 0.0, sinks=None,
                        two_sided: bool = False) -> None:
        """softmax(q k) v of each row over the pages of its sequence -> out, as wide as q.

        q           (max_tokens, H * D), as rope_append or absorb left it
        two_sided   rows also see later positions, as a step's `ahead` says
        With latents (a cache (P, 16, D), or (P, 17, D) of uint8) out is (max_tokens, H * Dv): the values are
        the first Dv numbers of keys."""
        if len(cache.shape) == 3:
            return self._attend_latents(q, cache, attention, window, out)
        self._attend(q, cache, attention, window, out, softcap, sinks, two_sided=two_sided)

    def _attend_latents(self, q, cache, attention, window: int, out) -> None:
        _is_marker("attention", attention, self.parts[getattr(attention, "group", 0)].attention)
        q_at, rows_of = self._buffers.read("q", q)
        out_at = self._buffers.written("out", out, rows_of)
        cache_at, cache_kind, pages, D, apart = check_latents(cache)
        H, rest = divmod(q_at[1], D)
        Dv, more = divmod(out_at[1], max(H, 1))
        if rows_of != TOKENS or rest or not H or more or Dv % 16 or not 0 < Dv <= D:
            raise ValueError(
                f"q: must have H * {D} columns and out H times a multiple of 16 up to {D}, "
                f"not {q_at[1]} and {out_at[1]}"
            )
        check_parts(cache_kind, Dv, D - Dv)
        if not isinstance(window, int) or not -1 <= window < 2**31:
            raise ValueError(f"window: must be a number of keys, 0 or -1, not {window!r}")
        self._record("paged_attention", TOKENS, (q, cache, out), q=q_at, cache=cache_at,
                     cache_type=cache_kind, num_pages=pages, heads=H, kv_heads=groups_of(H), head_size=D,
                     window=max(window, 0), softcap=0.0, sinks=0, group=attention.group, page_stride=apart,
                     value_size=Dv, out=out_at)

    def _attend(self, q, cache, attention, window: int, out, softcap: float = 0.0, sinks=None,
                of_texts: bool = False, distances=None, two_sided: bool = False) -> None:
        _is_marker("attention", attention, self.parts[getattr(attention, "group", 0)].attention)
        q_at, rows_of = self._buffers.read("q", q)
        cache_at, cache_kind, pages, Hkv, D, apart = check_cache(cache)
        H, rest = divmod(q_at[1], D)
        if rows_of != TOKENS or rest or H % Hkv or H // Hkv > 16:
            raise ValueError(f"q: must have H * {D} columns, H a multiple of {Hkv} up to 16 times, not "
                             f"{q_at[1]}")
        if not isinstance(window, int) or not -1 <= window < 2**31:
            raise ValueError(f"window: must be a number of keys, 0 or -1, not {window!r}")
        out_at = self._buffers.written("out", out, rows_of, q_at[1])
        more = {}
        if distances is not None:
            at, _, (_, columns), _ = look_at("distances", distances, FLOAT32, H, None)
            if columns % 2 or columns <= 2 * PAGE_SIZE or cache_kind == CACHE_CODES["uint8"]:
                raise ValueError(f"distances: must have an even number of columns above {2 * PAGE_SIZE}, and "
                                 f"the cache be of floats, not {columns}")
            more = {"distances": at, "reach": columns // 2}
        self._record("paged_attention", TOKENS, (q, cache, out, sinks, distances), q=q_at, cache=cache_at,
                     cache_type=cache_kind, num_pages=pages, heads=H, kv_heads=Hkv, head_size=D,
                     window=max(window, 0), softcap=check_softcap(softcap), sinks=sinks_at(sinks, H),
                     group=attention.group, page_stride=apart, of_texts=of_texts, two_sided=two_sided,
                     out=out_at, **more)

    def pause(self) -> None:
        """Wait while an answer is written elsewhere on this machine, as `pause_while` says."""
        self._record("pause", TOKENS)

    def all_reduce(self, x, ranks, out, residual=None) -> None:
        """residual + the sum of all ranks' x -> out. x and residual may be out.

        All ranks' programs must have the same exchanges in the same order. After an exchange no op may read x
        before one writes it again, because products write where other ranks read."""
        x_at, rows_of = self._buffers.read("x", x, 16)
        residual_at = self._buffers.read_like_or_none("residual", residual, rows_of, x_at[1])
        handle = handle_of(ranks)
        out_at = self._buffers.written("out", out, rows_of, x_at[1])
        self._record("all_reduce", rows_of, (x, handle, out, residual), x=x_at, ranks=handle,
                     residual=residual_at, out=out_at)
        if x_at[0] != out_at[0]:
            self._buffers.lose(x_at)

    def all_gather(self, x, ranks, out) -> None:
        """All ranks' x side by side -> out, which may be narrower. out may not be x."""
        x_at, rows_of = self._buffers.read("x", x)
        handle = handle_of(ranks)
        out_at = self._buffers.written("out", out, rows_of)
        check_gathered(out_at[1], x_at[1], ranks.count)
        if out_at[0] == x_at[0]:
            raise ValueError("out: may not be x")
        self._record("all_gather", rows_of, (x, handle, out), x=x_at, ranks=handle, out=out_at)
        self._buffers.lose(x_at)

    def sample(self, logits) -> None:
        """Draw a token for each logit row, in steps that bring a SampleBatch. This op is the last."""
        x_at, rows_of = self._buffers.read("logits", logits)
        if rows_of != LOGIT_ROWS:
            raise ValueError("logits: must come from rows that were gathered")
        self._record("sample", LOGIT_ROWS, (logits,), logits=x_at)
        self.logits = logits

    # ---- running

    def start(self, token_ids, previous, starts, lengths, tables, logit_rows, sampling=None, all_rows=False,
              states=([], [], []), adapters=(), ahead=(), turns=()) -> int:
        """Queue a step and return its ticket. At most two steps may be unfinished. All lists are of integers,
        and copied.

        token_ids   T ids. ~i (-1 - i) is the token that row i of the step before draws; that step may still
                    be running
        previous    T ids of the tokens before those. -1: there is none (position 0). -2 - i: the token that
                    row i of the step before draws
        starts, lengths, tables     rows starts[i] .. starts[i + 1] are the newest of the lengths[i] positions
                                    of sequence i.
                    Its pages are tables[i]; with groups of layers, a page of each group in turn. Length 0 is
                    padding, which writes nothing
        logit_rows  the R of the T rows that get logits
        sampling    None, or a SampleBatch of R rows: a token is drawn for each, except where a row's position
                    is below 0. Penalties count what the batch holds at this call
        states      for layers that keep states: (the slot from which each sequence's states are read, unless
                    its first row is at position 0; the rows after which they are written, ascending; the
                    slots into which they are written)
        adapters    for each sequence what `adapters.pack` gave, or None; () if no sequence has an adapter
        turns       the T rows of cos and sin by which the tokens turn; () if these are the positions
        ahead       for two-sided ops: each row sees all positions below its number here, even those after
                    itself. 0: it sees those up to itself. (): so does every row
        all_rows    compute the last layer for every row, not only for those with logits. Its output holds
                    them until the next step
        """
        if sampling is not None:
            sampling = sample_arguments(sampling, self.logits)
        reads, write_rows, write_slots = states
        return self._program.start(token_ids, previous, starts, lengths, tables, logit_rows, sampling,
                                   all_rows, reads, write_rows, write_slots, list(adapters), list(ahead),
                                   list(turns))

    def finish(self, ticket: int) -> list[int]:
        """Wait for a step, without the GIL -> its tokens, one for each logit row; [] for a step without
        sampling.

        `logits` holds the step's logits until the next step begins. RuntimeError if the step failed.
        """
        return self._program.finish(ticket)

    def times(self) -> list[dict]:
        """What the last steps took, oldest first.

        Each is {"tokens", "logit_rows", "width", "stalled", "us", "phases": [(op, us)], "kinds": {op:
        us}}."""
        return self._program.times()

    def describe(self) -> list[str]:
        """The recorded ops, a line each."""
        return self._program.describe()

    def _record(self, op: str, rows_of: str, keep: tuple = (), **fields) -> None:
        """Record an op of csrc/ops.def, whose fields have been checked."""
        self._buffers.keep(*keep)
        self._program.record(op, rows_of == LOGIT_ROWS, **fields)

    def layer_norm(self, x, weight, bias, eps, out, count: int = 0) -> None:
        """layer_norm_reference; weight and bias may be None. With `count`, only the first
        `count` columns of x count, and the others are zeros."""
        _, columns = self._buffers.read("x", x, 16)[0]
        if not isinstance(count, int) or not 0 <= count <= columns:
            raise ValueError(f"count: must be 0 or up to {columns} columns, not {count!r}")
        self._record_row("layer_norm", {"x": x, "weight": weight, "bias": bias, "eps": eps, "out": out},
                         count=count)

    def _record_row(self, op: str, given: Mapping[str, Any], **options: Any) -> None:
        """Record an op whose row says all that must be checked."""
        rows_of = ""
        widths = {}
        fields = {}
        for role, name, columns in fields_of(op):
            value = given[name]
            if role == "field":
                fields[name] = number(value)
            elif role == "writes":
                fields[name] = self._buffers.written(name, value, rows_of, widths[columns])
            elif role == "weights or none":
                fields[name] = vector_or_none(name, value, "float32", widths[columns])
            elif role != "reads":
                fields[name] = vector(name, value, "float32", widths[columns])
            elif rows_of:
                fields[name] = self._buffers.read_like(name, value, rows_of,
                                                       widths.get(columns) or int(columns))
            else:
                fields[name], rows_of = self._buffers.read(name, value, 16 if columns.endswith("16") else 1)
                widths[columns] = fields[name][1]
        self._record(op, rows_of, tuple(given.values()), **fields, **options)


def fields_of(op: str) -> list[tuple[str, str, str]]:
    """(role, name, columns or type) of each field in an op's row that must be recorded."""
    _, fields = _core.OPS[op]
    return [field for field in fields if field[0] != "option"]


def says_all(op: str) -> bool:
    """Does the op's row say all that must be checked? Then it has only buffers and weights of known widths,
    and floats."""
    fields = fields_of(op)
    if not fields or fields[0][0] != "reads":
        return False
    for role, _, what in fields:
        if role == "states" or what == "any":
            return False
        if role == "field" and what != "float":
            return False
    return True


def recorder(op: str) -> Callable[..., None]:
    """The method of Program that records an op by its row."""
    names = ["self", *(name for _, name, _ in fields_of(op))]
    signature = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names])

    def record(*given, **named) -> None:
        arguments = signature.bind(*given, **named).arguments
        arguments.pop("self")._record_row(op, arguments)
    record.__name__ = op
    record.__doc__ = f"See its reference, {op}_reference of chat_server."
    setattr(record, "__signature__", signature)
    return record


for _op in _core.OPS:
    if says_all(_op) and not hasattr(Program, _op):
        setattr(Program, _op, recorder(_op))


def part_of(group: int) -> SimpleNamespace:
    """The markers of a group of layers: its own slots and attention, and the step's ids and positions."""
    return SimpleNamespace(token_ids=Program.token_ids, positions=Program.positions, turns=Program.turns,
                           slots=Marker("slots", group), attention=Marker("attention", group))


Program.parts = (Program, *map(part_of, range(1, MOST_GROUPS)))


def tables_at(cos, sin) -> tuple[int, int, tuple[int, int]]:
    """Addresses of the tables of angles, and their shape (max_positions, turned / 2)."""
    cos_at, _, shape, _ = look_at("cos", cos, FLOAT32, None, None)
    return cos_at, look_at("sin", sin, FLOAT32, *shape)[0], shape


def _is_marker(name: str, value, wanted: Marker) -> None:
    if value is not wanted:
        raise ValueError(f"{name}: must be {wanted!r}, not {value!r}")


def handle_of(ranks):
    if not isinstance(ranks, Ranks):
        raise ValueError(f"ranks: must be Ranks, not {type(ranks).__name__}")
    return ranks.handle


def sample_arguments(batch, logits) -> tuple:
    """What the compiled half takes of a SampleBatch, whose tokens are drawn from these logits."""
    if not isinstance(batch, SampleBatch):
        raise ValueError(f"sampling: must be a SampleBatch, not {type(batch).__name__}")
    if logits is None:
        raise ValueError("sampling: no sample op was recorded")
    if batch.vocab_size != logits.shape[1]:
        raise ValueError(f"sampling: is for {batch.vocab_size} ids, and logits have {logits.shape[1]}")
    records, count_ids, counts, bias_ids, bias_values, _ = batch._addresses
    return (records, len(batch.params), count_ids, counts, len(batch.counts), bias_ids, bias_values,
            len(batch.bias_values))
