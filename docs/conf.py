"""Sphinx: the documentation. Build it with ``tox -e docs``."""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "arm-kvm"
release = metadata.version("arm-kvm")
extensions = ["myst_parser", "sphinx.ext.autodoc", "arm_kvm_reference.directives"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "arm-kvm"
smartquotes = False

myst_enable_extensions = ["deflist", "fieldlist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
add_module_names = False
