"""An error says where, what was expected and what came."""

import importlib
import pkgutil
from types import SimpleNamespace

import pytest
import torch

import comfy.ldm.wan
from comfy.ldm.wan.model import WanModel
from comfy.model_patcher import ModelPatcher
from wantrim.hosts.comfyui.attach import attachment_of
from wantrim.hosts.comfyui.variants import SUPPORTED
from wantrim.nodes import demo
from wantrim.nodes.report import WanTrimReport
from wantrim.nodes.tokens import WanTrimTokens
from wantrim.tests.comfyui import tiny

REFUSED = [name for name, reason in SUPPORTED.items() if reason is not None]
# the oldest ComfyUI that the pack runs in has none of these
NEWER = {"SCAIL2WanModel", "WanDancerModel", "WanAnimate2Model", "CausalWanModel"}


def bare(self, *args, **kwargs):
    torch.nn.Module.__init__(self)


def model_of(name: str, base=torch.nn.Module) -> ModelPatcher:
    """A MODEL around an empty network of the given class name."""
    network = type(name, (base,), {"__init__": bare})()
    holder = torch.nn.Module()
    holder.diffusion_model = network
    return ModelPatcher(holder, torch.device("cpu"), torch.device("cpu"))


def execute(model=None, **options):
    inputs = {"prune_ratio": 0.3, "start_percent": 0.0, "end_percent": 1.0, **options}
    inputs.setdefault("preset", tiny.choice())
    return WanTrimTokens.execute(model=model or tiny.base_model(), **inputs)


def says(error, *parts: str) -> None:
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in: {error.value}"


@pytest.mark.parametrize("name", ["Flux", "UNetModel", "HunyuanVideo"])
def test_other_models_are_refused(name):
    with pytest.raises(ValueError) as error:
        execute(model_of(name))
    says(error, "WanTrim Tokens", "'model'", "Wan", f"got {name}", "Load Diffusion Model")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_wan_classes_are_refused_with_their_reason(name):
    with pytest.raises(ValueError) as error:
        execute(model_of(name, WanModel))
    says(error, "WanTrim Tokens", name, SUPPORTED[name], "Bypass", "WanModel, VaceWanModel")


def test_unknown_wan_class_is_refused():
    with pytest.raises(ValueError) as error:
        execute(model_of("WanModelOfTomorrow", WanModel))
    says(error, "WanTrim Tokens", "WanModelOfTomorrow", "not known", "WanModel")


def test_table_names_every_wan_class_of_the_host():
    for module in pkgutil.iter_modules(comfy.ldm.wan.__path__):
        importlib.import_module(f"comfy.ldm.wan.{module.name}")
    found, pending = {"WanModel"}, [WanModel]
    while pending:
        for sub in pending.pop().__subclasses__():
            pending.append(sub)
            if sub.__module__.startswith("comfy.ldm.wan"):
                found.add(sub.__name__)
    assert found <= set(SUPPORTED) <= found | NEWER


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"prune_ratio": -0.1}, ["prune_ratio", "0 to 0.75", "-0.1"]),
        # a linked value passes the widget's range by
        ({"prune_ratio": 0.76}, ["prune_ratio", "0 to 0.75", "0.76"]),
        ({"prune_ratio": 1.0}, ["prune_ratio", "0 to 0.75", "1.0"]),
        (
            {"start_percent": 0.6, "end_percent": 0.4},
            ["start_percent", "end_percent", "0.6", "0.4"],
        ),
        ({"end_percent": 1.5}, ["end_percent", "0 to 1", "1.5"]),
        ({"start_percent": -0.5}, ["start_percent", "0 to 1", "-0.5"]),
    ],
    ids=str,
)
def test_inputs_outside_their_range_are_refused(options, parts):
    with pytest.raises(ValueError) as error:
        execute(**options)
    says(error, "WanTrim Tokens", *parts)


@pytest.mark.parametrize(
    ("inputs", "parts"),
    [
        ({"alpha": 1.5}, ["alpha", "0 to 1", "1.5"]),
        ({"reselect_every": 0}, ["reselect_every", "at least 1", "0"]),
        ({"schedule": "sideways"}, ["schedule", "falling, constant, rising", "sideways"]),
    ],
    ids=str,
)
def test_custom_inputs_that_do_not_go_are_refused_in_the_words_of_the_node(inputs, parts):
    with pytest.raises(ValueError) as error:
        execute(preset=tiny.choice("custom", **inputs))
    says(error, "WanTrim Tokens", *parts)


@pytest.mark.parametrize(
    ("preset", "got"),
    [
        # ComfyUI hands over nothing when it does not know the choice
        (None, "none of them"),
        ({"preset": "falling"}, "got falling"),
        # linked, so without its inputs
        ("custom", "'custom' cannot be linked"),
        ("rising", "got rising"),
    ],
    ids=str,
)
def test_preset_that_is_not_one_is_refused(preset, got):
    with pytest.raises(ValueError) as error:
        execute(preset=preset)
    says(error, "WanTrim Tokens", "preset", "auto, paper, custom", got, "another version")


@pytest.mark.parametrize("name", ["auto", "paper"])
def test_linked_preset_is_taken(name):
    linked = attachment_of(execute(preset=name).result[0])
    chosen = attachment_of(tiny.at_node(tiny.base_model(), name))
    assert (linked.plan, linked.dial) == (chosen.plan, chosen.dial)
    assert (linked.dial is None, linked.plan.trims_tokens) == ((name == "paper"),) * 2


@pytest.mark.parametrize("size", [{"frames": 0}, {"batch": 0}], ids=str)
def test_empty_latent_is_refused(size):
    given = tiny.Case(tiny.text(1), tiny.text(2), tiny.empty_latent(**size))
    patched = tiny.trimmed(tiny.base_model())
    with pytest.raises(ValueError) as error:
        tiny.sample(patched, given)
    says(error, "WanTrim", "empty latent", "0", "length")
    # the run after it is clean
    assert torch.isfinite(tiny.sample(patched)).all()


@pytest.mark.parametrize("damage", ["truncated", "text", "missing"])
def test_damaged_demo_checkpoint_is_refused(damage, tmp_path, monkeypatch):
    broken = tmp_path / "tiny_wan.safetensors"
    if damage == "truncated":
        broken.write_bytes(demo.CHECKPOINT.read_bytes()[:100_000])
    elif damage == "text":
        broken.write_text("<html>404</html>")
    monkeypatch.setattr(demo, "CHECKPOINT", broken)
    with pytest.raises(ValueError) as error:
        demo.WanTrimDemoModel.execute()
    says(error, "WanTrim Demo: Tiny Wan", "tiny_wan.safetensors", "safetensors", "reinstall")


@pytest.mark.parametrize("node", [demo.WanTrimDemoPrompt, demo.WanTrimDemoImage])
@pytest.mark.parametrize(
    "prompt", ["a pink circle moving left slowly on a black background", "cat"]
)
def test_prompt_outside_the_grammar_is_refused_before_the_run(node, prompt):
    message = node.validate_inputs(prompt)
    assert isinstance(message, str)
    for part in (node.define_schema().display_name, repr(prompt), "a red circle", "colours red"):
        assert part in message
    assert node.validate_inputs(demo.PROMPT) is True


def test_empty_prompt_is_the_negative_one_but_no_picture():
    assert demo.WanTrimDemoPrompt.validate_inputs(" ") is True
    assert demo.WanTrimDemoPrompt.execute("").result[0][0][0].abs().max() == 0
    assert "Start Image" in demo.WanTrimDemoImage.validate_inputs("")


def images():
    return torch.rand(9, 64, 80, 3)


@pytest.fixture
def shown(monkeypatch):
    """ui.PreviewImage writes to the host's temp folder; here nothing is written."""
    from wantrim.nodes import inputs

    preview = SimpleNamespace(as_dict=lambda: {"images": []})
    monkeypatch.setattr(inputs.ui, "PreviewImage", lambda image, cls=None: preview)


def test_report_without_a_plan_names_the_input_and_the_node_to_connect(shown):
    """It is no error: a bypassed node must not cost a finished run."""
    text, picture, _ = WanTrimReport.execute(tiny.base_model(), images()).result
    for part in ("'model'", "no WanTrim plan", "a WanTrim node", "bypass"):
        assert part in text
    sampled = tiny.trimmed(tiny.base_model())
    tiny.sample(sampled)
    text, _, _ = WanTrimReport.execute(sampled, images(), tiny.base_model()).result
    assert "'model_low_noise'" in text and "3 steps" in text


def test_report_of_one_model_twice_says_so_and_is_one(shown):
    sampled = tiny.trimmed(tiny.base_model())
    tiny.sample(sampled)
    text, _, _ = WanTrimReport.execute(sampled, images(), sampled.clone()).result
    assert text.count("WanModel") == 1 and "3 steps" in text
    for part in ("'model'", "'model_low_noise'", "the same model"):
        assert part in text


def test_report_before_sampling_says_so(shown):
    """An expert without a step, or a model that ComfyUI forgot: the run is done all the same."""
    text, _, _ = WanTrimReport.execute(tiny.trimmed(tiny.base_model()), images()).result
    for part in ("'model'", "was not sampled", "VAE Decode"):
        assert part in text
    assert "ran untouched" not in text and "as planned" not in text


@pytest.mark.parametrize("keep", [0.7, 1.0])
def test_report_of_both_experts_has_text_and_picture(shown, keep):
    models = [tiny.trimmed(tiny.base_model(), keep) for _ in range(2)]
    for model in models:
        tiny.sample(model)
    text, picture, _ = WanTrimReport.execute(models[0], images(), models[1]).result
    assert [text.count(f"WanModel, {noise} noise expert: ") for noise in ("high", "low")] == [1, 1]
    assert picture.ndim == 4 and picture.shape[-1] == 3
    assert picture.min() >= 0 and picture.max() <= 1
