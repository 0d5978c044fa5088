"""What other packs do to a run, as small hosts of our own: the rows of the catalogue."""

from __future__ import annotations

from types import MethodType

import torch

import comfy.sample
import comfy.samplers
from comfy.ldm.wan.model import WanModel, sinusoidal_embedding_1d
from comfy.patcher_extension import WrappersMP
from wantrim.tests.comfyui import tiny

# forwards that packs bring along, from before blocks got transformer_options


def forward_of_its_own(hands=("img", "txt", "vec", "pe"), gives=()):
    """A forward that hands block replacements only some of their arguments.

    Args:
        gives: further keys of what a block gives.
    """

    def put_on(model):
        def forward_orig(self, x, t, context, clip_fea=None, freqs=None, **options):
            replaced = options["transformer_options"].get("patches_replace", {}).get("dit", {})
            x = self.patch_embedding(x.float()).to(x.dtype)
            grid = x.shape[2:]
            x = x.flatten(2).transpose(1, 2)
            e = self.time_embedding(sinusoidal_embedding_1d(self.freq_dim, t).to(x.dtype))
            e0 = self.time_projection(e).unflatten(1, (6, self.dim))
            context = self.text_embedding(context)
            for index, block in enumerate(self.blocks):
                everything = {"img": x, "txt": context, "vec": e0, "pe": freqs, "block": index}
                given = {key: everything[key] for key in hands}

                def own(args, block=block):
                    out = block(
                        args["img"],
                        context=args.get("txt", context),
                        e=args.get("vec", e0),
                        freqs=args.get("pe", freqs),
                    )
                    return {"img": out, **dict.fromkeys(gives, block)}

                found = replaced.get(("double_block", index))
                out = own(given) if found is None else found(given, {"original_block": own})
                # a block that was left out gives nothing else
                assert not gives or out.keys() >= {"img", *gives} or out["img"] is x
                x = out["img"]
            return self.unpatchify(self.head(x, e), grid)

        patched, network = model.clone(), model.model.diffusion_model
        # as packs do it: on the instance, while the model is called
        method = MethodType(forward_orig, network)

        def wrap(apply, args):
            network.forward_orig = method
            try:
                return apply(args["input"], args["timestep"], **args["c"])
            finally:
                del network.forward_orig

        patched.set_model_unet_function_wrapper(wrap)
        return patched

    return put_on


def class_swapped(model):
    """A class made of the model's own, as patchers of attention put it there."""
    patched, network = model.clone(), model.model.diffusion_model
    swapped = type("Swapped", (type(network),), {})

    def wrap(apply, args):
        was, network.__class__ = type(network), swapped
        try:
            return apply(args["input"], args["timestep"], **args["c"])
        finally:
            network.__class__ = was

    patched.set_model_unet_function_wrapper(wrap)
    return patched


def replaced_forward(model):
    """A forward that ComfyUI's wrappers never see."""
    patched, network = model.clone(), model.model.diffusion_model

    def forward(x, timestep, context, clip_fea=None, time_dim_concat=None, **kwargs):
        return WanModel._forward(network, x, timestep, context, clip_fea, time_dim_concat, **kwargs)

    patched.add_object_patch("diffusion_model.forward", forward)
    return patched


# what stands in front of our wrapper


def in_front(change):
    """A wrapper around ours that hands on what `change` makes of the network's arguments."""

    def put_on(model):
        patched = model.clone()

        def wrapper(executor, *args, **kwargs):
            return change(executor, *args, **kwargs)

        # of a key that comes first, whatever else is put on
        wrappers = patched.model_options["transformer_options"].setdefault("wrappers", {})
        mine = wrappers.setdefault(WrappersMP.DIFFUSION_MODEL, {})
        wrappers[WrappersMP.DIFFUSION_MODEL] = {"hostile": [wrapper], **mine}
        return patched

    return put_on


def options_with(**values):
    """Options of the host of another kind, `...` for left out."""

    def change(executor, *args, **kwargs):
        options = {**args[-1], **{k: v for k, v in values.items() if v is not ...}}
        for key, value in values.items():
            if value is ...:
                options.pop(key, None)
        return executor(*args[:-1], options, **kwargs)

    return in_front(change)


def by_keyword(executor, x, timestep, context, clip_fea, time_dim_concat, options, **kwargs):
    return executor(
        x=x, timestep=timestep, context=context, clip_fea=clip_fea,
        time_dim_concat=time_dim_concat, transformer_options=options, **kwargs,
    )  # fmt: skip


def more_channels(executor, x, *args, **kwargs):
    """A model call whose answer has a channel more than the latent."""
    out = executor(x, *args, **kwargs)
    return torch.cat([out, out[:, :1]], 1)[:, : out.shape[1]]


# guiders and samplers


class _Guider(comfy.samplers.CFGGuider):
    def __init__(self, model):
        super().__init__(model)
        given = tiny.case()
        self.set_conds(given.positive, given.negative)
        self.set_cfg(5.0)
        self.count = 0

    def both(self, x, timestep, model_options, seed, guided=True, cfg=5.0):
        negative = self.conds["negative"] if guided else None
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, negative, self.conds["positive"], cfg if guided else 1.0,
            model_options=model_options, seed=seed,
        )  # fmt: skip


class ListCFG(_Guider):
    """A list of numbers, one for each step."""

    def __init__(self, model):
        super().__init__(model)
        self.set_cfg([5.0, 4.0, 3.0, 2.0, 1.5, 1.5])

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        self.count += 1
        return self.both(x, timestep, model_options, seed, cfg=self.cfg[(self.count - 1) % 6])


class NoCFG(_Guider):
    """No number at all."""

    def __init__(self, model):
        super().__init__(model)
        self.cfg = None

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        return self.both(x, timestep, model_options, seed)


class HalfGuided(_Guider):
    """Guidance is switched off after half of the steps."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        self.count += 1
        return self.both(x, timestep, model_options, seed, guided=self.count <= 3)


class PromptByPrompt(_Guider):
    """Asks for one prompt after the other, the unconditional one first."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        def one(cond):
            return comfy.samplers.calc_cond_batch(
                self.inner_model, [cond], x, timestep, model_options
            )[0]

        negative, positive = one(self.conds["negative"]), one(self.conds["positive"])
        return negative + 5.0 * (positive - negative)


def euler(x, model, sigmas, extra, at):
    """One Euler step from sigma to sigma."""
    clean = model(x, at[0] * x.new_ones(len(x)), **extra)
    return x + (x - clean) / at[0] * (at[1] - at[0])


def early(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Stops after half of the steps that it announced."""
    for i in range(len(sigmas) // 2):
        x = euler(x, model, sigmas, extra_args or {}, sigmas[i : i + 2])
    return x


def late(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Begins with the third of the steps that it announced."""
    for i in range(2, len(sigmas) - 1):
        x = euler(x, model, sigmas, extra_args or {}, sigmas[i : i + 2])
    return x


def restarts(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Goes back up with new noise and down again."""
    noise = torch.Generator().manual_seed(5)
    for i in range(len(sigmas) - 1):
        x = euler(x, model, sigmas, extra_args or {}, sigmas[i : i + 2])
        if i in (2, 3):
            back = (sigmas[i - 1] ** 2 - sigmas[i + 1] ** 2).sqrt()
            x = x + back * torch.randn(x.shape, generator=noise)
            x = euler(
                x, model, sigmas, extra_args or {}, torch.stack([sigmas[i - 1], sigmas[i + 1]])
            )
    return x


def repeats(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Every step twice at the same sigma, the second time from where the first one led."""
    for i in range(len(sigmas) - 1):
        half = (sigmas[i] + sigmas[i + 1]) / 2
        middle = euler(x, model, sigmas, extra_args or {}, torch.stack([sigmas[i], half]))
        clean = model(middle, sigmas[i] * x.new_ones(len(x)), **(extra_args or {}))
        x = x + (middle - clean) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def halves(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """As res_2s: a second call half of the way by the logarithm of sigma, which nobody announces."""
    for i in range(len(sigmas) - 1):
        if sigmas[i + 1] == 0:
            return euler(x, model, sigmas, extra_args or {}, sigmas[i : i + 2])
        half = (sigmas[i] * sigmas[i + 1]).sqrt()
        middle = euler(x, model, sigmas, extra_args or {}, torch.stack([sigmas[i], half]))
        clean = model(middle, half * x.new_ones(len(x)), **(extra_args or {}))
        x = x + (middle - clean) / half * (sigmas[i + 1] - sigmas[i])
    return x


def thirds(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Three calls a step, the last one at the sigma of the next step."""
    for i in range(len(sigmas) - 1):
        places = torch.stack([sigmas[i], (sigmas[i] + sigmas[i + 1]) / 2, sigmas[i + 1]])
        for at in places if sigmas[i + 1] > 0 else places[:1]:
            clean = model(x, at * x.new_ones(len(x)), **(extra_args or {}))
        x = x + (x - clean) / at * (sigmas[i + 1] - sigmas[i])
    return x


def jumps(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Leaves out every third of the steps that it announced."""
    kept = [i for i in range(len(sigmas) - 1) if i % 3 != 2]
    for i, after in zip(kept, [*kept[1:], -1], strict=True):
        x = euler(x, model, sigmas, extra_args or {}, torch.stack([sigmas[i], sigmas[after]]))
    return x


def run(model, guider=_Guider, sampler=None, steps=6) -> torch.Tensor:
    """What a guider and a sampler make of a MODEL."""
    made = guider(model)
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
    given = tiny.case()
    chosen = comfy.samplers.sampler_object("euler")
    if sampler is not None:
        chosen = comfy.samplers.KSAMPLER(sampler)
    noise = comfy.sample.prepare_noise(given.latent, 7)
    return made.sample(noise, given.latent, chosen, sigmas, disable_pbar=True, seed=7)
