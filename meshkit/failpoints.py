"""Named points at which a test breaks this process: exactly there, and nowhere else.

A point costs a look at one attribute while nothing is armed, which is always so outside of tests.
HERMESH_FAILPOINTS arms them, in one of two forms:

- `session.append.after=crash,tool.act.before=stop@3`: in this process, once each, the third time that the
  point is reached where it says `@3`.
- a folder, by its absolute path: a file there named as a point, holding such an action, arms it in every
  process that looks. The first to get there takes the file away (it becomes `<point>.hit.<pid>`) and is the
  only one that is hit.

Actions: `crash` kills the process as kill -9 does, `stop` stops it as SIGSTOP does until somebody sends
SIGCONT, `hang:SECONDS` blocks all of it for so long.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from meshkit.errors import StartupError

P = ParamSpec("P")
T = TypeVar("T")

_ACTION = re.compile(r"(crash|stop|hang:(\d+(?:\.\d+)?))(?:@(\d+))?")


class Point:
    """One place in the code; calling it breaks the process there if a test asked for that."""

    __slots__ = ("name", "reached")

    def __init__(self, name: str) -> None:
        self.name = name
        self.reached = 0

    def __call__(self) -> None:
        """Reaches the point."""
        if _armed.enabled:
            _reach(self)


class _Armed:
    """What is armed in this process."""

    __slots__ = ("actions", "enabled", "folder")

    def __init__(self) -> None:
        self.enabled = False
        self.folder = ""
        self.actions: dict[str, str] = {}


_armed = _Armed()
_points: dict[str, Point] = {}


def point(name: str) -> Point:
    """Declares a point, once for each name, where a module is imported."""
    if name in _points:
        raise ValueError(f"there are two failpoints named {name}")
    made = _points[name] = Point(name)
    return made


def around(
    name: str,
) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Declares `<name>.before` and `<name>.after` around a coroutine function.

    The point after is reached only when the function returns, not when it raises.
    """
    before, after = point(f"{name}.before"), point(f"{name}.after")

    def decorate(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        @functools.wraps(function)
        async def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            before()
            result = await function(*args, **kwargs)
            after()
            return result

        return wrapper

    return decorate


def names() -> list[str]:
    """Returns the points of the modules that are imported."""
    return sorted(_points)


def arm(setting: str) -> None:
    """Arms what HERMESH_FAILPOINTS says; an empty text disarms all.

    Raises:
        StartupError: It is neither a folder that is there nor a list of points.
    """
    _armed.folder, _armed.actions = "", {}
    _armed.enabled = bool(setting)
    for each in _points.values():
        each.reached = 0
    if setting.startswith("/"):
        if not Path(setting).is_dir():
            raise StartupError(f"HERMESH_FAILPOINTS: {setting} is not a folder")
        _armed.folder = setting
        return
    for item in filter(None, setting.split(",")):
        name, _, action = item.partition("=")
        if _ACTION.fullmatch(action) is None:
            raise StartupError(f"HERMESH_FAILPOINTS: {item!r} is not POINT=crash|stop|hang:SECONDS[@N]")
        _armed.actions[name] = action


def _reach(reached: Point) -> None:
    action = _take_folder(reached) if _armed.folder else _armed.actions.get(reached.name)
    found = _ACTION.fullmatch(action) if action else None
    if found is None:
        return
    reached.reached += 1
    if reached.reached < int(found[3] or 1) or not _claim(reached):
        return
    if found[1] == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    elif found[1] == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        time.sleep(float(found[2]))


def _take_folder(reached: Point) -> str:
    try:
        with open(f"{_armed.folder}/{reached.name}") as file:
            return file.read().strip()
    except OSError:
        # Not armed, or another process was first; what this one counted is of an arming that is over.
        reached.reached = 0
        return ""


def _claim(reached: Point) -> bool:
    """Takes the point for this process alone."""
    if not _armed.folder:
        return _armed.actions.pop(reached.name, None) is not None
    path = f"{_armed.folder}/{reached.name}"
    try:
        os.rename(path, f"{path}.hit.{os.getpid()}")
    except OSError:
        return False
    return True
