"""One stage of a recipe: weights, optimizer and state, and the step that changes them."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from ..methods.depth import BlockBudget
from ..methods.routers import RouterMLP
from ..slim.file import SlimHeader
from ..slim.router import Conditions, load_router
from ..slim.source import Source
from .average import Average
from .checkpoints import State, whole_state
from .draws import Draws
from .gate import Routing, Taps, new_router
from .models import full_model, open_student, start_files, write_student
from .objectives import OBJECTIVES, Pair
from .parallel import DTYPES, World, shard
from .recipe import Recipe, Run, Stage
from .recompute import recompute_blocks
from .shards import Batch

log = logging.getLogger(__name__)


def learning_rate(stage: Stage, step: int) -> float:
    """Share of the peak at a step: warm-up, then a cosine to zero."""
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - stage.warmup) / (stage.steps - stage.warmup)))


def new_optimizer(run: Run, groups: list[dict]) -> torch.optim.Optimizer:
    """The recipe's optimizer.

    Raises:
        ValueError: its library is not installed.
    """
    if run.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=run.weight_decay)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            "optimizer: adamw8bit is torchao's, which is not installed. Install it "
            "(pip install torchao), or take adamw"
        ) from error
    return AdamW8bit(groups, weight_decay=run.weight_decay)


class Trainer:
    """A student and, from stage II on, its router.

    Args:
        number: of the stage within the recipe, from 1.
        start: folder or file with the student to begin with, and its router if it has one.
        folder: of the stage; its state is loaded if there is one.
        source: the full model, which a critic can begin as.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        number: int,
        world: World,
        teacher: nn.Module,
        negative: torch.Tensor,
        start: Path,
        folder: Path,
        source: Source,
    ):
        self.recipe, self.stage, self.number = recipe, stage, number
        self.world, self.folder = world, folder
        dtype = DTYPES[recipe.run.dtype]
        file, known = start_files(start)
        student, self.header = open_student(file)
        self.student = student.model
        routing, self._mlp = self._router(known)
        # in this order: what goes on first is called last
        taps = Taps(self.student)
        critic = None
        if stage.kind == "self_forcing":
            full = stage.critic == "full"
            critic = full_model(source, torch.float32, True) if full else open_student(file)[0]
        for waiting in [student] if critic is None else [student, critic]:
            if recipe.run.checkpointing:
                recompute_blocks(waiting.model)
            if world.size > 1:
                shard(waiting.model, world.mesh, dtype)
            waiting.fill(world.device)
        # several processes compute in the low precision by FSDP's policy, one by autocast
        self.cast = nullcontext
        if world.size == 1 and dtype != torch.float32:
            # up to torch 2.9 a weight that was cast without a gradient stays without one in the cache
            self.cast = lambda: torch.autocast(world.device.type, dtype, cache_enabled=False)
        self.pair = Pair(
            self.student,
            teacher,
            taps,
            Taps(teacher),
            routing,
            negative.to(world.device),
            dtype,
            critic and critic.model,
        )
        self.trained = nn.ModuleDict({"student": self.student})
        groups = [{"params": [*self.student.parameters()], "lr": stage.lr, "peak": stage.lr}]
        if routing is not None:
            self.trained["router"] = routing.mlp
            rate = stage.router_lr if stage.kind == "router" else stage.lr
            groups.append({"params": [*routing.mlp.parameters()], "lr": rate, "peak": rate})
        # before the critic joins: it is thrown away
        self.average = Average(self.trained, stage.ema_decay) if stage.ema_decay else None
        self.own = [*self.trained.parameters()]
        if critic is not None:
            self.trained = nn.ModuleDict({**self.trained, "critic": critic.model})
            rate = stage.critic_lr
            groups.append({"params": [*critic.model.parameters()], "lr": rate, "peak": rate})
        self.optimizer = new_optimizer(recipe.run, groups)
        self.state = State(folder / "state", world, self.trained, self.optimizer, self.average)
        self.step = self.state.load()
        self._known: dict[str, torch.Tensor] = {}

    def _router(self, known: Path | None) -> tuple[Routing | None, RouterMLP | None]:
        """The router to train, and one of the same sizes without weights to write it with."""
        stage, model = self.stage, self.header.model
        if stage.kind == "width" or (stage.few and known is None):
            return None, None
        if known is not None:
            loaded = load_router(known)
            mlp, kind = loaded.mlp.requires_grad_(True), loaded.kind
            if loaded.conditions is not None and self.world.first:
                own = self._conditions().to_json()
                for said in loaded.conditions.settle(own, dict.fromkeys(own))[1]:
                    log.info("%s: %s", known.parent.name, said)
        else:
            torch.manual_seed(self.recipe.data.seed)
            clip = self.student.config.image_dim or 0
            kind = stage.content
            mlp = new_router(model.num_blocks, kind, model.out_channels, clip)
        with torch.device("meta"):
            empty = RouterMLP(mlp.num_blocks, mlp.content_dim, mlp.hidden, mlp.time_dim)
        mlp.to(self.world.device)
        if self.world.size > 1:
            torch.distributed.fsdp.fully_shard(mlp, mesh=self.world.mesh)
        return Routing(mlp, kind, BlockBudget(stage.k_min, stage.k_max)), empty

    def train_step(self, batch: Batch) -> dict[str, torch.Tensor]:
        """One optimizer step on this process's part of the batch; its terms, as means over all.

        A term that this step has not is that of the last step since the start that had it, if any.
        """
        first = self.world.rank * len(batch.latents)
        draws = Draws(self.recipe.data.seed, self.number, self.step, first)
        batch = batch.to(self.world.device)
        share = learning_rate(self.stage, self.step)
        for group in self.optimizer.param_groups:
            rate = share * group["peak"]
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        with self.cast():
            terms = OBJECTIVES[self.stage.kind](self.pair, self.stage, batch, draws)
        terms["loss"].backward()
        norm = self._clipped(self.own)
        if self.pair.critic is not None:
            norm = norm + self._clipped([*self.pair.critic.parameters()])
        if not torch.isfinite(norm):
            raise ValueError(
                f"step {self.step + 1}: the gradient is {float(norm)}, and nothing was changed by "
                "it. Look at the data; or take a lower learning rate: the run goes on from its last "
                "saved step only with the same recipe, so choose another --out and --start for it."
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)
        values = self.world.mean(torch.stack([term.detach().float() for term in terms.values()]))
        self._known |= dict(zip(terms, values, strict=True)) | {"grad_norm": norm.detach()}
        return dict(self._known)

    def _clipped(self, parameters: list[nn.Parameter]) -> torch.Tensor:
        """The norm that their gradients had together before they were clipped."""
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.recipe.run.grad_clip)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def averaged(self):
        """Within the context, the weights that are written and sampled with."""
        return nullcontext() if self.average is None else self.average.in_place()

    def write(self, data: str) -> None:
        """Write the student and its router, for ComfyUI and diffusers.

        Args:
            data: names of what it was trained on, for the header; no paths.
        """
        with self.averaged():
            student = whole_state(self.student)
            router = None if self.pair.routing is None else whole_state(self.pair.routing.mlp)
            # inside: on a CPU these are the weights themselves, which the average then leaves
            if self.world.first:
                self._write(student, router, _said(self.header) + [self._record(data)])
        self.world.wait()

    def _write(self, student: dict, router: dict | None, trained: list[dict]) -> None:
        mlp, kind = None, None
        if router is not None:
            self._mlp.load_state_dict(router, assign=True)
            mlp, kind = self._mlp.requires_grad_(False), self.pair.routing.kind
        said = self._conditions()
        write_student(self.folder, student, mlp, kind, self.header, trained, conditions=said)

    def _conditions(self) -> Conditions:
        # the curve and the skipping that the gate has
        s = self.stage
        return Conditions(s.k_min, s.k_max, "falling", "identity", s.shift)

    def _record(self, data: str) -> dict:
        s = self.stage
        said = {
            "stage": s.kind,
            "steps": self.step,
            "batch": self.recipe.data.batch,
            "recipe": self.recipe.name,
            "data": data,
        }
        if self.pair.routing is not None:
            said |= {"k_min": s.k_min, "k_max": s.k_max}
        if s.few:
            said |= {"sampler_steps": s.sampler_steps, "guidance": s.guidance, "shift": s.shift}
        return said

    def close(self) -> None:
        self.pair.taps.remove()
        self.pair.teacher_taps.remove()


def _said(header: SlimHeader) -> list:
    """What the header says about earlier stages."""
    before = header.made.get("trained")
    return before if isinstance(before, list) else []
