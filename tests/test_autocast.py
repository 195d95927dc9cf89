"""Without autocast, operations keep the dtype of their inputs."""

import torch

from xray2ct.autocast import without_autocast


def test_autocast_is_off_within_and_on_again_after():
    a = torch.rand(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with without_autocast(a.device):
            assert (a @ a).dtype == torch.float32
            assert (a.bfloat16() @ a.bfloat16()).dtype == torch.bfloat16
        assert (a @ a).dtype == torch.bfloat16
    with without_autocast(a.device):
        assert not torch.is_autocast_enabled("cpu")
