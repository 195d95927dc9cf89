"""Networks that read what an X-ray shows as a second channel: from training to a volume.

Their ONNX export is tested in test_second_pass_training.py.
"""

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import reconstruct
import train_enhanced_4gpu
from tests.helpers.runs import arguments, build
from tests.helpers.tiny_data import make_checkpoint, make_refinement_checkpoint
from tests.training.test_train_refinement import make_task
from xray2ct.checkpoints import load_checkpoint
from xray2ct.files import InputError
from xray2ct.inference.reconstruction import load_pipeline
from xray2ct.inference.system import DirectSystem
from xray2ct.training.distributed import Processes
from xray2ct.training.initial_weights import start_from
from xray2ct.training.precision import Precision

SEEN = "model.seen_channel=true"
FILMS = "augment.film.probability=1"


@pytest.fixture(scope="module")
def base(root, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("base") / "base.pt", root, settings={"seen_channel": True})


@pytest.fixture(scope="module")
def refinement(root, base):
    return make_refinement_checkpoint(base.with_name("refinement.pt"), root, base)


def films(folder, root, patient="p4"):
    """A pair of pictures as if from elsewhere: 8 bits, the lateral's lower half transparent."""
    paths = []
    for view in ("pa", "lat"):
        pixels = np.asarray(Image.open(root / patient / f"{patient}_{view}_drr.png")) / 65535
        alpha = np.full(pixels.shape, 255)
        alpha[32:] = 255 if view == "pa" else 0
        paths.append(folder / f"{view}.png")
        Image.fromarray(np.dstack([255 * pixels, alpha]).astype(np.uint8), "LA").save(paths[-1])
    return paths


def raw(task, index=0):
    return {key: value[None] for key, value in task.train_data[index].items() if torch.is_tensor(value)}


def test_a_run_on_films_trains_it_and_its_checkpoint_reconstructs(root, tmp_path):
    short = ("training.num_epochs=1", "data.max_patients=2", "world_size=1")
    words = arguments(root, tmp_path / "run", SEEN, FILMS, *short)
    assert train_enhanced_4gpu.main(words) == 0
    best = tmp_path / "run" / "best_model.pt"
    checkpoint = load_checkpoint(best)
    assert checkpoint["model_config"]["seen_channel"] is True
    stem = checkpoint["model_state_dict"]["encoder.stem.weight"]
    _, _, untrained = build(root, SEEN)
    assert (stem - untrained.encoder.stem.weight)[:, 1].abs().max() > 1e-7
    paths = [root / "p4" / f"p4_{view}_drr.png" for view in ("pa", "lat")]
    words = [
        "--pa",
        str(paths[0]),
        "--lateral",
        str(paths[1]),
        "--base",
        str(best),
        "--picture",
        str(tmp_path / "x.png"),
    ]
    assert reconstruct.main([*words, "--output", str(tmp_path / "ct.nii.gz")]) == 0
    assert np.asarray(nib.load(tmp_path / "ct.nii.gz").dataobj).std() > 1


def test_batches_and_validation_have_the_channel_where_the_network_wants_it(root):
    _, task, model = build(root, SEEN, FILMS)
    batch = task.make_batch(raw(task), [3], torch.device("cpu"))
    assert task.network_xrays(batch).shape == (1, 2, 2, 64, 64)
    assert torch.equal(task.network_xrays(batch)[:, :, 1], batch["seen"])
    assert 0 < (batch["seen"] == 0).float().mean() < 1
    for stage in model.decoder:
        torch.nn.init.normal_(stage.head.weight)  # which starts at zero, and nothing before it learns then
    task.loss(model, batch)[0].backward()
    assert model.encoder.stem.weight.grad[:, 1].abs().max() > 0
    (row,) = task.validate(model.eval(), Processes(), Precision("float32", torch.device("cpu")))
    assert row["id"] == "p3"
    assert row["psnr"] > 0
    _, plain, _ = build(root, FILMS)
    batch = plain.make_batch(raw(plain), [3], torch.device("cpu"))
    assert "seen" not in batch
    assert plain.network_xrays(batch) is batch["xrays"]


def test_xrays_from_files_bring_the_channel_too(root):
    _, task, _ = build(root, SEEN, "data.xray_source=files")
    batch = task.make_batch(raw(task), [3], torch.device("cpu"))
    assert (batch["seen"] == 1).all()
    assert task.network_xrays(batch).shape == (1, 2, 2, 64, 64)


def test_stage_2_passes_the_channel_to_its_stage_1(root, base):
    task = make_task(root, base, FILMS)
    batch = task.make_batch(raw(task), [3], torch.device("cpu"))
    assert (batch["seen"] == 0).any()
    expected = task.base(torch.stack([batch["xrays"], batch["seen"]], dim=2))[0]
    assert torch.equal(batch["coarse"], expected)
    assert not torch.equal(batch["coarse"], task.base(batch["xrays"])[0])
    model = task.build_model()
    task.set_criterion(torch.device("cpu"))
    assert torch.isfinite(task.loss(model, batch)[0])


def test_the_volume_depends_on_what_is_seen_and_stage_2_sees_pixels_alone(base, refinement):
    xrays = torch.rand(1, 2, 64, 64, generator=torch.Generator().manual_seed(1))
    seen = torch.ones_like(xrays)
    seen[..., :20] = 0
    both, system = torch.stack([xrays, seen], dim=2), DirectSystem(base, refinement, "cpu")
    coarse = system.coarse(both)
    assert (coarse - system.coarse(xrays)).abs().max() > 1e-3
    assert torch.equal(system.predict(both), system.refine(coarse, xrays))


def test_the_pipeline_reads_what_the_files_show(root, base, tmp_path):
    pipeline = load_pipeline(base, device="cpu")
    pa, lateral = films(tmp_path, root)
    xrays = pipeline.read(pa, lateral, "manifest", check=False)
    assert xrays.shape == (2, 2, 64, 64)
    assert (xrays[0, 1] == 1).all()
    assert (xrays[1, 1, :32] == 1).all()
    assert (xrays[1, :, 32:] == 0).all()
    arrays = pipeline.read(xrays[0, 0], xrays[1, 0], check=False)
    assert torch.equal(arrays[:, 0], xrays[:, 0])
    assert (arrays[:, 1] == 1).all()
    assert (pipeline.predict(xrays) - pipeline.predict(arrays)).abs().max() > 1e-3


def test_evaluation_scores_it(root, base, refinement, tmp_path):
    words = ["--data", str(root), "--base", str(base), "--refinement", str(refinement)]
    assert evaluate.main([*words, "--output", str(tmp_path / "scores"), "--device", "cpu"]) == 0
    assert (tmp_path / "scores" / "per_patient.csv").read_text().count("p4") >= 2


def test_weights_of_a_network_without_the_channel_are_refused(root, tmp_path):
    plain = make_checkpoint(tmp_path / "plain.pt", root, settings={"seen_channel": False})
    _, task, model = build(root, SEEN)
    with pytest.raises(InputError, match=r"plain\.pt: its model.seen_channel is False, this run's is True"):
        start_from(plain, model, task)
