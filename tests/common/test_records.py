"""Records behave like frozen dataclasses."""

import copy
import pickle
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, asdict, dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Generic, TypeVar

import pytest

from chatlm.common.records import record

T = TypeVar("T")
frozen = dataclass(frozen=True)


def classes(make, by_name):
    """The same classes, made by `record` or by `dataclass`."""
    @make
    class Place:
        """A place."""

        x: int
        y: int = 2
        note: str = field(default="", compare=False)
        tags: dict = field(default_factory=dict, metadata={"unit": "none"})

        @cached_property
        def size(self) -> int:
            return self.x * self.y

    @make
    class Tower(Place):
        """Of a base with fields."""

        floors: tuple[int, ...] = (1,)
        y: int = 7

        def __post_init__(self):
            object.__setattr__(self, "tags", {**self.tags, "made": True})

    @make
    class Empty:
        """Without fields."""

    @make
    class Own(Place):
        """With methods of its own."""

        def __repr__(self):
            return "its own"

        def __eq__(self, other):
            return self.x == getattr(other, "x", other)

        def __hash__(self):
            return self.x

    @by_name
    class Named(Place):
        """All its fields are named."""

        z: int
        w: int = 5

    return {cls.__name__: cls for cls in (Place, Tower, Empty, Own, Named)}


RECORDS = classes(record, record(kw_only=True))
DATACLASSES = classes(frozen, dataclass(frozen=True, kw_only=True))
CALLS = [
    ("Place", (1,), {}), ("Place", (1, 3, "a"), {}), ("Place", (), {"x": 4, "tags": {"b": 1}}), ("Tower", (1,), {}),
    ("Tower", (1,), {"floors": (2, 3)}), ("Empty", (), {}), ("Own", (1,), {}), ("Named", (1,), {"z": 3}),
    ("Named", (), {"x": 1, "z": 3, "w": 0}),
    ("Place", (), {}), ("Place", (1,), {"x": 2}), ("Place", (1, 2, "", {}, 5), {}), ("Place", (1,), {"q": 2}),
    ("Empty", (1,), {}), ("Named", (1,), {}), ("Named", (1, 2, "", {}, 3), {"z": 1}), ("Own", (), {})]


def result(call, *values, **named):
    try:
        return call(*values, **named)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("name, values, named", CALLS)
def test_a_record_is_made_like_a_dataclass(name, values, named):
    ours, theirs = (result(kinds[name], *values, **named) for kinds in (RECORDS, DATACLASSES))
    if isinstance(theirs, tuple):
        assert ours == theirs
    else:
        assert repr(ours) == repr(theirs) and vars(ours) == vars(theirs) and asdict(ours) == asdict(theirs)


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_has_a_dataclass_s_fields(name):
    ours, theirs = RECORDS[name], DATACLASSES[name]
    assert is_dataclass(ours)
    assert list(map(repr, fields(ours))) == list(map(repr, fields(theirs)))
    assert ours.__match_args__ == theirs.__match_args__
    assert getattr(ours, "y", None) == getattr(theirs, "y", None) and not hasattr(ours, "tags")


def test_records_are_compared_by_their_fields():
    for kinds in (RECORDS, DATACLASSES):
        Place = kinds["Place"]
        assert Place(1) == Place(1, 2) != Place(1, 3)
        assert Place(1, note="a") == Place(1, note="b")         # compare=False
        assert Place(1) != kinds["Tower"](1, 2) and Place(1) != 1 and Place(1) != DATACLASSES
        assert kinds["Empty"]() == kinds["Empty"]() and len({kinds["Empty"](), kinds["Empty"]()}) == 1
        assert kinds["Own"](3) == 3 and hash(kinds["Own"](3)) == 3
        with pytest.raises(TypeError, match="unhashable"):
            hash(Place(1))                                      # it has a dict


def test_equal_records_have_one_hash():
    @record
    class Point:
        """A point."""

        x: int
        y: int = field(default=0, compare=False)

    assert hash(Point(1)) == hash(Point(1, 5)) and {Point(1): "a"}[Point(1, 5)] == "a" and hash(Point(1)) != hash(Point(2))


def test_a_record_cannot_be_changed():
    for kinds in (RECORDS, DATACLASSES):
        place = kinds["Place"](2)
        for change in (lambda place: setattr(place, "x", 1), lambda place: delattr(place, "x")):
            with pytest.raises(FrozenInstanceError, match="field 'x'"):
                change(place)
        with pytest.raises(FrozenInstanceError):
            place.other = 1
        assert place.size == 4 and place.size == 4 and vars(place)["size"] == 4     # a cached_property may be kept


def test_changed_copies_are_made_anew():
    for kinds in (RECORDS, DATACLASSES):
        tower = kinds["Tower"](1, tags={"a": 1})
        other = replace(tower, floors=(9,))
        assert other == kinds["Tower"](1, floors=(9,), tags={"a": 1}) and tower.floors == (1,)
        assert copy.copy(tower) == copy.deepcopy(tower) == tower
        with pytest.raises(TypeError, match="unexpected keyword argument 'q'"):
            replace(tower, q=1)


@record
class Packed:
    """At the top of a module, where pickle finds it."""

    x: int
    more: tuple = ()


def test_records_can_be_pickled():
    assert pickle.loads(pickle.dumps(Packed(1, (2,)))) == Packed(1, (2,))


def test_records_match_patterns():
    match RECORDS["Place"](3, 4):
        case tuple() | Mapping():
            raise AssertionError
        case object(x=x, y=4):
            assert x == 3
    match Packed(1, (2,)):
        case Packed(x, (y,)):
            assert (x, y) == (1, 2)


def test_each_default_is_made_for_one_object():
    Place = RECORDS["Place"]
    Place(1).tags["a"] = 1
    assert Place(1).tags == {}


def test_a_subclass_that_is_no_record_is_made_too():
    for kinds in (RECORDS, DATACLASSES):
        class Base(kinds["Place"]):
            """Its `__init__` calls that of a class that has made no object yet."""

            def __init__(self, x):
                super().__init__(x, y=5)

        assert (Base(1).x, Base(1).y) == (1, 5)


def test_records_may_be_generic():
    @record
    class Box(Generic[T]):
        """A box."""

        inside: T

    assert Box[int](1) == Box(1) and Box[int](1).inside == 1


def test_two_threads_may_make_the_first_objects(monkeypatch):
    import threading

    from chatlm.common import records
    both = threading.Barrier(2)
    compiled = records.compiled_init

    def compile_together(cls):
        both.wait(30)
        return compiled(cls)

    monkeypatch.setattr(records, "compiled_init", compile_together)
    Place = classes(record, record(kw_only=True))["Place"]
    made = []
    threads = [threading.Thread(target=lambda x=x: made.append(Place(x))) for x in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(place.x for place in made) == [1, 2]
