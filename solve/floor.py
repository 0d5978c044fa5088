"""How long a Wan step takes at best, dense or trimmed: the cost model's work at a device's rates.

An ideal pipeline: products, attention and what lies between them one after the other, each at the
rate that its large kernels reach. Real runs with text encoder, VAE and offloading take a tenth to a
third longer; what a plan gains is nearer to the truth than either time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..methods.cost import Work


@dataclass(frozen=True)
class Rates:
    """What large kernels reach on a device, in half precision.

    Args:
        products: FLOP/s of products with weights.
        attention: FLOP/s of the attention kernel.
        bandwidth: bytes/s of copies, reads and writes together.
    """

    products: float
    attention: float
    bandwidth: float

    def seconds(self, work: Work) -> float:
        """Floor of the time that `work` takes, with numbers of 2 bytes."""
        return (
            work.linear / self.products
            + work.attention / self.attention
            + work.moved * 2 / self.bandwidth
        )


# by pattern of torch's name for the device. Attention is FlashAttention 2 by SageAttention's charts
# (head_dim 128, 32K tokens, kernel alone), about what torch's scaled_dot_product_attention runs
DEVICES = {
    # products and bandwidth measured, attention of an H100
    r"H200": Rates(790e12, 339e12, 4.3e12),
    # as published; the card with HBM3, the PCIe one is slower
    r"H100 80GB HBM3": Rates(660e12, 339e12, 2.9e12),
    # all as published
    r"A100-SXM4-[48]0GB": Rates(260e12, 210e12, 1.7e12),
    # products and bandwidth from the datasheet, less a tenth
    r"RTX 4090": Rates(152e12, 164e12, 0.92e12),
    r"RTX 5090": Rates(195e12, 214e12, 1.6e12),
}


def device_rates(device: str) -> Rates | None:
    """Rates of a device by torch's name for it, such as "NVIDIA GeForce RTX 4090".

    None where they are not known. A laptop's card of the same number is another device.
    """
    found = (rates for name, rates in DEVICES.items() if re.search(f"{name}$", device.strip()))
    return next(found, None)
