"""Lists the packages: everything under `jaxid/`, and the folder `kernels/` as `jaxid.kernels`.

The mapping alone makes `jaxid.kernels` importable, in a wheel and in an editable install. Beside it, the link
`jaxid/kernels` -> `kernels/` is for type checkers and editors, which cannot see such a mapping; nothing is
built through it.
"""

from setuptools import find_packages, setup

KERNELS = ["jaxid.kernels", *(f"jaxid.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=[
        *find_packages(include=["jaxid", "jaxid.*"], exclude=["jaxid.kernels", "jaxid.kernels.*"]),
        *KERNELS,
    ],
    package_dir={"jaxid.kernels": "kernels"},
)
