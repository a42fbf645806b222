"""The input: it turns the tokens of a step into the x of the first layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from chatlm.worker.model.blocks.axes import Run, Tensors, matrix, vector
from chatlm.worker.model.blocks.norms import AnyNorm, RmsNorm
from chatlm.worker.model.blocks.step import BlockStep, Buffer, Scratch


@dataclass(frozen=True)
class Rows:
    """The rows of embedding and head that a rank has."""

    count: int      # the same for all ranks, padding included
    first: int = 0

    @property
    def axis(self) -> tuple[Run]:
        return (Run(self.count, of="vocabulary"),)


@dataclass(frozen=True)
class Smear:
    """x + smear_lambda * sigmoid(smear_gate x) * norm(the previous token's embedding) (nanochat)."""

    channels: int   # the gate reads so many first numbers of x
    norm: RmsNorm

    def tensors(self) -> Tensors:
        return {"smear_gate": matrix(1, self.channels, packed=False, exact=True),
                "smear_lambda": vector(1)}

    def compute(self, s: BlockStep, look_up):
        k = s.k
        b = s.b
        w = s.w
        before = s.inputs.previous_token_ids
        look_up(s, before, out=b.previous)
        self.norm.apply(s, b.previous, "", out=b.previous)
        k.smear(b.x, b.previous, before, w["smear_gate"], w["smear_lambda"], out=b.x)


@dataclass(frozen=True)
class LayerInputs:
    """P numbers for each token and layer: norm(layer_project x) + the token's row of layer_embed (Gemma 4).

    layer_embed (V, L P) stays in its file, layer_project is (L P, C)."""

    size: int       # P
    layers: int     # L, of the whole model
    eps: float
    pad: int | None = None  # rows of pictures get the row of this token: see Model.picture_pad

    @property
    def columns(self) -> int:
        return self.layers * self.size

    def tensors(self, vocab_size: int, C: int) -> Tensors:
        return {"layer_embed": matrix(vocab_size, self.columns, packed=False),
                "layer_project": matrix(self.columns, C), "layer_project_norm": vector(self.size)}

    def scratch(self) -> Scratch:
        return dict.fromkeys(("layer_inputs", "layer_rows"), Buffer(self.columns))

    def compute(self, s: BlockStep):
        k = s.k
        b = s.b
        w = s.w
        inputs = s.inputs
        if self.pad is None:
            k.look_up(s.layer_embed, inputs.token_ids, out=b.layer_rows)
        else:
            part = 0, s.vocab_size + 1
            k.look_up(s.layer_embed, inputs.previous_token_ids, out=b.layer_inputs, part=part)
            k.look_up(s.layer_embed, inputs.token_ids, out=b.layer_rows, part=part)
            k.mix(b.layer_rows, b.layer_inputs, 1.0, 1.0, out=b.layer_rows)
        k.linear(b.x, w["layer_project"], out=b.layer_inputs)          # (T, L * P)
        k.layer_inputs(b.layer_inputs, b.layer_rows, w["layer_project_norm"], self.eps, out=b.layer_inputs)


@dataclass(frozen=True)
class Input:
    """x = norm(scale * embedding + rows of pictures + positions + types), and what some families do then."""

    scale: float = 1.0           # is rounded to the type of the weights
    residual_scale: float = 1.0  # x is kept divided by it, so that no factor is needed for what blocks add
    sees: bool = False           # rows of pictures are added to the embeddings, which are 0 there
    positions: int = 0           # > 0: a table has so many positions
    types: int = 0               # > 0: a table has so many types of tokens; previous_token_ids are the types
    norm: AnyNorm | None = None
    smear: Smear | None = None
    layers: LayerInputs | None = None
    keeps: bool = False          # x0 is kept, because layers mix it in
    rows: Rows | None = None     # what this rank has of the vocabulary; None without ranks

    def tensors(self, vocab_size: int, C: int) -> Tensors:
        found = {"embed": matrix((self.rows or Rows(vocab_size)).axis, C)}
        if self.positions:
            found["positions"] = vector((Run(self.positions, C),))
        if self.types:
            found["types"] = vector((Run(self.types, C),))
        if self.norm:
            found |= self.norm.tensors("embed_norm", C)
        if self.smear:
            found |= self.smear.tensors()
        if self.layers:
            found |= self.layers.tensors(vocab_size, C)
        return found

    def scratch(self, C: int) -> Scratch:
        found: Scratch = {"x": Buffer(C), "previous": Buffer(C)}
        if self.sees:
            found["pictures"] = Buffer(C)
        if self.keeps:
            found["x0"] = Buffer(C)
        if self.layers:
            found |= self.layers.scratch()
        return found

    def compute(self, s: BlockStep):
        k = s.k
        b = s.b
        w = s.w
        inputs = s.inputs
        self.look_up(s, inputs.token_ids, out=b.x)
        if s.embedding_scale != 1:
            k.mix(b.x, b.x, s.embedding_scale, 0.0, out=b.x)
        if self.sees:
            k.mix(b.x, b.pictures, 1.0, 1.0, out=b.x)
        C = b.x.shape[1]
        if self.positions:
            k.embed(w["positions"].reshape(-1, C), inputs.positions, out=b.previous)
            k.mix(b.x, b.previous, 1.0, 1.0, out=b.x)
        if self.types:
            table = w["types"].reshape(-1, C)
            k.embed(table, inputs.previous_token_ids, out=b.previous, part=(0, s.vocab_size))
            k.mix(b.x, b.previous, 1.0, 1.0, out=b.x)
        if self.layers:
            self.layers.compute(s)
        if self.norm:
            self.norm.apply(s, b.x, "embed_norm", out=b.x)
        if self.smear:  # mixes in the previous token's embedding as it was before smearing
            self.smear.compute(s, self.look_up)
        if self.keeps:
            k.copy(b.x, out=b.x0)

    def look_up(self, s: BlockStep, ids, out):
        """The embeddings (T, C) of some ids."""
        k = s.k
        table = s.w["embed"]
        if self.sees:  # rows of pictures have the id after the last one, for which nothing is looked up
            return k.embed(table, ids, out=out, part=(0, s.vocab_size + 1))
        if self.rows is None:
            return k.embed(table, ids, out=out)
        k.embed(table, ids, out=out, part=(self.rows.first, s.vocab_size))  # zeros for rows of other ranks
        k.all_reduce(out, out=out)

    def widened(self, C: int, wide: int) -> Input:
        return replace(self, norm=self.norm and self.norm.padded(C, wide))


@dataclass(frozen=True)
class Join:
    """The input of a draft head: join_embed norm(embedding) + join_hidden norm(state), both matrices (C, C)
    (Gloeckle et al., "Multi-token prediction", 2024; DeepSeek-V3).

    The state is one of the model that it drafts for, and stands in the buffer x. Files have one matrix of
    both."""

    norm: RmsNorm
    rows: Rows | None = None

    NORMS = "join_embed_norm", "join_hidden_norm"

    def tensors(self, vocab_size: int, C: int) -> Tensors:
        found = {"embed": matrix((self.rows or Rows(vocab_size)).axis, C), "join_embed": matrix(C, C),
                 "join_hidden": matrix(C, C)}
        for name in self.NORMS:
            found |= self.norm.tensors(name, C)
        return found

    def scratch(self, C: int) -> Scratch:
        return dict.fromkeys(("x", "previous", "added"), Buffer(C))

    def compute(self, s: BlockStep):
        k = s.k
        b = s.b
        w = s.w
        k.embed(w["embed"], s.inputs.token_ids, out=b.previous)
        embedded = self.norm.read(s, b.previous, "join_embed_norm")
        state = self.norm.read(s, b.x, "join_hidden_norm")
        k.linear(embedded.x, w["join_embed"], norm=embedded.norm, out=b.added)
        k.linear(state.x, w["join_hidden"], norm=state.norm, residual=b.added, out=b.previous)
        k.copy(b.previous, out=b.x)

    def widened(self, C: int, wide: int) -> Join:
        return replace(self, norm=self.norm.padded(C, wide))
