"""Finding the encoder that a guard was trained on: where it was, where the caller says, or by its weights in a folder."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from guardkit.encoders.base import Encoder
from guardkit.encoders.places import LOCAL
from guardkit.encoders.ways import WAYS, of_the_same_weights
from guardkit.kinds import Kinds, check_arguments
from guardkit.schema import InputError, shortened

ENCODER_KINDS = Kinds(
    "encoder",
    {
        "open_clip": "guardkit.encoders.open_clip:OpenClipEncoder",
        "transformers": "guardkit.encoders.transformers:TransformersEncoder",
        "onnx": "guardkit.encoders.onnx:OnnxEncoder",
        "vlm": "guardkit.encoders.vlm:VLMEncoder",
    },
)

_NEEDED = ("preprocess", "encode_preprocessed", "encode_images")
_DEPTH, _MOST = 5, 200
_HOW = (
    "a folder that holds it or is searched for it, local-dir:FOLDER, a weights file, hf-hub:ORG/NAME, an open_clip tag "
    "such as ViT-B-32/openai, or an encoder that is built already"
)


@runtime_checkable
class Movable(Protocol):
    """A class of encoders that can tell where else a model of its kind may be. Others are found where they were, or given."""

    @classmethod
    def named(cls, recorded: Mapping[str, Any], text: str) -> dict[str, Any] | None:
        """Constructor arguments of the encoder that a text means.

        Args:
            recorded: as of `find_encoder`; nothing in its config is checked.
            text: a path, a Hub id, or whatever else names weights of this kind.
        Returns:
            Them; None for a folder that is no model, and is to be searched for one.
        Raises:
            InputError: it means nothing here.
        """
        ...

    @classmethod
    def candidates(cls, recorded: Mapping[str, Any], place: Path, files: Sequence[str]) -> list[dict[str, Any]]:
        """Constructor arguments, `weights` among them, of the encoders in one folder that may be the recorded one.

        Args:
            recorded: as of `named`.
            place: the folder.
            files: names of the files in it, sorted.
        """
        ...


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

    One that is given may read images another way (see `guardkit.encoders.ways`) if its weights are those; its fingerprint is another then.

    Args:
        recorded: what a guard says of it: kind, name, config, fingerprint, preprocessing and dim.
        given: None: built from `recorded["config"]`. An encoder: used as it is. Else a text: a model's folder, or one that
            is searched for the model; "local-dir:FOLDER"; "hf-hub:ORG/NAME" or "ORG/NAME"; a weights file; for open_clip
            also a tag, "openai" or "ViT-B-32/openai".
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
    kind = ENCODER_KINDS.load(recorded["kind"], trust)
    try:
        if given is None:
            found = build_encoder(kind, recorded["config"], **options)
        elif not issubclass(kind, Movable):
            raise InputError(f"an encoder of kind {recorded['kind']} is looked for nowhere else; build it and give the object")
        elif (arguments := kind.named(recorded, os.fspath(given))) is None:
            return _search(kind, recorded, Path(given).expanduser(), options, needs)
        else:
            found = build_encoder(kind, _read_as(recorded, arguments), **options)
        found.fingerprint  # noqa: B018 - builds it, so that what is wrong is told here
    except Exception as error:
        if not isinstance(error, InputError) and ENCODER_KINDS.package(recorded["kind"]) is None:
            raise  # a fault of ours; classes of other packages may say in any way that their files are not there
        where = "where it was recorded" if given is None else f"as encoder={given}"
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {shortened(str(error), 200)}"
        raise InputError(f"{needs}, which could not be had {where} ({reason}); give from_pretrained(..., encoder=...) {_HOW}") from error
    return _checked(recorded, found, needed_by)


def build_encoder(kind: type, config: Mapping[str, Any], **options: Any) -> Encoder:
    """An encoder of arguments that a file holds, and of some that the caller sets.

    Raises:
        InputError: they are none of its constructor's.
    """
    if lacking := [name for name in _NEEDED if not callable(getattr(kind, name, None))]:
        raise InputError(f"an encoder must have {', '.join(_NEEDED)}, and {ENCODER_KINDS.name(kind)} has no {', '.join(lacking)}")
    if unknown := set(options) - set(inspect.signature(kind).parameters):
        raise InputError(f"an encoder of kind {ENCODER_KINDS.name(kind)} has no {' and no '.join(sorted(unknown))} to set")
    try:
        check_arguments(kind, config, "encoder.config")
    except ValueError as error:
        raise InputError(str(error)) from error
    encoder: Encoder = kind(**config, **options)
    return encoder


def _read_as(recorded: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an encoder that reads images as was recorded, wherever its weights are."""
    return {key: recorded["config"][key] for key in WAYS if key in recorded["config"]} | dict(arguments)


def _checked(recorded: Mapping[str, Any], encoder: Encoder, needed_by: str) -> Encoder:
    is_same = encoder.fingerprint == recorded["fingerprint"] or of_the_same_weights(recorded["fingerprint"], encoder) is not None
    if is_same and encoder.dim == recorded["dim"]:
        return encoder
    raise InputError(
        f"{needed_by} needs encoder {recorded['name']} ({recorded['dim']}-d, fingerprint {recorded['fingerprint'][:12]}, "
        f"preprocessing {recorded['preprocessing']}), got {encoder.name} ({encoder.dim}-d, fingerprint {encoder.fingerprint[:12]}, "
        f"preprocessing {encoder.preprocessing}); use the first, or train a guard on the second"
    )


def _search(kind: type[Movable], recorded: Mapping[str, Any], folder: Path, options: Mapping[str, Any], needs: str) -> Encoder:
    """The model below a folder whose weights are the recorded ones."""
    tried: list[str] = []
    for arguments in _candidates(kind, recorded, folder):
        tried.append(str(arguments["weights"]).removeprefix(LOCAL))
        try:
            encoder = build_encoder(kind, _read_as(recorded, arguments), **options)
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


def _candidates(kind: type[Movable], recorded: Mapping[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """Arguments of every encoder below a folder that may be the recorded one, at most `_MOST`."""
    left = _MOST
    for place, folders, files in os.walk(folder):
        folders.sort()
        if len(Path(place).relative_to(folder).parts) >= _DEPTH:
            folders.clear()
        found = kind.candidates(recorded, Path(place), sorted(files))
        yield from found[:left]
        left -= len(found)
        if left <= 0:
            return
