"""Tells the page what each step did, for the map that it draws on WanTrim's nodes.

Only the page that queued the run is told, and only while one is there; nothing waits for it.
"""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict

from comfy_execution.utils import get_executing_context

from ...engine.program import expected_programs
from ...engine.record import Record, Step, join_records
from ...methods.shares import place_of
from ...report.figures import step_work
from ...report.line import Outcome, outcome, planned
from .runs import running_workflow

log = logging.getLogger(__name__)

EVENT = "wantrim.step"


def running_node() -> str | None:
    """Id of the node that ComfyUI executes now, or None."""
    context = get_executing_context()
    return None if context is None else context.node_id


def running_prompt() -> str | None:
    """Id of the queue entry that ComfyUI executes now, or None."""
    context = get_executing_context()
    return None if context is None else context.prompt_id


def tell_node(node: str | None, text: str) -> None:
    """Show a line on a node of the page that queued the run, if there is one."""
    server = _server()
    send = getattr(server, "send_progress_text", None)
    if node is None or send is None or server.client_id is None:
        return
    try:
        send(text, node, server.client_id)
    except Exception:
        # a page that cannot be told must not cost the run
        log.warning("WanTrim: the page could not be told", exc_info=True)


class Live:
    """One sampling run as the page sees it.

    Args:
        nodes: ids of the nodes that put the plan on the model.
        sigmas: of the sampler's schedule, the last one being where it ends.
        shift: the model's flow shift.
    """

    def __init__(self, record: Record, nodes: tuple[str, ...], sigmas: list[float], shift: float):
        self.record, self.nodes, self.shift = record, nodes, shift
        self._starts = sigmas[:-1]
        self._about = {
            "nodes": list(nodes),
            "run": uuid.uuid4().hex,
            "prompt": running_prompt(),
            "workflow": running_workflow(running_prompt()),
            "steps": len(self._starts),
        }

    def step(self, step: Step) -> None:
        """A step is done."""
        try:
            self._step(step)
        except Exception:
            # a page that cannot be told must not cost the run
            log.warning("WanTrim: the page could not be told of a step", exc_info=True)

    def _step(self, step: Step) -> None:
        if self._page() is None:
            return
        work = step_work(self.record, step)
        self._send(
            step=place_of(self._starts, step.sigma) + 1,
            # percent per block: 0 did not run, 100 ran on everything
            kept=[_percent(kept, step.grid.tokens) for kept in step.tokens_per_block],
            patterned=step.patterned,
            work=step.kept_share if work is None else work,
            **_said(self._outlook(step)),
        )

    def _outlook(self, step: Step) -> Outcome:
        """What the run will come to where a dial decided it, else what it came to so far."""
        record, sizes = self.record, (self.shift, step.grid, step.num_blocks)
        if record.expected is None:
            return outcome(record)
        return planned(record, expected_programs(record.plan, self._starts, *sizes))

    def end(self, earlier: Sequence[Record] = ()) -> None:
        """The run is over.

        Args:
            earlier: the runs that made the same video before it.
        """
        record = self.record
        try:
            if record.without_cut().steps:
                line = outcome(record).line()
                log.info("WanTrim: %s; remarks: %d", line, len(record.notes))
            # the map shows them beside each other
            record = join_records([*earlier, record])
            said = _said(outcome(record)) if record.without_cut().steps else {}
            untouched = record.finished and not record.steps
            self._send(
                done=True,
                finished=record.finished,
                remarks=len(record.notes),
                untouched=untouched,
                **said,
            )
        except Exception:
            log.warning("WanTrim: the page could not be told of the end", exc_info=True)

    def _page(self):
        """The server, when it has a page to tell."""
        server = _server()
        listens = server is not None and server.client_id is not None and self.nodes
        return server if listens else None

    def _send(self, **what) -> None:
        server = self._page()
        if server is not None:
            server.send_sync(EVENT, {**self._about, **what}, server.client_id)


def _server():
    """ComfyUI's server, if one runs; importing its module would start half of one."""
    module = sys.modules.get("server")
    return getattr(getattr(module, "PromptServer", None), "instance", None)


def _said(came: Outcome) -> dict:
    """The line in English, and what it is made of."""
    return {"line": came.line(), "outcome": asdict(came)}


def _percent(kept: int, tokens: int) -> int:
    if kept in (0, tokens):
        return 100 if kept else 0
    return min(max(round(100 * kept / tokens), 1), 99)
