"""Settings of Sphinx; `make docs` builds the pages. Nothing is fetched from the network."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import cdmoe_plugin  # noqa: E402

project = "cdmoe_plugin"
release = cdmoe_plugin.__version__
copyright = "The cdmoe_plugin authors. Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "cdmoe_plugin"

# Headings down to this level can be linked to, by the names that GitHub gives them.
myst_heading_anchors = 3
# What is in single backticks in a docstring: a link where it names something of the reference, else code.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say them
smartquotes_action = "D"  # dashes; what stands in quotes is often a value
maximum_signature_line_length = 88

# Files of the repository's root that are also pages here. Links go to the files, so that they work in a checkout.
ROOT_PAGES = {
    "README.md": "index.md",
    "BENCHMARKS.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}


def link_to_pages(app: Any, docname: str, source: list[str], above: str = r"\.\./") -> None:
    """Turn links to files of the repository's root into links to their pages."""
    source[0] = re.sub(rf"\]\({above}(\w+\.md)", lambda found: f"]({ROOT_PAGES[found[1]]}", source[0])


def setup(app: Any) -> None:
    app.connect("source-read", link_to_pages)
    app.connect("include-read", lambda app, path, docname, content: link_to_pages(app, docname, content, above=""))
