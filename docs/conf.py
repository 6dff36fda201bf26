"""Sphinx configuration: MyST pages, the API from the docstrings, tables from the code."""

import sys
from pathlib import Path

import sdd

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "sdd"
author = "The sdd developers"
release = sdd.__version__
html_title = f"sdd {release}"
html_theme = "furo"
html_copy_source = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docstrings", "tables"]
extensions += ["command_output", "benchmark_results"]
exclude_patterns = ["_build", *(f"studies/*/{name}" for name in ("runs", "configs", "logs", "claims", "tables"))]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

default_role = "literal"  # docstrings write code in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
