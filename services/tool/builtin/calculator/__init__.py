"""The tool `calculator`: arithmetic that a model should not do in its head."""

from services.tool.builtin.calculator.tool import calculator

__all__ = ["calculator"]
