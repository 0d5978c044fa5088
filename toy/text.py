"""Toy text embedding: fixed random word vectors plus a vector for the phrase they stand in."""

from __future__ import annotations

import zlib

import numpy as np
import torch

from .world import parse_prompt

TEXT_DIM = 64
TEXT_TOKENS = 24


def _vector(word: str) -> np.ndarray:
    # standard_normal of this bit generator is stable across platforms and numpy releases
    bits = np.random.Generator(np.random.PCG64(zlib.crc32(word.encode())))
    return bits.standard_normal(TEXT_DIM).astype(np.float32)


def encode_prompt(prompt: str) -> torch.Tensor:
    """Embedding [TEXT_TOKENS, TEXT_DIM] of a prompt; the empty prompt is all zeros.

    The phrase vector lets cross-attention tell which colour belongs to which shape.

    Raises:
        ValueError: the prompt is not of the toy grammar.
    """
    embedding = torch.zeros(TEXT_TOKENS, TEXT_DIM)
    if not prompt.strip():
        return embedding
    scene = parse_prompt(prompt)
    phrases = [obj.phrase() for obj in scene.objects] + [f"on a {scene.background} background"]
    position = 0
    for number, phrase in enumerate(phrases):
        # the background is its own phrase wherever it comes
        slot = "<ground>" if number == len(scene.objects) else f"<phrase {number}>"
        for word in phrase.split():
            vector = _vector(word) + 0.5 * _vector(slot)
            embedding[position] = torch.from_numpy(vector)
            position += 1
    return embedding
