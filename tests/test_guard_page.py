"""`app guard=DIR`: what the page shows is what the guard says; nothing is written but verdicts; nobody else gets an answer."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import resource
import shutil
import signal
import time
from contextlib import contextmanager

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import FORKS, call
from commands import _in_a_process as in_a_process
from conftest import picture, strict_json
from PIL import Image
from test_app import browser
from test_serve import NO_IMAGE, PNGS, encoded, make_guard

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

import guardkit
from guardkit import Band, GuardClassifier, InputError, ScenesSource
from guardkit.serving.costs import costs_of
from guardkit.serving.limits import Limits
from guardkit.serving.page import create_page
from guardkit.serving.queue import ModerationQueue


@pytest.fixture(scope="module")
def calibrated(scenes_encoder, scenes_policy, tmp_path_factory):
    """A folder that `calibrate` wrote; its guard blocks some of the pictures, reviews some and allows some."""
    folder = tmp_path_factory.mktemp("page") / "calibrated"
    guard = make_guard(scenes_encoder, scenes_policy)
    guardkit.calibrate(guard, ScenesSource(scenes_policy, n_train=30, n_test=10), max_fpr=0.2, output_dir=folder)
    made = GuardClassifier.from_pretrained(folder / "guard", encoder=scenes_encoder)
    scores = sorted(one.score for one in made.predict(PNGS))
    made.thresholds = guardkit.Thresholds(Band((scores[2] + scores[3]) / 2, (scores[4] + scores[5]) / 2), made.thresholds.categories)
    made.save_pretrained(folder / "guard")
    return folder


@pytest.fixture(scope="module")
def guard(calibrated, scenes_encoder):
    return GuardClassifier.from_pretrained(calibrated / "guard", encoder=scenes_encoder)


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uploads")
    for number, data in enumerate(PNGS):
        (folder / f"<b>{number}.png").write_bytes(data)
    (folder / "broken.png").write_bytes(NO_IMAGE)
    return folder


@pytest.fixture(scope="module")
def decided(guard, uploads, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decided")
    guardkit.moderate(guard, uploads, output_dir=folder)
    return folder


@pytest.fixture
def queue(decided, uploads, guard, tmp_path):
    return ModerationQueue(decided, uploads, guard.policy, tmp_path)


@contextmanager
def page_of(guard, **parts):
    """A client that knows the page's secret, which the page alone tells."""
    with TestClient(create_page(guard, **parts), raise_server_exceptions=False) as client:
        answer = client.get("/")
        client.headers["x-guardkit-page"] = re.search(r'"token": "([\w-]+)"', answer.text)[1]
        yield client, answer


def test_only_the_page_gets_answers_and_it_loads_nothing(guard, queue):
    with page_of(guard, queue=queue) as (client, answer):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        nonce = re.search(r"script-src 'nonce-([\w-]+)';", policy)[1]
        assert re.findall(r"<script[^>]*>", answer.text) == [f'<script nonce="{nonce}">']
        assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', answer.text) == []
        assert answer.headers["cache-control"] == "no-store"
        assert client.get("/").headers["content-security-policy"] != policy  # another one each time
        del client.headers["x-guardkit-page"]
        for method, path in (
            ("get", "/page/queue"),
            ("get", "/page/costs?column=decision&review=0.1&block=0.2"),
            ("get", "/page/picture/0"),
            ("get", "/page/picture/0?key=wrong"),
            ("post", "/page/explain"),
            ("post", "/page/verdict?row=0&verdict=agree&reviewer=ann"),
            ("post", "/page/corrections"),
        ):
            assert getattr(client, method)(path).status_code == 403, path
    with page_of(guard, allowed_hosts=["testserver"]) as (client, _):
        assert client.get("/", headers={"host": "evil.example"}).status_code == 403
        assert client.get("/", headers={"origin": "http://evil.example"}).status_code == 403
    assert not list(queue.folder.iterdir())  # nobody said anything


def test_a_heat_map_is_that_of_explain(guard):
    with page_of(guard) as (client, _):
        name = guard.policy.category_names[1]
        found = client.post(f"/page/explain?category={name}", content=PNGS[0]).json()
        expected = guard.explain(PNGS[0], name)
        assert (found["method"], found["category"]) == (expected.method, name)
        assert found["score"] == pytest.approx(expected.score, abs=1e-6)
        overlay = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["overlay"].partition(",")[2]))).convert("RGB"))
        np.testing.assert_array_equal(overlay, expected.overlay())
        frames = [picture(seed, (64, 64)) for seed in (1, 2)]
        moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
        assert client.post("/page/explain?frame=1", content=moving).status_code == 200
        for query, data, reason in (
            ("?frame=-1", moving, "greater than or equal to 0"),
            ("?frame=2", moving, "it has 2 frames, and none of number 2"),
            ("?category=none", PNGS[0], "none"),
            ("", NO_IMAGE, "not an image"),
            ("", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        ):
            answer = client.post(f"/page/explain{query}", content=data)
            assert (answer.status_code, reason in answer.json()["detail"]) == (422, True)
        assert client.get("/healthz").json() == {"status": "ok"}
    with page_of(guard, limits=Limits(max_pixels=1000)) as (client, _):
        answer = client.post("/page/explain", content=PNGS[0])
        assert (answer.status_code, "the image is too large for a heat map" in answer.json()["detail"]) == (422, True)


def test_drawing_a_heat_map_keeps_nobody_else_waiting(guard, monkeypatch):
    drawn, overlay = [], guardkit.Explanation.overlay

    def noted(explanation):
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()  # there would be one in the thread that answers everybody
        drawn.append(explanation)
        return overlay(explanation)

    monkeypatch.setattr(guardkit.Explanation, "overlay", noted)
    with page_of(guard) as (client, _):
        assert client.post("/page/explain", content=PNGS[0]).status_code == 200
    assert len(drawn) == 1


def test_a_threshold_costs_what_the_calibration_images_say(guard, calibrated):
    costs = costs_of(guard, calibrated)
    figures = strict_json(calibrated / "calibration.json")["columns"]
    with page_of(guard, costs=costs) as (client, _):
        for name in ("decision", guard.policy.category_names[0]):
            band = {"review": figures[name]["review"], "block": figures[name]["block"]}
            found = client.get("/page/costs", params={"column": name, **band}).json()
            assert found["figures"] == figures[name]["on_these_images"]
            assert [one["holds"] for one in found["promises"]] == [True] * len(found["promises"])
        scores = pq.read_table(calibrated / "scores.parquet").to_pandas()
        low = client.get("/page/costs", params={"column": "decision", "review": 0, "block": 0}).json()
        assert low["figures"]["blocked_of_safe"]["value"] == 1
        assert low["figures"]["blocked_of_safe"]["n"] == (scores.label == 0).sum()
        assert [(one["says"][:12], one["holds"]) for one in low["promises"]] == [("at most 0.2 ", False)]
        namespace = {"guard": guard, "Band": Band, "Thresholds": guardkit.Thresholds}
        before = guard.thresholds
        for column in ("decision", guard.policy.category_names[0]):
            line = client.get("/page/costs", params={"column": column, "review": 0.25, "block": 0.5}).json()["line"]
            exec(line, namespace)
            bands = {"decision": guard.thresholds.decision, **guard.thresholds.categories}
            assert bands[column] == Band(0.25, 0.5)
        guard.thresholds = before
        for column, review, block in (("none", 0.1, 0.2), ("decision", 0.3, 0.2), ("decision", -1, 2)):
            assert client.get("/page/costs", params={"column": column, "review": review, "block": block}).status_code == 422
    with page_of(guard) as (client, answer):
        assert client.get("/page/costs?column=decision&review=0.1&block=0.2").status_code == 404
        assert "There are no calibration images beside this guard." in answer.text


def test_the_calibration_of_another_guard_is_not_taken(guard, calibrated, scenes_encoder, scenes_policy, tmp_path, caplog):
    other = make_guard(scenes_encoder, scenes_policy, seed=1)
    with pytest.raises(InputError, match="is the calibration of another guard than this one"):
        costs_of(other, tmp_path, calibrated)
    assert costs_of(other, calibrated / "guard") is None
    assert "another guard" in caplog.text
    with pytest.raises(InputError, match=r"holds no scores\.parquet; give a folder that calibrate wrote"):
        costs_of(guard, calibrated, tmp_path)
    shutil.copy(calibrated / "scores.parquet", tmp_path)
    for text, message in (("{", "is damaged"), ('{"columns": {}, "asked": {}}', "was changed after calibrate wrote it")):
        (tmp_path / "calibration.json").write_text(text)
        with pytest.raises(InputError, match=message):
            costs_of(guard, calibrated, tmp_path)


def test_what_people_say_is_on_disk_at_once_and_becomes_corrections(guard, queue, decided, uploads, tmp_path):
    with page_of(guard, queue=queue) as (client, _):
        found = client.get("/page/queue").json()
        assert [row["id"] for row in found["rows"]] == [row["id"] for row in queue.rows]
        assert (len(found["rows"]), found["n_flagged"]) == (5, 6)  # the broken one is rejected, and not looked at
        for row in found["rows"]:
            image = Image.open(io.BytesIO(client.get(f"/page/picture/{row['row']}?key={client.headers['x-guardkit-page']}").content))
            assert image.size == picture(0).size

        def say(row, verdict, reviewer, category=None):
            query = {"row": row, "verdict": verdict, "reviewer": reviewer} | ({"category": category} if category else {})
            return client.post("/page/verdict", params=query)

        assert say(0, "agree", "ann").json() == {"verdicts": [{"reviewer": "ann", "verdict": "agree", "category": None}]}
        say(1, "overturn", "ann")
        say(1, "unsure", "ann")  # a change of mind
        name = guard.policy.category_names[2]
        assert len(say(0, "wrong_category", "ben", name).json()["verdicts"]) == 2
        lines = [json.loads(line) for line in (tmp_path / "reviews.jsonl").read_text().splitlines()]
        assert [(one["verdict"], one["reviewer"]) for one in lines] == [
            ("agree", "ann"), ("overturn", "ann"), ("unsure", "ann"), ("wrong_category", "ben"),
        ]  # fmt: skip
        for row, verdict, reviewer, category in (
            (99, "agree", "ann", None),
            (-1, "agree", "ann", None),
            (0, "yes", "ann", None),
            (0, "agree", " ", None),
            (0, "agree", "a" * 61, None),
            (0, "agree", "ann", name),
            (0, "wrong_category", "ann", None),
            (0, "wrong_category", "ann", "none"),
        ):
            assert say(row, verdict, reviewer, category).status_code == 422, (row, verdict, reviewer, category)
        assert client.get(f"/page/picture/99?key={client.headers['x-guardkit-page']}").status_code == 404
        changed = uploads / queue.rows[4]["id"]
        before = changed.read_bytes()
        try:
            changed.write_bytes(PNGS[0] if before != PNGS[0] else PNGS[1])
            answer = client.get(f"/page/picture/4?key={client.headers['x-guardkit-page']}")
            assert (answer.status_code, "changed after it was decided" in answer.json()["detail"]) == (404, True)
        finally:
            changed.write_bytes(before)
        assert client.post("/page/corrections").json() == {"safe": 0, "unsafe": 1, "undecided": 1, "missing": 0}
    rows = pq.read_table(tmp_path / "corrections.parquet").to_pylist()
    assert {row["id"]: row["label"] for row in rows} == {queue.rows[0]["id"]: "unsafe", queue.rows[1]["id"]: None}
    # where the disk is full nothing is half written, and it can be said again
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = (tmp_path / "reviews.jsonl").read_bytes()
    with page_of(guard, queue=queue) as (client, _):
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limit[1]))
        try:
            answer = client.post("/page/verdict", params={"row": 3, "verdict": "agree", "reviewer": "ann"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            signal.signal(signal.SIGXFSZ, ignored)
        assert (answer.status_code, "it cannot be written" in answer.json()["detail"]) == (507, True)
        assert (tmp_path / "reviews.jsonl").read_bytes() == before
    # a crash cuts a line short: it is nobody's verdict, and the others are gone on with
    with open(tmp_path / "reviews.jsonl", "a") as file:
        file.write('{"id": "half')
    again = ModerationQueue(decided, uploads, guard.policy, tmp_path)
    assert len(again.to_dict()["rows"][0]["verdicts"]) == 2
    again.add(2, "agree", None, "ann")
    assert len((tmp_path / "reviews.jsonl").read_text().splitlines()) == 5
    assert ModerationQueue(decided, uploads, guard.policy, tmp_path).has_verdicts


def test_a_queue_that_is_none_is_one_line(compose, calibrated, decided, uploads, guard, tmp_path):
    from guardkit.runs.app import run

    given = f"guard={calibrated}"
    for settings, message in (
        ([given, f"queue={decided}"], "queue=DIR, a folder that moderate wrote, and input=..., what it decided over, belong together"),
        ([given, f"queue={tmp_path}", f"input={uploads}"], r"holds no decisions\.parquet; give the folder that moderate wrote"),
        ([given, f"queue={decided}", f"input={tmp_path / 'none'}"], r"input=.* is not there"),
        ([f"guard={tmp_path}"], "holds no guard"),
    ):
        with pytest.raises(InputError, match=message):
            run(compose("app", *settings), tmp_path / "out", announce=print)
    done = call("guardkit.app", "host=0.0.0.0", f"guard={tmp_path}", cwd=tmp_path)
    assert [line.split("; ")[0] for line in done.stderr.splitlines()] == [
        "WARNING: whoever reaches host=0.0.0.0 may see the images and judge under any name, for the page has no password",
        f"error: {tmp_path} holds no guard (no config.json, nor guard/config.json)",
    ]
    done = call("guardkit.app", cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        "error: give pairs=DIR, to judge the pairs of a dataset, or guard=DIR, to try a guard and review its queue, and one of the two",
    )


@pytest.mark.slow
def test_the_page_in_a_real_browser(calibrated, decided, uploads, guard, tmp_path):
    from selenium.webdriver.common.by import By

    decisions = dict(zip(sorted(uploads.iterdir()), guard.predict(sorted(uploads.iterdir())), strict=True))
    by_action = {one.action: path for path, one in decisions.items()}
    said = [tmp_path / "said", tmp_path / "errors"]
    asked = ["guardkit.app", f"guard={calibrated}", f"queue={decided}", f"input={uploads}", "port=0", f"output_dir={tmp_path / 'out'}"]
    process = FORKS.Process(target=in_a_process, args=(asked, None, said, tmp_path, (), dict(os.environ)))
    process.start()
    try:
        with browser(tmp_path / "profile") as reader:
            reader.until(lambda: said[0].exists() and "Ctrl-C" in said[0].read_text(), "the address")
            driver = reader.driver
            driver.get(re.search(r"http://\S+", said[0].read_text())[0])
            driver.find_element(By.ID, "files").send_keys("\n".join(str(by_action[name]) for name in ("allow", "block", "error")))
            cards = lambda: {one.text: one for one in driver.find_elements(By.CSS_SELECTOR, "#found .action")}  # noqa: E731
            reader.until(lambda: set(cards()) == {"allow", "block", "error"}, "three decisions")
            assert len(driver.find_elements(By.CSS_SELECTOR, "#found .veil.shut")) == 1  # what is blocked, until somebody clicks
            driver.find_element(By.XPATH, "//button[contains(., 'what does it come from')]").click()
            reader.until(lambda: "It says where, never how much" in driver.find_element(By.ID, "found").text, "a heat map")
            # the guard's own block threshold was lowered after its calibration
            reader.until(lambda: "no longer promised" in driver.find_element(By.ID, "promised").text, "a broken promise")
            driver.execute_script(
                "const one = document.getElementById('block'); one.value = one.max; one.dispatchEvent(new Event('input'))"
            )
            reader.until(lambda: "still promised" in driver.find_element(By.ID, "promised").text, "the promise")
            body = driver.find_element(By.TAG_NAME, "body")
            body.send_keys("n1")
            reader.until(lambda: "say first who you are" in driver.find_element(By.ID, "count").text, "a complaint")
            driver.find_element(By.ID, "reviewer").send_keys("ann")
            driver.execute_script("document.activeElement.blur()")
            body.send_keys("1")
            reader.until(lambda: "1 of 5 reviewed" in driver.find_element(By.ID, "count").text, "the first verdict")
            body.send_keys("n2")
            reader.until(lambda: "2 of 5 reviewed" in driver.find_element(By.ID, "count").text, "the second verdict")
            assert reader.called() == []
            assert [one for one in driver.get_log("browser") if one["level"] == "SEVERE"] == []
        started = time.monotonic()
        os.kill(process.pid, signal.SIGINT)
        process.join(timeout=30)
        assert (process.exitcode, time.monotonic() - started < 20) == (0, True)
    finally:
        process.kill()
        process.join()
    assert "corrections: 1 safe, 1 unsafe, 0 undecided, 0 missing" in said[0].read_text()
    assert "Traceback" not in said[1].read_text()
    assert {path.name for path in (tmp_path / "out").iterdir() if path.name[0] != "."} == {"reviews.jsonl", "corrections.parquet"}
