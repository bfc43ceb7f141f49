"""The calculator as a tool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.tool.builtin.calculator.numbers import format_number
from services.tool.builtin.calculator.parser import MAX_LENGTH, evaluate
from services.tool.registry import Effect, ToolContext, tool


@tool(
    "calculator",
    description=(
        "Evaluates an arithmetic expression exactly. Operators: + - * / // % ** (or ^) and parentheses. "
        "Functions: sqrt, cbrt, exp, ln, log(x, base), log10, log2, sin, cos, tan, asin, acos, atan, atan2, "
        "sinh, cosh, tanh, degrees, radians, abs, round(x, digits), floor, ceil, trunc, min, max, sum, "
        "mean, hypot, gcd, lcm, factorial, comb, perm. Constants: pi, e, tau. Angles are in radians."
    ),
    input_schema={
        "type": "object",
        "properties": {
            "expression": {
                "type": "string",
                "description": "For example (1 + 2) * 3 / 4 or sqrt(2) * pi.",
                "minLength": 1,
                "maxLength": MAX_LENGTH,
            }
        },
        "required": ["expression"],
        "additionalProperties": False,
    },
    effect=Effect.PURE,
    timeout=2.0,
)
async def calculator(arguments: Mapping[str, Any], context: ToolContext) -> str:
    """Runs the tool. All sizes are bounded, so it ends within milliseconds and needs no thread."""
    return format_number(evaluate(str(arguments["expression"])))
