"""Names of files in manifests: they stay below their folder."""

from pathlib import Path
from typing import Any

import pytest

from jaxid.data.files import inside
from jaxid.errors import DataError


@pytest.mark.parametrize(("name", "found"), [("a.mp4", "a.mp4"), ("b/./c", "b/c"), ("b/../c", "c"), ("..a", "..a")])
def test_names_below_the_folder(name: str, found: str, tmp_path: Path) -> None:
    assert inside(tmp_path, name, "row 1") == tmp_path / found


def test_a_link_that_points_outside_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("here")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    assert inside(tmp_path / "data", "linked/a.txt", "row 1").read_text() == "here"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("..", "leads out of"),
        ("../a.mp4", "leads out of"),
        ("b/../../a.mp4", "leads out of"),
        ("/etc/hostname", "leads out of"),
        ("", "not the name of a file"),
        ("  ", "not the name of a file"),
        (3, "not the name of a file"),
        (None, "not the name of a file"),
        (["a"], "not the name of a file"),
        ("a\0b", "cannot be the name of a file"),
        ("\ud800", "cannot be the name of a file"),
        ("x" * 5000, "cannot be the name of a file"),
    ],
)
def test_names_that_are_refused(name: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^row 7: .*{reason}") as caught:
        inside(tmp_path, name, "row 7")
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
