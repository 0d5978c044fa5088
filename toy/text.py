"""Toy text embedding: fixed random word vectors plus a vector for the phrase they stand in."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import torch

from .world import parse_prompt

TEXT_DIM = 64
TEXT_TOKENS = 24


def _vector(word: str) -> np.ndarray:
    # standard_normal of this bit generator is stable across platforms and numpy releases
    bits = np.random.Generator(np.random.PCG64(zlib.crc32(word.encode())))
    return bits.standard_normal(TEXT_DIM).astype(np.float32)


def encode_prompt(prompt: str, parse: Callable = parse_prompt) -> torch.Tensor:
    """Embedding [TEXT_TOKENS, TEXT_DIM] of a prompt; the empty prompt is all zeros.

    The phrase vector lets cross-attention tell which colour belongs to which shape.

    Args:
        parse: makes a scene of a prompt, in the grammar of its world.

    Raises:
        ValueError: the prompt is not of the toy grammar.
    """
    embedding = torch.zeros(TEXT_TOKENS, TEXT_DIM)
    if not prompt.strip():
        return embedding
    position = 0
    for slot, phrase in parse(prompt).phrases():
        for word in phrase.split():
            vector = _vector(word) + 0.5 * _vector(slot)
            embedding[position] = torch.from_numpy(vector)
            position += 1
    return embedding
