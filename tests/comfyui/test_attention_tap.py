"""A block's attention is handed over in one layout, whatever the host's call has."""

import pytest
import torch

from comfy.ldm.modules.attention import attention_pytorch
from wantrim.hosts.comfyui.blocks import AttentionTap

HEADS, TOKENS, DIM = 4, 7, 6


def parts(apart: bool) -> list[torch.Tensor]:
    """q, k and v; keys of another length than the queries."""
    torch.manual_seed(0)
    made = [torch.randn(2, count, HEADS, DIM) for count in (TOKENS, TOKENS + 2, TOKENS + 2)]
    return [one.transpose(1, 2) if apart else one.flatten(2) for one in made]


@pytest.mark.parametrize("by_name", [True, False], ids=["heads=", "heads"])
@pytest.mark.parametrize("split_out", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_attention_is_handed_over_by_token_and_head(apart, split_out, by_name):
    given, seen = parts(apart), []

    def attend(q, k, v, attention):
        seen.extend([q, k, v])
        return attention(q, k, v)

    args, options = ([], {"heads": HEADS}) if by_name else ([HEADS], {})
    options |= {"skip_reshape": apart, "skip_output_reshape": split_out}
    out = AttentionTap(attend, None, {})(attention_pytorch, *given, *args, **options)
    assert torch.equal(out, attention_pytorch(*given, *args, **options))
    for came, one in zip(seen, given, strict=True):
        assert torch.equal(came, one.transpose(1, 2) if apart else one.unflatten(-1, (HEADS, DIM)))


def test_an_earlier_override_is_called_inside():
    def doubled(func, *args, **kwargs):
        return 2 * func(*args, **kwargs)

    tap = AttentionTap(lambda q, k, v, attention: attention(q, k, v) + 1, doubled, {})
    alone = attention_pytorch(*parts(False), heads=HEADS)
    assert torch.equal(tap(attention_pytorch, *parts(False), heads=HEADS), 2 * alone + 1)


def test_a_call_that_does_not_tell_its_heads_is_left_alone():
    def attend(*_):
        raise AssertionError("handed over")

    given = parts(False)
    for previous, factor in ((None, 1), (lambda func, *args: 2 * func(*args), 2)):
        tap = AttentionTap(attend, previous, {})
        assert torch.equal(tap(lambda q, k, v: q + 1, *given), factor * (given[0] + 1))
