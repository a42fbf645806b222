"""Regular expressions for the decimal numbers between two bounds.

A library that reads bounds as floats of 64 bits is wrong beyond 2**53, where not every integer is such a
float, and below 1e-8. Here bounds are exact. Numbers are written without exponents, as `-12.5` or `0`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from decimal import Context, Decimal, localcontext
from typing import NamedTuple

from chatlm.common.errors import shown
from chatlm.common.jsontext import is_number


EXACT_FLOATS = Decimal(2**53)  # floats of 64 bits are all integers up to here
ALL_NUMBERS = 10**305  # no number with 16 digits before its exponent, which is at most 289, is larger
WHOLE_DIGITS = 16      # before the point, on a side without a bound
FAR_DIGITS = 40        # bounds with more are reached only where there is nothing nearer to 0
FRACTION_DIGITS = 8    # where the bounds leave room
FINE_DIGITS = 16       # where the bounds have so many
MOST_DIGITS = 64       # before or after the point: of regular expressions in each other, one a digit


class Bounds(NamedTuple):
    """The smallest and largest number that a schema allows; None where it does not say."""
    low: Decimal | None
    high: Decimal | None

    def allow_all(self) -> bool:
        """Do they exclude nothing that can be written in 16 digits with an exponent?"""
        return ((self.low is None or self.low <= -ALL_NUMBERS)
                and (self.high is None or self.high >= ALL_NUMBERS))

    def nearer(self) -> tuple[int | float, int | float]:
        """These bounds, at most 2**53 from 0, as numbers of JSON; ValueError if that excludes all numbers."""
        low = -EXACT_FLOATS if self.low is None else self.low
        high = EXACT_FLOATS if self.high is None else self.high
        if low > EXACT_FLOATS or high < -EXACT_FLOATS:
            raise ValueError("multipleOf is not supported where all numbers are beyond 2**53")
        return as_number(max(low, -EXACT_FLOATS)), as_number(min(high, EXACT_FLOATS))

    def allow(self, number: int | float) -> bool:
        value = exactly(number)
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


def as_number(value: Decimal) -> int | float:
    return int(value) if value == value.to_integral_value() else float(value)


def exactly(number: int | float, direction: int = 0) -> Decimal:
    """The number that a JSON text says: 0.1 is a tenth. Beyond 2**53 a float's text is not its exact value;
    of the two this is the upper (direction 1) or the lower one (-1)."""
    said = Decimal(repr(number))
    if not direction or isinstance(number, int) or abs(number) < 2**53:
        return said
    return (max if direction > 0 else min)(said, Decimal(number))


def inside(bound: int | float, direction: int) -> Decimal:
    """The next number above (direction 1) or below (-1) a bound that a reader of JSON tells apart from it."""
    try:
        return Decimal(math.nextafter(float(bound), direction * math.inf))
    except OverflowError:
        return exactly(bound) + direction


def reached(bound: int | float, direction: int) -> Decimal:
    """A bound that numbers may reach, from above (direction 1) or below (-1). An integer that is no float of
    64 bits may be read as one outside the bound: it is replaced by the next float inside."""
    exact = exactly(bound, direction)
    try:
        read = Decimal(float(bound))
    except OverflowError:
        return exact
    is_outside = (exact - read) * direction > 0
    return inside(bound, direction) if is_outside and exact == exact.to_integral_value() else exact


def bounds_of(schemas: Iterable[Mapping], whole: bool) -> Bounds:
    """The bounds that all of these schemas set together, for integers only if `whole`. ValueError for what is
    no bound."""
    lows = []
    highs = []
    for schema in schemas:
        lows += limits_of(schema, "minimum", "exclusiveMinimum", 1, whole)
        highs += limits_of(schema, "maximum", "exclusiveMaximum", -1, whole)
    return Bounds(max(lows, default=None), min(highs, default=None))


def limits_of(schema: Mapping, reach: str, exclude: str, direction: int, whole: bool) -> Iterator[Decimal]:
    """What one schema says with its keywords for a bound that is allowed and for one that is not. In drafts
    before 6 the second is true or false, about the first."""
    allowed = number_of(schema, reach)
    excluded = schema.get(exclude)
    if excluded is True:
        allowed, excluded = None, allowed
    elif excluded is not False:
        excluded = number_of(schema, exclude)
    if allowed is not None:
        yield rounded(exactly(allowed, direction), direction) if whole else reached(allowed, direction)
    if excluded is not None and excluded is not False:
        yield (rounded(exactly(excluded, direction), -direction) + direction if whole
               else inside(excluded, direction))


def multiples_of(schemas: Iterable[Mapping]) -> list[int | float]:
    """What all numbers must be multiples of."""
    multiples = [value for schema in schemas if (value := number_of(schema, "multipleOf")) is not None]
    for value in multiples:
        if value <= 0:
            raise ValueError(f"multipleOf must be above 0, not {shown(value)}")
    return multiples


def is_multiple(number: int | float, of: int | float) -> bool:
    one = exactly(number)
    other = exactly(of)
    places = max(decimals_of(one), decimals_of(other))
    with localcontext(Context(prec=MOST_PRECISION)):
        return int(one.scaleb(places)) % int(other.scaleb(places)) == 0


def decimal_places(multiple: int | float) -> int | None:
    """How many digits after the point the multiples of 1, 0.1, 0.01, ... have; None for other multiples."""
    value = exactly(multiple)
    places = decimals_of(value)
    return places if value == Decimal(1).scaleb(-places) else None


def number_of(schema: Mapping, name: str):
    if (value := schema.get(name)) is not None and not is_number(value):
        raise ValueError(f"{name} must be a finite number, not {shown(value)}")
    return value


def rounded(number: Decimal, direction: int) -> Decimal:
    """The next integer at or above (direction 1) or at or below (-1) this number."""
    return Decimal(math.ceil(number) if direction > 0 else math.floor(number))


def decimals_of(number: Decimal) -> int:
    """How many digits a number has after its point."""
    with localcontext(Context(prec=MOST_PRECISION)):
        exponent = number.normalize().as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0


MOST_PRECISION = 6000  # digits: more than any float of 64 bits, and any integer that Python reads, has


def number_pattern(bounds: Bounds, digits: int | None = None) -> str:
    """A regular expression for the numbers within bounds, "" if there are none: with at most `digits` digits
    after the point, or with as many as the bounds need. Before it they have at most WHOLE_DIGITS, or one more
    than the bounds. ValueError where all numbers are too long."""
    low, high = bounds
    if low is not None and high is not None and low > high:
        return ""
    for places in [digits] if digits is not None else fraction_digits(bounds):
        edge = 10**(whole_digits(bounds) + places) - 1
        with localcontext(Context(prec=MOST_PRECISION)):
            first = -edge if low is None else max(-edge, math.ceil(low.scaleb(places)))
            last = edge if high is None else min(edge, math.floor(high.scaleb(places)))
        if first <= last:
            return signed_pattern(first, last, places)
    if digits is None:
        raise ValueError(f"all numbers within its bounds have more than {MOST_DIGITS} digits")
    return ""


def whole_digits(bounds: Bounds) -> int:
    """How many digits numbers within the bounds have before the point."""
    low, high = bounds
    lengths = [WHOLE_DIGITS]
    if low is not None and (low > 0 or low.adjusted() < FAR_DIGITS):
        lengths.append(low.adjusted() + 2)
    if high is not None and (high < 0 or high.adjusted() < FAR_DIGITS):
        lengths.append(high.adjusted() + 2)
    return min(MOST_DIGITS, max(lengths))


def signed_pattern(first: int, last: int, places: int) -> str:
    """Numbers from `first` to `last`, which count units of the last of so many digits after the point."""
    parts = []
    if last >= 0:
        parts.append(positive_pattern(max(first, 0), last, places))
    if first < 0:
        parts.append("-" + positive_pattern(max(1, -last), -first, places))
    return "|".join(parts)


def fraction_digits(bounds: Bounds) -> list[int]:
    """How many digits after the point to try, the fewest first."""
    known = [bound for bound in bounds if bound is not None]
    exact = max(map(decimals_of, known), default=0)
    size = max(map(abs, known)) if len(known) == len(bounds) else Decimal(1)
    few = FRACTION_DIGITS if size >= 1 or not size else FRACTION_DIGITS - size.adjusted()
    few = max(few, exact if exact <= FINE_DIGITS else FRACTION_DIGITS)
    counts = few, max(few, FINE_DIGITS), max(few, exact)
    return [*dict.fromkeys(min(count, MOST_DIGITS) for count in counts)]


def positive_pattern(first: int, last: int, places: int) -> str:
    """The same for numbers of at least 0."""
    (first, before), (last, after) = divmod(first, 10**places), divmod(last, 10**places)
    if not places:
        return f"(?:{whole_pattern(first, last)})"
    before = f"{before:0{places}}"
    after = f"{after:0{places}}"
    anything = rf"(?:\.[0-9]{{1,{places}}})?"
    if first == last:
        return f"(?:{first}{fraction_between(before, after, places)})"
    parts = []
    if before.strip("0"):
        parts.append(rf"{first}\.{at_least(before, places)}")
        first += 1
    if after.strip("9"):
        parts.append(f"{last}{fraction_to(after, places)}")
        last -= 1
    if first <= last:
        parts.append(f"(?:{whole_pattern(first, last)}){anything}")
    return f"(?:{'|'.join(parts)})"


def fraction_between(before: str, after: str, places: int) -> str:
    """The point and the digits after it, from `before` to `after`."""
    if not before.strip("0"):
        return fraction_to(after, places)
    return rf"\.{between(before, after, places)}"


def fraction_to(after: str, places: int) -> str:
    """Nothing, or the point and the digits after it, up to `after`."""
    if not after.strip("0"):
        return rf"(?:\.0{{1,{places}}})?"
    return rf"(?:\.{at_most(after, places).removesuffix('?')})?"


def any_digits(places: int) -> str:
    return f"[0-9]{{0,{places}}}"


def one_of(first: int, last: int) -> str:
    """A digit of these."""
    return f"{first}" if first == last else f"[{first}-{last}]"


def at_least(digits: str, places: int) -> str:
    """Digits after a point that say as much as these or more."""
    if not digits.strip("0"):
        return any_digits(places)
    digit = int(digits[0])
    rest = f"{digits[0]}{at_least(digits[1:], places)}"
    return rest if digit == 9 else f"(?:{one_of(digit + 1, 9)}{any_digits(places)}|{rest})"


def at_most(digits: str, places: int) -> str:
    """Digits after a point, or none, that say as much as these or less."""
    if not digits.strip("0"):
        return f"0{{0,{places}}}"
    digit = int(digits[0])
    rest = f"{digits[0]}{at_most(digits[1:], places)}"
    return f"(?:{rest})?" if digit == 0 else f"(?:{one_of(0, digit - 1)}{any_digits(places)}|{rest})?"


def between(before: str, after: str, places: int) -> str:
    """Digits after a point that say at least `before` (which is not 0) and at most `after`."""
    if not before.strip("0"):
        return at_most(after, places)
    low = int(before[0])
    high = int(after[0])
    if low == high:
        return f"{low}{between(before[1:], after[1:], places)}"
    parts = [f"{low}{at_least(before[1:], places)}", f"{high}{at_most(after[1:], places)}"]
    if low + 1 < high:
        parts.append(f"{one_of(low + 1, high - 1)}{any_digits(places)}")
    return f"(?:{'|'.join(parts)})"


def whole_pattern(first: int, last: int) -> str:
    """Integers from `first`, at least 0, to `last`, without zeros before them."""
    shortest = len(str(first))
    longest = len(str(last))
    if shortest == longest:
        return same_length(str(first), str(last))
    parts = [same_length(str(first), "9" * shortest), same_length("1" + "0" * (longest - 1), str(last))]
    if longest - shortest > 1:
        parts.append(f"[1-9][0-9]{{{shortest},{longest - 2}}}")
    return "|".join(parts)


def same_length(first: str, last: str) -> str:
    """Numbers between two of the same length, and as long."""
    if not first:
        return ""
    low = int(first[0])
    high = int(last[0])
    rest = len(first) - 1
    some = f"[0-9]{{{rest}}}" if rest else ""
    if not first[1:].strip("0") and not last[1:].strip("9"):
        return one_of(low, high) + some
    if low == high:
        return f"{low}{same_length(first[1:], last[1:])}"
    parts = [f"{low}{same_length(first[1:], '9' * rest)}", f"{high}{same_length('0' * rest, last[1:])}"]
    if low + 1 < high:
        parts.append(one_of(low + 1, high - 1) + some)
    return f"(?:{'|'.join(parts)})"
