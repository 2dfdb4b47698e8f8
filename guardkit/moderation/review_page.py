"""The review page: one pair at a time in the browser, judged by keys or buttons. Only this module knows Gradio.

The page keeps nothing: every event brings the reviewer's name and the pair that was on the screen when a key was
pressed, so a verdict never lands on a pair that nobody saw, and any number of people may use one page. It is served to
this machine, and neither it nor the server asks anything of another one.
"""

from __future__ import annotations

import base64
import logging
import os
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from guardkit.checks import check_whole
from guardkit.counterfactual.pair_dataset import read_pair_dataset, write_reviews
from guardkit.counterfactual.review import MAX_NAME, MAX_REASON, VERDICTS, ReviewQueue, agreement, image_file, reviewer_name
from guardkit.images import encode_png, read_image
from guardkit.limits import shrink
from guardkit.moderation.draining import Drained
from guardkit.moderation.gate import Gate, page_address
from guardkit.moderation.listening import listener, until_stopped
from guardkit.pages import fragments
from guardkit.schema import ImageError, InputError

log = logging.getLogger(__name__)

_MAX_SIDE_PX = 1600
_HERE = Path(__file__).parent


def review_pairs(folder: Path, *, show: str, reviewer: str | None, host: str, port: int, announce: Callable[[str], None]) -> dict[str, Any]:
    """Lets people judge the pairs of a dataset until the page is ended.

    Args:
        folder: a finished pair dataset. Verdicts are kept in it as they are given; the table follows at the end, and
            at the next start after a crash.
        show: "accepted", "rejected" or "all", see `ReviewQueue`.
        reviewer, host, port, announce: see `serve`.
    Returns:
        The queue's summary: counts and agreement.
    Raises:
        InputError: no such dataset, nothing to show, a folder that cannot be written, or as `serve`.
    """
    if not folder.is_dir():
        raise InputError(f"pairs={folder} is not a folder; give one that python -m guardkit.synthesize wrote")
    if reviewer is not None:
        reviewer = reviewer_name(reviewer)
    check_whole("port", port, 0, 65535)
    if not os.access(folder, os.W_OK):
        raise InputError(f"pairs={folder} cannot be written, and verdicts are kept there; change its permissions")
    queue = ReviewQueue(folder, read_pair_dataset(folder)[0], show=show)
    _follow(folder)
    try:
        serve(queue, title=f"Review of {folder.resolve().name}", reviewer=reviewer, host=host, port=port, announce=announce)
    finally:
        _follow(folder)
    return queue.summary()


def _follow(folder: Path) -> None:
    if not write_reviews(folder):
        log.warning("%s is being written by another process; its column review follows when that ends", folder)


def serve(queue: ReviewQueue, *, title: str, reviewer: str | None, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Shows the page until somebody presses Ctrl-C or ends the process with SIGTERM.

    Args:
        queue: what is to be judged; keeps the verdicts.
        title: of the page.
        reviewer: the name that the page starts with; None: as the browser remembers.
        host: the address to listen at.
        port: the port, or 0 for any free one.
        announce: called with the page's address once it answers.
    Raises:
        InputError: Gradio is not installed, or the address cannot be had.
    """
    try:
        import gradio
        import uvicorn
        from fastapi import FastAPI
    except ImportError as error:
        raise InputError('the review page needs gradio; install it with: pip install "guardkit[app]"') from error

    with listener(host, port, what="the page") as heard:
        # no interactive documentation: it would load scripts from elsewhere
        server = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        page, events = build_page(queue, title=title, reviewer=reviewer)
        gradio.mount_gradio_app(
            server,
            page,
            path="/",
            theme=gradio.themes.Base(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
            css=(_HERE / "review.css").read_text(encoding="utf-8"),
            head=f"<script>{(_HERE / 'review.js').read_text(encoding='utf-8')}</script>",
            footer_links=[],
            run_history=False,  # it would keep every image in the browser's storage
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            pwa=False,
            max_file_size="1kb",
        )
        bound = heard.getsockname()[1]
        # the browser holds a connection open for as long as the page is shown
        settings = uvicorn.Config(Drained(Gate(server, host, bound, events)), log_level="critical", timeout_graceful_shutdown=1)
        announce(page_address(host, bound))
        with until_stopped():
            uvicorn.Server(settings).run(sockets=[heard])


def build_page(queue: ReviewQueue, *, title: str, reviewer: str | None) -> tuple[Any, dict[int, list[Callable[[Any], str | None]]]]:
    """The page's components and what happens at each event, as `gradio.Blocks`, and for each event checks of its inputs."""
    import gradio as gr

    show = Screen(queue, title)

    def quietly(act: Callable[..., Any]) -> Callable[..., Any]:
        """What the reviewer can mend is said on the page, and is no traceback."""

        @wraps(act)
        def acted(*values: Any) -> Any:
            try:
                return act(*values)
            except (InputError, OSError) as error:
                raise gr.Error(str(error), print_exception=False) from error

        return acted

    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        # a fixed key, so that the name is still there after the server was started again; it is no secret
        remembered = gr.BrowserState(reviewer or "", storage_key="guardkit-reviewer", secret="guardkit")
        shown = gr.Textbox(visible=False)
        with gr.Row(elem_id="top"):
            progress = gr.HTML(elem_id="progress")
            name = gr.Textbox(
                label="Reviewer", value=reviewer or "", max_length=MAX_NAME, max_lines=1, elem_id="reviewer", scale=0, min_width=280
            )
        pair = gr.HTML(elem_id="pair")
        with gr.Row(elem_id="verdicts"):
            back = gr.Button("←", elem_id="back", scale=1, min_width=50)
            buttons = {
                verdict: gr.Button(f"{verdict.capitalize()} ({verdict[0].upper()})", elem_id=verdict, scale=3, min_width=120)
                for verdict in VERDICTS
            }
            forward = gr.Button("→", elem_id="forward", scale=1, min_width=50)
            unseen = gr.Button("Next unseen (N)", elem_id="unseen", scale=2, min_width=120)
        reason = gr.Textbox(
            placeholder="A reason, if you like: press e, write it, press Enter, then judge",
            show_label=False,
            container=False,
            max_length=MAX_REASON,
            max_lines=1,
            elem_id="reason",
        )
        said = gr.HTML(elem_id="said")
        agreed = gr.HTML(elem_id="agreement")

        everything = [pair, progress, shown, reason, said, agreed]
        options: dict[str, Any] = {"outputs": everything, "show_progress": "hidden", "api_visibility": "private"}
        for verdict, button in buttons.items():
            judge = quietly(lambda who, here, why, verdict=verdict: show.judge(who, here, verdict, why))
            button.click(judge, [name, shown, reason], **options)
        back.click(quietly(lambda who, here: show.step(who, here, -1)), [name, shown], **options)
        forward.click(quietly(lambda who, here: show.step(who, here, 1)), [name, shown], **options)
        unseen.click(quietly(show.unseen), [name, shown], **options)
        name.blur(
            quietly(lambda who, before: [who, *(show.start(who) if who != before else [gr.skip()] * len(everything))]),
            [name, remembered],
            **(options | {"outputs": [remembered, *everything]}),
        )
        page.load(
            quietly(lambda before: [reviewer or before, *show.start(reviewer or before)]),
            remembered,
            **(options | {"outputs": [name, *everything]}),
        )
    checks = {name: _text, reason: _text, shown: show.unknown, remembered: lambda value: None if value is None else _text(value)}
    return page, {number: [checks[one] for one in event.inputs] for number, event in page.fns.items()}


def _text(value: Any) -> str | None:
    """What is wrong with a text that the page sends."""
    # half a character is no text, and could not be sent back
    if isinstance(value, str) and len(value) <= MAX_REASON and not re.search("[\ud800-\udfff]", value):
        return None
    return f"a name or a reason must be a text of at most {MAX_REASON} whole characters"


class Screen:
    """What the page shows after each event: the pair, the progress, the pair's id, the reason, a message, the agreement.

    Args:
        queue: what is to be judged.
        title: of the page.
    """

    def __init__(self, queue: ReviewQueue, title: str) -> None:
        self.queue, self.title = queue, title
        # Jinja escapes every text that comes from outside
        self._parts: Any = fragments("review.html")

    def unknown(self, pair_id: Any) -> str | None:
        """What is wrong with the pair that an event names."""
        try:
            self.queue.place(pair_id if isinstance(pair_id, str) else "")
        except InputError as error:
            return str(error)
        return None

    def start(self, who: str) -> list[str]:
        """The first pair that this reviewer has not judged."""
        place = self.queue.next_unseen(_plain_name(who))
        return self._show(who, place or 0, "You have judged every pair." if place is None else "")

    def unseen(self, who: str, here: str) -> list[str]:
        """The next pair that this reviewer has not judged."""
        place = self.queue.place(here)
        found = self.queue.next_unseen(_plain_name(who), after=place)
        return self._show(who, place if found is None else found, "You have judged every pair." if found is None else "")

    def step(self, who: str, here: str, by: int) -> list[str]:
        """The pair before or after."""
        return self._show(who, min(max(self.queue.place(here) + by, 0), len(self.queue) - 1))

    def judge(self, who: str, here: str, verdict: str, reason: str) -> list[str]:
        """Keeps a verdict and goes on to the next pair without one; where it cannot be kept, says so and stays."""
        place = self.queue.place(here)
        try:
            if not _plain_name(who):
                raise InputError("type your name first, at the top right")
            self.queue.submit(here, who, verdict, reason)
        except (InputError, OSError) as error:
            return self._show(who, place, f"Not kept: {error}", failed=True, reason=reason)
        found = self.queue.next_unseen(_plain_name(who), after=place)
        done = "" if found is not None else " You have judged every pair."
        return self._show(who, (place + 1) % len(self.queue) if found is None else found, f"Kept: {verdict} of {here}.{done}")

    def _show(self, who: str, place: int, message: str = "", *, failed: bool = False, reason: str | None = None) -> list[str]:
        row, current, name = self.queue.pairs[place], self.queue.reviews(), _plain_name(who)
        mine = current.get(row["pair_id"], {}).get(name)
        seen = sum(name in said for said in current.values())
        parts = [
            self._parts.pair(row, self._picture(row["file_name"]), self._picture(row["edited_file_name"])),
            self._parts.progress(self.title, place, seen, len(self.queue), len(current)),
            self._parts.said(mine, message, failed),
            self._parts.agreement(agreement(current)),
        ]
        pair, progress, said, agreed = map(_literal, parts)
        return [pair, progress, row["pair_id"], (mine.reason if mine else "") if reason is None else reason, said, agreed]

    def _picture(self, name: str) -> dict[str, str]:
        """The image within the page, so that no copy of it lies in a folder of the server's; or why there is none."""
        try:
            image = read_image(image_file(self.queue.folder, name))
        except ImageError as error:
            return {"data": "", "reason": f"no image: {error}"}
        # without loss: people look for what an edit left behind
        data = base64.b64encode(encode_png(shrink(image, _MAX_SIDE_PX))).decode()
        return {"reason": "", "data": f"data:image/png;base64,{data}"}


def _plain_name(who: str) -> str:
    """The name as it is kept; empty while there is none that can be."""
    try:
        return reviewer_name(who)
    except InputError:
        return ""


def _literal(html: str) -> str:
    """Gradio reads an HTML value as a template of two kinds; the marks of both become entities."""
    return str(html).replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;").replace("`", "&#96;")
