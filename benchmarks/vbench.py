"""VBench's scores of finished videos (arXiv 2311.17982), through the package `vbench`.

`vbench` 0.1.5 pins numpy below 2 and transformers 4.33.2, while diffusers' Wan pipelines want
transformers 4.49: it needs an environment of its own. So videos are saved in one environment and
scored in another, and what only one of them has is imported where it is used.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

# VBench's quality dimensions: they look at the video alone, so any prompt will do
DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
RUN = "wantrim"


def save_video(video: np.ndarray, path: Path, fps: int = 16) -> None:
    """Write a video [pixel_frames, h, w, 3] in 0..1 as H.264 mp4, whole or not at all.

    Args:
        fps: pixel_frames per second; Wan's videos are made for 16.

    Raises:
        ValueError: not such an array, or a side is odd, which the format does not have.
    """
    import av

    if video.ndim != 4 or video.shape[3] != 3 or not len(video):
        raise ValueError(f"video: expected [pixel_frames, h, w, 3], got {list(video.shape)}")
    frames, height, width, _ = video.shape
    if height % 2 or width % 2:
        raise ValueError(f"video: expected even sides, got {width}x{height}")
    pixels = (255 * video.clip(0, 1)).round().astype(np.uint8)
    partial = path.with_suffix(".partial")
    with av.open(str(partial), "w", format="mp4") as file:
        stream = file.add_stream("h264", rate=fps)
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv420p"
        # near lossless, so that the scores are of the video and not of its compression
        stream.options = {"crf": "8"}
        for picture in pixels:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    partial.replace(path)


def score(videos_folder: Path, dimensions: Sequence[str] = DIMENSIONS) -> dict[str, float]:
    """VBench's score in 0..1 per dimension, over all videos of a folder; higher is better.

    VBench fetches the models of a dimension over the network when it is first used.
    `dynamic_degree` is the share of videos that move much: less is not always worse.

    Args:
        videos_folder: holds the mp4 files; its subfolders do not count.
        dimensions: of `DIMENSIONS`.

    Raises:
        ImportError: `vbench` is not installed, or does not work with what is.
        ValueError: an unknown dimension, or no videos.
    """
    unknown = [name for name in dimensions if name not in DIMENSIONS]
    if unknown or not dimensions:
        raise ValueError(
            f"dimensions: expected some of {', '.join(DIMENSIONS)}; got {', '.join(unknown) or 'none'}"
        )
    folder = Path(videos_folder)
    if not any(folder.glob("*.mp4")):
        raise ValueError(f"videos_folder: expected a folder with mp4 files, got {folder}")
    try:
        import vbench
    except ImportError as error:
        raise ImportError(
            f"VBench cannot be used here: {error}. Install torch, torchvision and this project's "
            "extra into an environment of its own (VBench's pins do not go with diffusers): "
            "pip install -e '.[vbench]'"
        ) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompts = Path(vbench.__file__).with_name("VBench_full_info.json")
    with tempfile.TemporaryDirectory() as out:
        bench = vbench.VBench(device, str(prompts), out)
        bench.evaluate(
            videos_path=str(folder),
            name=RUN,
            dimension_list=list(dimensions),
            mode="custom_input",
        )
        results = json.loads(Path(out, f"{RUN}_eval_results.json").read_text("utf-8"))
    # each is the mean and the list of what it is the mean of
    return {name: float(results[name][0]) for name in dimensions}
