"""What the quality bench measures: a model, and all that turns prompts into its videos."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.video_processor import VideoProcessor
from PIL import Image, ImageOps

from ..hosts.diffusers.lora import merge_lora
from ..hosts.diffusers.weights import load_original
from ..toy.batches import image_condition
from ..toy.vae import ToyVAE
from ..toy.world import MAX_OBJECTS, Scene
from ..toy.worlds import FIRST, SECOND, World
from .wan_files import WanFiles, find_files

PROMPTS = (
    "A red fox trots through fresh snow at the edge of a pine forest, its breath steaming.",
    "A barista pours milk into a cup of coffee and draws a leaf in the foam, seen from above.",
    "Waves break over black rocks at sunset while the camera flies slowly out to sea.",
    "An old man in a blue coat feeds pigeons on a crowded square, people walk past behind him.",
    "A yellow taxi drives down a rainy street at night, neon signs mirror in the wet road.",
    "A potter shapes a clay bowl on a spinning wheel, close-up of both hands.",
    "Paper lanterns rise into the dark sky over a lake, their lights tremble on the water.",
    "A watercolour painting of a small village, smoke drifts from the chimneys in the wind.",
)
# what Wan was trained on; WanPipeline.encode_prompt alone would make 226
TEXT_TOKENS = 512
# diffusers names them only halfway through a load; without accelerate it refuses all Wans
PIPELINE_PACKAGES = ("transformers", "accelerate")
# there are 111 and 78 held-out scenes of one object in the two worlds
MAX_TOY_PROMPTS = {FIRST.name: 100, SECOND.name: 76}


@dataclass(frozen=True, eq=False)
class Item:
    """One video to make. Tensors are on the CPU, text and condition without a batch dimension.

    Args:
        text: [tokens, text_dim], in the model's dtype.
        scene: what the prompt says, or None for real weights: the truth is not known.
        condition: Wan's image condition [out_channels + 4, f, h, w] in fp32 for image-to-video.
        first_image: [h, w, 3] in 0..1 for image-to-video.
    """

    prompt_index: int
    seed: int
    prompt: str
    text: torch.Tensor
    scene: Scene | None = None
    condition: torch.Tensor | None = None
    first_image: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Subject(ABC):
    """A model with its prompts and its VAE.

    Args:
        name: of the model in tables; never a path.
        size: latent (f, h, w).
        tasks: of "t2v" and "i2v".
        negative: unconditional text [tokens, text_dim]; None is all zeros.
    """

    name: str
    model: WanTransformer3DModel
    size: tuple[int, int, int]
    tasks: tuple[str, ...]
    negative: torch.Tensor | None

    @abstractmethod
    def items(self, task: str, prompts: int, seeds: int) -> list[Item]:
        """The first `prompts` prompts with the seeds 0 to `seeds` - 1; all of one seed together.

        Raises:
            ValueError: a task that the model does not do, or more prompts than there are.
        """

    @abstractmethod
    def to_video(self, latents: torch.Tensor) -> np.ndarray:
        """Model latents [b, c, f, h, w] to videos [b, pixel_frames, h, w, 3] in 0..1."""

    def reader(self, item: Item) -> Callable[[np.ndarray], dict[str, bool]] | None:
        """What tells which of a prompt's words a video [f, h, w, 3] shows; None if nothing can."""
        return None

    def model_kwargs(self, item: Item) -> dict[str, torch.Tensor]:
        """Further arguments [1, ...] of the transformer's forward."""
        return {}

    def _check(self, task: str, prompts: int, seeds: int, available: int) -> None:
        if task not in self.tasks:
            raise ValueError(f"task: {self.name} does {' and '.join(self.tasks)}, got {task!r}")
        if not 1 <= prompts <= available:
            raise ValueError(f"prompts: {self.name} has 1 to {available}, got {prompts}")
        if seeds < 1:
            raise ValueError(f"seeds: expected at least 1, got {seeds}")


@dataclass(frozen=True, eq=False)
class ToySubject(Subject):
    """A tiny Wan on held-out scenes of `objects` objects."""

    vae: ToyVAE
    objects: int
    world: World

    def items(self, task: str, prompts: int, seeds: int) -> list[Item]:
        self._check(task, prompts, seeds, MAX_TOY_PROMPTS[self.world.name])
        scenes = self.world.held_out_scenes(prompts, num_objects=self.objects)
        return [
            self._item(task, index, seed, scene)
            for seed in range(seeds)
            for index, scene in enumerate(scenes)
        ]

    def to_video(self, latents: torch.Tensor) -> np.ndarray:
        return self.vae.decode(latents.float().cpu()).permute(0, 2, 3, 4, 1).numpy()

    def reader(self, item: Item) -> Callable[[np.ndarray], dict[str, bool]]:
        return partial(self.world.read_scene, scene=item.scene)

    def _item(self, task: str, index: int, seed: int, scene: Scene) -> Item:
        prompt, first, condition = scene.prompt(), None, None
        if task == "i2v":
            first = self.world.render(scene, np.random.default_rng([index, seed, 5]))[0]
            pixels = torch.from_numpy(first).permute(2, 0, 1)[None]
            condition = image_condition(self.vae, pixels, self.world.pixel_frames)[0]
        return Item(index, seed, prompt, self.world.encode(prompt), scene, condition, first)


@dataclass(frozen=True, eq=False)
class Picture:
    """A first image: pixels [h, w, 3] in 0..1, its Wan condition, and what CLIP sees in it."""

    pixels: np.ndarray
    condition: torch.Tensor
    embedding: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class RealSubject(Subject):
    """Real Wan weights with their own VAE; prompts and images are already encoded.

    Args:
        prompts, text: the prompts and their embeddings [n, 512, text_dim].
        pictures: for image-to-video one per prompt, or one for all.
    """

    vae: AutoencoderKLWan
    prompts: tuple[str, ...]
    text: torch.Tensor
    pictures: tuple[Picture, ...]

    def items(self, task: str, prompts: int, seeds: int) -> list[Item]:
        self._check(task, prompts, seeds, len(self.prompts))
        return [self._item(task, index, seed) for seed in range(seeds) for index in range(prompts)]

    @torch.no_grad()
    def to_video(self, latents: torch.Tensor) -> np.ndarray:
        config = self.vae.config
        shape = (1, config.z_dim, 1, 1, 1)
        std, mean = latents.new_tensor(config.latents_std), latents.new_tensor(config.latents_mean)
        latents = (latents * std.view(shape) + mean.view(shape)).to(self.vae.device, self.vae.dtype)
        # one by one: decoding takes more memory than sampling
        pixels = torch.cat([self.vae.decode(one[None]).sample.cpu() for one in latents])
        return VideoProcessor(config.scale_factor_spatial).postprocess_video(pixels, "np")

    def model_kwargs(self, item: Item) -> dict[str, torch.Tensor]:
        if self.model.config.image_dim is None:
            return {}
        return {"encoder_hidden_states_image": self._picture(item.prompt_index).embedding}

    def _picture(self, index: int) -> Picture:
        return self.pictures[index if len(self.pictures) > 1 else 0]

    def _item(self, task: str, index: int, seed: int) -> Item:
        item = Item(index, seed, self.prompts[index], self.text[index])
        if task == "t2v":
            return item
        picture = self._picture(index)
        return replace(item, condition=picture.condition, first_image=picture.pixels)


def toy_subject(
    objects: int = 1,
    device: torch.device | str = "cpu",
    world: World = FIRST,
    lora: Path | None = None,
) -> Subject:
    """A tiny Wan in fp32, for text- and image-to-video of scenes that it was not trained on.

    Args:
        objects: in every scene, 1 to 3.
        world: whose tiny Wan.
        lora: merged into it; the name in tables is then the LoRA's.
    """
    if not 1 <= objects <= MAX_OBJECTS:
        raise ValueError(f"objects: expected 1 to {MAX_OBJECTS}, got {objects}")
    model = load_original(world.checkpoint)
    if lora is not None:
        merge_lora(model, lora)
    return ToySubject(
        (lora or world.checkpoint).stem,
        model.to(device),
        world.latent_size(),
        ("t2v", "i2v"),
        None,
        vae=world.load_vae(),
        objects=objects,
        world=world,
    )


def read_prompts(path: Path | None) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; None gives `PROMPTS`.

    Raises:
        ValueError: not a readable text file, or one without a prompt.
    """
    if path is None:
        return list(PROMPTS)
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"prompts: expected a UTF-8 text file, one prompt a line: {error}"
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts: {path} has no prompt; write one a line")
    return prompts


def real_subject(
    weights: Path,
    *,
    components: Path | None = None,
    prompts: Sequence[str] = PROMPTS,
    images: Sequence[Path] = (),
    width: int = 832,
    height: int = 480,
    pixel_frames: int = 81,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    negative_prompt: str = "",
) -> Subject:
    """A Wan from local files; nothing is downloaded.

    Wan2.2 TI2V-5B does text-to-video only: for it, all tokens have the same timestep.

    Args:
        weights, components: as for `find_files`.
        images: first images, one per prompt or one for all; for image-to-video models only. They
            are cropped to the video's aspect.
        width, height, pixel_frames: of the video, in pixels.
        dtype: of the transformer and the text encoder; VAE and CLIP are fp32.

    Raises:
        ImportError: a package is missing that diffusers reads pipelines with.
        ValueError: as `find_files`; or prompts, images or a size that the model cannot take.
    """
    missing = [name for name in PIPELINE_PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"real weights need {' and '.join(missing)}, which this environment does not have: "
            f"pip install {' '.join(missing)}"
        )
    files, device = find_files(weights, components), torch.device(device)
    size = files.latent_size(width, height, pixel_frames)
    _check_prompts(files.task, prompts, images)
    opened = [_open_image(path, width, height) for path in images]
    # the largest part first, and gone before the next comes
    *text, negative = _encode_prompts(files, [*prompts, negative_prompt], device, dtype)
    vae = AutoencoderKLWan.from_pretrained(
        files.folder, subfolder="vae", dtype=torch.float32, local_files_only=True
    )
    vae = vae.to(device).eval()
    pictures = _encode_images(files, vae, opened, pixel_frames, dtype) if opened else ()
    return RealSubject(
        files.weights.absolute().name,
        files.load_model(dtype).to(device),
        size,
        (files.task,),
        negative,
        vae=vae,
        prompts=tuple(prompts),
        text=torch.stack(text),
        pictures=pictures,
    )


def _check_prompts(task: str, prompts: Sequence[str], images: Sequence[Path]) -> None:
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("prompts: expected at least one prompt and no empty one")
    if task == "t2v" and images:
        raise ValueError(f"images: this is a text-to-video model, got {len(images)} images")
    if task == "i2v" and len(images) not in {1, len(prompts)}:
        raise ValueError(
            f"images: this is an image-to-video model; expected 1 image or {len(prompts)}, one per "
            f"prompt, got {len(images)}"
        )


@torch.no_grad()
def _encode_prompts(
    files: WanFiles, prompts: Sequence[str], device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Embeddings [512, text_dim] on the CPU; the text encoder is gone when this returns."""
    # None leaves a part unread
    unused = dict.fromkeys(("transformer", "transformer_2", "vae", "scheduler"))
    pipeline = WanPipeline.from_pretrained(
        files.folder, dtype=dtype, local_files_only=True, **unused
    )
    pipeline.text_encoder.to(device)
    text = []
    for prompt in prompts:
        embedding, _ = pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=TEXT_TOKENS,
            device=device,
        )
        text.append(embedding[0].to("cpu", dtype))
    del pipeline
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return text


def _open_image(path: Path, width: int, height: int) -> Image.Image:
    try:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except OSError as error:
        raise ValueError(f"images: {path} is not a readable image: {error}") from error
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


@torch.no_grad()
def _encode_images(
    files: WanFiles,
    vae: AutoencoderKLWan,
    images: list[Image.Image],
    pixel_frames: int,
    dtype: torch.dtype,
) -> tuple[Picture, ...]:
    """What the pipeline makes of first images that have the video's size."""
    unused = ["transformer", "transformer_2", "text_encoder", "tokenizer", "scheduler"]
    unused += [] if files.has_clip else ["image_encoder", "image_processor"]
    pipeline = WanImageToVideoPipeline.from_pretrained(
        files.folder, vae=vae, dtype=torch.float32, local_files_only=True, **dict.fromkeys(unused)
    )
    if files.has_clip:
        pipeline.image_encoder.to(vae.device)
    pictures = []
    for image in images:
        _, condition = pipeline.prepare_latents(
            pipeline.video_processor.preprocess(image).to(vae.device),
            batch_size=1,
            num_channels_latents=vae.config.z_dim,
            height=image.height,
            width=image.width,
            num_frames=pixel_frames,
            dtype=torch.float32,
            device=vae.device,
            # the noise is the sampler's business
            latents=torch.zeros(()),
        )
        embedding = None
        if files.has_clip:
            embedding = pipeline.encode_image(image, vae.device).to("cpu", dtype)
        pixels = np.asarray(image, np.float32) / 255
        pictures.append(Picture(pixels, condition[0].cpu(), embedding))
    return tuple(pictures)
