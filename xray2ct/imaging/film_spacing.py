"""Scale of two films: their pixel spacing, if both have a credible one, else one estimated from the lungs."""

from __future__ import annotations

from dataclasses import replace

from xray2ct.geometry.projector import Geometry
from xray2ct.imaging.film_scale import estimate
from xray2ct.imaging.film_sides import Film, FilmOptions
from xray2ct.imaging.stored_xray import Exposure

# Longer edge of a chest film in millimetres: cassettes and detectors are 240 to 430, long ones are cut to the chest.
CREDIBLE_MM = (220.0, 650.0)
# Between a header's spacing and the one by the lungs (some 10 % uncertain): beyond it the header's is not believed.
CREDIBLE_FACTOR = 1.5


def question_spacing(film: Film) -> None:
    """Drop a pixel spacing of the header that makes the film too small or too large for a chest, and say so.

    Such are left over from a picture that was reduced or enlarged afterwards. One that the user gave is not questioned.
    """
    spacing = film.exposure.pixel_spacing_mm
    if spacing is None or film.spacing_given:
        return
    rows, columns = (length * spacing for length in film.pixels.shape)
    if CREDIBLE_MM[0] <= max(rows, columns) <= CREDIBLE_MM[1]:
        return
    header = spacing / film.stored.reduced
    size = "small" if max(rows, columns) < CREDIBLE_MM[0] else "large"
    film.decide(
        f"its header's pixel spacing of {header:.3g} mm makes the picture {columns:.0f} x {rows:.0f} mm, too {size} for"
        " a chest: left over from another size of it, and not used (--pixel-spacing-mm gives the right one)"
    )
    film.exposure = replace(film.exposure, pixel_spacing_mm=None)


def settle_spacings(known: dict[str, bool]) -> tuple[bool, str]:
    """``(use them, note)`` by whose pixel spacing is ``known``: that of one file alone would scale one view alone."""
    if len(set(known.values())) < 2:
        return all(known.values()), ""
    has = next(path for path, value in known.items() if value)
    lacks = next(path for path, value in known.items() if not value)
    return False, (
        f"{lacks}: its pixel spacing is missing, that of {has} is known: neither is used (--pixel-spacing-mm gives it)"
    )


def scale_by_lungs(pa: Film, lateral: Film, has_spacings: bool, geometry: Geometry, options: FilmOptions) -> bool:
    """Set the scale of two upright films from the lungs where they have no pixel spacing, or one that cannot be.

    Returns whether their ``exposure`` holds a scale afterwards: not where the lungs were not found in proportion.
    """
    found = estimate(pa.pixels, lateral.pixels)
    estimates = ((pa, found.pa_mm), (lateral, found.lateral_mm))
    if has_spacings:
        wrong = [film for film, by_lungs in estimates if not _agrees(film, by_lungs, geometry)]
        for film in wrong:
            film.decide(
                f"its header's pixel spacing of {film.exposure.pixel_spacing_mm / film.stored.reduced:.3g} mm does not"
                " fit the size of the lungs: left over from another size of it, and not used (--pixel-spacing-mm gives"
                " the right one)"
            )
        if not wrong:
            return True
    factor, text = 1.0, f"{found.note()} (--pixel-spacing-mm or --thorax-width-mm sets it)"
    if options.thorax_width_mm is not None:
        factor = options.thorax_width_mm / found.lung_width_mm
        text = f"scale set by a thorax {options.thorax_width_mm:g} mm wide"
    sizes = [max(film.pixels.shape) * by_lungs * factor for film, by_lungs in estimates]
    if not all(CREDIBLE_MM[0] / 1.5 < size < CREDIBLE_MM[1] for size in sizes):
        pa.decide(
            "no scale: its lungs were not found, and the picture is taken for the whole field that the model sees"
        )
        return False
    for film, by_lungs in estimates:
        film.exposure = Exposure(by_lungs * factor, film.exposure.sdd_mm, film.exposure.sid_mm, spacing_at_patient=True)
    pa.decide(text)
    return True


def _agrees(film: Film, by_lungs: float, geometry: Geometry) -> bool:
    """Does the known pixel spacing, brought to the patient's plane, fit the size of the lungs? A user's always does."""
    spacing = film.exposure.pixel_spacing_mm
    if not film.exposure.spacing_at_patient and geometry.kind == "cone":
        spacing *= geometry.sid_mm / geometry.sdd_mm
    return film.spacing_given or 1 / CREDIBLE_FACTOR < spacing / by_lungs < CREDIBLE_FACTOR
