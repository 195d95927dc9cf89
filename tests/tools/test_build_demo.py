"""The browser demo: the build refuses what it should; the page's volume is that of reconstruct.py."""

import base64
import functools
import hashlib
import io
import json
import os
import tarfile
import tempfile
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

import reconstruct
from export_onnx import ONNX_PACKAGES
from tests.helpers.chromium import Chromium, find_chromium
from tests.helpers.tiny_data import make_checkpoint, make_dataset
from tools import build_demo
from xray2ct.files import InputError
from xray2ct.imaging.read_xray import read_xray, write_png16
from xray2ct.inference.example import FOLDER, RENDERED, VIEWS

PA, LATERAL = (FOLDER / name for name in VIEWS[RENDERED])
TOLERANCE_HU = 1  # of whole numbers: measured 0 or 1 where a value falls on the edge between two
SIZE = 32


def archive(files: dict[str, bytes]) -> bytes:
    """An npm package's ``.tgz``."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def package(data: bytes, *files: str) -> build_demo.Package:
    digest = base64.b64encode(hashlib.sha512(data).digest()).decode()
    return build_demo.Package("ort-toy", "1.2.3", f"sha512-{digest}", files)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """``(folder, address)`` of a web server on this machine."""
    folder = tmp_path_factory.mktemp("served")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# ------------------------------------------------------------------------------------------------
# onnxruntime-web from a registry


def test_the_wanted_files_of_a_package_come_from_the_registry(served):
    folder, address = served
    data = archive({"dist/a.mjs": b"code", "dist/b.wasm": b"\0asm", "dist/unwanted.js": b"x"})
    (folder / "ort-toy" / "-").mkdir(parents=True)
    (folder / "ort-toy" / "-" / "ort-toy-1.2.3.tgz").write_bytes(data)
    found = build_demo.runtime_files(package(data, "dist/a.mjs", "dist/b.wasm"), None, address + "/")
    assert found == {"a.mjs": b"code", "b.wasm": b"\0asm"}
    with pytest.raises(InputError, match=r"--registry: has the hash .*; expected .*, of ort-toy 1\.2\.3"):
        build_demo.runtime_files(package(b"another", "dist/a.mjs"), None, address)


def test_what_a_registry_does_not_have_is_refused(served):
    with pytest.raises(InputError, match=r"missing@1\.0 cannot be downloaded \(HTTP Error 404.*npm pack missing@1\.0"):
        build_demo.download(build_demo.Package("missing", "1.0", "", ()), served[1])
    with pytest.raises(InputError, match="--registry file:///etc: expected an address"):
        build_demo.download(build_demo.RUNTIME, "file:///etc")


def test_a_package_file_is_checked(tmp_path):
    data = archive({"dist/a.mjs": b"code"})
    (tmp_path / "toy.tgz").write_bytes(data)
    with pytest.raises(InputError, match=r"toy\.tgz: dist/b\.mjs is missing"):
        build_demo.runtime_files(package(data, "dist/b.mjs"), str(tmp_path / "toy.tgz"), None)
    with pytest.raises(InputError, match=r"toy\.tgz: has the hash .*of onnxruntime-web"):
        build_demo.main(["--output", str(tmp_path / "site"), "--package", str(tmp_path / "toy.tgz")])
    with pytest.raises(InputError, match="--package stands for a download"):
        build_demo.main(["--output", "site", "--package", "x.tgz", "--registry", "https://example.org"])
    assert not (tmp_path / "site").exists()


# ------------------------------------------------------------------------------------------------
# The site, of a tiny network


def runtime() -> dict[str, bytes] | None:
    """onnxruntime-web from ``$ONNXRUNTIME_WEB``, a file of npm pack, or one of its name in the temporary folder."""
    wanted = build_demo.RUNTIME
    file = os.environ.get("ONNXRUNTIME_WEB") or Path(tempfile.gettempdir()) / f"{wanted.name}-{wanted.version}.tgz"
    try:
        return build_demo.runtime_files(wanted, str(file), None)
    except (InputError, OSError):
        return None


@pytest.fixture(scope="module")
def site(served, tmp_path_factory):
    """The page with a tiny network, in the served folder."""
    for name in ONNX_PACKAGES:
        pytest.importorskip(name)
    work = tmp_path_factory.mktemp("work")
    root = make_dataset(work / "data", patients=3)
    small = {"encoder_blocks": [0] * 4, "decoder_blocks": [0] * 3, "transformer_blocks": 0}  # the export takes long
    checkpoint = make_checkpoint(work / "tiny.pt", root, settings={"xray_size": SIZE, **small})
    (served[0] / "CNAME").write_text("demo.example.org")
    build_demo.build(served[0], str(checkpoint), runtime() or {})
    return served[0], served[1], checkpoint


def test_the_site_is_complete_and_leaves_other_files_alone(site):
    folder, _, checkpoint = site
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert {path.name for path in build_demo.PAGE.glob("*.js")} <= {path.name for path in folder.iterdir()}
    for name in ("style.css", "main.js", "example/README.md", "vendor/LICENSE.txt", "LICENSE", ".nojekyll"):
        assert (folder / name).is_file(), name
        assert name.startswith(".") or name in page
    assert (folder / "CNAME").read_text() == "demo.example.org"
    assert not list(folder.glob(".new*"))
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    assert about["name"] == checkpoint.stem
    assert about["model_bytes"] == (folder / about["model"]).stat().st_size
    assert (folder / "example" / "pa.png").read_bytes() == PA.read_bytes()


@pytest.fixture(scope="module")
def browser(site):
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium found (apt-get install chromium, or $CHROMIUM)")
    if not (site[0] / "vendor" / "ort.wasm.bundle.min.mjs").is_file():
        pytest.skip(
            f"$ONNXRUNTIME_WEB names no file of npm pack {build_demo.RUNTIME.name}@{build_demo.RUNTIME.version}"
        )
    with Chromium(path) as running:
        yield running


@pytest.fixture
def page(browser, site):
    opened = browser.open(site[1] + "/index.html")
    opened.wait("document.getElementById('about').textContent !== ''")
    yield opened
    assert opened.complaints() == []
    assert all(url.startswith((site[1], "blob:", "data:")) for url in opened.requests())


def choose(page, view: str, path) -> None:
    """Give a file to one of the page's inputs, as a user does."""
    root = page.call("DOM.getDocument")["root"]["nodeId"]
    node = page.call("DOM.querySelector", nodeId=root, selector=f"#{view}")["nodeId"]
    page.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])
    page.wait("!document.getElementById('reconstruct').disabled")


def text(page, element: str) -> str:
    return page.run(f"document.getElementById('{element}').textContent")


def press(page, button: str) -> None:
    page.click(f"#{button}")
    page.wait(f"!document.getElementById('{button}').disabled")


def downloaded(browser, page, folder: Path) -> Path:
    """The file behind the page's button."""
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    press(page, "download")
    wanted = folder / "synthetic_ct.nii.gz"
    deadline = time.monotonic() + 60
    while not wanted.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    return wanted


def test_the_example_gives_the_volume_of_reconstruct(browser, page, site, tmp_path):
    press(page, "example")
    assert text(page, "problem") == ""
    assert "Reconstructed in" in text(page, "status")
    assert text(page, "pa-notes") == ""
    found = nib.Nifti1Image.from_filename(downloaded(browser, page, tmp_path))
    output = tmp_path / "ct.nii.gz"
    reconstruct.main(["--pa", str(PA), "--lateral", str(LATERAL), "--base", str(site[2]), "--output", str(output)])
    wanted = nib.Nifti1Image.from_filename(output)
    difference = np.abs(np.asarray(found.dataobj, np.int32) - np.asarray(wanted.dataobj, np.int32))
    assert np.ptp(np.asarray(wanted.dataobj)) > 20  # not all the same
    assert difference.max() <= TOLERANCE_HU
    assert found.header == wanted.header
    middle = np.asarray(found.dataobj)[:, :, found.shape[2] // 2].T  # rows front to back, columns right to left
    shown = page.run(
        "(() => { const c = document.querySelector('.slice canvas');"
        " return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 0); })()"
    )
    grey = ((middle + 300.0) / 1400 + 0.5).clip(0, 1) * 255
    assert np.abs(np.array(shown).reshape(middle.shape) - grey).max() <= 0.51
    phone = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.call("Emulation.setDeviceMetricsOverride", **phone)
    assert page.run("document.documentElement.scrollWidth") == 390


@pytest.mark.parametrize("edge", [SIZE, 50, 96])
def test_pictures_are_read_as_the_reader_does(page, tmp_path, edge):
    """As they are, up, down by whole and other ratios; PNGs of 16 and 8 bit, and in colour, which the browser reads."""
    example = Image.fromarray(np.asarray(Image.open(PA)).astype(np.float32) / 65535)
    pixels = np.asarray(example.resize((edge, edge), Image.Resampling.BOX)).clip(0, 1)
    bytes_ = Image.fromarray(np.rint(pixels * 255).astype(np.uint8))
    write_png16(tmp_path / "a.png", pixels)
    bytes_.save(tmp_path / "b.png")
    bytes_.convert("RGB").save(tmp_path / "c.png")
    for size, name, tolerance in ((48, "a.png", 1e-6), (SIZE, "b.png", 1e-6), (SIZE, "c.png", 1e-6)):
        data = base64.b64encode((tmp_path / name).read_bytes()).decode()
        found = page.run(
            "(async () => { const { readXray } = await import('./xray.js');"
            f" const file = await new Response(Uint8Array.from(atob('{data}'), (c) => c.charCodeAt(0))).blob();"
            f" const about = {{ xray_size: {size}, own_mark: ['Software', ''], bright: [[0, 1], [0, 1]] }};"
            " return [...(await readXray(file, 'x', 0, about)).pixels]; })()"
        )
        wanted = read_xray(tmp_path / name, size=size).pixels
        assert np.abs(np.array(found).reshape(wanted.shape) - wanted).max() <= tolerance, name


def test_what_the_page_cannot_read_is_refused_by_a_sentence(page, tmp_path):
    grey = np.asarray(Image.open(PA))
    bad = {
        "wide.png": (Image.fromarray(grey[:400]), "wide.png: is 512 x 400 pixels; expected a square picture"),
        "small.png": (Image.fromarray(grey[:20, :20]), "is 20 x 20 pixels; expected an edge of 32 to 8192"),
        "flat.png": (Image.new("L", (64, 64), 90), "values from 35 % to 35 % of full white"),
        "inverted.png": (Image.fromarray((40000 - grey.clip(0, 40000)).astype(np.uint16)), "bone looks dark"),
        "clear.png": (Image.new("RGBA", (64, 64), (90, 90, 90, 9)), "has transparent pixels"),
        "lines.png": (Image.new("1", (64, 64)), "is a 1-bit picture"),
    }
    for name, (picture, sentence) in bad.items():
        picture.save(tmp_path / name)
        choose(page, "pa", tmp_path / name)
        assert sentence in text(page, "problem"), name
    for name, data in {"text.png": b"not a picture", "cut.png": PA.read_bytes()[:50000]}.items():
        (tmp_path / name).write_bytes(data)
        choose(page, "pa", tmp_path / name)
        assert text(page, "problem").startswith(f"{name}: "), name
    press(page, "reconstruct")
    assert text(page, "problem") == "Missing: the PA and the lateral X-ray; expected two pictures."
    choose(page, "lateral", LATERAL)
    choose(page, "pa", LATERAL)
    press(page, "reconstruct")
    assert "Both pictures are the same" in text(page, "problem")
    assert page.run("document.getElementById('viewer').hidden")


def test_pictures_that_are_no_renderings_are_said_to_be_none(page, tmp_path):
    bright = np.asarray(Image.open(PA)).astype(np.float32) * 1.7
    Image.fromarray(bright.clip(0, 65535).astype(np.uint16)).save(tmp_path / "bright.png")
    choose(page, "pa", tmp_path / "bright.png")
    assert text(page, "problem") == ""
    assert "Not marked as a rendering" in text(page, "pa-notes")
    assert "Far brighter than renderings" in text(page, "pa-notes")


def test_windows_and_slices_by_the_keyboard(page):
    press(page, "example")
    shown = "document.querySelector('.slice canvas').toDataURL()"
    place = "document.querySelector('.plane output').textContent"
    before, first = page.run(shown), page.run(place)
    page.run("document.getElementById('axial-slice').focus()")
    page.press("ArrowRight")
    assert page.run(place) != first
    page.run("document.querySelector('#windows input').focus()")
    after = page.run(shown)
    page.press("ArrowDown")
    assert page.run("document.querySelector('#windows input:checked').value") == "Lung"
    assert len({before, after, page.run(shown)}) == 3
