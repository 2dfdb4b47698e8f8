"""The one place that knows Hydra: where the configuration lies, and how an entry point starts and fails."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from guardkit import __version__
from guardkit.artifacts import fingerprint, write_json, written
from guardkit.schema import InputError

if TYPE_CHECKING:
    from guardkit.policy import Policy

_PACKAGE = Path(__file__).resolve().parent
# a wheel carries the configuration inside the package, a checkout beside it
CONF_DIR = next(path for path in (_PACKAGE / "_conf", _PACKAGE.parent / "conf") if path.is_dir())

USER_ERROR = 2
INTERRUPTED = 130
_FINISHED, _ERROR = "finished.json", "error.txt"


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
            is_one_of_many = HydraConfig.get().mode == RunMode.MULTIRUN
            with _readable_errors(), _one_of_many(cfg) if is_one_of_many else nullcontext(True) as wanted:
                missing = sorted(OmegaConf.missing_keys(cfg))
                if missing:
                    raise InputError(f"{', '.join(missing)} must be given, as in {missing[0]}=VALUE; see --help")
                if wanted:
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


@contextmanager
def _one_of_many(cfg: DictConfig) -> Iterator[bool]:
    """Around one job of a multirun: gives False where it is finished already, and keeps its failure from the others.

    A finished job leaves `finished.json` with a hash of its settings in its folder, a failed one `error.txt`.
    """
    folder = output_dir()
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    settings.pop("output_dir", None)
    about = {"settings": fingerprint(settings), "guardkit": __version__}
    done, failed = folder / _FINISHED, folder / _ERROR
    try:
        finished = json.loads(done.read_text(encoding="utf-8")) == about
    except (OSError, ValueError):
        finished = False
    if finished:
        print(f"finished before: {folder}")
        yield False
        return
    failed.unlink(missing_ok=True)
    done.unlink(missing_ok=True)
    try:
        yield True
    except Exception as error:
        text = user_error(error) or "".join(traceback.format_exception(error))
        with written(failed) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        print(f"error: {folder.name}: {text.strip().splitlines()[-1]}", file=sys.stderr)
    else:
        write_json(done, about)


class Failures(Callback):
    """Hydra's callback: says after a multirun which jobs failed, and ends it with status 2 if one did."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Lists them."""
        failed = sorted(Path(str(config.hydra.sweep.dir)).rglob(_ERROR))
        for path in failed:
            print(f"failed: {path.parent}: {path.read_text(encoding='utf-8').strip().splitlines()[-1]}", file=sys.stderr)
        if failed:
            print(f"{len(failed)} job(s) failed; the same command tries them again and leaves out what is finished", file=sys.stderr)
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
        if any("hydra/launcher/submitit" in line for line in lines):
            return 'hydra/launcher=submitit_slurm needs the submitit launcher; pip install "guardkit[slurm]"'
        return "; ".join(lines) + "; see --help for all settings"
    return None


def output_dir() -> Path:
    """Where this job's results go; under multirun, the job's own folder."""
    return Path(HydraConfig.get().runtime.output_dir)


def make(cfg: DictConfig, **objects: Any) -> Any:
    """Builds what a group names. Objects are passed by hand because Hydra would turn a dataclass into a configuration."""
    return hydra.utils.instantiate(cfg, _partial_=True, _convert_="all")(**objects)


def policy(cfg: DictConfig) -> Policy:
    """The user's own file where `policy_file` names one, else the chosen one of conf/policy."""
    from guardkit.policy import Policy

    if cfg.policy_file is None:
        return Policy.from_dict(OmegaConf.to_container(cfg.policy, resolve=True))
    return Policy.load(Path(str(cfg.policy_file)).expanduser())


def cache_dir(cfg: DictConfig) -> Path | None:
    """Where results that are made once are kept; None: in memory."""
    return None if cfg.cache_dir is None else Path(str(cfg.cache_dir)).expanduser()


def compose_group(group: str, name: str, overrides: list[str], *, root: Mapping[str, Any]) -> DictConfig:
    """One choice of a configuration group, composed by itself, with its settings fixed: an unknown one is an error.

    Args:
        group, name: which.
        overrides: as on the command line.
        root: what the choice may interpolate.
    Raises:
        InputError: the group has no such choice.
    """
    choices = sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))
    if name not in choices:
        raise InputError(f"there is no {group} {name!r}; there are {', '.join(choices)}")
    # inside an entry point Hydra is set up already
    ready = GlobalHydra.instance().is_initialized()
    with nullcontext() if ready else hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"), warnings.catch_warnings():
        # a group file is no primary configuration, and says nothing of its place among its defaults
        warnings.filterwarnings("ignore", message=".*missing `_self_`")
        composed = hydra.compose(f"{group}/{name}", overrides)
    with open_dict(composed):
        composed.update(root)
    chosen: DictConfig = composed[group]
    OmegaConf.set_struct(chosen, True)
    return chosen


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _wraps_bug(error: BaseException) -> bool:
    """Whether Hydra only carries somebody else's exception."""
    return any(not isinstance(cause, (HydraException, OmegaConfBaseException, OSError)) for cause in list(_causes(error))[1:])
