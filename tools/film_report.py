"""Reconstruct real films without a CT to compare with, and show what can be said: findings, residuals, a contact sheet.

    python -m tools.film_report --pa PA --lateral LATERAL --base best_model.pt --output report
    python -m tools.film_report --folder FILMS --base best_model.pt --refinement best_refinement.pt --output report

Per pair: what the pixels of the two films say (view, facing, polarity, turn, frame, markers, scale), how large the
lungs are at the network's scale, how well the X-rays rendered from the reconstruction fit the films (NCC and gradient
NCC, next to a control that is shifted by 5 mm and turned by 5 degrees: a fit that does not notice this means
little), and whether the reconstruction has its anatomy the right way round. Writes report.json and a picture per pair:
films | what the network saw | coronal, sagittal, axial | rendered X-rays. A pair that the reader refuses is listed
with the reason, and the exit status is 1.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from xray2ct.command_line import Parser
from xray2ct.data.checks.anatomy import orientation
from xray2ct.data.patient_files import find_pairs
from xray2ct.evaluation.residuals import residuals
from xray2ct.files import InputError, atomic_path, check_writable, describe, run_cli, write_json
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.projector import VIEWS
from xray2ct.imaging import film_frame, film_scale
from xray2ct.imaging.cube import area_average
from xray2ct.imaging.figures import DISPLAY_WINDOW_HU, planes
from xray2ct.imaging.film_view import FilmFinding, classify
from xray2ct.imaging.read_xray import NORMALIZATIONS, decode
from xray2ct.inference.reconstruction import Pipeline, load_pipeline
from xray2ct.models.blocks import pixels_of

TILE, CAPTION, GAP = 220, 20, 4


def describe_film(pixels: np.ndarray) -> tuple[FilmFinding, dict]:
    """What the pixels of one film say, and the same as plain values with the notes."""
    finding = classify(pixels)
    box, notes = film_frame.trim(pixels)
    _, marks = film_frame.mask_markers(box.cut(pixels))
    slanted = film_frame.perspective(pixels)
    return finding, {
        **asdict(finding),
        "picture": {"pixels": list(pixels.shape), "within_frame": list(box)},
        "notes": [*notes, *marks, *([slanted] if slanted else [])],
    }


def examine(pipeline: Pipeline, paths, normalization: str) -> tuple[dict, Image.Image]:
    """Report and contact sheet of one pair; :class:`InputError` where the reader refuses a film."""
    films = [decode(path, strict=False).pixels for path in paths]
    findings, rows = zip(*(describe_film(film) for film in films))
    report = dict(zip(VIEWS, rows))
    upright = [finding.upright(film) for finding, film in zip(findings, films)]
    scale = film_scale.estimate(*upright)
    report["scale"] = {**asdict(scale), "note": scale.note()}
    xrays = pipeline.read(*paths, normalization=normalization)
    report["notes"], volume = list(pipeline.notes), pipeline.predict(xrays)
    xrays = pixels_of(xrays[None])[0]
    mm = pipeline.system.geometry.fov_mm / xrays.shape[-1]
    (height, width), (_, depth) = (film_scale.lung_size(xrays[view].numpy(), view) for view in range(2))
    names = ("lung_height_mm", "lung_width_mm", "lung_depth_mm")
    report["as_the_network_sees_it"] = dict(zip(names, (height * mm, width * mm, depth * mm)))
    system = pipeline.system
    acquisition = Acquisition(system.geometry, system.hu_window, system.xray_scale)
    report["projection"], rendered = residuals(acquisition, xrays, volume)
    hu, _ = pipeline.to_hu(volume)
    factor = max(1, len(hu) // 64)
    spacing = pipeline.system.geometry.fov_mm * factor / len(hu)
    answers = orientation(area_average(hu.astype(np.float32), factor), spacing)
    report["anatomy"] = {side: {"status": status, "message": message} for side, (status, message) in answers.items()}
    return report, contact_sheet(films, xrays.numpy(), hu, rendered)


def contact_sheet(films, xrays, hu, rendered) -> Image.Image:
    """Nine tiles in a row: films, what the network saw, coronal, sagittal and axial slice, rendered X-rays."""
    low, high = DISPLAY_WINDOW_HU
    axial, coronal, sagittal = ((plane - low) / (high - low) for plane in planes(hu))
    tiles = [
        *((f"film, {name}", _stretched(film)) for name, film in zip(VIEWS, films)),
        *((f"network saw, {name}", _stretched(xray)) for name, xray in zip(VIEWS, xrays)),
        *(("coronal", coronal), ("sagittal", sagittal), ("axial", axial)),
        *((f"rendered, {name}", _stretched(xray)) for name, xray in zip(VIEWS, rendered)),
    ]
    sheet = Image.new("L", (len(tiles) * (TILE + GAP), TILE + CAPTION), 16)
    draw = ImageDraw.Draw(sheet)
    for place, (caption, tile) in enumerate(tiles):
        picture = Image.fromarray((np.clip(np.nan_to_num(tile), 0, 1) * 255).astype(np.uint8))
        factor = TILE / max(picture.size)
        picture = picture.resize([max(1, round(edge * factor)) for edge in picture.size], Image.Resampling.BILINEAR)
        sheet.paste(picture, (place * (TILE + GAP), 0))
        draw.text((place * (TILE + GAP) + 2, TILE + 2), caption, fill=225, font=ImageFont.load_default(size=13))
    return sheet


def _stretched(pixels) -> np.ndarray:
    low, high = np.nanpercentile(pixels, [0.5, 99.5])
    return (pixels - low) / max(high - low, 1e-12)


def summary(name: str, report: dict) -> str:
    """The report of one pair in a few lines."""
    lines = [name]
    for view in VIEWS:
        film, fit = report[view], report["projection"][view]
        said = film["view"] or "no chest radiograph"
        facing = f", faces {film['faces']}" if film["faces"] else ""
        lines.append(
            f"  {view}: {said}{facing}, bone {film['polarity']}, {film['quarter_turns']} quarter turns"
            f" (chest {film['confidence']['chest']:.2f}); NCC {fit['ncc']:.3f} (control {fit['control_ncc']:.3f}),"
            f" gradient NCC {fit['gradient_ncc']:.3f} (control {fit['control_gradient_ncc']:.3f})"
        )
        lines += [f"    {note}" for note in film["notes"]]
    seen = report["as_the_network_sees_it"]
    sides = "; ".join(f"{side}: {answer['status']}" for side, answer in report["anatomy"].items())
    lines += [
        f"  {report['scale']['note']}",
        f"  lungs at the network's scale: {seen['lung_height_mm']:.0f} mm high, {seen['lung_width_mm']:.0f} wide,"
        f" {seen['lung_depth_mm']:.0f} deep",
        f"  anatomy of the reconstruction: {sides}",
    ]
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--pa", help="frontal film")
    parser.add_argument("--lateral", help="lateral film")
    parser.add_argument("--folder", help="instead: all pairs ID_pa.png, ID_lat.png (and the like) in it")
    parser.add_argument("--base", required=True, help="stage-1 checkpoint")
    parser.add_argument("--refinement", help="stage-2 checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="folder for report.json and ID.png")
    parser.add_argument("--xray-normalization", default="auto", choices=NORMALIZATIONS, help="how values are read")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default auto)")
    args = parser.parse_args(argv)
    if bool(args.folder) == bool(args.pa or args.lateral) or bool(args.pa) != bool(args.lateral):
        raise InputError("expected --pa and --lateral, or --folder")
    pairs = find_pairs(args.folder)[0] if args.folder else {Path(args.pa).stem: (Path(args.pa), Path(args.lateral))}
    check_writable(args.output / "report.json", "--output")
    pipeline = load_pipeline(args.base, args.refinement, args.device)
    reports, failed = {}, 0
    for name, paths in sorted(pairs.items()):
        try:
            if None in paths:
                raise InputError(f"{name}: one of the two views is missing")
            reports[name], sheet = examine(pipeline, paths, args.xray_normalization)
        except (InputError, ValueError) as error:
            reports[name], failed = {"error": describe(error)}, failed + 1
            print(f"{name}: {describe(error)}")
            continue
        with atomic_path(args.output / f"{name}.png") as temporary:
            sheet.save(temporary, format="PNG")
        print(summary(name, reports[name]))
    write_json(args.output / "report.json", reports)
    return 1 if failed else 0


if __name__ == "__main__":
    run_cli(main)
