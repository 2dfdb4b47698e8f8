"""Pages and charts keep what comes from data as text, and are the same bytes every time."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from jinja2 import UndefinedError

from guardkit.charts import Dot, Line, dot_chart, line_chart
from guardkit.pages import render

NAME = r"<script>alert(1)</script> $\frac{ & 漢"


def charts():
    dots = [(NAME, [Dot(0.5, 0.3, 0.7, 0, NAME), Dot(0.4, None, None, 9, "second")])]
    lines = [
        Line(NAME, [(0, 0), (1, 1)], 0, low=[None, 0.8], high=[None, 1.0], has_dots=True),
        Line("b", [(0, 1), (1, 0)], 11, is_stepped=True),
    ]
    return [
        str(line_chart(lines, label=NAME, x_label=NAME, y_label=NAME, x_ticks=[0, 0.5, 1], diagonal=True)),
        str(dot_chart(dots, label=NAME, x_label=NAME)),
    ]


def test_charts_keep_names_as_text_and_load_nothing():
    for chart in charts():
        assert "<script" not in chart
        assert "&lt;script&gt;" in chart
        assert "url(" not in chart
        assert "<style" not in chart  # it would hold for the whole page
        assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", chart)
        picture = ElementTree.fromstring(chart.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))
        assert picture.find("title").text == picture.get("aria-label") == NAME
        assert NAME in [one.text for one in picture.iter("title") if one is not picture.find("title")]  # said when pointed at


def test_charts_are_the_same_bytes_and_take_the_pages_colours():
    assert charts() == charts()
    for chart in charts():
        assert "var(--c0)" in chart
        assert "var(--muted)" in chart
        assert not re.search("#0000", chart)


def test_a_page_escapes_what_it_is_given_and_names_what_it_lacks():
    values = {"title": NAME, "lead": [f"`{NAME}`"], "picture": "data:,", "picture_says": NAME, "tables": [(NAME, NAME, [NAME], [[NAME]])]}
    page = render("sweep.html", **values)
    assert "<script>alert" not in page
    assert "<code>&lt;script&gt;" in page
    del values["lead"]
    with pytest.raises(UndefinedError, match="lead"):
        render("sweep.html", **values)
