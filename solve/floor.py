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
        source: where the numbers come from.
    """

    products: float
    attention: float
    bandwidth: float
    source: str

    def seconds(self, work: Work, itemsize: int = 2) -> float:
        """Floor of the time that `work` takes, with numbers of `itemsize` bytes."""
        return (
            work.linear / self.products
            + work.attention / self.attention
            + work.moved * itemsize / self.bandwidth
        )


_CHARTS = "attention from SageAttention's charts (head_dim 128, 32K tokens, kernel alone)"
_DATASHEET = f"products and bandwidth from the datasheet, less a tenth; {_CHARTS}"
_GUESS = f"products and bandwidth as published; {_CHARTS}"
_H200 = f"products and bandwidth measured; {_CHARTS} of an H100"
# by pattern of torch's name for the device, and attention kernel; "flash" is FlashAttention 2,
# about what torch's scaled_dot_product_attention runs
DEVICES: dict[str, dict[str, Rates]] = {
    r"H200": {
        "flash": Rates(790e12, 339e12, 4.3e12, _H200),
        "flash3": Rates(790e12, 600e12, 4.3e12, "attention between the charts and FA3's paper"),
        "sage": Rates(790e12, 880e12, 4.3e12, _H200),
    },
    # the card with HBM3; the PCIe one is slower
    r"H100 80GB HBM3": {"flash": Rates(660e12, 339e12, 2.9e12, _GUESS)},
    r"A100-SXM4-[48]0GB": {"flash": Rates(260e12, 210e12, 1.7e12, "all as published")},
    r"RTX 4090": {
        "flash": Rates(152e12, 164e12, 0.92e12, _DATASHEET),
        "sage": Rates(152e12, 431e12, 0.92e12, _DATASHEET),
    },
    r"RTX 5090": {
        "flash": Rates(195e12, 214e12, 1.6e12, _DATASHEET),
        "sage": Rates(195e12, 554e12, 1.6e12, _DATASHEET),
    },
}


def device_rates(device: str, attention: str = "flash") -> Rates | None:
    """Rates of a device by torch's name for it, such as "NVIDIA GeForce RTX 4090".

    Args:
        attention: "flash", "flash3" or "sage"; not every device has all of them.

    Returns:
        None for a device or kernel whose rates are not known. A laptop's card of the same number is
        another device.
    """
    for pattern, kernels in DEVICES.items():
        if re.search(rf"{pattern}$", device.strip()):
            return kernels.get(attention)
    return None
