"""Reference statistics: what the real pictures look like in a feature space, measured once and kept in a file."""

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ratlip import device as devices
from ratlip import distributed
from ratlip.data.layouts import DECODING, Item
from ratlip.data.loader import picture_batches
from ratlip.disk import replacing
from ratlip.errors import UserError, first_line
from ratlip.metrics.features import Space
from ratlip.metrics.frechet import Gaussian, Moments

ALWAYS = {"mu", "sigma"}  # the keys of a released file
OURS = {*ALWAYS, "count", "protocol", "weights", "pictures"}
CONTENT = "content:"  # begins a fingerprint; those of earlier versions, without it, went by the files' sizes


@dataclass(frozen=True)
class Reference:
    """Real pictures in one feature space."""

    gaussian: Gaussian
    count: int | None  # pictures; None where a released file does not tell
    features: Tensor | None  # (count, D) float32 on the CPU, in spaces that keep them
    source: str  # which pictures, in words


def measure(pictures: Dataset, space: Space, device: torch.device, batch_size: int, workers: int, source: str):
    """The Reference of a data set of (image, number), its pictures spread over all processes."""
    count = len(pictures)
    moments = Moments(space.dim, device)
    features = torch.zeros(count, space.dim, device=device) if space.keeps_features else None
    quiet = distributed.rank() > 0 or None  # None: no bar where there is no terminal
    own = len(range(distributed.rank(), count, distributed.world_size()))
    with tqdm(total=own, desc=f"{space.name} of real images", unit="image", leave=False, disable=quiet) as bar:
        for images, numbers in picture_batches(pictures, batch_size, workers, device):
            found = space(images)
            moments.update(found)
            if features is not None:
                features[devices.send(numbers, device)] = found
            bar.update(len(images))
    totals = [*moments.totals, *([features] if features is not None else [])]
    distributed.sum_over_processes(totals, device)
    return Reference(moments.gaussian(), count, None if features is None else features.cpu(), source)


def fingerprint(items: Sequence[Item]) -> str:
    """What names the pictures of a split: their files' contents and boxes, in order, and how they are read, hashed."""
    if any(item.content is None for item in items):
        raise ValueError("items as take_stock gives them are needed, with their contents' hashes")
    lines = [f"decoding {DECODING}", *(f"{item.content}\t{item.box}" for item in items)]
    return CONTENT + hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def save(path: Path, reference: Reference, space: Space, protocol: str, pictures: str) -> None:
    """Write statistics on the first process, complete or not at all.

    Args:
        protocol: how the pictures came into the space. pictures: their `fingerprint`.
    """
    if distributed.rank() > 0:
        return
    content = {
        "mu": reference.gaussian.mean.cpu().numpy(),
        "sigma": reference.gaussian.covariance.cpu().numpy(),
        "count": reference.count,
        "protocol": protocol,
        "weights": space.checksum,
        "pictures": pictures,
    }
    if reference.features is not None:
        content["features"] = reference.features.numpy()
    try:
        with replacing(path) as file:
            np.savez(file, **content)
    except OSError as error:
        raise UserError(f"could not write {path} ({error}); earlier files are untouched") from None


def outdated(path: Path, expected: dict[str, object], keeps_features: bool = False) -> str:
    """Why a file of statistics that this program wrote does not hold here, in words; "" where it does.

    "" too of a file that `load` refuses: one that is damaged, or that another program wrote.

    Args:
        keeps_features: whether each picture's features are needed.
    """
    try:
        content = _read(path, set(expected))
    except UserError:
        return ""
    if keeps_features and set(content) == OURS:
        return "of an earlier version, which kept no picture's features"
    for key, value in expected.items() if set(content) >= OURS else ():
        found = content[key].tolist()
        if key == "pictures" and found != value:
            other = str(found).startswith(CONTENT)
            return "of other pictures" if other else "of an earlier version, which went by the pictures' sizes"
        if found != value:
            return f"its {key} is {found}, but this needs {value}"
    return ""


def load(path: Path, space: Space, device: torch.device, expected: dict[str, object], bare: bool = False) -> Reference:
    """Read statistics.

    Args:
        expected: what the file must say under these keys: "protocol", "weights", "count", "pictures".
        bare: accept a file with `mu` and `sigma` alone, as released with the papers.

    Raises:
        UserError: not such a file, or made from other pictures, with other weights or by another protocol.
    """
    content = _read(path, OURS | ({"features"} if space.keeps_features else set()))
    advice = "move it away or delete it, and it is made anew"
    if not ALWAYS <= set(content):
        held = ", ".join(content) or "nothing"
        raise UserError(f"{path}: no statistics: it holds {held}, not mu and sigma; {advice}")
    if not (bare and set(content) == ALWAYS):
        missing = sorted(OURS - set(content) | ({"features"} - set(content) if space.keeps_features else set()))
        if missing:
            raise UserError(f"{path}: not written by this program: it has no {', '.join(missing)}; {advice}")
        for key, value in expected.items():
            if content[key].tolist() != value:
                raise UserError(f"{path}: its {key} is {content[key]}, but this needs {value}; {advice}")
    mean, covariance = content["mu"], content["sigma"]
    shapes = {"mu": (space.dim,), "sigma": (space.dim, space.dim)}
    if space.keeps_features:
        shapes["features"] = (int(content["count"]), space.dim)
    for key, shape in shapes.items():
        if content[key].shape != shape:
            raise UserError(f"{path}: its {key} is {content[key].shape}, {shape} was expected; {advice}")
        if content[key].dtype.kind != "f" or not np.isfinite(content[key]).all():
            raise UserError(f"{path}: its {key} holds what is no finite number; {advice}")
    gaussian = Gaussian(*(torch.from_numpy(array).double().to(device) for array in (mean, covariance)))
    count = int(content["count"]) if "count" in content else None
    features = torch.from_numpy(content["features"]) if space.keeps_features else None
    source = f"{path}, of {f'{count:,}' if count else 'an unknown number of'} pictures"
    return Reference(gaussian, count, features, source)


def _read(path: Path, keys: set[str]) -> dict[str, np.ndarray]:
    """The arrays of an npz under these keys, and the names of all others with None; nothing in it is executed."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] if key in keys else None for key in file.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read as statistics ({first_line(error)})") from None
