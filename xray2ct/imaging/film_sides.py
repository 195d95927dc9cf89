"""Which view a film is, and which way round it lies: what the user, the header and the pixels say, in this order."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from xray2ct.conventions import VIEW_LABELS
from xray2ct.files import InputError
from xray2ct.imaging.dicom_view import turned
from xray2ct.imaging.film_frame import fill, mask_markers, perspective, trim
from xray2ct.imaging.film_view import FilmFinding, classify
from xray2ct.imaging.read_xray import MIN_SIZE, check_polarity, checked
from xray2ct.imaging.stored_xray import Exposure, StoredXray

VIEW_SOURCES = ("pixels", "header")
TURNS = (0, 90, 180, 270)
SURE = 0.9  # confidence from which a picture decides against order and headers
SURE_CHEST = 0.5  # the least confidence in a chest with which its picture decides the view
NOISE = 0.4  # standard deviation of a thumbnail of 32 x 32 over that of the picture; 0.9 for films
SAME_PICTURE = 0.98  # correlation of thumbnails of 32 x 32; 0.93 at most between films of different patients


@dataclass(frozen=True)
class FilmOptions:
    """What the user decides about two films.

    view_from: "pixels" finds view and facing in the picture, "header" takes what a DICOM header says, else what the
    order of the files says. rotate: degrees clockwise (0, 90, 180, 270) of the first and the second file, in place of
    what a header says. flip_lateral: mirror the lateral, which is not looked at for its facing then. invert: bone is
    dark in both files. polarity_check: find dark bones in the pixels, and invert. check: refuse what does not look like
    a chest, another part of the body by the header, two films of one view, swapped views of the project's own X-rays.
    thorax_width_mm: between the outer borders of the lungs, sets the scale of both films where no pixel spacing does.
    """

    view_from: str = "pixels"
    rotate: tuple[int, int] = (0, 0)
    flip_lateral: bool = False
    invert: bool = False
    polarity_check: bool = True
    check: bool = True
    thorax_width_mm: float | None = None

    def __post_init__(self):
        if self.view_from not in VIEW_SOURCES:
            raise InputError(f"--view-from is {self.view_from!r}; expected {' or '.join(VIEW_SOURCES)}")
        if len(self.rotate) != 2 or not set(self.rotate) <= set(TURNS):
            raise InputError(f"--rotate is {self.rotate}; expected {', '.join(map(str, TURNS))}, for one film or each")
        if self.thorax_width_mm is not None and not 100 <= self.thorax_width_mm <= 500:
            raise InputError(f"--thorax-width-mm is {self.thorax_width_mm:g}; expected 100 to 500")


@dataclass
class Film:
    """A picture on its way to the networks: ``pixels`` (H, W) float32, NaN where nothing is shown.

    place: 0 where it was given as PA, 1 as lateral; view: what it is; sides_of: the view whose Patient Orientation has
    turned it. notes: all that was done; doubts: those of them
    that were decided by the pixels, or are uncertain.
    """

    path: str | os.PathLike
    stored: StoredXray
    place: int
    exposure: Exposure
    spacing_given: bool = False
    view: int = 0
    finding: FilmFinding | None = None
    sides_of: int | None = None
    doubts: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.pixels, self.notes, self.view = self.stored.pixels, self.stored.notes, self.place

    def decide(self, text: str) -> None:
        self.notes.append(text)
        self.doubts.append(text)


# ------------------------------------------------------------------------------------------------
# One film


def look_at(film: Film, options: FilmOptions) -> None:
    """Lay a film upright by user and header, cut frames off, replace markers, then see what it shows and its polarity.

    Raises :class:`InputError` naming the file for a photograph taken at an angle, no chest, or dark bone where the user
    has inverted already.
    """
    _turn(film, options)
    if options.invert:
        film.pixels = film.stored.full_scale - film.pixels
        film.notes.append("inverted")
    slanted = perspective(film.pixels) if film.stored.claims is None and options.check else None
    if slanted:
        raise InputError(f"{film.path}: {slanted}")
    box, notes = trim(film.pixels)
    if min(box.cut(film.pixels).shape) >= MIN_SIZE:
        film.notes += notes
        film.pixels = box.cut(film.pixels)
        checked(film.path, film.pixels, [])
    if _thumbnail(film.pixels).std() < NOISE * np.nanstd(film.pixels):
        raise InputError(f"{film.path}: the picture holds nothing but noise; expected an X-ray")
    mask, notes = mask_markers(film.pixels)
    film.notes += notes
    if mask.any():
        film.pixels = fill(film.pixels, mask)
    film.finding = finding = classify(film.pixels)
    if finding.view is None and options.check:
        raise InputError(
            f"{film.path}: does not look like a chest X-ray (confidence {finding.confidence['chest']:.0%}); expected a"
            " frontal or lateral film of a chest, lungs and shoulders whole (--no-check reads it all the same)"
        )
    if finding.view is None:
        film.decide("does not look like a chest X-ray")
        return
    _settle_polarity(film, options)
    if options.view_from == "pixels":
        _settle_turn(film, options)


def _turn(film: Film, options: FilmOptions) -> None:
    """By the user, else by the header's Patient Orientation, which is taken for the view that it can belong to."""
    degrees, claims = options.rotate[film.place], film.stored.claims
    if degrees:
        film.pixels = np.rot90(film.pixels, -degrees // 90)
        film.notes.append(f"turned by {degrees} degrees clockwise, as asked for")
    elif claims is not None and claims.letters is not None:
        view = int(bool({"A", "P"} & set(claims.letters)))
        if claims.fits(view) or options.view_from == "header":
            film.pixels = turned(film.path, film.pixels, claims, view, film.notes)
            film.sides_of = view
        else:
            film.decide("Patient Orientation is none that a chest film can have: not used")


def _settle_polarity(film: Film, options: FilmOptions) -> None:
    finding = film.finding
    if not options.polarity_check or finding.polarity == "bright":
        return
    if finding.confidence["polarity"] < SURE:
        check_polarity(film.path, film.pixels)
        film.decide("whether bone is bright or dark cannot be told: taken as bright (--invert)")
        return
    if options.invert:
        raise InputError(
            f"{film.path}: bone looks dark and air bright after --invert; expected bone bright (leave it out, or pass"
            " --no-polarity-check)"
        )
    film.pixels = np.nanmax(film.pixels) + np.nanmin(film.pixels) - film.pixels
    header = "" if film.stored.claims is None else ", against its header"
    film.decide(f"bone looked dark{header}: inverted (--no-polarity-check leaves it)")


def _settle_turn(film: Film, options: FilmOptions) -> None:
    """Turn a film upright; say so, and where the picture alone does not tell its position, unless the header does."""
    turns, asked = film.finding.quarter_turns, options.rotate[film.place]
    sure = film.finding.confidence["position"]
    doubt = "" if sure >= SURE else f", with a confidence of {sure:.0%} only"
    if turns:
        lies, degrees = "upside down" if turns == 2 else "on its side", 360 - 90 * turns  # clockwise
        if asked:
            film.decide(f"seems to lie {lies} after --rotate: left as asked for")
            return
        film.pixels = np.rot90(film.pixels, turns)
        film.decide(f"lay {lies}{doubt}: turned by {degrees} degrees clockwise (--view-from header leaves it)")
    elif doubt and not asked and film.sides_of is None:
        film.decide(f"taken as upright{doubt} (--rotate turns it, --invert where bone is dark)")


# ------------------------------------------------------------------------------------------------
# Two films


def check_different(one: Film, other: Film) -> None:
    """Raise :class:`InputError` for one film given twice, also where it is mirrored or on another scale."""
    thumbs = [_thumbnail(film.pixels) for film in (one, other)]
    for mirrored in (thumbs[1], thumbs[1][:, ::-1]):
        if abs(np.corrcoef(thumbs[0].ravel(), mirrored.ravel())[0, 1]) > SAME_PICTURE:
            raise InputError(
                f"{one.path} and {other.path} are the same picture; expected a frontal and a lateral film of one"
                " patient (--no-check reads them all the same)"
            )


def _thumbnail(pixels) -> np.ndarray:
    filled = np.where(np.isfinite(pixels), pixels, np.nanmean(pixels)).astype(np.float32)
    return np.asarray(Image.fromarray(filled).resize((32, 32), Image.Resampling.BOX))


def assign_views(films: list[Film], taken: tuple[int, ...], options: FilmOptions) -> None:
    """Set ``view`` of one or two films; ``taken``: views that other pictures hold.

    What the pixels show with certainty decides, then headers, then the order in which the files were given. Raises
    :class:`InputError` for two films of one view, or a single one that is not the view it was given as.
    """
    shown = [_shown(film) if options.view_from == "pixels" else None for film in films]
    said = [film.stored.claims.view if film.stored.claims is not None else None for film in films]
    if len(films) < 2:
        for film, view, claim in zip(films, shown, said):
            _check_single(film, view, claim, options)
            if (view, claim) == (None, None) and options.view_from == "pixels":
                film.decide(_NOT_TOLD.format(VIEW_LABELS[film.place]))
        return
    if None not in shown and shown[0] == shown[1] and options.check:
        raise InputError(f"{films[0].path} and {films[1].path} both {_LOOK[shown[0]]}; {_REMEDY}")
    if options.view_from == "header" and None not in said and said[0] == said[1] and options.check:
        raise InputError(
            f"{films[0].path} and {films[1].path}: by their headers both are {VIEW_LABELS[said[0]]} views; expected one"
            " frontal and one lateral (--view-from pixels looks for it in the pictures)"
        )
    first = _first_view(shown)
    if first is None:
        first = _first_view(said)
        if first is None and options.view_from == "pixels":
            for film in films:
                film.decide(_NOT_TOLD.format(VIEW_LABELS[film.place]))
    first = 0 if first is None else first
    for film, view in zip(films, (first, 1 - first)):
        film.view = view
        claim = film.stored.claims.position if film.stored.claims is not None else ""
        if film.view != film.place:
            source = "the pixels" if options.view_from == "pixels" and None not in shown else "pixels and headers"
            film.decide(f"given as the {VIEW_LABELS[film.place]} view, is the {VIEW_LABELS[view]} view by {source}")
        elif claim and film.stored.claims.view != view:
            film.decide(f"View Position is {claim}, but the picture shows the {VIEW_LABELS[view]} view, as given")


_NOT_TOLD = "which view it is cannot be told: taken for the {} view, as given"
_LOOK = ("look like frontal films", "look like lateral films")
_REMEDY = (
    "expected a frontal and a lateral film of one patient (--view-from header takes them as headers and order say)"
)


def _shown(film: Film) -> int | None:
    finding = film.finding
    if finding is None or finding.view is None or finding.confidence["view"] < SURE:
        return None
    if finding.confidence["chest"] < SURE_CHEST:
        return None
    return int(finding.view == "lateral")


def _first_view(views: list[int | None]) -> int | None:
    """The first film's view by what is known of either; None where nothing is, or it contradicts itself."""
    options = {views[0], None if views[1] is None else 1 - views[1]} - {None}
    return options.pop() if len(options) == 1 else None


def _check_single(film: Film, shown: int | None, said: int | None, options: FilmOptions) -> None:
    """One film whose view is fixed by how it was given: refused where it is the other one."""
    for view, source in ((shown, "the picture shows"), (said if shown is None else None, "its header says")):
        if view not in (None, film.place) and options.check:
            raise InputError(
                f"{film.path}: {source} a {VIEW_LABELS[view]} view; expected the {VIEW_LABELS[film.place]} view"
                " (--no-check reads it all the same)"
            )


def _leave_out_sides(film: Film) -> None:
    """Undo the mirroring by a Patient Orientation that belongs to the other view."""
    claims = film.stored.claims
    if film.sides_of in (None, film.view):
        return
    film.decide(f"Patient Orientation is none of a {VIEW_LABELS[film.view]} view: left and right are not taken from it")
    if not {"R", "A"} & set(claims.letters):
        return
    film.pixels = film.pixels[:, ::-1]
    if film.finding.faces is not None:
        film.finding = replace(film.finding, faces="left" if film.finding.faces == "right" else "right")


def lay_out(film: Film, options: FilmOptions) -> None:
    """Mirror a lateral that faces right: anterior lies at the left in the project's views."""
    _leave_out_sides(film)
    if film.view == 0:
        return
    if options.flip_lateral:
        film.pixels = film.pixels[:, ::-1]
        film.notes.append("mirrored, as asked for")
        return
    if options.view_from == "header":
        return
    finding, claims = film.finding, film.stored.claims
    lies_by_header = claims is not None and claims.fits(1) and not options.rotate[film.place]
    sure = finding.confidence["faces"] if finding.view == "lateral" else 0.0
    if sure < SURE and lies_by_header:
        return
    if finding.view != "lateral":
        film.decide("which way the patient faces cannot be told: taken as to the left (--flip-lateral mirrors it)")
        return
    doubt = "" if sure >= SURE else f", with a confidence of {sure:.0%} only"
    if finding.faces == "right":
        film.pixels = film.pixels[:, ::-1]
        header = ", against its header" if lies_by_header else ""
        film.decide(f"faced right{header}{doubt}: mirrored, anterior is at the left now (--view-from header leaves it)")
    elif doubt:
        film.decide(f"faces left{doubt} (--flip-lateral mirrors it)")
