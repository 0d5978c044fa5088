import sys

import av
import numpy as np
import pytest

from wantrim.benchmarks.vbench import DIMENSIONS, save_video, score
from wantrim.methods.video_metrics import psnr
from wantrim.toy.world import held_out_scenes, render

# the signatures and the result file of vbench 0.1.5, without its models
STAND_IN = """
import json
from pathlib import Path

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        assert device.type in ("cpu", "cuda")
        assert Path(full_info_dir) == Path(__file__).with_name("VBench_full_info.json")
        self.output_path = output_path

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False,
                 read_frame=False, mode="vbench_standard", **kwargs):
        assert mode == "custom_input" and not kwargs
        files = sorted(str(file) for file in Path(videos_path).iterdir())
        each = [{"video_path": file, "video_results": 0.25} for file in files]
        results = {name: [0.1 * i, each] for i, name in enumerate(dimension_list)}
        Path(self.output_path, name + "_eval_results.json").write_text(json.dumps(results))
"""


def moving() -> np.ndarray:
    return render(held_out_scenes(1)[0], np.random.default_rng(0))


def read(path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as file:
        pictures = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        return np.stack(pictures) / 255, float(file.streams.video[0].average_rate)


def test_a_saved_video_is_the_video(tmp_path):
    video = moving()
    save_video(video, tmp_path / "a red circle-0.mp4")
    saved, fps = read(tmp_path / "a red circle-0.mp4")
    assert saved.shape == video.shape
    assert fps == 16
    # the format halves the resolution of colour, which the sharp edges feel
    assert psnr(saved, video) > 28
    assert psnr(saved, video[::-1]) < 20
    assert [file.name for file in tmp_path.iterdir()] == ["a red circle-0.mp4"]
    save_video(video[:1] * 3 - 1, tmp_path / "beyond.mp4", fps=8)
    saved, fps = read(tmp_path / "beyond.mp4")
    assert (len(saved), fps) == (1, 8)
    assert psnr(saved, (video[:1] * 3 - 1).clip(0, 1)) > 22


@pytest.mark.parametrize("shape", [(9, 15, 16, 3), (9, 16, 16, 4), (16, 16, 3), (0, 16, 16, 3)])
def test_what_is_no_video_is_refused(tmp_path, shape):
    with pytest.raises(ValueError, match="video: expected"):
        save_video(np.zeros(shape), tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_scores_are_read_per_dimension(tmp_path, monkeypatch):
    (tmp_path / "vbench").mkdir()
    (tmp_path / "vbench" / "__init__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vbench", raising=False)
    (tmp_path / "videos").mkdir()
    save_video(moving(), tmp_path / "videos" / "a.mp4")
    wanted = ["imaging_quality", "dynamic_degree"]
    assert score(tmp_path / "videos", wanted) == {"imaging_quality": 0.0, "dynamic_degree": 0.1}
    assert list(score(tmp_path / "videos")) == list(DIMENSIONS)
    sys.modules.pop("vbench")


def test_the_real_vbench_scores_flicker(tmp_path):
    pytest.importorskip("vbench")
    save_video(np.full((9, 64, 96, 3), 0.4), tmp_path / "still-0.mp4")
    light = np.arange(9) % 2
    save_video(np.ones((9, 64, 96, 3)) * light[:, None, None, None], tmp_path / "blinking-1.mp4")
    assert score(tmp_path, ["temporal_flickering"])["temporal_flickering"] == pytest.approx(0.5)


def test_without_vbench_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vbench", None)
    save_video(moving(), tmp_path / "a.mp4")
    with pytest.raises(ImportError, match=r"environment of its own.*\.\[vbench\]"):
        score(tmp_path)


@pytest.mark.parametrize(
    ("dimensions", "said"), [(["color"], "got color"), ([], "got none"), (DIMENSIONS, "mp4 files")]
)
def test_what_cannot_be_scored_is_refused(tmp_path, dimensions, said):
    with pytest.raises(ValueError, match=said):
        score(tmp_path, dimensions)
