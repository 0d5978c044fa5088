"""WanTrim: makes every denoising step of Wan video models cheaper in ComfyUI."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI's entry; nothing of ComfyUI is imported before it is called.

    Raises:
        TooOld: this ComfyUI lacks what the nodes need. ComfyUI logs it in one line.
    """
    from .hosts.comfyui.version import check_comfyui

    check_comfyui()
    from .nodes import WanTrimExtension

    return WanTrimExtension()
