"""The house stays in order: quick import, imports that point downward, configuration that resolves."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

import guardkit

LEVELS = {
    "storage": 0, "storage_errors": 0, "local_copies": 0, "publishing": 0,
    "schema": 0, "_entry": 0, "artifacts": 0, "folders": 0, "terminal": 0, "policy": 0, "progress": 0, "reading": 0, "stores": 0, "colour": 0, "limits": 0, "kinds": 0, "hub": 0, "checks": 0, "pages": 0, "charts": 0, "thresholds": 0, "score_maps": 0, "embedding_blocks": 0, "licences": 0, "seen_vectors": 0, "jpeg": 0, "reading_ahead": 0,
    "pixels": 1, "images": 1, "inputs": 1, "scenes": 1, "encoders": 1, "editors": 1, "heads": 1, "metrics": 1, "vlm": 1, "seen": 1, "explaining": 1, "engines": 1,
    "embeddings": 2, "embedding_folder": 2, "counterfactual": 2, "classifier": 2, "guard_folder": 2, "guard_parts": 2, "guard_config": 2, "guard_card": 2, "baselines": 2,
    "data": 3, "integrations": 3, "exporting": 3,
    "evaluation": 4, "moderation": 4, "robustness": 4, "shards": 4,
    "fitting": 5, "serving": 5,
    "efficiency": 6,
    "reports": 7,
    "api": 8,
    "runs": 9,
    "__main__": 10, "_hydra": 10, "train": 10, "finetune": 10, "embed": 10, "fetch": 10, "synthesize": 10, "sweep": 10, "evaluate": 10, "calibrate": 10, "moderate": 10, "export": 10, "serve": 10, "compare": 10, "app": 10,
}  # fmt: skip
# rooms of one level that may lean on each other, with the reason
ALLOWED = {
    ("artifacts", "schema"), ("folders", "schema"), ("folders", "artifacts"), ("policy", "schema"), ("policy", "artifacts"), ("reading", "schema"), ("reading", "artifacts"), ("stores", "schema"), ("kinds", "schema"), ("hub", "schema"), ("kinds", "checks"), ("checks", "schema"), ("thresholds", "schema"), ("licences", "schema"),  # the ground floor
    ("storage", "schema"), ("storage", "artifacts"), ("storage", "storage_errors"), ("storage_errors", "schema"), ("local_copies", "schema"), ("local_copies", "artifacts"), ("local_copies", "storage"), ("local_copies", "storage_errors"), ("local_copies", "checks"), ("local_copies", "terminal"), ("publishing", "schema"), ("publishing", "artifacts"), ("publishing", "folders"), ("publishing", "local_copies"), ("publishing", "storage"), ("publishing", "storage_errors"), ("publishing", "terminal"), ("checks", "storage"), ("policy", "local_copies"), ("policy", "storage"),  # objects in a bucket, and files of theirs here
    ("seen_vectors", "artifacts"), ("seen_vectors", "reading"), ("seen_vectors", "schema"),  # what a guard has seen is a file
    ("limits", "schema"), ("images", "pixels"),  # a file is opened, then its pixels are shown
    ("vlm", "images"),  # images travel as PNG
    ("inputs", "images"),  # whatever it is, the reader reads it
    ("classifier", "embedding_folder"), ("classifier", "guard_folder"), ("guard_folder", "guard_config"), ("guard_folder", "guard_card"), ("guard_folder", "guard_parts"), ("guard_parts", "guard_config"),  # a guard on disk
    ("heads", "encoders"),  # a head may start from texts, which not every encoder reads
    ("encoders", "images"),  # how far two ways of reading are apart is measured on files
    ("encoders", "vlm"),  # a model that sees and speaks is loaded in one way, whether it is asked or looked into
    ("explaining", "encoders"),  # a map is one of what an encoder sees
    ("editors", "scenes"),  # the exact editor belongs to the world it edits
    ("counterfactual", "embeddings"),  # a verifier shares the embeddings of the training
    ("moderation", "shards"), ("evaluation", "shards"),  # what is decided over, or embedded for a benchmark, comes in shards
}  # fmt: skip


def modules():
    return [path for path in (ROOT / "guardkit").rglob("*.py") if "__pycache__" not in path.parts]


def room(path):
    return path.relative_to(ROOT / "guardkit").parts[0].removesuffix(".py")


def imported(path):
    """Full names of what a module imports anywhere in it, `from guardkit import stats` as `guardkit.stats`."""
    files = {".".join(one.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for one in modules()}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in files else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_import_is_light():
    code = "import sys, guardkit; heavy = {'torch', 'lightning', 'open_clip', 'diffusers', 'hydra', 'numpy'} & set(sys.modules); print(sorted(heavy))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_public_names_load():
    for name in guardkit.__all__:
        assert getattr(guardkit, name) is not None
    with pytest.raises(AttributeError, match="it has ARMS, AnchoredHead, Arm, Band, BestHead, CalibrationReport, Category"):
        guardkit.Nothing  # noqa: B018


def test_imports_point_downward():
    wrong = []
    for path in modules():
        mine = room(path)
        if mine == "__init__":
            continue
        for name in imported(path):
            parts = name.split(".")
            if parts[0] != "guardkit" or len(parts) < 2 or parts[1] == mine:
                continue
            theirs = parts[1]
            if LEVELS[theirs] > LEVELS[mine] or (LEVELS[theirs] == LEVELS[mine] and (mine, theirs) not in ALLOWED):
                wrong.append(f"{path.relative_to(ROOT)} (level {LEVELS[mine]}) imports {name} (level {LEVELS[theirs]})")
    assert not wrong


def test_no_module_imports_itself_by_a_detour():
    """Within a room too, and in functions too."""
    graph = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): set(imported(path)) for path in modules() if path.name != "__init__.py"
    }
    circles, done = [], set()

    def follow(name, trail):
        if name in trail:
            circles.append(" -> ".join([*trail[trail.index(name) :], name]))
        elif name in graph and name not in done:
            for other in sorted(graph[name]):
                follow(other, [*trail, name])
            done.add(name)

    for name in sorted(graph):
        follow(name, [])
    assert not circles


def test_heavy_libraries_have_one_place():
    places = {
        "lightning": {"fitting/module.py", "fitting/recipe.py", "data/datamodule.py", "api/train.py", "api/finetune.py"},
        "matplotlib": {"charts.py", "reports/sweep_plots.py", "reports/training_plots.py", "reports/calibration.py"},
        "jinja2": {"pages.py"},
        "openai": {"vlm/endpoint.py", "vlm/outgoing.py"},
        "gradio": {"moderation/review_page.py"},
        "diffusers": {
            "baselines/sd_safety_checker.py",
            "editors/diffusers.py",
            "editors/diffusers_pipelines.py",
            "integrations/safety_checker.py",
        },
        "onnxruntime": {"encoders/onnx.py", "exporting/onnx_files.py"},
        "fastapi": {"serving/app.py", "serving/uploads.py", "serving/page.py", "moderation/review_page.py"},
        "uvicorn": {"serving/server.py", "moderation/review_page.py"},
        "open_clip": {"encoders/open_clip.py"},
        "peft": {"encoders/adapters.py"},
        "ray": {"engines/ray.py", "engines/pools.py"},
        "submitit": {"engines/slurm.py"},
    }
    for path in modules():
        tree = ast.parse(path.read_text())
        imported = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        for library, homes in places.items():
            assert library not in imported or path.relative_to(ROOT / "guardkit").as_posix() in homes, f"{path} imports {library}"


def targets(node):
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "_target_":
                yield value
            else:
                yield from targets(value)


@pytest.mark.parametrize("path", sorted((ROOT / "conf").rglob("*.yaml")), ids=lambda path: path.relative_to(ROOT / "conf").as_posix())
def test_every_target_resolves(path):
    from hydra.utils import get_object

    for target in targets(yaml.safe_load(path.read_text())):
        assert callable(get_object(target))
        group = path.parent.name
        if group in ("encoder", "editor", "instructor", "verifier", "source", "data", "head", "baseline"):
            assert target.startswith("guardkit.")


@pytest.mark.parametrize("path", sorted((ROOT / "conf").glob("*/*.yaml")), ids=lambda path: path.relative_to(ROOT / "conf").as_posix())
def test_group_file_lists_every_argument(path):
    """The YAML is the reference page: no setting of a class of ours is left out."""
    import inspect

    from hydra.utils import get_object

    data = yaml.safe_load(path.read_text())
    target = data.get("_target_", "")
    if not target.startswith("guardkit."):
        pytest.skip("not one of our classes")
    given_by_code = {
        "source": {"policy"},
        "data": {"source", "policy", "store", "pipeline", "seed"},
        "head": {"encoder", "policy"},
        "verifier": {"store", "policy"},
        "baseline": {"policy"},
    }
    parameters = set(inspect.signature(get_object(target)).parameters) - given_by_code.get(path.parent.name, set())
    nested = {one.split("@")[1].split(":")[0] for default in data.get("defaults", []) for one in default}
    assert parameters == (set(data) - {"_target_", "defaults"}) | nested


def test_pages_name_no_missing_file():
    import re

    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"
