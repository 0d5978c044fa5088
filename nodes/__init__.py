"""What artists see: V3 schemas and thin execute methods, one file per node family."""

from comfy_api.latest import ComfyExtension, io

from . import blocks, compare, demo, heads, profile, report, slim, tokens, tuned, wantrim


class WanTrimExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        stages = (wantrim, tokens, heads, blocks, profile, slim, report, compare, tuned, demo)
        return [node for stage in stages for node in stage.NODES]
