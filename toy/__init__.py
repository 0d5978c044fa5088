"""The toy worlds: procedural videos with known truth, their VAEs and their text embedding.

Torch and numpy only, so that the offline demo, the benchmarks, the training stages and the
ComfyUI demo nodes can all use it.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "tiny_wan.safetensors"
CHECKPOINT_2 = CHECKPOINT.with_name("tiny_wan_2.safetensors")
# what was measured about it, and what training made of it
PROFILE = CHECKPOINT.with_name("tiny_wan_profile.safetensors")
STUDENT = CHECKPOINT.with_name("tiny_wan_student.safetensors")
ROUTER = CHECKPOINT.with_name("tiny_wan_router.safetensors")
