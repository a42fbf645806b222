"""Filters of a search: what they say of attributes, and what is refused."""

import pytest

from chatlm.common.errors import RequestError
from chatlm.front.annexes.knowledge.filters import DEEPEST_FILTER, MOST_COMPARISONS, read_filter


def compare(kind, value, key="year"):
    return {"type": kind, "key": key, "value": value}


@pytest.mark.parametrize("wanted, attributes, fits", [
    (compare("eq", 2020), {"year": 2020}, True), (compare("eq", 2020), {"year": 2020.0}, True),
    (compare("eq", 2020), {"year": "2020"}, False), (compare("eq", 2020), {}, False),
    (compare("eq", 1), {"year": True}, False), (compare("eq", True), {"year": 1}, False),
    (compare("eq", True), {"year": True}, True), (compare("eq", "a"), {"year": "A"}, False),
    (compare("ne", 2020), {"year": 2021}, True), (compare("ne", 2020), {}, True),
    (compare("ne", 2020), {"year": 2020}, False),
    (compare("gt", 2020), {"year": 2020}, False), (compare("gte", 2020), {"year": 2020}, True),
    (compare("lt", 2020), {"year": 2019.5}, True), (compare("lte", 2020), {"year": 2021}, False),
    (compare("gt", 2020), {"year": "2021"}, False), (compare("gt", 0), {"year": True}, False),
    (compare("gt", "2020-01"), {"year": "2020-02"}, True), (compare("gt", 1), {}, False),
    (compare("lt", 1), {}, False),
    (compare("in", ["a", 2]), {"year": 2}, True), (compare("in", ["a", 2]), {"year": "2"}, False),
    (compare("in", [1]), {"year": True}, False), (compare("in", ["a"]), {}, False),
    (compare("nin", ["a"]), {}, True), (compare("nin", ["a"]), {"year": "a"}, False),
    ({"type": "and", "filters": [compare("gt", 1), compare("lt", 3)]}, {"year": 2}, True),
    ({"type": "and", "filters": [compare("gt", 1), compare("lt", 3)]}, {"year": 3}, False),
    ({"type": "or", "filters": [compare("eq", 1), compare("eq", "x", "lang")]}, {"lang": "x"}, True),
    ({"type": "or", "filters": [compare("eq", 1), {"type": "and", "filters": [compare("eq", 2)]}]},
     {"year": 3}, False),
])
def test_what_a_filter_says(wanted, attributes, fits):
    assert read_filter(wanted)(attributes) is fits


def nested(depth):
    return compare("eq", 1) if depth == 1 else {"type": "and", "filters": [nested(depth - 1)]}


@pytest.mark.parametrize("wanted, param, says", [
    ("x", "filters", "an object with a type"), (None, "filters", "an object with a type"),
    ({}, "filters.type", "one of eq, ne"), (compare("like", "a"), "filters.type", "one of eq, ne"),
    (compare(["eq"], "a"), "filters.type", "one of eq, ne"),
    (compare("eq", [1]), "filters.value", "a text, a number or a boolean"),
    (compare("eq", None), "filters.value", "a text, a number or a boolean"),
    (compare("gt", True), "filters.value", "no order of booleans"),
    (compare("in", 1), "filters.value", "a list"), (compare("in", []), "filters.value", "at least one"),
    (compare("in", [[1]]), "filters.value", "a list of texts"),
    (compare("eq", 1, 5), "filters.key", "the name of an attribute"),
    (compare("eq", 1, ""), "filters.key", "the name of an attribute"),
    (compare("eq", 1) | {"filters": []}, "filters.filters", "allowed are type, key, value"),
    ({"type": "and"}, "filters.filters", "a list of filters"),
    ({"type": "or", "filters": []}, "filters.filters", "at least one"),
    ({"type": "or", "filters": [compare("eq", 1), 5]}, "filters.filters[1]", "an object with a type"),
    ({"type": "or", "filters": [compare("eq", 1)], "key": "a"}, "filters.key", "allowed are type, filters"),
    (nested(DEEPEST_FILTER + 1), "", f"at most {DEEPEST_FILTER} deep"),
    ({"type": "or", "filters": [compare("eq", 1)] * (MOST_COMPARISONS + 1)}, "", f"at most {MOST_COMPARISONS} comparisons"),
])
def test_what_is_no_filter(wanted, param, says):
    with pytest.raises(RequestError) as refused:
        read_filter(wanted)
    assert says in str(refused.value) and refused.value.status == 400
    assert not param or refused.value.param == param


def test_the_largest_filters_are_read():
    assert read_filter(nested(DEEPEST_FILTER))({"year": 1})
    assert read_filter({"type": "or", "filters": [compare("eq", 1)] * MOST_COMPARISONS})({"year": 1})
