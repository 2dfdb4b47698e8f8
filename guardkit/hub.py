"""Repositories on the Hugging Face Hub: some of their files, fetched once. Knows no model.

The client's own messages run over several lines and speak of its settings, and a try that fails may leave folders behind. Here a
message is one line, and what a failed try made is taken away again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from guardkit.schema import InputError, shortened

_NO_REPOSITORY = "the Hub has no such repository, or none that you may see"


def is_hub_id(name: str) -> bool:
    """Whether a text that is no path here may be "ORG/NAME" on the Hub."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def hub_folder(name: str, patterns: Iterable[str], *, refusal: str, remedy: str, revision: str | None = None) -> Path:
    """Fetches files of a repository, or finds those that were fetched before.

    Args:
        name: "ORG/NAME".
        patterns: of the files that are needed.
        refusal: how the message begins where they cannot be had; the reason follows in brackets.
        remedy: what to do then.
        revision: a branch, tag or commit; None: the main branch.
    Returns:
        The folder that holds them.
    Raises:
        InputError: no such repository, or not to be had.
    """
    from huggingface_hub import snapshot_download

    with _fetching(name, refusal, remedy):
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))


def hub_file(name: str, file: str, *, refusal: str, remedy: str, revision: str | None = None) -> Path:
    """One file of a repository; see `hub_folder`."""
    from huggingface_hub import hf_hub_download

    with _fetching(name, refusal, remedy):
        return Path(hf_hub_download(name, file, revision=revision))


@contextmanager
def _fetching(name: str, refusal: str, remedy: str) -> Iterator[None]:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).expanduser()
    folder = f"models--{name.replace('/', '--')}"
    made = [place for place in (cache / folder, cache / ".locks" / folder) if not place.exists()]
    above = [place for place in (cache / ".locks", cache, *cache.parents) if not place.exists()]
    try:
        yield
    except Exception as error:  # the client raises errors of its own, of its HTTP library and of the system
        _tidy(made, above)
        raise InputError(f"{refusal} ({_reason(error)}); {remedy}") from error


def _reason(error: BaseException) -> str:
    """Why something cannot be had, in a few words."""
    from huggingface_hub import errors

    chain, cause = [], error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    # a kind stands before those that it is one of, or that are raised because of it
    known: list[tuple[type[BaseException] | tuple[type[BaseException], ...], str]] = [
        (errors.GatedRepoError, "it is gated: ask for access on its page, then log in with `hf auth login` or set HF_TOKEN"),
        (errors.RepositoryNotFoundError, _NO_REPOSITORY),
        (errors.RevisionNotFoundError, "its repository has no such revision"),
        (errors.HFValidationError, "that is no id of the Hub, which is ORG/NAME"),
        (errors.OfflineModeIsEnabled, "the Hub is switched off by HF_HUB_OFFLINE, and no whole copy was fetched before"),
    ]
    for kind, said in known:
        if any(isinstance(one, kind) for one in chain):
            return said
    for one in chain:
        status = getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(one, errors.HfHubHTTPError) and status is not None:
            if isinstance(one, errors.EntryNotFoundError):
                return "its repository has no such file"
            # to strangers it says 401 of what is not there
            return _NO_REPOSITORY if status in (401, 404) else f"the Hub answers with status {status}"
    if any(isinstance(one, (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)) for one in chain):
        return "the Hub cannot be reached, and no whole copy was fetched before"
    return shortened(str(error), 200) or type(error).__name__


def _tidy(made: Iterable[Path], above: Iterable[Path]) -> None:
    """Removes what a failed try left empty.

    Args:
        made: folders of its own that were not there before.
        above: folders that hold them and were not there either, the innermost first.
    """
    for place in made:
        for parent, _, files in os.walk(place, topdown=False):
            for file in files:
                if file.endswith(".lock"):
                    (Path(parent) / file).unlink(missing_ok=True)
            with suppress(OSError):  # it holds something
                os.rmdir(parent)
    for place in above:
        with suppress(OSError):
            place.rmdir()
