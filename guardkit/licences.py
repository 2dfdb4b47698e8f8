"""Under which terms the parts of a guard stand: what guardkit knows of encoders, what somebody stated, and what nobody said.

Licences are named as the Hub names them, such as "mit", "apache-2.0" or "cc-by-nc-4.0".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from guardkit.schema import InputError, shortened

CODE, UNKNOWN = "mit", "unknown"
STATED = ("head", "encoder", "data")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+()-]{0,79}")
# of the weights of the presets (docs/encoders.md has the sources), by what `encoder.weights` says; others are not known
_OF_WEIGHTS = {
    "guardkit:scenes_clip": "mit",
    "guardkit:photos_clip": "imagenet-non-commercial-research",
    "openai": "mit",
    "hf-hub:wkcn/TinyCLIP-ViT-40M-32-Text-19M-LAION400M": "mit",
    "hf-hub:timm/ViT-B-16-SigLIP2": "apache-2.0",
    "hf-hub:timm/ViT-SO400M-14-SigLIP2": "apache-2.0",
}
_OF_ARCHITECTURES = {("ViT-B-16-SigLIP2", "webli"): "apache-2.0", ("ViT-SO400M-14-SigLIP2", "webli"): "apache-2.0"}


def check_licences(stated: Mapping[str, Any]) -> dict[str, str]:
    """Licences that somebody states, as a dictionary.

    Raises:
        InputError: of something else than head, encoder and data, or no name of a licence.
    """
    if not isinstance(stated, Mapping):
        raise InputError(f'licences must be a map such as {{"head": "mit", "data": "cc-by-4.0"}}, got {type(stated).__name__}')
    for part, name in stated.items():
        if part not in STATED:
            raise InputError(f"licences must be of {', '.join(STATED)}, got {shortened(repr(part))}")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError(f'the licence of {part} must be a name such as "mit" or "cc-by-4.0", got {shortened(repr(name))}')
    return dict(stated)


def all_licences(stated: Mapping[str, str], encoder: Mapping[str, Any]) -> dict[str, str]:
    """Of code, head, encoder and data; `UNKNOWN` of what nobody knows.

    Args:
        stated: by somebody; goes before what is known.
        encoder: its `config`.
    """
    weights = str(encoder.get("weights"))
    known = _OF_WEIGHTS.get(weights) or _OF_ARCHITECTURES.get((str(encoder.get("architecture")), weights), UNKNOWN)
    return {"code": CODE, "head": UNKNOWN, "encoder": known, "data": UNKNOWN} | dict(stated)
