"""Diffusion for the cascade: noise schedule, conversions, loss weights and samplers. Tensors only, no networks.

    schedule = Schedule.for_prediction("v", num_timesteps=1000, shift=resolution_shift(128))
    x_t = schedule.add_noise(x0, noise, t)                             # training, t LongTensor (B,)
    loss = schedule.loss_weight(t, "v") * ((output - schedule.target("v", x0, noise, t)) ** 2).flatten(1).mean(1)
    x0 = sample(denoise, schedule, noise, steps=20)                    # sampling; steps=1 is the posterior mean

Conventions. x_t = alpha x0 + sigma noise with alpha^2 + sigma^2 = 1 and noise ~ N(0, 1); volumes are
``(B, 1, D, H, W)``, x0 in [-1, 1]. Time is an integer t in [0, T - 1]: t = 0 is almost clean, t = T - 1 the noisiest
step. The network sees ``position(t)`` = t / (T - 1), in training and in sampling alike.

One step from pure noise. At t = T - 1 of a zero-terminal-SNR schedule x_t holds nothing of x0, so the best prediction
in the mean-square sense is E[x0 | condition]: a single sampling step returns the posterior mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from xray2ct.files import InputError

PREDICTIONS = ("v", "noise", "x0")
METHODS = ("dpmpp_2m", "ddim")
CLEAN = -1  # in a list of time steps: alpha = 1, sigma = 0
FIRST_SIGMA = 0.01  # noise at t = 0: 12.5 HU of the 2,500 HU window; the SNR stays finite
# Noise prediction divides by alpha to get x0: with its last alpha at 0.02 an error of the network counts 50-fold there,
# and the noisiest x_t still shows 2 % of the volume, which a sampler that starts from pure noise does not deliver.
TERMINAL_ALPHA_OF_NOISE_PREDICTION = 0.02


def resolution_shift(volume_size: int, base: int = 64) -> float:
    """Factor on alpha / sigma that keeps the noise's visible strength when a volume has finer voxels.

    Averaging a volume of edge d down to edge b averages (d / b)^3 voxels: smooth anatomy stays, the variance of white
    noise falls by that factor. For the averaged volume to be as noisy as a volume of edge b, the SNR at edge d has to
    be (b / d)^3 of that at edge b: log SNR shifts by -3 log(d / b), alpha / sigma by (b / d)^1.5 (128: 0.354,
    256: 0.125). In 2D the same argument gives -2 log(d / b), the rule of Hoogeboom et al. ("simple diffusion", 2023);
    the exponent 3 is its transfer to volumes, not taken from a paper. 1.0 at the base.
    """
    if volume_size < 1 or base < 1:
        raise InputError(f"volume_size {volume_size} and base {base}; expected positive numbers of voxels")
    return (base / volume_size) ** 1.5


class Schedule:
    """Cosine schedule with zero terminal SNR, shifted in log SNR.

    num_timesteps: T, at least 2. shift: factor on alpha / sigma, so that log SNR moves by 2 log(shift); below 1 is
    noisier; see :func:`resolution_shift`. terminal_alpha: alpha at t = T - 1; 0 is pure noise.

    alpha : sigma = shift cos(a) : sin(a), with the angle a linear in ``position(t)``: the cosine schedule (Nichol and
    Dhariwal, 2021) in the shifted form of Hoogeboom et al. (2023). Its two ends are exact: sigma = 0.01 at t = 0,
    whatever the shift (Nichol and Dhariwal's offset has the same purpose), and alpha = ``terminal_alpha`` at t = T - 1
    (zero terminal SNR: Lin et al., 2024).

    Raises :class:`InputError` for values that give no schedule. Methods take ``t`` as a LongTensor ``(B,)``; one
    outside [0, T - 1] raises ``IndexError`` on the CPU (a GPU asserts).
    """

    def __init__(self, num_timesteps: int = 1000, shift: float = 1.0, terminal_alpha: float = 0.0):
        if num_timesteps < 2:
            raise InputError(f"num_timesteps is {num_timesteps}; expected at least 2")
        if not (math.isfinite(shift) and shift > 0):
            raise InputError(f"shift is {shift}; expected a finite factor above 0")
        if not 0 <= terminal_alpha < 0.5:
            raise InputError(f"terminal_alpha is {terminal_alpha}; expected 0 up to 0.5")
        self.num_timesteps, self.shift, self.terminal_alpha = int(num_timesteps), float(shift), float(terminal_alpha)
        ends = ((math.sqrt(1 - FIRST_SIGMA**2), FIRST_SIGMA), (terminal_alpha, math.sqrt(1 - terminal_alpha**2)))
        first, last = (math.atan2(shift * sigma, alpha) for alpha, sigma in ends)
        angle = torch.linspace(first, last, self.num_timesteps, dtype=torch.float64)
        levels = torch.stack([shift * angle.cos(), angle.sin()], dim=1)  # (T, 2)
        levels /= levels.norm(dim=1, keepdim=True)
        levels[0], levels[-1] = (torch.tensor(end, dtype=torch.float64) for end in ends)  # exact, not but for rounding
        self._levels = levels
        self._on_device: dict[torch.device, torch.Tensor] = {}

    @classmethod
    def for_prediction(cls, prediction: str, num_timesteps: int = 1000, shift: float = 1.0) -> Schedule:
        """The schedule that a kind of network output can be trained and sampled with.

        "v" and "x0": zero terminal SNR. "noise": the last alpha is 0.02, because where alpha = 0 the noise holds
        nothing of x0.
        """
        _check_prediction(prediction)
        terminal_alpha = TERMINAL_ALPHA_OF_NOISE_PREDICTION if prediction == "noise" else 0.0
        return cls(num_timesteps, shift, terminal_alpha)

    def __repr__(self) -> str:
        return f"Schedule({self.num_timesteps}, shift={self.shift:g}, terminal_alpha={self.terminal_alpha:g})"

    # -- levels ------------------------------------------------------------------------------------

    def level(self, t: int) -> tuple[float, float]:
        """(alpha, sigma) of one time step, or of ``CLEAN``, in double precision."""
        if t == CLEAN:
            return 1.0, 0.0
        if not 0 <= t < self.num_timesteps:
            raise IndexError(f"time step {t}; expected 0 to {self.num_timesteps - 1}")
        alpha, sigma = self._levels[t].tolist()
        return alpha, sigma

    def alpha_sigma(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and sigma at ``t`` (B,), each float32 of shape (B, 1, 1, 1, 1)."""
        alpha, sigma = self._at(t).float()[:, :, None, None, None, None].unbind(1)
        return alpha, sigma

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2 at ``t`` (B,): float32 (B,), finite, 0 at a zero terminal SNR."""
        alpha, sigma = self._at(t).unbind(1)
        return (alpha / sigma).square().float()

    def position(self, t: torch.Tensor) -> torch.Tensor:
        """t / (T - 1) in [0, 1], float32 (B,): the time that the network sees."""
        return t.to(torch.float32) / (self.num_timesteps - 1)

    def _at(self, t):
        """(alpha, sigma) at t (B,) as float64 (B, 2); index_select, because indexing would take -1 for T - 1."""
        if t.device not in self._on_device:
            self._on_device[t.device] = self._levels.to(t.device)
        return self._on_device[t.device].index_select(0, t)

    # -- conversions -------------------------------------------------------------------------------

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = alpha x0 + sigma noise; (B, 1, D, H, W)."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * noise

    def target(self, prediction: str, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the network has to put out: x0, the noise, or v = alpha noise - sigma x0 (Salimans and Ho, 2022)."""
        _check_prediction(prediction)
        if prediction == "x0":
            return x0
        if prediction == "noise":
            return noise
        alpha, sigma = self.alpha_sigma(t)
        return alpha * noise - sigma * x0

    def to_x0(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, prediction: str) -> torch.Tensor:
        """x0 that a network output stands for; (B, 1, D, H, W).

        prediction: one of ``PREDICTIONS``. "noise" with a zero terminal SNR raises ``ValueError``: there x0 is
        undefined, use :meth:`for_prediction`.
        """
        self._check_defined(prediction)
        if prediction == "x0":
            return output
        alpha, sigma = self.alpha_sigma(t)
        if prediction == "noise":
            return (x_t - sigma * output) / alpha
        return alpha * x_t - sigma * output

    def to_noise(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, prediction: str) -> torch.Tensor:
        """Noise that a network output stands for; as :meth:`to_x0`."""
        self._check_defined(prediction)
        if prediction == "noise":
            return output
        alpha, sigma = self.alpha_sigma(t)
        if prediction == "x0":
            return (x_t - alpha * output) / sigma
        return sigma * x_t + alpha * output

    def _check_defined(self, prediction):
        _check_prediction(prediction)
        if prediction == "noise" and self.terminal_alpha == 0:
            raise ValueError("noise prediction with zero terminal SNR: x0 is undefined; use Schedule.for_prediction")

    # -- loss --------------------------------------------------------------------------------------

    def loss_weight(self, t: torch.Tensor, prediction: str, gamma: float = 5.0) -> torch.Tensor:
        """Weight of each sample's squared error between output and :meth:`target`; float32 (B,).

        Min-SNR weighting (Hang et al., 2023): nearly clean steps, which would dominate, are held down to gamma.
        In terms of the error of x0 (errors of v count SNR + 1 times, errors of noise SNR times as much) it is

            v, x0:  min(SNR + 1, gamma),  as a weight of the v error  min(SNR + 1, gamma) / (SNR + 1)
            noise:  min(SNR, gamma),      as a weight of the noise error  min(SNR, gamma) / SNR

        The + 1 (the SNR + 1 weighting of Salimans and Ho, 2022, here capped) keeps the weight at 1 where the SNR is 0:
        there v = -x0, the loss is a plain x0 loss of weight 1, and it trains the posterior mean. Without it that step
        would have weight 0. Finite and above 0 at every t.
        """
        _check_prediction(prediction)
        snr = self.snr(t)
        if prediction == "noise":
            return (gamma / snr).clamp_max(1.0)
        if prediction == "x0":
            return (snr + 1).clamp_max(gamma)
        return (gamma / (snr + 1)).clamp_max(1.0)


def _check_prediction(prediction):
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction {prediction!r}; expected one of {', '.join(PREDICTIONS)}")


# ------------------------------------------------------------------------------------------------
# Conditioning augmentation


def augment_previous(previous: torch.Tensor, level: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The previous stage's volume with Gaussian noise, which makes the next stage robust to its errors.

    previous, noise: (B, 1, D, H, W) at the previous stage's resolution, before upsampling, where its errors arise;
    level: standard deviation (B,) in units of the [-1, 1] range, also an input of the network. previous + level noise:
    not scaled down as by Ho et al. (2022), so that "previous + residual" stays a good first estimate. Level 0
    changes nothing.
    """
    return previous + level.to(previous.dtype).view(-1, 1, 1, 1, 1) * noise


# ------------------------------------------------------------------------------------------------
# Sampling


def timesteps(steps: int, schedule: Schedule) -> list[int]:
    """``steps + 1`` descending time steps: T - 1 first, then (T - 1) (1 - i / steps)^2, rounded, and ``CLEAN`` last.

    Always from the noisiest step, as Lin et al. (2024) show is needed. The squared spacing ("quadratic" of Song et al.,
    2021) puts more steps where there is little noise: the last step removes all that is left at once, and with it
    whatever of the data's own spread is smaller. For data of standard deviation 0.05, 20 even steps of DPM-Solver++
    return 0.025, 20 squared ones 0.049. Steps above T or below 1 raise :class:`InputError`.
    """
    last = schedule.num_timesteps - 1
    if not 1 <= steps <= schedule.num_timesteps:
        raise InputError(f"{steps} sampling steps; expected 1 to {schedule.num_timesteps} (num_timesteps)")
    points = [CLEAN]
    for index in range(steps, 0, -1):  # from the clean end: at least one time step apart
        points.append(max(round(last * (1 - (index - 1) / steps) ** 2), points[-1] + 1))
    return points[::-1]


def draw_noise(
    shape, generator: torch.Generator | Sequence[torch.Generator] | None = None, device="cpu"
) -> torch.Tensor:
    """N(0, 1) in float32 on ``device``, drawn on the generator's device: a CPU generator gives a GPU the same noise.

    Of several generators each draws one sample ``(1, *shape[1:])``, whatever the others draw.
    """
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} samples; expected one for each")
        return torch.cat([draw_noise((1, *shape[1:]), one, device) for one in generator])
    source = generator.device if generator is not None else torch.device("cpu")
    return torch.randn(shape, generator=generator, device=source).to(device)


@torch.no_grad()
def sample(
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    schedule: Schedule,
    noise: torch.Tensor,
    steps: int,
    method: str = "dpmpp_2m",
    prediction: str = "v",
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    progress: Callable[[Iterable], Iterable] | None = None,
    correct: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Draw x0 from noise; float32 (B, 1, D, H, W), nominally in [-1, 1] but not clipped at the end.

    denoise: ``(x_t, t LongTensor (B,)) -> output``, an output of kind ``prediction``. noise: N(0, 1) of the volume's
    shape; with ``eta`` 0 the result follows from it. steps: network evaluations; 1 gives the posterior mean (one step
    from pure noise, whatever the method).

    method: "dpmpp_2m", DPM-Solver++(2M) (Lu et al., 2022), second order, deterministic;
    "ddim" (Song et al., 2021), first order; ``eta`` adds fresh noise from ``generator`` at each step, 1 is ancestral
    sampling (DDPM). progress: wraps the iterable of steps (tqdm). correct: changes each estimate of x0 before the step
    is taken, such as to agree with measurements (Chung et al., ICLR 2024, algorithm 1: decomposed diffusion sampling).

    Raises ``ValueError`` for an unknown method, an eta outside [0, 1] or one that DPM-Solver++ does not have.
    """
    if method not in METHODS:
        raise ValueError(f"sampling method {method!r}; expected one of {', '.join(METHODS)}")
    if not 0 <= eta <= 1 or (eta and method != "ddim"):
        raise ValueError(f"eta {eta} with {method}; expected 0, or up to 1 with ddim")
    points = timesteps(steps, schedule)
    x, history = noise.float(), None
    indices = range(steps)
    for index in progress(indices) if progress else indices:
        t = torch.full((len(x),), points[index], dtype=torch.long, device=x.device)
        x0 = schedule.to_x0(denoise(x, t).float(), x, t, prediction)
        if correct is not None:
            x0 = correct(x0)
        now, to = schedule.level(points[index]), schedule.level(points[index + 1])
        if method == "ddim":
            fresh = draw_noise(x.shape, generator, x.device) if eta and points[index + 1] != CLEAN else None
            x = ddim_step(x, x0, now, to, eta, fresh)
        else:
            x = dpmpp_2m_step(x, x0, history, now, to)
            history = x0, now
    return x


def ddim_step(x, x0, now, to, eta: float = 0.0, fresh: torch.Tensor | None = None) -> torch.Tensor:
    """One step of DDIM (Song et al., 2021, eq. 12 and 16) from level ``now`` to ``to``, each (alpha, sigma) floats.

    x: current x_t; x0: its estimate of x0. ``fresh``: N(0, 1), needed where eta > 0 and ``to`` is not clean. eta = 1
    draws from q(x_to | x_now, x0), the ancestral posterior.
    """
    if fresh is None:
        return _first_order_step(x, x0, now, to)
    (alpha, sigma), (alpha_to, sigma_to) = now, to
    spread = eta * sigma_to / sigma * math.sqrt(max(0.0, 1 - (alpha / alpha_to) ** 2))
    noise = (x - alpha * x0) / sigma
    return alpha_to * x0 + math.sqrt(max(0.0, sigma_to**2 - spread**2)) * noise + spread * fresh


def dpmpp_2m_step(x, x0, history, now, to):
    """One step of DPM-Solver++(2M) (Lu et al., 2022, algorithm 2) from level ``now`` to ``to``, (alpha, sigma) floats.

    history: the last step's ``(x0, level)``, or None. The estimate of x0 is extrapolated to the middle of the step in
    log SNR: x0 + (x0 - last x0) h / (2 h_last), h = step in log(alpha / sigma). Without a last one, after a first step
    from pure noise (h_last infinite) and towards clean (h infinite) the step is of first order.
    """
    if history is not None and history[1][0] > 0 and to[1] > 0:
        last_x0, last = history
        before, here, after = (math.log(alpha / sigma) for alpha, sigma in (last, now, to))
        x0 = x0 + (x0 - last_x0) * ((after - here) / (2 * (here - before)))
    return _first_order_step(x, x0, now, to)


def _first_order_step(x, x0, now, to):
    """alpha_to x0 + sigma_to noise with noise = (x - alpha x0) / sigma: DDIM without fresh noise, and DPM-Solver++(1).

    Written without the log SNR, which is infinite at both ends.
    """
    (alpha, sigma), (alpha_to, sigma_to) = now, to
    ratio = sigma_to / sigma
    return ratio * x + (alpha_to - ratio * alpha) * x0
