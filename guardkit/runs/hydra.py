"""The one place that knows Hydra: where the configuration lies, and how an entry point starts and fails."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from guardkit import __version__
from guardkit.artifacts import brought_along, fingerprint, write_json, written
from guardkit.checks import check_path
from guardkit.folders import FINISHED, LOCK, UNFINISHED, expect, locked, read_mark
from guardkit.local_copies import default_cache_dir, own_temporary_folder
from guardkit.publishing import brought_here, working_folder
from guardkit.runs.errors import user_error
from guardkit.runs.overrides import job_name, mended
from guardkit.runs.signals import end_stopped, is_of_signal, stoppable, was_stopped
from guardkit.schema import InputError
from guardkit.storage import is_url, local_path
from guardkit.terminal import complain, forgiving_streams, one_line, print_nowhere, say

if TYPE_CHECKING:
    from filelock import FileLock

    from guardkit.data.sources.base import Source
    from guardkit.policy import Policy

CONF_DIR = brought_along("conf")

USER_ERROR = 2
_ONLY_PRINT = frozenset({"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i"})
_ERROR, _JOBS = "error.txt", ".jobs"


def _settle_without_home() -> None:
    """Gives libraries that ask for a home directory or a user name one, where the system has none."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(own_temporary_folder())
        os.environ.setdefault("USER", f"uid{os.getuid()}")


# here, because a launcher's processes import this module and run no entry point
OmegaConf.register_new_resolver("default_cache_dir", default_cache_dir, replace=True)
OmegaConf.register_new_resolver("expanduser", os.path.expanduser, replace=True)
OmegaConf.register_new_resolver("working_folder", lambda place: _working_folder(str(place)), replace=True)
OmegaConf.register_new_resolver("job_name", lambda overrides: job_name([str(one) for one in overrides]), replace=True)


def _working_folder(place: str) -> str:
    """Where a run works whose results go to `place`, a path or a URL."""
    return str(working_folder(place)) if is_url(place) else os.path.expanduser(place)


def _check_place(arguments: Sequence[str]) -> None:
    """Refuses an output_dir in object storage before Hydra sees it, which would say so over many lines."""
    for one in arguments:
        name, _, place = one.partition("=")
        place = place.strip("'\"")
        if name == "output_dir" and is_url(place):
            working_folder(place)
            if local_path(place) is None and any(flag in arguments for flag in ("-m", "--multirun")):
                raise InputError(f"a multirun writes into a folder on this machine, got output_dir={place}; give a path, and copy it")


def main(config_name: str, *, brings_results: bool = True) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Decorates the function of an entry point.

    The program ends with status 2 and one readable line when the user's input is at fault, and with a traceback when
    the program is.

    Args:
        config_name: of its root file in conf/.
        brings_results: a URL as output_dir is worked on here and published at the end. False: the command writes there by itself, see `results_place`.
    """

    def decorate(run: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(run)
        def guarded(cfg: DictConfig) -> None:
            _run_job(run, cfg, brings_results)

        @functools.wraps(run)
        def start() -> None:
            if "--version" in sys.argv[1:]:
                print(f"guardkit {__version__}")
                return
            forgiving_streams()
            # Lightning's, at every run. For good: threads that read images meanwhile may give back filters from before `quiet_lightning`
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            with stoppable(), _readable_errors():
                _settle_without_home()
                sys.argv[1:] = mended(sys.argv[1:], CONF_DIR)
                _check_place(sys.argv[1:])
                # Hydra would otherwise print an abridged traceback of its own and exit with 1
                os.environ.setdefault("HYDRA_FULL_ERROR", "1")
                try:
                    hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(guarded)()
                    sys.stdout.flush()
                except BrokenPipeError:
                    if not any(one.split("=")[0] in _ONLY_PRINT for one in sys.argv[1:]):
                        raise
                    print_nowhere()  # as after --help | head: there is nothing else to do

        return start

    return decorate


@contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        end_stopped()
    except SystemExit as ended:
        if is_of_signal(ended):
            end_stopped()
        raise
    except Exception as error:
        if was_stopped():
            end_stopped()  # what was under way failed because it was stopped
        line = user_error(error)
        if line is None or os.environ.get("GUARDKIT_TRACEBACK"):
            raise
        complain(f"error: {line}")
        sys.exit(USER_ERROR)


def _run_job(run: Callable[[DictConfig], None], cfg: DictConfig, brings_results: bool) -> None:
    """One job, alone or of a multirun, in its folder."""
    folder = output_dir()
    is_one_of_many = HydraConfig.get().mode == RunMode.MULTIRUN
    with ExitStack() as stack:
        stack.enter_context(_readable_errors())
        missing = sorted(OmegaConf.missing_keys(cfg))
        about = {"job": "" if missing else fingerprint(settings_of(cfg)), "overrides": list(HydraConfig.get().overrides.task)}
        if is_one_of_many and not stack.enter_context(_one_of_many(folder, about)):
            return
        _expand_home(cfg)
        stack.enter_context(locked(folder, about=about, on_claim=lambda: _write_settings(folder, cfg)))
        if missing:  # in here, so that the folder that Hydra made is taken away
            raise InputError(f"{', '.join(missing)} must be given, as in {missing[0]}=VALUE; see --help")
        if brings_results and is_url(cfg.output_dir):
            stack.enter_context(brought_here(cfg.output_dir))
        run(cfg)


def settings_of(cfg: DictConfig) -> str:
    """All that the results of a configuration may depend on, as a text to compare."""
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    return repr({key: value for key, value in settings.items() if key != "output_dir"})


def _expand_home(node: DictConfig | ListConfig) -> None:
    """Replaces ~ at the beginning of a text by the home directory: the shell does so only at the beginning of a word."""
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        value = node._get_node(key)
        if isinstance(value, (DictConfig, ListConfig)):
            if not value._is_none() and not value._is_missing() and not value._is_interpolation():
                _expand_home(value)
        elif isinstance(text := value._value(), str) and text.startswith("~"):  # type: ignore[union-attr]
            value._set_value(os.path.expanduser(text))  # type: ignore[union-attr]


def _write_settings(folder: Path, cfg: DictConfig) -> None:
    """What Hydra would write before the folder is claimed, and so over the settings of whoever is at work there."""
    place = folder / ".hydra"
    for name, value in (("config", cfg), ("hydra", HydraConfig.instance().cfg), ("overrides", HydraConfig.get().overrides.task)):
        with written(place / f"{name}.yaml") as temporary:
            # a path may hold bytes that are no UTF-8: they are written as they are
            temporary.write_text(OmegaConf.to_yaml(value), encoding="utf-8", errors="surrogateescape")


@contextmanager
def _one_of_many(folder: Path, about: Mapping[str, Any]) -> Iterator[bool]:
    """Around one job of a multirun: gives False where it is finished already, and keeps its failure from the others.

    What became of the job is recorded for the end of the multirun; a failed one leaves `error.txt` in its folder.
    """
    sweep = HydraConfig.get().sweep
    record = Path(str(sweep.dir)) / _JOBS / f"{fingerprint(str(sweep.subdir))[:16]}.json"
    failed = folder / _ERROR
    try:
        mark = read_mark(folder) or {}
    except InputError:
        mark = {}  # the job itself will say so
    if about["job"] and mark.get("state") == FINISHED and (mark.get("job"), mark.get("guardkit")) == (about["job"], __version__):
        say(f"finished before: {folder}")
        write_json(record, {"folder": str(folder), "state": FINISHED})
        yield False
        return
    write_json(record, {"folder": str(folder), "state": UNFINISHED, "error": "it was ended before it could say why"})
    failed.unlink(missing_ok=True)
    try:
        yield True
    except Exception as error:
        if was_stopped():
            raise
        line = user_error(error)
        text = line or "".join(traceback.format_exception(error))
        last = line or one_line(text.strip().splitlines()[-1])
        write_json(record, {"folder": str(folder), "state": UNFINISHED, "error": last})
        with written(failed) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        complain(f"error: {folder.name}: {last}")
    else:
        write_json(record, {"folder": str(folder), "state": FINISHED})


class Jobs(Callback):
    """Hydra's callback around runs. Of a multirun: one at a time in a folder; at the end says which jobs failed, with status 2."""

    def __init__(self) -> None:
        self._lock: FileLock | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A launcher sends its processes the callback, and not the lock: this process alone holds the folder."""
        return {"_lock": None}

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Hydra makes the folder before anything is checked: what it makes is taken away again where nothing is written."""
        expect(Path(str(config.hydra.run.dir)))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Takes the folder, and forgets what earlier multiruns recorded there."""
        from filelock import FileLock, Timeout  # here, because --help locks nothing and shall answer at once

        # Hydra turns an exception of a callback into a warning, and goes on
        with _readable_errors():
            folder = Path(str(config.hydra.sweep.dir))
            mark = read_mark(folder)
            if mark is not None:
                raise InputError(
                    f"{folder} holds the results of guardkit {mark.get('command')}, not of a multirun; choose another output_dir"
                )
            (folder / _JOBS).mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / _JOBS / LOCK)
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise InputError(f"another multirun is at work in {folder}; wait for it, or choose another output_dir") from error
            for path in (folder / _JOBS).glob("*.json"):
                path.unlink()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Lists the failed ones."""
        with _readable_errors():
            paths = sorted((Path(str(config.hydra.sweep.dir)) / _JOBS).glob("*.json"))
            records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
            if self._lock is not None:
                self._lock.release()
            failed = [record for record in records if record["state"] != FINISHED]
            for record in failed:
                complain(f"failed: {record['folder']}: {record['error']}")
            if failed:
                complain(f"{len(failed)} job(s) failed; the same command tries them again and leaves out what is finished")
                sys.exit(USER_ERROR)


def output_dir() -> Path:
    """Where this job's results go; under multirun, the job's own folder."""
    return Path(HydraConfig.get().runtime.output_dir)


def results_place(cfg: DictConfig) -> Path | str:
    """Where a command writes that writes to object storage by itself: the run's folder, or the URL that was given."""
    return str(cfg.output_dir) if is_url(cfg.output_dir) and local_path(cfg.output_dir) is None else output_dir()


def make(cfg: DictConfig, **objects: Any) -> Any:
    """Builds what a group names. Objects are passed by hand because Hydra would turn a dataclass into a configuration."""
    made = factory(cfg)
    _check_fits(cfg, lambda called: called.bind(*made.args, **{**made.keywords, **objects}), made.func)
    return made(**objects)


def make_source(cfg: DictConfig, rules: Policy) -> Source:
    """The source that `cfg.source` names, with `source.corrections` beside it where that is given."""
    given = cfg.source.copy()
    with open_dict(given):
        corrections = given.pop("corrections", None)
    source: Source = make(given, policy=rules)
    if corrections is None:
        return source
    from guardkit.data.sources.corrected import CorrectedSource  # here, because it imports more than --help needs

    return CorrectedSource(source, plain(corrections), rules)


def factory(cfg: DictConfig) -> Any:
    """A function that builds what a group names, of the objects that it is given by name.

    Raises:
        InputError: it does not take the settings that it is given.
    """
    made = hydra.utils.instantiate(cfg, _partial_=True, _convert_="all")
    _check_fits(cfg, lambda called: called.bind_partial(*made.args, **made.keywords), made.func)
    return made


def _check_fits(cfg: DictConfig, bind: Callable[[inspect.Signature], object], called: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(called)
    except (ValueError, TypeError):
        return  # one of those that do not say what they take
    try:
        bind(signature)
    except TypeError as error:
        where = cfg._get_full_key(None) or "_target_"
        raise InputError(f"{where} cannot be built: {cfg._target_} {error}; see the comments in conf/{where}") from error


def plain(value: Any) -> Any:
    """A configuration, or a setting of one, in plain values."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def asked_for(group: str) -> str:
    """What was typed for a group or its settings, the first of it; "" where nothing was."""
    typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return next((one for one in typed if one.lstrip("+").startswith((f"{group}=", f"{group}."))), "")


def policy(cfg: DictConfig) -> Policy:
    """The user's own file where `policy_file` names one, else the chosen one of conf/policy."""
    from guardkit.policy import Policy

    if cfg.policy_file is None:
        return Policy.from_dict(OmegaConf.to_container(cfg.policy, resolve=True))
    return Policy.load(cfg.policy_file if is_url(cfg.policy_file) else check_path("policy_file", cfg.policy_file))


def cache_dir(cfg: DictConfig) -> Path | None:
    """Where results that are made once are kept; None: in memory."""
    return None if cfg.cache_dir is None else check_path("cache_dir", cfg.cache_dir)


def compose_group(group: str, name: str, overrides: list[str], *, root: Mapping[str, Any]) -> DictConfig:
    """One choice of a configuration group, composed by itself, with its settings fixed: an unknown one is an error.

    Args:
        group, name: which, of conf/, of the folder that --config-dir names or of those in hydra.searchpath.
        overrides: as on the command line.
        root: what the choice may interpolate.
    Raises:
        InputError: the group has no such choice.
    """
    # inside an entry point Hydra is set up already, and knows --config-dir; hydra.searchpath it has to be told again
    ready = GlobalHydra.instance().is_initialized()
    given = HydraConfig.get().overrides.hydra if HydraConfig.initialized() else []
    searched = [str(one) for one in given if str(one).startswith("hydra.searchpath=")]
    with nullcontext() if ready else hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        choices = sorted(GlobalHydra.instance().config_loader().get_group_options(group, ObjectType.CONFIG, overrides=searched))
        if name not in choices:
            raise InputError(f"there is no {group} {name!r}; there are {', '.join(choices)}, and --config-dir=DIR adds DIR/{group}")
        composed = hydra.compose(None, [*searched, f"+{group}={name}", *overrides])
    with open_dict(composed):
        composed.update(root)
    chosen: DictConfig = composed[group]
    OmegaConf.set_struct(chosen, True)
    return chosen
