"""The one place that knows Hydra: where the configuration lies, and how an entry point starts and fails."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from guardkit.schema import InputError

_PACKAGE = Path(__file__).resolve().parent
# a wheel carries the configuration inside the package, a checkout beside it
CONF_DIR = next(path for path in (_PACKAGE / "_conf", _PACKAGE.parent / "conf") if path.is_dir())

USER_ERROR = 2
INTERRUPTED = 130


def default_cache_dir() -> str:
    """GUARDKIT_CACHE, else guardkit's folder in the user's cache."""
    root = os.environ.get("GUARDKIT_CACHE")
    return root or str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "guardkit")


def main(config_name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Decorates the function of an entry point.

    The program ends with status 2 and one readable line when the user's input is at fault, and with a traceback when
    the program is.
    """

    def decorate(run: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(run)
        def guarded(cfg: DictConfig) -> None:
            with _readable_errors():
                missing = sorted(OmegaConf.missing_keys(cfg))
                if missing:
                    raise InputError(f"{', '.join(missing)} must be given, as in {missing[0]}=VALUE; see --help")
                run(cfg)

        @functools.wraps(run)
        def start() -> None:
            OmegaConf.register_new_resolver("default_cache_dir", default_cache_dir, replace=True)
            with _readable_errors():
                # Hydra would otherwise print an abridged traceback of its own and exit with 1
                os.environ.setdefault("HYDRA_FULL_ERROR", "1")
                hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(guarded)()

        return start

    return decorate


@contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; what was finished is kept", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        line = user_error(error)
        if line is None or os.environ.get("GUARDKIT_TRACEBACK"):
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(USER_ERROR)


def user_error(error: BaseException) -> str | None:
    """One line for an error that the user can mend, None for one that is ours."""
    for cause in _causes(error):
        if isinstance(cause, InputError):
            return " ".join(str(cause).split())
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.filename is not None:
            return f"{cause.strerror}: {cause.filename}; check the path, its permissions and the space left (output_dir and cache_dir set where results go)"
    if isinstance(error, (HydraException, OmegaConfBaseException)) and not _wraps_bug(error):
        # Hydra's messages hold their options over several lines
        lines = [
            line.strip() for line in str(error).splitlines() if line.strip() and not line.strip().startswith(("full_key", "object_type"))
        ]
        return "; ".join(lines) + "; see --help for all settings"
    return None


def output_dir() -> Path:
    """Where this job's results go; under multirun, the job's own folder."""
    return Path(HydraConfig.get().runtime.output_dir)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _wraps_bug(error: BaseException) -> bool:
    """Whether Hydra only carries somebody else's exception."""
    return any(not isinstance(cause, (HydraException, OmegaConfBaseException, OSError)) for cause in list(_causes(error))[1:])
