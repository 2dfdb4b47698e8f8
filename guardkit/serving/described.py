"""What the service says of itself in OpenAPI: bodies and answers that no signature of Python tells."""

from __future__ import annotations

from typing import Any

_TEXT, _NUMBER = {"type": "string"}, {"type": "number", "minimum": 0, "maximum": 1}
_OR_NULL = {"anyOf": [_NUMBER, {"type": "null"}]}
_BAND = {"type": "object", "required": ["review", "block"], "properties": {"review": _NUMBER, "block": _NUMBER}}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _list(of: Any) -> dict[str, Any]:
    return {"type": "array", "items": of}


DECISION = _object(
    id={**_TEXT, "description": "as the request names the image, else its place in the request, from 0"},
    guard={**_TEXT, "description": "which guard says so"},
    action={"enum": ["allow", "review", "block", "error"], "description": "error: it could not be decided, which never means allow"},
    label={"enum": [0, 1, None]},
    score={**_OR_NULL, "description": "probability of unsafe; within a scope, of the category that decided; null without a decision"},
    threshold_review=_OR_NULL,
    threshold_block=_OR_NULL,
    categories={"type": "object", "additionalProperties": _OR_NULL},
    violated={**_list(_TEXT), "description": "the categories that caused it, highest score first"},
    top_category={"type": ["string", "null"]},
    error={"type": ["string", "null"], "description": "why there is no decision"},
    frame={"type": ["integer", "null"], "description": "of an animation: the frame that decided, from 0"},
)
DECISIONS = _object(decisions=_list(DECISION))
GUARDS = _object(
    guards=_list(
        _object(
            name=_TEXT,
            policy=_object(name=_TEXT, digest=_TEXT),
            categories=_list(_object(name=_TEXT, definition=_TEXT)),
            thresholds=_object(decision=_BAND, categories={"type": "object", "additionalProperties": _BAND}),
            promises=_list(_TEXT),
            prevalence=_OR_NULL,
            encoder=_object(name=_TEXT, fingerprint=_TEXT),
            fingerprint=_TEXT,
            card={"type": ["string", "null"], "description": "Markdown"},
        )
    ),
    limits={"type": "object"},
)
RELOADED = _object(guards={"type": "object", "additionalProperties": {"type": "boolean"}, "description": "whether each is another one now"})
HEALTH = _object(status={"enum": ["ok", "failed"]})
REFUSAL = _object(detail={**_TEXT, "description": "one line"})

_BASE64 = {**_TEXT, "contentEncoding": "base64", "format": "byte"}
_ENTRY = {"type": "object", "required": ["data"], "properties": {"id": _TEXT, "data": _BASE64}, "additionalProperties": False}
_SCOPE = {
    "anyOf": [{**_list(_TEXT), "minItems": 1}, {"type": "null"}],
    "description": "only what violates one of these categories is flagged",
}


def body(max_images: int) -> dict[str, Any]:
    """The body of a request to decide, as an entry of an operation."""
    images = {"type": "array", "items": {"anyOf": [_BASE64, _ENTRY]}, "minItems": 1, "maxItems": max_images}
    files = {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1, "maxItems": max_images}
    form = {"type": "object", "required": ["files"], "properties": {"files": files, "scope": _TEXT}, "additionalProperties": False}
    asked = {"type": "object", "required": ["images"], "properties": {"images": images, "scope": _SCOPE}, "additionalProperties": False}
    raw = {"type": "string", "format": "binary"}
    kinds = {"multipart/form-data": form, "application/json": asked, "application/octet-stream": raw, "image/*": raw}
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema} for kind, schema in kinds.items()}}}


def answers(schema: dict[str, Any], **refusals: str) -> dict[int | str, dict[str, Any]]:
    """The answers of an operation: the good one, and for each status, as in _422, why it is given."""
    found: dict[int | str, dict[str, Any]] = {200: {"description": "OK", "content": {"application/json": {"schema": schema}}}}
    for status, why in refusals.items():
        found[int(status.strip("_"))] = {"description": why, "content": {"application/json": {"schema": REFUSAL}}}
    return found
