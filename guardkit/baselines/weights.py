"""Untrusted weights of published classifiers: found in a file, a folder or on the Hub, and read without running code.

Safetensors and plain .npy files hold numbers only. Files of torch are read with `weights_only`, which builds tensors and
nothing else. One published head is a pickled numpy array; it goes through an unpickler that knows three names.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from guardkit.hub import hub_folder, is_hub_id
from guardkit.reading import read_array as read_npy
from guardkit.schema import InputError

_SAFETENSORS, _NUMPY, _PICKLES, _TORCH = ".safetensors", ".npy", (".p", ".pkl", ".pickle"), (".pt", ".pth", ".bin")
_FLOATS = ("f2", "f4", "f8")


def locate(baseline: str, weights: str, names: Sequence[str]) -> Path:
    """The file that `weights` means.

    Args:
        baseline: for messages.
        weights: a file, a folder that holds one of `names`, or a Hub id "ORG/NAME" of such a folder.
        names: file names, the preferred one first.
    Raises:
        InputError: there is none.
    """
    return locate_all(baseline, weights, [names])[0]


def locate_all(baseline: str, weights: str, groups: Sequence[Sequence[str]]) -> list[Path]:
    """Like `locate`, for several files of one folder: one per group of names. A bare file will do for a single group."""
    if not isinstance(weights, str) or not weights:
        raise InputError(f"baseline.{baseline}.weights must be a file, a folder or a Hub id ORG/NAME, got {weights!r}")
    path = Path(weights).expanduser()
    if path.is_file() and len(groups) == 1:
        return [path]
    folder = path if path.exists() else weights_folder(baseline, weights, [name for names in groups for name in names])
    if not folder.is_dir():
        raise InputError(f"baseline.{baseline}.weights must be a folder of {len(groups)} files, got the file {weights}")
    found = [next((folder / name for name in names if (folder / name).is_file()), None) for names in groups]
    lacking = [" or ".join(names) for names, file in zip(groups, found, strict=True) if file is None]
    if lacking:
        raise InputError(f"baseline.{baseline}.weights: {weights} holds no {', no '.join(lacking)}; give the file itself or a whole folder")
    return [file for file in found if file is not None]


def weights_folder(baseline: str, weights: str, patterns: Sequence[str]) -> Path:
    """Fetches the files of a Hub id that match, or finds them among those fetched before.

    Raises:
        InputError: not a Hub id, or not to be had.
    """
    if not is_hub_id(weights):
        raise InputError(f"baseline.{baseline}.weights {weights} does not exist; give a file, a folder or a Hub id ORG/NAME")
    return hub_folder(
        weights,
        patterns,
        refusal=f"baseline.{baseline}.weights {weights} is no file or folder here and could not be fetched from the Hub",
        remedy="without a network give a file or folder",
    )


def read_array(path: Path) -> np.ndarray:
    """A float array from .npy, from a .safetensors file with one tensor, from a tensor of torch, or from a pickle that holds nothing else.

    Returns:
        float32.
    Raises:
        InputError: another type of file, a damaged one, or one that holds more than finite numbers.
    """
    suffix = path.suffix.lower()
    if suffix == _SAFETENSORS:
        tensors = read_tensors(path)
        if len(tensors) != 1:
            raise InputError(f"{path} holds {len(tensors)} tensors, expected one")
        array: Any = next(iter(tensors.values())).float().numpy()
    elif suffix == _NUMPY:
        array = read_npy(path, "get the published file anew")
    elif suffix in _TORCH:
        array = _refused(path, lambda: _from_torch(path))
        if isinstance(array, torch.Tensor) and array.is_floating_point():
            tensor = array
            array = _refused(path, lambda: tensor.detach().float().numpy())  # one without its numbers, or sparse
    elif suffix in _PICKLES:
        array = _refused(path, lambda: _unpickle(path))
    else:
        raise InputError(f"{path}: weights must end in {_SAFETENSORS}, {_NUMPY}, {', '.join((*_TORCH, *_PICKLES))}")
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise InputError(f"{path} holds no array of floating-point numbers; get the published file anew")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{path} holds NaN or infinite values, which decide nothing; get the published file anew")
    return array


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Names to tensors, from .safetensors or from a state dict of torch.

    Raises:
        InputError: another type of file, a damaged one, or one that holds more than tensors of finite numbers.
    """
    suffix = path.suffix.lower()
    if suffix == _SAFETENSORS:
        state = _refused(path, lambda: load_file(path))
    elif suffix in _TORCH:
        state = _refused(path, lambda: _from_torch(path))
    else:
        raise InputError(f"{path}: weights must end in {_SAFETENSORS}, {', '.join(_TORCH)}")
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise InputError(f"{path} holds no names with tensors; get the published file anew")
    for name, value in state.items():
        if not _refused(path, partial(_is_finite, value)):
            raise InputError(f"{path}: {name} holds NaN or infinite values, which decide nothing; get the published file anew")
    return dict(state)


def load_into(module: nn.Module, path: Path) -> None:
    """Loads weights that must fit the module name by name.

    Raises:
        InputError: they do not; says which.
    """
    try:
        module.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        raise InputError(f"{path} holds other weights than expected: {' '.join(str(error).split())[:300]}") from error


def _is_finite(value: torch.Tensor) -> bool:
    return bool(value.isfinite().all())


def _refused(path: Path, read: Callable[[], Any]) -> Any:
    """What reading gives; whatever damaged or hostile bytes raise becomes one readable line."""
    try:
        return read()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; give a file, a folder or a Hub id ORG/NAME") from error
    except (SafetensorError, pickle.UnpicklingError, OSError) as error:
        raise InputError(f"{path} was not loaded: {' '.join(str(error).split())[:200]}") from error
    except Exception as error:  # a pickle's opcodes raise anything: EOFError, IndexError, MemoryError, UnicodeDecodeError
        raise InputError(f"{path} was not loaded: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def _from_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own words advise to run what the file asks for
        raise pickle.UnpicklingError("it is damaged, or asks for more than tensors and plain values, which is not run") from error


# numpy keeps the function that its own pickles name private, and has moved it
_RECONSTRUCT = np.empty(0).__reduce__()[0]


def _dtype(name: object, *_: object) -> np.dtype:
    if name not in _FLOATS:
        raise pickle.UnpicklingError(f"an array of {name!r} is refused, only {', '.join(_FLOATS)} are read")
    return np.dtype(str(name), False, True)  # a copy, because the pickle goes on to set its byte order


def _from_buffer(data: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """What numpy's pickles name from protocol 5 on."""
    return np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")


_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Knows what a pickled array of numbers needs, and nothing else: every other name is refused before it is called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and a pickle may hold arrays of numbers only")
        return _KNOWN[module, name]


def _unpickle(path: Path) -> Any:
    with open(path, "rb") as file:
        return _ArrayUnpickler(file).load()
