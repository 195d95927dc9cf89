"""Which series of a patient is the chest CT to take, from the little that the archive's index says about it.

The index has no convolution kernel, slice thickness or orientation; manufacturers and trials write them into
SeriesDescription, which is read here. A CT series is taken when

- it is a CT Image Storage series of the original collection (no derived result), of 80 to 700 slices;
- its description names no localizer, no coronal, sagittal or projected reformat, no derived image and no PET/CT
  attenuation map;
- it shows the chest: the first of SeriesDescription, StudyDescription and BodyPartExamined that names a region names
  the chest (among others), or none does and the collection is one of chest CTs (:data:`collections.CHEST`);
- its slices are 0.9 to 3.2 mm thick where the description states that, and cover 220 to 1,000 mm (slices may overlap
  by half); where nothing is stated, 80 slices or more stand for a thorax of 240 mm in slices of 3 mm.

Of several series of a patient the first in this order is taken: supine, inspired and full dose before prone, expired
and simulated low dose; soft-tissue or standard kernel, then unknown, then sharp; chest alone before chest and abdomen;
the earliest study; the most slices; the smallest SeriesInstanceUID. Nothing depends on the order of the index, on other
patients or on the number asked for.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from xray2ct.data.archive.collections import CHEST

MIN_SLICES, MAX_SLICES = 80, 700
MIN_MM, MAX_MM = 0.9, 3.2  # NLST writes 3.2 and 1.2 for what is elsewhere called 3 and 1.25
MIN_COVER_MM, MAX_COVER_MM = 220.0, 1000.0

_LOCALIZER = re.compile(r"scout|topogr|locali[sz]er|locator|surview|scanogram|\bpilot\b|,[ODS]PL,", re.IGNORECASE)
_NOT_AXIAL = re.compile(
    r"(?<![a-z])(cor|coro|coronal|sag|sagit\w*|mpr|mip|mips|minip|oblique|curved|vr|vrt|3d|reformat\w*|reformation)(?![a-z])"
    r"|cor[ _]?(?=cap|chest)|coronal|sagittal|,[ODS]S[ALPR],",
    re.IGNORECASE,
)
_DERIVED = re.compile(
    r"ave?-?ip|average|fusion|fused|projection|subtract|perfusion|iodine|mono ?e|vessel supp|\bdetect"
    r"|dose info|smart ?prep|monitor|bolus|test|\bcad\b|segment|summary|screen ?save|dose rep|patient protocol",
    re.IGNORECASE,
)
_PET = re.compile(r"\bpet|ctac|\bac ?ct\b|attenuation|whole ?body|\bwb\b|skull|head ?(to|in)|torso", re.IGNORECASE)
_CHEST = re.compile(r"chest|thora|lung|pulmon|\bcap\b|\btap\b|\bc[/-]a[/-]p\b|mediast|nlst|klatki", re.IGNORECASE)
_ABDOMEN = re.compile(r"abd|pelv|\bcap\b|\btap\b|liver|\bc[/-]a[/-]p\b", re.IGNORECASE)
_OTHER = re.compile(
    r"abd|pelv|\ba/p\b|head|neck|brain|spine|liver|kidney|colon|renal|extrem|knee|hip\b|venous phase", re.IGNORECASE
)
_UNUSUAL = re.compile(r"prone|expir|low dose images", re.IGNORECASE)
_TRUNK = re.compile(r"chest|thora", re.IGNORECASE)
_NLST = re.compile(r"\d,[OD]P[AL],")

_SOFT = re.compile(
    r"(?<![a-z0-9])([bi][23]\d[fsh]?|b4[0-5][fsh]?|b[rf]?\d{2}(?<=[234]\d)[fsd]?|fc0\d|fc1\d|fc2\d|std|stnd|stan|stand\w*"
    r"|soft\w*|st|mediastin\w*|body filter|detail)(?![a-z0-9])",
    re.IGNORECASE,
)
_SHARP = re.compile(
    r"(?<![a-z0-9])([bi][5-9]\d[fsh]?|b4[6-9][fsh]?|b[lr][5-9]\d[fsd]?|fc3\d|fc5\d|fc8\d|bone\w*|edge|sharp|hi-?res\w*"
    r"|high ?res\w*|hr|hrct|ultra|lungs?)(?![a-z0-9])",
    re.IGNORECASE,
)
_MM = re.compile(
    r"(?<![\d.])(\d{1,2}(?:\.\d{1,2})?)(?:\.\d)? ?(?:mm|(?= +[bi][rl]?\d\d|x| +lung| +soft| +std| +stnd))",
    re.IGNORECASE,
)


class Facts(NamedTuple):
    """What a description says. kernel: 0 soft tissue or standard, 1 unknown, 2 sharp; thickness_mm: None if unsaid."""

    kernel: int
    thickness_mm: float | None


@lru_cache(maxsize=1 << 16)
def read_description(text: str) -> Facts:
    """Kernel and slice thickness of a SeriesDescription.

    NLST's have fields (year, kind, maker, model, kernel, field of view, thickness, kV, mAs, ...); Philips' kernels A to
    C are smooth and D sharp.
    """
    if _NLST.match(text):
        fields = text.split(",")
        kernel, thickness = (fields[4], fields[6]) if len(fields) > 6 else ("", "")
        sharp = bool(_SHARP.search(kernel)) or kernel in ("D", "E", "EC")
        soft = bool(_SOFT.search(kernel)) or kernel in ("A", "B", "C")
        known = re.fullmatch(r"\d+(\.\d+)?", thickness)
        return Facts(2 if sharp else 0 if soft else 1, float(thickness) if known else None)
    # "LUNG" is a kernel only where nothing softer is named: "CT LUNG SCREEN STD"
    kernel = 0 if _SOFT.search(text) else 2 if _SHARP.search(text) else 1
    found = _MM.search(text)
    return Facts(kernel, float(found[1]) if found and 0 < float(found[1]) <= 20 else None)


def refusal(row: dict) -> str | None:
    """Why a CT series is not taken, in a few words, or None; row: the index's columns of one series."""
    if row["Modality"] != "CT" or row["sop_class_name"] != "CT Image Storage" or row["analysis_result_id"]:
        return "no original CT"
    series, study = row["SeriesDescription"] or "", row["StudyDescription"] or ""
    reason = _refusal_by_text(row["collection_id"], row["BodyPartExamined"] or "", series, study)
    if reason or not MIN_SLICES <= row["instanceCount"] <= MAX_SLICES:
        return reason or "number of slices"
    thickness = read_description(series).thickness_mm
    if thickness is not None:
        if not MIN_MM <= thickness <= MAX_MM:
            return "slice thickness"
        if not MIN_COVER_MM <= thickness * row["instanceCount"] <= MAX_COVER_MM:
            return "length"
    return None


@lru_cache(maxsize=1 << 16)
def _refusal_by_text(collection: str, part: str, series: str, study: str) -> str | None:
    if is_localizer(series):
        return "localizer"
    if _NOT_AXIAL.search(series):
        return "not axial"
    if _DERIVED.search(series):
        return "derived"
    if _PET.search(series) or (_PET.search(study) and not _TRUNK.search(series)):
        return "PET attenuation map or whole body"
    return None if _shows_chest(collection, part, series, study) else "not the chest"


def _shows_chest(collection: str, part: str, series: str, study: str) -> bool:
    if _NLST.match(series):
        return True
    for text in (series, study, part):
        if _CHEST.search(text):
            return True
        if _OTHER.search(text):
            return False
    return collection in CHEST


def preference(row: dict) -> tuple:
    """Sort key of the series of a patient that :func:`refusal` takes: the smallest is chosen."""
    texts = row["SeriesDescription"] or "", row["BodyPartExamined"] or "", row["StudyDescription"] or ""
    order = row["StudyDate"] or "9999", -row["instanceCount"], row["SeriesInstanceUID"]
    return _preference_by_text(*texts) + order


@lru_cache(maxsize=1 << 16)
def _preference_by_text(series: str, part: str, study: str) -> tuple:
    abdomen = any(_ABDOMEN.search(text) for text in (series, part, study))
    return bool(_UNUSUAL.search(series)), read_description(series).kernel, abdomen


@lru_cache(maxsize=1 << 16)
def is_localizer(description: str) -> bool:
    """True for a scout (topogram, surview, localizer): a projection image from the CT's own session."""
    return bool(_LOCALIZER.search(description))
