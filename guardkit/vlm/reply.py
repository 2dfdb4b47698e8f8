"""Reading a reply: the one JSON object in it, checked against a schema, or the reason why there is none to rely on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from guardkit.schema import InputError
from guardkit.vlm.base import clean, one_line


def parse_json(text: str, schema: Mapping[str, Any]) -> dict[str, Any] | str:
    """The one JSON object in a reply, or the reason why there is none to rely on.

    The object may stand alone, in a code fence or among other words. Nothing is repaired or guessed: broken JSON, a key that
    occurs twice, infinite numbers, and two different objects are reasons. Control characters are taken out of its strings.

    Args:
        text: a reply.
        schema: JSON schema of the object. It should say `additionalProperties: false`, and `maxLength` of its strings.
    Returns:
        The object, which fits the schema, or a reason in words that can be counted: they quote the schema, not the reply.
    Raises:
        jsonschema.SchemaError: `schema` is none.
        InputError: jsonschema is not installed.
    """
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import best_match
    except ImportError as error:
        raise InputError('reading replies needs jsonschema; install it with: pip install "guardkit[vlm]"') from error
    Draft202012Validator.check_schema(schema)
    decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_finite, parse_float=_finite)
    found: dict[str, dict[str, Any]] = {}  # the same object twice is one; compared as text, because True == 1
    position = text.find("{")
    while position >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            # not skipped, because what stands inside a broken object is a part, perhaps of the opposite meaning
            return "reply holds broken JSON"
        found[json.dumps(value, sort_keys=True)] = value
        position = text.find("{", end)
    if len(found) != 1:
        return "reply holds several JSON objects" if found else "reply holds no JSON object"
    (value,) = found.values()
    misfit = best_match(Draft202012Validator(schema).iter_errors(value))
    if misfit is not None:
        place = ".".join(str(step) for step in misfit.absolute_schema_path)
        return one_line(f"reply does not fit its schema: {place} = {json.dumps(misfit.validator_value)}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    cleaned = {clean(key): _cleaned_value(value) for key, value in pairs}
    if len(cleaned) != len(pairs):
        raise ValueError("a key occurs twice")
    return cleaned


def _cleaned_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_cleaned_value(item) for item in value]
    return clean(value) if isinstance(value, str) else value


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is not finite")
    return value
