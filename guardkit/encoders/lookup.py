"""Finding the encoder that a guard was trained on: where it was, where the caller says, or by its weights in a folder."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from guardkit.encoders.base import Encoder
from guardkit.encoders.open_clip import OpenClipEncoder, is_architecture
from guardkit.kinds import Kinds, check_arguments
from guardkit.schema import InputError

ENCODERS = Kinds("encoder", {"open_clip": "guardkit.encoders.open_clip:OpenClipEncoder"})

_NEEDED = ("preprocess", "encode_preprocessed", "encode_images")
_MODEL, _SUFFIXES = "open_clip_config.json", (".safetensors", ".bin", ".pt", ".pth")
_PREFIXES = ("local-dir:", "hf-hub:", "guardkit:")
_DEPTH, _MOST = 5, 200
_HOW = (
    "a folder that holds it or is searched for it, local-dir:FOLDER, a weights file, hf-hub:ORG/NAME, an open_clip tag "
    "such as ViT-B-32/openai, or an encoder that is built already"
)


def find_encoder(
    recorded: Mapping[str, Any],
    given: Encoder | str | Path | None,
    *,
    needed_by: str,
    trust: Sequence[str] = (),
    device: str | None = None,
    batch_size: int | None = None,
) -> Encoder:
    """The encoder that was recorded, recognised by its fingerprint over weights and preprocessing.

    Args:
        recorded: what a guard says of it: kind, name, config, fingerprint, preprocessing and dim.
        given: None: built from `recorded["config"]`. An encoder: used as it is. Else a text: a model's folder, or one that
            is searched for the model; "local-dir:FOLDER"; a weights file; "hf-hub:ORG/NAME" or "ORG/NAME"; a tag of
            open_clip, "openai" or "ViT-B-32/openai".
        needed_by: for messages.
        trust: packages of other people that it may be imported from.
        device: to build it on; None: as the encoder decides.
        batch_size: images encoded at once; None: as the encoder decides.
    Raises:
        InputError: it cannot be built or found, or `given` is another one; both are named.
    """
    needs = f"{needed_by} needs encoder {recorded['name']} ({recorded['dim']}-d, fingerprint {recorded['fingerprint'][:12]})"
    options: dict[str, Any] = {key: value for key, value in (("device", device), ("batch_size", batch_size)) if value is not None}
    if given is not None and not isinstance(given, (str, os.PathLike)):
        if not hasattr(given, "encode_preprocessed"):
            raise InputError(f"{needs}, and encoder must be {_HOW}, got {type(given).__name__}")
        if options:
            raise InputError(f"{' and '.join(options)} belong to an encoder that is built here; set them where this one was made")
        return _checked(recorded, given, needed_by)
    kind = ENCODERS.load(recorded["kind"], trust)
    try:
        if given is None:
            found: Encoder = build_encoder(kind, recorded["config"], **options)
        elif kind is not OpenClipEncoder:
            raise InputError(f"an encoder of kind {recorded['kind']} is looked for nowhere else; build it and give the object")
        elif (folder := Path(given).expanduser()).is_dir() and not (folder / _MODEL).is_file():
            return _search(recorded, folder, options, needs)
        else:
            found = OpenClipEncoder(**_named(recorded, os.fspath(given)), **options)
        found.fingerprint  # noqa: B018 - builds it, so that what is wrong is told here
    except InputError as error:
        where = "where it was recorded" if given is None else f"as encoder={given}"
        raise InputError(f"{needs}, which could not be had {where} ({error}); give from_pretrained(..., encoder=...) {_HOW}") from error
    return _checked(recorded, found, needed_by)


def build_encoder(kind: type, config: Mapping[str, Any], **options: Any) -> Encoder:
    """An encoder of arguments that a file holds, and of some that the caller sets.

    Raises:
        InputError: they are none of its constructor's.
    """
    if lacking := [name for name in _NEEDED if not callable(getattr(kind, name, None))]:
        raise InputError(f"an encoder must have {', '.join(_NEEDED)}, and {ENCODERS.name(kind)} has no {', '.join(lacking)}")
    if unknown := set(options) - set(inspect.signature(kind).parameters):
        raise InputError(f"an encoder of kind {ENCODERS.name(kind)} has no {' and no '.join(sorted(unknown))} to set")
    try:
        check_arguments(kind, config, "encoder.config")
    except ValueError as error:
        raise InputError(str(error)) from error
    encoder: Encoder = kind(**config, **options)
    return encoder


def _checked(recorded: Mapping[str, Any], encoder: Encoder, needed_by: str) -> Encoder:
    if encoder.fingerprint == recorded["fingerprint"]:
        return encoder
    raise InputError(
        f"{needed_by} needs encoder {recorded['name']} ({recorded['dim']}-d, fingerprint {recorded['fingerprint'][:12]}, "
        f"preprocessing {recorded['preprocessing']}), got {encoder.name} ({encoder.dim}-d, fingerprint {encoder.fingerprint[:12]}, "
        f"preprocessing {encoder.preprocessing}); use the first, or train a guard on the second"
    )


def _named(recorded: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Constructor arguments of the encoder that a text means."""
    architecture, path = recorded["config"]["architecture"], Path(text).expanduser()
    if text.startswith(_PREFIXES):
        return {"architecture": None, "weights": text}
    if path.is_dir():
        return {"architecture": None, "weights": f"local-dir:{path}"}
    if path.is_file():
        if (path.parent / _MODEL).is_file():
            return {"architecture": None, "weights": f"local-dir:{path.parent}"}
        return _file(recorded, path)
    if text.count("/") == 1 and all(text.split("/")):
        first, second = text.split("/")
        if is_architecture(first):
            return {"architecture": first, "weights": second}
        return {"architecture": None, "weights": f"hf-hub:{text}"}
    if "/" in text or architecture is None:
        raise InputError(f"{text!r} is no folder and no file here")
    return {"architecture": architecture, "weights": text}


def _file(recorded: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A bare file says neither architecture nor preprocessing, but the guard does."""
    return {"architecture": recorded["config"]["architecture"], "weights": str(path), "preprocess": dict(recorded["preprocessing"])}


def _search(recorded: Mapping[str, Any], folder: Path, options: Mapping[str, Any], needs: str) -> Encoder:
    """The model below a folder whose weights are the recorded ones."""
    tried: list[str] = []
    for arguments in _candidates(recorded, folder):
        tried.append(arguments["weights"].removeprefix("local-dir:"))
        try:
            encoder = OpenClipEncoder(**arguments, **options)
            if encoder.fingerprint == recorded["fingerprint"]:
                return encoder
        except InputError:
            continue  # a damaged model, or one of another kind, is not the one
    looked = (
        f"none of the {len(tried)} models below {folder} has these weights ({', '.join(tried[:3])})"
        if tried
        else f"{folder} holds no model"
    )
    raise InputError(f"{needs}, and {looked}; give from_pretrained(..., encoder=...) {_HOW}")


def _candidates(recorded: Mapping[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """Arguments of every encoder below a folder that may be the recorded one, at most `_MOST`."""
    left = _MOST
    for place, folders, files in os.walk(folder):
        folders.sort()
        if len(Path(place).relative_to(folder).parts) >= _DEPTH:
            folders.clear()
        found: list[dict[str, Any]] = []
        if _MODEL in files:
            if _width(Path(place, _MODEL)) in (None, recorded["dim"]):
                found.append({"architecture": None, "weights": f"local-dir:{place}"})
        elif recorded["config"]["architecture"] is not None:
            found += [_file(recorded, Path(place, name)) for name in sorted(files) if name.endswith(_SUFFIXES)]
        yield from found[:left]
        left -= len(found)
        if left <= 0:
            return


def _width(path: Path) -> Any:
    """The width that a model's configuration states, None where it states none: cheaper than building the model."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["model_cfg"]["embed_dim"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
