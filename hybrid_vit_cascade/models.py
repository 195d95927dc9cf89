"""One stage of the cascade: the denoising network, conditioned on X-rays and on the stage before.

    stage = CascadeStage(volume_size=128, voxel_dim=512, vit_depth=8, num_heads=8, conditioned=True)
    condition = stage.encode(xrays, previous)         # once per case: (B, 2, 512, 512) and (B, 1, 64, 64, 64)
    output = stage.denoise(x_t, position, condition)  # once per sampling step: (B, 1, 128, 128, 128)

The network is a U-Net of 3D convolutions with a ViT in its middle. X-ray features are lifted to every scale of the
U-Net through the acquisition geometry, weighted by a learned depth prior. What depends on the X-rays and the previous
volume alone is computed once, in :meth:`CascadeStage.encode`.

Volumes are in [-1, 1] here, X-rays in [0, 1]. What the output means (v, noise or x0) is the caller's choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hybrid_vit_cascade.blocks import (
    TIME_FREQUENCIES,
    DepthPrior,
    DetailLifting,
    DownScale,
    ModulatedBlock,
    PriorLifting,
    UpScale,
    ViTBlock,
    embedding_mlp,
    modulate,
    sinusoidal_embedding,
)
from xray2ct.files import InputError, whole_number
from xray2ct.geometry.projector import Geometry
from xray2ct.models.blocks import (
    ActivationCheckpointing,
    XrayEncoder,
    group_norm,
    in_full_precision,
    pixel_shuffle_3d,
    pixel_unshuffle_3d,
    prepare_xrays,
    whole_groups,
    zero_init,
)
from xray2ct.models.normalisation import norm_silu, normalise
from xray2ct.models.upsampling import upsample_trilinear
from xray2ct.models.working_weights import full_precision, with_cast_weights

CONTEXT_GRID = 16  # X-ray tokens along each edge of a view, at most
# The last layer starts at zero and has a range of 2 to reach, not 1 as in EnhancedDirectModel: as many steps with this.
OUTPUT_SCALE = 2.0
ENCODER_BLOCKS = (1, 1, 2, 3)  # of the four X-ray encoder stages, as in EnhancedDirectModel


@dataclass
class Condition:
    """Features of the X-rays and of the previous volume, computed once by :meth:`CascadeStage.encode`.

    features: one tensor (B, C, d, h, w) per scale, finest first: lifted X-rays, at the finest also ``previous``.
    keys_values: one tensor (2, B, heads, M, C / heads) per ViT block, from the X-ray tokens.
    embedding: (B, voxel_dim), the X-rays as a whole and the previous volume's noise level.
    previous: (B, 1, D, H, W) in [-1, 1], the previous volume upsampled to this stage's size, or None.
    """

    features: list[torch.Tensor]
    keys_values: list[torch.Tensor]
    embedding: torch.Tensor
    previous: torch.Tensor | None


def stem_stride_of(xray_size: int) -> int:
    """1 up to 256^2 X-rays, 2 up to 512^2, 4 above: the encoder's first features are then about 256^2."""
    return 1 if xray_size <= 256 else 2 if xray_size <= 512 else 4


def default_token_grid(volume_size: int) -> int:
    """Tokens along an edge: patches of an eighth of the volume's edge, of 8 voxels (up to 128^3), of 16 above."""
    patch = 8 if volume_size <= 128 else 16
    while patch > 1 and 8 * patch > volume_size:
        patch //= 2
    if volume_size % patch:
        raise InputError(f"volume_size is {volume_size}; expected a multiple of the patch of {patch} voxels")
    return volume_size // patch


class CascadeStage(ActivationCheckpointing):
    """Denoiser of ``volume_size``^3 volumes, conditioned on X-rays and, when ``conditioned``, on a coarser volume.

    volume_size: edge in voxels, a power of two times ``token_grid``.
    voxel_dim, vit_depth, num_heads: width, blocks and heads of the ViT at the coarsest scale.
    xray_size: resolution the weights are trained at; other inputs are resampled to it.
    num_views: 2 (PA and lateral) or 1 (PA alone). xray_channels: 1 (X-rays are grey).
    use_depth_lifting: weigh lifted features by the depth prior; False spreads them evenly along their rays.
    conditioned: takes the previous stage's volume, of any size.
    geometry: how the X-rays were made; it travels in the ``state_dict``.
    activation_checkpointing: recompute activations in the backward pass (less memory, about a third more time).
    token_grid: ViT tokens along an edge (default :func:`default_token_grid`: 8 for 64^3, 16 for 128^3 and 256^3).
    base_channels: features at the finest scale (default ``voxel_dim / 8``, a sixteenth where the finest scale is
        128^3); each coarser scale has twice as many, the coarsest ``voxel_dim``.

    Up to 64^3 the finest scale is the volume itself; above, eight voxels are folded into one cell (space-to-depth),
    so that no wide feature exists at 128^3 of a 128^3 stage or at 256^3 of a 256^3 stage.

    A sum of linear maps of two inputs is a linear map of their concatenation: that is how lifted X-rays and the
    previous volume are concatenated to the noisy one voxel by voxel, with their share computed once.

    The output is the U-Net's plus a(t) x_t + b(t) previous, with a and b learned from zero: the parts of v, noise or
    x0 that are proportional to what is already there. At the start it is zero everywhere.

    Raises :class:`InputError` naming the setting that does not fit.
    """

    def __init__(
        self,
        volume_size: int,
        voxel_dim: int,
        vit_depth: int,
        num_heads: int,
        xray_size: int = 512,
        num_views: int = 2,
        use_depth_lifting: bool = True,
        conditioned: bool = False,
        geometry: Geometry | None = None,
        activation_checkpointing: bool = False,
        token_grid: int | None = None,
        base_channels: int | None = None,
        xray_channels: int = 1,
    ):
        super().__init__()
        _check_settings(volume_size, voxel_dim, vit_depth, num_heads, xray_size, num_views, xray_channels)
        self.fold = 1 if volume_size <= 64 else 2
        grid = volume_size // self.fold
        if token_grid is None:
            token_grid = default_token_grid(volume_size)
        whole_number("token_grid", token_grid, 1)
        self.grids = _grids(volume_size, grid, token_grid)
        if base_channels is None:
            base_channels = whole_groups(voxel_dim // (8 if grid <= 64 else 16))
        whole_number("base_channels", base_channels, 8, multiple=8)
        self.settings = {
            "volume_size": volume_size,
            "voxel_dim": voxel_dim,
            "vit_depth": vit_depth,
            "num_heads": num_heads,
            "xray_size": xray_size,
            "num_views": num_views,
            "use_depth_lifting": use_depth_lifting,
            "conditioned": conditioned,
            "activation_checkpointing": activation_checkpointing,
            "token_grid": token_grid,
            "base_channels": base_channels,
            "xray_channels": xray_channels,
        }
        self.volume_size, self.xray_size, self.num_views = volume_size, xray_size, num_views
        self.conditioned, self.activation_checkpointing = conditioned, activation_checkpointing
        self.geometry = geometry or Geometry()
        finer = [whole_groups(min(base_channels * 2**i, voxel_dim)) for i in range(len(self.grids) - 1)]
        self.widths = [*finer, voxel_dim]
        self._build_condition(voxel_dim, use_depth_lifting)
        self._build_denoiser(voxel_dim, vit_depth, num_heads)

    def _build_condition(self, dim, use_depth_lifting):
        image_widths = [whole_groups(dim // n) for n in (8, 4, 2, 1)]
        stride, views = stem_stride_of(self.xray_size), self.num_views
        self.encoder = XrayEncoder(image_widths, ENCODER_BLOCKS, stride, views=views)
        self.image_sizes = [self.xray_size // (stride * 2**s) for s in range(4)]
        self.prior = DepthPrior(views) if use_depth_lifting else None
        self.lift = nn.ModuleList(
            PriorLifting(image_widths[self._source(n)], width // 2, width, views)
            for n, width in zip(self.grids, self.widths)
        )
        self.lift_detail = None
        if self.fold > 1:
            self.lift_detail = DetailLifting(image_widths[0], 4, self.widths[0], views, self.fold)
        if self.conditioned:
            self.previous_stem = nn.Conv3d(self.fold**3, self.widths[0], 3, padding=1)
            self.previous_noise = embedding_mlp(2 * TIME_FREQUENCIES, dim)
        self.context_grid = min(CONTEXT_GRID, self.image_sizes[-1])
        self.context_norm = group_norm(dim)
        self.context_position_embedding = nn.Parameter(0.02 * torch.randn(views, dim, *(self.context_grid,) * 2))
        self.summary = embedding_mlp(views * dim, dim)

    def _build_denoiser(self, dim, vit_depth, num_heads):
        finest = self.widths[0]
        self.time = embedding_mlp(2 * TIME_FREQUENCIES, dim)
        self.stem = nn.Conv3d(self.fold**3, finest, 3, padding=1)
        self.stem_scale = zero_init(nn.Linear(dim, finest))
        counts = [1] * (len(self.grids) - 2) + [0]  # the coarsest scale has the ViT instead
        self.down = nn.ModuleList(DownScale(a, b, dim, n) for a, b, n in zip(self.widths, self.widths[1:], counts))
        self.position_prior = nn.Parameter(0.02 * torch.randn(1, dim, *(self.grids[-1],) * 3))
        self.vit = nn.ModuleList(ViTBlock(dim, num_heads, dim) for _ in range(vit_depth))
        self.middle = ModulatedBlock(dim, dim)
        # Blocks are cheap where voxels are few; a folded cell stands for eight voxels and gets one block more.
        counts = [1 if self.fold == 1 else 2, 3] + [4] * len(self.grids)
        self.up = nn.ModuleList(UpScale(b, a, dim, n) for a, b, n in zip(self.widths, self.widths[1:], counts))
        self.out_norm = group_norm(finest)
        self.out_modulation = zero_init(nn.Linear(dim, 2 * finest))
        self.out = full_precision(zero_init(nn.Conv3d(finest, self.fold**3, 1)))
        self.mix = full_precision(zero_init(nn.Linear(dim, 2 if self.conditioned else 1)))

    def _source(self, size: int) -> int:
        """The encoder stage lifted to a ``size``^3 grid: the coarsest that is still fine enough.

        That is two pixels per voxel where X-rays are fine (512^2 for 64^3), one where they are small (128^2).
        """
        wanted = size * (2 if self.xray_size > 256 else 1)
        return max([s for s, n in enumerate(self.image_sizes) if n >= wanted], default=0)

    def get_extra_state(self) -> dict:
        return {"geometry": self.geometry.to_dict()}

    def set_extra_state(self, state: dict) -> None:
        self.geometry = Geometry.from_dict(state["geometry"])

    # -- once per case ---------------------------------------------------------------------------

    def encode(self, xrays, previous=None, previous_noise_level=None) -> Condition:
        """Everything that does not change from one sampling step to the next.

        xrays: ``(B, num_views, H, W)`` (or with a channel axis of 1 after the views) in [0, 1].
        previous: ``(B, 1, d, d, d)`` in [-1, 1], the stage before, noise added; only when ``conditioned``.
        previous_noise_level: ``(B,)`` in [0, 1], how much noise was added to it (default none).
        Raises ``ValueError`` on another shape, and when ``previous`` is missing or not expected.
        """
        xrays = prepare_xrays(xrays, self.xray_size, self.num_views)
        images = self._run(self.encoder, xrays)  # 4 x (B V, C_s, h_s, w_s)
        features = [
            self._run(lift, images[self._source(n)], self.prior, self.geometry, n)
            for n, lift in zip(self.grids, self.lift)
        ]
        if self.lift_detail is not None:
            features[0] = features[0] + self._run(self.lift_detail, images[0], self.geometry, self.volume_size)
        tokens, embedding = with_cast_weights(self._context, self.context_norm, self.summary)(images[-1])
        previous = self._prepare_previous(previous, xrays.shape[0])
        if previous is not None:
            features[0] = features[0] + self._run(self.previous_stem, self._folded(previous))
            level = embedding.new_zeros(xrays.shape[0]) if previous_noise_level is None else previous_noise_level
            embedding = embedding + self._run(self.previous_noise, sinusoidal_embedding(level))
        keys_values = with_cast_weights(self._keys_values, *(block.context for block in self.vit))
        return Condition(features, keys_values(tokens), embedding, previous)

    def _prepare_previous(self, previous, batch):
        """The previous volume at this stage's size, float32."""
        if (previous is not None) != self.conditioned:
            wanted = "needs the previous stage's volume" if self.conditioned else "takes no previous volume"
            raise ValueError(f"this stage {wanted}")
        if previous is None:
            return None
        if previous.ndim != 5 or previous.shape[:2] != (batch, 1):
            raise ValueError(f"previous volume has shape {tuple(previous.shape)}; expected ({batch}, 1, d, d, d)")
        size = (self.volume_size,) * 3
        if previous.shape[2:] == size:
            return previous.float()
        return upsample_trilinear(previous.float(), size)

    def _keys_values(self, tokens):
        return [block.keys_values(tokens) for block in self.vit]

    def _folded(self, volume):
        return volume if self.fold == 1 else pixel_unshuffle_3d(volume, self.fold)

    def _context(self, image):
        """Coarsest X-ray features (B V, C, h, w) -> tokens (B, V P, C) and their summary (B, C)."""
        x = norm_silu(image, self.context_norm)
        if x.shape[-1] > self.context_grid:
            x = F.adaptive_avg_pool2d(x, self.context_grid)
        x = x.unflatten(0, (-1, self.num_views))  # (B, V, C, g, g)
        summary = self.summary(x.mean(dim=(-2, -1)).flatten(1))
        tokens = (x + self.context_position_embedding.to(x.dtype)).flatten(3)  # (B, V, C, P)
        return tokens.permute(0, 1, 3, 2).flatten(1, 2), summary

    # -- once per step ---------------------------------------------------------------------------

    def denoise(self, x_t, position, condition: Condition):
        """Noisy volume ``(B, 1, D, H, W)`` at time ``position`` (B,) in [0, 1] -> output, same shape, float32."""
        size = (self.volume_size,) * 3
        if x_t.ndim != 5 or x_t.shape[1] != 1 or x_t.shape[2:] != size:
            raise ValueError(f"x_t has shape {tuple(x_t.shape)}; expected (B, 1, {', '.join(map(str, size))})")
        embedding = F.silu(self._run(self.time, sinusoidal_embedding(position)) + condition.embedding)  # (B, E)
        x = self._run(self.stem, self._folded(x_t))  # (B, C_0, g_0, g_0, g_0)
        # Pure noise holds nothing of the volume and only disturbs the X-ray features: its share starts by falling with
        # the noise level, about as alpha does, and is learned from there.
        share = 1.0 - position.float()[:, None] + self._run(self.stem_scale, embedding)
        x = torch.addcmul(condition.features[0], x, share.to(x.dtype)[:, :, None, None, None])
        skips = [x]
        for down, lifted in zip(self.down, condition.features[1:]):
            x = self._run(down, x, lifted, embedding)
            skips.append(x)
        x = self._run(self.middle, self._transform(skips.pop(), embedding, condition), embedding)
        for up in reversed(self.up):
            x = self._run(up, x, skips.pop(), embedding)
        layers = self.out_norm, self.out_modulation
        residual = OUTPUT_SCALE * self._run(self._output, x, embedding, modules=layers)  # (B, 1, D, H, W), float32
        mix = in_full_precision(self.mix, embedding)[:, :, None, None, None]
        output = torch.addcmul(residual, mix[:, :1], x_t.float())
        if condition.previous is not None:
            output = torch.addcmul(output, mix[:, 1:], condition.previous)
        return output

    def _transform(self, x, embedding, condition):
        x = x + self.position_prior.to(x.dtype)
        tokens = x.flatten(2).transpose(1, 2)  # (B, N, C)
        for block, keys_values in zip(self.vit, condition.keys_values):
            tokens = self._run(block, tokens, embedding, keys_values)
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])

    def _output(self, x, embedding):
        scale, shift = self.out_modulation(embedding).chunk(2, dim=1)
        x = in_full_precision(self.out, F.silu(modulate(normalise(x, self.out_norm), scale, shift)))
        return x if self.fold == 1 else pixel_shuffle_3d(x, self.fold)

    def forward(self, x_t, position, xrays, previous=None, previous_noise_level=None):
        """``denoise(encode(...))``: one call for training and DistributedDataParallel."""
        return self.denoise(x_t, position, self.encode(xrays, previous, previous_noise_level))


def _grids(volume_size: int, finest: int, coarsest: int) -> list[int]:
    """Edges of the U-Net's scales, finest first; raises :class:`InputError` unless each halves the one before."""
    ratio = finest // coarsest
    if coarsest < 1 or ratio < 2 or finest != ratio * coarsest or ratio & (ratio - 1):
        raise InputError(
            f"token_grid is {coarsest} for volume_size {volume_size}; expected {finest} divided by 2, 4, 8, ..."
        )
    return [finest // 2**i for i in range(ratio.bit_length())]


def _check_settings(volume_size, voxel_dim, vit_depth, num_heads, xray_size, num_views, xray_channels):
    whole_number("volume_size", volume_size, 16, multiple=8)
    whole_number("voxel_dim", voxel_dim, 32, multiple=16)
    if voxel_dim % whole_number("num_heads", num_heads, 1):
        raise InputError(f"num_heads is {num_heads}; expected a divisor of voxel_dim, {voxel_dim}")
    whole_number("vit_depth", vit_depth, 1)
    if whole_number("num_views", num_views, 1) > 2:
        raise InputError(f"num_views is {num_views}; expected 1 (PA) or 2 (PA and lateral)")
    if whole_number("xray_channels", xray_channels, 1) != 1:
        raise InputError(f"xray_channels is {xray_channels}; expected 1: X-rays are grey")
    whole_number("xray_size", xray_size, 32, multiple=32)
