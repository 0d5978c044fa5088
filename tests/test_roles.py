import pytest
import torch

from wantrim.kernels import frame_mass
from wantrim.methods.heads import role


@pytest.mark.parametrize(
    ("ratio", "name"),
    [(0.71, "spatial"), (0.7, "mixed"), (0.3, "mixed"), (0.29, "temporal"), (0.0, "temporal")],
)
def test_roles_at_the_papers_thresholds(ratio, name):
    assert role(ratio) == name


def test_a_head_that_stays_in_its_frame_and_one_that_leaves_it():
    # head 0 matches its own latent frame, head 1 the next one
    frame = torch.eye(3).repeat_interleave(4, 0)
    q = torch.stack([frame, frame.roll(1, 1)], 1)
    k = torch.stack([frame, frame], 1)
    outside = torch.zeros(1, 2, 3)
    q, k = (100 * torch.cat([outside, t])[None] for t in (q, k))
    ratio = frame_mass(q, k, (3, 2, 2), torch.arange(12), start=1)
    torch.testing.assert_close(ratio, torch.tensor([[1.0, 0.0]]))
