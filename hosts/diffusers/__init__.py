"""WanTrim on diffusers' WanTransformer3DModel."""
