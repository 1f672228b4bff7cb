"""Configuration of the documentation site: `sphinx-build -W --keep-going -b html docs docs/_build/html`."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

from jaxid import __version__  # noqa: E402

project = "jaxid"
author = "the jaxid authors"
copyright = "the jaxid authors"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "jaxid_site",
]
exclude_patterns = ["_build", "_ext", "**/.ipynb_checkpoints"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

# Filled beforehand by `jcache`, which runs notebooks in parallel.
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / ".jupyter_cache")
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

# Docstrings are Markdown in spirit: single backticks are code.
default_role = "code"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_numpy_docstring = False
add_module_names = False
maximum_signature_line_length = 100

# Cells with shell commands are not quite Python; they are highlighted all the same.
suppress_warnings = ["misc.highlighting_failure"]

html_theme = "furo"
html_title = f"jaxid {release}"
html_static_path = ["_static"]
html_css_files = ["jaxid.css"]
html_copy_source = False
html_show_sourcelink = False
copybutton_exclude = ".linenos, .gp, .go"
