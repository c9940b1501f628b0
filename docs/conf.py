"""How Sphinx makes the documentation's site: `make docs` builds it into build/docs."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from fedclip_flwr import __version__

project = "fedclip-flwr"
author = "the authors of fedclip-flwr"
version = release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc"]

myst_heading_anchors = 4
myst_links_external_new_tab = False
suppress_warnings = ["myst.strikethrough"]

# The notebook's commands are those of this environment.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
nb_execution_mode = "force"  # the notebook's results are those of this package
nb_execution_in_temp = True
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
default_role = "code"  # as docstrings write names

logging.getLogger("alembic").setLevel(logging.WARNING)  # comes with Flower, and tells of its plugins

html_theme = "furo"
html_title = f"fedclip-flwr {version}"
html_show_sourcelink = False
html_show_copyright = False
html_copy_source = False
