"""`Tower`: it computes the rows that stand for pictures in a prompt.

A picture is cut into tiles, and a tile into patches. A product turns each patch into a row, and a row for its
place is added. Then come layers that see all patches of the tile. They are computed in stages, so that steps
of answers can come between. Last, a projector joins neighbouring rows and makes them as wide as the model's.

Families differ by rows of tables: LAYOUTS (how a picture is cut), PLACES and PROJECTORS (both ends of a
tower), TOWERS (the names and settings in their files)."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence as Seq
from itertools import pairwise
from typing import Any, NamedTuple, TYPE_CHECKING

import numpy

from chatlm.common.config import PAGE_SIZE
from chatlm.worker.arrays.kinds import Device, floats, item_bytes, joined
from chatlm.worker.arrays.resize import resized
from chatlm.worker.model.batch import Batch
from chatlm.worker.model.blocks.feed_forward import FeedForward, halves
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.model.pages import KvType, group_layers
from chatlm.worker.model.projectors import ANGLES, PLACES, PROJECTORS, by_squares, layer_norm, rms_norm
from chatlm.worker.model.tensors import Unread, rounded_up
from chatlm.worker.model.transformer import Transformer

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Picture, Vision
    from chatlm.common.vision.layout import PictureLayout
    from chatlm.worker.model.blocks.model import Model


class StoredTower(NamedTuple):
    """How a model sees pictures. The weights are still in its files."""

    vision: Vision
    architecture: Model         # the layers of the tower
    tensors: dict[str, Any]     # of the layers; and patch (C, 3 * patch * patch), perhaps patch_bias, places
                                # as its row of PLACES says, and those that its row of PROJECTORS names
    patch: int                  # pixels on a side; the numbers of a patch are by row, column, color
    shuffle: int                # patches on a side of the square that becomes one row of the model
    filter: str                 # a name of FILTERS in chatlm/worker/arrays/resize.py
    mean: tuple[float, ...]     # of each color
    std: tuple[float, ...]
    projector: str              # a name of PROJECTORS in chatlm/worker/model/projectors.py
    places: str = "fixed"       # a name of PLACES there; "": nothing is added to patches
    first_norm: float = 0.0     # eps of an RMS norm before the layers, whose weight is first_norm; 0: none
    angles: str = ""            # a name of ANGLES there, if layers rotate by the place of a patch
    most: int = 0               # most rows of a tile, if some have more than vision.tokens; else 0
    hidden: int = 0             # width between the products of the projector
    grid: int = 0               # rows of the table of places
    deep: tuple[int, ...] = ()  # after these layers a projector also makes rows, for the model's first layers
    axes: tuple[int, ...] = ()  # rope_axes of the model
    two_sided: str = ""         # layers of the model in which rows of a picture see all of its rows
    pad: int | None = None      # picture_pad of the model

    @property
    def nbytes(self) -> int:
        """How many bytes its weights take and, roughly, its buffers."""
        sizes = self.architecture.buffer_sizes(self.patches, 1, "float32").values()
        return sum(tensor.nbytes for tensor in self.tensors.values()) + sum(
            rows * columns * item_bytes(kind) for rows, columns, kind in sizes)

    @property
    def head_size(self) -> int:
        attentions = self.architecture.attentions
        return attentions[0].head_size if attentions else 0

    @property
    def patches(self) -> int:
        """Most patches of a tile."""
        return max(self.vision.tokens, self.most) * self.shuffle**2


class Product:
    """x (T, K) -> activation(x @ W.T (+ bias)) (+ added (T, N)), by the kernels of a model.

    All are float32 arrays of numpy. T is at most `rows`. The next call overwrites what this one returns."""

    def __init__(self, model: Model, device: Device, rows: int, name: str, tensors: dict,
                 dtype: str | None, quantize: str | None, adds: bool = False, activation: str | None = None):
        weight = values_of(tensors.pop(name))
        bias = tensors.pop(f"{name}_bias", None)
        kernels = load_kernels(device, model, max_tokens=rows, max_rows=1, quantize=quantize)
        self.kernels = kernels
        self.arrays = kernels.arrays_on(device)
        self.activation = activation
        with self.arrays.computing():
            size = len(weight)
            columns = rounded_up(weight.shape[1], 32)  # which tiles need
            weight = numpy.pad(weight, ((0, 0), (0, columns - weight.shape[1])))
            self.weight = kernels.pack(name, self.arrays.of(weight, dtype or "float32"))
            self.bias = None if bias is None else self.arrays.of(values_of(bias), "float32")
            self.x, self.out = (self.arrays.zeros((rows, each), "float32") for each in (columns, size))
            self.added = self.arrays.zeros((rows, size), "float32") if adds else None
            self.program = None if kernels.backend.tensors else kernels.backend.program
            if self.program:
                for buffer in (self.x, self.added):
                    if buffer is not None:
                        self.program.given(buffer)
                self._compute(rows)

    def _compute(self, T: int):
        self.kernels.linear(self.x[:T], self.weight, bias=self.bias, activation=self.activation,
                            residual=None if self.added is None else self.added[:T], out=self.out[:T])

    def __call__(self, x: numpy.ndarray, added: numpy.ndarray | None = None) -> numpy.ndarray:
        T, K = x.shape
        with self.arrays.computing():
            self.arrays.put(x, self.x[:T, :K])
            if self.added is not None and added is not None:
                self.arrays.put(added, self.added[:T])
            if self.program:
                self.program.finish(self.program.start(*whole_text(T)[:6]))
            else:
                self._compute(T)
            return self.arrays.numpy(self.out[:T])


def values_of(tensor: Any) -> numpy.ndarray:
    """The values of a tensor of floats, read from its file and checked."""
    if not isinstance(tensor, Unread):
        return floats(tensor)
    read = tensor.read()
    tensor.refuse_faults(read, packed=False)
    return floats(joined(read) if isinstance(read, tuple) else read)


def whole_text(count: int) -> Batch:
    """A step of one text of `count` rows."""
    zeros = [0] * count
    pages = list(range(-(-count // PAGE_SIZE)))
    return Batch(zeros, zeros, [0, count], [count], [pages], [], True, [0])


class Tower:
    """A model's tower with packed weights. `encode` is a generator: others can compute between its parts."""

    def __init__(self, stored: StoredTower, device: Device, *, dtype: str | None, quantize: str | None,
                 part: float):
        """quantize: the type that float matrices of layers become. part: the most work between two pauses, as
        `layer_work` counts it; a single layer may have more."""
        self.stored = stored
        model = stored.architecture
        tensors = dict(stored.tensors)
        self.eps = model.norm.eps if model.norm else 0.0
        self.projector = PROJECTORS[stored.projector]
        self.square = stored.shuffle**2
        self.rows = stored.patches
        names = [*self.projector.values]
        names += ["places"] if stored.places else []
        names += ["first_norm"] if stored.first_norm else []
        for i in range(len(stored.deep)):
            names += deep_norm(i)
        self.values = {name: values_of(tensors.pop(name)) for name in names}
        self.first = None if self.projector.start else Product(
            model, device, self.rows, "patch", tensors, dtype, None, adds=bool(stored.places))
        self.products = {}
        for deep in ("", *(f"_{i}" for i in range(len(stored.deep)))):
            for each, activation in self.projector.products.items():
                name = f"{each}{deep}"
                self.products[name] = Product(model, device, self.rows // self.square, name, tensors, dtype,
                                              None, activation=activation)
        self.stages = list[Transformer]()
        self.turned = (0, 0)
        layers = len(model.layers)
        step = max(1, min(int(part / layer_work(model, self.rows, bool(quantize))), layers))
        self.ends = {*range(step, layers, step), *(layer + 1 for layer in stored.deep), layers}
        for begin, end in () if self.projector.start else pairwise((0, *sorted(self.ends))):
            own = model.of_layers(range(begin, end))
            kernels = load_kernels(device, own, max_tokens=self.rows, max_rows=1, quantize=quantize)
            given = {name: tensors[moved(name, begin)] for name in own.tensors()}
            kv = KvType("float32" if dtype == "float32" and not quantize else "float16")
            groups = group_layers(kernels.computed(own).by_layer, self.rows, apart=False, kv=kv)
            self.stages.append(Transformer(
                own, given, kernels, num_pages=-(-self.rows // PAGE_SIZE), max_tokens=self.rows, max_rows=1,
                device=device, dtype=dtype, groups=groups, kv=kv,
                buffers=self.stages[0].buffers if self.stages else None))
        if not self.stages:
            return
        x = self.stages[0].buffers["x"]
        self.stages[0].arrays.put(numpy.zeros(tuple(x.shape), numpy.float32), x)  # also what pads it

    def encode(self, tiles: Seq[numpy.ndarray]) -> Generator[None, None, numpy.ndarray]:
        """The rows (tokens, width * (1 + len(deep))) float32 of a picture, from the tiles of `tiles_of`."""
        made = []
        for tile in tiles:
            patches, places = self.patches_of(tile)
            if self.stored.angles:
                self._turn(tile.shape[0] // self.stored.patch, tile.shape[1] // self.stored.patch)
            rows = list[numpy.ndarray]()  # those of deeper layers, beside the last layer's
            if self.first:
                first = self.first(patches, places)
                if self.stored.first_norm:
                    first = rms_norm(first, self.values["first_norm"], self.stored.first_norm)
                seen = yield from self._through_layers(first, rows)
            else:
                assert self.projector.start and places is not None
                seen = self.projector.start(patches, places, self.products, self.values)
                yield
            seen = self.projector.compute(seen, self.square, self.products, self.values).copy()
            made.append(numpy.concatenate([seen, *rows], axis=1))
        return numpy.concatenate(made)

    def _through_layers(self, first: numpy.ndarray,
                        rows: list[numpy.ndarray]) -> Generator[None, None, numpy.ndarray]:
        """The output of the last layer for this input. `rows` gets what projectors make of other layers'
        output (deepstack)."""
        count, width = first.shape
        arrays = self.stages[0].arrays
        x = self.stages[0].buffers["x"]
        arrays.put(first, x[:count, :width])
        for end, stage in zip(sorted(self.ends), self.stages):
            stage.forward(whole_text(count))
            yield
            if end - 1 in self.stored.deep:
                number = len(rows)
                weight, bias = (self.values[name] for name in deep_norm(number))
                seen = arrays.numpy(x[:count, :width]).reshape(count // self.square, -1)
                seen = layer_norm(seen, weight, bias, self.eps)
                for name in self.projector.products:
                    seen = self.products[f"{name}_{number}"](seen)
                rows.append(seen.copy())
        if not self.projector.normed:
            return arrays.numpy(x[:count])[:, :width].astype(numpy.float32)
        return self.stages[-1].hidden_states(0, count).astype(numpy.float32)

    def _turn(self, rows: int, columns: int):
        """Make the layers rotate by places in a grid of patches, which are positions of a text to them."""
        if (rows, columns) == self.turned:
            return
        self.turned = (rows, columns)
        rope = self.stages[0].unpadded.attentions[0].rope
        turned = ANGLES[self.stored.angles](rope, rows, columns)
        angles = by_squares(turned, rows, columns, self.stored.shuffle)
        for table in {id(table): table for stage in self.stages for table in stage.rope_tables}.values():
            for values, part in zip((numpy.cos(angles), numpy.sin(angles)), table):
                self.stages[0].arrays.put(values.astype(numpy.float32), part[:len(angles)])

    def patches_of(self, tile: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray | None]:
        """uint8 (H, W, 3) -> (patches, numbers of a patch) float32, and what is added to their rows, if
        anything is."""
        stored = self.stored
        p = self.stored.patch
        rows = tile.shape[0] // p
        columns = tile.shape[1] // p
        values = tile * numpy.float32(1 / 255)
        values = (values - numpy.array(stored.mean, numpy.float32)) / numpy.array(stored.std, numpy.float32)
        patches = values.reshape(rows, p, columns, p, 3).swapaxes(1, 2).reshape(rows * columns, p * p * 3)
        patches = by_squares(patches, rows, columns, stored.shuffle)
        if not stored.places:
            return patches, None
        places = PLACES[stored.places](self.values["places"], rows, columns)
        return patches, by_squares(places, rows, columns, stored.shuffle)


def deep_norm(number: int) -> tuple[str, str]:
    """The names of the weight and the bias of a deep norm."""
    return f"deep_norm_{number}", f"deep_norm_{number}_bias"


def moved(name: str, layers: int) -> str:
    """The name that a tensor of a stage has in the whole tower."""
    layer, dot, part = name.rpartition(".")
    return f"{int(layer) + layers}.{part}" if dot else name


# What a multiplication costs, if one with q8_0 costs 1. With floats a thread does 264e9 a second, with q8_0
# 600e9 (Zen 5)
FLOATS_COST = 2.3
ATTENTION_COST = 4.0


def layer_work(model: Model, rows: int, quantized: bool) -> float:
    """The work of one layer of a tower for so many rows, in multiplications with quantized weights."""
    C = model.width
    feed = model.layers[0].feed if model.layers else None
    hidden = (1 + halves(feed.activation)) * feed.width if isinstance(feed, FeedForward) else 0
    products = rows * (4.0 * C * C + C * hidden)
    return products * (1 if quantized else FLOATS_COST) + 2.0 * rows * rows * C * ATTENTION_COST


def chunk_work(model: Model, tokens: int, quantized: bool) -> float:
    """About the work of a prompt's chunk in the layers of a model, in the same unit."""
    experts = model.experts
    share = experts.router.chosen / experts.count if experts else 1.0
    numbers = sum(math.prod(shape) * (share if ".expert_" in name else 1.0)
                  for name, shape in model.shapes().items() if len(shape) > 1 and "." in name)
    return tokens * numbers * (1 if quantized else FLOATS_COST)


def tiles_of(picture: Picture, layout: PictureLayout, name: str) -> list[numpy.ndarray]:
    """What a tower reads of a picture: tiles, uint8 (S, S, 3) each. name: of a filter."""
    whole = numpy.frombuffer(picture.pixels, numpy.uint8).reshape(picture.height, picture.width, 3)
    image = whole
    for width, height in layout.sizes:
        image = resized(image, width, height, name)
    if not layout.columns:
        return [image]
    side = image.shape[0] // layout.rows  # tiles are squares
    cut = [image[row * side:(row + 1) * side, column * side:(column + 1) * side]
             for row in range(layout.rows) for column in range(layout.columns)]
    if layout.whole:  # the whole picture follows, made small
        cut.append(resized(whole if layout.afresh else image, *layout.whole, name))
    return cut
