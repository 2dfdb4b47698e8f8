"""Writing a module of torch as ONNX, and seeing to it that ONNX Runtime gives the same numbers. Knows no guard."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guardkit.artifacts import written
from guardkit.schema import InputError, shortened

OPSET = 18  # what every runtime of the last years reads
TOLERANCE = 1e-4  # of a probability,
_RELATIVE = 0.01  # and this share of it: where unsafe images are rare, thresholds may be below the first
OUTPUTS = ("score", "categories")
_BATCHES = (1, 2, 7)
_MOST_ROWS = 1 << 16  # that a file says it takes at once
LARGEST_FILE = 2_000_000_000  # bytes; protobuf ends at 2 GiB
_NOISY = ("torch", "torch.onnx", "torch.export", "torch.fx", "torch._dynamo", "onnxscript", "onnx_ir")


def check_installed() -> None:
    """Raises InputError where what writes and runs ONNX is missing."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]
    if missing:
        raise InputError(f'export needs {" and ".join(missing)}; install what is missing with: pip install "guardkit[onnx]"')


def write_onnx(
    path: Path,
    module: torch.nn.Module,
    *,
    given: str,
    example: Callable[[int], np.ndarray],
    expected: Callable[[np.ndarray], np.ndarray],
    metadata: Mapping[str, Any],
    what: str,
    instead: str,
) -> float:
    """Exports a module with a dynamic batch, and runs the file beside what it came from; a file that differs is not left there.

    Args:
        path: of the file. Weights of more than 2 GB lie beside it, in a file of its name with `.data` at the end.
        module: one tensor -> a score (n,) and categories (n, k).
        given: name of its input.
        example: number of rows -> inputs, (n, ...) float32.
        expected: inputs -> (n, 1 + k) scores and categories, by torch.
        metadata: names and values in plain JSON types, written as JSON.
        what: it is, for messages.
        instead: what to do where it cannot be exported.
    Returns:
        The largest difference between both, at most `TOLERANCE`, and at most a hundredth of the score.
    Raises:
        InputError: torch cannot export it, its batch is fixed, or ONNX Runtime gives other numbers.
    """
    beside = path.with_name(f"{path.name}.data")
    try:
        with written(path) as temporary:
            try:
                _save(module, example(2), given, metadata, temporary, beside.name)
            except OSError:
                raise  # a disk that is full says nothing of the module
            except Exception as error:  # of torch's tracer, of the exporter, and of the module
                reason = shortened(" ".join(str(error).split()), 200)
                raise InputError(f"{what} cannot be exported to ONNX ({type(error).__name__}: {reason}); {instead}") from error
            return _drift(temporary, given, example, expected, what, instead)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _save(module: torch.nn.Module, example: np.ndarray, given: str, metadata: Mapping[str, Any], path: Path, beside: str) -> None:
    with _quiet():
        from onnxscript import ir

        program = torch.onnx.export(
            module.eval(),
            (torch.from_numpy(example),),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=[given],
            output_names=list(OUTPUTS),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=_MOST_ROWS)},),
        )
        assert program is not None
        model: Any = program.model
        # the exporter notes for every step which line of which file of this machine it came from
        for graph in (model.graph, *model.functions.values()):
            graph.metadata_props.clear()
            for node in graph.all_nodes():
                node.metadata_props.clear()
                node.doc_string = None
            for value in (*graph.inputs, *graph.outputs, *getattr(graph, "initializers", {}).values()):
                value.metadata_props.clear()
        model.metadata_props.clear()
        model.metadata_props.update({name: json.dumps(value, allow_nan=False) for name, value in metadata.items()})
        size = sum(value.numel() * value.element_size() for value in module.state_dict().values())
        ir.save(model, path, external_data=beside if size > LARGEST_FILE else None)


def _drift(
    path: Path,
    given: str,
    example: Callable[[int], np.ndarray],
    expected: Callable[[np.ndarray], np.ndarray],
    what: str,
    instead: str,
) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, which are raised as well
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        shapes = [one.shape for one in (*session.get_inputs(), *session.get_outputs())]
        if not all(isinstance(shape[0], str) for shape in shapes):
            raise InputError(f"{what} was exported for a fixed batch (its shapes are {shapes}) and is not kept; {instead}")
        largest = 0.0
        for n in _BATCHES:
            inputs = example(n)
            score, categories = session.run(list(OUTPUTS), {given: inputs})
            found, wanted = np.column_stack([score, categories]), expected(inputs)
            far = _differences(found, wanted)
            beyond = far / np.minimum(TOLERANCE, _RELATIVE * np.nan_to_num(wanted) + np.finfo(np.float32).tiny)
            if beyond.max() > 1:
                worst = np.unravel_index(beyond.argmax(), beyond.shape)
                raise InputError(
                    f"{what} gives other scores in ONNX Runtime than in torch (in a batch of {n}, {found[worst]:.6g} instead of {wanted[worst]:.6g}, "
                    f"allowed are {TOLERANCE:g} and {_RELATIVE:.0%}) and is not kept; {instead}"
                )
            largest = max(largest, float(far.max()))
        return largest
    except InputError:
        raise
    except Exception as error:  # ONNX Runtime's own, of many classes
        reason = shortened(" ".join(str(error).split()), 200)
        raise InputError(f"{what} was exported, and ONNX Runtime cannot run it ({reason}); {instead}") from error


def _differences(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Between two arrays of probabilities; NaN stands for itself alone."""
    if found.shape != wanted.shape:
        raise ValueError(f"it gives scores of shape {found.shape} instead of {wanted.shape}")
    same = np.where(np.isnan(wanted), 0.0, np.abs(found - wanted))
    return np.where(np.isnan(found) != np.isnan(wanted), np.inf, same)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what exporter and tracer say of their own work; what fails is raised all the same."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.CRITICAL)
    try:
        # what it cannot follow the tracer prints in full
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def unit_vectors(n: int, dim: int) -> np.ndarray:
    """(n, d) float32, always the same."""
    vectors = np.random.default_rng(n).standard_normal((n, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def standardised_pixels(n: int, size: Sequence[int]) -> np.ndarray:
    """(n, 3, height, width) float32 of images in different colours and contrasts, always the same."""
    rng = np.random.default_rng(n)
    colour, contrast = rng.uniform(-1.5, 1.5, (n, 3, 1, 1)), rng.uniform(0, 1, (n, 1, 1, 1))
    return (colour + contrast * rng.standard_normal((n, 3, *size))).astype(np.float32)
