"""Names, licences and shared patients of the archive's collections."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from xray2ct.files import InputError, safe_name

# Collections of chest CTs and what they are good for: the rows of `get_data.py --list`. Any other collection of the
# Imaging Data Commons is taken by its id; there each CT must say that it shows the chest.
CHEST = {
    "nlst": "lung screening, low dose, without contrast agent; scouts of the same session: the largest",
    "lidc_idri": "nodules, mixed protocols; the literature's benchmark (X2CT-GAN, LUNA16); films of some patients",
    "covid_19_ny_sbu": "COVID-19, acutely ill; scouts and films",
    "mediastinal_lymph_node_seg": "enlarged lymph nodes, contrast agent",
    "lung_pet_ct_dx": "lung cancer",
    "acrin_nsclc_fdg_pet": "lung cancer, trial of several centres",
    "nsclc_radiogenomics": "lung cancer, surgical",
    "nsclc_radiomics": "lung cancer, planning of radiotherapy",
    "nsclc_radiomics_genomics": "lung cancer, surgical",
    "midrc_ricord_1a": "COVID-19",
    "midrc_ricord_1b": "suspected COVID-19, negative",
    "ldct_and_projection_data": "full dose chest CTs of a dose study",
    "spie_aapm_lung_ct_challenge": "nodules; sharp kernel only",
    "tcga_luad": "lung adenocarcinoma, many centres",
    "tcga_lusc": "squamous cell carcinoma of the lung, many centres",
    "lungct_diagnosis": "lung adenocarcinoma, contrast agent; mostly thick slices",
    "qin_lung_ct": "lung cancer; mostly thick slices; shares patients with lungct_diagnosis",
    "lctsc": "planning of radiotherapy",
    "rider_lung_ct": "lung cancer, scanned twice within minutes",
    "rider_lung_pet_ct": "lung cancer, PET/CT",
    "anti_pd_1_lung": "lung cancer, immunotherapy",
    "cptac_lscc": "squamous cell carcinoma of the lung",
    "cptac_luad": "lung adenocarcinoma",
    "cmb_lca": "lung cancer",
    "4d_lung": "radiotherapy, phases of breathing",
    "covid_19_ar": "COVID-19, rural; films of nearly all patients",
}
ALIASES = {
    "lidc": "lidc_idri",
    "luna16": "lidc_idri",
    "covid_ny": "covid_19_ny_sbu",
    "covid_ar": "covid_19_ar",
    "lung_dx": "lung_pet_ct_dx",
    "acrin": "acrin_nsclc_fdg_pet",
    "radiogenomics": "nsclc_radiogenomics",
    "lung1": "nsclc_radiomics",
    "lung3": "nsclc_radiomics_genomics",
    "ricord_1a": "midrc_ricord_1a",
    "ricord_1b": "midrc_ricord_1b",
    "ldct": "ldct_and_projection_data",
    "lungx": "spie_aapm_lung_ct_challenge",
    "spie_aapm": "spie_aapm_lung_ct_challenge",
    "lymph_nodes": "mediastinal_lymph_node_seg",
    "qin": "qin_lung_ct",
    "rider": "rider_lung_ct",
    "rider_pet": "rider_lung_pet_ct",
    "anti_pd1": "anti_pd_1_lung",
}
LICENCES = ("cc-by", "any")
# The same patient under two names. QIN LUNG CT R0004 and LungCT-Diagnosis R_004 come from one hospital: of 24 such
# pairs 21 have the same number of slices, and all 24 the same manufacturer and nearly one shift of dates.
_SHARED = {"qin_lung_ct": re.compile(r"R(\d{4})"), "lungct_diagnosis": re.compile(r"R_(\d{3})")}


def resolve(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Collection ids of names as people write them (``LIDC-IDRI``, ``lidc``), each once, in the order given.

    known: the ids that the index holds. Raises :class:`InputError` naming the nearest names for any other.
    """
    known = sorted(known)
    found: dict[str, None] = {}
    for name in names:
        plain = re.sub(r"[^a-z0-9]+", "_", name.strip().lower()).strip("_")
        plain = ALIASES.get(plain, plain)
        if plain not in known:
            near = difflib.get_close_matches(plain, [*ALIASES, *known], n=3, cutoff=0.5)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise InputError(f"collection {name!r} is not in the archive{hint} (get_data.py --list shows them)")
        found[plain] = None
    return list(found)


def check_licence(licence: str) -> None:
    """Raise :class:`InputError` where ``licence`` is not one of :data:`LICENCES`."""
    if licence not in LICENCES:
        near = difflib.get_close_matches(licence.lower(), LICENCES, n=1, cutoff=0.3)
        raise InputError(
            f"--licence {licence!r}: expected cc-by (may be passed on and used by anyone, with attribution) or any"
            f" (also non-commercial terms){f'; nearest: {near[0]}' if near else ''}"
        )


def is_free(licence: str) -> bool:
    """True for CC BY, CC0 and the public domain: no NC, ND or SA, no terms of its own."""
    return bool(re.fullmatch(r"(CC BY|CC0|Public Domain)( [\d.]+)?", licence.strip(), flags=re.IGNORECASE))


def is_non_commercial(licence: str) -> bool:
    """True where a licence forbids commercial use (CC BY-NC, also CC BY-NC-SA)."""
    return bool(re.search(r"\bNC\b", licence, flags=re.IGNORECASE))


def person(collection: str, patient: str) -> str:
    """One text per person: the same for a patient whom two collections know by different ids."""
    shared = _SHARED.get(collection)
    match = shared.fullmatch(patient) if shared else None
    return f"moffitt/{int(match[1])}" if match else f"{collection}/{patient}"


def folder_name(collection: str, patient: str) -> str:
    """Folder and patient id here: ``nlst_100002``, but ``LIDC-IDRI-0001`` where the id names its collection."""
    joined = [re.sub(r"[^a-z0-9]", "", text.lower()) for text in (collection, patient)]
    return safe_name(patient if joined[1].startswith(joined[0]) else f"{collection}_{patient}")
