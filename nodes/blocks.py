"""The node that skips blocks per step and content (PARE, arXiv 2605.27336, section 3.3)."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from comfy_api.latest import io

from ..engine.plan import TrimPlan
from ..engine.program import SKIP, expected_programs
from ..hosts.comfyui.attach import attach_part
from ..hosts.comfyui.profiling import fingerprint_of
from ..hosts.comfyui.variants import SKIP_BLOCKS, check_variant
from ..methods.depth import SHAPES, BlockBudget, BlockPlan
from ..methods.grid import TokenGrid
from ..methods.routers import FixedRouter, Router
from ..slim.router import TrainedRouter, load_router
from . import inputs
from .files import add_folder, find_file, list_files
from .inputs import model_input, percent_inputs, planned_output, text_output

NAME = "WanTrim Blocks"
FOLDER = "wantrim_routers"
ROUTERS = ("trained", "fixed")
# what the inputs have at first; with a trained router it means "as that was trained"
USUAL = {"k_min": 0.5, "k_max": 0.875, "curve": "falling"}
# words of the plan -> words of the node, where they differ
WORDS = {"shape": "curve", "start and end": "start_percent and end_percent"}

add_folder(FOLDER, "routers")


class WanTrimBlocks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanTrimBlocks",
            display_name=NAME,
            category="model/patch/wan",
            description=(
                "Makes each sampling step of a Wan model cheaper by running only a part of its "
                "blocks (PARE's depth, arXiv 2605.27336). Made for students that were trained for "
                "it: a model as it is loses much. Works with LoRAs, WanTrim Tokens and Heads. Place it after the LoRA and before "
                "ModelSamplingSD3, one per expert on Wan 2.2. The video will change; k_min and k_max "
                "1 change nothing at all."
            ),
            search_aliases=["PARE", "skip blocks", "layer skipping", "depth pruning", "wan speed"],
            # else ComfyUI takes equal nodes for one, and the live map is drawn on the other
            not_idempotent=True,
            inputs=[
                model_input(),
                io.DynamicCombo.Input(
                    "router",
                    options=[
                        io.DynamicCombo.Option("trained", [_file_input()]),
                        io.DynamicCombo.Option("fixed", [_BLOCKS_INPUT]),
                    ],
                    tooltip=(
                        "Who says which blocks matter. 'trained': a router file, the paper's way. "
                        "'fixed': your own list, at any k_min below 1."
                    ),
                ),
                _share("k_min", USUAL["k_min"], "where fewest blocks run. Paper: 0.5 (20 of 40)"),
                _share("k_max", USUAL["k_max"], "where most blocks run. Paper: 0.875 (35 of 40)"),
                inputs.choice(
                    "curve",
                    SHAPES,
                    "How the number of blocks moves with the noise. 'falling': most at high "
                    "noise, fewest at the end (paper). 'rising': the other way round. 'constant': "
                    "the mean of k_min and k_max in every step.",
                ),
                *percent_inputs("skipping"),
            ],
            outputs=[planned_output(), text_output("How many blocks run at which noise level.")],
        )

    @classmethod
    def fingerprint_inputs(cls, router: dict | str | None = None, **inputs) -> str:
        """Load a router file again when it was written again."""
        name = router.get("router_file") if isinstance(router, dict) else None
        path = find_file(FOLDER, name)
        return "" if path is None else f"{path} {path.stat().st_mtime_ns}"

    @classmethod
    def execute(
        cls,
        model,
        k_min: float,
        k_max: float,
        curve: str,
        start_percent: float,
        end_percent: float,
        router: dict | str | None = None,
    ) -> io.NodeOutput:
        check_variant(model, NAME, SKIP_BLOCKS)
        network = model.model.diffusion_model
        try:
            chosen = _router(model, router)
            chosen.check(len(network.blocks))
            given, remarks = {"k_min": k_min, "k_max": k_max, "curve": curve}, []
            conditions = getattr(chosen, "conditions", None)
            if conditions is not None:
                # a trained router's own, where nobody set another
                given, overridden = conditions.settle(given, USUAL)
                remarks = [conditions.describe(), *map(_shown, overridden)]
            plan = BlockPlan(
                chosen, BlockBudget(*given.values()), start=start_percent, end=end_percent
            )
            text = "\n".join([_text(plan, len(network.blocks)), *remarks])
        except ValueError as error:
            raise ValueError(f"{NAME}: {_shown(str(error))}") from error
        return io.NodeOutput(attach_part(model, blocks=plan), text, ui={"text": (text,)})


def parse_blocks(text: str, num_blocks: int) -> tuple[int, ...]:
    """Blocks of a list such as "12, 15-18", ascending."""
    expected = f"expected blocks from 1 to {num_blocks - 2} such as '12, 15-18', got"
    found: set[int] = set()
    for part in filter(None, re.split(r"[\s,;]+", re.sub(r"\s*-\s*", "-", text.strip()))):
        span = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
        if span is None:
            raise ValueError(f"blocks: {expected} {part!r:.60}")
        first, last = int(span[1]), int(span[2] or span[1])
        if not 1 <= first <= last <= num_blocks - 2:
            raise ValueError(
                f"blocks: {expected} {part!r}. This model has the blocks 0 to {num_blocks - 1}; the "
                "first and the last always run"
            )
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def _router(model, choice: dict | str | None) -> Router:
    # ComfyUI hands over the choice with its inputs, a linked one bare, and an unknown one not at all
    given = choice if isinstance(choice, dict) else {"router": choice}
    name = given["router"]
    if name not in ROUTERS:
        raise ValueError(
            f"router: expected one of {', '.join(ROUTERS)}, got {name or 'none of them'}. Choose one "
            "at the node: the workflow may be from another version of WanTrim"
        )
    needed = {"fixed": "blocks", "trained": "router_file"}[name]
    if given.get(needed) is None:
        raise ValueError(
            f"router: '{name}' needs the input '{needed}' and cannot be linked. Choose it at the "
            "node. Router files belong into models/wantrim/routers"
        )
    if name == "fixed":
        return FixedRouter(parse_blocks(given["blocks"], len(model.model.diffusion_model.blocks)))
    return _trained(model, given["router_file"])


def _trained(model, filename: str) -> TrainedRouter:
    path = find_file(FOLDER, filename)
    if path is None:
        raise ValueError(
            f"router_file: there is no router {filename!r:.100} in models/wantrim/routers. Choose "
            "one of the list, or another router"
        )
    router = _load(path, path.stat().st_mtime_ns)
    network = model.model.diffusion_model
    reason = fingerprint_of(model).differs(router.model)
    if reason is not None:
        raise ValueError(
            f"router_file: {filename} was trained for another model than the one at 'model': "
            f"{reason}. Choose the router that belongs to this model"
        )
    if router.kind == "clip" and getattr(network, "img_emb", None) is None:
        raise ValueError(
            f"router_file: {filename} looks at the start image through CLIP, and this model takes "
            "none. Choose another router"
        )
    return router


@lru_cache(maxsize=2)
def _load(path: Path, written: int) -> TrainedRouter:
    """Read once until the file is written again."""
    return load_router(path)


def _text(plan: BlockPlan, num_blocks: int) -> str:
    if plan.neutral:
        return f"Nothing is skipped: all {num_blocks} blocks run in every step."
    levels, everywhere = (100, 75, 50, 25, 0), replace(plan, start=0.0, end=1.0)
    programs = expected_programs(
        TrimPlan(blocks=everywhere), [n / 100 for n in levels], 1.0, TokenGrid(1, 1, 1), num_blocks
    )
    ran = [sum(row.run != SKIP for row in program.rows) for program in programs]
    counts = dict(zip(levels, ran, strict=True))
    if len(set(counts.values())) == 1:
        text = f"{counts[100]} of {num_blocks} blocks run"
    else:
        each = ", ".join(f"{count} at {level}%" for level, count in counts.items())
        text = f"Blocks that run, of {num_blocks}, by the noise that is left: {each}"
    if (plan.start, plan.end) == (0.0, 1.0):
        return f"{text}."
    return f"{text}; all of them before {plan.start:.0%} and after {plan.end:.0%} of the run."


def _shown(message: str) -> str:
    """A message about a plan in the words of the node's inputs."""
    for word, shown in WORDS.items():
        message = re.sub(rf"\b{re.escape(word)}", shown, message)
    return message.removeprefix(f"{NAME}: ")


_BLOCKS_INPUT = io.String.Input(
    "blocks",
    default="",
    tooltip=(
        "Blocks that never run, such as '12, 15-18', counted from 0. The first and the last cannot "
        "be skipped. Empty is off."
    ),
)


def _file_input():
    tip = (
        "A file in models/wantrim/routers, trained for this model, or the demo's. k_min, k_max and "
        "curve are the router's own where they are left at their defaults."
    )
    return io.Combo.Input("router_file", options=list_files(FOLDER), tooltip=tip)


def _share(name: str, default: float, what: str):
    return inputs.number(
        name,
        default,
        (0.05, 1.0, 0.005),
        f"Share of the blocks that run {what}. 1 at both is off and bit-exact.",
        slider=True,
        round=0.001,
    )


NODES = [WanTrimBlocks]
