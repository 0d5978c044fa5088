"""The file of a trained router; `slim/router.py` reads it."""

from __future__ import annotations

from pathlib import Path

from ..profiles.artifact import save_artifact
from ..slim.router import KIND, TrainedRouter


def save_router(path: Path, router: TrainedRouter) -> None:
    """Write it whole or not at all."""
    mlp = router.mlp
    sizes = [mlp.num_blocks, mlp.content_dim, mlp.hidden, mlp.time_dim]
    header = {"content": router.kind, "sizes": sizes}
    if router.conditions is not None:
        header["trained"] = router.conditions.to_json()
    tensors = {name: value.detach().cpu().contiguous() for name, value in mlp.state_dict().items()}
    save_artifact(path, KIND, router.model, header, tensors)
