"""Packed safetensors: what config.json says of them, and which of a folder's tensors form a matrix.

A row of PACKINGS is a format. chatlm/worker/weights/packed/layouts.py has the arithmetic."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy

from chatlm.common.errors import ConfigError, printable, shown
from chatlm.worker.arrays.kinds import FLOATS, floats, kind_of
from chatlm.worker.weights.packed.layouts import (
    Codebook, Grouped, Mx4, Nv4, PackedLayout, PackedWeight, awq_codes, unpacked, word_counts)
from chatlm.worker.weights.rules import MOST_CHANNELS, Rule, checked, read_json

MOST_REPEATS = 5  # of a regular expression, whose time grows with each
FP8_METHODS = "fp8", "fbgemm_fp8"
GPTQ_FORMS = "gptq", "gptq_v2"
ADVICE = "use the unquantized model or a GGUF file of it"
READ = ("AWQ (gemm, 4 bits), GPTQ (2, 3, 4, 8 bits), compressed-tensors, bitsandbytes (4 and 8 bits), "
        "modelopt (NVFP4, MXFP4, FP8), and FP8 (fp8, fbgemm_fp8)")
CT_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision",
              "nvfp4-pack-quantized", "mxfp4-pack-quantized", "dense")
OTHER_FILES = {"hf_quant_config": "modelopt", "quantize_config": "gptq", "quant_config": "awq"}  # -> method
CT_TYPES = [("float", 4), ("float", 8), *(("int", bits) for bits in range(1, 9))]


class Quantization(NamedTuple):
    """A folder's `quantization_config`, or what stands for it. `key` is its name in `path`."""

    path: Path
    key: str
    stated: Mapping[str, Any]

    @property
    def method(self) -> str:
        return self.stated["quant_method"]

    def get(self, names: str, rule: Rule, default: Any = None) -> Any:
        """The value under the first of several names that is stated, checked."""
        found = [name for name in names.split() if self.stated.get(name) is not None]
        name = (found or names.split())[0]
        return checked(self.path, f"{self.key}.{name}", self.stated.get(name, default), rule)

    def matches(self, key: str, pattern: str, module: str) -> bool:
        """Does a module's name begin with a regular expression, which stands under `key`? ConfigError for one
        that is invalid or could take any time."""
        try:
            expression = re.compile(pattern)
        except (re.error, OverflowError, RecursionError):
            expression = None
        if expression is None or re.search(r"\)[*+{]", pattern) or len(
                re.findall(r"[*+{]", pattern)) > MOST_REPEATS:
            raise ConfigError(f"{self.path}: {self.key}.{key} has {shown(pattern)}, which is no regular "
                              f"expression without repeated groups and with at most {MOST_REPEATS} repeats")
        return bool(expression.match(module))


class Stored(NamedTuple):
    """The tensors that form a matrix, by the endings of their names. `module` is what all these names begin
    with."""

    folder: Path
    module: str
    tensors: dict[str, numpy.ndarray]
    quantization: Quantization

    def error(self, ending: str, words: str) -> ConfigError:
        """An error that says this of a tensor."""
        return ConfigError(f"{self.folder}: {printable(f'{self.module}.{ending}')} {words}")

    def refuse(self, ending: str, must: str) -> NoReturn:
        tensor = self.tensors.get(ending)
        state = "is missing" if tensor is None else f"is {kind_of(tensor)} {tuple(tensor.shape)}"
        raise self.error(ending, f"{state}; it must be {must}")

    def take(self, ending: str, kinds: str, *shape: int | None) -> numpy.ndarray:
        """A tensor whose type is one of `kinds` and whose shape is this one. None stands for any size but
        0."""
        tensor = self.tensors.get(ending)
        if tensor is None or kind_of(tensor) not in kinds.split() or not has_shape(tensor, shape):
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            self.refuse(ending, f"{' or '.join(kinds.split())} ({sizes})")
        return self.tensors[ending]

    def check_group(self, ending: str, group: int, K: int):
        if K % group:
            raise self.error(ending, f"has {K} input columns, not a multiple of the group size {group}")

    def given(self, ending: str) -> bool:
        return ending in self.tensors

    @property
    def mapped(self) -> tuple[numpy.ndarray, ...]:
        return tuple(self.tensors.values())


def has_shape(tensor: numpy.ndarray, shape: tuple[int | None, ...]) -> bool:
    """Is a tensor of this shape? None stands for any size but 0."""
    if len(tensor.shape) != len(shape):
        return False
    return all(has != 0 if size is None else has == size for has, size in zip(tensor.shape, shape))


FLOAT = " ".join(FLOATS)
WHOLE = "int32 int64"


def awq(stored: Stored) -> PackedLayout:
    qweight = stored.take("qweight", "int32", None, None)
    K = qweight.shape[0]
    N = 8 * qweight.shape[1]
    group, G = groups_of(stored.quantization.get("group_size q_group_size", GROUP_SIZE, 128), K)
    stored.check_group("qweight", group, K)
    scales = stored.take("scales", FLOAT, G, N)
    qzeros = stored.take("qzeros", "int32", G, N // 8)
    return Grouped((N, K), 4, group, partial(awq_codes, qweight), scales.T,
                   stored.mapped, partial(awq_codes, qzeros))


GROUP_SIZE = Rule(int, -1, MOST_CHANNELS)


def groups_of(size: int, K: int) -> tuple[int, int]:
    """How many of K columns share a scale, and how many such groups there are. Size -1 means one group."""
    size = K if size < 1 else size
    return size, -(-K // size)


def overridden(quantization: Quantization, module: str) -> Quantization:
    """GPTQ's settings of a module: those of the first rule in `dynamic` that matches its name count first."""
    rules = quantization.stated.get("dynamic") or {}
    if not isinstance(rules, dict):
        raise ConfigError(f"{quantization.path}: {quantization.key}.dynamic is {shown(rules)}; it must be an "
                          "object")
    for pattern, changes in rules.items():
        if not pattern.startswith("-:") and isinstance(changes, dict) and quantization.matches(
                "dynamic", pattern.removeprefix("+:"), module):
            return quantization._replace(stated={**quantization.stated, **changes})
    return quantization


def gptq(stored: Stored) -> PackedLayout:
    settings = overridden(stored.quantization, stored.module)
    bits = settings.get("bits", Rule(int, 2, 8))
    if bits not in (2, 3, 4, 8):
        raise ConfigError(f"{settings.path}: {settings.key}.bits is {bits}; it must be 2, 3, 4 or 8")
    is_v2 = settings.stated.get("checkpoint_format") == "gptq_v2"
    is_symmetric = settings.get("sym", Rule(bool), True)
    qweight = stored.take("qweight", "int32", None, None)
    K = 32 * qweight.shape[0] // bits
    N = qweight.shape[1]
    group, G = groups_of(settings.get("group_size", GROUP_SIZE, -1), K)
    scales = stored.take("scales", FLOAT, G, N)

    def codes(begin: int, end: int) -> numpy.ndarray:
        return unpacked(qweight[:, begin:end].T, bits, K)

    def zeros(begin: int, end: int) -> numpy.ndarray:  # a field that is full has the zero point 2^bits
        return unpacked(qzeros, bits, N, begin, end).T + numpy.uint16(not is_v2)

    if is_symmetric:
        middle = 1 << bits - 1
        refuse_points(stored, "qzeros", lambda points: unpacked(points, bits, N), (middle - 1, middle))
    else:
        qzeros = stored.take("qzeros", "int32", G, -(-N * bits // 32))
    order = order_of(stored, "g_idx", K, group, G)
    return Grouped((N, K), bits, group, codes, scales.T, stored.mapped, None if is_symmetric else zeros,
                   order)


def refuse_points(stored: Stored, ending: str, decode: Callable[[numpy.ndarray], numpy.ndarray],
                  usual: tuple[int, ...]):
    """ConfigError if weights that are said to be symmetric have a tensor of other zero points. It looks at
    some of them."""
    points = stored.tensors.get(ending)
    if points is not None and points.size and not any(
            (decode(points.reshape(*points.shape[:1] or (1,), -1)[:1]) == one).all() for one in usual):
        raise stored.error(ending, f"has several zero points, but {stored.quantization.key} says that these "
                                   "weights are symmetric")


def order_of(stored: Stored, ending: str, K: int, group: int, G: int) -> numpy.ndarray | None:
    """The group of each column, if the columns are not in the order of the groups."""
    if not stored.given(ending):
        return None
    order = stored.take(ending, WHOLE, K)
    if len(order) and not 0 <= order.min() <= order.max() < G:
        raise stored.error(ending, f"has {order.min() if order.min() < 0 else order.max()}; there are {G} "
                                   "groups")
    return None if (order == numpy.arange(K) // group).all() else numpy.array(order)


class CtGroup(NamedTuple):
    """What compressed-tensors' config says of the weights of some modules."""

    name: str
    targets: tuple[str, ...]
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any]  # of activations; empty if they are not rounded

    @property
    def few_bits_of_x(self) -> bool:
        """Are activations rounded to 8 bits, with one scale for each row of them or for all?"""
        return (self.inputs.get("type"), self.inputs.get("num_bits")) == ("int", 8)


def ct_groups(quantization: Quantization) -> list[CtGroup]:
    """compressed-tensors' groups of modules, at least one. ConfigError for a group of another form."""
    where = f"{quantization.path}: {quantization.key}.config_groups"
    stated = quantization.stated.get("config_groups")
    if stated is None:
        stated = {}
    if not isinstance(stated, dict):
        raise ConfigError(f"{where} is {shown(stated)}; it must be an object")
    groups = [ct_group_of(f"{where}.{printable(name)}", name, group) for name, group in stated.items()]
    return groups or [CtGroup("", (), {}, {})]


def ct_group_of(where: str, name: str, stated: Any) -> CtGroup:
    is_object = isinstance(stated, dict)
    weights = stated.get("weights") or {} if is_object else stated
    targets = stated.get("targets") or [] if is_object else None
    inputs = stated.get("input_activations") if is_object else None
    if not isinstance(weights, dict):
        raise ConfigError(f"{where} is {shown(stated)}; it must be an object, and so must its `weights`")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ConfigError(f"{where}.targets is {shown(targets)}; it must be a list of texts")
    return CtGroup(name, tuple(targets), weights, inputs if isinstance(inputs, dict) else {})


def ct_group(quantization: Quantization, module: str) -> CtGroup:
    """The group of a module. A group that targets its name comes before one that targets its class."""
    groups = ct_groups(quantization)

    def matches(target: str) -> bool:
        return (quantization.matches("config_groups", target[3:], module) if target.startswith("re:")
                else target == module)

    named = [group for group in groups if any(map(matches, group.targets))]
    return (named or [group for group in groups if "Linear" in group.targets] or groups)[0]


def ct_bits(stored: Stored) -> tuple[int, CtGroup]:
    group = ct_group(stored.quantization, stored.module)
    quantization = stored.quantization
    key = f"{quantization.key}.config_groups.{printable(group.name)}.weights.num_bits"
    return checked(quantization.path, key, group.weights.get("num_bits"), Rule(int, 1, 8)), group


def ct_columns(stored: Stored, config: CtGroup, N: int, K: int) -> tuple[numpy.ndarray, int]:
    """The scales (N, G), and how many columns share one."""
    scales = stored.tensors.get("weight_scale")
    if config.weights.get("strategy") == "tensor" and scales is not None and scales.size == 1:
        return numpy.broadcast_to(floats(scales).reshape(1, 1), (N, 1)), K
    where = f"{stored.quantization.key}.config_groups.{printable(config.name)}.weights.group_size"
    size = checked(stored.quantization.path, where, config.weights.get("group_size") or -1, GROUP_SIZE)
    group, G = groups_of(size, K)
    stored.check_group("weight_scale", group, K)
    return stored.take("weight_scale", FLOAT, N, G), group


def ct_symmetric(group: CtGroup) -> bool:
    return group.weights.get("symmetric") is not False


def ct_packed(stored: Stored) -> PackedLayout:
    bits, config = ct_bits(stored)
    N, K = sizes_in(stored)
    packed = stored.take("weight_packed", "int32", N, None)
    if packed.shape[1] not in word_counts(K, bits):
        stored.refuse("weight_packed", f"{N} rows of {min(word_counts(K, bits))} words, for {K} inputs of "
                                       f"{bits} bits")
    scales, group = ct_columns(stored, config, N, K)
    G = scales.shape[1]

    def codes(begin: int, end: int) -> numpy.ndarray:
        return unpacked(packed[begin:end], bits, K)

    zeros = None
    if ct_symmetric(config):
        refuse_points(stored, "weight_zero_point", partial(ct_point_codes, bits=bits), (0, 1 << bits - 1))
    else:
        points = stored.take("weight_zero_point", "int32", None, G)
        if len(points) not in word_counts(N, bits):
            stored.refuse("weight_zero_point", f"{min(word_counts(N, bits))} rows of {G} words")
        zeros = partial(ct_zeros, points, bits, N)
    order = order_of(stored, "weight_g_idx", K, group, G) if usual_order(stored) else None
    return Grouped((N, K), bits, group, codes, scales, stored.mapped, zeros, order)


def ct_point_codes(points: numpy.ndarray, bits: int) -> numpy.ndarray:
    """Zero points of symmetric weights, which some files pack and some do not."""
    return points if kind_of(points) == "int8" else unpacked(points.T, bits, 32 // bits)


def ct_zeros(points: numpy.ndarray, bits: int, N: int, begin: int, end: int) -> numpy.ndarray:
    return unpacked(points.T, bits, N, begin, end).T


def usual_order(stored: Stored) -> bool:
    """Does the file state an order of columns? One of -1 stands for none."""
    order = stored.tensors.get("weight_g_idx")
    return order is not None and not (kind_of(order) in WHOLE.split() and (order == -1).all())


def sizes_in(stored: Stored) -> tuple[int, int]:
    """(N, K), from weight_shape."""
    N, K = map(int, stored.take("weight_shape", WHOLE, 2))
    if not (0 < N <= 1 << 24 and 0 < K <= MOST_CHANNELS):
        raise stored.error("weight_shape", f"is {[N, K]}; these are no numbers of outputs and inputs")
    return N, K


def ct_int8(stored: Stored) -> PackedLayout:
    _, config = ct_bits(stored)
    weight = stored.take("weight", "int8", None, None)
    N, K = weight.shape
    scales, group = ct_columns(stored, config, N, K)
    zeros = None
    if ct_symmetric(config):
        refuse_points(stored, "weight_zero_point", lambda points: points, (0,))
    else:
        points = stored.take("weight_zero_point", "int8", *scales.shape)
        zeros = partial(rows_between, points)
    return Grouped((N, K), 8, group, partial(rows_between, weight), scales, stored.mapped, zeros, signed=True,
                   few_bits_of_x=config.few_bits_of_x)


def rows_between(tensor: numpy.ndarray, begin: int, end: int) -> numpy.ndarray:
    return tensor[begin:end]


def nvfp4(stored: Stored, codes: str = "weight_packed", factor: str = "weight_global_scale") -> PackedLayout:
    packed = stored.take(codes, "uint8", None, None)
    N = packed.shape[0]
    K = 2 * packed.shape[1]
    if K % 16:
        stored.refuse(codes, "of whole groups of 16 inputs")
    scales = stored.take("weight_scale", "float8_e4m3fn", N, K // 16)
    number = stored.tensors.get(factor)
    if number is None or kind_of(number) not in FLOATS or number.size != 1:
        stored.refuse(factor, "one float")
    return Nv4(packed, scales, number, divides=codes == "weight_packed")


def mxfp4(stored: Stored, codes: str = "weight_packed") -> PackedLayout:
    packed = stored.take(codes, "uint8", None, None)
    if packed.shape[1] % 16:
        stored.refuse(codes, "of whole groups of 32 inputs")
    return Mx4(packed, stored.take("weight_scale", "uint8", packed.shape[0], packed.shape[1] // 16))


def codebook_state(stored: Stored, ending: str) -> tuple[int, int, int, int | None, float]:
    """(N, K, the blocksize, the blocksize of the scales' scales, what is added to the scales), from JSON in
    bytes."""
    try:
        state = json.loads(stored.take(ending, "uint8", None).tobytes())
        [N, K], block, inner = state["shape"], state["blocksize"], state.get("nested_blocksize")
        if all(type(size) is int and 0 < size <= 1 << 24 for size in (N, K, block, inner or 1)) and (
                block % 2 == 0):
            return N, K, block, inner, float(state.get("nested_offset") or 0)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        pass
    stored.refuse(ending, "JSON with shape, of outputs and inputs, and an even blocksize")


def codebook(stored: Stored, name: str) -> PackedLayout:
    """bitsandbytes' 4 bits."""
    packed = stored.take("weight", "uint8", None, 1)[:, 0]
    N, K, block, inner, offset = codebook_state(stored, f"weight.quant_state.bitsandbytes__{name}")
    if len(packed) != -(-N * K // 2):
        stored.refuse("weight", f"{-(-N * K // 2)} bytes, for {N} x {K} codes")
    levels = stored.take("weight.quant_map", FLOAT, 16)
    count = -(-N * K // block)
    if stored.given("weight.nested_absmax") or inner:
        absmax = stored.take("weight.absmax", "uint8", count)
        table = floats(stored.take("weight.nested_quant_map", FLOAT, 256))
        outer = floats(stored.take("weight.nested_absmax", FLOAT, -(-count // (inner or 256))))
        scales = partial(nested_scales, absmax, table, outer, inner or 256, offset)
    else:
        absmax = stored.take("weight.absmax", FLOAT, count)
        scales = partial(plain_scales, absmax)
    return Codebook((N, K), packed, numpy.array(floats(levels)), scales, block, stored.mapped)


def plain_scales(absmax: numpy.ndarray, begin: int, end: int) -> numpy.ndarray:
    return floats(absmax[begin:end])


def nested_scales(absmax: numpy.ndarray, table: numpy.ndarray, outer: numpy.ndarray, block: int,
                  offset: float, begin: int, end: int) -> numpy.ndarray:
    groups = numpy.arange(begin, end) // block
    return table[absmax[begin:end]] * outer[groups] + numpy.float32(offset)


def llm_int8(stored: Stored) -> PackedLayout:
    weight = stored.take("weight", "int8", None, None)
    scales = stored.take("SCB", FLOAT, len(weight))
    return Grouped((*weight.shape,), 8, weight.shape[1], partial(rows_between, weight), scales[:, None],
                   stored.mapped, signed=True, divisor=127)


class Packing(NamedTuple):
    """A format: the ending and the type of the tensor that has its codes, the tensors beside it, its
    layout."""

    title: str
    methods: str
    codes: str
    kind: str
    needed: str                    # what tells it from another of the same codes
    others: str
    layout: Callable[[Stored], PackedLayout]


NESTED = "weight.absmax weight.quant_map weight.nested_absmax weight.nested_quant_map"
PACKINGS = (
    Packing("AWQ", "awq", "qweight", "int32", "", "qzeros scales", awq),
    Packing("GPTQ", "gptq", "qweight", "int32", "", "qzeros scales g_idx", gptq),
    Packing("compressed-tensors", "compressed-tensors", "weight_packed", "int32", "",
            "weight_scale weight_shape weight_zero_point weight_g_idx", ct_packed),
    Packing("NVFP4", "compressed-tensors", "weight_packed", "uint8", "weight_global_scale", "weight_scale",
            nvfp4),
    Packing("MXFP4", "compressed-tensors", "weight_packed", "uint8", "", "weight_scale", mxfp4),
    Packing("int8", "compressed-tensors", "weight", "int8", "", "weight_scale weight_zero_point", ct_int8),
    Packing("NVFP4", "modelopt", "weight", "uint8", "weight_scale_2", "weight_scale",
            partial(nvfp4, codes="weight", factor="weight_scale_2")),
    Packing("MXFP4", "modelopt", "weight", "uint8", "", "weight_scale", partial(mxfp4, codes="weight")),
    Packing("bitsandbytes nf4", "bitsandbytes", "weight", "uint8", "weight.quant_state.bitsandbytes__nf4",
            NESTED, partial(codebook, name="nf4")),
    Packing("bitsandbytes fp4", "bitsandbytes", "weight", "uint8", "weight.quant_state.bitsandbytes__fp4",
            NESTED, partial(codebook, name="fp4")),
    Packing("bitsandbytes int8", "bitsandbytes", "weight", "int8", "", "SCB weight_format", llm_int8))
METHODS = {*FP8_METHODS, *(packing.methods for packing in PACKINGS)}
# for activations and cached keys and values, whose types differ here
UNREAD_SCALES = r".*\.(input|output|[kqv])_(global_)?(scale|zero_point)(_inv)?$"


def quantization_of(path: Path, config: Mapping) -> Quantization | None:
    """What config.json, or another file beside it, says of a folder's quantization."""
    text = config.get("text_config")
    for prefix, holder in (("", config), ("text_config.", text if isinstance(text, dict) else {})):
        stated = holder.get("quantization_config")
        if stated is None:
            continue
        stated = stated if isinstance(stated, dict) else {}
        if not only_of_cache(stated):
            return Quantization(path, f"{prefix}quantization_config", with_method(stated))
    for name, method in OTHER_FILES.items():
        other = path.with_name(f"{name}.json")
        if stated := read_json(other, needed=False):
            stated = stated.get("quantization", stated)
            stated = stated if isinstance(stated, dict) else {}
            return Quantization(other, name, {"quant_method": method, **stated})
    return None


def only_of_cache(stated: Mapping) -> bool:
    """Does it say only how others keep keys and values?"""
    own = [key for key, value in stated.items() if value not in (None, "", [], {})]
    return bool(own) and all(key.startswith("kv_cache") for key in own)


def with_method(stated: Mapping) -> Mapping:
    """bitsandbytes' older configs do not name their method, and modelopt has a name for each of its
    formats."""
    method = stated.get("quant_method")
    if method is None and (stated.get("load_in_4bit") or stated.get("load_in_8bit")):
        method = "bitsandbytes"
    if isinstance(method, str) and method.startswith("modelopt"):
        method = "modelopt"
    return {**stated, "quant_method": method}


def check_quantization(path: Path, config: Mapping) -> Quantization | None:
    """`quantization_of`. ConfigError if no row of PACKINGS reads such weights."""
    quantization = quantization_of(path, config)
    if quantization is None:
        return None
    reason = why_unread(quantization)
    if reason:
        raise ConfigError(f"{quantization.path}: {quantization.key}.{reason}; these packed weights are read: "
                          f"{READ}. Otherwise {ADVICE}")
    return quantization


def why_unread(quantization: Quantization) -> str:
    """Why no row of PACKINGS reads weights of this quantization, beginning with the key that says so; "" if
    one does."""
    stated = quantization.stated
    method = stated.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        return f"quant_method is {shown(method)}"
    if method == "awq":
        version = str(stated.get("version") or "gemm").lower()
        if version != "gemm":
            return f"version is {shown(version)}, of which only gemm is read"
        bits = stated.get("bits", stated.get("w_bit", 4))
        if bits != 4:
            return f"bits is {shown(bits)}, and AWQ is read with 4"
    if method == "gptq":
        form = stated.get("checkpoint_format") or "gptq"
        if form not in GPTQ_FORMS:
            return f"checkpoint_format is {shown(form)}"
    if method == "compressed-tensors":
        return why_ct_unread(quantization)
    return ""


def why_ct_unread(quantization: Quantization) -> str:
    """`why_unread` of compressed-tensors. ConfigError for groups of another form."""
    stated = quantization.stated
    layout = stated.get("format")
    sparse = stated.get("sparsity_config")
    if isinstance(sparse, dict) and sparse.get("format"):
        layout = sparse["format"]
    reasons = []
    if layout is not None and layout not in CT_FORMATS:
        reasons.append(f"quant_method is {shown(quantization.method)} of format {shown(layout)}")
    for group in ct_groups(quantization):
        kind = group.weights.get("type")
        bits = group.weights.get("num_bits")
        if group.weights and (kind, bits) not in CT_TYPES:
            reasons.append(f"quant_method is {shown(quantization.method)}, and the weights of "
                           f"{shown(group.name)} are of type {shown(kind)} with {shown(bits)} bits")
    return reasons[0] if reasons else ""


def join_packed(folder: Path, state: Mapping[str, numpy.ndarray]) -> dict[str, Any]:
    """A folder's tensors. Those that form a packed matrix become one PackedWeight, `.weight`."""
    path = folder / "config.json"
    config = read_json(path, needed=False)
    stated = quantization_of(path, config)
    if stated is None or stated.method in (*FP8_METHODS, "mxfp4"):  # gpt-oss' own, which its family reads
        return dict(state)
    quantization = check_quantization(path, config) or stated
    joined = {}
    joined_names = set()
    for module, packing in packed_modules(quantization.method, state):
        names = {}
        for ending in (packing.codes, *packing.needed.split(), *packing.others.split()):
            name = f"{module}.{ending}"
            if name in state:
                names[ending] = name
        tensors = {ending: state[name] for ending, name in names.items()}
        layout = packing.layout(Stored(folder, module, tensors, quantization))
        joined[f"{module}.weight"] = PackedWeight(layout, packing.title)
        joined_names |= {*names.values()}
    rest = {}
    for name, tensor in state.items():
        is_unread = joined and re.fullmatch(UNREAD_SCALES, name)
        if name not in joined_names and not is_unread:
            rest[name] = tensor
    return rest | joined


def packed_modules(method: str, state: Mapping[str, numpy.ndarray]) -> Iterator[tuple[str, Packing]]:
    """Each module with packed weights, and its row of PACKINGS."""
    rows = [packing for packing in PACKINGS if packing.methods == method]
    for name, tensor in state.items():
        for packing in rows:
            module = name.removesuffix(f".{packing.codes}")
            if module != name and kind_of(tensor) == packing.kind and all(
                    f"{module}.{ending}" in state for ending in packing.needed.split()):
                yield module, packing
                break


def without_zero_biases(state: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """A folder's tensors without the biases of zeros that some packers write where a model has none."""
    def is_nothing(name: str, tensor: Any) -> bool:
        packed = isinstance(state.get(f"{name.removesuffix('bias')}weight"), PackedWeight)
        return name.endswith(".bias") and name not in expected and packed and not floats(tensor).any()

    return {name: tensor for name, tensor in state.items() if not is_nothing(name, tensor)}


def origin_of(state: Mapping[str, Any], tiles: bool) -> str:
    """In words, which formats a folder's matrices have, and how many of them are multiplied out. `tiles`:
    kernels read packed weights."""
    packed = [tensor for tensor in state.values() if isinstance(tensor, PackedWeight)]
    if not packed:
        return ""
    origin = f", from {', '.join(dict.fromkeys(tensor.title for tensor in packed))}"
    as_floats = sum(not (tiles and tensor.layout.kind) for tensor in packed)
    if as_floats:
        several = f"{as_floats} of {len(packed)}" if as_floats < len(packed) else "all"
        origin += f", {several} matrices multiplied out"
    return origin
