"""The review page: as it is typed, and as people use it in a real browser."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from conftest import ROOT
from test_review import column, make, queue

from guardkit.counterfactual.review import ReviewLog
from guardkit.data.sources.pairs import PairsSource


def test_texts_from_outside_stay_texts(scenes_policy, tmp_path):
    from guardkit.moderation.review_page import Screen

    here = queue(make(scenes_policy, tmp_path / "d"))
    evil = "<img src=x onerror=alert(1)> {{value}} ${alert(1)} `"
    here.pairs = [dict(row, instruction=evil, category=evil, reason=evil, editor=evil) for row in here.pairs]
    for html in Screen(here, evil).judge("ann", here.pairs[0]["pair_id"], "accept", evil):
        if "<" in html:
            assert not re.search(r"<img src=x|[{}$`]", html)


def test_an_image_that_is_gone_is_said_and_cannot_be_judged(scenes_policy, tmp_path):
    from guardkit.moderation.review_page import Screen

    folder = make(scenes_policy, tmp_path / "d")
    here = queue(folder)
    row = here.pairs[0]
    (folder / row["edited_file_name"]).unlink()
    screen = Screen(here, "title")
    assert "no image: file does not exist" in screen.start("ann")[0]
    assert "cannot be read, so there is nothing to judge" in screen.judge("ann", row["pair_id"], "accept", "")[4]
    assert screen.step("ann", row["pair_id"], 1)[2] == here.pairs[1]["pair_id"]
    here.pairs[1] = dict(here.pairs[1], file_name="../../secret.png")
    assert "path outside the folder" in screen.step("ann", row["pair_id"], 1)[0]


def call(*arguments, **environment):
    command = [sys.executable, "-m", "guardkit.app", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment, timeout=300)


def test_help_is_quick_and_loads_nothing_heavy():
    code = "import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_module('guardkit.app', run_name='__main__')\nexcept SystemExit: pass\nprint([m for m in ('torch', 'gradio', 'pandas', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "reviewer: null" in done.stdout
    assert done.stdout.rstrip().endswith("[]")


def test_wrong_values_are_one_line(scenes_policy, tmp_path):
    folder = make(scenes_policy, tmp_path / "d")
    (tmp_path / "plain").mkdir()
    (tmp_path / "missing" / "gradio").mkdir(parents=True)
    (tmp_path / "missing" / "gradio" / "__init__.py").write_text("raise ImportError('no gradio here')")
    missing = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "missing"), str(ROOT)])}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, environment, message in [
            ([], {}, r"give pairs=DIR, to judge the pairs of a dataset, or guard=DIR, .*, and one of the two"),
            (["pairs=/no/such/folder"], {}, r"pairs=/no/such/folder is not a folder; give one that python -m guardkit.synthesize wrote"),
            ([f"pairs={tmp_path / 'plain'}"], {}, r"plain is no pair dataset: manifest.json is missing"),
            ([f"pairs={folder}", "port=many"], {}, r"port must be a whole number from 0 to 65535, got 'many'"),
            ([f"pairs={folder}", f"port={port}"], {}, rf"cannot listen at host=127.0.0.1 port={port} \(.*in use.*\); choose another port"),
            ([f"pairs={folder}", "port=0"], missing, r'the review page needs gradio; install it with: pip install "guardkit\[app\]"'),
        ]:
            done = call(f"output_dir={tmp_path / 'run'}", *arguments, **environment)
            assert done.returncode == 2, done.stderr
            assert re.fullmatch(rf"error: .*{message}.*", done.stderr.strip()), done.stderr


# every name that the server looks up and every address that it calls is written down
WATCHED = """
import runpy, sys
def watch(event, arguments):
    if event == "socket.connect":
        print("CALLED", arguments[1], file=sys.stderr, flush=True)
    elif event == "socket.getaddrinfo":
        print("LOOKED UP", arguments[0], file=sys.stderr, flush=True)
sys.addaudithook(watch)
sys.argv = ["guardkit.app", *sys.argv[1:]]
runpy.run_module("guardkit.app", run_name="__main__")
"""


@contextmanager
def page(folder, *arguments, end=signal.SIGINT):
    """Runs the page; gives its address and a list that holds what it printed once it has ended."""
    command = [sys.executable, "-c", WATCHED, f"pairs={folder}", "port=0", f"output_dir={folder.parent / 'run'}", *arguments]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    out = []
    try:
        line = running.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert found, line + running.stderr.read()
        yield found[0], out
        running.send_signal(end)
        printed, errors = running.communicate(timeout=120)
        out += [printed, errors]
    finally:
        running.kill()
        running.communicate()
    if end != signal.SIGKILL:
        assert running.returncode == 0, errors
        complaints = [line for line in errors.splitlines() if not re.fullmatch(r"INFO: .*: replaces an earlier run with .* settings", line)]
        assert complaints == []  # nothing was called, looked up, or complained about


@contextmanager
def browser(profile):
    """Headless Chromium; skips where there is none."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("the page is tried in a real browser: install chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    quiet = ["disable-quic", "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync"]
    for flag in ["headless=new", "no-sandbox", "disable-gpu", "window-size=1280,800", f"user-data-dir={profile}", *quiet]:
        options.add_argument(f"--{flag}")
    started = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield Reader(started)
    finally:
        started.quit()


class Reader:
    """What a person does at the page, and what is seen."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, address, pair):
        self.driver.get(address)
        self.sees(pair)

    def find(self, selector):
        return self.driver.execute_script("return document.querySelector(arguments[0])", selector)

    def text(self, selector):
        found = self.find(selector)
        return found.text if found else ""

    def sees(self, pair):
        self.until(lambda: self.find(f'.pair[data-pair="{pair}"]') is not None, f"pair {pair}")

    def until(self, is_so, what):
        deadline = time.monotonic() + 120
        while not is_so():
            assert time.monotonic() < deadline, f"waited for {what}; the page shows {self.find('body').text}"
            time.sleep(0.05)

    def press(self, *keys):
        from selenium.webdriver.common.action_chains import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def blur(self, side):
        """The filter that lies on the original (0) or the edited image (1)."""
        script = "return getComputedStyle(document.querySelectorAll('.pair figure')[arguments[0]].querySelector('img')).filter"
        return self.driver.execute_script(script, side)

    def called(self):
        """Addresses outside of the page's own that the browser asked for."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
        assert any(url.startswith("http://127.0.0.1") for url in urls)
        return [url for url in urls if not url.startswith(("http://127.0.0.1", "data:", "blob:", "chrome"))]


@pytest.mark.slow
def test_two_people_judge_in_a_real_browser(scenes_policy, tmp_path):
    from selenium.webdriver.common.keys import Keys

    folder = make(scenes_policy, tmp_path / "d")
    ids = [row["pair_id"] for row in queue(folder).pairs]
    log = ReviewLog(folder)

    def given():
        return [(one.pair_id, one.reviewer, one.verdict, one.reason) for one in log.read()]

    with browser(tmp_path / "profile") as reader:
        with page(folder, "reviewer=ann") as (address, out):
            reader.open(address, ids[0])
            assert reader.blur(0) != "none"
            assert reader.blur(1) == "none"
            reader.find(".veil").click()
            assert reader.blur(0) == "none"
            reader.press("d")  # the difference of what is shown
            assert reader.find(".difference") is not None
            # a key that is held down gives no verdicts
            reader.driver.execute_script(
                "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'r', repeat: true, bubbles: true}))"
            )
            reader.press("a")
            reader.sees(ids[1])
            assert given() == [(ids[0], "ann", "accept", "")]
            assert reader.blur(0) != "none"  # each original is blurred anew
            reader.press("d")
            assert reader.find(".difference") is None  # which would show what is blurred
            reader.press("s")
            assert reader.blur(0) == "none"
            # letters in the reason are no verdicts
            reader.press("e", "a rare <b>hand</b>", Keys.ENTER, "r")
            reader.sees(ids[2])
            assert given()[1:] == [(ids[1], "ann", "reject", "a rare <b>hand</b>")]
            reader.press(Keys.ARROW_LEFT)
            reader.sees(ids[1])
            assert "You said reject of this pair" in reader.text("#said")
            assert "a rare <b>hand</b>" in reader.text("#said")
            reader.press("u")  # a change of mind; on to the next pair without a verdict
            reader.sees(ids[2])
            reader.press(Keys.ARROW_RIGHT)
            reader.sees(ids[3])
            assert "2 of 4" in reader.text("#progress")
            assert "once two people" in reader.text("#agreement")
        assert re.search(r"reviewed  2 of 4 pairs: 1 accept, 0 reject, 1 unsure", out[0])
        assert out[0].splitlines()[-1] == str(tmp_path / "run")
        assert column(folder) == {ids[0]: "accept", ids[1]: "unsure", ids[2]: None, ids[3]: None}

        with page(folder, "reviewer=ann", end=signal.SIGKILL) as (address, _):
            reader.open(address, ids[2])  # goes on where ann left off
            reader.find("#accept").click()
            reader.sees(ids[3])
        assert given()[-1] == (ids[2], "ann", "accept", "")  # killed, and nothing is lost

        with page(folder, end=signal.SIGTERM) as (address, out):
            reader.open(address, ids[0])
            reader.press("a")  # nobody has said who judges
            reader.until(lambda: "type your name first" in reader.text("#said"), "a complaint")
            assert len(given()) == 4
            reader.find("#reviewer input").click()
            reader.press("bob", Keys.ENTER)
            # the complaint goes when the page knows the name; a key pressed before that would still be nobody's
            reader.until(lambda: "type your name first" not in reader.text("#said"), "bob's page")
            assert "0 of 4" in reader.text("#progress")
            reader.press("a")
            reader.sees(ids[1])
            reader.until(lambda: "ann and bob" in reader.text("#agreement"), "agreement")
            reader.press("r")
            reader.sees(ids[2])
            reader.until(lambda: "2 pairs judged by both" in reader.text("#agreement"), "two pairs")
            assert "50 % agreement" in reader.text("#agreement")
            assert "kappa 0.33" in reader.text("#agreement")
            reader.driver.refresh()
            reader.sees(ids[2])  # the browser remembers bob
            assert "2 of 4" in reader.text("#progress")
        summary = json.loads((tmp_path / "run/agreement.json").read_text())
        assert summary["reviewers"] == {
            "ann": {"accept": 2, "reject": 0, "unsure": 1},
            "bob": {"accept": 1, "reject": 1, "unsure": 0},
        }
        (one,) = summary["agreement"]
        assert (one["reviewers"], one["n"], one["share"]) == (["ann", "bob"], 2, 0.5)
        assert column(folder) == {ids[0]: "accept", ids[1]: "reject", ids[2]: "accept", ids[3]: None}
        assert reader.called() == []
        loaded = PairsSource(scenes_policy, str(folder)).load()
        assert [one.id for one in loaded.rejected] == [ids[1]]


def request(address, method, path, body=None, headers=None):
    """The status, headers and text of one answer."""
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode(errors="replace")
    finally:
        connection.close()


def event(**parts):
    return json.dumps({"data": ["ann"], "fn_index": 7, "trigger_id": 0, "event_data": None, "session_hash": "abc"} | parts)


def without(name):
    parts = json.loads(event())
    del parts[name]
    return json.dumps(parts)


@pytest.fixture(scope="module")
def open_page(scenes_policy, tmp_path_factory):
    """The address of a page and its first pair; the page must have nothing to complain about at the end."""
    folder = make(scenes_policy, tmp_path_factory.mktemp("app") / "d")
    with page(folder) as (address, _):
        yield address, queue(folder).pairs[0]["pair_id"]
    assert not ReviewLog(folder).read()


JSON = {"content-type": "application/json"}


def test_other_origins_get_nothing(open_page):
    address, _ = open_page
    host = address.removeprefix("http://").rstrip("/")
    port = int(host.split(":")[1])
    served = request(address, "GET", "/")
    assert served[0] == 200
    assert "connect-src 'self'" in served[1]["Content-Security-Policy"]
    assert request(address, "GET", "/", headers={"Host": f"localhost:{port}"})[0] == 200
    assert request(address, "GET", "/", headers={"Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"})[0] == 200
    # a link to the page may be followed, and shows the one who clicked it the page
    assert request(address, "GET", "/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"})[0] == 200
    (asset,) = re.findall(r'src="\.?/?(assets/index-[^"]+\.js)"', served[2])[:1]
    assert request(address, "GET", f"/{asset}")[0] == 200
    others = [
        {"Host": "evil.example"}, {"Host": f"evil.example:{port}"}, {"Host": f"127.0.0.1:{port + 1}"}, {"Host": "127.0.0.1"}, {"Host": ""},
        {"Host": f"127.0.0.1.evil.example:{port}"}, {"Origin": "http://evil.example"}, {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{port + 1}"}, {"Origin": f"http://localhost:{port + 1}"}, {"Origin": f"http://localhost:{port}"},
        {"Origin": f"https://{host}"}, {"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "iframe"},
    ]  # fmt: skip
    for headers in others:
        asked = [("GET", "/", None), ("GET", f"/{asset}", None), ("GET", "/gradio_api/queue/data?session_hash=abc", None)]
        for method, path, body in [*asked, ("POST", "/gradio_api/queue/join", event()), ("OPTIONS", "/gradio_api/queue/join", None)]:
            status, answered, text = request(address, method, path, body, JSON | headers)
            assert (status, path == "/" and "<html" in text) == (403, False), (method, path, headers)
            assert not [name for name in answered if name.lower().startswith("access-control-")]


def test_the_page_has_no_routes_but_its_own(open_page):
    address, _ = open_page
    paths = [
        "/gradio_api/upload", "/upload", "/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/gradio_api/file/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/info", "/gradio_api/openapi.json", "/config", "/gradio_api/run/predict",
        "/gradio_api/api/predict", "/gradio_api/call/predict", "/gradio_api/app_id", "/gradio_api/reset", "/gradio_api/cancel", "/monitoring",
        "/gradio_api/heartbeat/abc", "/gradio_api/stream/abc", "/gradio_api/component_server", "/docs", "/openapi.json", "/gradio_api/token",
        "/assets/../../../etc/passwd", "/assets/%2e%2e/%2e%2e/app.py", "/static//etc/passwd", "/login", "/robots.txt", "/svelte/x",
    ]  # fmt: skip
    for path in paths:
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
            assert request(address, method, path, "{}" if method == "POST" else None, JSON)[0] == 404, (method, path)
    for method, path in (("POST", "/"), ("GET", "/gradio_api/queue/join"), ("POST", "/gradio_api/queue/data")):
        assert request(address, method, path, "{}", JSON)[0] == 405, (method, path)
    for query in ("", "?session_hash=", "?session_hash=../x", "?session_hash=" + "a" * 65, "?session_hash=a&session_hash=b", "?a"):
        assert request(address, "GET", f"/gradio_api/queue/data{query}")[0] == 422, query


MALFORMED = [
    (400, ""), (400, "{"), (400, "[" * 50_000), (400, b"\xff\xfe"), (422, "[]"), (422, "null"), (422, "7"), (422, "{}"),
    *[(422, without(name)) for name in ("data", "fn_index", "session_hash")],
    *[(422, event(fn_index=value)) for value in (None, "7", True, 7.0, -1, 8, 10**30, [7], {})],
    *[(422, event(session_hash=value)) for value in (None, 7, "", "../x", "a" * 65, ["abc"])],
    *[(422, event(trigger_id=value)) for value in ("0", -1, 10**30, True, {})],
    *[(422, event(data=value)) for value in (None, "ann", {}, [], ["ann", "bob"], [7], [["ann"]], [{"path": "/etc/passwd"}], ["a" * 1001], ["\ud800"])],
    (422, event(event_data={"x": 1})), (422, event(simple_format=True)), (422, event(batched=True)), (422, event(oauth_token="x")),
    (413, event(data=["a" * 100_000])),
]  # fmt: skip


def test_malformed_events_are_refused_without_a_traceback(open_page):
    """What the page itself sends is taken; the fixture's page must end without a word about the rest."""
    address, pair = open_page
    join = "/gradio_api/queue/join"
    for status, body in MALFORMED:
        assert request(address, "POST", join, body, JSON)[0] == status, body[:80]
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert request(address, "POST", join, event(), {"content-type": kind})[0] == 415, kind
    for who, here, why in (
        ("ann", "nobody", ""),
        ("ann", None, ""),
        ("ann", 7, ""),
        ("ann", pair, None),
        (7, pair, ""),
        ("ann", pair, "e" * 1001),
    ):
        status, _, _ = request(address, "POST", join, event(fn_index=0, data=[who, here, why]), JSON)
        assert status == 422, (who, here, why)
    assert (
        "there is no pair 'nobody' in this queue; reload the page"
        in request(address, "POST", join, event(fn_index=0, data=["ann", "nobody", ""]), JSON)[2]
    )
    assert request(address, "POST", join, event(), JSON)[0] == 200
    assert f'data-pair=\\"{pair}\\"' in request(address, "GET", "/gradio_api/queue/data?session_hash=abc")[2]


@pytest.mark.parametrize(
    ("host", "asked", "status"),
    [
        ("0.0.0.0", "192.168.1.5:7860", 200),
        ("0.0.0.0", f"{socket.gethostname()}:7860", 200),
        ("0.0.0.0", "evil.example:7860", 403),
        ("0.0.0.0", "192.168.1.5:80", 403),
        ("::", "[fe80::1]:7860", 200),
        ("::1", "[::1]:7860", 200),
        ("192.168.1.5", "192.168.1.5:7860", 200),
        ("192.168.1.5", "192.168.1.6:7860", 403),
        ("127.0.0.1", "192.168.1.5:7860", 403),
    ],
)
def test_a_page_for_others_answers_to_names_that_cannot_be_bent(host, asked, status):
    import asyncio

    from guardkit.moderation.gate import Gate

    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"access-control-allow-origin", b"*")]})

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": [(b"host", asked.encode())]}
    asyncio.run(Gate(inner, host, 7860, {})(scope, None, send))
    assert sent[0]["status"] == status
    assert b"access-control-allow-origin" not in dict(sent[0]["headers"])
