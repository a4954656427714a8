"""Conditional affine layers: plain (CAT, as in GALIP) and recurrent (RAT-GAN, arXiv 2204.10482)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Affines = list[tuple[Tensor, Tensor]]  # gamma, beta of each layer, (B, C, 1, 1) each


class Affine(nn.Module):
    """gamma(h) and beta(h) of one layer, each Linear-ReLU-Linear over `hidden_dim` (default: channels); at first
    gamma = 1 and beta = 0."""

    def __init__(self, condition_dim: int, channels: int, hidden_dim: int | None = None):
        super().__init__()
        hidden_dim = hidden_dim or channels
        self.gamma, self.beta = (
            nn.Sequential(nn.Linear(condition_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, channels))
            for _ in range(2)
        )
        for mlp, start in ((self.gamma, 1.0), (self.beta, 0.0)):
            nn.init.zeros_(mlp[-1].weight)
            nn.init.constant_(mlp[-1].bias, start)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.gamma(h)[:, :, None, None], self.beta(h)[:, :, None, None]


class OneBiasCell(nn.LSTMCell):
    """An LSTM cell with one bias in place of two that are added, which Adam would move twice as fast."""

    def __init__(self, input_dim: int, hidden_dim: int):
        super().__init__(input_dim, hidden_dim)
        del self.bias_hh
        self.register_buffer("bias_hh", torch.zeros(4 * hidden_dim), persistent=False)


class Conditioner(nn.Module):
    """Every gamma and beta of a network, computed up front from the condition c = [noise; sentence].

    Layers along the network are time steps: RAT(x | h_t) = gamma_t(h_t) * x + beta_t(h_t). A plain layer takes
    h_t = c. A recurrent one takes h_t from an LSTM that reads c at each step; since c never depends on image
    features, the LSTM can be unrolled before the first convolution runs.

    Args:
        channels: of each affine layer, in network order.
        recurrent: for each layer, whether it takes h_t from an LSTM.
        state: "shared", one LSTM whose start (h_0, c_0) is an MLP of the noise; "independent", an LSTM for each
            layer that makes one step from zero state, which is what the released RATLIP weights are; or "ratgan",
            one LSTM of one bias that reads the sentence alone, from a start linear in the noise, and affine layers
            whose hidden layer is as wide as it.
    """

    def __init__(
        self,
        channels: Sequence[int],
        recurrent: Sequence[bool],
        noise_dim: int,
        sentence_dim: int,
        state: str = "shared",
        hidden_dim: int = 64,
    ):
        super().__init__()
        condition_dim = noise_dim + sentence_dim
        self.recurrent = list(recurrent)
        self.state = state
        steps = sum(self.recurrent)
        if steps and state == "shared":
            self.start = nn.Sequential(
                nn.Linear(noise_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 2 * hidden_dim)
            )
        elif steps and state == "ratgan":
            self.start = nn.Linear(noise_dim, 2 * hidden_dim)
        lstms = {"shared": min(steps, 1), "independent": steps, "ratgan": min(steps, 1)}[state]
        # Cells, since torch.compile does not see through nn.LSTM.
        cell, inputs = (OneBiasCell, sentence_dim) if state == "ratgan" else (nn.LSTMCell, condition_dim)
        self.lstms = nn.ModuleList(cell(inputs, hidden_dim) for _ in range(lstms))
        self.register_load_state_dict_pre_hook(_with_names_of_cells)
        self.affines = nn.ModuleList(
            Affine(hidden_dim if r else condition_dim, c, hidden_dim if r and state == "ratgan" else None)
            for c, r in zip(channels, recurrent, strict=True)
        )

    def forward(self, noise: Tensor, sentence: Tensor) -> Affines:
        """noise (B, Z), sentence (B, E) -> (gamma, beta) of each layer."""
        condition = torch.cat([noise, sentence], dim=1)
        with torch.autocast(condition.device.type, enabled=False):  # not every CPU has a bfloat16 LSTM
            hidden = iter(self._unroll(noise, sentence if self.state == "ratgan" else condition))
        return [
            affine(next(hidden) if recurrent else condition)
            for affine, recurrent in zip(self.affines, self.recurrent, strict=True)
        ]

    def _unroll(self, noise: Tensor, inputs: Tensor) -> list[Tensor]:
        """h_t (B, H) of each recurrent layer; `inputs` is what the LSTM reads at each step."""
        if not self.lstms:
            return []
        if self.state == "independent":
            return [lstm(inputs)[0] for lstm in self.lstms]
        hidden, state = [], self.start(noise).chunk(2, dim=1)  # h_0, c_0 (B, H)
        for _ in range(sum(self.recurrent)):
            state = self.lstms[0](inputs, state)
            hidden.append(state[0])
        return hidden


def _with_names_of_cells(module: Conditioner, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Rename, in place, the weights of older checkpoints of ours, whose LSTMs were nn.LSTM."""
    for key in [key for key in state_dict if key.startswith(f"{prefix}lstms.") and key.endswith("_l0")]:
        state_dict[key.removesuffix("_l0")] = state_dict.pop(key)
