"""A convolution that is wrong on purpose, as faulty libraries were."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from xray2ct.training.convolution_check import Convolution

# -- convolutions ----------------------------------------------------------------------------------
PLAIN = Convolution((6, 4, 3, 3, 3), (2, 4, 8, 9, 10), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1, False)


class Spoiled(torch.autograd.Function):
    """A convolution whose gradients are spoiled: one slab of the input's, one filter of the weight's."""

    @staticmethod
    def forward(ctx, x, weight, which, *how):
        ctx.save_for_backward(x, weight)
        ctx.which, ctx.how = which, how
        return F.conv3d(x, weight, None, *how)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            grads = torch.autograd.grad(F.conv3d(x, weight, None, *ctx.how), (x, weight), gradient)
        grads = [grad.clone() for grad in grads]
        if ctx.which == "input gradient":
            grads[0][:, :, -1] = 0
        if ctx.which == "weight gradient":
            grads[1][-1] *= 1.5
        return *grads, None, None, None, None, None


def spoiled(which, x, weight, bias, *how):
    """``F.conv3d``, right in float32 and wrong in what is asked for otherwise, as a defective library is."""
    if x.dtype == torch.float32 or which is None:
        return F.conv3d(x, weight, bias, *how)
    if which == "not finite":
        return F.conv3d(x, weight, bias, *how) * torch.inf
    if which == "output":
        output = F.conv3d(x, weight, bias, *how).clone()
        output[..., -1] *= -1
        return output
    return Spoiled.apply(x, weight, which, *how)
