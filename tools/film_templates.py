"""Train the two small networks that read films, from prepared CTs: what a film shows, and where the lungs are on it.

    python -m tools.film_templates --data data --patients ids.txt --output xray2ct/imaging

writes film_view.npz (view, facing, polarity, quarter turns) and film_scale.npz (the lungs' box, the statistics of the
lungs' size in these CTs, and how far the box is off in CTs that its network has not seen: five-fold cross-validation).

Each CT is rendered in several poses, without couch and with softer or harder bone; each rendering becomes simulated
films: scatter, local contrast, collimation, frames, markers, opacities, noise, cropping to what the CT covers. A
seventh of the samples are no chest radiographs: CT slices, parts of renderings, drawn limbs, hands, heads and dental
panoramas, noise. All draws follow from --seed. Name in film_weights.txt, next to the weights, whose CTs they come from.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

from xray2ct.data.manifest import MANIFEST
from xray2ct.files import InputError, atomic_path, read_json, run_cli
from xray2ct.geometry.projector import FOV_MM, Geometry, render_xrays
from xray2ct.imaging import film_scale, film_view
from xray2ct.imaging.body import body_mask, remove_couch
from xray2ct.imaging.cube_files import mask_path, read_cube
from xray2ct.imaging.film_frame import trim
from xray2ct.imaging.film_scale import lung_shares
from xray2ct.imaging.film_view import EDGE, HYPOTHESES, logits, rank_thumbnail

CUBE, RENDERED, POSES = 64, 96, 8  # voxels, pixels, poses per CT
FILM = 64  # pixels of a simulated film
CHANNELS = (8, 16, 16)
BATCH, DROPOUT = 48, 0.3
FOLDS = 5
NO_CHEST = 2  # class of the samples: 0 frontal, 1 lateral facing left


# ------------------------------------------------------------------------------------------------
# Simulated films


@dataclass
class Rendered:
    """One CT in several poses: X-rays (poses, 2, 96, 96), the lungs' box on each (poses, 2, 4: top, bottom, left and
    right in pixels), their height, width and depth in mm (poses, 3), the cube in HU (64, 64, 64), and the first and
    last scanned row as shares of its height."""

    xrays: np.ndarray
    boxes: np.ndarray
    sizes_mm: np.ndarray
    cube: np.ndarray
    rows: tuple[float, float]


def render_poses(path, rng, poses: int = POSES) -> Rendered:
    """Render one prepared CT; the first pose is the patient's own."""
    hu, mask, _ = read_cube(path, size=2 * CUBE)
    scanned = np.flatnonzero(mask.any(axis=(1, 2)))
    hu = remove_couch(hu)
    lungs = _lungs(hu).reshape(CUBE, 2, CUBE, 2, CUBE, 2).mean(axis=(1, 3, 5))
    hu = hu.reshape(CUBE, 2, CUBE, 2, CUBE, 2).mean(axis=(1, 3, 5))
    pictures, boxes, sizes = [], [], []
    for pose in range(poses):
        matrix = np.eye(3)
        if pose:
            matrix = _rotation(np.deg2rad(rng.uniform(-1, 1, 3) * (5, 8, 5))) / rng.uniform(0.92, 1.08, 3)[:, None]
        middle = np.full(3, (CUBE - 1) / 2)
        offset = middle - matrix @ middle
        posed = ndimage.affine_transform(hu, matrix, offset, order=1, cval=-1024)
        posed = np.where(posed > 150, 150 + (posed - 150) * rng.uniform(0.5, 1.6), posed).clip(-1024, 1476)
        unit = torch.from_numpy((posed + 1024) / 2500).float()[None, None]
        pictures.append(render_xrays(unit, Geometry(), (RENDERED, RENDERED))[0].numpy())
        box = _extents(ndimage.affine_transform(lungs, matrix, offset, order=1))
        boxes.append([[*box[0], *box[2]], [*box[0], *box[1]]])
        sizes.append((box[:, 1] - box[:, 0])[[0, 2, 1]] * FOV_MM)  # height, width, depth
    rows = (scanned[0] / len(mask), (scanned[-1] + 1) / len(mask))
    return Rendered(np.stack(pictures), RENDERED * np.array(boxes), np.array(sizes), hu, rows)


def _lungs(hu) -> np.ndarray:
    """The large regions of -960 to -400 HU within the body, ``(D, H, W)`` float32."""
    air = ndimage.binary_opening((hu > -960) & (hu < -400) & body_mask(hu, FOV_MM / len(hu)))
    labels, _ = ndimage.label(air)
    sizes = np.bincount(labels.ravel())[1:]
    return np.isin(labels, 1 + np.flatnonzero(sizes >= 0.2 * sizes.max(initial=0))).astype(np.float32)


def _extents(lungs) -> np.ndarray:
    """``(3, 2)``: where the middle 98 % of the lungs' volume begin and end along each axis, as shares of the cube."""
    extents = []
    for axis in range(3):
        profile = np.cumsum(lungs.sum(axis=tuple(other for other in range(3) if other != axis)))
        places = np.interp((0.01 * profile[-1], 0.99 * profile[-1]), np.r_[0, profile], np.arange(len(profile) + 1))
        extents.append(places / len(profile))
    return np.array(extents)


def _rotation(angles) -> np.ndarray:
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def simulated_film(xray: np.ndarray, rows: tuple[float, float], rng, view: int) -> tuple[np.ndarray, np.ndarray]:
    """A rendering ``(96, 96)`` -> a film ``(64, 64)`` of part of it, and top, bottom, left and right of that part.

    rows: what of the rendering the CT covers, as shares. No frames yet: :func:`framed`.
    """
    x = xray
    if rng.random() < 0.7:  # scatter
        x = x + rng.uniform(0, 0.5) * (ndimage.gaussian_filter(x, rng.uniform(6, 14)) - x * rng.uniform(0, 0.6))
    if rng.random() < 0.6:  # local contrast, enhanced or flattened
        x = x - rng.uniform(-0.2, 0.8) * ndimage.gaussian_filter(x, rng.uniform(3, 12))
    film, window = _cropped(x, rows, rng, view)
    film = (film - film.min()) / max(float(np.ptp(film)), 1e-6)
    if rng.random() < 0.6:  # uneven exposure
        film = film + rng.uniform(0, 0.2) * _noise_field(rng, 4)
    if rng.random() < 0.6:  # opacities
        for _ in range(rng.integers(1, 5)):
            film = film + rng.uniform(0.05, 0.45) * _blob(rng.uniform(0, FILM, 2), rng.uniform(4, 14, 2))
    if view == 0 and rng.random() < 0.5:  # shoulders and arms that hang: raised in a CT
        for column in (0, FILM - 1):
            film = film + rng.uniform(0.1, 0.9) * _blob((rng.uniform(-5, 25), column), rng.uniform((8, 4), (30, 14)))
    if rng.random() < 0.3:
        film = film + rng.uniform(0.02, 0.08) * rng.normal(size=film.shape)
    for _ in range(rng.integers(0, 3)):  # markers
        top, left, height, width = *rng.integers(0, FILM - 6, 2), *rng.integers(1, 5, 2)
        film[top : top + height, left : left + width] = rng.choice((film.min(), film.max()))
    return film, window


def framed(film: np.ndarray, rng) -> np.ndarray:
    """A third of the films with a collimator's shadow, or a white page, along some of their edges."""
    if rng.random() < 0.35:
        level = rng.choice((film.min(), film.max()))
        for turn in range(4):
            if rng.random() < 0.6:
                np.rot90(film, turn)[: rng.integers(1, 8)] = level
    return film


def _cropped(x, rows, rng, view) -> tuple[np.ndarray, np.ndarray]:
    """Within what the CT covers, from wider than the body to well within it, turned by up to 5 degrees."""
    n = len(x)
    first, last = int(np.ceil(rows[0] * n)) + 3, int(rows[1] * n) - 3
    cut = rng.uniform(0, (0.15, 0.3)) * (rng.random(2) < 0.6) * (last - first)
    columns = np.flatnonzero((x[first:last] > x.min() + 0.05 * np.ptp(x)).mean(axis=0) > 0.3)
    left, right = (columns[0], columns[-1]) if len(columns) > 10 else (0, n - 1)
    margins = rng.uniform(-0.25, (0.22, 0.12)[view], 2) * (right - left)
    window = np.array([first + cut[0], last - cut[1], left + margins[0], right - margins[1]])
    if rng.random() < 0.15:  # this project's own renderings: all of the cube, black bands where the CT ends
        window, first, last = np.array([0.0, n - 1, 0.0, n - 1]), 0, n - 1
    v, u = np.meshgrid(np.linspace(*window[:2], FILM), np.linspace(*window[2:], FILM), indexing="ij")
    angle, (cv, cu) = np.deg2rad(rng.uniform(-5, 5)), (v.mean(), u.mean())
    where = (
        (cv + (v - cv) * np.cos(angle) + (u - cu) * np.sin(angle)).clip(first, last),
        cu - (v - cv) * np.sin(angle) + (u - cu) * np.cos(angle),
    )
    return ndimage.map_coordinates(x, where, order=1, mode="constant", cval=float(np.median(x[:, :2]))), window


def _blob(centre, size) -> np.ndarray:
    v, u = np.mgrid[:FILM, :FILM]
    return np.exp(-(((v - centre[0]) / size[0]) ** 2) - ((u - centre[1]) / size[1]) ** 2)


def _noise_field(rng, cells: int) -> np.ndarray:
    return ndimage.zoom(rng.normal(size=(cells, cells)), FILM / cells, order=3)[:FILM, :FILM]


# ------------------------------------------------------------------------------------------------
# No chest radiographs


def no_chest(rng, cubes, renderings) -> np.ndarray:
    """A picture that is no chest radiograph, in any position."""
    v, u = np.mgrid[-1 : 1 : FILM * 1j, -1 : 1 : FILM * 1j]
    kind = rng.integers(0, 7)
    if kind == 0:  # axial CT slice
        low, width = rng.choice([-1000, -500, -160]), rng.uniform(300, 1500)
        return np.clip((cubes[rng.integers(len(cubes))][rng.integers(8, CUBE - 8)] - low) / width, 0, 1)
    if kind == 1:  # part of a rendering: a shoulder, an abdomen
        size = int(rng.uniform(18, 34))
        top, left = rng.integers(0, RENDERED - size, 2)
        return renderings[rng.integers(len(renderings))][top : top + size, left : left + size]
    if kind == 2:
        return _noise_field(rng, int(rng.choice((2, 3, 5, 8, 12, 32, FILM))))
    drawn = (_limb, _hand, _head, _panorama)[kind - 3](rng, v, u)
    return np.rot90(drawn + 0.06 * _noise_field(rng, 8), rng.integers(4)) * rng.choice([1, -1])


def _limb(rng, v, u) -> np.ndarray:
    angle, half = rng.uniform(0, np.pi), rng.uniform(0.2, 0.9)
    across = u * np.cos(angle) + v * np.sin(angle)
    picture = np.sqrt(np.clip(half**2 - across**2, 0, None))
    for place in rng.uniform(-0.5, 0.5, rng.integers(1, 3)) * half:
        picture += 1.5 * np.sqrt(np.clip(rng.uniform(0.06, 0.25) ** 2 - (across - place) ** 2, 0, None))
    return picture


def _hand(rng, v, u) -> np.ndarray:
    picture = 0.4 * np.sqrt(np.clip(1 - (u / 0.5) ** 2 - ((v - 0.55) / 0.5) ** 2, 0, None))
    for finger in range(5):
        angle = np.deg2rad(-35 + 17 * finger + rng.normal(0, 4))
        across, along = u * np.cos(angle) + (v - 0.9) * np.sin(angle), (v - 0.9) * np.cos(angle) - u * np.sin(angle)
        flesh = 5 * np.sqrt(np.clip(0.12**2 - across**2, 0, None))
        bone = 0.5 * (np.abs(across) < 0.05) * (np.sin(9 * along) > -0.7)
        picture = picture + (along < 0) * (along > -rng.uniform(1.2, 1.7)) * (flesh + bone)
    return picture


def _head(rng, v, u) -> np.ndarray:
    width, height = rng.uniform(0.5, 0.85, 2)
    radius = np.hypot(u / width, (v + 0.15) / height)
    skull = 0.5 * np.sqrt(np.clip(1 - radius**2, 0, None)) + 0.7 * np.exp(-(((radius - 0.93) / 0.06) ** 2))
    return skull + 0.5 * np.exp(-((u / 0.35) ** 2) - ((v - 0.65) / 0.3) ** 2)


def _panorama(rng, v, u) -> np.ndarray:
    arch = v - 0.3 * rng.uniform(-1, 1) * u**2
    teeth = np.exp(-((arch / rng.uniform(0.15, 0.4)) ** 2)) * (1 + 0.4 * np.sin(rng.uniform(15, 30) * u))
    return teeth + 0.3 * np.exp(-(((np.abs(u) - 0.9) / 0.2) ** 2))


# ------------------------------------------------------------------------------------------------
# Training


def view_samples(rendered: list[Rendered], count: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """Thumbnails ``(count, 32, 32)`` in the upright position, and their classes."""
    cubes = [ct.cube for ct in rendered]
    renderings = np.concatenate([ct.xrays.reshape(-1, RENDERED, RENDERED) for ct in rendered])
    thumbnails, classes = [], []
    for _ in tqdm(range(count), desc="simulating films", unit="film"):
        kind = int(rng.integers(0, 2)) if rng.random() < 0.85 else NO_CHEST
        if kind == NO_CHEST:
            film = no_chest(rng, cubes, renderings)
            film = film + 1e-3 * rng.normal(size=film.shape)  # an empty slice has one value
        else:
            ct = rendered[rng.integers(len(rendered))]
            film, _ = simulated_film(ct.xrays[rng.integers(len(ct.xrays)), kind], ct.rows, rng, kind)
        film = framed(film, rng)
        thumbnails.append(rank_thumbnail(trim(film)[0].cut(film)))
        classes.append(kind)
    return np.stack(thumbnails), np.array(classes)


def scale_samples(rendered: list[Rendered], count: int, rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of thumbnails ``(count, 2, 32, 32)``, the lungs' boxes as shares of the films (count, 2, 4), their CT."""
    thumbnails, boxes, owners = [], [], []
    for _ in tqdm(range(count), desc="simulating pairs", unit="pair"):
        owner = int(rng.integers(len(rendered)))
        ct = rendered[owner]
        pose = rng.integers(len(ct.xrays))
        for view in range(2):
            film, window = simulated_film(ct.xrays[pose, view], ct.rows, rng, view)
            start, length = window[[0, 0, 2, 2]], (window[[1, 3]] - window[[0, 2]]).repeat(2)
            # A pixel's value stands at its centre, the box counts edges.
            thumbnails.append(rank_thumbnail(film))
            boxes.append((ct.boxes[pose, view] - 0.5 - start) / length)
        owners.append(owner)
    shape = (count, 2, EDGE, EDGE)
    return np.stack(thumbnails).reshape(shape), np.stack(boxes).reshape(count, 2, 4), np.array(owners)


def whole(ct: Rendered) -> bool:
    """Do the lungs end within the scan? Statistics of their size are for those."""
    top, bottom = ct.boxes[0, 0, :2] / RENDERED
    return top > ct.rows[0] + 0.02 and bottom < ct.rows[1] - 0.02


def _optimize(weights, loss_of, steps: int, count: int, generator, label: str) -> None:
    """AdamW with a one-cycle schedule on batches of 48, in place."""
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    progress = tqdm(range(steps), desc=label, unit="step")
    for _ in progress:
        loss = loss_of(torch.randint(count, (BATCH,), generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def _stored(weights) -> dict[str, np.ndarray]:
    return {name: value.detach().half().numpy() for name, value in weights.items()}


def train_view(thumbnails: np.ndarray, classes: np.ndarray, steps: int, seed: int) -> dict[str, np.ndarray]:
    """Weights of :func:`film_view.logits`, float16, by cross-entropy over all positions."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout
    weights = {**_initial(2, generator), "none": torch.zeros(1, requires_grad=True)}

    def loss_of(chosen):
        pictures, targets = _turned(thumbnails[chosen], classes[chosen], generator)
        return torch.nn.functional.cross_entropy(logits(weights, pictures, DROPOUT), targets)

    _optimize(weights, loss_of, steps, len(classes), generator, "view network")
    return _stored(weights)


def train_scale(thumbnails: np.ndarray, boxes: np.ndarray, steps: int, seed: int) -> dict[str, torch.Tensor]:
    """Weights of :func:`film_scale.lung_shares`, by the L1 distance of boxes."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    weights = _initial(8, generator)
    inputs, targets = torch.from_numpy(thumbnails), torch.from_numpy(boxes).float()

    def loss_of(chosen):
        return sum(
            (lung_shares(weights, inputs[chosen, view], DROPOUT / 3)[:, view] - targets[chosen, view]).abs().mean()
            for view in range(2)
        )

    _optimize(weights, loss_of, steps, len(boxes), generator, "scale network")
    return weights


def scale_weights(rendered: list[Rendered], samples: int, steps: int, seed: int) -> dict[str, np.ndarray]:
    """What film_scale.npz holds: weights, ``log_size`` (3), ``size_covariance`` (3, 3), ``error_covariance`` (4, 4)."""
    rendered = [ct for ct in rendered if whole(ct)]
    if len(rendered) < FOLDS:
        raise InputError(f"{len(rendered)} of the CTs show the lungs from top to bottom; expected {FOLDS} at least")
    thumbnails, boxes, owners = scale_samples(rendered, samples, np.random.default_rng(seed + 1))
    errors = []
    for fold in range(FOLDS):
        unseen = owners % FOLDS == fold
        weights = train_scale(thumbnails[~unseen], boxes[~unseen], steps, seed)
        with torch.no_grad():
            found = [lung_shares(weights, torch.from_numpy(thumbnails[unseen, view]))[:, view] for view in range(2)]
        errors.append(_log_sizes(torch.stack(found, 1).numpy()) - _log_sizes(boxes[unseen]))
    error = np.concatenate(errors)
    print(
        f"lungs' size on unseen CTs, PA height and width, lateral height and depth: off by {error.std(axis=0).round(3)}"
    )
    sizes = np.log([ct.sizes_mm[0] for ct in rendered])
    return {
        **_stored(train_scale(thumbnails, boxes, steps, seed)),
        "log_size": sizes.mean(axis=0),
        "size_covariance": np.cov(sizes.T),
        "error_covariance": np.cov(error.T),
    }


def _log_sizes(boxes) -> np.ndarray:
    return np.log((boxes[..., 1::2] - boxes[..., ::2]).clip(0.05)).reshape(len(boxes), 4)


def _initial(outputs: int, generator) -> dict[str, torch.Tensor]:
    inputs = (1, *CHANNELS)
    shapes = {f"w{i}": (out, inputs[i], 3, 3) for i, out in enumerate(CHANNELS)}
    shapes["w3"] = (outputs, CHANNELS[-1] * (EDGE // 8) ** 2)
    weights = {}
    for name, shape in shapes.items():
        fan_in = int(np.prod(shape[1:]))
        weights[name] = torch.randn(shape, generator=generator) * (2.0 / fan_in) ** 0.5
        weights[name.replace("w", "b")] = torch.zeros(shape[0])
    return {name: value.requires_grad_() for name, value in weights.items()}


def _turned(thumbnails, classes, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Each picture in a random position, and which of the 25 outcomes is right."""
    pictures, targets = [], []
    draws = torch.randint(16, (len(classes),), generator=generator).tolist()
    for picture, kind, draw in zip(torch.from_numpy(thumbnails), classes.tolist(), draws):
        polarity, turn, mirrored = draw // 8, draw // 2 % 4, draw % 2
        picture = torch.rot90(picture.flip(-1) if mirrored else picture, -turn) * (1 - 2 * polarity)
        hypothesis = 0 if kind == 0 else 1 + mirrored
        pictures.append(picture)
        targets.append(2 * 4 * len(HYPOTHESES) if kind == NO_CHEST else (polarity * 4 + turn) * 3 + hypothesis)
    return torch.stack(pictures), torch.tensor(targets)


def find_patients(data: Path, listed: Path | None) -> list[Path]:
    """Prepared volumes of the patients listed in a text file, one a line; without one, of the training patients."""
    if listed is None:
        ids = read_json(data / MANIFEST)["split"]["train"]
    else:
        ids = listed.read_text(encoding="utf-8").split()
    paths = [data / patient / f"{patient}.nii.gz" for patient in ids]
    for path in paths:
        if not path.is_file() or not mask_path(path).is_file():
            raise InputError(f"{path}: no such prepared CT, or its scan mask is missing; expected one per patient")
    if not paths:
        raise InputError(f"{listed or data}: no patients")
    return paths


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of prepare_data.py")
    parser.add_argument("--patients", type=Path, help="patients to take, one a line (default: the training patients)")
    parser.add_argument("--output", type=Path, required=True, help="folder for film_view.npz and film_scale.npz")
    parser.add_argument("--samples", type=int, default=12000, help="simulated films (default %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of training (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of films and networks (default %(default)s)")
    args = parser.parse_args(argv)
    paths = find_patients(args.data, args.patients)
    args.output.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    rendered = [render_poses(path, rng) for path in tqdm(paths, desc="rendering", unit="CT")]
    view = train_view(*view_samples(rendered, args.samples, rng), args.steps, args.seed)
    _write(args.output / film_view.WEIGHTS, view)
    _write(args.output / film_scale.WEIGHTS, scale_weights(rendered, args.samples // 3, args.steps, args.seed))
    print(f"weights from {len(paths)} CTs in {args.output}")
    return 0


def _write(path: Path, arrays) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        np.savez_compressed(stream, **arrays)


if __name__ == "__main__":
    run_cli(main)
