"""Power spectra of slices: against plain NumPy, waves of known amplitude and blurs of known transfer function."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import ndimage

from xray2ct.evaluation.spectrum import BANDS, compare_spectra, power_spectrum
from xray2ct.files import InputError


def noise(seed=0, size=48):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(6, size, size))).float()


def waves(amplitudes, size=48):
    """Slices with one wave along x for each frequency in cycles per voxel."""
    x = np.arange(size)
    row = sum(amplitude * np.sin(2 * np.pi * frequency * x) for frequency, amplitude in amplitudes.items())
    return torch.from_numpy(np.broadcast_to(row, (6, size, size)).copy()).float()


@pytest.mark.parametrize("shape", [(2, 20, 24), (2, 17, 21)])
def test_it_is_the_mean_over_rings_of_the_whole_fourier_plane(shape):
    volume = np.random.default_rng(3).normal(size=shape)
    window = np.outer(*(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n) for n in shape[1:]))
    power = np.zeros(shape[1:])
    for plane in volume:
        power += np.abs(np.fft.fft2((plane - plane.mean()) * window)) ** 2 / shape[0]
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(shape[1]), np.fft.fftfreq(shape[2]), indexing="ij"))
    edges = np.linspace(0, 0.5, BANDS + 1)
    expected = [power[(radius >= low) & (radius < high)].mean() for low, high in pairwise(edges)]
    found = power_spectrum(torch.from_numpy(volume))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_white_noise_has_as_much_power_in_every_ring():
    spectrum = power_spectrum(noise(size=64))
    assert float(spectrum[1:].max() / spectrum[1:].min()) < 1.3


def test_a_wave_of_half_the_amplitude_is_six_decibels_below():
    truth = waves({0.1: 1.0, 0.35: 1.0}) + 0.01 * noise()
    same_fine = compare_spectra(waves({0.1: 0.5, 0.35: 1.0}) + 0.01 * noise(), truth)
    assert same_fine["fine_power_db"] == pytest.approx(0, abs=0.05)
    assert same_fine["lsd_db"] > 1
    half = compare_spectra(waves({0.1: 1.0, 0.35: 0.5}) + 0.01 * noise(), truth)
    assert half["fine_power_db"] == pytest.approx(20 * np.log10(0.5), abs=0.05)
    halved = compare_spectra(0.5 * truth, truth)
    assert halved["lsd_db"] == pytest.approx(-halved["fine_power_db"]) == pytest.approx(6.0206, abs=1e-3)


def test_a_blur_loses_what_its_transfer_function_says():
    sigma, truth = 0.6, noise(1, 64)
    blurred = ndimage.gaussian_filter(truth.numpy(), (0, sigma, sigma), mode="wrap")
    found = compare_spectra(torch.from_numpy(blurred), truth)["fine_power_db"]
    point = np.zeros((256, 256))
    point[128, 128] = 1
    transfer = np.abs(np.fft.fft2(ndimage.gaussian_filter(point, sigma))) ** 2
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(256), np.fft.fftfreq(256), indexing="ij"))
    edges = np.linspace(0.25, 0.5, BANDS // 2 + 1)
    rings = [transfer[(radius >= low) & (radius < high)].mean() for low, high in pairwise(edges)]
    assert found == pytest.approx(10 * np.log10(np.mean(rings)), abs=0.3)


def test_the_place_of_detail_does_not_matter_and_noise_is_above_zero():
    truth = noise()
    moved = compare_spectra(torch.roll(truth, (5, 9), (1, 2)), truth)
    assert moved["fine_power_db"] == pytest.approx(0, abs=0.3)
    assert compare_spectra(truth + noise(5), truth)["fine_power_db"] == pytest.approx(3.01, abs=0.3)


def test_nothing_to_compare_with_is_none_and_a_flat_prediction_is_finite():
    empty = {"fine_power_db": None, "lsd_db": None}
    assert compare_spectra(noise(), torch.zeros(6, 48, 48)) == empty
    assert compare_spectra(noise(size=12), noise(size=12)) == empty
    assert compare_spectra(torch.zeros(6, 48, 48), noise())["fine_power_db"] < -100
    with pytest.raises(InputError, match=r"slices of 12 x 12 voxels: expected at least 16"):
        power_spectrum(noise(size=12))
