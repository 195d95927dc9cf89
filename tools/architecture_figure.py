"""Draw both systems' networks, from the X-rays to the volume, as docs/architecture.svg.

    python -m tools.architecture_figure
    python -m tools.architecture_figure --output figure.svg

Every shape and parameter count is read from the networks themselves, run without memory for their numbers
(``FakeTensorMode``). The picture follows the reader's light or dark setting.
"""

from __future__ import annotations

import html
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hybrid_vit_cascade import PACKAGE
from hybrid_vit_cascade.models import CascadeStage
from hybrid_vit_cascade.settings import load_cascade_config
from hybrid_vit_cascade.training.task import stage_arguments
from model_enhanced import EnhancedDirectModel, RefinementNetwork
from xray2ct.command_line import Parser
from xray2ct.files import atomic_path, run_cli

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "architecture.svg"
CASCADE_CONFIG = PACKAGE / "config" / "progressive_3stage.json"
WIDTH, HEIGHT = 1120, 970
STYLE = """
:root { --ink: #1d2329; --faint: #56616c; --line: #8a96a1; --data: #e4eef8; --net: #fff5dc; --lift: #e5f4e7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e9ee; --faint: #a3afba; --line: #7b8894; --data: #1f3247; --net: #43371a; --lift: #1f3b25; }
}
text { font: 13px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--ink); text-anchor: middle; }
.small { font-size: 12px; fill: var(--faint); }
.head { font-size: 17px; font-weight: 650; text-anchor: start; }
.title { font-weight: 650; }
.start { text-anchor: start; }
rect { stroke: var(--line); stroke-width: 1; }
.data { fill: var(--data); } .net { fill: var(--net); } .lift { fill: var(--lift); }
path { fill: none; stroke: var(--line); stroke-width: 1.5; marker-end: url(#tip); }
.dashed { stroke-dasharray: 5 4; }
#tip path { fill: var(--line); stroke: none; marker-end: none; }
"""


# ------------------------------------------------------------------------------------------------
# Shapes


def shapes(model: nn.Module, *inputs: torch.Tensor) -> dict[str, tuple]:
    """``{module name: shape of what it gives}`` of one run; a tuple of shapes where that is several tensors."""
    found = {}

    def note(name):
        def hook(module, given, result):
            several = isinstance(result, list | tuple) and all(torch.is_tensor(part) for part in result)
            if torch.is_tensor(result):
                found[name] = tuple(result.shape)
            elif several:
                found[name] = tuple(tuple(part.shape) for part in result)

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return found


def millions(model: nn.Module) -> str:
    """Number of parameters in words."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"


def maps(shape: tuple) -> str:
    """``(B, 64, 128, 128)`` -> "64 x 128\u00b2", with the proper sign: channels and size."""
    size, power = shape[-1], {4: "\u00b2", 5: "\u00b3"}[len(shape)]
    return f"{shape[1]} \u00d7 {size}{power}"


def cube(shape: tuple) -> str:
    """``(B, 1, 64, 64, 64)`` -> "64\u00b3"."""
    return f"{shape[-1]}\u00b3"


# ------------------------------------------------------------------------------------------------
# Drawing


class Drawing:
    """Boxes with centred lines of text, and arrows, as SVG elements in the order they were added."""

    def __init__(self):
        self.parts: list[str] = []

    def text(self, x: float, y: float, words: str, style: str = "small") -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{style}">{html.escape(words)}</text>')

    def box(self, kind: str, x: float, y: float, width: float, height: float, *lines: str) -> None:
        """kind: data, net or lift. The first line is bold."""
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7"/>')
        top = y + height / 2 - 8.5 * (len(lines) - 1) + 4.5
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + 17 * number, line, "small" if number else "title")

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        path = " L ".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path{" class=" + chr(34) + "dashed" + chr(34) if dashed else ""} d="M {path}"/>')

    def svg(self, title: str) -> str:
        tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        tip += '<path d="M 0 0 L 8 4 L 0 8 z"/></marker>'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        body = "\n".join(self.parts)
        return (
            f"{head}\n<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n<defs>{tip}</defs>\n{body}\n</svg>\n"
        )


def draw_stage1(drawing: Drawing, top: float) -> None:
    """Encoder down on the left, transformer at the bottom, decoder up on the right, lifting across."""
    model = EnhancedDirectModel().train()
    xrays = torch.zeros(1, 2, 512, 512)
    found = shapes(model, xrays)
    encoded = [found[f"encoder.stages.{n}"] for n in range(4)]
    decoded = [found[f"decoder.{n}"][0] for n in range(3)]
    drawing.text(20, top, f"Stage 1: EnhancedDirectModel, {millions(model)}", "head")
    rows = [top + 24 + 62 * n for n in range(5)]
    drawing.box("data", 20, rows[0], 130, 46, "X-rays", f"PA, lateral; {xrays.shape[-1]}\u00b2")
    drawing.arrow((150, rows[0] + 23), (198, rows[0] + 23))
    for n, shape in enumerate(encoded):
        drawing.box("net", 200, rows[n], 180, 46, f"Encoder {n + 1}", f"{maps(shape)}, each view")
        if n:
            drawing.arrow((290, rows[n - 1] + 46), (290, rows[n] - 2))
    for n, shape in enumerate(decoded):
        row = rows[3 - n]
        source = (380, row + 23)
        drawing.box("lift", 430, row, 150, 46, "Lifting", f"both views to {cube(shape)}")
        drawing.arrow(source, (428, row + 23))
        drawing.arrow((580, row + 23), (628, row + 23))
        drawing.box("net", 630, row, 190, 46, f"Decoder {n + 1}", maps(shape))
        if n:
            drawing.arrow((725, row + 62), (725, row + 48))
        drawing.arrow((820, row + 23), (878, row + 23))
    tokens = found["transformer.0"]
    grid = found["bottleneck_lift"]
    drawing.box("lift", 200, rows[4], 180, 46, "Lifting", f"both views to {maps(grid)}")
    drawing.arrow((290, rows[3] + 46), (290, rows[4] - 2))
    words = f"{tokens[1]} tokens of {tokens[2]}, {len(model.transformer)} blocks"
    drawing.box("net", 430, rows[4], 390, 46, "Transformer over the whole chest", words)
    drawing.arrow((380, rows[4] + 23), (428, rows[4] + 23))
    drawing.arrow((725, rows[4]), (725, rows[3] + 48))
    predictions = [cube(found[f"decoder.{n}"][1]) for n in range(3)]
    words = f"at {', '.join(predictions)}"
    drawing.box("data", 880, rows[1], 210, 170, "Volume " + predictions[-1], "sum of the predictions", words)


def draw_stage2(drawing: Drawing, top: float) -> None:
    """The refiner: folded, trunk, unfolded twice; X-rays from above, interpolation below."""
    model = RefinementNetwork(guided=True).train()
    coarse, xrays = torch.zeros(1, 1, 64, 64, 64), torch.zeros(1, 2, 512, 512)
    found = shapes(model, coarse, xrays)
    drawing.text(20, top, f"Stage 2: RefinementNetwork, {millions(model)}", "head")
    upper, lower = top + 24, top + 112
    encoded = found["guidance.encoder"]
    words = f"encoded: {maps(encoded[0])} to {maps(encoded[-1])}, each view; lifted to every resolution"
    title = "X-rays, and their difference to those of the coarse volume"
    drawing.box("lift", 200, upper, 680, 46, title, words)
    trunk = found["blocks.0"]
    folded = (1, model.inlet.in_channels, *trunk[2:])
    boxes = [
        ("data", 20, 130, f"Volume {cube(tuple(coarse.shape))}", "of stage 1"),
        ("net", 200, 160, "Space-to-depth", maps(folded)),
        ("net", 400, 150, f"{len(model.blocks)} RRDBs", maps(trunk)),
        ("net", 590, 130, "PixelShuffle", maps(found["up1"])),
        ("net", 750, 130, "PixelShuffle", maps(found["up2"])),
        ("data", 930, 160, f"Volume {cube(found[''])}", "detail + interpolation"),
    ]
    for (kind, x, width, *lines), following in zip(boxes, [*boxes[1:], None]):
        drawing.box(kind, x, lower, width, 52, *lines)
        if following:
            drawing.arrow((x + width, lower + 26), (following[1] - 2, lower + 26))
    for x in (280, 655, 815):
        drawing.arrow((x, upper + 46), (x, lower - 2))
    drawing.arrow((85, lower + 52), (85, lower + 84), (1010, lower + 84), (1010, lower + 54), dashed=True)
    drawing.text(548, lower + 78, "trilinear interpolation: what an untrained refiner gives")


def draw_cascade(drawing: Drawing, top: float) -> None:
    """Three stages, each from noise, the X-rays and the volume before."""
    config = load_cascade_config(CASCADE_CONFIG)
    drawing.text(20, top, f"Hybrid-ViT diffusion cascade: {CASCADE_CONFIG.name}", "head")
    upper, lower = top + 24, top + 112
    size = config.xray_img_size
    words = f"{size}\u00b2; encoded by each stage: lifted to its volume, and as tokens for cross-attention"
    drawing.box("lift", 20, upper, 1070, 46, "X-rays, PA and lateral", words)
    for index, stage in enumerate(config.stages):
        model = CascadeStage(**stage_arguments(config, index)).train()
        n, x = stage.size, 20 + 370 * index
        noisy, xrays = torch.zeros(1, 1, n, n, n), torch.zeros(1, config.num_views, size, size)
        before = [torch.zeros(1, 1, n // 2, n // 2, n // 2)] if index else []
        found = shapes(model, noisy, torch.zeros(1), xrays, *before)
        scales = ", ".join(f"{edge}\u00b3" for edge in model.grids)
        lines = [
            f"U-Net at {scales}",
            f"ViT: {len(model.vit)} blocks, {found['vit.0'][1]} tokens of {model.widths[-1]}",
        ]
        drawing.box("net", x, lower, 330, 88, f"Stage {index + 1}: noise {n}\u00b3 to volume", *lines, millions(model))
        drawing.arrow((x + 165, upper + 46), (x + 165, lower - 2))
        drawing.box("data", x + 65, lower + 124, 200, 46, f"Volume {cube(found[''])}", "after one step or several")
        drawing.arrow((x + 165, lower + 88), (x + 165, lower + 122))
        if index + 1 < len(config.stages):
            drawing.arrow((x + 265, lower + 147), (x + 350, lower + 147), (x + 350, lower + 44), (x + 368, lower + 44))


def draw() -> str:
    """The whole figure as SVG text; the same on every machine.

    For a process of its own: weights of the lifting without memory stay in that module's caches.
    """
    drawing = Drawing()
    with FakeTensorMode():
        draw_stage1(drawing, 30)
        draw_stage2(drawing, 410)
        draw_cascade(drawing, 665)
    return drawing.svg("From two X-rays to a CT volume: the direct system's two stages, and the diffusion cascade")


def main(argv=None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="SVG file to write (default docs/architecture.svg)")
    args = parser.parse_args(argv)
    with atomic_path(args.output) as temporary:
        temporary.write_text(draw(), encoding="utf-8")
    print(args.output)
    return 0


if __name__ == "__main__":
    run_cli(main)
