from wantrim.methods.cost import Width
from wantrim.profiles.fingerprint import Fingerprint


def whole_width(model: Fingerprint) -> Width:
    """The width that keeps everything."""
    heads = (tuple(range(model.num_heads)),) * model.num_blocks
    return Width(heads, heads, (tuple(range(model.ffn_dim)),) * model.num_blocks)
