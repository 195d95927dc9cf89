"""The Hybrid-ViT diffusion cascade: X-rays -> 64^3 -> 128^3 -> 256^3.

This is the one place that makes ``xray2ct`` and the repository's root modules (``dataset``, ...) importable, from
whatever folder a script is started; everything below just imports them.
"""

import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent

# First on the path: names such as "dataset" and "losses" are common, and an installed package must not win.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
