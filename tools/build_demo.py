"""The browser demo of docs/demo as a folder for any web server: the page, the network as ONNX, and onnxruntime-web.

    python -m tools.build_demo --output site
    python -m http.server --directory site             # then open http://localhost:8000
    python -m tools.build_demo --output site --package onnxruntime-web-1.30.0.tgz      # without network

onnxruntime-web comes from the npm registry that npm is set up for (``--registry`` names another), or as a file of
``npm pack``; either way its hash has to be the one written here. The page reads all it needs to know of the network
from ``about.json``. Files of an earlier build are replaced together, others in the folder are kept.
"""

from __future__ import annotations

import base64
import hashlib
import io
import shutil
import subprocess
import tarfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xray2ct.command_line import Parser
from xray2ct.files import InputError, check_writable, read_json, replaced_together, run_cli, write_json
from xray2ct.imaging.cube_files import nifti_image
from xray2ct.imaging.write_volume import SYNTHETIC
from xray2ct.imaging.xray_picture import OWN_MARK
from xray2ct.imaging.xray_scale import OWN_LEVELS, REFERENCE_PERCENTILES
from xray2ct.inference import example
from xray2ct.inference.onnx import check_xrays, export, metadata
from xray2ct.inference.reconstruction import Pipeline
from xray2ct.inference.system import DirectSystem
from xray2ct.weights import DEFAULT, find

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "demo"
PUBLIC_REGISTRY = "https://registry.npmjs.org/"
TIMEOUT = 120.0  # seconds without a byte
NIFTI_HEADER = 352  # bytes before the voxels of a NIfTI-1 file: header and empty extension


@dataclass(frozen=True)
class Package:
    """An npm package: ``integrity`` as ``npm view NAME dist.integrity`` has it, ``files`` the wanted ones of it."""

    name: str
    version: str
    integrity: str
    files: tuple[str, ...]


RUNTIME = Package(
    "onnxruntime-web",
    "1.30.0",
    "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
    ("dist/ort.wasm.bundle.min.mjs", "dist/ort-wasm-simd-threaded.wasm"),
)


# ------------------------------------------------------------------------------------------------
# onnxruntime-web


def npm_registry() -> str:
    """The registry of npm's own configuration; the public one where there is no npm."""
    npm = shutil.which("npm")
    if npm is None:
        return PUBLIC_REGISTRY
    asked = subprocess.run([npm, "config", "get", "registry"], capture_output=True, text=True, check=False)
    address = asked.stdout.strip()
    return address if address.startswith(("https://", "http://")) else PUBLIC_REGISTRY


def download(package: Package, registry: str) -> bytes:
    """The package's archive from an npm registry; :class:`InputError` where it cannot be had."""
    if not registry.startswith(("https://", "http://")):
        raise InputError(f"--registry {registry}: expected an address that begins with https:// or http://")
    url = f"{registry.rstrip('/')}/{package.name}/-/{package.name}-{package.version}.tgz"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            return answer.read()
    except (OSError, ValueError, urllib.error.URLError) as error:
        wanted = f"{package.name}@{package.version}"
        raise InputError(
            f"--registry: {wanted} cannot be downloaded ({error}); expected an npm registry that has it, or --package"
            f" with a file of: npm pack {wanted}"
        ) from None


def unpack(archive: bytes, package: Package, origin) -> dict[str, bytes]:
    """The package's wanted files by their plain names.

    Raises :class:`InputError` naming ``origin`` where the archive's hash is not the package's, or it lacks a file.
    """
    found = "sha512-" + base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if found != package.integrity:
        raise InputError(
            f"{origin}: has the hash {found[:23]}...; expected {package.integrity[:23]}..., of {package.name}"
            f" {package.version}"
        )
    files = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for name in package.files:
            try:
                member = tar.extractfile(f"package/{name}")
            except KeyError:
                member = None
            if member is None:
                raise InputError(f"{origin}: {name} is missing; expected it in {package.name} {package.version}")
            files[Path(name).name] = member.read()
    return files


def runtime_files(package: Package, file: str | None, registry: str | None) -> dict[str, bytes]:
    """The wanted files of ``package``: from its archive ``file``, or from ``registry`` (default: npm's)."""
    if file is None:
        return unpack(download(package, registry or npm_registry()), package, "--registry")
    return unpack(Path(file).read_bytes(), package, f"--package {file}")


# ------------------------------------------------------------------------------------------------
# The folder


def build(folder: Path, weights: str, vendored: dict[str, bytes]) -> None:
    """Write the site into ``folder``: all of it, or nothing.

    weights: name or path of a stage 1. vendored: files of onnxruntime-web by name. Raises :class:`InputError` for
    weights that a page with two plain pictures cannot serve, and what :func:`xray2ct.inference.onnx.export` raises.
    """
    system = DirectSystem(weights, None, device="cpu")
    if system.seen_channel:
        raise InputError(
            f"--weights {weights}: expected weights without model.seen_channel, which the page cannot fill"
        )
    pictures = [example.FOLDER / name for name in example.VIEWS[example.RENDERED]]
    with replaced_together(folder, lambda: ()) as staging:
        for path in sorted(PAGE.iterdir()):
            shutil.copyfile(path, staging / path.name)
        copy_example(staging / "example", pictures)
        vendor = staging / "vendor"
        vendor.mkdir()
        for name, data in vendored.items():
            (vendor / name).write_bytes(data)
        (staging / "LICENSE-onnxruntime-web.txt").replace(vendor / "LICENSE.txt")
        shutil.copyfile(ROOT / "LICENSE", staging / "LICENSE")
        (staging / ".nojekyll").touch()  # GitHub Pages: serve the files as they are
        model = staging / "model.onnx"
        export(system, model, check_xrays(system, *pictures))
        write_json(staging / "about.json", about(system, find(weights), model, copy_licences(staging, find(weights))))


def copy_example(folder: Path, pictures: list[Path]) -> None:
    """The example X-rays under the names of their views, and whose they are."""
    folder.mkdir()
    for path, name in zip(pictures, ("pa.png", "lateral.png")):
        shutil.copyfile(path, folder / name)
    shutil.copyfile(example.FOLDER / "README.md", folder / "README.md")


def copy_licences(folder: Path, weights: Path) -> list[dict[str, str]]:
    """Licence and card of exported weights, where they lie beside them; links to the copies for the page."""
    described = weights.with_suffix(".json")
    if not described.is_file():
        return []
    licence = read_json(described)
    wanted = {"Whose CTs they learned from": weights.with_suffix(".md").name}
    if licence.get("licence_file"):
        wanted[f"Licence of the weights ({licence['licence']})"] = licence["licence_file"]
    links = []
    for text, name in wanted.items():
        if (weights.parent / name).is_file():
            shutil.copyfile(weights.parent / name, folder / name)
            links.append({"text": text, "href": name})
    return links


def about(system: DirectSystem, weights: Path, model: Path, licences: list[dict[str, str]]) -> dict:
    """What the page has to know of the network; see docs/demo.md."""
    known, size = metadata(system, system.export_module()), system.volume_size
    image = nifti_image(np.zeros(size[::-1], np.int16), np.array(known["affine"]))
    origin = Pipeline(system).origin
    image.header["descrip"] = f"{SYNTHETIC}, {origin}".encode()[:79]  # as write_volume has it
    bright = [[level * high for level in OWN_LEVELS] for _, high in REFERENCE_PERCENTILES]
    return {
        **{key: known[key] for key in ("xray_size", "xray_scale", "hu_window", "volume_size")},
        "name": weights.stem,
        "origin": origin,
        "model": model.name,
        "model_bytes": model.stat().st_size,
        "spacing_mm": system.geometry.fov_mm / size[0],
        "own_mark": list(OWN_MARK),
        "bright": bright,  # where the 99th percentile of a rendering lies: PA, lateral
        "nifti_header": base64.b64encode(image.to_bytes()[:NIFTI_HEADER]).decode(),
        "licences": licences,
    }


def main(argv=None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--output", required=True, help="folder to write into")
    parser.add_argument("--weights", metavar="NAME|PATH", default=DEFAULT, help="stage 1 (default %(default)s)")
    parser.add_argument("--registry", metavar="URL", help="npm registry (default: npm's own setting)")
    wanted = f"{RUNTIME.name}-{RUNTIME.version}.tgz"
    parser.add_argument("--package", metavar="FILE", help=f"{wanted}, as from npm pack, instead of a download")
    args = parser.parse_args(argv)
    if args.package and args.registry:
        raise InputError("--package stands for a download; expected it without --registry")
    if not PAGE.is_dir():
        raise InputError(f"{PAGE}: the page is not there; expected a clone of the project")
    check_writable(Path(args.output) / "index.html", "--output")
    build(Path(args.output), args.weights, runtime_files(RUNTIME, args.package, args.registry))
    size = sum(path.stat().st_size for path in Path(args.output).rglob("*") if path.is_file())
    print(f"{args.output}: {size / 1e6:.0f} MB; see it: python -m http.server --directory {args.output}")
    return 0


if __name__ == "__main__":
    run_cli(main)
