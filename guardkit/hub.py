"""Repositories on the Hugging Face Hub: some of their files, fetched once, or written. Knows no model.

The client's own messages run over several lines and speak of its settings, and a try that fails may leave folders behind. Here a
message is one line, and what a failed try made is taken away again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from guardkit.schema import InputError, shortened

_NO_REPOSITORY = "the Hub has no such repository, or none that you may see"
_OF_STATUS = {  # of an answer to somebody who writes
    401: "it does not know you: log in with `hf auth login`, set HF_TOKEN or give token=",
    403: "you may not write there, or your token may only read",
    404: "it has no such repository or branch",
}


def is_hub_id(name: str) -> bool:
    """Whether a text that is no path here may be "ORG/NAME" on the Hub."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def hub_folder(
    name: str, patterns: Iterable[str], *, refusal: str, remedy: str, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """Fetches files of a repository, or finds those that were fetched before.

    Args:
        name: "ORG/NAME".
        patterns: of the files that are needed.
        refusal: how the message begins where they cannot be had; the reason follows in brackets.
        remedy: what to do then.
        revision: a branch, tag or commit; None: the main branch.
        token: to ask with; None: HF_TOKEN or that of `hf auth login`, False: none.
    Returns:
        The folder that holds them.
    Raises:
        InputError: no such repository, or not to be had.
    """
    from huggingface_hub import snapshot_download

    with _fetching(name, refusal, remedy):
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), token=token))


def hub_file(name: str, file: str, *, refusal: str, remedy: str, revision: str | None = None) -> Path:
    """One file of a repository; see `hub_folder`."""
    from huggingface_hub import hf_hub_download

    with _fetching(name, refusal, remedy):
        return Path(hf_hub_download(name, file, revision=revision))


def upload_folder(
    folder: Path,
    name: str,
    files: Iterable[str],
    *,
    message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Puts files of a folder into a repository, as one commit. The repository, and a branch that is named, are made where there are none.

    Args:
        folder: that holds them.
        name: "ORG/NAME".
        files: their names; no other goes.
        message: of the commit.
        private: whether a new repository is; None: as its owner has set it, which is mostly public. One that is there stays as it is.
        token: to write with; None: HF_TOKEN or that of `hf auth login`.
        revision: a branch; None: the main branch.
        create_pr: ask for the change instead of making it.
    Returns:
        The address of the commit.
    Raises:
        InputError: the Hub refuses it, or cannot be reached.
    """
    from huggingface_hub import HfApi

    if not is_hub_id(name):
        raise InputError(f"repo_id must be ORG/NAME of the Hub, got {shortened(repr(name))}")
    api = HfApi(token=token)
    try:
        with _bars_on_terminals_only():
            api.create_repo(name, private=private, exist_ok=True)
            if revision is not None and not create_pr:
                api.create_branch(name, branch=revision, exist_ok=True)
            done = api.upload_folder(
                repo_id=name,
                folder_path=folder,
                allow_patterns=sorted(files),
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
            )
    except Exception as error:  # as in `_fetching`
        raise InputError(
            f"{name} could not be written to the Hub ({_why_not_written(error)}); save it into a folder, or try again"
        ) from error
    return str(done.commit_url)


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Keeps the client's progress bars out of log files."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _fetching(name: str, refusal: str, remedy: str) -> Iterator[None]:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).expanduser()
    folder = f"models--{name.replace('/', '--')}"
    made = [place for place in (cache / folder, cache / ".locks" / folder) if not place.exists()]
    above = [place for place in (cache / ".locks", cache, *cache.parents) if not place.exists()]
    try:
        with _bars_on_terminals_only():
            yield
    except Exception as error:  # the client raises errors of its own, of its HTTP library and of the system
        _tidy(made, above)
        raise InputError(f"{refusal} ({_reason(error)}); {remedy}") from error


def _reason(error: BaseException) -> str:
    """Why something cannot be had, in a few words."""
    from huggingface_hub import errors

    chain = _chain(error)
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
    if any(isinstance(one, errors.EntryNotFoundError) and not isinstance(one, errors.LocalEntryNotFoundError) for one in chain):
        return "its repository has no such file"
    if (status := _status(chain)) is not None:
        # to strangers it says 401 of what is not there
        return _NO_REPOSITORY if status in (401, 404) else f"the Hub answers with status {status}"
    if any(isinstance(one, (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)) for one in chain):
        return "the Hub cannot be reached, and no whole copy was fetched before"
    return shortened(str(error), 200) or type(error).__name__


def _why_not_written(error: BaseException) -> str:
    """Why something cannot be written, in a few words."""
    from huggingface_hub import errors

    chain = _chain(error)
    if any(isinstance(one, errors.OfflineModeIsEnabled) for one in chain):
        return "the Hub is switched off by HF_HUB_OFFLINE"
    if any(isinstance(one, errors.HFValidationError) for one in chain):
        return "that is no id of the Hub, which is ORG/NAME"
    if (status := _status(chain)) is not None:
        return _OF_STATUS.get(status, f"the Hub answers with status {status}")
    if any(isinstance(one, (ConnectionError, TimeoutError)) for one in chain):
        return "the Hub cannot be reached"
    return shortened(" ".join(str(error).split()), 200) or type(error).__name__


def _chain(error: BaseException) -> list[BaseException]:
    """An error, and those that it was raised because of."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain


def _status(chain: Iterable[BaseException]) -> int | None:
    """Of the Hub's answer that one of the errors is about."""
    from huggingface_hub import errors

    for one in chain:
        status: int | None = getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(one, errors.HfHubHTTPError) and status is not None:
            return status
    return None


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
