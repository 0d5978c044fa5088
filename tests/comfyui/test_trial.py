"""WanTrim Candidates and WanTrim Verdict on a tiny Wan: rows, accidents, what is kept."""

import json
from dataclasses import replace

import pytest
import torch

import comfy.model_management
import comfy.sample
import comfy.sd
import folder_paths
from comfy.patcher_extension import WrappersMP
from comfy.samplers import sampler_object
from comfy_execution.graph import ExecutionBlocker
from comfy_execution.utils import CurrentNodeContext
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_easycache import EasyCacheNode
from wantrim.benchmarks.rows import check_row
from wantrim.hosts.comfyui import candidates as candidates_module
from wantrim.hosts.comfyui import trial_wrappers
from wantrim.hosts.comfyui.attachment import attachment_of
from wantrim.hosts.comfyui.profiling import model_fingerprint
from wantrim.hosts.comfyui.trial import KEY
from wantrim.nodes.heads import WanTrimHeads
from wantrim.nodes.profile import FOLDER
from wantrim.nodes.tuned import WanTrimCandidates, WanTrimVerdict
from wantrim.nodes.wantrim import WanTrim, WanTrimPair
from wantrim.profiles.fingerprint import Fingerprint
from wantrim.profiles.profile import Profile, load_profile
from wantrim.profiles.recorder import ProfileFile
from wantrim.report.figures import attention_left
from wantrim.solve import variants
from wantrim.solve.tuned import Travel, Tuned
from wantrim.tests.comfyui import tiny

STEPS, SPEEDUP = 8, 1.55
NAMES = ["whole", "plan", "own", "repeats", "less", "more", "heads", "easycache", "steps"]


def candidates(which="all", model=None, steps=STEPS, speedup=SPEEDUP, **options):
    model = tiny.base_model() if model is None else model
    made = WanTrimCandidates.execute(model, speedup, steps, which, **options).result
    return made[0], made[2], made[4]


def picture_of(latent: torch.Tensor) -> torch.Tensor:
    """A video of a latent [1, c, f, h, w], good enough to be compared."""
    small = latent[0, :3].movedim(0, -1).float()
    return small.repeat_interleave(2, 1).repeat_interleave(2, 2).sigmoid()


def sampled(model, steps=STEPS, **options) -> torch.Tensor:
    return picture_of(tiny.ksampler(model, steps=steps, **options))


def decoded(models, steps, **options) -> list[torch.Tensor]:
    return [sampled(m, count, **options) for m, count in zip(models, steps, strict=True)]


def verdict(trial, images, filename=""):
    text, clip, picture, figures = WanTrimVerdict.execute([trial], [filename], images).result
    assert picture.shape[0] == 1 and picture.shape[2:] == (960, 3)
    return text, check_row(json.loads(figures)), clip


def by_name(row: dict) -> dict[str, dict]:
    return {one["name"]: one for one in row["rows"]}


def winning(videos: list, name: str, names=NAMES) -> list:
    """The videos, with one that is very near to the whole one."""
    videos = list(videos)
    videos[names.index(name)] = videos[0] + 1e-4
    return videos


@pytest.fixture(scope="module")
def done():
    """A finished trial with its videos."""
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        # attention is little of the work on so small a video
        patch.setattr(variants, "WORTH", 0.0)
        models, steps, trial = candidates()
        return models, steps, trial, decoded(models, steps)


@pytest.fixture
def profiles(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, FOLDER, ([str(tmp_path)], {""}))
    return tmp_path


def test_every_candidate_is_sampled_as_what_it_says(done):
    models, steps, trial, videos = done
    text, row, clip = verdict(trial, videos)
    rows = by_name(row)
    assert list(rows) == NAMES and steps == [STEPS] * 8 + [5]
    assert torch.equal(videos[0], sampled(tiny.base_model()))
    assert rows["whole"]["work"] == 1 and rows["whole"]["psnr_db"] is None
    assert all(one["seconds"] > 0 and one["failed"] is None for one in rows.values())
    for name in ("plan", "own", "repeats", "heads"):
        assert rows[name]["work"] == pytest.approx(1 / SPEEDUP, abs=0.07), name
    assert rows["less"]["work"] > rows["plan"]["work"] > rows["more"]["work"]
    assert rows["steps"]["work"] == 5 / 8 and rows["steps"]["label"] == "5 steps"
    repeats = attachment_of(models[3]).record
    assert {step.kept_share for step in repeats.steps} == {0.0, 1.0}
    assert clip.shape[0] == len(videos[0]) and clip.shape[-1] == 3
    assert text.startswith("Best at 1.55x: ") and row["best"] in NAMES[1:]
    # the node itself makes the same video
    alone = WanTrim.execute(tiny.base_model(), SPEEDUP, "draft", 1, 0).result[0]
    assert torch.equal(videos[1], sampled(alone))


def test_what_the_plans_run_was_is_not_sampled_again():
    """At another wish the plan has no step on a part of the tokens."""
    models, steps, trial = candidates(speedup=1.6)
    for at in (1, 3):
        sampled(models[at], steps[at])
    shares = {step.program.share for step in attachment_of(models[1]).record.steps}
    assert shares == {0.0, 1.0} and attachment_of(models[3]).record is None
    assert trial.candidates[3].failed.startswith("not tried: WanTrim had no steps but whole")


def test_easycache_is_the_hosts_own_at_a_threshold_of_the_whole_run(done):
    models, _, trial, videos = done
    found = trial.candidates[NAMES.index("easycache")].samplings["this"]
    assert found.left_out == 3
    plain = EasyCacheNode.execute(tiny.base_model(), found.threshold, 0.15, 0.95, False).result[0]
    assert torch.equal(videos[7], sampled(plain))
    assert not torch.equal(videos[7], videos[0])
    row = by_name(verdict(trial, videos)[1])["easycache"]
    assert row["work"] == 5 / 8 and "(3 of 8 left out)" in row["label"]


def test_one_plan_is_solved_by_the_whole_run(done):
    models, _, trial, _ = done
    way = attachment_of(models[2]).dial.travel
    assert way.sigmas == pytest.approx(trial.whole.samplings["this"].sigmas[:-1])
    assert way.travel[0] == 0 and list(way.travel) == sorted(set(way.travel))
    assert attachment_of(models[1]).dial.travel is None


def test_best_is_nearest_to_the_whole_one_of_those_that_save_enough(done):
    _, _, trial, videos = done
    _, row, _ = verdict(trial, videos)
    plan = by_name(row)["plan"]["work"]
    able = [one for one in row["rows"][1:] if one["work"] <= max(1 / SPEEDUP, plan) + 0.02]
    assert "less" not in {one["name"] for one in able}
    assert row["best"] == max(able, key=lambda one: one["psnr_db"])["name"]
    # a video that is far better is chosen, but not one that saves too little
    for name, chosen in (("steps", "steps"), ("less", row["best"])):
        assert verdict(trial, winning(videos, name))[1]["best"] == chosen


def test_row_to_share_says_nothing_private(done):
    _, _, trial, videos = done
    row = verdict(trial, videos)[1]
    run = row["run"]
    assert (run["steps"], run["sampler"], run["guidance"]) == (STEPS, "euler", 5)
    assert run["grid"] == [3, 4, 5] and run["prompts"] == 2 and not run["start_image"]
    assert row["models"][0]["class"] == "WanModel" and row["models"][0]["num_blocks"] == tiny.LAYERS
    assert row["device"] == "cpu" and row["versions"]["wantrim"] == "0.1.0"
    said = json.dumps(row).replace("wantrim_trial/1", "")
    assert "/" not in said and "\\" not in said


def test_what_was_not_sampled_now_is_cached_and_keeps_its_seconds():
    models, steps, trial = candidates("few")
    with CurrentNodeContext("first", "1", 0):
        videos = decoded(models, steps)
    with CurrentNodeContext("second", "1", 0):
        # another seed at the last candidate: it alone is sampled again
        videos[3] = sampled(models[3], steps[3], seed=8)
        text, row, _ = verdict(trial, videos)
    cached = {name: one["cached"] for name, one in by_name(row).items()}
    assert cached == {"whole": True, "plan": True, "easycache": True, "steps": False}
    assert all(one["seconds"] > 0 for one in row["rows"])
    assert text.count("  *\n") == 3 and "* cached: sampled in an earlier run" in text


class Trouble:
    """Raises when a MODEL is called for the n-th time, and counts the calls."""

    def __init__(self, model, error=None, at=3):
        self.error, self.at, self.calls = error, at, 0
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "trouble", self)

    def __call__(self, executor, *args, **kwargs):
        self.calls += 1
        if self.error is not None and self.calls == self.at:
            raise self.error
        return executor(*args, **kwargs)


def test_cancelled_trial_goes_on_where_it_was():
    models, steps, trial = candidates("few")
    # the third is cancelled in its third step
    seen = [Trouble(model) for model in models]
    seen[2].error = comfy.model_management.InterruptProcessingException()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        decoded(models, steps)
    assert models[2].model_options["transformer_options"][KEY].candidate.samplings == {}
    before = [one.calls for one in seen]
    assert before == [8, 8, 3, 0]
    videos = decoded(models, steps)
    assert [one.calls for one in seen[:2]] == before[:2]
    assert [one.calls for one in seen[2:]] == [3 + 8, 5]
    row = verdict(trial, videos)[1]
    assert all(one["seconds"] > 0 and one["psnr_db"] != 0 for one in row["rows"])
    fresh, counts, _ = candidates("few")
    assert all(torch.equal(a, b) for a, b in zip(videos, decoded(fresh, counts), strict=True))
    # once it has been judged nothing is taken from before
    decoded(models[:1], steps[:1])
    assert seen[0].calls == 16


def inpainted(start: float = 0.0, upper: float = 1.0, prompt: int = 1) -> tiny.Case:
    """A case in which a part of the start latent stays."""
    mask = torch.ones(1, tiny.FRAMES, tiny.HEIGHT, tiny.WIDTH)
    mask[:, :, :4] = upper
    mask[..., :5] = 0.0
    latent = torch.full_like(tiny.empty_latent(), start)
    return tiny.Case(tiny.text(prompt), tiny.text(2), latent, mask)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"cfg": 4.0},
        {"sampler": "heun"},
        {"scheduler": "beta"},
        {"given": inpainted(prompt=3)},
        {"given": inpainted(start=1.0)},
        {"given": inpainted(upper=0.0)},
    ],
    ids=["seed", "cfg", "sampler", "scheduler", "prompt", "latent", "mask"],
)
def test_what_is_taken_from_before_a_cancel_is_the_same_run(change):
    models, steps, _ = candidates("few", steps=2)
    usual, change = {"given": inpainted()}, {"given": inpainted(), **change}
    before = sampled(models[0], steps[0], **usual)
    assert torch.equal(before, sampled(models[0], steps[0], **usual))
    again = sampled(models[0], steps[0], **change)
    assert torch.equal(again, sampled(tiny.base_model(), steps[0], **change))
    assert not torch.equal(again, before)
    # a patch behind the candidates makes another MODEL
    patched = models[0].clone()
    seen = Trouble(patched)
    sampled(patched, steps[0], **change)
    assert seen.calls > 0


def test_another_guidance_of_three_prompts_is_another_run():
    """Core's DualCFG has its guidance under names of its own."""
    given, model = tiny.case(), candidates("few", steps=2)[0][0]

    def video(base, *cfg) -> torch.Tensor:
        guider = Guider_DualCFG(base)
        guider.set_conds(given.positive, tiny.text(9), given.negative)
        guider.set_cfg(*cfg)
        sigmas = torch.tensor([*tiny.simple_sigmas(base, 2), 0.0])
        noise, euler = comfy.sample.prepare_noise(given.latent, 7), sampler_object("euler")
        return guider.sample(noise, given.latent, euler, sigmas, disable_pbar=True, seed=7)

    seen = Trouble(model)
    before = video(model, 3.0, 5.0)
    count = seen.calls
    assert torch.equal(video(model, 3.0, 5.0), before) and seen.calls == count > 0
    for cfg in ((8.0, 1.5), (3.0, 5.0, True)):
        assert torch.equal(video(model, *cfg), video(tiny.base_model(), *cfg))


def out_of_memory():
    return comfy.model_management.OOM_EXCEPTION("CUDA out of memory")


def test_a_cancelled_verdict_can_be_asked_for_again(done, profiles, monkeypatch):
    """While it compares, and while it draws: nothing is kept then, nor let go."""
    _, _, trial, videos = done
    near = winning(videos, "repeats")
    compared = sum(map(len, videos[1:]))

    def cancelled(frames: int) -> None:
        left = iter(range(frames))

        def asked() -> None:
            if next(left, None) is None:
                raise comfy.model_management.InterruptProcessingException

        with monkeypatch.context() as patch:
            patch.setattr(
                comfy.model_management, "throw_exception_if_processing_interrupted", asked
            )
            with pytest.raises(comfy.model_management.InterruptProcessingException):
                verdict(trial, near, "mine")
        assert not [*profiles.iterdir()]

    for frames in (0, compared - 1, compared, compared + len(videos[0]) - 1):
        cancelled(frames)
    assert verdict(trial, near)[1]["best"] == "repeats"


def test_grey_videos_are_compared(done):
    _, _, trial, videos = done
    grey = [video[..., :1] for video in winning(videos, "repeats")]
    assert verdict(trial, grey)[1]["best"] == "repeats"


def test_candidate_out_of_memory_is_a_row_and_the_others_go_on():
    models, steps, trial = candidates("few")
    Trouble(models[1], out_of_memory())
    videos = decoded(models, steps)
    text, row, _ = verdict(trial, videos)
    rows = by_name(row)
    assert rows["plan"]["failed"] == "out of memory while sampling"
    assert rows["plan"]["psnr_db"] is None and rows["plan"]["seconds"] is None
    assert rows["steps"]["failed"] is None and row["best"] in ("steps", "easycache")
    assert "out of memory while sampling" in text
    # any other error is the sampler's
    models, steps, _ = candidates("few")
    Trouble(models[0], RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        sampled(models[0])


class Decoder:
    """A VAE that runs out of memory at some of the videos."""

    def __init__(self, short_at: int):
        self.short_at, self.count = short_at, 0

    def decode(self, latent):
        self.count += 1
        if self.count == self.short_at:
            raise torch.OutOfMemoryError("no room")
        return picture_of(latent)


def test_candidate_that_runs_out_of_memory_while_decoding_is_a_row(monkeypatch):
    # on a CPU the host takes no error for it
    monkeypatch.setattr(comfy.model_management, "OOM_EXCEPTION", torch.OutOfMemoryError)
    models, steps, trial = candidates("few")
    latents = [
        {"samples": tiny.ksampler(model, steps=count)}
        for model, count in zip(models, steps, strict=True)
    ]

    def judged(short_at: int) -> tuple[str, dict]:
        vae = [Decoder(short_at)]
        text, _, _, row = WanTrimVerdict.execute([trial], [""], None, latents, vae).result
        return text, check_row(json.loads(row))

    _, usual = judged(0)
    assert all(one["failed"] is None for one in usual["rows"])
    text, row = judged(3)
    assert by_name(row)["easycache"]["failed"] == "out of memory while decoding" and row["best"]
    assert "out of memory while decoding" in text
    text, row = judged(1)
    assert row["best"] is None and "has no video (out of memory while decoding)" in text
    # the next time there is room
    assert judged(0)[1]["best"] == usual["best"]
    with pytest.raises(ValueError, match="connect 'images' to the VAE Decode"):
        WanTrimVerdict.execute([trial], [""])
    with pytest.raises(ValueError, match="samples: 5 videos came for 4 candidates"):
        WanTrimVerdict.execute([trial], [""], None, [*latents, latents[0]], [Decoder(0)])


def test_without_the_whole_run_nothing_is_best_and_it_is_said():
    models, steps, trial = candidates("all")
    Trouble(models[0], out_of_memory())
    text, row, _ = verdict(trial, decoded(models, steps))
    assert row["best"] is None
    assert text.startswith("No best one: the whole run has no video (out of memory while sampling)")
    assert "the whole run was not seen: EasyCache ran at 0.2" in text
    assert "so the curves that ship were used" in text


def test_videos_that_cannot_be_compared_are_rows_that_say_so(done):
    _, _, trial, videos = done
    odd = list(videos)
    odd[1] = odd[1][:2]
    odd[2] = odd[2][:, :, :14]
    odd[3] = odd[3] * float("nan")
    text, row, clip = verdict(trial, odd[:8])
    rows = by_name(row)
    assert (
        rows["plan"]["failed"] == "the video is 2 frames of 20x16, the whole one 3 frames of 20x16"
    )
    assert "14x16" in rows["own"]["failed"] and "no numbers" in rows["repeats"]["failed"]
    assert rows["steps"]["failed"] == "no video came"
    assert "8 videos came for 9 candidates" in text
    assert row["best"] in ("more", "heads", "easycache") and clip.isfinite().all()
    with pytest.raises(ValueError, match="WanTrim Verdict: images: 10 videos came for 9"):
        verdict(trial, [*videos, videos[0]])


def test_steps_that_are_not_connected_are_said():
    models, _, trial = candidates("few")
    text, row, _ = verdict(trial, decoded(models, [STEPS] * 4))
    assert by_name(row)["steps"]["failed"] == "8 steps were sampled instead of 5"
    assert "connect the output 'steps' to the sampler" in text
    # the whole run's own too
    models, _, trial = candidates("few")
    text, row, _ = verdict(trial, decoded(models, [4] * 4))
    assert "the whole run did 4 steps and WanTrim Candidates was told 8: connect its output" in text
    assert by_name(row)["steps"]["failed"] is None


def test_what_the_first_run_of_all_warms_up_is_not_the_whole_runs(monkeypatch):
    models, steps, trial = candidates("few", steps=3)
    for model in models[:2]:
        # begin, a mark behind each step, end: the first step is five seconds slower
        monkeypatch.setattr(trial_wrappers, "_now", iter([0.0, 6.0, 7.0, 8.0, 9.0]).__next__)
        sampled(model, 3)
    whole, plan = trial.candidates[:2]
    assert whole.samplings["this"].warmed == 5.0 and whole.seconds == 4.0
    assert plan.samplings["this"].warmed == 0.0 and plan.seconds == 9.0


def test_never_sampled_candidates_have_no_seconds(done):
    _, _, _, videos = done
    _, _, trial = candidates("few")
    text, row, _ = verdict(trial, videos[:4])
    assert all(one["seconds"] is None and one["work"] is None for one in row["rows"])
    assert row["best"] is None and "it was never sampled" in text


def test_without_easycache_it_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr(candidates_module, "easycache_node", lambda: None)
    _, counts, trial = candidates("few", steps=2)
    assert [one.name for one in trial.candidates] == ["whole", "plan", "steps"]
    assert any("no EasyCache" in note for note in trial.notes) and counts == [2, 2, 1]


def load(path) -> ProfileFile:
    return ProfileFile(load_profile(path))


def test_the_tuned_dial_reproduces_the_chosen_row(done, profiles):
    _, _, trial, videos = done
    text, row, _ = verdict(trial, winning(videos, "repeats"), "mine")
    assert row["best"] == "repeats" and "Kept in mine.safetensors" in text
    kept = load(profiles / "mine.safetensors")
    assert (profiles / "mine.safetensors").stat().st_size < 1 << 20

    def dial(speedup=SPEEDUP, first=1):
        model = tiny.base_model()
        return WanTrim.execute(model, speedup, "draft", first, 0, "auto", kept).result[0]

    same = dial()
    assert torch.equal(sampled(same), videos[3])
    assert (
        "the plan that your trial chose (WanTrim 1.55x, steps" in attachment_of(same).record.planned
    )
    # another wish is solved by the whole run
    other, untuned = dial(2.0), WanTrim.execute(tiny.base_model(), 2.0, "draft", 1, 0).result[0]
    for model in (other, untuned):
        sampled(model)
    assert "solved by the whole run of your trial" in attachment_of(other).record.planned
    # the same run, in which other steps were done
    one, two = (
        replace(attachment_of(m).solved.run, done=(), costs=(), concentration=None)
        for m in (other, untuned)
    )
    assert one == two
    # steps that have to be whole come before what won
    guarded = dial(first=3)
    sampled(guarded)
    assert attachment_of(guarded).solved.plan.shares.shares[:3] == (1, 1, 1)
    # another number of steps is another run
    sampled(other, steps=6)
    assert any("no run like this one" in n for n in attachment_of(other).record.notes)


def test_heads_beside_the_dial_are_a_candidate_that_can_be_kept(done, profiles):
    models, _, trial, videos = done
    heads = attachment_of(models[NAMES.index("heads")])
    assert attention_left(heads.record) == pytest.approx(0.75, abs=0.03)
    verdict(trial, winning(videos, "heads"), "mine")
    kept = load(profiles / "mine.safetensors")

    def dial(model):
        model = WanTrim.execute(model, SPEEDUP, "draft", 1, 0, "auto", kept).result[0]
        return model, sampled(model)

    for prune in (0.25, 0.5):
        model, video = dial(WanTrimHeads.execute(tiny.base_model(), None, prune).result[0])
        assert torch.equal(video, videos[NAMES.index("heads")]) == (prune == 0.25)
    model, _ = dial(tiny.base_model())
    [note] = [n for n in attachment_of(model).record.notes if "your trial at 1.55x chose" in n]
    assert note.endswith("put WanTrim Heads with a prune ratio of 0.25 on this model for that")
    # where attention is little of the work they are not tried
    models, steps, trial = candidates()
    assert sampled(models[1], steps[1]) is not None
    blank = sampled(models[NAMES.index("heads")])
    assert trial.candidates[NAMES.index("heads")].failed.startswith("not tried: attention is ")
    assert "too little for heads" in verdict(trial, [blank] * len(NAMES))[0]
    # where another node decides the heads, all candidates have them and none is about them
    trial = candidates(model=WanTrimHeads.execute(tiny.base_model(), None, 0.5).result[0])[2]
    assert [one.name for one in trial.candidates] == [name for name in NAMES if name != "heads"]


def test_a_winner_that_is_not_ours_is_said(done, profiles):
    _, _, trial, videos = done
    verdict(trial, winning(videos, "easycache"), "mine")
    model = WanTrim.execute(
        tiny.base_model(), SPEEDUP, "draft", 1, 0, "auto", load(profiles / "mine.safetensors")
    ).result[0]
    sampled(model)
    [note] = [
        n for n in attachment_of(model).record.notes if "your trial at 1.55x chose EasyCache" in n
    ]
    assert "cannot do" in note


def test_outcome_is_merged_into_the_profile_of_the_model(done, profiles):
    _, _, trial, videos = done
    path = profiles / "mine.safetensors"
    model = model_fingerprint(tiny.base_model().model.diffusion_model)
    recorded = Profile.empty(model)
    recorded.tensors["count"][3] = 7
    recorded.runs.append({"id": "a run"})
    recorded.save(path)
    for name in ("repeats", "plan"):
        verdict(trial, winning(videos, name), "mine")
    kept = load_profile(path)
    assert kept.calls == 7 and kept.runs == [{"id": "a run"}]
    [one] = kept.tuned
    assert one["chosen"] == "WanTrim 1.55x"
    # a run of another number of steps stands beside it
    models, steps, other = candidates("few", steps=6)
    verdict(other, decoded(models, steps), "mine")
    assert [len(one["sigmas"]) - 1 for one in load_profile(path).tuned] == [8, 6]
    # and survives a recording that is merged
    assert len(load_profile(path).merged(Profile.empty(model)).tuned) == 2


def test_a_profile_of_another_model_or_a_damaged_one_stays_as_it_is(done, profiles):
    _, _, trial, videos = done
    path = profiles / "mine.safetensors"
    Profile.empty(Fingerprint(96, 128, 5, 8, 16, 16)).save(path)
    for before in (path.read_bytes(), b"junk"):
        path.write_bytes(before)
        text, row, _ = verdict(trial, videos, "mine")
        assert "Nothing was kept: mine.safetensors" in text and row["best"] is not None
        assert path.read_bytes() == before
    assert "expected a plain name" in WanTrimVerdict.validate_inputs(filename="../mine")
    for good in ("", ["mine"], [None], None):
        assert WanTrimVerdict.validate_inputs(filename=good) is True
    assert "expected a plain name" in WanTrimVerdict.validate_inputs(filename=["a/b"])


def test_a_profile_without_trials_or_of_another_model_is_refused():
    model = tiny.base_model()
    fingerprint = model_fingerprint(model.model.diffusion_model)
    broken = Profile(fingerprint, Profile.empty(fingerprint).tensors, tuned=[{"sigmas": [1]}])
    for profile, says in (
        (Profile.empty(fingerprint), "profile: it holds no whole run"),
        (
            Profile.empty(Fingerprint(96, 128, 5, 8, 16, 16)),
            "profile: it was recorded with another",
        ),
        (broken, "profile: the run in it cannot be read"),
    ):
        with pytest.raises(ValueError, match=f"WanTrim: {says}"):
            WanTrim.execute(model, 1.5, "draft", 1, 0, "auto", ProfileFile(profile))


def test_one_trial_that_cannot_be_read_does_not_hide_the_others(caplog):
    model = tiny.base_model()
    fingerprint = model_fingerprint(model.model.diffusion_model)
    good = Tuned((1.0, 0.5, 0.0), 2, False, 30, 1.5, "x", None, Travel((1.0, 0.5), (0.0, 1.0)))
    kept = replace(Profile.empty(fingerprint), tuned=[{"of": "tomorrow"}, good.to_json()])
    [dialled] = WanTrim.execute(model, 1.5, "draft", 1, 0, "auto", ProfileFile(kept)).result
    assert attachment_of(dialled).dial.tuned == (good,)
    assert "WanTrim: profile: a run in it cannot be read" in caplog.text


@pytest.fixture(scope="module")
def experts():
    with torch.inference_mode():
        weights, metadata = tiny.state_dict("t2v")
        weights["blocks.0.modulation"] = -weights["blocks.0.modulation"]
        other = comfy.sd.load_diffusion_model_state_dict(weights, metadata=metadata)
        return tiny.base_model(), other


def test_both_experts_make_one_trial_and_two_profiles(experts, profiles):
    high, low = experts
    made = WanTrimCandidates.execute(high, SPEEDUP, 6, "few", low, 2).result
    trial, videos = made[4], []
    assert made[2] == [6, 6, 6, 4] and made[3] == [2, 2, 2, 1]
    for first, second, steps, change in zip(*made[:4], strict=True):
        latent = tiny.ksampler_advanced(first, tiny.empty_latent(), 0, change, steps=steps)
        latent = tiny.ksampler_advanced(second, latent, change, steps, steps=steps)
        videos.append(picture_of(latent))
    text, row, _ = verdict(trial, winning(videos, "plan", ["whole", "plan"]), "pair")
    rows = by_name(row)
    assert rows["whole"]["work"] == 1 and rows["steps"]["work"] == 4 / 6
    assert rows["plan"]["work"] == pytest.approx(1 / SPEEDUP, abs=0.1)
    assert row["run"]["steps"] == 6 and len(row["models"]) == 2
    assert "pair_high_noise.safetensors and pair_low_noise.safetensors" in text
    kept = [load(profiles / f"pair_{part}_noise.safetensors") for part in ("high", "low")]
    # where one of them is damaged neither is written
    (profiles / "other_low_noise.safetensors").write_bytes(b"junk")
    text, *_ = verdict(trial, winning(videos, "plan", ["whole", "plan"]), "other")
    assert "Nothing was kept: other_low_noise.safetensors" in text
    assert not (profiles / "other_high_noise.safetensors").exists()
    # where one of them cannot be written it is said what was kept
    save = Profile.save
    for broken, said in (
        ("full_low", "Kept in full_high_noise.safetensors, but full_low_noise.safetensors cannot"),
        ("full_high", "Nothing was kept: full_high_noise.safetensors cannot"),
    ):

        def full(profile, path, broken=broken):
            if path.name.startswith(broken):
                raise OSError("no space left")
            save(profile, path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Profile, "save", full)
            text, *_ = verdict(trial, winning(videos, "plan", ["whole", "plan"]), "full")
        assert f"{said} be written (no space left)" in text
    tuned = WanTrimPair.execute(high, low, SPEEDUP, "draft", 1, 0, 0, "auto", *kept).result
    latent = tiny.ksampler_advanced(tuned[0], tiny.empty_latent(), 0, 2, steps=6)
    latent = tiny.ksampler_advanced(tuned[1], latent, 2, 6, steps=6)
    assert torch.equal(picture_of(latent), videos[1])
    # the two must not be mixed up
    with pytest.raises(ValueError, match="WanTrim Pair: profile_high_noise: "):
        WanTrimPair.execute(high, low, SPEEDUP, "draft", 1, 0, 0, "auto", *kept[::-1])


def test_a_pair_sampled_by_heun_keeps_what_can_be_read(experts, profiles):
    """Its second call of the high noise expert's last step is at the low one's first sigma."""
    made = WanTrimCandidates.execute(experts[0], SPEEDUP, 6, "few", experts[1], 3).result
    videos = []
    for first, second, steps, change in list(zip(*made[:4], strict=True))[:2]:
        latent = tiny.empty_latent()
        for model, begins, ends in ((first, 0, change), (second, change, steps)):
            latent = tiny.ksampler_advanced(
                model, latent, begins, ends, steps=steps, sampler="heun"
            )
        videos.append(picture_of(latent))
    assert "Kept in" in verdict(made[4], winning(videos, "plan"), "heun")[0]
    for part in ("high", "low"):
        [kept] = load_profile(profiles / f"heun_{part}_noise.safetensors").tuned
        assert Tuned.from_json(kept).chosen == "WanTrim 1.55x"


def test_an_expert_that_ran_out_of_memory_is_tried_again(experts, monkeypatch):
    """The first one's sampling is taken from ComfyUI's cache then."""
    monkeypatch.setattr(comfy.model_management, "OOM_EXCEPTION", torch.OutOfMemoryError)
    high, low = experts
    made = WanTrimCandidates.execute(high, SPEEDUP, 6, "few", low, 2).result
    candidate = made[4].candidates[1]
    latent = tiny.ksampler_advanced(made[0][1], tiny.empty_latent(), 0, 2, steps=6)
    trouble = Trouble(made[1][1], torch.OutOfMemoryError("no room"), at=2)
    assert torch.equal(tiny.ksampler_advanced(made[1][1], latent, 2, 6, steps=6), latent)
    assert candidate.failed == "out of memory while sampling" and candidate.seconds is None
    trouble.error = None
    again = tiny.ksampler_advanced(made[1][1], latent, 2, 6, steps=6)
    assert candidate.failed is None and candidate.seconds > 0 and not torch.equal(again, latent)


def test_candidates_whose_options_another_node_replaced_are_sampled(done, caplog):
    models, steps, _, videos = done
    for at, lost in ((0, "candidate of a trial is not known"), (1, "nothing is trimmed")):
        alone = models[at].clone()
        alone.model_options["transformer_options"] = {}
        caplog.clear()
        assert torch.equal(sampled(alone, steps[at]), videos[0])
        assert "options of its own in the place of ours" in caplog.text and lost in caplog.text


def test_both_experts_are_solved_by_their_own_whole_runs(experts):
    high, low = experts
    made = WanTrimCandidates.execute(high, SPEEDUP, 12, "all", low, 6).result
    trial, names = made[4], [one.name for one in made[4].candidates]
    for name in ("whole", "own"):
        first, second, steps, change = (made[i][names.index(name)] for i in range(4))
        latent = tiny.ksampler_advanced(first, tiny.empty_latent(), 0, change, steps=steps)
        tiny.ksampler_advanced(second, latent, change, steps, steps=steps)
    found = trial.candidates[names.index("own")].attachments()
    ways = [trial.whole.samplings[part].travel for part in trial.parts]
    for part in trial.parts:
        # all candidates of the first one are sampled before any of the second
        known = ways[0] if part == "high" else ways[0].joined(ways[1])
        assert found[part].dial.travel == known
        assert not trial.candidates[names.index("own")].samplings[part].notes
    works = [step for one in found.values() for step in one.record.steps]
    assert len(works) / sum(step.kept_share for step in works) == pytest.approx(SPEEDUP, rel=0.1)


def test_single_model_has_no_candidates_for_the_second_sampler(done):
    made = WanTrimCandidates.execute(tiny.base_model(), SPEEDUP, STEPS, "few").result
    [blocked] = made[1]
    assert isinstance(blocked, ExecutionBlocker) and "model_low_noise" in blocked.message
