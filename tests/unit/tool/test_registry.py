import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest

from meshkit.errors import StartupError
from services.tool.app import make_registry
from services.tool.registry import (
    Effect,
    Registry,
    Tool,
    ToolContext,
    load_modules,
    tool,
    tools_in,
)
from services.tool.schemas import ArgumentsError
from services.tool.settings import ToolSettings

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


async def nothing(arguments: Mapping[str, Any], context: ToolContext) -> None:
    return None


def make(name: str = "t", schema: Mapping[str, Any] = SCHEMA, **more: Any) -> Tool:
    return Tool(name=name, description="d", input_schema=schema, function=nothing, **more)


def test_the_careful_effect_is_the_default() -> None:
    assert make().effect is Effect.NON_IDEMPOTENT


def test_the_decorator_declares_and_leaves_the_function_as_it_is() -> None:
    decorated = tool("x", description="d", input_schema=SCHEMA, effect=Effect.PURE, timeout=3)(nothing)
    assert decorated is nothing
    module = ModuleType("m")
    module.nothing = decorated  # type: ignore[attr-defined]
    module.other = 1  # type: ignore[attr-defined]
    (found,) = tools_in(module)
    assert (found.name, found.effect, found.timeout, found.function) == ("x", Effect.PURE, 3, nothing)


@pytest.mark.parametrize(
    "more",
    [
        {"name": ""},
        {"name": "a b"},
        {"name": "a" * 65},
        {"schema": {"type": "string"}},
        {"schema": {}},
        {"schema": {"type": "object", "properties": {"a": {"type": "nope"}}}},
        {"schema": {"type": "object", "x": {1, 2}}},
        {"timeout": 0},
        {"timeout": 3601},
    ],
)
def test_a_wrong_declaration_stops_the_start(more: dict[str, Any]) -> None:
    with pytest.raises(StartupError):
        make(**more)


def test_two_tools_of_one_name_stop_the_start() -> None:
    with pytest.raises(StartupError, match="two tools"):
        Registry([make(), make()])


def test_arguments_are_read_and_checked() -> None:
    assert make().parse('{"a": 1}') == {"a": 1}
    assert make(schema={"type": "object"}).parse("  ") == {}
    with pytest.raises(ArgumentsError, match='"a" is a required property'):
        make().parse("")
    with pytest.raises(ArgumentsError, match='a: "x" is not of type'):
        make().parse('{"a": "x"}')


def test_numbers_of_any_length_reach_the_tool_whole() -> None:
    text = f'{{"a": {2**64}, "b": [{-(10**300)}], "c": 1}}'
    parsed = make(schema={"type": "object"}).parse(text)
    assert parsed == {"a": 2**64, "b": [-(10**300)], "c": 1}
    assert all(isinstance(number, int) for number in (parsed["a"], *parsed["b"], parsed["c"]))
    with pytest.raises(ArgumentsError, match="not valid JSON"):
        make(schema={"type": "object"}).parse(f'{{"a": {"9" * 5000}}}')


def test_a_deeply_nested_argument_under_a_recursive_schema_is_an_error() -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#"}}}
    depth = 900
    with pytest.raises(ArgumentsError):
        make(schema=schema).parse('{"a":' * depth + "1" + "}" * depth)


def test_a_schema_that_points_outside_stops_the_start() -> None:
    with pytest.raises(StartupError, match="must not refer to http"):
        make(schema={"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:1/schema"}}})


def test_a_reference_inside_is_followed() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/n"}},
        "$defs": {"n": {"type": "integer"}},
    }
    assert make(schema=schema).parse('{"a": 1}') == {"a": 1}
    with pytest.raises(ArgumentsError):
        make(schema=schema).parse('{"a": "x"}')


def test_a_broken_reference_stops_the_start() -> None:
    with pytest.raises(StartupError, match="'/\\$defs/none' does not exist"):
        make(schema={"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}})


def test_pages_are_by_name() -> None:
    registry = Registry([make("c"), make("a"), make("b")])
    assert [found.name for found in registry.page("", 2)] == ["a", "b"]
    assert [found.name for found in registry.page("b", 2)] == ["c"]
    assert registry.find("a") is not None
    assert registry.find("d") is None


@pytest.fixture
def own_tools(monkeypatch: pytest.MonkeyPatch) -> str:
    module = ModuleType("own_tools")

    @tool("own", description="d", input_schema=SCHEMA)
    async def own(arguments: Mapping[str, Any], context: ToolContext) -> None:
        return None

    module.own = own  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_tools", module)
    return "own_tools"


def test_the_settings_choose_the_tools(own_tools: str) -> None:
    settings = ToolSettings(tool_modules=f" {own_tools} ,", tool_disabled="fetch_page")
    names = [found.name for found in make_registry(settings).page("", 100)]
    assert names == ["calculator", "current_time", "own"]


def test_a_module_that_is_not_there_is_one_clear_line() -> None:
    with pytest.raises(StartupError, match=r"no_such_module .*HERMESH_TOOL_MODULES"):
        load_modules(["no_such_module"])


def test_a_module_without_tools_is_a_mistake() -> None:
    with pytest.raises(StartupError, match="declares no tool"):
        load_modules(["json"])


def test_a_name_to_disable_must_be_a_tool() -> None:
    with pytest.raises(StartupError, match="fetch_pgae"):
        make_registry(ToolSettings(tool_disabled="fetch_pgae"))


def test_the_built_in_tools_declare_what_the_journal_needs() -> None:
    effects = {found.name: found.effect for found in make_registry(ToolSettings()).page("", 100)}
    assert effects == {
        "calculator": Effect.PURE,
        "current_time": Effect.PURE,
        "fetch_page": Effect.IDEMPOTENT,
    }


def test_the_operator_decides_which_tools_a_person_has_to_approve() -> None:
    found = make_registry(ToolSettings(tool_approval="calculator, -current_time")).page("", 100)
    assert {one.name: one.requires_approval for one in found} == {
        "calculator": True,
        "current_time": False,
        "fetch_page": False,
    }
    for named in ("calculater", "-calculater"):
        with pytest.raises(StartupError, match="HERMESH_TOOL_APPROVAL names what is no tool: calculater"):
            make_registry(ToolSettings(tool_approval=named))


def test_an_approval_that_a_tool_declares_can_be_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = make("careful", requires_approval=True)
    monkeypatch.setattr("services.tool.app.builtin_tools", lambda _: [declared])
    for named, expected in (("", True), ("careful", True), ("-careful", False)):
        [one] = make_registry(ToolSettings(tool_approval=named)).page("", 100)
        assert one.requires_approval is expected
        assert one.parse('{"a": 1}') == {"a": 1}


@pytest.mark.parametrize(
    "more",
    [
        {"effect": Effect.IDEMPOTENT},
        {"reconcile_timeout": 0},
        {"reconcile_timeout": 61},
        {"settle_seconds": -1},
    ],
)
def test_a_hook_that_makes_no_sense_stops_the_start(more: dict[str, Any]) -> None:
    make(reconcile=nothing)
    with pytest.raises(StartupError):
        make(reconcile=nothing, **more)
