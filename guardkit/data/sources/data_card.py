"""The card of a data set says where its files lie. A folder's card may name any host, and none of them is asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guardkit.schema import InputError

_CARDS = ("README.md", ".huggingface.yaml")  # where the `datasets` library looks for it


def check_card(folder: Path) -> None:
    """Refuses a folder whose card sends the library elsewhere for its files.

    Args:
        folder: of a data set; one that does not exist has no card.
    Raises:
        InputError: the card names a web address, or cannot be read.
    """
    import yaml
    from huggingface_hub import DatasetCard

    for name in _CARDS:
        path = folder / name
        if not path.is_file():
            continue
        try:
            if name.endswith(".yaml"):
                said = yaml.safe_load(path.read_text(encoding="utf-8"))
            else:
                said = DatasetCard.load(path, ignore_metadata_errors=True).data.to_dict()
        except (ValueError, OSError, RecursionError, yaml.YAMLError) as error:
            raise InputError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}); mend it or get it anew") from error
        for text in _texts(said.get("configs") if isinstance(said, dict) else said):
            if "://" in text:
                raise InputError(
                    f"{path} names {text[:200]!r} for its files, and nothing is fetched from there; download them "
                    "yourself and give a folder"
                )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)
