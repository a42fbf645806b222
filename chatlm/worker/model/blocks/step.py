"""What a block gets to compute with: a step's buffers and ops, what it reads, and where its result goes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple, TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self
    from chatlm.worker.arrays.kinds import Norm
    from chatlm.worker.model.blocks.axes import Divided, Tensors
    from chatlm.worker.model.blocks.norms import AnyNorm
    from chatlm.worker.kernels.kernels import Kernels
    from chatlm.worker.model.batch import Inputs, RowAdapters


class Buffer(NamedTuple):
    """A buffer that a block asks for. It has a row for each token of a step."""

    columns: int
    short: bool = False      # has the type of activations, which may have 16 bits; else float32
    of_logits: bool = False  # has a row for each row of logits instead


Scratch = dict[str, Buffer]  # name of a buffer -> what a block asks for; a model has the widest of each name


def widest(parts: list[Scratch]) -> Scratch:
    """One buffer of each name, as wide as the widest of these."""
    found: Scratch = {}
    for part in parts:
        for name, buffer in part.items():
            if name not in found or found[name].columns < buffer.columns:
                found[name] = buffer
    return found


class Buffers(SimpleNamespace):
    """The rows of each buffer that a step uses, cut once: x (T, C), residual (T, C), .."""

    def of(self, name: str, columns: int):
        """A buffer (T, at least `columns`) as (T, columns), in the same memory."""
        buffer = getattr(self, name)
        if buffer.shape[1] == columns:
            return buffer
        return buffer.reshape(-1)[:len(buffer) * columns].reshape(-1, columns)


class Read(NamedTuple):
    """norm(x) as products read it: x with a norm that they still have to apply, or its result without one."""

    x: Any                    # (T, C)
    norm: Norm | None = None  # still to be applied


class BlockStep:
    """What a layer is computed with. The parts before and after all layers share one, too.

    Each is made once, and `begin` gives it the buffers and inputs of the next step."""

    k: Kernels
    b: Buffers
    inputs: Inputs            # with the pages of the layer's group
    adapters: RowAdapters | None

    def __init__(self, weights: dict[str, Any], layer: int | None, vocab_size: int):
        self.w = weights
        self.layer = layer
        self.prefix = "" if layer is None else f"{layer}."  # of the names of its matrices
        self.bounds: Any = weights.get("clamps")  # of what products read and of what they give
        self.vocab_size = vocab_size
        self.group = 0                 # number of the layer's group of pages
        self.cache: Any = None         # the layer's pages of keys and values
        self.states: tuple[Any, ...] = ()  # the layer's states, of all sequences
        self.rope: tuple[Any, ...] = ()  # cos and sin of each position
        self.q_scale: Any = None       # a factor of q for each position
        self.distances: Any = None     # what a score gets for the distance of its key
        self.pauses = False            # does the layer wait while others write answers?
        self.resid_lambdas: Any = None  # of all layers
        self.x0_lambdas: Any = None
        self.embedding_scale = 1.0     # of embeddings, over the factor by which x is kept smaller
        self.layer_embed: Any = None   # the table of the layers' inputs, which stays in its file

    def begin(self, k: Kernels, buffers: Buffers, inputs: Inputs):
        self.k = k
        self.b = buffers
        self.inputs = inputs.parts[self.group] if self.group else inputs
        self.adapters = inputs.adapters

    def product(self, read: Read, name: str, out, **options):
        """out = norm(x) @ w[name].T, plus what each row's adapter adds."""
        if self.bounds:
            return self.clamped_product(read, name, out, **options)
        if self.adapters:
            adapted = self.adapters.of_matrix(self.prefix + name)
            if adapted:
                options["adapted"] = adapted
        self.k.linear(read.x, self.w[name], norm=read.norm, out=out, **options)

    def clamped_product(self, read: Read, name: str, out, **options):
        """The same with bounds for what goes in and what comes out. x is clamped in place."""
        low, high = self.bounds[f"{name}_in"]
        self.k.clamp(read.x, low, high, out=read.x)
        self.k.linear(read.x, self.w[name], out=out, **options)
        low, high = self.bounds[name]
        self.k.clamp(out, low, high, out=out)


class Sum:
    """Where the result of a block goes: out = residual + result, with a norm of the result or of the sum.

    Each block of a layer has one. Only it knows how ranks sum what they have computed."""

    def __init__(self, residual: str, out: str, norm: AnyNorm | None, norm_name: str, norm_of_sum: bool):
        """residual and out: names of buffers."""
        self.residual_name = residual
        self.out_name = out
        self.norm = norm
        self.norm_name = norm_name
        self.norm_of_sum = norm_of_sum

    def residual(self, s: BlockStep):
        return getattr(s.b, self.residual_name)

    def out(self, s: BlockStep):
        return getattr(s.b, self.out_name)

    def adds_directly(self, s: BlockStep) -> bool:
        """May the op that computes the result add the residual at once?"""
        return s.k.all_reduce is None and (self.norm is None or self.norm_of_sum)

    def product(self, s: BlockStep, x, name: str):
        """Add x @ w[name].T and its bias. With several ranks, each has some columns of the matrix."""
        bias = s.w.get(f"{name}_bias")
        if not self.adds_directly(s):
            s.product(Read(x), name, s.b.added, bias=bias)
            return self.add(s, s.b.added)
        total = s.b.added if self.norm_of_sum else self.out(s)
        s.product(Read(x), name, total, bias=bias, residual=self.residual(s))
        self.finish(s, total)

    def add(self, s: BlockStep, result, reduced: bool = False):
        """Add a result (T, C). Unless it is `reduced`, it is this rank's alone."""
        reduce = None if reduced else s.k.all_reduce
        if self.norm is None and reduce:
            return reduce(result, out=self.out(s), residual=self.residual(s))
        if reduce:
            reduce(result, out=result)
        if self.norm_of_sum:
            s.k.mix(self.residual(s), result, 1.0, 1.0, out=result)
            return self.finish(s, result)
        if self.norm is not None:
            self.norm.apply(s, result, self.norm_name, out=result)
        s.k.mix(self.residual(s), result, 1.0, 1.0, out=self.out(s))

    def finish(self, s: BlockStep, total):
        """Apply the norm of the sum, if there is one, to a result that has the residual already."""
        if self.norm_of_sum and self.norm is not None:
            self.norm.apply(s, total, self.norm_name, out=self.out(s))


class Block:
    """A part of a layer: attention, a state space, a feed-forward network, experts.

    It states its tensors in a model of width C and the buffers that it needs, and it can become a block of
    another size. Attention also says what it caches, and blocks with states say the shapes of these."""

    widens = True  # can its model's rows be padded?

    def tensors(self, C: int) -> Tensors:
        raise NotImplementedError

    def scratch(self, C: int) -> Scratch:
        raise NotImplementedError

    def arranged(self, w: dict[str, Any], arrays: Any) -> dict[str, Any]:
        """The loaded tensors that `compute` reads in another form, in that form, and those that it needs
        besides. `arrays` makes them."""
        return {}

    def compute(self, s: BlockStep, read: Read, to: Sum):
        """Read norm(x), and hand the result to the sum."""
        raise NotImplementedError

    def padded(self) -> Self:
        """The block with sizes that are multiples of 16, as far as that changes no result."""
        return self

    def widened(self, C: int, wide: int) -> Self:
        """The block for rows of C numbers that are followed by zeros up to `wide`."""
        return self

    def moved(self, layers: int) -> Self:
        """The block in a stage that comes after stages of so many layers."""
        return self

    def divided(self, rank: int, tp: int, block: int) -> Divided:
        """What a rank has of what ranks divide: whole blocks of `block` columns, if that is possible."""
        raise NotImplementedError

    def of_rank(self, divided: Divided) -> Self:
        raise NotImplementedError
