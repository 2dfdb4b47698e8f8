"""guardkit: lightweight image guards on frozen CLIP and SigLIP embeddings, trained with counterfactual pairs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guardkit.classifier import GuardClassifier
    from guardkit.policy import Category, Policy
    from guardkit.schema import Decision

__version__ = "0.1.0"
__all__ = ["Category", "Decision", "GuardClassifier", "Policy", "__version__"]

_HOMES = {
    "Category": "guardkit.policy",
    "Decision": "guardkit.schema",
    "GuardClassifier": "guardkit.classifier",
    "Policy": "guardkit.policy",
}


def __getattr__(name: str) -> Any:
    # each public name is imported on first use, so that `import guardkit` stays quick and loads no torch
    if name not in _HOMES:
        raise AttributeError(f"module 'guardkit' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
