"""The only code that knows a host: `comfyui` (the product) and `diffusers` (demo, tests, training)."""
