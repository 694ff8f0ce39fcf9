"""Reversible changes to one instance: attributes set and put back, and a method that sees another function by a name.

Nothing here touches a class or a module, so a second model of the same class stays as it is.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

_ABSENT = object()


class Patches:
    """Instance attributes with the values they had before, and hooks, in order."""

    def __init__(self) -> None:
        self._changes: list[tuple[Any, str, Any, Any]] = []
        self._hooks: list[tuple[torch.nn.Module, Callable[..., Any]]] = []
        self._handles: list[Any] = []
        self.active = True

    def refuse(self, module: torch.nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs)` before every forward."""
        self._hooks.append((module, hook))
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def set(self, target: Any, name: str, value: Any) -> None:
        """`target.name = value` in the instance itself, whatever its class says of setting attributes."""
        before = target.__dict__.get(name, _ABSENT)
        target.__dict__[name] = value
        self._changes.append((target, name, value, before))

    def undo(self) -> None:
        if self.active:
            for target, name, _, before in reversed(self._changes):
                if before is _ABSENT:
                    target.__dict__.pop(name, None)
                else:
                    target.__dict__[name] = before
            for handle in self._handles:
                handle.remove()
        self.active = False

    def redo(self) -> None:
        if not self.active:
            for target, name, value, _ in self._changes:
                target.__dict__[name] = value
            self._handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m, hook in self._hooks]
        self.active = True


def with_names(function: Callable[..., Any], **names: Any) -> types.FunctionType:
    """The same code, in which global `names` mean something else. The function itself is not changed.

    The copy of the globals has no __name__: torch.compile then reads them where they are, not in the module of that
    name.
    """
    assert isinstance(function, types.FunctionType), function
    scope = {**function.__globals__, **names}
    scope.pop("__name__", None)
    made = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    made.__doc__, made.__module__ = function.__doc__, function.__module__
    return made


def reads(method: Any, name: str) -> bool:
    """Whether a function's code looks `name` up among its globals."""
    code = getattr(method, "__code__", None)
    return code is not None and name in code.co_names and name in getattr(method, "__globals__", {})
