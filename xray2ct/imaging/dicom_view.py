"""What a DICOM header says an X-ray shows: the kind of image, the body part, the view, and how the picture lies.

No text of a header gets into a message unless it is one of DICOM's own terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xray2ct.conventions import VIEW_LABELS
from xray2ct.files import InputError

MODALITIES = ("CR", "DX", "DR", "RG", "RF", "XA", "OT", "SC", "")  # projections; OT and SC are scanned films
# Storage SOP classes (PS3.4, B.5) that are no projection of a chest, whatever the Modality says.
SOP_CLASS_ROOT = "1.2.840.10008.5.1.4.1.1."
OTHER_IMAGES = {"1.2": "mammogram", "1.3": "dental X-ray", "2": "CT", "3": "ultrasound", "4": "MR", "6": "ultrasound"}
OTHER_IMAGES |= {"20": "nuclear medicine", "128": "PET", "13.1.3": "breast tomosynthesis", "77": "photograph"}
# Defined terms of Body Part Examined (PS3.16, annex L), and words in use, that name no chest.
_OTHER_PARTS = (
    "ABDOMEN ABDOMENPELVIS ACJOINT ANKLE ARM BLADDER BRAIN BREAST BUTTOCK CALCANEUS CALF CALVARIUM CAROTID CEREBRUM "
    "CERVIX CHEEK COCCYX COLON CSPINE CERVICALSPINE EAR ELBOW EXTREMITY EYE FACE FACIALBONES FEMUR FETUS FINGER FOOT "
    "FOREARM GALLBLADDER HAND HEAD HEADNECK HEEL HIP HUMERUS IAC ILIUM JAW KIDNEY KNEE LEG LIVER LOWERLEG LSPINE "
    "LUMBAR LUMBARSPINE LSSPINE MANDIBLE MAXILLA NASAL NASALBONE NECK NOSE OPTICCANAL ORBIT PANCREAS PAROTID PATELLA "
    "PELVIS PENIS RADIUS RADIUSULNA SACRUM SCALP SCROTUM SELLA SHOULDER SIJOINT SINUS SKULL SPLEEN SSPINE STOMACH "
    "TEETH THIGH THUMB TIBIA TMJ TOE TONGUE TOOTH ULNA UTERUS WRIST ZYGOMA"
)
OTHER_PARTS = frozenset(_OTHER_PARTS.split())
DOUBTED_PARTS = frozenset(("CLAVICLE", "RIB", "RIBS", "SPINE", "STERNUM", "TSPINE", "TLSPINE", "WHOLEBODY"))
FRONTAL = ("PA", "AP")
LATERAL = ("LL", "RL", "LATERAL", "LLD", "RLD", "LARGE LATERAL", "LAT")
OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A", "H": "F", "F": "H"}
WORDS = {"L": "left", "R": "right", "A": "anterior", "P": "posterior", "H": "head", "F": "feet"}
# Where columns and rows of the project's views run to (projector.py): PA, lateral.
WANTED = (("L", "F"), ("P", "F"))


@dataclass(frozen=True)
class HeaderClaims:
    """What a header claims of the view.

    position: View Position (0018,5101), upper case, "" where it says nothing known.
    letters: Patient Orientation (0020,0020), where columns and rows run to (each of L, R, A, P, H, F); None without.
    """

    position: str = ""
    letters: tuple[str, str] | None = None

    @property
    def view(self) -> int | None:
        """0 frontal, 1 lateral by View Position, else by Patient Orientation; None where both are silent."""
        if self.position:
            return int(self.position in LATERAL)
        kinds = {letter for letter in self.letters or () if letter not in "HF"}
        return None if len(kinds) != 1 else int(kinds < {"A", "P"})

    def fits(self, view: int) -> bool:
        """True where Patient Orientation is one that a picture of ``view`` can have."""
        letters, sides = set(self.letters or ()), {WANTED[view][0], OPPOSITE[WANTED[view][0]]}
        return len(letters & sides) == 1 and len(letters & {"H", "F"}) == 1


def read_claims(data) -> HeaderClaims:
    """The claims of a pydicom dataset."""
    position = str(data.get("ViewPosition") or "").upper().strip()
    letters = tuple(str(value)[:1].upper() for value in data.get("PatientOrientation") or ())
    known = len(letters) == 2 and all(letter in OPPOSITE for letter in letters)
    return HeaderClaims(position if position in (*FRONTAL, *LATERAL) else "", letters if known else None)


def check_subject(path, data, strict: bool = True) -> list[str]:
    """Raise :class:`InputError` where the header says that this is no X-ray, or one of another part of the body.

    strict: without, another body part is a note as well. Returns notes. A body part that is missing or unknown is fine.
    """
    modality = str(data.get("Modality") or "")
    if modality not in MODALITIES:
        shown = modality if len(modality) == 2 and modality.isalpha() else "another"  # never a text of the header
        raise InputError(f"{path}: Modality is {shown}; expected an X-ray ({', '.join(filter(None, MODALITIES))})")
    sop = str(data.get("SOPClassUID") or "")
    if sop.startswith(SOP_CLASS_ROOT):
        rest = sop.removeprefix(SOP_CLASS_ROOT)
        kinds = [kind for start, kind in OTHER_IMAGES.items() if f"{rest}.".startswith(f"{start}.")]
        if kinds:
            raise InputError(f"{path}: its SOP Class says {kinds[0]}; expected a chest X-ray")
    part = "".join(c for c in str(data.get("BodyPartExamined") or "").upper() if c.isalnum())
    if part in OTHER_PARTS and strict:
        raise InputError(
            f"{path}: Body Part Examined is {part}; expected a chest (--no-check, where the header is wrong)"
        )
    if part in OTHER_PARTS or part in DOUBTED_PARTS:
        return [f"Body Part Examined is {part}; expected a chest"]
    return []


def check_view(path, claims: HeaderClaims, view: int) -> None:
    """Raise :class:`InputError` where View Position says that it is the other view."""
    if claims.position and (claims.position in LATERAL) != bool(view):
        raise InputError(
            f"{path}: View Position is {claims.position}; expected the {VIEW_LABELS[view]} view"
            " (are --pa and --lateral swapped?)"
        )


def turned(path, pixels: np.ndarray, claims: HeaderClaims, view: int, notes: list[str]) -> np.ndarray:
    """The picture with columns and rows running as the project's, by Patient Orientation where there is one.

    Raises :class:`InputError` for an orientation that no picture of ``view`` (0 PA, 1 lateral) can have.
    """
    if claims.letters is None:
        return pixels
    columns, rows = claims.letters
    if not claims.fits(view):
        runs = " and ".join(WORDS[letter] for letter in claims.letters)
        raise InputError(f"{path}: Patient Orientation says it runs to {runs}; that is no {VIEW_LABELS[view]} view")
    wanted_columns, wanted_rows = WANTED[view]
    if columns in "HF":
        pixels, columns, rows = pixels.T, rows, columns
    if columns != wanted_columns:
        pixels = pixels[:, ::-1]
    if rows != wanted_rows:
        pixels = pixels[::-1]
    if claims.letters != WANTED[view]:
        notes.append("turned by Patient Orientation: it ran to " + " and ".join(WORDS[x] for x in claims.letters))
    return np.ascontiguousarray(pixels)
