"""Nothing is tested on what it was trained on, though the data grew, the split is another, and the images come another way."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import picture
from PIL import Image

from guardkit.artifacts import hash_file
from guardkit.evaluation.benchmark import read_benchmark
from guardkit.evaluation.held_out import leave_out_seen, sentences
from guardkit.evaluation.scoring import Contender, embedding_stores
from guardkit.schema import InputError, Record
from guardkit.seen import SeenImages

N = 14  # pictures of a label


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Class folders of pictures, and the same with twelve more."""
    folder = tmp_path_factory.mktemp("album")
    for number, name in enumerate(("safe", "unsafe")):
        for i in range(N + 6):
            for place in ("before", "after") if i < N else ("after",):
                (folder / place / name).mkdir(parents=True, exist_ok=True)
                picture(100 * number + i, (32, 32)).save(folder / place / name / f"{i:02}.png")
    return folder


def as_folder(place, _, folder):
    return ["source=folder", f"source.root={place}"]


def as_hub(place, _, folder):
    import datasets

    files = sorted(place.rglob("*.png"))
    rows = {"image": [{"bytes": path.read_bytes(), "path": path.name} for path in files], "label": [path.parent.name for path in files]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features)).save_to_disk(folder)
    return ["source=hub", f"source.dataset={folder}"]


def as_parquet(place, _, folder):
    import pyarrow as pa

    files = sorted(place.rglob("*.png"))
    rows = {"image": [{"bytes": path.read_bytes(), "path": path.name} for path in files], "label": [path.parent.name for path in files]}
    folder.mkdir(parents=True)
    pq.write_table(pa.table(rows), folder / "all.parquet", row_group_size=5)
    return ["source=parquet", f"source.files={folder}"]


def as_embeddings(place, compose, folder):
    from guardkit.runs.embed import run as embed_source

    embed_source(compose("embed", "source=folder", f"source.root={place}"), folder)
    return ["source=embeddings", f"source.root={folder}"]


FORMS = {"folder": as_folder, "hub": as_hub, "parquet": as_parquet, "embeddings": as_embeddings}


def named(form, place, ids):
    """What files of the album the ids of a form mean."""
    files = [path.relative_to(place).as_posix() for path in sorted(place.rglob("*.png"))]
    return {files[int(one.split("/")[1])] if form in ("hub", "parquet") else one for one in ids}


@pytest.fixture(scope="module")
def trained(album, compose, tmp_path_factory):
    """trained(form) -> the guard's folder and the files it was tested on, from the smaller album."""
    from guardkit.runs.train import run

    known = {}

    def get(form):
        if form not in known:
            folder = tmp_path_factory.mktemp("trained")
            source = FORMS[form](album / "before", compose, folder / "data")
            cfg = compose("train", "experiment=unpaired", "data.n_unsafe=64", "data.split_seed=3", "trainer.max_epochs=2", *source)
            run(cfg, {}, folder / "run")
            tested = pq.read_table(folder / "run/predictions.parquet").column("id").to_pylist()
            known[form] = folder / "run/guard", named(form, album / "before", tested)
        return known[form]

    return get


@pytest.mark.parametrize("split", ["test", "all"])
@pytest.mark.parametrize(
    ("learned", "tested"),
    [
        ("folder", "folder"),
        ("hub", "hub"),
        ("parquet", "parquet"),
        ("embeddings", "embeddings"),
        ("folder", "hub"),
        ("hub", "parquet"),
        ("parquet", "folder"),
        ("hub", "embeddings"),
        ("embeddings", "folder"),
    ],
)
def test_no_training_image_is_tested(trained, album, compose, tmp_path, learned, tested, split):
    """The album grew by twelve pictures, which changes who is held out, and so does another seed."""
    from guardkit.runs.evaluate import run

    guard, held_out = trained(learned)
    before = {path.relative_to(album / "before").as_posix() for path in (album / "before").rglob("*.png")}
    seen = before - held_out
    assert len(seen) == 20
    source = FORMS[tested](album / "after", compose, tmp_path / "data")
    report = run(compose("evaluate", f"guard={guard}", "n_resamples=100", f"split={split}", *source), tmp_path / "out")
    measured = named(tested, album / "after", pq.read_table(tmp_path / "out/predictions.parquet").column("id").to_pylist())
    assert measured
    assert not measured & seen
    facts = report.summary["benchmark"]
    assert facts["given"] == facts["scored"] + len(facts["rejected"]) + facts["n_seen_left_out"]
    about = report.summary["classifiers"]["unpaired"]
    assert about["n_seen_left_out"] == facts["n_seen_left_out"] > 0
    if split == "all":
        assert facts["n_seen_left_out"] == 20
        assert len(measured) == 20
    by_vectors = "embeddings" in (learned, tested)
    assert about["seen_left_out_by"] == {"embedding" if by_vectors else "content": facts["n_seen_left_out"]}
    sentence = f"{facts['n_seen_left_out']} of {facts['given']} images are left out because the guard was trained or validated on them"
    for text in (report.table, (tmp_path / "out/report.md").read_text(), (tmp_path / "out/report.html").read_text()):
        assert sentence in text


def test_the_split_of_the_training_loses_nothing(trained, album, compose, tmp_path):
    from guardkit.runs.evaluate import run

    guard, held_out = trained("folder")
    source = as_folder(album / "before", compose, None)
    report = run(compose("evaluate", f"guard={guard}", "split_seed=3", "n_resamples=100", *source), tmp_path)
    assert report.summary["benchmark"]["n_seen_left_out"] == 0
    assert report.summary["notes"] == []
    assert set(pq.read_table(tmp_path / "predictions.parquet").column("id").to_pylist()) == held_out


def test_training_images_saved_anew_as_jpeg_are_found(trained, album, compose, tmp_path):
    """No byte and few pixels are the same: the hash of what is seen finds them."""
    from guardkit.runs.evaluate import run

    guard, held_out = trained("folder")
    for path in (album / "before").rglob("*.png"):
        copy = tmp_path / "data" / path.relative_to(album / "before").with_suffix(".jpg")
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").resize((48, 48), Image.Resampling.BICUBIC).save(copy, quality=85)
    source = as_folder(tmp_path / "data", compose, None)
    report = run(compose("evaluate", f"guard={guard}", "split=all", "n_resamples=100", *source), tmp_path / "out")
    assert report.summary["classifiers"]["unpaired"]["seen_left_out_by"] == {"near-duplicate": 20}
    measured = pq.read_table(tmp_path / "out/predictions.parquet").column("id").to_pylist()
    assert set(measured) == {name.replace(".png", ".jpg") for name in held_out}


@pytest.mark.parametrize("made", ["brought along", "on the fly"])
def test_counterfactuals_are_training_images_too(compose, tmp_path, made):
    """Safe images of a data set that were a guard's negatives, under other names and in other bytes."""
    from guardkit.runs.evaluate import run as evaluate
    from guardkit.runs.synthesize import run as synthesize
    from guardkit.runs.train import run as train

    boxes = ["file_name,label,category,x_min,y_min,x_max,y_max"]
    (tmp_path / "photos").mkdir()
    for i in range(N):
        picture(i, (48, 48)).save(tmp_path / f"photos/{i}.png")
        picture(300 + i, (48, 48)).save(tmp_path / f"photos/s{i}.png")
        boxes += [f"{i}.png,unsafe,weapons,0.1,0.1,0.8,0.8", f"s{i}.png,safe,,,,,"]
    (tmp_path / "photos/metadata.csv").write_text("\n".join(boxes) + "\n")
    common = ["policy=handled_objects", "source=folder", f"source.root={tmp_path}/photos", "editor=inpaint"]
    synthesize(compose("synthesize", *common), tmp_path / "pairs")
    if made == "brought along":
        common = ["policy=handled_objects", "source=pairs", f"source.root={tmp_path}/pairs", "editor=none"]
    train(compose("train", "experiment=pairs_aug", "trainer.max_epochs=1", *common), {}, tmp_path / "run")
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    used = metrics["n_counterfactuals"]
    assert used > 5
    stand_in = [note for note in metrics["notes"] if "counterfactuals stand for them" in note]
    assert len(stand_in) == metrics["test"]["safe_images_are_counterfactuals"] == (made == "brought along")
    for i, path in enumerate(sorted((tmp_path / "pairs/images").glob("*_edited.png"))):
        (tmp_path / "album/safe").mkdir(parents=True, exist_ok=True)
        Image.open(path).save(tmp_path / f"album/safe/{i}.jpg", quality=90)
        (tmp_path / "album/unsafe").mkdir(exist_ok=True)
        picture(500 + i).save(tmp_path / f"album/unsafe/{i}.png")
    album = ["policy=handled_objects", "source=folder", f"source.root={tmp_path}/album", "split=all", "n_resamples=100"]
    report = evaluate(compose("evaluate", f"guard={tmp_path}/run", *album), tmp_path / "out")
    assert report.summary["classifiers"]["pairs_aug"]["seen_left_out_by"] == {"near-duplicate": used}


def test_nothing_left_is_one_line(trained, album, compose, tmp_path):
    from guardkit.runs.evaluate import run

    guard, held_out = trained("folder")
    shutil.copytree(album / "before", tmp_path / "data")
    for name in held_out:
        (tmp_path / "data" / name).unlink()
    source = as_folder(tmp_path / "data", compose, None)
    with pytest.raises(
        InputError, match=r"nothing is left to test on: all 20 images .* were used to train or validate a guard \(unpaired 20\)"
    ):
        run(compose("evaluate", f"guard={guard}", "split=all", *source), tmp_path / "out")


def test_a_guard_without_a_list_says_that_nobody_knows(trained, album, compose, tmp_path):
    from guardkit import GuardClassifier
    from guardkit.runs.evaluate import run

    guard = GuardClassifier.from_pretrained(trained("folder")[0])
    guard.training_images = None
    guard.save_pretrained(tmp_path / "older")
    config = json.loads((tmp_path / "older/config.json").read_text())
    assert config["training_images_sha256"] is None
    source = as_folder(album / "before", compose, None)
    report = run(compose("evaluate", f"guard={tmp_path / 'older'}", "n_resamples=100", *source), tmp_path / "out")
    assert "keeps no list of its training images" in report.table
    assert report.summary["classifiers"]["unpaired"]["n_seen_left_out"] is None


def test_the_list_names_every_labelled_image_once(trained, album):
    from guardkit import GuardClassifier

    guard, held_out = trained("folder")
    config = json.loads((guard / "config.json").read_text())
    assert hash_file(guard / "training_images.parquet") == config["training_images_sha256"]
    seen = GuardClassifier.from_pretrained(guard).training_images
    assert (seen.count("train"), seen.count("validation"), seen.count("unlabelled")) == (16, 4, 0)
    assert len(held_out) == 8
    for path in album.rglob("*.png"):
        assert path.name.encode() not in (guard / "training_images.parquet").read_bytes()


def test_images_seen_without_labels_are_counted_and_tested_on(album, compose, tmp_path):
    from guardkit.runs.evaluate import run
    from guardkit.runs.train import run as train

    source = as_folder(album / "before", compose, None)
    settings = ["experiment=unpaired", "head=linear_whitened", "data.n_unsafe=5", "trainer.max_epochs=2", "data.split_seed=3"]
    guard = train(compose("train", *settings, *source), {}, tmp_path / "run").folder / "guard"
    report = run(compose("evaluate", f"guard={guard}", "n_resamples=100", "split=all", *source), tmp_path / "out")
    about = report.summary["classifiers"]["unpaired"]
    assert (about["n_seen_left_out"], about["n_seen_unlabelled"], report.summary["benchmark"]["n"]) == (10, 10, 18)
    assert "unpaired saw 10 of the images without their labels; they are tested on." in report.table


# --- groups, pairs, several guards ------------------------------------------------------------------------------------


class Listed:
    """A source of given records."""

    name, asked = "listed", {}

    def __init__(self, records):
        self.records = records

    def load(self):
        from guardkit.data.sources.base import Loaded

        return Loaded([], self.records, [], len(self.records))


def image(i, label, group=None, **more):
    from guardkit.images import ArrayContent

    content = ArrayContent(np.asarray(picture(i, (16, 16))))
    return Record(f"{i}", label, None, "a", group or f"{i}", content, **more)


def contender(name, encoder, policy, seen):
    from guardkit import GuardClassifier
    from guardkit.heads import LinearHead

    guard = GuardClassifier(LinearHead.build(encoder, policy), encoder, policy)
    return Contender(name, guard, training_images=SeenImages.of([("train", one, None) for one in seen]))


def test_groups_pairs_and_all_guards_alike(scenes_encoder, scenes_policy):
    from guardkit.images import ArrayContent

    twin = ArrayContent(np.asarray(Image.new("RGB", (16, 16), "red")))
    tested = [
        image(0, 1, counterfactuals=(twin,)),
        image(1, 0, "together"),
        image(2, 0, "together"),
        image(3, 1, listed_group="album 7"),
        image(4, 0),
        image(5, 1, counterfactuals=(ArrayContent(np.asarray(Image.new("RGB", (16, 16), "blue"))),)),
    ]
    first = contender("first", scenes_encoder, scenes_policy, [image(0, 1), image(1, 0)])
    second = contender("second", scenes_encoder, scenes_policy, [image(77, 1, listed_group="album 7"), image(1, 0)])
    bare = Contender("bare", first.guard)
    stores = embedding_stores([first], None)
    left, seen = leave_out_seen(read_benchmark(Listed(tested)), [first, second, bare], stores)
    assert [one.id for one in left.records] == ["4", "5"]
    assert ([one.id for one in left.counterfactuals], left.counterfactual_of, left.n_left_out, left.given) == (
        ["5#0#counterfactual"],
        [1],
        4,
        6,
    )
    assert (seen["first"].n, seen["first"].by) == (3, {"content": 2, "group": 1})
    assert (seen["second"].n, seen["second"].by) == (3, {"content": 1, "group": 2})
    assert "bare" not in seen
    (sentence,) = sentences(left, seen)
    assert sentence == (
        "4 of 6 images are left out for all, because a guard was trained or validated on them: "
        "first 3 (2 by content, 1 by group); second 3 (2 by group, 1 by content)."
    )
    # a counterfactual that a guard was trained on takes its original along
    third = contender("third", scenes_encoder, scenes_policy, [Record("x", 0, None, "a", "x", twin)])
    left, _ = leave_out_seen(read_benchmark(Listed(tested)), [third], stores)
    assert [one.id for one in left.records] == ["1", "2", "3", "4", "5"]
    assert len(left.counterfactuals) == 1
