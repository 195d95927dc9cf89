"""Exported files give what PyTorch gives, at any batch, say what they need, and are refused where they differ."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

import export_onnx
from dataset import PatientDataset
from hybrid_vit_cascade.system import load_cascade_system
from tests.helpers.paths import ROOT
from tests.helpers.tiny_cascade import make_cascade
from tests.helpers.tiny_data import make_checkpoint, make_dataset, make_refinement_checkpoint
from xray2ct.files import InputError
from xray2ct.geometry.projector import Geometry, line_integrals
from xray2ct.inference import onnx as onnx_module
from xray2ct.inference.reconstruction import load_pipeline
from xray2ct.inference.system import DirectSystem
from xray2ct.models.normalisation import normalise

SCRIPT = ROOT / "docs" / "onnx_inference.py"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A data set of a geometry of its own, both stages and a cascade trained on it."""
    folder = tmp_path_factory.mktemp("export")
    root = make_dataset(folder / "data", geometry=Geometry(fov_mm=340.0, sdd_mm=1500.0, sid_mm=1200.0))
    small = {"encoder_blocks": [1, 0, 0, 0], "decoder_blocks": [1, 0, 0]}  # tracing time goes by the number of layers
    base = make_checkpoint(folder / "base.pt", root, settings={"xray_size": 32, **small})  # stage 2 sees finer X-rays
    make_refinement_checkpoint(folder / "refinement.pt", root, base, settings={"start": "cubic"})
    make_cascade(folder / "cascade", root)
    return folder


@pytest.fixture(scope="module")
def direct(work):
    """Both stages as ONNX by the command, checked on the data set's test patients."""
    for package in export_onnx.ONNX_PACKAGES:
        pytest.importorskip(package)
    both = ["--base", str(work / "base.pt"), "--refinement", str(work / "refinement.pt")]
    assert export_onnx.main([*both, "--output", str(work / "model.onnx"), "--data", str(work / "data")]) == 0
    return work


def three_cases(work) -> torch.Tensor:
    """A batch that the export never saw: training patients."""
    data = PatientDataset(work / "data", "train", 64, 64)
    return torch.stack([data[index]["xrays"] for index in range(3)])


def test_both_stages_in_onnx_give_pytorchs_volumes(direct):
    xrays = three_cases(direct)
    expected = DirectSystem(direct / "base.pt", direct / "refinement.pt", "cpu").predict(xrays)
    assert expected.shape == (3, 1, 64, 64, 64)
    assert (expected[0] - expected[1]).abs().max() > 0.01  # the X-rays matter
    assert (onnx_module.onnx_runner(direct / "model.onnx")(xrays) - expected).abs().max() <= 1e-5


def test_the_onnx_file_says_what_it_needs_and_nothing_about_this_machine(direct):
    import onnx

    model = onnx.load(direct / "model.onnx")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", onnx_module.OPSET)]
    for value, name, wanted in ((model.graph.input[0], "xrays", [2, 64, 64]), (model.graph.output[0], "volume", None)):
        dims = value.type.tensor_type.shape.dim
        assert (value.name, dims[0].dim_param) == (name, "batch")
        assert [dim.dim_value for dim in dims[1:]] == (wanted or [1, 64, 64, 64])
    about = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert about["hu_window"] == [-1024.0, 1476.0]
    assert about["xray_size"] == 64
    assert Geometry.from_dict(about["geometry"]) == Geometry(fov_mm=340.0, sdd_mm=1500.0, sid_mm=1200.0)
    assert_no_sources_named(direct / "model.onnx")


def assert_no_sources_named(path):
    content = path.read_bytes()
    assert str(ROOT).encode() not in content
    assert b"model_enhanced.py" not in content


def case(work, patient="p4") -> list[Path]:
    return [work / "data" / patient / f"{patient}_{view}_drr.png" for view in ("pa", "lat")]


def test_the_readmes_script_writes_reconstructs_nifti_without_torch(direct, tmp_path):
    lines = [line for line in SCRIPT.read_text(encoding="utf-8").split('"""')[2].splitlines() if line.strip()]
    assert len(lines) <= 25
    script, output = shutil.copy(SCRIPT, tmp_path), tmp_path / "ct.nii.gz"
    arguments = [str(path) for path in (script, direct / "model.onnx", *case(direct), output)]
    code = f"import runpy, sys; sys.argv = {arguments!r}; runpy.run_path(sys.argv[0])"
    code += "; assert 'torch' not in sys.modules"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    hu, affine = load_pipeline(direct / "base.pt", direct / "refinement.pt", device="cpu")(*case(direct))
    image = nib.load(output)
    assert np.abs(np.asarray(image.dataobj).transpose(2, 1, 0).astype(int) - hu).max() <= 1
    assert np.allclose(image.affine, affine)


@pytest.mark.parametrize("fault", ["colour", "oblong", "JPEG", "turned", "transparent", "animated"])
def test_the_readmes_script_refuses_pictures_that_it_would_misread(direct, tmp_path, monkeypatch, fault):
    pa, lateral = case(direct)
    with Image.open(pa) as picture:
        grey = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    path, options = tmp_path / ("x.jpg" if fault == "JPEG" else "x.png"), {}
    if fault == "colour":
        grey = grey.convert("RGB")
    if fault == "oblong":
        grey = grey.crop((0, 0, 60, 64))
    if fault == "turned":
        options["exif"] = Image.Exif()
        options["exif"][274] = 6
    if fault == "transparent":
        options["transparency"] = 255
    if fault == "animated":
        options |= {"save_all": True, "append_images": [Image.fromarray(255 - np.asarray(grey))]}
    grey.save(path, **options)
    monkeypatch.setattr(sys, "argv", ["x", *map(str, (direct / "model.onnx", path, lateral, tmp_path / "ct.nii"))])
    with pytest.raises(SystemExit, match=r"x\.(png|jpg): expected a square grey PNG"):
        runpy.run_path(str(SCRIPT))
    assert not (tmp_path / "ct.nii").exists()


@pytest.mark.parametrize("arguments", [["--help"], [], ["model.onnx", "pa.png", "lateral.png"]])
def test_the_script_says_how_it_is_called(arguments, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT))
    assert stopped.value.code == "usage: python onnx_inference.py model.onnx PA.png LATERAL.png ct.nii.gz"


def test_the_path_through_a_cascade_is_its_posterior_mean(work):
    """Untraced: tracing a whole cascade takes minutes, and is tested by hand."""
    system = load_cascade_system(work / "cascade", device="cpu")
    xrays = torch.nn.functional.avg_pool2d(three_cases(work), 2)
    expected = torch.cat([system.cascade.posterior_mean(xray[None]) for xray in xrays])
    assert expected.shape == (3, 1, 32, 32, 32)
    with torch.no_grad():
        assert (system.export_module()(xrays) - expected).abs().max() <= 1e-5
    assert torch.equal(system.predict(xrays[:1]), expected[:1])


def test_one_stage_of_a_cascade_as_onnx(work, tmp_path, capsys):
    for package in export_onnx.ONNX_PACKAGES:
        pytest.importorskip(package)
    system = load_cascade_system(work / "cascade", max_stages=1, device="cpu")
    xrays = torch.nn.functional.avg_pool2d(three_cases(work), 2)
    output = tmp_path / "stage1.onnx"
    onnx_module.export(system, output, xrays[:2])
    assert capsys.readouterr().out.count("largest difference from PyTorch") == 2
    expected = torch.cat([system.cascade.posterior_mean(xray[None]) for xray in xrays])
    assert (onnx_module.onnx_runner(output)(xrays) - expected).abs().max() <= 1e-5
    assert_no_sources_named(output)


def test_onnx_normalises_large_feature_maps_as_exactly_as_torch():
    for package in export_onnx.ONNX_PACKAGES:
        pytest.importorskip(package)
    import onnxruntime

    torch.manual_seed(0)
    norm, features = torch.nn.GroupNorm(4, 32), torch.randn(2, 32, 256, 256) + 3.0
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    model = onnx_module.to_onnx(torch.export.export(norm.eval(), (features,)))
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"xrays": features.numpy()})[0]
    exact = norm.double()(features.double()).detach()
    assert (torch.from_numpy(found) - exact).abs().max() < 1e-5  # onnxruntime's own operator: 4e-5


class RenderedTwice(torch.nn.Module):
    """A volume's X-rays and those of half of it, normalised."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.GroupNorm(1, 2)

    def forward(self, volume):
        both = [line_integrals(share * volume, Geometry(), (16, 16)) for share in (1.0, 0.5)]
        return normalise(torch.cat(both), self.norm)


def test_a_trace_makes_weights_once_and_knows_no_autocast():
    graph = onnx_module.trace(RenderedTwice(), (1, 8, 8, 8)).graph
    called = [str(node.target) for node in graph.nodes]
    assert called.count("aten.clamp_min.default") == 2  # hats of either view, alike for rows and columns of a cube
    assert called.count("aten.group_norm.default") == 1
    assert not [name for name in called if "autocast" in name]


class MeanBrightness(torch.nn.Module):
    def forward(self, xrays):
        return xrays.mean((1, 2, 3)).reshape(-1, 1, 1, 1, 1).expand(-1, 1, 16, 16, 16)


class Brighter(DirectSystem):
    """Predicts a little more than what it exports, which is traced in no time."""

    def predict(self, xrays):
        return self.export_module()(xrays) + 2e-4

    def export_module(self):
        return MeanBrightness()


def test_a_file_that_differs_is_refused_and_the_old_one_kept(work, tmp_path, capsys):
    for package in export_onnx.ONNX_PACKAGES:
        pytest.importorskip(package)
    output = tmp_path / "model.onnx"
    output.write_bytes(b"before")
    system = Brighter(work / "base.pt", device="cpu")
    xrays = onnx_module.check_xrays(system)
    with pytest.raises(InputError, match=r"0\.0002 away from PyTorch; expected at most 0\.0001; not written"):
        onnx_module.export(system, output, xrays)
    assert output.read_bytes() == b"before"
    onnx_module.export(system, output, xrays, tolerance=1e-3)
    assert output.read_bytes() != b"before"
    assert "batch 2, largest difference from PyTorch 0.0002 (0.5 HU)" in capsys.readouterr().out


def test_a_mix_up_of_the_batch_and_nan_are_seen(work):
    system = DirectSystem(work / "base.pt", device="cpu")
    module, xrays = system.export_module(), onnx_module.check_xrays(system)
    expected = torch.cat([system.predict(xray[None]) for xray in xrays])
    onnx_module.check_file("right", lambda x: module(x).detach(), xrays, expected, 2500, 1e-5)
    with pytest.raises(InputError, match=r"wrong: .* away from PyTorch"):
        onnx_module.check_file("wrong", lambda x: module(x).detach().flip(0), xrays, expected, 2500, 1e-3)
    with pytest.raises(InputError, match="nan away from PyTorch"):
        onnx_module.check_file("nan", lambda x: module(x).detach() * torch.nan, xrays, expected, 2500, 1e9)
    with pytest.raises(InputError, match=r"flat: gives a volume of \(1, 16, 16, 16\); expected \(1, 1, 16, 16, 16\)"):
        onnx_module.check_file("flat", lambda x: module(x)[0], xrays, expected, 2500, 1e9)


def test_a_phantoms_xrays_look_like_those_of_data(work):
    xrays = onnx_module.phantom_xrays(DirectSystem(work / "base.pt", device="cpu"), 64)
    assert xrays.shape == (2, 64, 64)
    assert 0.3 < xrays.max() <= 1
    assert xrays[:, 32, 32].min() > 3 * xrays[:, 32, 1].max()  # a body, with air next to it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "a.pt", "--weights", "chest64", "--output", "a.onnx"], "--weights stands for --base"),
        (["--base", "a.pt", "--cascade", "b", "--output", "a.onnx"], "either --base"),
        (["--cascade", "b", "--refinement", "c.pt", "--output", "a.onnx"], "--refinement belongs to --base"),
        (["--base", "a.pt", "--output", "a.bin"], r"--output a.bin: expected a name ending in .onnx"),
        (["--base", "a.pt", "--output", "a.onnx", "--check-pa", "p.png"], "--check-pa and --check-lateral go together"),
        (["--base", "a.pt", "--output", "a.onnx", "--tolerance", "nan"], "--tolerance nan"),
        (
            ["--base", "a.pt", "--output", f"{__file__}/a.onnx"],
            r"--output .*a\.onnx: cannot be written \(Not a directory",
        ),
        (["--base", "a.pt", "--output", "a.onnx"], "needs onnxruntime: pip install onnx onnxscript onnxruntime"),
    ],
)
def test_what_cannot_be_exported_is_named(arguments, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    with pytest.raises(InputError, match=message):
        export_onnx.main(arguments)


def test_a_missing_checkpoint_is_named(tmp_path):
    for package in export_onnx.ONNX_PACKAGES:
        pytest.importorskip(package)
    with pytest.raises(InputError, match=r"missing\.pt: no such checkpoint"):
        export_onnx.main(["--base", "missing.pt", "--output", str(tmp_path / "a.onnx")])


def test_a_cascade_that_predicts_noise_is_refused(work, tmp_path):
    make_cascade(tmp_path / "noise", work / "data", prediction="noise")
    with pytest.raises(InputError, match="stage low predicts noise, which has no one-step posterior mean"):
        load_cascade_system(tmp_path / "noise", device="cpu").export_module()
