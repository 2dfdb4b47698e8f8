"""`export`: ONNX files that give a guard's scores to programs without guardkit; whatever differs is not kept."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, picture
from tiny_models import write_clip

import guardkit
from guardkit import AnchoredHead, Band, GuardClassifier, Head, InputError, JoinedHead, LinearHead, MLPHead, PromptHead, Thresholds
from guardkit import TransformersEncoder as Transformers
from guardkit.folders import MARK
from guardkit.runs.export import run
from guardkit.score_maps import Calibration, ScoreMap

onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")

SNIPPET = re.search(r"^```python\n(import json.*?)^```$", (ROOT / "docs/sharing.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)[1]
SIZES = [(64, 64), (97, 64), (64, 131), (40, 33), (300, 61)]


def every_head(encoder, policy):
    """One of each kind side by side, with random weights."""
    torch.manual_seed(0)
    parts = [replace(policy, categories=policy.categories[i : i + 2]) for i in range(0, 8, 2)]
    parts[-1] = replace(policy, categories=policy.categories[6:])
    whitened = LinearHead(encoder.dim, 2, whitened=True)
    heads = [whitened, AnchoredHead.build(encoder, parts[1]), MLPHead.build(encoder, parts[2]), PromptHead.build(encoder, parts[3])]
    for head in heads:
        for name, value in head.named_parameters():
            if value.ndim > 1 and name != "prompts":
                torch.nn.init.normal_(value, std=0.1)
    whitened.map.normal_(std=0.1)
    return JoinedHead.of(*heads)


@pytest.fixture(scope="module")
def guard(scenes_encoder, scenes_policy):
    knots = np.linspace(-4, 4, 20)
    bent = ScoreMap("isotonic", tuple(knots), tuple(knots / 2 + knots**3 / 20), (0.5, 0.25))
    names = scenes_policy.category_names
    maps = {names[0]: ScoreMap.line("platt", 0.5, 0.2), names[3]: bent}
    made = GuardClassifier(
        every_head(scenes_encoder, scenes_policy),
        scenes_encoder,
        scenes_policy,
        calibration=Calibration(bent, maps, {"promises": ["At most 5 % of safe images are blocked."]}),
        licences={"data": "cc-by-4.0"},
    )
    scores = sorted(one.score for one in made.predict([picture(i, size) for i, size in enumerate(SIZES)]))
    made.thresholds = Thresholds(Band((scores[0] + scores[1]) / 2, (scores[3] + scores[4]) / 2), dict.fromkeys(names, Band.at(0.5)))
    return made


@pytest.fixture(scope="module")
def exported(guard, compose, tmp_path_factory):
    place = tmp_path_factory.mktemp("export")
    saved = guard.save_pretrained(place / "guard")
    return run(compose("export", f"guard={saved}"), place / "exported")


def session_of(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def only_the_mark(folder):
    return {path.name for path in folder.iterdir()} <= {MARK, ".lock"}


# --- the files --------------------------------------------------------------------------------------------------------


def test_both_files_have_a_dynamic_batch_and_say_what_a_program_needs(guard, exported):
    says, files = {}, exported.files
    for part, given in (("head", "embeddings"), ("guard", "pixels")):
        session = session_of(files[part])
        assert [one.name for one in session.get_inputs()] == [given]
        assert [one.name for one in session.get_outputs()] == ["score", "categories"]
        assert all(isinstance(one.shape[0], str) for one in (*session.get_inputs(), *session.get_outputs()))
        namespace = {"session": session}
        exec("import json\n" + SNIPPET.split("\n\n")[2].splitlines()[1], namespace)
        says[part] = namespace["says"]
        assert [(one.domain, one.version) for one in onnx.load(files[part]).opset_import] == [("", 18)]
        # where on this machine the code lies is nobody's business
        assert not re.search(rb"\.py\b|site-packages|stack_trace", files[part].read_bytes())
    assert {name for name in says["head"] if says["head"][name] != says["guard"][name]} == {"input"}
    said = says["guard"]
    assert said["guard"]["fingerprint"] == guard.fingerprint
    assert said["encoder"]["fingerprint"] == guard.encoder.fingerprint
    assert said["policy"] == {"name": guard.policy.name, "digest": guard.policy.digest}
    assert said["categories"] == list(guard.policy.category_names)
    assert said["thresholds"] == guard.thresholds.to_dict()
    assert said["promises"] == ["At most 5 % of safe images are blocked."]
    assert said["licences"] == {"code": "mit", "head": "unknown", "encoder": "mit", "data": "cc-by-4.0"}
    assert guard.encoder.preprocessing.items() <= said["preprocessing"].items()
    assert {path.name for path in exported.folder.iterdir() if path.name[0] != "."} == {"head.onnx", "guard.onnx"}


def test_the_head_alone_gives_the_guards_probabilities_and_nan_where_the_guard_gives_an_error(guard, exported):
    rows = np.random.default_rng(0).standard_normal((9, guard.encoder.dim)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[3], rows[5, 7] = 0, np.nan
    score, categories = session_of(exported.files["head"]).run(None, {"embeddings": rows})
    decided = guard.decide(rows)
    assert [one.action == "error" for one in decided] == [i in (3, 5) for i in range(9)] == np.isnan(score).tolist()
    assert np.isnan(categories[[3, 5]]).all()
    kept = [i for i in range(9) if i not in (3, 5)]
    wanted = guard.probabilities(rows[kept])
    assert np.ptp(wanted, axis=0).min() > 0.01  # the comparison says something
    np.testing.assert_allclose(np.column_stack([score, categories])[kept], wanted, atol=1e-4)


@pytest.fixture(scope="module")
def by_the_docs(exported):
    """`decide` of docs/sharing.md, on the exported guard."""
    namespace = {}
    exec(SNIPPET.replace("exported/guard.onnx", str(exported.files["guard"])), namespace)
    assert "guardkit" not in SNIPPET.replace("guardkit.onnx", "")
    return namespace["decide"]


def test_the_same_image_has_the_same_score_everywhere(guard, by_the_docs, tmp_path):
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from guardkit.serving import create_app

    images = [picture(i, size) for i, size in enumerate(SIZES)]
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    ways = {
        "path": guard.predict(paths),
        "bytes": guard.predict([path.read_bytes() for path in paths]),
        "PIL": guard.predict(images),
        "array": guard.predict([np.asarray(image) for image in images]),
    }
    rows = {name: [(one.action, one.score, dict(one.categories)) for one in decisions] for name, decisions in ways.items()}
    decided = pq.read_table(guardkit.moderate(guard, tmp_path / "images", output_dir=tmp_path / "out").folder / "decisions.parquet")
    table = sorted(decided.to_pylist(), key=lambda row: row["id"])
    names = guard.policy.category_names
    rows["moderate"] = [(one["action"], one["score"], {name: one[name] for name in names}) for one in table]
    with TestClient(create_app(guard)) as client:
        answer = client.post("/v1/moderate", files=[("files", (path.name, path.read_bytes())) for path in paths]).json()["decisions"]
    rows["service"] = [(one["action"], one["score"], one["categories"]) for one in answer]
    rows["onnx, path"] = list(by_the_docs(paths))
    rows["onnx, bytes"] = list(by_the_docs([io.BytesIO(path.read_bytes()) for path in paths]))
    assert {action for action, _, _ in rows["path"]} == {"allow", "review", "block"}
    for name, found in rows.items():
        for (action, score, categories), (wanted, its, theirs) in zip(found, rows["path"], strict=True):
            assert (action, score) == (wanted, pytest.approx(its, abs=1e-4)), name
            assert categories == pytest.approx(theirs, abs=1e-4), name


def test_an_encoder_of_transformers_is_exported_in_float32_and_its_weights_lie_beside_it_where_they_are_large(
    by_the_docs, scenes_policy, tmp_path, monkeypatch, caplog
):
    torch.manual_seed(0)
    (tmp_path / "clip").mkdir()
    write_clip(tmp_path / "clip")
    encoder = Transformers(str(tmp_path / "clip"), device="cpu")
    made = GuardClassifier(MLPHead.build(encoder, scenes_policy), encoder, scenes_policy)
    cast = GuardClassifier(made.head, encoder.going({"dtype": "bfloat16"}), scenes_policy)
    monkeypatch.setattr("guardkit.exporting.onnx_files.LARGEST_FILE", 10_000)
    files = guardkit.export_guard(cast, tmp_path / "out", parts=["guard"]).files
    assert "guard.onnx computes in float32" in caplog.text
    assert list(files) == ["guard"]
    assert (tmp_path / "out/guard.onnx.data").stat().st_size > 10_000
    assert str(tmp_path).encode() not in files["guard"].read_bytes()
    namespace = {}
    exec(SNIPPET.replace("exported/guard.onnx", str(files["guard"])), namespace)
    for i, size in enumerate(SIZES):
        picture(i, size).save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(len(SIZES))]
    wanted = [one.score for one in made.predict(paths)]
    assert [score for _, score, _ in namespace["decide"](paths)] == pytest.approx(wanted, abs=1e-4)


# --- what is not kept -------------------------------------------------------------------------------------------------


class Traced(Head):
    """Says a little more when it is traced than when it is run."""

    def __init__(self, dim: int, n_categories: int, *, more: float = 1e-3):
        super().__init__()
        self.config = {"dim": dim, "n_categories": n_categories, "more": more}
        self.linear = torch.nn.Linear(dim, 1 + n_categories)

    def forward(self, embeddings):
        return self.linear(embeddings) + (self.config["more"] if torch.compiler.is_compiling() else 0)


class Rare(Traced):
    """The same, where all scores are far below the tolerance, as thresholds may be."""

    def __init__(self, dim: int, n_categories: int):
        super().__init__(dim, n_categories, more=0.02)
        self.config = {"dim": dim, "n_categories": n_categories}
        torch.nn.init.constant_(self.linear.bias, -12)

    def forward(self, embeddings):
        return self.linear(embeddings) + (0.02 if torch.compiler.is_compiling() else 0)


class OfTwo(Head):
    """Takes two embeddings at a time, or as many as there were when it was traced."""

    def __init__(self, dim: int, n_categories: int):
        super().__init__()
        self.config = {"dim": dim, "n_categories": n_categories}
        self.linear = torch.nn.Linear(dim, 1 + n_categories)

    def forward(self, embeddings):
        rows = 2 if torch.compiler.is_compiling() else len(embeddings)
        return self.linear(embeddings.reshape(rows, self.config["dim"]))


class Refusing(OfTwo):
    """Looks at numbers to know what to do, which no trace can follow."""

    def forward(self, embeddings):
        return self.linear(embeddings if embeddings.sum() > 0 else -embeddings)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (Traced, r"head of kind test_export:Traced gives other scores in ONNX Runtime than in torch \(in a batch of 1, 0.\d+ instead of 0.\d+, allowed are 0.0001 and 1%\) and is not kept"),
        (Rare, r"test_export:Rare gives other scores .* \(in a batch of 1, \d.\d+e-06 instead of \d.\d+e-06, allowed are 0.0001 and 1%\) and is not kept"),
        (OfTwo, r"head of kind test_export:OfTwo was exported for a fixed batch \(its shapes are \[\[2, 256\], \[2\], \[2, 9\]\]\) and is not kept"),
        (Refusing, "head of kind test_export:Refusing cannot be exported to ONNX .*; use the guard in Python, or train one with a head of guardkit's"),
    ],
)  # fmt: skip
def test_a_head_that_differs_or_freezes_the_batch_leaves_nothing_behind(scenes_encoder, scenes_policy, tmp_path, capfd, head, message):
    torch.manual_seed(0)
    made = GuardClassifier(head(scenes_encoder.dim, len(scenes_policy.categories)), scenes_encoder, scenes_policy)
    with pytest.raises(InputError, match=message) as caught:
        guardkit.export_guard(made, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # the exporter speaks of its own work at length
    assert only_the_mark(tmp_path / "out")


class Foreign:
    """An encoder that is no model of torch."""

    def __init__(self, encoder):
        self.name, self.batch_size = "foreign", encoder.batch_size
        self.dim, self.fingerprint, self.config, self.preprocessing = encoder.dim, encoder.fingerprint, {}, encoder.preprocessing
        self.preprocess, self.encode_preprocessed, self.encode_images = (
            encoder.preprocess,
            encoder.encode_preprocessed,
            encoder.encode_images,
        )


def test_an_encoder_that_torch_cannot_export_is_named_with_what_can_be_done(guard, scenes_encoder, tmp_path):
    made = GuardClassifier(guard.head, Foreign(scenes_encoder), guard.policy)
    with pytest.raises(
        InputError, match=r"encoder foreign is no model that torch could export to ONNX; export the head alone with parts=\[head\]"
    ):
        guardkit.export_guard(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("parts", [[], ["tail"], "head", None])
def test_wrong_parts_are_one_line(guard, tmp_path, parts):
    with pytest.raises(InputError, match="parts must be a list of head and guard, got"):
        guardkit.export_guard(guard, tmp_path / "out", parts=parts)


def test_a_missing_package_and_somebody_elses_folder_are_one_line(guard, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="holds files that guardkit export did not write"):
        guardkit.export_guard(guard, tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr("guardkit.exporting.onnx_files.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(InputError, match=r'^export needs onnxscript; install what is missing with: pip install "guardkit\[onnx\]"$'):
        guardkit.export_guard(guard, tmp_path / "out")
