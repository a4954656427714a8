"""The weights of a published network, by the names it has there, into a network of ours."""

import re
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ratlip.errors import UserError


def tensors(network: str, weights: object) -> dict[str, Tensor]:
    """The tensors of a published network, without the `module.` of a parallel wrapper before their names.

    Args:
        network: what it is called there, for messages.
    """
    if not isinstance(weights, Mapping):
        raise UserError(f"{network} is a {type(weights).__name__}; expected tensors by name")
    for key, value in weights.items():
        if not isinstance(value, Tensor | np.ndarray):
            raise UserError(f"{network}: {key} is a {type(value).__name__}; expected a tensor")
    return {str(key).removeprefix("module."): torch.as_tensor(value) for key, value in weights.items()}


def need(weights: Mapping[str, Tensor], key: str, network: str, axes: int | None = None) -> Tensor:
    """The tensor of that name; a UserError without it, or where it has not this number of axes."""
    if key not in weights:
        raise UserError(f"{network} has no {key}: not a released network of this system, or an incomplete one")
    if axes not in (None, weights[key].ndim):
        raise UserError(f"{network}: {key} is {tuple(weights[key].shape)}; {axes} axes were expected")
    return weights[key]


def renamed(key: str, *rules: tuple[str, str]) -> str:
    """The key after each rule in turn: what its pattern matches, and what stands in its place."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def fill(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    released_key: Callable[[str], str],
    network: str,
    unused: re.Pattern,
) -> None:
    """Fill `module` from `weights`, each of its keys looked up under its released name, and set it to eval mode.

    Args:
        unused: matches, from their beginning, names of what is stored there and has no part in the results.

    Raises:
        UserError: the first key that is missing, of another size, or that no such network has.
    """
    left, own = set(weights), {}
    for key, value in module.state_dict().items():
        theirs = released_key(key)
        found = need(weights, theirs, network)
        if found.numel() != value.numel():  # some are stored with axes of length one around them
            raise UserError(f"{network}: {theirs} is {tuple(found.shape)}, {tuple(value.shape)} was expected")
        own[key] = found.reshape(value.shape)
        left.discard(theirs)
    unknown = sorted(key for key in left if not unused.match(key))
    if unknown:
        raise UserError(f"{network} has a key that no released network has: {unknown[0]} ({len(unknown)} in all)")
    module.load_state_dict(own)
    module.eval()
