"""WanTrim in ComfyUI: only through patches_replace, keyed wrappers and a chained attention override."""
