"""What keeps a training step that is not finite from changing anything, without a host that waits to hear of it."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Guard:
    """Notices what is not finite in a step, on the device. From there on the step changes nothing more, and is counted.

    No number leaves the device for this: the optimisers skip by a tensor, which PyTorch's fused ones read in their
    kernels, and what else a step changes is chosen by it.

    Args:
        networks: by name, those whose buffers a step moves (BatchNorm's running statistics). In a bad step they are
            put back as they were when the network was last updated.
        optimizers: fused. Where a step is bad before their own turn, parameters, averages and counts of steps stay.
        device: of all of them.
    """

    def __init__(self, networks: Mapping[str, nn.Module], optimizers: Iterable[Optimizer], device: torch.device):
        self.networks = networks
        # Of the step under way: 0, and from the first number on that is not finite 1.
        self.bad = torch.zeros((), dtype=torch.float32, device=device)
        self.bad_steps, self.bad_in_a_row, self.longest_row = torch.zeros(3, dtype=torch.int64, device=device).unbind()
        for optimizer in optimizers:
            optimizer.found_inf = self.bad  # GradScaler's way to tell a fused optimiser what to leave out

    def begin(self) -> None:
        """A step begins."""
        self.bad.zero_()
        self._before = {
            name: [buffer.clone() for buffer in network.buffers()] for name, network in self.networks.items()
        }

    def watch(self, *values: Tensor) -> None:
        """Note whether these numbers are finite, and whether other processes have sent `bad` (as a mean, say)."""
        finite = torch.stack([value.detach().float() for value in values]).isfinite().all()
        self.bad.copy_((self.bad > 0) | ~finite)

    def unless_bad(self, new: Tensor, old: Tensor) -> Tensor:
        """`new`, or `old` where something in this step was not finite until now."""
        return torch.where(self.bad > 0, old, new)

    def updated(self, name: str) -> None:
        """A network has had its update: unless the step is bad already, its buffers stay as they are now."""
        for buffer, before in self._buffers(name):
            before.copy_(self.unless_bad(buffer, before))

    def end(self) -> None:
        """The step ends, all but what `unless_bad` chooses: puts buffers back and counts."""
        for name in self.networks:
            for buffer, before in self._buffers(name):
                buffer.copy_(self.unless_bad(buffer, before))
        self._before.clear()
        bad = (self.bad > 0).long()
        self.bad_steps += bad
        self.bad_in_a_row.add_(1).mul_(bad)
        torch.maximum(self.longest_row, self.bad_in_a_row, out=self.longest_row)

    def _buffers(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """A network's buffers, each with what it would be put back to."""
        if name not in self.networks:
            return []
        return list(zip(self.networks[name].buffers(), self._before[name], strict=True))
