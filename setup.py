"""Lists the packages, and makes the description that a package index shows.

The packages are everything under `jaxid/`, and the folder `kernels/` as `jaxid.kernels`. The mapping alone makes
`jaxid.kernels` importable, in a wheel and in an editable install. Beside it, the link `jaxid/kernels` -> `kernels/` is
for type checkers and editors, which cannot see such a mapping; nothing is built through it.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

# Folders of data whose names could be packages' names have to be listed too.
DATA = ["jaxid.viewer.assets", "jaxid.zoo.cards"]
KERNELS = ["jaxid.kernels", *(f"jaxid.kernels.{name}" for name in find_packages("kernels"))]


def description() -> str:
    """README.md without pictures, and with the paths of files instead of links: an index has neither of them."""
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^\]]*\]\((?!https?:)[^)]*\)\n\n?", "", text, flags=re.MULTILINE)
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:)([^)]*)\)", r"\1 (`\2`)", text)
    return f"{text}\nThe files named here are in the source distribution.\n"


setup(
    packages=[
        *find_packages(include=["jaxid", "jaxid.*"], exclude=["jaxid.kernels", "jaxid.kernels.*"]),
        *DATA,
        *KERNELS,
    ],
    package_dir={"jaxid.kernels": "kernels"},
    long_description=description(),
    long_description_content_type="text/markdown",
)
