"""Diffusion against closed forms: for Gaussian data the best denoiser and the sampler's result are known exactly."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from hybrid_vit_cascade.diffusion import (
    CLEAN,
    PREDICTIONS,
    Schedule,
    augment_previous,
    ddim_step,
    dpmpp_2m_step,
    draw_noise,
    resolution_shift,
    sample,
    timesteps,
)
from xray2ct.files import InputError

MEAN, SD = 0.3, 0.5  # of the data N(MEAN, SD^2), voxel by voxel


def exact_denoiser(schedule, prediction, mean=MEAN, sd=SD):
    """The best denoiser for data N(mean, sd^2): E[x0 | x_t] by Bayes, written as output of a kind of prediction."""

    def denoise(x, t):
        alpha, sigma = (v.double() for v in schedule.alpha_sigma(t))
        x = x.double()
        x0 = mean + alpha * sd**2 / (alpha**2 * sd**2 + sigma**2) * (x - alpha * mean)
        noise = (x - alpha * x0) / sigma
        return {"x0": x0, "noise": noise, "v": alpha * noise - sigma * x0}[prediction]

    return denoise


def volume(*values):
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1, 1)


# ------------------------------------------------------------------------------------------------
# Schedule


@pytest.mark.parametrize("shift", [1.0, 2.0, 0.125])
def test_the_schedule_runs_from_almost_clean_to_exactly_pure_noise(shift):
    schedule = Schedule(1000, shift)
    t = torch.arange(1000)
    alpha, sigma = schedule.alpha_sigma(t)
    assert alpha.shape == sigma.shape == (1000, 1, 1, 1, 1)
    assert alpha.dtype == torch.float32
    assert alpha[-1].item() == 0.0
    assert sigma[-1].item() == 1.0
    assert sigma[0].item() == pytest.approx(0.01)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha), atol=1e-6)
    assert (schedule.snr(t).diff() < 0).all()
    assert (alpha.diff(dim=0) <= 0).all()
    assert (sigma.diff(dim=0) >= 0).all()
    assert schedule.snr(t).shape == (1000,)
    assert torch.allclose(schedule.snr(t), (alpha / sigma).square().flatten())
    assert schedule.position(torch.tensor([0, 999])).tolist() == [0.0, 1.0]
    assert schedule.position(torch.tensor([333])).item() == pytest.approx(333 / 999)


def test_without_shift_it_is_the_cosine_schedule():
    schedule = Schedule(501)
    position = torch.linspace(0, 1, 501, dtype=torch.float64)
    start = math.asin(0.01)
    angle = start + (math.pi / 2 - start) * position
    alpha, sigma = schedule.alpha_sigma(torch.arange(501))
    assert torch.allclose(alpha.flatten().double(), angle.cos(), atol=1e-7)
    assert torch.allclose(sigma.flatten().double(), angle.sin(), atol=1e-7)


def test_a_shift_moves_log_snr_by_twice_its_logarithm():
    # Near t = 0 the pinned end bends it; in the middle of the schedule the shift is the textbook one.
    t = torch.tensor([300, 500, 700, 900])
    moved = Schedule(1001, 0.125).snr(t).log() - Schedule(1001).snr(t).log()
    assert torch.allclose(moved, torch.full((4,), 2 * math.log(0.125)), atol=0.35)
    # Exactly: tan(angle) = shift sigma / alpha is linear in angle, angle linear in t.
    alpha, sigma = (v.flatten().double() for v in Schedule(1001, 0.125).alpha_sigma(torch.arange(1001)))
    angle = torch.atan2(0.125 * sigma, alpha)
    assert torch.allclose(angle.diff(), angle.diff().mean(), atol=1e-6)


def test_the_shift_for_resolution_keeps_the_snr_of_the_pooled_volume():
    assert resolution_shift(64) == 1.0
    assert 2 * math.log(resolution_shift(256)) == pytest.approx(-3 * math.log(4))
    # Noise at 128^3, averaged to 64^3, is as strong beside the signal as noise at 64^3 under its own schedule.
    shift = resolution_shift(16, base=8)
    fine = Schedule(101, shift)
    t = torch.tensor([60])
    alpha, sigma = fine.alpha_sigma(t)
    noise = sigma * torch.randn(200, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    pooled = torch.nn.functional.avg_pool3d(noise, 2)
    pooled_snr = alpha.item() ** 2 / pooled.var().item()
    angle = math.atan2(shift * sigma.item(), alpha.item())
    assert pooled_snr == pytest.approx(1 / math.tan(angle) ** 2, rel=0.02)  # the unshifted SNR at the same angle


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_timesteps": 1}, "num_timesteps is 1"),
        ({"shift": 0.0}, "shift is 0"),
        ({"shift": math.nan}, "shift is nan"),
        ({"terminal_alpha": 1.0}, "terminal_alpha is 1"),
    ],
)
def test_settings_that_give_no_schedule_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Schedule(**settings)


def test_time_steps_outside_the_schedule_are_refused():
    for t in (-1, 1000):
        with pytest.raises(IndexError):
            Schedule(1000).alpha_sigma(torch.tensor([t]))
    with pytest.raises(IndexError):
        Schedule(1000).level(1000)
    assert Schedule(1000).level(CLEAN) == (1.0, 0.0)


# ------------------------------------------------------------------------------------------------
# Conversions and weights


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("shift", [1.0, 0.2])
def test_conversions_invert_each_other_at_every_step(prediction, shift):
    schedule = Schedule.for_prediction(prediction, 1000, shift)
    t = torch.arange(1000)
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 1000, 1, 2, 2, 2, generator=generator).unbind(0)
    x_t = schedule.add_noise(x0, noise, t)
    output = schedule.target(prediction, x0, noise, t)
    # Rounding of float32 is amplified by 1 / alpha or 1 / sigma where the conversion divides by it.
    assert torch.allclose(schedule.to_x0(output, x_t, t, prediction), x0, atol=1e-4)
    assert torch.allclose(schedule.to_noise(output, x_t, t, prediction), noise, atol=1e-4)


def test_v_is_the_derivative_of_the_noisy_volume_by_the_angle():
    # x = cos(a) x0 + sin(a) noise, so dx / da = cos(a) noise - sin(a) x0: an independent definition of v.
    schedule = Schedule(1001)
    x0, noise, t = volume(0.7), volume(-1.2), torch.tensor([400])
    alpha, sigma = schedule.level(400)
    angle, step = math.atan2(sigma, alpha), 1e-4
    ahead, behind = (math.cos(a) * 0.7 + math.sin(a) * -1.2 for a in (angle + step, angle - step))
    assert schedule.target("v", x0, noise, t).item() == pytest.approx((ahead - behind) / (2 * step), abs=1e-5)


def test_at_pure_noise_v_is_minus_x0_and_noise_prediction_is_refused():
    schedule = Schedule(1000)
    x0, noise, t = volume(0.7), volume(-1.2), torch.tensor([999])
    assert torch.equal(schedule.add_noise(x0, noise, t), noise)
    assert torch.equal(schedule.target("v", x0, noise, t), -x0)
    assert torch.equal(schedule.to_x0(-x0, noise, t, "v"), x0)
    with pytest.raises(ValueError, match="x0 is undefined"):
        schedule.to_x0(noise, noise, t, "noise")
    assert Schedule.for_prediction("noise").alpha_sigma(t)[0].item() == pytest.approx(0.02)
    assert Schedule.for_prediction("v").terminal_alpha == Schedule.for_prediction("x0").terminal_alpha == 0
    with pytest.raises(ValueError, match="prediction 'eps'; expected one of v, noise, x0"):
        schedule.target("eps", x0, noise, t)


def test_loss_weights_are_one_objective_in_three_spaces():
    gamma = 5.0
    schedule = Schedule(1000, 0.5)
    t = torch.arange(1000)
    snr = schedule.snr(t)
    weights = {p: schedule.loss_weight(t, p, gamma) for p in PREDICTIONS}
    for weight in weights.values():
        assert weight.shape == (1000,)
        assert weight.isfinite().all()
        assert (weight > 0).all()
    # The weighted errors of v and x0 agree sample by sample, because v_hat - v = (x0 - x0_hat) / sigma.
    generator = torch.Generator().manual_seed(2)
    x0, noise, guess = torch.randn(3, 1000, 1, 2, 2, 2, generator=generator).unbind(0)
    x_t = schedule.add_noise(x0, noise, t)
    v, v_guess = (schedule.target("v", x, schedule.to_noise(x, x_t, t, "x0"), t) for x in (x0, guess))
    error_v = weights["v"] * (v - v_guess).square().flatten(1).mean(1)
    error_x0 = weights["x0"] * (x0 - guess).square().flatten(1).mean(1)
    assert torch.allclose(error_v, error_x0, rtol=2e-3)
    assert torch.equal(weights["x0"], (snr + 1).clamp_max(gamma))
    assert weights["v"][-1] == weights["x0"][-1] == 1.0
    # Noise: Hang et al. (2023), min(SNR, gamma) / SNR.
    noisy = Schedule.for_prediction("noise", 1000, 0.5)
    expected = noisy.snr(t).clamp_max(gamma) / noisy.snr(t)
    assert torch.allclose(noisy.loss_weight(t, "noise", gamma), expected)


def test_augmentation_of_the_previous_volume_has_the_stated_level():
    previous = torch.full((2, 1, 8, 8, 8), 0.25)
    noise = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    augmented = augment_previous(previous, torch.tensor([0.0, 0.3]), noise)
    assert torch.equal(augmented[0], previous[0])
    assert torch.allclose(augmented[1] - 0.25, 0.3 * noise[1], atol=1e-6)


# ------------------------------------------------------------------------------------------------
# Samplers


def test_time_steps_of_the_sampler_start_at_pure_noise_and_end_clean():
    schedule = Schedule(1000)
    assert timesteps(1, schedule) == [999, CLEAN]
    assert timesteps(4, schedule) == [999, 562, 250, 62, CLEAN]
    assert timesteps(1000, schedule) == [*range(999, -1, -1), CLEAN]
    for steps in (2, 3, 7, 50, 100, 500, 998, 999):
        points = timesteps(steps, schedule)
        assert len(points) == steps + 1
        assert points[0] == 999
        assert all(a > b for a, b in pairwise(points))
        assert points[-2] >= 0
    for steps in (0, -1, 1001):
        with pytest.raises(InputError, match="expected 1 to 1000"):
            timesteps(steps, schedule)


def transport_error(steps, method, prediction="v", shift=1.0, sd=SD, num_timesteps=10000):
    """Largest distance of sampled values to MEAN + sd z: where the exact flow takes the starting noise z."""
    schedule = Schedule.for_prediction(prediction, num_timesteps, shift)
    z = torch.linspace(-3, 3, 61).view(-1, 1, 1, 1, 1)
    start = z
    if prediction == "noise":  # this schedule's noisiest x_t still holds a little of the data
        alpha, sigma = schedule.level(num_timesteps - 1)
        start = alpha * MEAN + math.sqrt(alpha**2 * sd**2 + sigma**2) * z
    result = sample(exact_denoiser(schedule, prediction, sd=sd), schedule, start, steps, method, prediction)
    return (result - (MEAN + sd * z)).abs().max().item()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("method", "tolerance"), [("ddim", 0.02), ("dpmpp_2m", 0.001)])
@pytest.mark.parametrize("shift", [1.0, 0.35])
def test_samplers_transport_noise_to_the_data_distribution(method, tolerance, prediction, shift):
    assert transport_error(200, method, prediction, shift) < tolerance


@pytest.mark.parametrize("shift", [1.0, 0.35])
@pytest.mark.parametrize("sd", [0.25, 0.5, 0.9])
def test_twice_the_steps_of_ddim_halve_the_error_and_dpm_solver_is_far_better(sd, shift):
    ddim = [transport_error(steps, "ddim", sd=sd, shift=shift) for steps in (50, 100, 200)]
    for before, after in pairwise(ddim):
        assert 1.7 < before / after < 2.2
    for steps, error in zip((50, 100, 200), ddim):
        assert transport_error(steps, "dpmpp_2m", sd=sd, shift=shift) < error / 4


@pytest.mark.parametrize("shift", [1.0, 0.35])
def test_few_steps_keep_a_small_spread(shift):
    # 0.05 is 60 HU, the order of what two X-rays leave open in a voxel; evenly spaced steps lose half of it and more.
    assert transport_error(20, "dpmpp_2m", shift=shift, sd=0.05, num_timesteps=1000) < 3 * 0.15 * 0.05


def interior_error(steps, method, sd):
    """Error of the flow between two noise levels, at evenly spaced angles in double precision; starts exactly."""
    angles = torch.linspace(1.3, 0.3, steps + 1, dtype=torch.float64).tolist()
    levels = [(math.cos(a), math.sin(a)) for a in angles]
    spread = [math.hypot(alpha * sd, sigma) for alpha, sigma in levels]
    z = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64)
    x, history = levels[0][0] * MEAN + spread[0] * z, None
    for now, to in pairwise(levels):
        alpha, sigma = now
        x0 = MEAN + alpha * sd**2 / (alpha**2 * sd**2 + sigma**2) * (x - alpha * MEAN)
        if method == "ddim":
            x = ddim_step(x, x0, now, to)
        else:
            x, history = dpmpp_2m_step(x, x0, history, now, to), (x0, now)
    return (x - (levels[-1][0] * MEAN + spread[-1] * z)).abs().max().item()


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
@pytest.mark.parametrize("sd", [0.25, 0.5, 0.9])
def test_the_error_between_two_noise_levels_falls_with_the_methods_order(method, order, sd):
    errors = [interior_error(steps, method, sd) for steps in (50, 100, 200, 400)]
    for before, after in pairwise(errors):
        assert math.log2(before / after) == pytest.approx(order, abs=0.2), errors


def test_samples_have_mean_and_standard_deviation_of_the_data():
    schedule = Schedule(1000)
    noise = draw_noise((4, 1, 32, 32, 32), torch.Generator().manual_seed(0))
    n = noise.numel()
    for method, eta in (("dpmpp_2m", 0.0), ("ddim", 0.0), ("ddim", 1.0)):
        generator = torch.Generator().manual_seed(5)
        result = sample(exact_denoiser(schedule, "v"), schedule, noise, 200, method, eta=eta, generator=generator)
        # First-order methods of 200 steps lose 2 % of the standard deviation; statistical errors are ten times smaller.
        assert result.mean().item() == pytest.approx(MEAN, abs=4 * SD / n**0.5 + 1e-3)
        assert result.std().item() == pytest.approx(SD, rel=0.004 if method == "dpmpp_2m" else 0.025)
        assert np.percentile(result.numpy(), 97.5) == pytest.approx(MEAN + 1.96 * SD, abs=0.03)


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("method", ["ddim", "dpmpp_2m"])
def test_one_step_from_pure_noise_is_the_posterior_mean(prediction, method):
    schedule = Schedule(1000)
    noise = draw_noise((2, 1, 4, 4, 4), torch.Generator().manual_seed(0))
    result = sample(exact_denoiser(schedule, prediction), schedule, noise, 1, method, prediction)
    assert torch.allclose(result, torch.full_like(result, MEAN), atol=1e-6)


def test_ancestral_steps_draw_from_the_posterior_of_bayes():
    # q(x_s | x_t, x0) from the joint Gaussian of (x_s, x_t): x_t = a x_s + noise of variance sigma_t^2 - a^2 sigma_s^2.
    schedule = Schedule(1000)
    for t, s in ((999, 600), (800, 300), (300, 0)):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.level(t), schedule.level(s)
        a = alpha_t / alpha_s
        between = sigma_t**2 - a**2 * sigma_s**2
        precision = 1 / sigma_s**2 + a**2 / between
        x_t, x0 = 0.8, -0.4
        mean = (alpha_s * x0 / sigma_s**2 + a * x_t / between) / precision
        levels = (alpha_t, sigma_t), (alpha_s, sigma_s)
        at_mean, one_up = (ddim_step(volume(x_t), volume(x0), *levels, 1.0, volume(z)).item() for z in (0.0, 1.0))
        assert at_mean == pytest.approx(mean, abs=1e-5)
        assert one_up - at_mean == pytest.approx(precision**-0.5, rel=1e-4)


def test_ddim_of_eta_zero_keeps_the_noise_of_the_exact_trajectory():
    schedule = Schedule(1000)
    now, to = schedule.level(700), schedule.level(200)
    x_t = volume(now[0] * 0.5 + now[1] * 1.5)
    assert ddim_step(x_t, volume(0.5), now, to).item() == pytest.approx(to[0] * 0.5 + to[1] * 1.5, abs=1e-6)


def test_intermediate_eta_leaves_the_marginal_alone():
    # Whatever eta, x0 and x_s have to stay jointly Gaussian with the schedule's alpha and sigma.
    schedule = Schedule(1000)
    now, to = schedule.level(900), schedule.level(400)
    generator = torch.Generator().manual_seed(7)
    noise, fresh = torch.randn(2, 20000, 1, 1, 1, 1, generator=generator).unbind(0)
    x0 = volume(0.5).expand(20000, 1, 1, 1, 1)
    for eta in (0.0, 0.5, 1.0):
        x_s = ddim_step(now[0] * x0 + now[1] * noise, x0, now, to, eta, fresh)
        assert x_s.mean().item() == pytest.approx(to[0] * 0.5, abs=0.03)
        assert x_s.std().item() == pytest.approx(to[1], rel=0.02)


@pytest.mark.parametrize(("method", "eta"), [("dpmpp_2m", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
def test_the_same_seed_gives_the_same_sample(method, eta):
    schedule = Schedule(100)

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        noise = draw_noise((1, 1, 8, 8, 8), generator)
        return sample(exact_denoiser(schedule, "v"), schedule, noise, 8, method, eta=eta, generator=generator)

    assert torch.equal(run(0), run(0))
    assert not torch.allclose(run(0), run(1), atol=0.1)


def test_samples_of_a_batch_do_not_depend_on_each_other():
    schedule = Schedule(100)
    noise = draw_noise((3, 1, 4, 4, 4), torch.Generator().manual_seed(0))
    together = sample(exact_denoiser(schedule, "v"), schedule, noise, 6)
    alone = torch.cat([sample(exact_denoiser(schedule, "v"), schedule, n[None], 6) for n in noise])
    assert torch.equal(together, alone)


def test_the_denoiser_sees_every_time_step_once_and_progress_wraps_them():
    schedule = Schedule(1000)
    seen, wrapped = [], []

    def denoise(x, t):
        assert t.dtype == torch.long
        assert t.shape == (2,)
        assert x.dtype == torch.float32
        seen.append(t.tolist())
        return torch.zeros_like(x, dtype=torch.bfloat16)

    def progress(steps):
        wrapped.extend(steps)
        return wrapped

    result = sample(denoise, schedule, torch.ones(2, 1, 2, 2, 2, dtype=torch.float64), 4, progress=progress)
    assert seen == [[999, 999], [562, 562], [250, 250], [62, 62]]
    assert wrapped == [0, 1, 2, 3]
    assert result.dtype == torch.float32


def test_estimates_are_corrected_before_each_step_only_when_asked():
    schedule = Schedule(1000)

    def overshooting(x, t):
        return torch.full_like(x, 1.7)

    noise = draw_noise((1, 1, 4, 4, 4), torch.Generator().manual_seed(0))
    options = {"steps": 5, "prediction": "x0"}
    assert sample(overshooting, schedule, noise, **options).max().item() == pytest.approx(1.7)
    corrected = []

    def correct(x0):
        corrected.append(x0.max().item())
        return x0.clamp(-1, 1)

    assert sample(overshooting, schedule, noise, correct=correct, **options).max().item() == pytest.approx(1.0)
    assert corrected == pytest.approx([1.7] * 5)


def test_unknown_methods_and_noise_levels_are_refused():
    schedule = Schedule(10)
    for method, eta, message in (("euler", 0.0, "euler"), ("dpmpp_2m", 0.5, "eta 0.5"), ("ddim", 1.5, "eta 1.5")):
        with pytest.raises(ValueError, match=message):
            sample(exact_denoiser(schedule, "v"), schedule, torch.zeros(1, 1, 2, 2, 2), 2, method, eta=eta)
