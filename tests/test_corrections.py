"""From the page of `moderate` back into training: reviews, corrections.parquet, `source.corrections`."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import call
from conftest import picture

import guardkit
from guardkit import Band, CorrectedSource, FolderSource, GuardClassifier, InputError, LinearHead, Policy, Thresholds

POLICY = {
    "name": "two",
    "categories": [
        {"name": "red", "definition": "Red.", "unsafe_texts": ["red"]},
        {"name": "blue", "definition": "Blue.", "unsafe_texts": ["blue"]},
    ],
}


def png(seed):
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def policy():
    return Policy.from_dict(POLICY)


@pytest.fixture(scope="module")
def decided(scenes_encoder, policy, tmp_path_factory):
    """Eight images, all of them flagged."""
    place = tmp_path_factory.mktemp("decided")
    (place / "uploads").mkdir()
    for seed in range(8):
        (place / f"uploads/{seed}.png").write_bytes(png(seed))
    torch.manual_seed(0)
    head = LinearHead.build(scenes_encoder, policy)
    torch.nn.init.normal_(head.linear.weight, std=0.1)
    guard = GuardClassifier(head, scenes_encoder, policy, threshold=Thresholds(Band(0.0, 0.5), {"red": Band.at(0.0), "blue": Band.at(0.0)}))
    guardkit.moderate(guard, place / "uploads", output_dir=place / "out")
    return place


@pytest.fixture
def collected(decided, policy, tmp_path):
    """reviews -> (counts, rows by id)"""

    def collect(*people):
        files = []
        for name, said in people:
            files.append(tmp_path / f"{name}.jsonl")
            files[-1].write_text("".join(json.dumps({"id": f"{seed}.png", "reviewer": name, **one}) + "\n" for seed, one in said))
        file = tmp_path / "corrections.parquet"
        counts = guardkit.collect_corrections(decided / "out", files, decided / "uploads", policy, output=file)
        return counts, {row["id"]: row for row in pq.read_table(file).to_pylist()}

    return collect


def test_verdicts_become_labels(decided, collected):
    taken_for = {row["id"]: row["violated"][0] for row in pq.read_table(decided / "out/decisions.parquet").to_pylist()}
    counts, rows = collected(
        (
            "anna",
            [
                (0, {"verdict": "agree"}),
                (1, {"verdict": "overturn"}),
                (2, {"verdict": "wrong_category", "category": "red"}),
                (3, {"verdict": "unsure"}),
            ],
        )
    )
    assert counts == {"safe": 1, "unsafe": 2, "undecided": 1, "missing": 0}
    assert (rows["0.png"]["label"], rows["0.png"]["category"]) == ("unsafe", taken_for["0.png"])
    # an alarm that was overturned looks like what it was taken for
    assert (rows["1.png"]["label"], rows["1.png"]["category"]) == ("safe", taken_for["1.png"])
    assert (rows["2.png"]["label"], rows["2.png"]["category"]) == ("unsafe", "red")
    assert (rows["3.png"]["label"], rows["3.png"]["why"]) == (None, "nobody was sure")
    assert rows["0.png"]["image"]["bytes"] == png(0)


def test_an_image_that_was_changed_since_has_no_verdict(decided, collected):
    file, before = decided / "uploads/0.png", png(0)
    try:
        file.write_bytes(png(1))
        counts, rows = collected(("anna", [(0, {"verdict": "agree"}), (1, {"verdict": "agree"})]))
    finally:
        file.write_bytes(before)
    assert counts == {"safe": 0, "unsafe": 1, "undecided": 0, "missing": 1}
    assert set(rows) == {"1.png"}


def test_several_people_and_their_last_word_count(collected):
    counts, rows = collected(
        (
            "anna",
            [
                (0, {"verdict": "overturn"}),
                (0, {"verdict": "agree"}),
                (1, {"verdict": "agree"}),
                (2, {"verdict": "wrong_category", "category": "red"}),
            ],
        ),
        ("ben", [(0, {"verdict": "agree"}), (1, {"verdict": "overturn"}), (2, {"verdict": "wrong_category", "category": "blue"})]),
    )
    assert counts == {"safe": 0, "unsafe": 2, "undecided": 1, "missing": 0}
    assert (rows["0.png"]["label"], rows["0.png"]["verdicts"]) == ("unsafe", ["anna: agree", "ben: agree"])
    assert (rows["1.png"]["label"], rows["1.png"]["why"]) == (None, "people disagree")
    assert (rows["2.png"]["label"], rows["2.png"]["category"]) == ("unsafe", None)  # they agree that it is unsafe


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "line 1 is no verdict; each line must be JSON with an id and a verdict"),
        ('{"id": "0.png", "verdict": "maybe"}', "line 1 is no verdict"),
        ('{"id": "0.png", "verdict": "wrong_category"}', "says wrong_category without the right one"),
        ('{"id": "0.png", "verdict": "wrong_category", "category": "green"}', "category 'green' is not in policy 'two'"),
        ('{"id": "0.png", "verdict": "agree", "reviewer": "\\ud800"}', "line 1 is no verdict"),
        ('{"id": "gone.png", "verdict": "agree"}', "a review is of 'gone.png', which .* does not have"),
    ],
)
def test_a_wrong_review_is_one_line(decided, policy, tmp_path, line, message):
    (tmp_path / "reviews.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        guardkit.collect_corrections(
            decided / "out", tmp_path / "reviews.jsonl", decided / "uploads", policy, output=tmp_path / "c.parquet"
        )


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("action", None, "lacks the columns action"),
        ("action", ["alow"] * 8, "row 0 has the action 'alow', which is none of allow, review, block, error"),
        ("violated", [1] * 8, "column violated must hold list"),
        ("score", [2.0] * 8, "row 0 has no score with its thresholds in"),
        ("threshold_block", pa.nulls(8, pa.float64()), "row 0 has no score with its thresholds in"),
    ],
)
def test_decisions_that_were_tampered_with_are_one_line(decided, policy, tmp_path, column, values, message):
    table = pq.read_table(decided / "out/decisions.parquet")
    place = table.column_names.index(column)
    pq.write_table(
        table.remove_column(place) if values is None else table.set_column(place, column, pa.array(values)), tmp_path / "decisions.parquet"
    )
    (tmp_path / "reviews.jsonl").write_text('{"id": "0.png", "verdict": "agree"}\n')
    with pytest.raises(InputError, match=message):
        guardkit.collect_corrections(tmp_path, tmp_path / "reviews.jsonl", decided / "uploads", policy, output=tmp_path / "c.parquet")
    assert not (tmp_path / "c.parquet").exists()
    with pytest.raises(InputError, match="is a folder; give the file to write"):
        guardkit.collect_corrections(tmp_path, tmp_path / "reviews.jsonl", decided / "uploads", policy, output=tmp_path)


def test_a_name_with_a_line_separator_can_be_reviewed(decided, policy, tmp_path):
    name = "a\u2028b\x85c.png"  # a browser writes both as they are
    table = pq.read_table(decided / "out/decisions.parquet")
    ids = pa.array([name, *table["id"].to_pylist()[1:]])
    pq.write_table(table.set_column(0, "id", ids), tmp_path / "decisions.parquet")
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / name).write_bytes(png(0))
    (tmp_path / "reviews.jsonl").write_text(json.dumps({"id": name, "verdict": "agree"}, ensure_ascii=False) + "\n", encoding="utf-8")
    counts = guardkit.collect_corrections(tmp_path, tmp_path / "reviews.jsonl", tmp_path / "uploads", policy, output=tmp_path / "c.parquet")
    assert counts == {"safe": 0, "unsafe": 1, "undecided": 0, "missing": 0}


@pytest.fixture
def labelled(tmp_path):
    """A folder that holds image 0 as safe, and others."""
    folder = tmp_path / "labelled"
    for seed, name in ((0, "safe"), (20, "safe"), (21, "safe"), (22, "red"), (23, "blue"), (24, "red")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{seed}.png").write_bytes(png(seed))
    return folder


def test_corrections_join_a_source_and_correct_its_labels(collected, labelled, policy, tmp_path):
    counts, _ = collected(
        ("anna", [(0, {"verdict": "wrong_category", "category": "red"}), (1, {"verdict": "overturn"}), (2, {"verdict": "unsure"})])
    )
    source = CorrectedSource(FolderSource(policy, str(labelled)), tmp_path / "corrections.parquet")
    loaded = source.load()
    by_id = {record.id: record for record in loaded.train}
    assert (by_id["safe/0.png"].label, by_id["safe/0.png"].category) == (1, "red")  # people know better than the folder
    added = [record for record in loaded.train if record.id.startswith("corrections/")]
    assert [record.label for record in added] == [0]
    assert len(loaded.train) == 7
    assert loaded.given == len(loaded.train) + len(loaded.rejected)
    assert counts["undecided"] == len([one for one in loaded.rejected if one.id.startswith("corrections/")]) == 1


def test_a_correction_that_equals_a_test_image_is_not_trained_on(collected, policy, tmp_path):
    """Its label counts in the test; the image stays there."""
    from guardkit.data.grouping import load_source

    collected(("anna", [(0, {"verdict": "overturn"}), (5, {"verdict": "agree"})]))
    records = [picture(seed) for seed in (30, 31)]
    for place in ("train/safe", "train/red", "test/red"):
        (tmp_path / place).mkdir(parents=True)
    for seed, image in zip((30, 31), records, strict=True):
        image.save(tmp_path / f"train/{'safe' if seed == 30 else 'red'}/{seed}.png")
    (tmp_path / "test/red/0.png").write_bytes(png(0))

    class Both:
        name, asked = "both", {"source": "both"}

        def __init__(self):
            self.policy = policy

        def load(self):
            train, test = (FolderSource(policy, str(tmp_path / part)).load() for part in ("train", "test"))
            from dataclasses import replace

            return replace(train, test=test.train, given=train.given + test.given)

    loaded = load_source(CorrectedSource(Both(), tmp_path / "corrections.parquet"))
    assert [(record.id, record.label) for record in loaded.test] == [("red/0.png", 0)]
    assert [record.id for record in loaded.train if record.id.startswith("corrections/")] == ["corrections/corrections.parquet/1"]


def test_they_are_trained_on_before_others_and_never_drawn_for_a_test_set(collected, labelled, policy, scenes_encoder, tmp_path):
    collected(
        ("anna", [(seed, {"verdict": "agree"}) for seed in range(1, 5)] + [(5, {"verdict": "overturn"}), (6, {"verdict": "overturn"})])
    )
    source = CorrectedSource(FolderSource(policy, str(labelled)), tmp_path / "corrections.parquet")
    for seed in range(3):
        fitted = guardkit.train_guard(
            source, policy, encoder=scenes_encoder, head="linear", n_unsafe=4, seed=seed, split_seed=seed, trainer={"max_epochs": 1}
        )
        corrected = [record for record in source.load().train if record.is_corrected]
        seen = fitted.guard.training_images.find(corrected)
        assert len(corrected) == 6
        assert all(one is not None and one.by == "content" for one in seen)


def test_the_command_takes_corrections_with_any_source(collected, labelled, tmp_path):
    collected(("anna", [(0, {"verdict": "agree"}), (1, {"verdict": "overturn"})]))
    (tmp_path / "policy.yaml").write_text(json.dumps(POLICY))
    asked = ["guardkit.embed", "source=folder", f"source.root={labelled}", f"policy_file={tmp_path / 'policy.yaml'}"]
    ran = call(*asked, f"source.corrections={tmp_path / 'corrections.parquet'}", f"output_dir={tmp_path / 'out'}")
    assert ran.returncode == 0, ran.stderr
    assert "given     7" in ran.stdout
    ran = call(*asked, f"source.corrections={tmp_path / 'none.parquet'}", f"output_dir={tmp_path / 'none'}")
    assert (ran.returncode, ran.stderr.count("error: ")) == (2, 1)


def test_what_the_page_saves_can_be_collected(decided, policy, tmp_path):
    """The page itself, in a browser."""
    webdriver = pytest.importorskip("selenium.webdriver")
    import shutil
    import time

    browser, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if browser is None or driver is None:
        pytest.skip("no chromium")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    page = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        page.get((decided / "out/report.html").as_uri())
        body = page.find_element("tag name", "body")
        page.find_element("id", "reviewer").send_keys("Anna B")
        page.execute_script("document.activeElement.blur()")
        for keys in ("n", "2", "n", "1", "n", "4", "n", "p", "4"):  # the third verdict is taken back
            body.send_keys(keys)
        assert page.find_element("id", "count").text == "2 of 8 reviewed, not saved"
        page.find_element("id", "save").click()
        for _ in range(50):
            if (tmp_path / "reviews_Anna_B.jsonl").is_file():
                break
            time.sleep(0.1)
    finally:
        page.quit()
    counts = guardkit.collect_corrections(
        decided / "out", tmp_path / "reviews_Anna_B.jsonl", decided / "uploads", policy, output=tmp_path / "corrections.parquet"
    )
    assert counts == {"safe": 1, "unsafe": 1, "undecided": 0, "missing": 0}
