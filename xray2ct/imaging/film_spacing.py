"""Is the pixel spacing of two films known, and can it be? It is used for both or for none."""

from __future__ import annotations

from dataclasses import replace

from xray2ct.imaging.film_sides import Film

# Longer edge of a chest film in millimetres: cassettes and detectors are 240 to 430, long ones are cut to the chest.
CREDIBLE_MM = (220.0, 650.0)


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
        f"{lacks}: its pixel spacing is missing, that of {has} is known: neither is used, each picture is taken for the"
        " whole field that the model sees (--pixel-spacing-mm gives it)"
    )
