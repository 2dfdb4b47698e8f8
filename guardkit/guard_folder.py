"""A guard on disk: its configuration, its weights, and what lies beside them. Nothing in it is believed unchecked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from guardkit import __version__
from guardkit.artifacts import fingerprint, hash_file, read_json, written
from guardkit.checks import check_path
from guardkit.encoders.adapters import ADAPTER, ADAPTER_CONFIG
from guardkit.encoders.lookup import ENCODER_KINDS
from guardkit.guard_card import model_card
from guardkit.guard_config import HERE, check_config
from guardkit.guard_parts import check_logits, filled, head_class, outlines, reason_of, tensors
from guardkit.heads import HEAD_KINDS, Head
from guardkit.hub import hub_folder, is_hub_id
from guardkit.kinds import require_trust
from guardkit.local_copies import local, local_copy
from guardkit.policy import Policy
from guardkit.publishing import published
from guardkit.schema import InputError
from guardkit.seen import FILE as SEEN
from guardkit.seen import SPLITS, SeenImages
from guardkit.seen_vectors import FILE as SEEN_VECTORS
from guardkit.storage import check_url, items, joined
from guardkit.thresholds import Thresholds

FORMATS = (1, 2)  # read; the last is written
CONFIG, WEIGHTS, POLICY, CARD = "config.json", "model.safetensors", "policy.yaml", "README.md"
ADAPTERS = (ADAPTER, ADAPTER_CONFIG)  # of guards whose encoder is a model with an adapter
FILES = frozenset({CONFIG, WEIGHTS, POLICY, CARD, SEEN, SEEN_VECTORS, *ADAPTERS})
_HEADER_BYTES = 1 << 20  # more than names and shapes of a head's weights take
_MEND = "copy the folder anew or train the guard again"


@dataclass(frozen=True)
class Stored:
    """A guard's files, read and checked.

    Attributes:
        folder: where they are.
        config: the content of config.json, without its digest.
        policy, head: as they were saved.
        training_images: as well; None for a guard of an earlier guardkit, which kept none.
    """

    folder: Path
    config: dict[str, Any]
    policy: Policy
    head: Head
    training_images: SeenImages | None


# --- reading ----------------------------------------------------------------------------------------------------------


def read_guard(
    folder: str | Path,
    *,
    trust: Sequence[str] = (),
    head: Head | type[Head] | None = None,
    needs_encoder: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Stored:
    """Reads a guard from its folder, from a training run's folder, or from the Hugging Face Hub.

    Args:
        folder: a path, or "organisation/name" on the Hub.
        trust: packages of other people that its head and encoder may be imported from.
        head: the class of its head, or a head of that class, instead of an import.
        needs_encoder: whether the encoder that it names will be built.
        revision, token: of a guard on the Hub, see `hub_folder`.
    Raises:
        InputError: there is none, a file is damaged, was changed, or holds what no guard can have; or it needs code from
            a package that is not trusted.
    """
    path = _locate(folder, revision, token)
    config = _read_config(path / CONFIG)
    policy = Policy.load(path / POLICY)
    if policy.digest != config["policy"]["digest"]:
        raise InputError(
            f"{path / POLICY} was changed after the guard was trained (its digest does not match); train a guard for the new policy"
        )
    if tuple(config["categories"]) != policy.category_names:
        raise InputError(f"{path / CONFIG}: categories must be those of {POLICY}, {', '.join(policy.category_names)}; {_MEND}")
    named = [(HEAD_KINDS, config["head"]["kind"])] if head is None else []
    named += [(ENCODER_KINDS, config["encoder"]["kind"])] if needs_encoder else []
    require_trust(named, trust, needed_by=f"guard {path}")
    kind = head_class(config["head"]["kind"], head, trust)
    for name, sha256 in (config.get("adapter_sha256") or {}).items():
        if not (path / name).is_file() or hash_file(path / name) != sha256:
            raise InputError(f"{path / name} is missing or damaged (its SHA-256 does not match); copy the folder anew")
        config["encoder"]["config"]["adapter"] = str(path)
    return Stored(path, config, policy, _read_head(path, config, kind), _read_seen(path, config))


def _locate(folder: str | Path, revision: str | None, token: str | bool | None) -> Path:
    path = local("the guard's folder", folder, only=lambda name: name.removeprefix("guard/") in FILES)
    name = os.fsdecode(folder)
    if path.exists():
        if not path.is_dir():
            raise InputError(f"{name} is a file; give the folder `guard/` that training wrote")
        if revision is not None:
            raise InputError(f"{name} is a folder here and has no revision {revision!r}; that is for guards on the Hub")
        if (path / CONFIG).exists():
            return path
        if not (path / "guard" / CONFIG).exists():
            raise InputError(f"{name} holds no guard (no {CONFIG}, nor guard/{CONFIG}); give the folder `guard/` that training wrote")
        return path / "guard"  # the folder of a training run holds its guard
    if is_hub_id(name):
        return hub_folder(
            name,
            sorted(FILES - {CARD}),
            refusal=f"{name!r} is no folder here, and no guard of that name can be had from the Hub",
            remedy="without a network give its folder",
            revision=revision,
            token=token,
        )
    raise InputError(f"guard folder {name!r} does not exist; give the folder `guard/` that training wrote, or a Hub id like org/name")


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path, "a guard's configuration", _MEND)
    if config.get("format") not in FORMATS:
        raise InputError(
            f"{path} has guard format {config.get('format')!r}, this guardkit reads {' and '.join(map(str, FORMATS))}; use guardkit {config.get('guardkit_version')}"
        )
    digest = config.pop("digest", None)
    try:
        if fingerprint(config) != digest:
            raise InputError(f"{path} was changed after it was written (its digest does not match); copy the folder anew")
        if isinstance(config.get("encoder"), dict):
            config["encoder"].setdefault("kind", "open_clip")  # the only one there was when guards did not say it
        if config["format"] == 1:
            _add_thresholds(config)
        check_config(config)
    except InputError:
        raise
    except (ValueError, RecursionError, OverflowError) as error:  # also numbers too large for JSON
        raise InputError(f"{path} is not a guard's configuration ({reason_of(error)}); {_MEND}") from error
    return config


def _add_thresholds(config: dict[str, Any]) -> None:
    """To a guard of format 1, which had one for the decision, and nothing calibrated."""
    if "threshold" not in config:
        raise ValueError("threshold is missing")
    names = config["categories"] if isinstance(config.get("categories"), list) else ()
    config["thresholds"] = Thresholds.usual([str(name) for name in names], config.pop("threshold")).to_dict()
    config["calibration"], config["history"] = None, []


def _read_head(folder: Path, config: Mapping[str, Any], kind: type[Head]) -> Head:
    path, settings = folder / WEIGHTS, config["head"]["settings"]
    try:
        expected = outlines(kind, settings)
    except ValueError as error:
        raise InputError(f"{folder / CONFIG}: {reason_of(error)}; {_MEND}") from error
    limit = _HEADER_BYTES + sum(value.numel() * value.element_size() for value in expected.values())
    try:
        data = path.read_bytes() if path.stat().st_size <= limit else b""
    except OSError:
        data = b""
    if hashlib.sha256(data).hexdigest() != config["weights_sha256"]:
        raise InputError(f"{path} is missing or damaged (its SHA-256 does not match); copy the folder anew")
    try:
        head = filled(kind, settings, expected, data)
        check_logits(head, config["encoder"]["dim"], len(config["categories"]))
        return head
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path} does not fit its configuration: {reason_of(error)}; {_MEND}") from error


def _read_seen(folder: Path, config: Mapping[str, Any]) -> SeenImages | None:
    if config.get("training_images_sha256") is None:
        return None
    wanted = {SEEN: config["training_images_sha256"], SEEN_VECTORS: config.get("training_vectors_sha256")}
    for name, sha256 in wanted.items():
        if sha256 is not None and (not (folder / name).is_file() or hash_file(folder / name) != sha256):
            raise InputError(f"{folder / name} is missing or damaged (its SHA-256 does not match); copy the folder anew")
    return SeenImages.load(folder / SEEN, None if wanted[SEEN_VECTORS] is None else folder / SEEN_VECTORS)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_guard(
    folder: str | Path,
    head: Head,
    policy: Policy,
    config: Mapping[str, Any],
    training_images: SeenImages | None,
    *,
    called: str = "THIS_FOLDER",
) -> Path:
    """Writes a guard's files; an older guard in the folder is replaced as a whole.

    Args:
        folder: new, empty, or that of a guard.
        head, policy: what the guard decides with.
        config: everything else that config.json says.
        training_images: those it has seen, if they are known.
        called: where the card says that it is loaded from.
    Returns:
        The folder.
    Raises:
        InputError: the folder holds something else.
    """
    folder = check_path("the guard's folder", folder)
    _check_free(folder)
    kind, settings = HEAD_KINDS.describe(head)
    with ExitStack() as files:
        # all are complete before the first gets its name; the one that is opened first gets it last
        new = {name: files.enter_context(written(folder / name)) for name in (CONFIG, CARD, POLICY, WEIGHTS)}
        save_file(tensors(head), new[WEIGHTS])
        policy.save(new[POLICY])
        encoder = dict(config["encoder"])
        adapter = encoder["config"].get("adapter") if encoder["kind"] == "vlm" else None
        if adapter is not None:
            for name in ADAPTERS:
                new[name] = files.enter_context(written(folder / name))
                shutil.copyfile(Path(adapter) / name, new[name])
            encoder["config"] = encoder["config"] | {"adapter": HERE}
        if training_images is not None:
            new[SEEN] = files.enter_context(written(folder / SEEN))
            training_images.save(new[SEEN])
            if len(training_images.vectors):
                new[SEEN_VECTORS] = files.enter_context(written(folder / SEEN_VECTORS))
                training_images.vectors.save(new[SEEN_VECTORS], SPLITS)
        whole: dict[str, Any] = {
            "format": FORMATS[-1],
            "guardkit_version": __version__,
            "head": {"kind": kind, "settings": settings},
            "categories": list(policy.category_names),
            **config,
            "encoder": encoder,
            "policy": {"name": policy.name, "digest": policy.digest},
            "weights_sha256": hash_file(new[WEIGHTS]),
            "training_images_sha256": hash_file(new[SEEN]) if SEEN in new else None,
        }
        if SEEN_VECTORS in new:
            whole["training_vectors_sha256"] = hash_file(new[SEEN_VECTORS])
        if adapter is not None:
            whole["adapter_sha256"] = {name: hash_file(new[name]) for name in ADAPTERS}
        whole["digest"] = fingerprint(whole)
        new[CARD].write_text(model_card(whole, policy, called), encoding="utf-8")
        new[CONFIG].write_text(json.dumps(whole, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        for name in FILES - new.keys():
            (folder / name).unlink(missing_ok=True)
    return folder


def upload_guard(url: str, save: Callable[[Path], object]) -> None:
    """Writes a guard's files as objects, config.json as the last; an older guard there is replaced.

    Args:
        url: of the place, under which there is nothing yet, or a guard and nothing else.
        save: writes the guard into a folder.
    Raises:
        InputError: the place holds something else, or cannot be written.
    """
    url = check_url("the guard's folder", url)
    names = {one.name for one in items(url)}
    _check_names(url, {name for name in names if not name.startswith(".")}, lambda: local_copy(joined(url, CONFIG)))
    with tempfile.TemporaryDirectory(prefix="guardkit-") as place:
        folder = Path(place) / "guard"
        save(folder)
        published(folder, url, last=[CONFIG], replaced=names & FILES)


def _check_free(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder to save the guard in")
    # names with a dot in front belong to tools such as git, and to a writer that was killed
    _check_names(str(folder), {path.name for path in folder.iterdir() if not path.name.startswith(".")}, lambda: folder / CONFIG)


def _check_names(where: str, names: Set[str], config: Callable[[], Path]) -> None:
    foreign = sorted(names - FILES)
    if not foreign and names - set(ADAPTERS):
        try:
            is_guard = {"format", "head", "policy", "weights_sha256", "digest"} <= read_json(config(), "a guard's configuration").keys()
        except InputError:
            is_guard = False
        foreign = [] if is_guard else sorted(names)
    if foreign:
        raise InputError(
            f"{where} holds {foreign[0]!r}, which is not a guard's; save the guard in a new or empty folder, or in one that holds nothing but a guard"
        )
