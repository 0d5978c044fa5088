"""The toy worlds as training data: made as it is asked for, the same for a seed and step."""

from __future__ import annotations

import numpy as np
import torch

from ..toy.batches import draw_sample, encode_samples
from ..toy.worlds import FIRST, World
from .shards import Batch, own_rows


class ToyDataset:
    """Batches of a toy world, with the interface of `ShardDataset`.

    One model does both tasks, so the image condition is always there and zero for text-to-video.
    Scenes that are held out never come up. A sample is drawn by its own generator, so that a
    process makes no sample but its own.

    Args:
        side: of the videos in pixels; None is the world's own.
    """

    def __init__(
        self,
        batch: int,
        seed: int = 0,
        drop_text: float = 0.1,
        image_share: float = 0.3,
        world: World = FIRST,
        side: int | None = None,
    ):
        self.size, self.seed = batch, seed
        self.drop_text, self.image_share = drop_text, image_share
        self.world, self.side, self.vae = world, side, world.load_vae()
        self.fingerprint = "toy" if world is FIRST else f"toy {world.name}"
        self.skipped: dict[str, str] = {}
        self.empty_text = world.encode("")
        self.negative_text = self.empty_text

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """A rank's part of the batch of a step.

        Raises:
            ValueError: the batch cannot be shared out evenly.
        """
        videos, texts, with_image = [], [], []
        for row in own_rows(self.size, rank, world):
            rng = np.random.default_rng([self.seed, step, row])
            video, text = draw_sample(rng, self.drop_text, world=self.world, side=self.side)
            videos.append(video)
            texts.append(text)
            with_image.append(rng.random() < self.image_share)
        latents, condition = encode_samples(self.vae, videos, np.array(with_image))
        return Batch(latents, torch.stack(texts), condition)
