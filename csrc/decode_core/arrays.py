"""Looking at numpy arrays and torch tensors without importing torch: the checks behind every wrapper."""

from . import _core

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "uint16": 2, "uint8": 1}
FORMATS = {"f": "float32", "e": "float16", "d": "float64", "i": "int32", "l": "int64", "q": "int64",
           "H": "uint16", "B": "uint8"}    # of buffers, by letter
_names: dict = {}           # a dtype object -> its name, filled as they come: str(dtype) takes longer than a whole check


def type_name(dtype) -> str:
    if dtype not in _names:
        _names[dtype] = str(dtype).removeprefix("torch.")
    return _names[dtype]


def look_at(name: str, array, types: tuple, *, writable: bool = False, device: str = "cpu") -> tuple:
    """(address, type name, shape, strides in elements) of an aligned array on `device` with one of the types."""
    try:
        if hasattr(array, "data_ptr"):
            kind, strides, address, shape, read_only = type_name(array.dtype), array.stride(), array.data_ptr(), array.shape, False
            if array.device.type != device:
                raise ValueError(f"{name}: must be on {device}, not on {array.device}")
        else:
            if (buffer := _core.look_at_buffer(array)) is None:
                raise ValueError(f"{name}: must be a numpy array or a torch tensor, not {type(array).__name__}")
            address, letter, size, read_only, shape, steps = buffer
            kind, strides = FORMATS.get(letter.lstrip("@=<^"), letter), [step // size for step in steps]
            if device != "cpu":
                raise ValueError(f"{name}: must be on {device}, not a numpy array")
    except (AttributeError, RuntimeError) as missing:     # RuntimeError: a sparse tensor has no strides
        raise ValueError(f"{name}: must be a numpy array or a torch tensor ({missing})") from None
    if kind not in types:
        raise ValueError(f"{name}: must be {' or '.join(types)}, not {kind}")
    if writable and read_only:
        raise ValueError(f"{name}: is read-only")
    if address % BYTES[kind]:
        raise ValueError(f"{name}: is not aligned to its elements")
    return address, kind, shape, strides


def vector(name: str, array, kind: str, size: int, *, writable: bool = False, device: str = "cpu") -> int:
    """The address of a contiguous array of `size` elements of one type."""
    address, _, shape, strides = look_at(name, array, (kind,), writable=writable, device=device)
    if tuple(shape) != (size,):
        raise ValueError(f"{name}: must have the shape ({size},), not {tuple(shape)}")
    if size > 1 and strides[0] != 1:
        raise ValueError(f"{name}: must be contiguous")
    return address


def matrix(name: str, array, types: tuple, *, writable: bool = False, device: str = "cpu") -> tuple:
    """(address, type name, rows, columns, elements from row to row) of an array contiguous within each of its rows."""
    address, kind, shape, strides = look_at(name, array, types, writable=writable, device=device)
    if len(shape) != 2:
        raise ValueError(f"{name}: must have two dimensions, not the shape {tuple(shape)}")
    rows, columns = shape
    if (columns > 1 and strides[1] != 1) or (rows > 1 and strides[0] < columns):
        raise ValueError(f"{name}: must be contiguous within each row, and its rows apart")
    return address, kind, rows, columns, strides[0]
