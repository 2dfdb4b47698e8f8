"""A guard as a web service: `create_app` makes an application of FastAPI, `refuse_unsafe` guards an upload of somebody else's.

What is listed here is public. FastAPI comes with the extra `serve`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from guardkit.schema import InputError

if TYPE_CHECKING:
    from guardkit.serving.app import create_app
    from guardkit.serving.limits import Limits
    from guardkit.serving.uploads import refuse_unsafe

_HOMES = {"create_app": "guardkit.serving.app", "refuse_unsafe": "guardkit.serving.uploads", "Limits": "guardkit.serving.limits"}
_NEEDED = ("fastapi", "starlette", "uvicorn", "python_multipart")

__all__ = ["Limits", "create_app", "refuse_unsafe"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ImportError as error:
        if (error.name or "").split(".")[0] not in _NEEDED:
            raise
        raise InputError('the service needs FastAPI; install it with: pip install "guardkit[serve]"') from error
