"""Other packs' own code, run beside ours by hand: what the page of the matrix says about it.

A prompt over HTTP to a real ComfyUI 0.33.0 on the CPU, with the pack at this commit in custom_nodes: a
small Wan, the pack's node, WanTrim (or WanTrim Pair) at 1.5x, sampler, decode, WanTrim Report.
"""

from __future__ import annotations

# repository, commit, node and where it stands, what came
RUNS = (
    ("kijai/ComfyUI-KJNodes", "3f20054", "WanVideoNAG, in front and behind", "as planned"),
    (
        "kijai/ComfyUI-KJNodes", "3f20054", "WanVideoEnhanceAVideoKJ, in front and behind",
        "steps whole or repeated, and the report says why",
    ),
    ("kijai/ComfyUI-KJNodes", "3f20054", "WanChunkFeedForward, in front and behind", "as planned"),
    (
        "kijai/ComfyUI-KJNodes", "3f20054", "SkipLayerGuidanceWanVideo",
        "ends with an error of its own, with WanTrim and without: it needs a node that is gone",
    ),
    ("ClownsharkBatwing/RES4LYF", "022c873", "ClownsharKSampler, euler, res_2m", "as planned"),
    (
        "ClownsharkBatwing/RES4LYF", "022c873", "ClownsharKSampler, res_2s",
        "as planned: two calls a step, which nobody announces, are found out (1.47x); res_3s, res_5s, "
        "ralston_3s and gauss-legendre_2s 1.52x or 1.53x. res_2m calls the model twice at the last of 12 "
        "steps: 1.45x, and said",
    ),
    (
        "ClownsharkBatwing/RES4LYF", "022c873", "two ClownsharKSampler, steps_to_run, WanTrim Pair",
        "1.44x to 1.50x together, wherever the first of 12 steps stops; the report says which announced "
        "steps never came",
    ),
    ("stduhpf/ComfyUI-WanMoeKSampler", "ee8fa8f", "WanMoeKSampler, WanTrim Pair", "as planned"),
    (
        "VraethrDalkr/ComfyUI-TripleKSampler", "b35509c",
        "TripleKSampler (Advanced), WanTrim Pair on the two Lightning models", "as planned",
    ),
    ("city96/ComfyUI-GGUF", "795e451", "Unet Loader (GGUF), Q8_0", "as planned"),
    ("drozbay/ComfyUI-WanVaceAdvanced", "b6f5b22", "WanVacePhantomSimpleV2", "as planned"),
    (
        "Jasonzzt/ComfyUI-CacheDiT", "ab1a144", "WanCacheOptimizer, in front and behind",
        "runs, and the report counts the steps that it answers. It stays on the loaded model when "
        "it is taken off",
    ),
)  # fmt: skip
# this ComfyUI does not load these; they were run with the import that fails replaced by hand
MENDED = (
    (
        "ChenDarYen/ComfyUI-NAG", "ef8a641", "a class of Chroma's that it builds on is gone",
        "KSamplerWithNAG, cfg 1 and 4: runs untrimmed, and the report says that the model was never "
        "called through ComfyUI's hooks",
    ),
    (
        "Zehong-Ma/ComfyUI-MagCache", "47bdd2a", "a function of LTX's that it imports is gone",
        "MagCache, in front and behind: as planned, at 6 steps, where it answered none",
    ),
)  # fmt: skip


def section() -> list[str]:
    """The page's lines about real packs."""
    lines = [
        "## Other packs' own code",
        "",
        "Run once by hand, and not held by a test: a small Wan of random weights or the tiny Wan, the "
        "pack's node, WanTrim at 1.5x and the report, as a prompt to a real ComfyUI 0.33.0 on the CPU. "
        "None of it says anything about speed.",
        "",
        "| pack | commit | node | what came |",
        "|---|---|---|---|",
        *(f"| {pack} | `{commit}` | {node} | {came} |" for pack, commit, node, came in RUNS),
        "",
        "Two are not loaded by this ComfyUI, and were run with the import that fails replaced by hand:",
        "",
        *(f"- {pack} at `{commit}` ({why}). {came}." for pack, commit, why, came in MENDED),
    ]
    return lines
