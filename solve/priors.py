"""Curves that ship, recorded on the tiny Wan (`python -m wantrim.benchmarks.curves --write`)."""

from .curves import Curves

# fmt: off
TEXT_TO_VIDEO = Curves(
    sigmas=(1.0, 0.983, 0.964, 0.944, 0.923, 0.9, 0.875, 0.818, 0.71, 0.5, 0.14),
    travel=(0.0, 4.5, 6.7, 8.6, 9.9, 10.9, 11.7, 13.0, 14.5, 16.5, 19.0),
    amplified=(3.5, 3.5, 6.1, 2.8, 1.7, 1.5, 1.4, 1.2, 0.9, 0.6, 0.6),
    shares=(0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.67, 0.8, 1.0),
    left=(1.0, 0.7, 0.45, 0.33, 0.25, 0.18, 0.15, 0.12, 0.08, 0.05, 0.0),
    stale=0.0225,
)
IMAGE_TO_VIDEO = TEXT_TO_VIDEO
# fmt: on
