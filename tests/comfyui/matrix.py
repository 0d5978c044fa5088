"""What WanTrim promises for every kind of Wan and beside every neighbour: data, and its table.

`test_matrix.py` runs each cell and asserts what is said here. Nothing of ComfyUI is needed to read it:
`python -m wantrim.tests.comfyui.matrix` writes the table anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wantrim.tests.comfyui import packs

ROOT = Path(__file__).parents[2]
TABLE, README = ROOT / "docs" / "compatibility.md", ROOT / "README.md"
# what stands between them in README is made here
BEGIN, END = "<!-- matrix -->", "<!-- end of matrix -->"

EXACT = "exact"
SAYS = "says so"
REFUSED = "refused"
MEANING = {
    EXACT: (
        "a plan that trims nothing gives the video of the model (and the neighbour) without WanTrim, "
        "bit for bit; one that trims changes it, and gives the same bytes in both wiring orders"
    ),
    SAYS: (
        "as exact, unless the last column says otherwise, and something did not happen as planned: "
        "the report says what and why"
    ),
    REFUSED: "the node stops with a message that names the model, the reason and what to do",
}

# what is put on a model
TRIMS = {
    "shares": "the default, `WanTrim`",
    "paper": "tokens, `paper`",
    "heads": "heads",
    "blocks": "blocks",
    "all": "tokens, heads, blocks",
}
# what most people have on a model
DEFAULT = "shares"
# those that want more of a block than to leave it out
PARTS_INSIDE = ("shares", "paper", "heads")
INSIDE = (*PARTS_INSIDE, "all")


@dataclass(frozen=True)
class Kind:
    """A row: a kind of Wan model.

    Args:
        cls: the host's class.
        inside: why tokens and heads are refused, in the words of the message, or None.
        blocks: why blocks are, too.
    """

    title: str
    cls: str = "WanModel"
    inside: str | None = None
    blocks: str | None = None

    def takes(self, trim: str) -> bool:
        return (self.blocks if trim == "blocks" else self.inside) is None

    @property
    def trims(self) -> list[str]:
        return [trim for trim in TRIMS if self.takes(trim)]

    @property
    def main(self) -> str:
        """The trim that this kind is run with beside every neighbour."""
        return DEFAULT if self.takes(DEFAULT) else "blocks"


_POSES = "its pose tokens have a layout of their own, not supported yet"
_MOTION = "its audio and motion tokens have a layout of their own, not supported yet"
_CACHE = "it runs with a key/value cache and honours no block hooks"
KINDS = {
    "t2v": Kind("Wan2.1 T2V (and one Wan2.2 A14B T2V expert)"),
    "i2v_clip": Kind("Wan2.1 I2V with CLIP"),
    "i2v": Kind("I2V without CLIP (and one Wan2.2 A14B I2V expert)"),
    "flf2v": Kind("Wan2.1 FLF2V, first and last frame"),
    "fun_control": Kind("Wan2.1 Fun Control"),
    "fun_inpaint": Kind("Wan2.1 Fun Inpaint"),
    "fun_camera": Kind("Wan2.1 Fun Camera", "CameraWanModel"),
    "vace": Kind("VACE", "VaceWanModel"),
    "phantom": Kind("Phantom, two subjects"),
    "context": Kind("context latents (Bernini)"),
    "pair": Kind("Wan2.2 A14B, both experts in turn"),
    "ti2v": Kind("Wan2.2 TI2V-5B, a timestep per latent frame"),
    "fun22_control": Kind("Wan2.2 Fun Control, reference in front of the video"),
    "fun22_camera": Kind("Wan2.2 Fun Camera", "CameraWanModel"),
    "s2v": Kind("Wan2.2 S2V", "WanModel_S2V", _MOTION),
    "humo": Kind(
        "HuMo",
        "HumoWanModel",
        "its audio attention inside the block needs every token of a latent frame",
    ),
    "animate": Kind(
        "Wan2.2 Animate",
        "AnimateWanModel",
        "its face adapter between the blocks is not tested with left out tokens yet",
    ),
    "scail": Kind("SCAIL", "SCAILWanModel", _POSES),
    "scail2": Kind("SCAIL-2", "SCAIL2WanModel", _POSES),
    "wandancer": Kind(
        "WanDancer",
        "WanDancerModel",
        "its music injector between the blocks is not tested with left out tokens yet",
    ),
    "animate2": Kind(
        "Wan-Animate 2",
        "WanAnimate2Model",
        "its blocks attend per latent frame and need every token",
        "each of its blocks also runs the pose, which cannot be skipped",
    ),
    "causal": Kind("causal, autoregressive", "CausalWanModel", _CACHE, _CACHE),
}
# rows whose every cell is run with each trim; the others with one
DEEP = ("t2v", "i2v")


@dataclass(frozen=True)
class Neighbour:
    """A column: another node or a way to load the model.

    Args:
        says: a part of what the report says, where it has to; then of the trims in `about`.
        changes: it alone makes another video.
        order_matters: both orders work, and may make different videos.
        lost: of all together these do not happen; of the trims that are no more than that, nothing,
            but that the default has whole and repeated steps left.
        answers: it gives the answers of some steps itself: those may be all that the default trims.
        steps: as many as it takes to see it act, where that is more than a few.
    """

    title: str
    note: str
    says: str | None = None
    about: tuple[str, ...] = tuple(TRIMS)
    lost: tuple[str, ...] = ()
    changes: bool = True
    order_matters: bool = False
    answers: bool = False
    steps: int | None = None

    def outcome(self, trim: str) -> str:
        return SAYS if self.says is not None and trim in self.about else EXACT


# held by tests/comfyui/test_compiled.py
COMPILE = (
    "- Whole and repeated steps, and plans that trim nothing: the compiled model as it is; nothing is "
    "traced anew.",
    "- Other steps: the model's blocks, compiled as the compile node was set, at most two graphs more "
    "in a run: one for all lengths of computed tokens, one for whole blocks whose attention is looked "
    "into. Prompts of two lengths, which come in a call each, may make both once more; ComfyUI brings "
    "all up to 512 text tokens to one length. No graph break: what the attention does is looked up when "
    "it runs.",
    "- Compiled for these steps are the blocks alone; embeddings and head run as written.",
    "- Behind another node's wrapper around the model, whole steps run block by block too: that "
    "wrapper ran already, and may be in the model's own graph.",
    "- Not compiled, and said: with the backend `cudagraphs`, steps that leave something out; blocks "
    "compiled one by one, where another node's code cannot be part of one graph.",
    "- CUDA graphs of inductor's modes are left out in those blocks: they would replay an attention "
    "call as it was recorded.",
    "- A run that WanTrim Profile records is not compiled: the compiler would leave out what it sees.",
    "- In diffusers (demo, training, bench) blocks that are compiled (`compile_repeated_blocks`) stay "
    "so: beside the graph of whole steps one for whole blocks whose attention is looked into, and one "
    "or two for all numbers of computed tokens. A whole model that is compiled gives the right videos, in "
    "many small graphs: compile its blocks.",
    "- Core's compile node turns dynamic VRAM off.",
)

# held by tests/comfyui/test_dynamic.py
DYNAMIC = (
    "ComfyUI's own patcher for it, on the CPU, with stand-ins for the GPU and for its native library "
    "(`tests/comfyui/dynamic.py`): a weight is out of reach but to its layer's own forward, which may "
    "find no room for it, and is overwritten after; other models' loads take all of them between two "
    "calls. Every trim, a trained router, a LoRA, both experts, WanTrim Profile with its calibration and "
    "a slim model give the bytes that they give with all weights at hand.",
    "",
    "Not run: a GPU, and so copies beside the computing and pinned memory. Keys and values of left out "
    "tokens may take the room of weights, which ComfyUI counts as free; these then come anew in every "
    "step.",
)

# files of Comfy-Org/ComfyUI of about 0.38.1, which cannot be fetched whole
NEWER = (
    "Read in single files of about 0.38.1, and not run: Wan's hooks are those of 0.33.0, and its "
    "attention calls come unwrapped to an override. *Model Sparse Attention* (`BlockSparseAttention`) "
    "puts its own override over what is there, again in every step; it leaves to that one what has "
    "fewer tokens than its `min_tokens`, as short steps may, and queries that are fewer than the keys. "
    "An attention that a checkpoint names for its layers (`comfy_attention`) is left out by ComfyUI "
    "where an override is set, so also in blocks whose attention WanTrim looks into.",
)

NEIGHBOURS = {
    "lora": Neighbour(
        "LoRA", "Load LoRA patches weights; modules are called, so it applies fully."
    ),
    "lora_bypass": Neighbour(
        "LoRA (bypass)",
        "Load LoRA (Bypass) adds to what a module gives; it sees the computed tokens.",
    ),
    "easycache": Neighbour(
        "EasyCache",
        "The steps that it answers run no block. Wired behind WanTrim, the report counts and names "
        "them; in front, it never hears of them, so that the two orders may choose other tokens.",
        says="another node's cache",
        order_matters=True,
        answers=True,
        steps=6,
    ),
    "lazycache": Neighbour(
        "LazyCache",
        "The steps that it answers never reach WanTrim; the default counts and names them.",
        says="another node's cache",
        about=(DEFAULT,),
        answers=True,
        steps=6,
    ),
    "slg": Neighbour("Skip Layer Guidance", "Its extra pass goes by the same choice of the step."),
    "slg_simple": Neighbour("Skip Layer Guidance (simple)", "As above, without the extra pass."),
    "nag": Neighbour(
        "NAGuidance (core)",
        "ComfyUI's Wan never calls the patch that it sets: it does nothing, with or without WanTrim.",
        changes=False,
    ),
    "nag_cross": Neighbour(
        "NAG on cross-attention",
        "A forward of its own in cross-attention, as KJNodes' node has it.",
    ),
    "chunked": Neighbour(
        "chunked feed-forward",
        "A forward of its own in the feed-forward part, as KJNodes' node.",
        changes=False,
    ),
    "enhanced": Neighbour(
        "Enhance-A-Video",
        "A forward of its own in self-attention may reshape the tokens into latent frames: no "
        "token is left out and no head trimmed; steps are repeated and blocks skipped.",
        says="self-attention of its own",
        about=INSIDE,
        lost=PARTS_INSIDE,
    ),
    "attention": Neighbour(
        "InfiniteTalk, MultiTalk",
        "They patch what self-attention gives and expect every token: as above.",
        says="attn1_patch",
        about=INSIDE,
        lost=PARTS_INSIDE,
    ),
    "sage": Neighbour(
        "SageAttention-like override", "An attention override; it is called inside of WanTrim's."
    ),
    "sparse": Neighbour(
        "block-sparse override",
        "Over what is there, again in every step, as core's newer Model Sparse Attention; its blocks are "
        "of the computed tokens. Where these attend to remembered ones too, its rule that queries and "
        "keys are as many leaves attention whole.",
    ),
    "backend": Neighbour(
        "Model Attention Backend (core)", "The function that it sets is called inside of WanTrim's."
    ),
    "compiled": Neighbour(
        "torch.compile, whole model",
        "Whole steps run its graphs as they are; in other steps each block is one graph, with its "
        "attention decided outside. The backend `cudagraphs` is left out there, and said.",
        changes=False,
    ),
    "compiled_blocks": Neighbour(
        "torch.compile, per block",
        "As above. A block that PyTorch cannot make one graph of runs uncompiled where something is "
        "left out, and the report says so.",
        changes=False,
    ),
    "windows": Neighbour("context windows", "Every window has its own choice and its own memory."),
    "shift": Neighbour("ModelSamplingSD3", "Schedules follow the shift that the sampler uses."),
    "block": Neighbour(
        "another pack's block replacement",
        "It is called inside of WanTrim's, on the computed tokens.",
    ),
    "residual": Neighbour(
        "ControlNet-like residual (Uni3C)", "Between the blocks the video always has full length."
    ),
    "fp8": Neighbour("fp8 weights", "`fp8_e4m3fn` of Load Diffusion Model, cast for each use."),
    "gguf": Neighbour(
        "GGUF-like weights", "A loader's own operations make the weights whole in every forward."
    ),
    "int8": Neighbour(
        "int8 weights",
        "ComfyUI's own layers and arithmetic; each computed token is quantised by its own largest.",
    ),
    "nvfp4": Neighbour(
        "NVFP4 weights",
        "ComfyUI's own layers, their product made whole: a CPU has none. What is quantised is scaled "
        "by the largest of the computed tokens.",
    ),
    "low_vram": Neighbour(
        "partial load, with a LoRA", "Weights stay in system memory and are moved for each use."
    ),
    "gpus": Neighbour(
        "MultiGPU CFG Split",
        "The prompts of a step run apart and could not share a choice: everything is computed. Run "
        "with two CPU devices in place of two GPUs.",
        says="several GPUs",
        lost=tuple(TRIMS),
        changes=False,
    ),
}


def cells() -> list[tuple[str, str]]:
    """Kind and neighbour of every cell that is run."""
    return [(kind, other) for kind in KINDS for other in NEIGHBOURS if KINDS[kind].trims]


def outcome(kind: str, other: str, trim: str | None = None) -> str:
    """What a cell promises; without a trim, for the one that the kind is run with."""
    if not KINDS[kind].trims:
        return REFUSED
    return NEIGHBOURS[other].outcome(trim or KINDS[kind].main)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(cells: list[str]) -> list[str]:
    return [_row(cells), "|" + "---|" * len(cells)]


def _told(kind: Kind) -> list[str]:
    return [EXACT if kind.takes(trim) else REFUSED for trim in TRIMS]


def _kinds() -> list[str]:
    lines = _head(["model", "class in ComfyUI", *TRIMS.values(), "why refused"])
    for kind in KINDS.values():
        told = _told(kind)
        # each reason once, in the words of the message
        why = dict.fromkeys(filter(None, (kind.inside, kind.blocks)))
        lines.append(_row([kind.title, f"`{kind.cls}`", *told, "; ".join(why)]))
    return lines


def _neighbours() -> list[str]:
    lines = _head(["neighbour", *TRIMS.values(), "how"])
    for other in NEIGHBOURS.values():
        told = [other.outcome(trim) for trim in TRIMS]
        lines.append(_row([other.title, *told, other.note]))
    return lines


def _both() -> list[str]:
    titles = [kind.title.partition(" (and ")[0] for kind in KINDS.values()]
    lines = _head(["neighbour", *titles])
    for name, other in NEIGHBOURS.items():
        lines.append(_row([other.title, *(outcome(kind, name) for kind in KINDS)]))
    return lines


def summary() -> str:
    """The page in a few sentences."""
    taken = [kind.trims for kind in KINDS.values()]
    says = [o for o in NEIGHBOURS.values() if SAYS in map(o.outcome, TRIMS)]
    inside = [other.title for other in says if other.lost == PARTS_INSIDE]
    whole = [other.title for other in says if other.lost == tuple(TRIMS)]
    return (
        f"Of {len(KINDS)} kinds of Wan, {taken.count(list(TRIMS))} take every trim, "
        f"{taken.count(['blocks'])} take skipped blocks alone, and {taken.count([])} are refused "
        f"with a reason. Of {len(NEIGHBOURS)} neighbours, {len(NEIGHBOURS) - len(says)} work beside "
        f"all trims without a remark; the report has one for the other {len(says)}. Tokens and heads "
        f"are left whole beside {'; '.join(inside)}: there the default has whole and repeated steps. "
        f"Nothing is trimmed beside {'; '.join(whole)}."
    )


def embedded() -> str:
    """What the suite ends with: models and neighbours, without the reasons."""
    kinds = _head(["model", *TRIMS.values()])
    kinds += [_row([k.title, *_told(k)]) for k in KINDS.values()]
    others = _head(["neighbour", *TRIMS.values()])
    others += [_row([o.title, *(o.outcome(t) for t in TRIMS)]) for o in NEIGHBOURS.values()]
    return "\n".join([summary(), "", *kinds, "", *others])


def fill(text: str) -> str:
    """A page with what stands between its marks made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{summary()}\n{END}{after}"


def table() -> str:
    """The page of the matrix."""
    count = sum(len(TRIMS) if kind in DEEP else 1 for kind, _ in cells())
    legend = [f"- **{word}**: {text}." for word, text in MEANING.items()]
    deep = " and ".join(KINDS[kind].title.partition(" (and ")[0] for kind in DEEP)
    lines = [
        "# What works with what",
        "",
        "Made by `python -m wantrim.tests.comfyui.matrix` from the promises that "
        "`tests/comfyui/test_matrix.py` holds on small random models of each kind, in a real ComfyUI "
        f"0.33.0 on the CPU: {len(cells())} pairs of a model and a neighbour, {count} with the trims "
        "counted. No GPU, no real weights; other packs' own code at the end only.",
        "",
        summary(),
        "",
        *legend,
        "",
        "## Models",
        "",
        *_kinds(),
        "",
        "## Neighbours",
        "",
        f"On {deep}, each trim by itself and all together, WanTrim in front and behind.",
        "",
        *_neighbours(),
        "",
        "## torch.compile",
        "",
        *COMPILE,
        "",
        "## Dynamic VRAM",
        "",
        *DYNAMIC,
        "",
        "## Newer than 0.33.0",
        "",
        *NEWER,
        "",
        "## Every model beside every neighbour",
        "",
        "With the default, or with skipped blocks where no more is taken, WanTrim in front and behind; "
        "beside torch.compile in front.",
        "",
        *_both(),
        "",
        *packs.section(),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table(), "utf-8")
    README.write_text(fill(README.read_text("utf-8")), "utf-8")
