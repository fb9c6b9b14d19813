"""The site: `make docs` builds it into build/docs. A warning is an error."""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Kernels are then objects that need no GPU; Triton reads it when they are imported.
os.environ["TRITON_INTERPRET"] = "1"

project = "fgbg_kd"
author = copyright = "the fgbg_kd authors"
release = re.search(r'version="([^"]+)"', (ROOT / "setup.py").read_text())[1]

extensions = [
    "myst_parser",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["results/*", "api/modules.rst"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # links such as method.md#gate

html_theme = "furo"
html_title = f"fgbg_kd {release}"
html_show_copyright = False

# A page for each module, made when the site is built: docs/api is not committed.
apidoc_modules = [
    {
        "path": str(ROOT / "fgbg_kd"),
        "destination": "api",
        # Kernels, and a file that imports an optional package. Whole paths: Sphinx takes others as
        # relative to docs/, and then they match nothing.
        "exclude_patterns": [
            str(ROOT / "fgbg_kd/*" / x) for x in ("*_triton.py", "yolox_network.py")
        ],
        "separate_modules": True,
        "module_first": True,
        "include_private": False,
        "automodule_options": {"members", "show-inheritance"},
    }
]
# A package lists in __all__ what its modules define: documented once, where it is defined.
autodoc_default_options = {"ignore-module-all": True}
autoclass_content = "both"  # the arguments are in the docstring of __init__
autodoc_inherit_docstrings = False  # not that of nn.Module.forward
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # fields of a NamedTuple are documented once


def plain_docstring(app, what, name, obj, options, lines):
    """Docstrings have formulas in plain text: | and * are no markup, and indentation is layout."""
    for i, line in enumerate(lines):
        parts = re.split(r"(``.*?``|:\w+:`.*?`|\*\*\w.*?\*\*)", line)  # markup at odd places
        parts[::2] = [re.sub(r"(?<!\\)([|*])", r"\\\1", x) for x in parts[::2]]
        lines[i] = "".join(parts)
    blank = [-1, *(i for i, line in enumerate(lines) if not line.strip()), len(lines)]
    for start, end in zip(blank, blank[1:]):
        paragraph = lines[start + 1 : end]
        if not paragraph or re.match(r"\s*([-:>]|\.\. |\\\*)", paragraph[0]):
            continue  # nothing, or a list, a field, a directive, an example
        indents = [len(line) - len(line.lstrip()) for line in paragraph]
        if len(set(indents)) > 1 and not any(re.match(r"\s*:\w", line) for line in paragraph):
            first = " " * min(indents)
            lines[start + 1 : end] = [f"{first}| {line[min(indents) :]}" for line in paragraph]


def setup(app):
    # After napoleon (500), which makes sections out of "Args:".
    app.connect("autodoc-process-docstring", plain_docstring, priority=900)
