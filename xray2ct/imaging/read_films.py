"""X-rays of one patient from any source: which view each is, which way round it lies, both at one scale.

from xray2ct.imaging.read_films import read_pair
pair = read_pair("pa.dcm", "lateral.png", size=512, geometry=Geometry())
pair.pa.pixels, pair.pa.seen, pair.lateral.pixels, pair.notes

What the project rendered itself is read as it is, by ``read_xray``; all else here is for films (docs/films.md).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np

from xray2ct.geometry.projector import Geometry
from xray2ct.imaging.film import check_views
from xray2ct.imaging.film_sides import Film, FilmOptions, assign_views, check_different, lay_out, look_at
from xray2ct.imaging.film_spacing import question_spacing, scale_by_lungs, settle_spacings
from xray2ct.imaging.read_xray import XrayImage, check_normalization, checked, chosen, decode, read_xray
from xray2ct.imaging.stored_xray import Exposure
from xray2ct.imaging.xray_field import fit
from xray2ct.imaging.xray_scale import normalise

MIN_WORKING_EDGE = 1024  # pixels that a large film is averaged to at least before anything else is done with it
HOW_READ = {
    "percentile": "its values were stretched from its 1st and 99th percentile",
    "histogram": "its values were matched by the distribution of the whole picture",
    "body": "its values were matched by their distribution inside the body",
}


class FilmWarning(UserWarning):
    """A decision or doubt about a film that its user should know of."""


@dataclass
class FilmPair:
    """Two views, and what was done to them.

    pa, lateral: None where no file was given. notes: all that was done; doubts: of these, what was decided by the
    pixels, or is uncertain; each names its file. films: any of them was read as a film.
    """

    pa: XrayImage | None = None
    lateral: XrayImage | None = None
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    films: bool = False

    @property
    def views(self) -> tuple[XrayImage | None, XrayImage | None]:
        return self.pa, self.lateral


def read_pair(pa, lateral, normalization: str = "auto", size: int | None = None, **options) -> FilmPair:
    """Read two X-rays of one patient; options as in :func:`read_films`."""
    return read_films((pa, lateral), normalization, size, **options)


def read_films(
    paths: tuple[str | os.PathLike | None, str | os.PathLike | None],
    normalization: str = "auto",
    size: int | None = None,
    geometry: Geometry | None = None,
    exposure: Exposure | tuple[Exposure | None, Exposure | None] | None = None,
    options: FilmOptions | None = None,
) -> FilmPair:
    """Read the PA and the lateral X-ray, either of which may be None.

    normalization: ``auto`` reads the project's own X-rays (16-bit PNG or floats as bright as those) by their scale,
        values that are a logarithm by a DICOM header by their percentiles, and all else by its histogram inside the
        body; ``manifest``, ``percentile`` and ``histogram`` as in :func:`read_xray`.
    size, geometry, exposure: as in :func:`read_xray`; exposure may be one for each file. Padding is air.
    options: what the user decides; see :class:`FilmOptions`.

    A picture that is not the project's own (nor read by ``manifest``) is taken for a film: uniform frames are cut off
    and burnt-in markers replaced; polarity, view and facing are found in the pixels, and win over a header that says
    otherwise; two films given the wrong way round are exchanged, a lateral that faces right is mirrored. All of this
    happens before the values are normalised, and is noted. The pixel spacing is used where both files have a credible
    one; otherwise the scale of two films is estimated from the size of the lungs.
    Raises :class:`InputError` naming file and option for what :func:`read_xray` refuses, for no chest, two films of one
    view, one film given twice, a film on its side, a photograph taken at an angle.
    """
    check_normalization(normalization)
    options = options or FilmOptions()
    given = exposure if isinstance(exposure, tuple) else (exposure, exposure)
    films, own = _sort(paths, normalization, size, given, options)
    if len(films) == 2 and options.check:
        check_different(*films)
    assign_views(films, tuple(own), options)
    for film in films:
        lay_out(film, options)
    scale = "manifest" if normalization == "auto" else normalization

    def read_own(field_of):
        return {
            place: read_xray(path, scale, size, place, options.invert, field_of, given[place])
            for place, path in own.items()
        }

    images, pair = read_own(geometry), FilmPair(films=bool(films))
    known = {str(own[place]): image.spacing_known for place, image in images.items()}
    known |= {str(film.path): film.exposure.pixel_spacing_mm is not None for film in films}
    has_scale, doubt = settle_spacings(known)
    if doubt:
        pair.notes, pair.doubts, images = [doubt], [doubt], read_own(None)
    if len(films) == 2 and geometry is not None:
        has_scale = scale_by_lungs(*sorted(films, key=lambda film: film.view), has_scale, geometry, options)
    pair.notes += [f"{path}: {note}" for place, path in own.items() for note in images[place].notes]
    for film in films:
        images[film.view] = _finished(film, normalization, size, geometry if has_scale else None)
        pair.notes += [f"{film.path}: {note}" for note in film.notes]
        pair.doubts += [f"{film.path}: {note}" for note in film.doubts]
    pair.pa, pair.lateral = images.get(0), images.get(1)
    if len(own) == 2 and options.check:
        doubts = check_views(images[0].pixels, images[1].pixels, [str(own[0]), str(own[1])])
        pair.notes, pair.doubts = pair.notes + doubts, pair.doubts + doubts
    return pair


def _sort(paths, normalization, size, given, options) -> tuple[list[Film], dict[int, str | os.PathLike]]:
    """The pictures that are films, looked at, and by place those that the project rendered (or is told that)."""
    edge = None if size is None else max(MIN_WORKING_EDGE, 2 * size)
    films: list[Film] = []
    own: dict[int, str | os.PathLike] = {}
    for place, path in enumerate(paths):
        if path is None:
            continue
        stored = None if normalization == "manifest" else decode(path, edge, options.check)
        if stored is None or stored.own:
            own[place] = path
            continue
        checked(path, stored.pixels, stored.notes)
        known = (given[place] or Exposure()).coarser(stored.reduced)
        film = Film(path, stored, place, known.over(stored.exposure), known.pixel_spacing_mm is not None)
        look_at(film, options)
        question_spacing(film)
        films.append(film)
    return films, own


def _finished(film: Film, normalization: str, size: int | None, geometry: Geometry | None) -> XrayImage:
    """The film on the networks' scale, padded with air to what the geometry's detector sees."""
    film.stored.pixels = film.pixels
    kind = chosen(normalization, film.stored)
    pixels = normalise(film.path, film.pixels, film.stored.full_scale, kind, film.view)
    film.notes.append(HOW_READ[kind])
    pixels, seen = fit(film.path, pixels, np.isnan(film.pixels), film.exposure, geometry, size, film.notes)
    return XrayImage(pixels, seen, film.notes, geometry is not None)
