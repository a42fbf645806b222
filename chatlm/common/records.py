"""Records: frozen dataclasses that are quick to define.

A process of ours defines a hundred dataclasses when it starts, and `dataclass(frozen=True)` compiles six
methods for each. A record shares five of them with all other records, and gets its `__init__` when its first
object is made. Many never make one: a worker defines the blocks of all families, and loads one model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import MISSING, FrozenInstanceError, dataclass, field, fields
from operator import attrgetter
from typing import Any, TYPE_CHECKING, TypeVar, overload

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform  # in typing from Python 3.11 on
else:
    dataclass_transform = lambda **_: lambda function: function

T = TypeVar("T")


@overload
@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(cls: type[T], /) -> type[T]: ...
@overload
@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(*, kw_only: bool = False) -> Callable[[type[T]], type[T]]: ...
def record(cls: type | None = None, /, *, kw_only: bool = False) -> Any:
    """Makes a class what `dataclass(frozen=True)` makes it, but for methods that the class has itself."""
    def define(cls: type) -> type:
        dataclass(init=False, repr=False, eq=False, kw_only=kw_only)(cls)  # compiles nothing
        for method in SHARED:
            if method.__name__ not in vars(cls):
                setattr(cls, method.__name__, method)

        def __init__(self, *values, **named):
            setattr(cls, "__init__", compiled_init(cls))
            cls.__init__(self, *values, **named)

        setattr(cls, "__init__", __init__)
        return cls
    return define(cls) if cls else define


def compiled_init(cls: type) -> Callable[..., None]:
    """The `__init__` of a record: it takes, sets and refuses what that of a dataclass does."""
    names: dict[str, Any] = {"_set": object.__setattr__, "_MISSING": MISSING}
    by_place = []
    by_name = []
    lines = []
    for each in fields(cls):
        name = each.name
        argument = name
        value = name
        if each.default is not MISSING:
            names[f"_default_{name}"] = each.default
            argument = f"{name}=_default_{name}"
        elif each.default_factory is not MISSING:
            names[f"_make_{name}"] = each.default_factory
            argument = f"{name}=_MISSING"
            value = f"_make_{name}() if {name} is _MISSING else {name}"
        arguments = by_name if each.kw_only else by_place
        arguments.append(argument)
        lines.append(f" _set(self, {name!r}, {value})")
    if hasattr(cls, "__post_init__"):
        lines.append(" self.__post_init__()")
    head = ", ".join(["self", *by_place, *(["*", *by_name] if by_name else [])])
    exec("\n".join([f"def __init__({head}):", *lines, " return None"]), names)
    init = names["__init__"]
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    return init


@functools.cache
def compared(cls: type) -> Callable[[Any], Any]:
    """A function of an object of this class: what must be equal in an equal one."""
    return attrgetter("__class__", *(each.name for each in fields(cls) if each.compare))


def __eq__(self, other):
    if other.__class__ is not self.__class__:
        return NotImplemented
    of = compared(self.__class__)
    return of(self) == of(other)


def __hash__(self):
    return hash(compared(self.__class__)(self))


def __repr__(self):
    shown = ", ".join(f"{each.name}={getattr(self, each.name)!r}" for each in fields(self))
    return f"{self.__class__.__qualname__}({shown})"


def __setattr__(self, name, value):
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def __delattr__(self, name):
    raise FrozenInstanceError(f"cannot delete field {name!r}")


SHARED = __eq__, __hash__, __repr__, __setattr__, __delattr__
