"""What a system is: its networks, the phases of its training step, what it draws at random, how it is optimised."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
from easydict import EasyDict
from torch import Tensor, nn

from ratlip.encoders import TextEncoder
from ratlip.encoders.clip_towers import FrozenClip

Terms = dict[str, tuple[Tensor, float]]  # of a loss, by name: each as it is logged, and the weight it is learnt with


class Step(SimpleNamespace):
    """One training step: what it reads, and what its phases hand each other (as further attributes).

    Attributes:
        images: (B, 3, S, S) in [-1, 1], this process's share of the batch.
        sentences: (B, E), of their captions. wrong: (B, E), of captions of other images.
        draws: what `System.draws` gave for these samples, tensors on the CPU.
        scale: tensor, what losses are multiplied with before they are differentiated; 1 but in fp16.
        watched: tensors that a phase appends; the step is bad where they are not finite.
        moved: by name, new values that a phase sets for the system's `state`; kept unless the step is bad.
    """


@dataclass(frozen=True)
class Phase:
    """A loss, and the network that is updated by it (StyleGAN2's word, arXiv 1912.04958).

    The network called "generator" is left out of no graph, so that what a critic's phase draws serves the generator's
    own; the others are constants where they are not updated.
    """

    name: str  # of what it logs: loss_<name>/<term>, gradient_norm/<name>
    network: str
    loss: Callable[[Step], Terms]
    every: int = 1  # steps


@dataclass(eq=False)
class System:
    """What trains and is trained. The loop (`ratlip.trainer`) knows no more of it than this.

    Attributes:
        settings: the configuration's train group.
        clip: frozen; what it is read for is the system's matter.
        networks: that are trained, by name, in the order of their optimisers. "generator" draws the pictures:
            noise (B, Z), sentence embedding (B, E) -> (B, 3, S, S), with `noise_dim` and, largest last, `sizes`.
        phases: of a step, in order.
        state: tensors that a step reads and moves beside networks' buffers.
        moving: names of networks whose buffers a step moves.
        sees_clip: whether the networks are of use with this CLIP alone.
    """

    settings: EasyDict
    clip: FrozenClip
    networks: dict[str, nn.Module]
    phases: list[Phase] = field(init=False)
    state: dict[str, Tensor] = field(default_factory=dict, init=False)
    moving: tuple[str, ...] = field(default=("generator",), init=False)
    sees_clip: ClassVar[bool] = False

    @staticmethod
    def make_generator(config: EasyDict, clip: FrozenClip, text: TextEncoder) -> nn.Module:
        """The generator that `config` describes, freshly initialised. `text` reads its captions: `clip` or another."""
        raise NotImplementedError

    @classmethod
    def build(cls, config: EasyDict, clip: FrozenClip, text: TextEncoder) -> "System":
        """The system that `config` describes, its networks freshly initialised, on the CPU."""
        raise NotImplementedError

    @property
    def generator(self) -> nn.Module:
        """The network that draws the pictures."""
        return self.networks["generator"]

    def to(self, device: torch.device) -> "System":
        """Move networks and state there."""
        for network in self.networks.values():
            network.to(device)
        self.state = {name: value.to(device) for name, value in self.state.items()}
        return self

    def fit(self, images: Iterable[Tensor]) -> None:
        """Before the first step: what networks take from some training images (B, 3, S, S) in [-1, 1]."""

    def compile(self, compiled: Callable[[Callable], Callable]) -> None:
        """Replace what can be by its `compiled` form."""

    def draws(self, rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
        """All that is random in a step with `count` images over all processes, a row for each, by name."""
        return {"noise": rng.standard_normal((count, self.generator.noise_dim), dtype=np.float32)}

    def parts_of_a_step(self, sentences: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        """The forward pass of what takes most of the time of a step with captions `sentences` (B, E), on the CPU and in
        eval mode: losses, and what to differentiate each with respect to. By it a precision is chosen
        (`ratlip.choices`)."""
        sentences, side = sentences[:4], self.generator.sizes[-1]
        step = Step(
            images=torch.zeros(len(sentences), 3, side, side),
            sentences=sentences.clone(),
            wrong=sentences.clone(),
            draws={
                name: torch.from_numpy(rows)
                for name, rows in self.draws(np.random.default_rng(0), len(sentences)).items()
            },
            scale=torch.ones(()),
            watched=[],
            moved={},
        )
        losses = []
        for phase in self.phases:
            loss = sum(value * weight for value, weight in phase.loss(step).values())
            losses.append((loss, [*self.networks[phase.network].parameters()]))
        return losses

    def adam(self, network: str) -> tuple[float, tuple[float, float]]:
        """Learning rate, before any decay, and betas of a network's optimiser."""
        s = self.settings
        return s.lr_g if network == "generator" else s.lr_d, (s.beta1, s.beta2)

    def average_share(self, step: int) -> float:
        """How far the averaged generator moves towards the present one after step `step` (from 1): faster at first."""
        return 1 - min(self.settings.ema, (1 + step) / (10 + step))
