"""The calculator's own small parser: it computes while it reads, and knows nothing but arithmetic.

Precedence is Python's: `**` binds tighter than a sign on its left and to the right of itself, then * / // %,
then + and -.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from services.tool.builtin.calculator import numbers
from services.tool.builtin.calculator.functions import CONSTANTS, FUNCTIONS
from services.tool.builtin.calculator.numbers import Number, normal
from services.tool.registry import ToolError

MAX_LENGTH = 1_000
MAX_DEPTH = 60
_MAX_EXPONENT = 1_000

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>(?:\d+(?:_\d+)*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)
      | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
      | (?P<sign>\*\*|//|[-+*/%^(),])
    )""",
    re.VERBOSE | re.ASCII,
)
# What models and people write for the same things.
_SYNONYMS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "π": " pi ", "τ": " tau "})

_SUMS: dict[str, Callable[[Number, Number], Number]] = {"+": numbers.add, "-": numbers.subtract}
_PRODUCTS: dict[str, Callable[[Number, Number], Number]] = {
    "*": numbers.multiply,
    "/": numbers.divide,
    "//": numbers.floor_divide,
    "%": numbers.modulo,
}


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    position: int


def evaluate(expression: str) -> Number:
    """Computes an expression.

    Args:
        expression: At most 1,000 characters.

    Raises:
        ToolError: It is not an expression, or has no value within the bounds.
    """
    if len(expression) > MAX_LENGTH:
        raise ToolError(f"the expression is longer than {MAX_LENGTH} characters")
    parser = _Parser(_tokens(expression.translate(_SYNONYMS)))
    value = parser.sum()
    parser.finish()
    return value


def _tokens(text: str) -> list[_Token]:
    tokens = []
    position, end = 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            rest = text[position:].lstrip()
            raise ToolError(f"{rest[:1]!r} is not understood; only arithmetic is")
        tokens.append(_Token(match.lastgroup, match.group(match.lastgroup), position))
        position = match.end()
    return tokens


class _Parser:
    """Recursive descent over the tokens, with a bound on its depth."""

    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens = tokens
        self._next = 0
        self._depth = 0

    def _peek(self) -> str:
        return self._tokens[self._next].text if self._next < len(self._tokens) else ""

    def _take(self, text: str) -> bool:
        if self._peek() != text:
            return False
        self._next += 1
        return True

    def _expect(self, text: str) -> None:
        if not self._take(text):
            found = self._peek()
            raise ToolError(f"{text!r} is missing" + (f" before {found!r}" if found else " at the end"))

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ToolError("the expression is nested too deeply")

    def finish(self) -> None:
        if self._next < len(self._tokens):
            raise ToolError(f"{self._peek()!r} is not expected here")

    def sum(self) -> Number:
        value = self._product()
        while (operation := _SUMS.get(self._peek())) is not None:
            self._next += 1
            value = operation(value, self._product())
        return value

    def _product(self) -> Number:
        value = self._signed()
        while (operation := _PRODUCTS.get(self._peek())) is not None:
            self._next += 1
            value = operation(value, self._signed())
        return value

    def _signed(self) -> Number:
        negative = False
        while self._peek() in ("+", "-"):
            negative ^= self._peek() == "-"
            self._next += 1
        value = self._power()
        return numbers.subtract(0, value) if negative else value

    def _power(self) -> Number:
        base = self._atom()
        if not (self._take("**") or self._take("^")):
            return base
        self._deeper()
        value = numbers.power(base, self._signed())
        self._depth -= 1
        return value

    def _atom(self) -> Number:
        if self._next >= len(self._tokens):
            raise ToolError("the expression ends too early")
        token = self._tokens[self._next]
        self._next += 1
        if token.kind == "number":
            return _number(token.text)
        if token.kind == "name":
            return self._named(token.text)
        if token.text != "(":
            raise ToolError(f"{token.text!r} is not expected here")
        self._deeper()
        value = self.sum()
        self._depth -= 1
        self._expect(")")
        return value

    def _named(self, name: str) -> Number:
        lower = name.lower()
        if self._peek() != "(":
            if lower not in CONSTANTS:
                raise ToolError(
                    f"{name!r} is not known" + ("; it needs arguments" if lower in FUNCTIONS else "")
                )
            return CONSTANTS[lower]
        function = FUNCTIONS.get(lower)
        if function is None:
            raise ToolError(f"there is no function {name!r}")
        values = self._arguments()
        if not function.least <= len(values) <= function.most:
            wanted = str(function.least) if function.least == function.most else f"at least {function.least}"
            if function.most <= 2 and function.least != function.most:
                wanted = f"{function.least} or {function.most}"
            raise ToolError(f"{name} takes {wanted} argument(s), not {len(values)}")
        return function.apply(*values)

    def _arguments(self) -> list[Number]:
        self._expect("(")
        self._deeper()
        values: list[Number] = []
        if not self._take(")"):
            values.append(self.sum())
            while self._take(","):
                values.append(self.sum())
            self._expect(")")
        self._depth -= 1
        return values


def _number(text: str) -> Number:
    mantissa, _, exponent = text.lower().replace("_", "").partition("e")
    power = int(exponent) if exponent else 0
    if abs(power) > _MAX_EXPONENT:
        raise ToolError(f"exponents go up to {_MAX_EXPONENT}")
    return normal(
        Fraction(mantissa if not mantissa.endswith(".") else mantissa + "0") * Fraction(10) ** power
    )
