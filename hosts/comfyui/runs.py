"""Which sampling runs made the images that a report is given.

A run is known by the prompt and the node that it ran in, and by all that stood before that node: a
sampler that ComfyUI did not run again, because nothing before it changed, still made its images. A
trial, which samples one MODEL after another, knows a run by what it is made of (`sampling_key`).
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field

import torch

from comfy_execution.utils import get_executing_context

from ...engine.record import Record
from ...solve.dial import Run, Solved


@dataclass(frozen=True)
class Where:
    """The node that ran a sampler.

    Args:
        prompt, node: their ids.
        place: in a list of inputs that the node was run for, one by one; None without one.
        before: hash of all that stood before the node in the prompt, or None where that is not known.
    """

    prompt: str
    node: str
    place: int | None = None
    before: str | None = None

    @classmethod
    def now(cls) -> Where | None:
        """The node that ComfyUI executes, or None."""
        context = get_executing_context()
        if context is None:
            return None
        graph = _running_prompt(context.prompt_id)
        before = None if graph is None else before_node(graph, context.node_id)
        return cls(context.prompt_id, context.node_id, context.list_index, before)


@dataclass
class Ran:
    """A run of a MODEL, as far as a report needs it.

    Args:
        where: None when no node ran it.
        calls: sizes of the first step's model calls.
        unmeasurable: why those are not known.
        solved: what a dial decided, if there is one; `came` is what ran by it in the end.
        expert: of a pair, that the MODEL is.
    """

    record: Record
    where: Where | None = None
    calls: list[dict] = field(default_factory=list)
    unmeasurable: str | None = None
    solved: Solved | None = None
    came: Run | None = None
    expert: str | None = None


def keep_run(runs: list[Ran], new: Ran) -> None:
    """Add a run; those that the same node made in an earlier prompt go."""

    def replaced(old: Ran) -> bool:
        if old.where is None or new.where is None:
            return old.expert == new.expert
        return old.where.node == new.where.node and old.where.prompt != new.where.prompt

    runs[:] = [*(old for old in runs if not replaced(old)), new]


class Upstream:
    """Some nodes and all before them.

    Args:
        graph: of the prompt that they are in.
        prompt: its id.
        place: in a list of inputs that the executing node runs for, or None.
    """

    def __init__(self, graph: _Nodes, nodes: list[str], prompt: str | None, place: int | None):
        self._graph, self._prompt, self._place = graph, prompt, place
        self._nodes = graph.before(nodes)

    def find(self, runs: list[Ran]) -> list[Ran]:
        """The runs that were made here, in order."""
        found = [ran for ran in runs if ran.where is not None and self._made_by(ran.where)]
        # a sampler that was run for a list of latents, and a report for the list of their images
        mine = [ran for ran in found if ran.where.place in (None, self._place)]
        return found if self._place is None or not mine else mine

    def _made_by(self, where: Where) -> bool:
        node = where.node
        if where.prompt == self._prompt:
            return node in self._nodes or self._graph.shown(node) in self._nodes
        if node not in self._nodes or where.before is None:
            return False
        return self._graph.hash_before(node) == where.before


class ImagesOf(Upstream):
    """The nodes that an input of the executing node comes of.

    Args:
        dynprompt: ComfyUI's prompt with the nodes that other nodes put in while it runs.
        node: id of the executing node.
        name: of its input.
    """

    def __init__(self, dynprompt, node: str, name: str):
        graph, context = _Nodes(dynprompt), get_executing_context()
        link = graph.inputs(node).get(name)
        prompt, place = (None, None) if context is None else (context.prompt_id, context.list_index)
        super().__init__(graph, [link[0]] if _is_link(link) else [], prompt, place)


def runs_before(runs: list[Ran], here: Where | None) -> list[Ran]:
    """Those that stand before a node that samples, or ran in it, in order."""
    graph = None if here is None else _running_prompt(here.prompt)
    if graph is None or here.node not in graph:
        # no server, or a node that another one put in
        prompt = None if here is None else here.prompt
        return [ran for ran in runs if getattr(ran.where, "prompt", None) == prompt]
    return Upstream(_Nodes(graph), [here.node], here.prompt, here.place).find(runs)


class _Nodes:
    """A prompt's graph: dict of nodes, or ComfyUI's own object for it."""

    def __init__(self, prompt):
        self._prompt = prompt

    def node(self, node: str) -> dict:
        if isinstance(self._prompt, dict):
            return self._prompt.get(node, {})
        return self._prompt.get_node(node) if self._prompt.has_node(node) else {}

    def inputs(self, node: str) -> dict:
        return self.node(node).get("inputs", {})

    def shown(self, node: str) -> str:
        """The node of the artist's graph that put this one in."""
        return node if isinstance(self._prompt, dict) else self._prompt.get_display_node_id(node)

    def before(self, nodes: list[str]) -> set[str]:
        """These nodes and all before them."""
        found, waiting = set(), list(nodes)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                links = filter(_is_link, self.inputs(node).values())
                waiting += [link[0] for link in links]
        return found

    def hash_before(self, node: str) -> str:
        nodes = {name: self.node(name) for name in sorted(self.before([node]))}
        told = [(name, one.get("class_type"), one.get("inputs")) for name, one in nodes.items()]
        text = json.dumps(told, sort_keys=True, default=repr)
        return hashlib.sha256(text.encode()).hexdigest()


def before_node(prompt: dict, node: str) -> str | None:
    """Hash of a node and all before it in a prompt in API form; None when it is not in there."""
    return _Nodes(prompt).hash_before(node) if node in prompt else None


def _is_link(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _running_prompt(number: str) -> dict | None:
    """The prompt that ComfyUI's server runs, in API form, if there is a server."""
    item = _running_item(number)
    return item[2] if item and isinstance(item[2], dict) else None


def running_workflow(number: str | None) -> str | None:
    """Id of the page's workflow that a prompt was made of, or None."""
    known = (_running_item(number) or ())[3:4]
    for name in ("extra_pnginfo", "workflow", "id"):
        known = [one[name] for one in known if isinstance(one, dict) and name in one]
    return known[0] if known and isinstance(known[0], str) else None


def _running_item(number: str | None) -> tuple | None:
    """A prompt as it stands in the queue of ComfyUI's server, if it runs there."""
    # importing its module would start half of one
    module = sys.modules.get("server")
    server = getattr(getattr(module, "PromptServer", None), "instance", None)
    queue = getattr(server, "prompt_queue", None)
    if queue is None:
        return None
    running = getattr(queue, "currently_running", None) or {}
    # (priority, id, prompt, extra data, ...)
    items = [item for item in running.values() if len(item) > 2 and item[1] == number]
    return items[0] if items else None


def sampler_name(sampler) -> str:
    """Of a stock sampler, such as "euler"; empty for others."""
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
    return name.removeprefix("sample_")


def sampling_key(guider, given: dict) -> str:
    """What a sampling is made of besides the MODEL: noise, latent, steps, sampler, prompts."""
    sampler = given.get("sampler")
    parts = [given.get(name) for name in ("noise", "latent_image", "sigmas", "denoise_mask")]
    parts += [given.get("seed"), type(guider).__name__, _plain(guider)]
    parts += [type(sampler).__name__, _plain(sampler), sampler_name(sampler)]
    parts += [getattr(sampler, "extra_options", None)]
    parts += [getattr(guider, "original_conds", None)]
    found = hashlib.blake2b(digest_size=16)
    _digest(parts, found)
    return found.hexdigest()


def _plain(of) -> dict:
    """What an object keeps of numbers and words: a guider its guidance, by whatever name."""
    found = getattr(of, "__dict__", {})
    return {name: one for name, one in found.items() if isinstance(one, str | int | float | bool)}


def _digest(value, into) -> None:
    if isinstance(value, torch.Tensor):
        into.update(f"{value.dtype}{tuple(value.shape)}".encode())
        plain = value.detach().cpu().contiguous().flatten()
        into.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    elif isinstance(value, dict):
        for name in sorted(value, key=str):
            # new in every run
            if name != "uuid":
                into.update(str(name).encode())
                _digest(value[name], into)
    elif isinstance(value, list | tuple):
        into.update(b"[")
        for one in value:
            _digest(one, into)
        into.update(b"]")
    elif value is None or isinstance(value, str | int | float | bool):
        into.update(repr(value).encode())
    else:
        # a control net, a hook: the same object or another
        into.update(str(id(value)).encode())
