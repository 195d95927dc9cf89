"""The model card of exported weights, in the format of the Hugging Face Hub, from their JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xray2ct.evaluation.record import markdown_table
from xray2ct.models.registry import REFINEMENT_KIND

SHOWN = ("psnr_strict", "ssim_3d", "mae_hu", "psnr_x2ct", "ssim_slices", "projection_relative")  # scores of the table


def model_card(weights: dict) -> str:
    """Markdown with the Hub's front matter; ``weights``: the JSON beside them, see ``tools/export_weights.py``."""
    sections = (_front_matter, _head, _use, _training, _data, _scores, _film_scores, _limits, _licence)
    return "\n\n".join(filter(None, (section(weights) for section in sections))) + "\n"


def _front_matter(weights: dict) -> str:
    tags = ("medical", "ct-reconstruction", "x-ray", "chest", "sparse-view", "3d")
    lines = [f"license: {(weights.get('licence') or 'other').lower()}", "library_name: xray2ct", "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in tags), "---"])


def _head(weights: dict) -> str:
    header = weights["checkpoint"]
    if header["kind"] == REFINEMENT_KIND:
        size = f"{4 * header['coarse_size'][0]}^3"
        what = f"Stage 2: refines the {header['coarse_size'][0]}^3 volume of stage 1 to {size} voxels"
    else:
        size = " x ".join(map(str, header["model_config"].get("volume_size", "?")))
        what = f"Stage 1: two orthogonal chest X-rays (PA and lateral) in, a CT volume of {size} voxels out"
    geometry = header["geometry"]
    return "\n".join(
        [
            f"# {weights['name']}",
            "",
            f"{what}, over {geometry['fov_mm']:g} mm, in Hounsfield units {_interval(header['hu_window'])}.",
            f"{weights['bytes'] / 1e6:.1f} MB as {weights['dtype']}; SHA-256 `{weights['sha256']}`, fingerprint of the"
            f" weights `{weights['fingerprint']}`, which every volume made with them carries.",
        ]
    )


def _interval(window) -> str:
    return f"{window[0]:g} to {window[1]:g}"


def _use(weights: dict) -> str:
    name, header = weights["name"], weights["checkpoint"]
    first = "chest64+" if header["kind"] == REFINEMENT_KIND else ""
    geometry = f"{header['geometry']['kind']} geometry {_geometry(header['geometry'])}".rstrip()
    return f"""## Intended use

Research and teaching: reconstruction from two views, starting point for fine-tuning (`--init {name}`), baseline.
**Not a medical device: not for diagnosis, planning or any decision about a patient.** Most of a volume is what is
likely, not what was measured; small lesions are not seen.

```bash
python reconstruct.py --pa PA.png --lateral LATERAL.png --weights {first}{name} --output ct.nii.gz
```

Expected are X-rays in the {geometry}, of {header["xray_size"]}^2 pixels or more.
{_films(header)}"""


def _geometry(geometry: dict) -> str:
    lengths = [f"{key.removesuffix('_mm')} {geometry[key]:g} mm" for key in ("sdd_mm", "sid_mm") if geometry.get(key)]
    return f"({', '.join(lengths)})" if lengths else ""


def _films(header: dict) -> str:
    share = header.get("config", {}).get("augment", {}).get("film", {}).get("probability", 0)
    if share:
        return (
            f"{share:.0%} of the training pairs were simulated films. There are no scores on real films, since nobody"
            " knows their true volumes."
        )
    return "Trained on rendered X-rays (DRRs) alone: on real films it breaks the anatomy."


def _training(weights: dict) -> str:
    header, facts = weights["checkpoint"], weights.get("training", {})
    epochs = header.get("config", {}).get("training", {}).get("num_epochs", "?")
    scores = header.get("metrics", {})
    epoch, step = header.get("epoch", "?"), header.get("step", "?")
    lines = [f"- epoch {epoch} of {epochs}, step {step}, chosen by PSNR on validation patients"]
    if "psnr" in scores:
        lines[0] += f": {scores['psnr']:.2f} dB strict"
    if "psnr_film" in scores:
        parts = f"clean renderings ({scores['psnr_clean']:.2f}) and simulated films ({scores['psnr_film']:.2f})"
        lines[0] += f", halfway between {parts}"
    if facts:
        machine = ", ".join(facts["gpus"]) if facts["gpus"] else f"{facts['cpu']}, {facts['threads']} threads, no GPU"
        lines.append(f"- {facts['date']}, {facts['minutes']:.0f} minutes on {machine}; torch {facts['torch']}")
        changed = " with changes that are not committed" if facts["dirty"] else ""
        lines.append(f"- code at commit `{facts['commit']}`{changed}")
    if "init" in header:
        lines.append(f"- began with the weights `{header['init']['fingerprint']}`, epoch {header['init']['epoch']}")
    lines.append(f"- data fingerprint `{header.get('data_fingerprint')}`, split `{str(header['split_hash'])[:16]}`")
    return "\n".join(["## Training", "", *lines, "", "The whole configuration is in the JSON (`checkpoint.config`)."])


def _data(weights: dict) -> str:
    rows = weights.get("patients", [])
    if not rows:
        ids = weights["checkpoint"].get("train_patients", [])
        return f"## Training data\n\n{len(ids)} patients; no source or licence of them is stated."
    lines = [
        f"## Training data\n\n{len(rows)} patients of public collections; their CTs are not part of the weights.",
        "",
    ]
    lines += ["| collection | patients | licence | DOI |", "|---|---|---|---|"]
    collections = sorted({(row["collection"], row["licence"], row["doi"]) for row in rows})
    for collection, licence, doi in collections:
        names = ", ".join(row["patient"] for row in rows if (row["collection"], row["doi"]) == (collection, doi))
        lines.append(f"| {collection} | {names} | {licence} | [{doi}](https://doi.org/{doi}) |")
    if weights.get("citations"):
        lines += ["", *(f"- {weights['citations'][doi]}" for doi in sorted(weights["citations"]))]
    return "\n".join(lines)


def _scores(weights: dict) -> str:
    scores = weights.get("scores")
    if not scores:
        return "## Scores\n\nNot evaluated yet."
    names = [name for name in SHOWN if all(name in method for method in scores["methods"].values())]
    lines = [f"## Scores\n\n{len(scores['patients'])} test patients, none of them trained on or chosen by"]
    lines[0] += f" ({', '.join(scores['patients'])}); mean +- sd, computed on {scores['device']}."
    lines += ["", f"| method | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for method, values in scores["methods"].items():
        cells = (f"{values[name]['mean']:.4g} +- {values[name]['sd']:.2g}" for name in names)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", *(f"- `{name}`: {scores['protocols'][name]}" for name in names if name in scores["protocols"])]
    worst = weights["worst"]["patient"]
    lines += ["", f"Worst of them: {worst}, {scores['per_patient'][worst]:.2f} dB strict."]
    if weights["worst"]["picture"]:
        lines += ["", f"![the worst case: X-rays, reconstruction, truth]({weights['worst']['picture']})"]
    return "\n".join(lines)


def _film_scores(weights: dict) -> str:
    films = weights.get("film_scores")
    if not films:
        return ""
    return (
        f"## Simulated films\n\nPSNR in dB on films of {len(films['patients'])} test patients by other physics than"
        f" training draws (`python -m tools.film_benchmark`), pixel spacing {films['spacing']}; in brackets, moved to"
        f" where the volume fits best.\n\n{film_table('film', films['networks'], films['cases'])}"
    )


def film_table(corner: str, networks: Sequence[str], cases: Mapping[str, dict]) -> str:
    """Markdown of a film benchmark: one row per case, one column per network; ``corner`` heads the names of the cases.

    cases: for each case the entry of each network, see ``tools/film_benchmark.py``: ``table``.
    """
    rows = ([case, *(_film_cell(entries[name]) for name in networks)] for case, entries in cases.items())
    return markdown_table([corner, *networks], rows)


def _film_cell(entry: dict) -> str:
    """A case's mean scores with a network: ``21.69 (22.02); 1 of 8 refused``."""
    refused = f"{entry['refused']} of {entry['patients']} refused" if entry["refused"] else ""
    found = "" if entry["psnr"] is None else f"{entry['psnr']:.2f} ({entry['psnr_moved']:.2f})"
    return "; ".join(filter(None, (found, refused)))


def _limits(weights: dict) -> str:
    count = len(weights["checkpoint"].get("train_patients", []))
    return f"""## Limits

- Trained on {count} patients: anatomy that is rare among them (large effusions, a missing lung, implants, children) is
  drawn towards the usual one.
- Two X-rays do not determine a volume: fine vessels, nodules and the depth of small structures are guessed or left out.
- Other geometries, windows and scales than the stated ones are refused or wrong; arms beside the body, a couch in the
  picture and cut-off lungs may lower the scores."""


def _licence(weights: dict) -> str:
    if not weights.get("licence"):
        return "## Licence\n\nNone is stated."
    return (
        "## Licence\n\n"
        f"{weights['licence']} ({weights['licence_file']}): use and share them with attribution to this project and to"
        " the collections above. The code is under the licence of its repository."
    )
