"""Four commands bear the name of a public function. Whoever imports the command's module finds the function's name taken by it."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Command(ModuleType):
    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(f"guardkit.api.{name}"), name)(*arguments, **settings)


def callable_as_function(name: str) -> None:
    """Lets `guardkit.embed(...)` work after `import guardkit.embed` too, which puts the module in the function's place.

    Args:
        name: of the command's module.
    """
    sys.modules[name].__class__ = _Command
