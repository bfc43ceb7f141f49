"""The calculator's numbers: exact as long as they can be, and never larger than a bound.

A number is an int, a Fraction (decimals are exact: 0.1 + 0.2 is 0.3) or, once a function such as sin has been
at work, a float. Every operation is bounded before it is done: `9**9**9` is refused, not computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from services.tool.registry import ToolError

Number = int | Fraction | float

# About 3,900 digits: below what Python refuses to print, and multiplied in microseconds.
MAX_BITS = 13_000
MAX_FACTORIAL = 1_000
# Digits after which a fraction without an end (1/3), or a very long one, is rounded.
_DIGITS = 20
_FLOAT_DIGITS = 15


def too_large() -> ToolError:
    """Returns the error for a number over the bound."""
    return ToolError("the result is too large: at most about 3,900 digits are computed")


def undefined(what: str) -> ToolError:
    """Returns the error for an operation without a value."""
    return ToolError(f"{what} is not defined")


def normal(value: Number) -> Number:
    """Returns a number in its simplest type, after checking its size.

    Raises:
        ToolError: It is too large, or not a number.
    """
    if isinstance(value, float):
        if math.isnan(value):
            raise undefined("the result")
        if math.isinf(value):
            raise too_large()
        return value
    if isinstance(value, Fraction):
        if value.denominator == 1:
            return normal(value.numerator)
        if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
            raise too_large()
        return value
    if value.bit_length() > MAX_BITS:
        raise too_large()
    return int(value)


def to_float(value: Number) -> float:
    """Returns a number as a float.

    Raises:
        ToolError: It does not fit.
    """
    try:
        return float(value)
    except OverflowError as error:
        raise too_large() from error


def _pair(left: Number, right: Number) -> tuple[Number, Number]:
    if isinstance(left, float) or isinstance(right, float):
        return to_float(left), to_float(right)
    return left, right


def _computed(operation: Callable[[], Number], name: str) -> Number:
    try:
        return normal(operation())
    except OverflowError as error:
        raise too_large() from error
    except ZeroDivisionError as error:
        raise ToolError("division by zero") from error
    except ValueError as error:
        raise undefined(name) from error


def add(left: Number, right: Number) -> Number:
    """Returns left + right."""
    a, b = _pair(left, right)
    return normal(a + b)


def subtract(left: Number, right: Number) -> Number:
    """Returns left - right."""
    a, b = _pair(left, right)
    return normal(a - b)


def multiply(left: Number, right: Number) -> Number:
    """Returns left * right."""
    a, b = _pair(left, right)
    return normal(a * b)


def divide(left: Number, right: Number) -> Number:
    """Returns left / right, exactly where both are exact."""
    a, b = _pair(left, right)
    if isinstance(a, float) or isinstance(b, float):
        return _computed(lambda: a / b, "the division")
    return _computed(lambda: Fraction(a) / Fraction(b), "the division")


def floor_divide(left: Number, right: Number) -> Number:
    """Returns the floor of left / right."""
    a, b = _pair(left, right)
    return _computed(lambda: a // b, "the division")


def modulo(left: Number, right: Number) -> Number:
    """Returns left - right * floor(left / right); it has the sign of `right`."""
    a, b = _pair(left, right)
    return _computed(lambda: a % b, "the remainder")


def power(base: Number, exponent: Number) -> Number:
    """Returns base ** exponent; 0 ** 0 is 1."""
    if isinstance(exponent, int) and not isinstance(base, float):
        return _exact_power(base, exponent)
    a, b = to_float(base), to_float(exponent)
    if a < 0 and not b.is_integer():
        raise undefined("a root of a negative number")
    return _computed(lambda: float(a**b), "the power")


def _exact_power(base: int | Fraction, exponent: int) -> Number:
    if base == 0 and exponent < 0:
        raise ToolError("division by zero")
    if base in (0, 1):
        return 1 if exponent == 0 else int(base)
    if base == -1:
        return -1 if exponent % 2 else 1
    fraction = Fraction(base)
    bits = max(fraction.numerator.bit_length(), fraction.denominator.bit_length())
    # 2 ** (bits - 1) <= size of the base, so this is never more than twice off.
    if (bits - 1) * abs(exponent) > MAX_BITS:
        raise too_large()
    return normal(fraction**exponent)


def format_number(value: Number) -> str:
    """Returns a number as people write it.

    Ints have all their digits; decimals that end within 20 digits are exact, others are rounded to 20
    significant digits; floats have 15.
    """
    value = normal(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Fraction):
        return _format_fraction(value)
    if value == 0:
        return "0"
    if value.is_integer() and abs(value) < 10**_FLOAT_DIGITS:
        return str(int(value))
    return f"{value:.{_FLOAT_DIGITS}g}"


def _format_fraction(value: Fraction) -> str:
    magnitude = abs(value)
    # The exponent of the first digit: 0 for 1 to 9.99.
    exponent = len(str(magnitude.numerator)) - len(str(magnitude.denominator))
    if magnitude < _power_of_ten(exponent):
        exponent -= 1
    places = _DIGITS - 1 - exponent
    scaled = round(magnitude * _power_of_ten(places))
    digits = str(scaled)
    exponent += len(digits) - _DIGITS
    sign = "-" if value < 0 else ""
    if not -7 <= exponent < _DIGITS:
        mantissa = digits.rstrip("0")
        point = f".{mantissa[1:]}" if len(mantissa) > 1 else ""
        return f"{sign}{mantissa[0]}{point}e{exponent:+03d}"
    if exponent < 0:
        whole, rest = "0", "0" * (-exponent - 1) + digits
    else:
        whole, rest = digits[: exponent + 1], digits[exponent + 1 :]
    rest = rest.rstrip("0")
    return f"{sign}{whole}.{rest}" if rest else f"{sign}{whole}"


def _power_of_ten(exponent: int) -> Fraction:
    return Fraction(10) ** exponent
