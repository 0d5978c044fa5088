"""The toy world: a procedural video world with known truth, its VAE and its text embedding.

Torch and numpy only, so that the offline demo, the benchmarks, the training stages and the
ComfyUI demo nodes can all use it.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "tiny_wan.safetensors"
# what was measured about it, and what training made of it
PROFILE = CHECKPOINT.with_name("tiny_wan_profile.safetensors")
STUDENT = CHECKPOINT.with_name("tiny_wan_student.safetensors")
ROUTER = CHECKPOINT.with_name("tiny_wan_router.safetensors")
