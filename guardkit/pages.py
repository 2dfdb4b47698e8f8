"""Pages that stand alone: templates of Jinja on one base, styles and pictures inside, nothing loaded from elsewhere.

All texts are escaped; a template that names what it was not given is an error.
"""

from __future__ import annotations

from typing import Any


def render(template: str, **values: Any) -> str:
    """A page of `guardkit/templates`, as one text; values are what the template names."""
    return str(_template(template).render(**values))


def fragments(template: str) -> Any:
    """The macros of a template, each a function that gives a piece of a page."""
    return _template(template).module


def _template(name: str) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("guardkit", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    ).get_template(name)
