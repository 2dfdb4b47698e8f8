"""What the configuration of a saved guard may hold. Anybody can write one, digest included."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from guardkit.encoders.adapters import ADAPTER, ADAPTER_CONFIG
from guardkit.encoders.lookup import ENCODER_KINDS
from guardkit.heads import HEAD_KINDS
from guardkit.kinds import MAX_WIDTH, is_width
from guardkit.licences import check_licences
from guardkit.schema import shortened
from guardkit.score_maps import Calibration

HERE = "."  # an adapter in the guard's own folder, wherever that is
_HASH = re.compile(r"[0-9a-f]{64}")


def check_config(config: Mapping[str, Any]) -> None:
    """Checks every value that is used: there, of its type, in its range, and fitting the others.

    What only the classes of head and encoder know, their arguments, is checked before they are built.

    Args:
        config: an object of JSON.
    Raises:
        ValueError: the place, what was expected there and what came.
    """
    head, encoder, policy = (_object(config, key, "") for key in ("head", "encoder", "policy"))
    _expect(config, "guardkit_version", _is_text, "a text")
    _expect(config, "weights_sha256", is_hash, "64 hex digits")
    for name in ("training_images_sha256", "training_vectors_sha256"):
        if config.get(name) is not None:
            _expect(config, name, is_hash, "64 hex digits or null")
    names = _expect(config, "categories", _is_texts, "a list of at least one name")
    _expect(encoder, "name", _is_text, "a text", "encoder.")
    _expect(encoder, "fingerprint", is_hash, "64 hex digits", "encoder.")
    dim = _expect(encoder, "dim", is_width, f"a whole number from 1 to {MAX_WIDTH}", "encoder.")
    for key in ("preprocessing", "config"):
        _object(encoder, key, "encoder.")
    _expect(policy, "name", _is_text, "a text", "policy.")
    _expect(policy, "digest", is_hash, "64 hex digits", "policy.")
    for part, kinds in ((head, HEAD_KINDS), (encoder, ENCODER_KINDS)):
        _expect(part, "kind", kinds.is_name, f"one of {', '.join(kinds.ours)}, or package.module:Class", f"{kinds.part}.")
    has_adapter = config.get("adapter_sha256") is not None
    if _of_the_encoder(encoder) != (HERE if has_adapter else None):
        raise ValueError(f"encoder.config.adapter must be {HERE!r} with adapter_sha256, and null or absent without it")
    if has_adapter:
        if set(_object(config, "adapter_sha256", "")) != {ADAPTER, ADAPTER_CONFIG}:
            raise ValueError(
                f"adapter_sha256 must have {ADAPTER} and {ADAPTER_CONFIG}, got {shortened(', '.join(config['adapter_sha256']))}"
            )
        for name in (ADAPTER, ADAPTER_CONFIG):
            _expect(config["adapter_sha256"], name, is_hash, "64 hex digits", "adapter_sha256.")
    settings = _object(head, "settings", "head.")
    for name, wanted in (("dim", dim), ("n_categories", len(names))):
        if settings.get(name, wanted) != wanted:
            raise ValueError(f"head.settings.{name} must be {wanted}, as encoder and categories say, got {settings[name]!r}")
    thresholds = _object(config, "thresholds", "")
    bands = _object(thresholds, "categories", "thresholds.")
    if sorted(bands) != sorted(names):
        raise ValueError(
            f"thresholds.categories must be those of the guard, {shortened(', '.join(names))}, got {shortened(', '.join(bands))}"
        )
    for where, band in (("decision", thresholds.get("decision")), *((f"categories.{name}", band) for name, band in bands.items())):
        _check_band(band, f"thresholds.{where}")
    if config.get("calibration") is not None:
        for name in Calibration.from_dict(config["calibration"]).categories:
            if name not in names:
                raise ValueError(f"calibration has the category {name!r}, which the guard does not have")
    _expect(config, "history", lambda one: isinstance(one, list) and all(isinstance(step, dict) for step in one), "a list of objects")
    check_licences(config.get("licences", {}))  # guards of earlier versions say nothing of them
    for name, point in _object(config, "operating_points", "").items():
        where = f"operating_points.{name}."
        point = _object(config["operating_points"], name, "operating_points.")
        for key in ("threshold", "recall", "fpr", "fpr_ci_high"):
            _expect(point, key, lambda one: one is None or _is_share(one), "a number in [0, 1] or null", where)
        for key in ("n_unsafe", "n_safe"):
            _expect(point, key, _is_count, "a whole number of at least 0", where)
        if point["threshold"] is None or "reason" in point:
            _expect(point, "reason", _is_text, "a text", where)
    training = _object(config, "training", "")
    if "experiment" in training:
        _expect(training, "experiment", _is_text, "a text", "training.")
    if "sources" in training:
        _expect(training, "sources", lambda one: isinstance(one, list) and all(map(_is_text, one)), "a list of texts", "training.")
    if training.get("prevalence") is not None:
        _expect(training, "prevalence", _is_share, "a number in [0, 1]", "training.")
    metrics = _object(config, "metrics", "")
    for key in ("test", "pairs"):
        if metrics.get(key) is not None:
            _object(metrics, key, "metrics.")
    if metrics.get("notes") is not None:
        _expect(metrics, "notes", lambda one: isinstance(one, list) and all(map(_is_text, one)), "a list of texts", "metrics.")


def _of_the_encoder(encoder: Mapping[str, Any]) -> Any:
    """The adapter that an encoder's arguments name; what other kinds call so is their own affair."""
    return encoder["config"].get("adapter") if encoder["kind"] == "vlm" and isinstance(encoder.get("config"), dict) else None


def _check_band(band: Any, where: str) -> None:
    if not isinstance(band, dict) or set(band) != {"review", "block"}:
        raise ValueError(f"{where} must have review and block, got {json.dumps(band)[:60]}")
    for key in band:
        _expect(band, key, _is_share, "a number in [0, 1]", f"{where}.")
    if band["review"] > band["block"]:
        raise ValueError(f"{where}.review must not be above {where}.block, got {band['review']} and {band['block']}")


def _expect(values: Mapping[str, Any], key: str, rule: Callable[[Any], bool], text: str, where: str = "") -> Any:
    if key not in values:
        raise ValueError(f"{where}{key} is missing")
    if not rule(values[key]):
        raise ValueError(f"{where}{key} must be {text}, got {json.dumps(values[key])[:60]}")
    return values[key]


def _object(values: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    return _expect(values, key, lambda one: isinstance(one, dict), "an object", where)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def is_hash(value: Any) -> bool:
    """Whether it is written like a SHA-256."""
    return isinstance(value, str) and _HASH.fullmatch(value) is not None
