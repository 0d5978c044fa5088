"""The run that WanTrim Profile records is one that WanTrim can be solved by."""

import json
from dataclasses import replace

import pytest
import torch

import comfy.sd
import folder_paths
from comfy.patcher_extension import WrappersMP
from wantrim.hosts.comfyui import profiling
from wantrim.hosts.comfyui.attachment import attachment_of
from wantrim.hosts.comfyui.profiling import NOT_WHOLE, profile_of
from wantrim.nodes.heads import WanTrimHeads
from wantrim.nodes.profile import FOLDER, WanTrimLoadProfile, WanTrimProfile, WanTrimSaveProfile
from wantrim.nodes.report import WanTrimReport
from wantrim.nodes.tuned import WanTrimCandidates
from wantrim.nodes.wantrim import WanTrim, WanTrimPair
from wantrim.profiles.profile import load_profile
from wantrim.profiles.recorder import ProfileFile
from wantrim.solve.tuned import Tuned
from wantrim.tests.comfyui import neighbours, put, tiny
from wantrim.tests.waits import Waits
from wantrim.tests.waits import put as on_device

STEPS, SPEEDUP = 8, 1.55
IMAGES = torch.zeros(1, 8, 8, 3)
SAID = "solved by the whole run that WanTrim Profile recorded"


def profiled(model=None):
    return WanTrimProfile.execute(model or tiny.base_model(), "none").result[0]


def recorder_of(model):
    return profile_of(model).recorder


def recorded(model=None, given=None, **options) -> ProfileFile:
    patched = profiled(model)
    tiny.sample(patched, given, **({"steps": STEPS} | options))
    return ProfileFile(recorder_of(patched).profile())


def whole_run(opened: ProfileFile) -> Tuned:
    [kept] = opened.profile.tuned
    return Tuned.from_json(json.loads(json.dumps(kept)))


def trial(models, **options) -> tuple[list, object]:
    """The candidates of one model, and the trial."""
    made = WanTrimCandidates.execute(models, SPEEDUP, STEPS, "all", **options).result
    return made[0], made[4]


def dialled(profile=None, speedup=SPEEDUP, model=None):
    model = tiny.base_model() if model is None else model
    return WanTrim.execute(model, speedup, "draft", 1, 0, "auto", profile).result[0]


def shares_of(model) -> tuple[float, ...]:
    return attachment_of(model).solved.plan.shares.shares


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, FOLDER, ([str(tmp_path)], set()))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("t2v", {"sampler": "uni_pc"}),
        # without guidance
        ("t2v", {"cfg": 1.0}),
        ("i2v", {}),
        # frames that are given have a timestep of their own
        ("ti2v", {}),
        # a reference among the given frames is no start
        ("vace", {}),
        ("t2v", {"tokens": (7, 9)}),
        # the first expert's part
        ("t2v", {"start_step": 0, "last_step": 5, "force_full_denoise": False}),
    ],
)
def test_what_a_profile_records_is_what_a_trial_measures(kind, options):
    base, given = tiny.base_model(kind), tiny.case(kind, tokens=options.pop("tokens", (7, 7)))
    models, made = trial(base)
    for model in models[:2]:
        tiny.sample(model, given, steps=STEPS, **options)
    run = attachment_of(models[1]).solved.run
    found = whole_run(recorded(base, given, **options))
    assert found.travel == made.whole.samplings["this"].travel
    assert found.travel.travel[-1] > 1
    assert (found.sigmas, found.prompts) == (run.sigmas, run.prompts)
    assert (found.starts_given, found.tokens) == (run.starts_given, run.grid.tokens)
    assert found.starts_given == (kind in ("i2v", "ti2v"))
    assert found.prompts == (1 if "cfg" in options else 2)
    assert found.recorded and found.shares is None


def test_a_dial_goes_by_the_recorded_run_and_says_so():
    """As a trial's candidate that is solved by the whole run."""
    profile = recorded()
    models, _ = trial(tiny.base_model())
    own = [tiny.sample(models[at], steps=STEPS) for at in (0, 2)][1]
    model, plain = dialled(profile), dialled()
    assert torch.equal(tiny.sample(model, steps=STEPS), own)
    assert not torch.equal(tiny.sample(plain, steps=STEPS), own)
    assert shares_of(model) == shares_of(models[2]) != shares_of(plain)
    record = attachment_of(model).record
    assert SAID in record.planned and not any("trial" in note for note in record.notes)
    assert SAID in WanTrimReport.execute(model, IMAGES).result[2]
    assert "recorded" not in attachment_of(plain).record.planned
    # another number of steps is another run
    tiny.sample(model, steps=6)
    record = attachment_of(model).record
    assert SAID not in record.planned
    assert any("no run like this one, recorded or tried" in note for note in record.notes)


def test_a_trial_of_the_same_run_comes_first():
    profile = recorded()
    one = whole_run(profile)
    shares = (1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0)
    tried = replace(one, speedup=SPEEDUP, chosen="WanTrim 1.55x", shares=shares).to_json()
    for both in ([*profile.profile.tuned, tried], [tried, *profile.profile.tuned]):
        model = dialled(ProfileFile(replace(profile.profile, tuned=both)))
        tiny.sample(model, steps=STEPS)
        assert shares_of(model) == shares
        assert "your trial chose" in attachment_of(model).record.planned


def test_runs_are_kept_in_the_file_and_a_newer_one_takes_its_place(folder):
    model = profiled()

    def save(merge=True, **options):
        tiny.sample(model, **options)
        saved = WanTrimSaveProfile.execute(model, IMAGES, "mine", merge).result
        assert load_profile(folder / "mine.safetensors").tuned == saved[0].profile.tuned
        return saved[0].profile, saved[2]

    first, text = save(steps=4)
    size = (folder / "mine.safetensors").stat().st_size
    assert "A whole run in 4 steps was recorded: WanTrim can be solved by it." in text
    # a trial of that run stays beside it
    tried = replace(whole_run(ProfileFile(first)), chosen="EasyCache").to_json()
    first.with_tuned(tried).save(folder / "mine.safetensors")
    save(steps=3)
    kept, _ = save(steps=4, seed=8)
    assert kept.calls == 11 and len(kept.runs) == 3
    assert [len(one["sigmas"]) - 1 for one in kept.tuned] == [4, 3, 4]
    assert kept.tuned[0] == tried and kept.tuned[2]["travel"] != first.tuned[0]["travel"]
    assert (folder / "mine.safetensors").stat().st_size < size + 8 * 1024
    opened = WanTrimLoadProfile.execute("mine.safetensors").result[0]
    assert len(attachment_of(dialled(opened)).dial.tuned) == 3
    # replaced with what was there
    assert len(save(merge=False, steps=4)[0].tuned) == 1


def test_a_profile_of_before_is_read_and_has_no_run_to_go_by(folder):
    opened = recorded(steps=2)
    opened.profile.tuned = []
    opened.profile.save(folder / "old.safetensors")
    old, _, text = WanTrimLoadProfile.execute("old.safetensors").result
    assert old.profile.calls == 2 and "whole run" not in text
    with pytest.raises(ValueError, match="^WanTrim: profile: it holds no whole run. Record one"):
        dialled(old)


def area(given: tiny.Case) -> tiny.Case:
    """The prompt again for a part of the picture."""
    [[words, options]] = given.positive
    part = [
        words,
        {**options, "area": (3, 4, 6, 0, 2, 2), "strength": 0.5, "set_area_to_bounds": False},
    ]
    return replace(given, positive=[*given.positive, part])


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (put.dialled, {}),
        (lambda model: WanTrimHeads.execute(model, None, 0.25).result[0], {}),
        (neighbours.windows, {}),
        (neighbours.easycache, {}),
        (neighbours.lazycache, {}),
        (lambda model: model, {"sampler": "heun"}),
        # one call a step, at sigmas of its own
        (lambda model: model, {"sampler": "dpm_fast"}),
        (lambda model: model, {"steps": 1}),
        (lambda model: model, {"given": area(tiny.case())}),
    ],
    ids=[
        "dial",
        "heads",
        "windows",
        "easycache",
        "lazycache",
        "heun",
        "dpm_fast",
        "one step",
        "area",
    ],
)
def test_of_a_run_that_was_not_whole_nothing_is_taken(change, options):
    model = profiled(change(tiny.base_model()))
    tiny.sample(model, **({"steps": 4} | options))
    recorder = recorder_of(model)
    assert recorder.calls > 0 and recorder.whole_run is None
    assert NOT_WHOLE in recorder.notes and not recorder.profile().tuned


def test_a_plan_that_trims_nothing_is_in_nobodys_way():
    final = WanTrim.execute(tiny.base_model(), SPEEDUP, "final", 1, 0).result[0]
    assert whole_run(recorded(final)) == whole_run(recorded())


def test_on_several_gpus_and_after_a_cancel_nothing_is_kept():
    tiny.needs("0.23.0", "sampling on several GPUs")
    model = neighbours.two_gpus(profiled())
    tiny.sample(model, steps=3)
    assert recorder_of(model) is None and "several GPUs" in profile_of(model).reason
    model = profiled()
    tiny.sample(model, steps=3)

    def stop(step, *_):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.sample(model, steps=4, callback=stop)
    assert recorder_of(model) is None


def test_both_experts_go_by_the_run_that_both_recorded():
    weights, metadata = tiny.state_dict("t2v")
    weights["blocks.0.modulation"] = -weights["blocks.0.modulation"]
    experts = [
        tiny.base_model(),
        comfy.sd.load_diffusion_model_state_dict(weights, metadata=metadata),
    ]

    def sample(models, count=6):
        latent = tiny.ksampler_advanced(models[0], tiny.empty_latent(), 0, 2, steps=count)
        return tiny.ksampler_advanced(models[1], latent, 2, count, steps=count)

    watched = [profiled(model) for model in experts]
    assert torch.equal(sample(watched), sample(experts))
    profiles = [ProfileFile(recorder_of(model).profile()) for model in watched]
    ways = [whole_run(one).travel for one in profiles]
    # of another guidance
    other = replace(whole_run(profiles[1]), prompts=1).to_json()
    profiles[1] = ProfileFile(profiles[1].profile.with_tuned(other))
    pair = WanTrimPair.execute(*experts, SPEEDUP, "draft", 1, 0, 0, "auto", *profiles).result
    found = [attachment_of(model).dial.tuned for model in pair]
    assert found[0][0].travel == found[1][0].travel == ways[0].joined(ways[1])
    assert found[1][1].travel == ways[1]
    sample(pair)
    for model in pair:
        assert SAID in attachment_of(model).record.planned
    alone = WanTrimPair.execute(*experts, SPEEDUP, "draft", 1, 0, 0, "auto", profiles[0]).result
    assert [one.travel for one in attachment_of(alone[0]).dial.tuned] == [ways[0]]


def test_a_step_waits_for_the_device_once_more(monkeypatch):
    def waits() -> list[int]:
        found = []

        def count(executor, x, timestep, *args, **kwargs):
            on_device(x, timestep)
            with Waits() as waited:
                out = executor(x, timestep, *args, **kwargs)
            found.append(len(waited.seen))
            return out

        model = profiled()
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "count", count)
        # under inference mode torch reads a single number where no counter sees it
        with torch.inference_mode(False), torch.no_grad():
            tiny.sample(model, steps=3)
        return found

    seen = waits()
    monkeypatch.setattr(profiling, "watch_velocity", lambda *_: None)
    assert seen == [count + 1 for count in waits()]
