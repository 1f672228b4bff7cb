"""The page: its arrays are those of the contents, it holds everything that it needs, and texts cannot break it."""

import base64
import dataclasses
import html
import io
import json
import re
from pathlib import Path

import numpy as np
import page_contents as pages
import pytest
from PIL import Image

from jaxid.errors import InputError
from jaxid.viewer.content import Item, Run, chips
from jaxid.viewer.page import Page, page, write_page

LIMIT = 5_000_000
"""Bytes of a page beside its pictures."""


@pytest.mark.parametrize("count", [6, 1_500])  # the second one's answers are rounded
def test_arrays_are_those_of_the_run_within_the_stated_rounding(count: int) -> None:
    run = pages.swap(count, 48)
    made = page([run])
    (content,) = pages.manifest(made)["contents"]
    assert run.after is not None and run.texts is not None and run.plane is not None
    for index, values in (
        (content["before"], run.before),
        (content["after"], run.after),
        (content["values"][0]["array"], run.values[0].values),
        (content["plane"]["points"], run.plane.points),
    ):
        stored = pages.array(made, index)
        rounded = values.size > 262_144
        np.testing.assert_allclose(stored, values, rtol=1e-6, atol=1e-6 + rounded * np.ptp(values) / 65_534)
    words = np.array(content["texts"]["distinct"])
    np.testing.assert_array_equal(words[pages.array(made, content["texts"]["before"])], run.texts.before)
    np.testing.assert_array_equal(words[pages.array(made, content["texts"]["after"])], run.texts.after)
    assert content["axes"] == [["condition", ["belief", "noise"]], ["layer", [str(k) for k in range(48)]]]
    assert any(record["kind"] == "fixed" for record in pages.manifest(made)["arrays"]) == (count > 6)


@pytest.mark.parametrize("whole", [0, 262_144])
@pytest.mark.parametrize("values", [[np.nan, 1.0, 2.0], [np.nan, np.nan], [3.0, 3.0]])
def test_numbers_that_are_missing_or_equal(values: list[float], whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxid.viewer.page._WHOLE", whole)
    run = dataclasses.replace(pages.steering(len(values)), after=None)
    before = np.repeat(np.array(values)[:, None, None, None, None], 2, axis=-1)
    made = page([dataclasses.replace(run, before=before)])
    stored = pages.array(made, pages.manifest(made)["contents"][0]["before"])
    np.testing.assert_allclose(stored, before, atol=1e-4)


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    path = write_page(tmp_path / "deep" / "view.html", [pages.swap(), pages.steering(), pages.maps(), pages.geometry()])
    text = path.read_text()
    program = text.replace(pages.part(text, "manifest"), "").replace(pages.part(text, "pictures"), "")
    assert re.findall(r"<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=\"(?!data:)[^\"]*\"", program) == []
    assert "default-src 'none'" in program and "connect-src" not in program
    assert "plotly.js (cartesian" in program


def test_size_beside_the_pictures_of_two_thousand_items() -> None:
    made = page([pages.swap(2_000, 32)])
    assert len(json.loads(pages.part(made, "pictures"))) == 50  # equal pictures are embedded once
    assert len(made.encode()) - len(pages.part(made, "pictures")) < LIMIT


def test_texts_cannot_end_the_data_or_pose_as_parts() -> None:
    evil = "</script><script>alert(1)</script><!-- {{arrays}} {{plotly}} &amp; “x”"
    run = pages.swap(2)
    items = [dataclasses.replace(item, question=evil, tokens=(evil,), edited={}) for item in run.items]
    made = page([dataclasses.replace(run, title=evil, items=items, about={evil: evil})])
    assert "<script>alert" not in made
    assert html.escape(evil) in made  # the title
    (content,) = pages.manifest(made)["contents"]
    assert content["items"]["question"] == [evil, evil] and content["items"]["vocabulary"] == [evil]
    assert made.count("</script>") == page([pages.swap(2)]).count("</script>")


def test_pictures_are_embedded_small() -> None:
    large = Item(key="large", words=("a", "b"), picture=np.zeros((300, 900, 3), np.uint8))
    small = Item(key="small", words=("a", "b"), picture=pages.picture(1))
    run = Run(title="two", items=[large, small], axes={"layer": [0]}, before=np.zeros((2, 1, 2)))
    made = page([run], picture_size=336)
    uris = json.loads(pages.part(made, "pictures"))
    opened = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in uris]
    assert [(one.format, one.size) for one in opened] == [("JPEG", (336, 112)), ("PNG", (24, 24))]
    np.testing.assert_array_equal(np.asarray(opened[1]), pages.picture(1))
    assert pages.manifest(made)["contents"][0]["items"]["picture"] == [0, 1]


def test_tokens_of_a_picture_are_one_chip() -> None:
    texts = ["<s>", "<image>", "<image>", "Is", "star"]
    pictured = [False, True, True, False, False]
    edited = {"words": np.array([4]), "image": np.array([1, 2]), "text": np.array([3, 4, 4])}
    tokens, marks = chips(texts, pictured, edited)
    assert tokens == ("<s>", "[2 picture tokens]", "Is", "star")
    assert marks == {"words": [3], "image": [1], "text": [2, 3]}
    two, _ = chips(["<image>", ",", "<image>"], [True, False, True], {})
    assert two == ("[1 picture tokens]", ",", "[1 picture tokens]")


@pytest.mark.parametrize("field", ["before", "after", "values", "texts"])
def test_arrays_of_another_shape_are_refused(field: str) -> None:
    run = pages.swap()
    assert run.after is not None and run.texts is not None
    wrong = {
        "before": run.before.repeat(3, axis=1),
        "after": run.after[:, :1],
        "values": [dataclasses.replace(run.values[0], values=run.values[0].values[:, :1])],
        "texts": dataclasses.replace(run.texts, after=run.texts.after[:, :, :2]),
    }
    with pytest.raises(InputError, match=r"of belief-swap · test is \[.*its items and axes need \[6, 2, 5\]"):
        dataclasses.replace(run, **{field: wrong[field]})


def test_nothing_to_show_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to show"):
        write_page(tmp_path / "view.html", [])


def test_notebooks_get_the_page_in_a_frame(tmp_path: Path) -> None:
    shown = Page((pages.geometry(),), height=500)
    frame = shown._repr_html_()
    source = re.search(r'srcdoc="([^"]*)"', frame)
    assert source is not None and html.unescape(source[1]) == page(shown.contents)
    assert "height:500px" in frame and repr(shown) == "Page(spatial IDs of tiny)"
    assert shown.save(tmp_path / "a.html").read_text() == page(shown.contents)
