"""What artists see: V3 schemas and thin execute methods, one file per stage of the flow."""

from comfy_api.latest import ComfyExtension, io

from . import demo, report, tokens


class WanTrimExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*tokens.NODES, *report.NODES, *demo.NODES]
