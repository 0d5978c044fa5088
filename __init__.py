"""WanTrim: makes every denoising step of Wan video models cheaper in ComfyUI."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI's entry; nothing of ComfyUI is imported before it is called."""
    from .nodes import WanTrimExtension

    return WanTrimExtension()
