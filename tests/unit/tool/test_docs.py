import re
from pathlib import Path

import pytest

from services.tool.registry import Effect, load_modules

PAGE = Path(__file__).parents[3] / "docs" / "tools.md"


def test_the_example_of_an_own_tool_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n# shop_tools\.py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "shop_tools.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    (tool,) = load_modules(["shop_tools"])
    assert (tool.name, tool.effect, tool.requires_approval) == ("refund_order", Effect.NON_IDEMPOTENT, True)
    assert tool.parse('{"order": "7"}') == {"order": "7"}
