"""The committed figure is what the networks say today; its shapes are those of a real run."""

import sys
import xml.etree.ElementTree as ElementTree

import torch

from model_enhanced import EnhancedDirectModel
from tests.helpers.runs import run
from tools.architecture_figure import HEIGHT, OUTPUT, WIDTH, Drawing, maps, shapes

SVG = "{http://www.w3.org/2000/svg}"


def test_the_committed_figure_is_what_the_script_draws(tmp_path):
    # In a process of its own: networks without memory must not leave their weights of the lifting in caches.
    done = run([sys.executable, "-m", "tools.architecture_figure", "--output", str(tmp_path / "figure.svg")])
    assert done.returncode == 0, done.stderr
    drawn = (tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert OUTPUT.read_text(encoding="utf-8") == drawn, "run: python -m tools.architecture_figure"


def test_it_is_well_formed_and_nothing_lies_outside():
    root = ElementTree.parse(OUTPUT).getroot()
    boxes = [[float(box.get(k)) for k in ("x", "y", "width", "height")] for box in root.iter(f"{SVG}rect")]
    assert len(boxes) > 25
    assert all(0 <= x < x + w <= WIDTH and 0 <= y < y + h <= HEIGHT for x, y, w, h in boxes)
    words = {text.text for text in root.iter(f"{SVG}text")}
    assert {"X-rays", "Volume 256\u00b3", "512 tokens of 256, 6 blocks", "64 \u00d7 32\u00b3"} <= words


def test_shapes_are_those_that_modules_give():
    settings = {"volume_size": (16, 16, 16), "base_channels": 16, "transformer_blocks": 1}
    found = shapes(EnhancedDirectModel(**settings).train(), torch.zeros(1, 2, 64, 64))
    assert found["encoder.stages.3"] == (2, 64, 4, 4)  # both views; 4 x 16 channels, a sixteenth of 64
    assert found["bottleneck_lift"] == (1, 64, 2, 2, 2)
    assert found["decoder.2"] == ((1, 8, 16, 16, 16), (1, 1, 16, 16, 16))
    assert (maps(found["encoder.stages.3"]), maps(found["bottleneck_lift"])) == (
        "64 \u00d7 4\u00b2",
        "64 \u00d7 2\u00b3",
    )


def test_words_cannot_become_markup():
    drawing = Drawing()
    drawing.text(1, 2, "<a & b>")
    assert drawing.parts == ['<text x="1" y="2" class="small">&lt;a &amp; b&gt;</text>']
