"""The bench's FLOP counter against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from wantrim.benchmarks.flops import count_flops
from wantrim.hosts.diffusers.weights import load_original
from wantrim.toy import CHECKPOINT


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_counts_what_torch_counts(mode):
    model = load_original(CHECKPOINT)
    text = torch.randn(1, 5, model.config.text_dim)

    def work():
        # torch's formulas know no attention of a CPU but the plain one
        with mode(), sdpa_kernel(SDPBackend.MATH):
            model(torch.randn(1, 36, 1, 6, 6), torch.tensor([500.0]), text)

    with FlopCounterMode(display=False) as counter:
        work()

    assert count_flops(work) == counter.get_total_flops() > 0


@pytest.mark.parametrize(("queries", "keys"), [(63, 63), (1, 63), (64, 7)])
def test_a_cpus_attention_counts_as_the_plain_one(queries, keys):
    q, kv = torch.randn(2, 3, queries, 8), torch.randn(2, 3, keys, 8)

    def plain():
        with sdpa_kernel(SDPBackend.MATH):
            scaled_dot_product_attention(q, kv, kv)

    fused = count_flops(lambda: scaled_dot_product_attention(q, kv, kv))

    assert fused == count_flops(plain) == 2 * 2 * 3 * queries * keys * 16
