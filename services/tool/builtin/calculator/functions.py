"""The calculator's functions and constants."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from services.tool.builtin.calculator.numbers import (
    MAX_FACTORIAL,
    Number,
    add,
    divide,
    normal,
    to_float,
    too_large,
    undefined,
)
from services.tool.registry import ToolError

CONSTANTS: dict[str, float] = {"pi": math.pi, "e": math.e, "tau": math.tau}

# Where sin(pi) would show 1.2e-16: what is left of the rounding of pi, and means 0.
_ROUNDING = 1e-15


@dataclass(frozen=True, slots=True)
class Function:
    """A function: how many arguments it takes, and what it does."""

    least: int
    most: int
    apply: Callable[..., Number]


def _real(name: str, compute: Callable[..., float]) -> Callable[..., Number]:
    def apply(*values: Number) -> Number:
        try:
            return normal(compute(*(to_float(value) for value in values)))
        except OverflowError as error:
            raise too_large() from error
        except (ValueError, ZeroDivisionError) as error:
            raise undefined(f"{name}({', '.join(f'{to_float(value):.6g}' for value in values)})") from error

    return apply


def _circular(name: str, compute: Callable[[float], float]) -> Callable[..., Number]:
    plain = _real(name, compute)

    def apply(value: Number) -> Number:
        result = to_float(plain(value))
        if abs(to_float(value)) > 1e-6 and abs(result) < _ROUNDING * max(1.0, abs(to_float(value))):
            return 0
        if abs(result) > 1 / _ROUNDING:
            raise undefined(f"{name}({to_float(value):.6g})")
        return result

    return apply


def _exact_root(value: int) -> int | None:
    root = math.isqrt(value)
    return root if root * root == value else None


def _sqrt(value: Number) -> Number:
    if value < 0:
        raise undefined("the square root of a negative number")
    if isinstance(value, int | Fraction):
        fraction = Fraction(value)
        above, below = _exact_root(fraction.numerator), _exact_root(fraction.denominator)
        if above is not None and below is not None:
            return normal(Fraction(above, below))
    return normal(math.sqrt(to_float(value)))


def _cbrt(value: Number) -> Number:
    root = math.cbrt(to_float(value))
    whole = round(root)
    if not isinstance(value, float) and Fraction(whole) ** 3 == value:
        return whole
    return normal(root)


def _log(value: Number, base: Number | None = None) -> Number:
    if value <= 0 or (base is not None and (base <= 0 or base == 1)):
        raise undefined("this logarithm")
    if base is None:
        return normal(_ln(value))
    result = _ln(value) / _ln(base)
    # log(1000, 10) should be 3, and is checked rather than believed.
    whole = round(result)
    if abs(whole) > 4096 or isinstance(value, float) or isinstance(base, float):
        return normal(result)
    affordable = Fraction(base).denominator.bit_length() * abs(whole) < 100_000
    return whole if affordable and Fraction(base) ** whole == value else normal(result)


def _ln(value: Number) -> float:
    if isinstance(value, Fraction):
        return math.log(value.numerator) - math.log(value.denominator)
    # An int of any size has a logarithm, although it may not fit in a float.
    return math.log(value)


def _integer(name: str, value: Number) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int):
        raise ToolError(f"{name} needs whole numbers")
    return value


def _bounded(name: str, value: Number) -> int:
    number = _integer(name, value)
    if number < 0:
        raise undefined(f"{name} of a negative number")
    if number > MAX_FACTORIAL:
        raise ToolError(f"{name} is computed up to {MAX_FACTORIAL} only")
    return number


def _round(value: Number, digits: Number = 0) -> Number:
    places = _integer("round", digits)
    if abs(places) > 100:
        raise ToolError("round takes -100 to 100 digits")
    if isinstance(value, float):
        return normal(round(value, places) if places else round(value))
    # Half goes away from zero, as in school, and not to the even neighbour.
    scale = Fraction(10) ** places
    scaled = abs(Fraction(value)) * scale
    whole = math.floor(scaled + Fraction(1, 2))
    return normal((-whole if value < 0 else whole) / scale)


def _sum(*values: Number) -> Number:
    total: Number = 0
    for value in values:
        total = add(total, value)
    return total


def _of_integers(name: str, compute: Callable[..., int]) -> Callable[..., Number]:
    def apply(*values: Number) -> Number:
        return normal(compute(*(_integer(name, value) for value in values)))

    return apply


def _lcm(*values: Number) -> Number:
    result = 1
    for value in values:
        result = int(normal(math.lcm(result, _integer("lcm", value))))
    return result


_MANY = 100

FUNCTIONS: dict[str, Function] = {
    "sqrt": Function(1, 1, _sqrt),
    "cbrt": Function(1, 1, _cbrt),
    "exp": Function(1, 1, _real("exp", math.exp)),
    "ln": Function(1, 1, _log),
    "log": Function(1, 2, _log),
    "log10": Function(1, 1, lambda value: _log(value, 10)),
    "log2": Function(1, 1, lambda value: _log(value, 2)),
    "sin": Function(1, 1, _circular("sin", math.sin)),
    "cos": Function(1, 1, _circular("cos", math.cos)),
    "tan": Function(1, 1, _circular("tan", math.tan)),
    "asin": Function(1, 1, _real("asin", math.asin)),
    "acos": Function(1, 1, _real("acos", math.acos)),
    "atan": Function(1, 1, _real("atan", math.atan)),
    "atan2": Function(2, 2, _real("atan2", math.atan2)),
    "sinh": Function(1, 1, _real("sinh", math.sinh)),
    "cosh": Function(1, 1, _real("cosh", math.cosh)),
    "tanh": Function(1, 1, _real("tanh", math.tanh)),
    "degrees": Function(1, 1, _real("degrees", math.degrees)),
    "radians": Function(1, 1, _real("radians", math.radians)),
    "hypot": Function(2, _MANY, _real("hypot", math.hypot)),
    "abs": Function(1, 1, lambda value: normal(abs(value))),
    "round": Function(1, 2, _round),
    "floor": Function(1, 1, lambda value: normal(math.floor(value))),
    "ceil": Function(1, 1, lambda value: normal(math.ceil(value))),
    "trunc": Function(1, 1, lambda value: normal(math.trunc(value))),
    "min": Function(1, _MANY, min),
    "max": Function(1, _MANY, max),
    "sum": Function(1, _MANY, _sum),
    "mean": Function(1, _MANY, lambda *values: divide(_sum(*values), len(values))),
    "gcd": Function(1, _MANY, _of_integers("gcd", math.gcd)),
    "lcm": Function(1, _MANY, _lcm),
    "factorial": Function(1, 1, lambda n: normal(math.factorial(_bounded("factorial", n)))),
    "comb": Function(2, 2, lambda n, k: normal(math.comb(_bounded("comb", n), _bounded("comb", k)))),
    "perm": Function(2, 2, lambda n, k: normal(math.perm(_bounded("perm", n), _bounded("perm", k)))),
}
