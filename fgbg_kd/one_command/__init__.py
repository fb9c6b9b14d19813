"""One command that takes a slow detector and gives a fast one (tools/distill.py).

This package stands above the core and the experiments. The core never imports it.
"""

from .command import Distilled, distill

__all__ = ["Distilled", "distill"]
