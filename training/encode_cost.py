"""How long encoding takes, computed without running it."""

from __future__ import annotations

from collections.abc import Sequence

# of Wan2.1's VAE for each pixel of the first picture, and of the four pictures of a latent frame
# after it, as torch counts diffusers' encoder at 832x480
FIRST, FOUR = 6.81e6, 20.2e6
# UMT5-XXL's encoder without its table of words, two for each weight and token
TEXT = 2 * 4.7e9 * 512
# of the tensor cores' bf16 speed: an estimate, as the VAE computes in fp32 (TF32) and waits for memory
UTILISATION = 0.05


def sample_flops(width: int, height: int, pixel_frames: int, task: str) -> float:
    """FLOPs of a video and its caption; image-to-video encodes its first picture as long again."""
    once = width * height * (FIRST + FOUR * (pixel_frames - 1) / 4)
    return (1 if task == "t2v" else 2) * once + TEXT


def describe_encoding(
    videos: int, size: tuple[int, int, int], task: str, gpus: Sequence[int], tflops: float
) -> str:
    """A sentence with the hours.

    Args:
        size: width, height and pictures.
        tflops: of a GPU in bf16.
    """
    alone = videos * sample_flops(*size, task) / (tflops * 1e12 * UTILISATION) / 3600
    hours = ", ".join(f"{alone / count:.1f} on {count}" for count in gpus)
    width, height, pictures = size
    return (
        f"encoding {videos:,} videos of {width}x{height} and {pictures} pictures: hours at "
        f"{UTILISATION:.0%} of {tflops:g} TFLOPS: {hours} GPUs"
    )
