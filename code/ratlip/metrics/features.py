"""Feature spaces: what turns pictures into vectors, each with its protocol and the checksum of its weights."""

import hashlib
import io
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from easydict import EasyDict
from torch import Tensor, nn

from ratlip import checkpoint, distributed
from ratlip import device as devices
from ratlip.encoders.clip_towers import FrozenClip
from ratlip.encoders.damsm import HIDDEN, load_damsm
from ratlip.encoders.damsm_image import load_damsm_image
from ratlip.errors import UserError, first_line
from ratlip.paths import full

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INCEPTION_SIDE = 299  # pixels
LEAST = 16  # pictures computed at once; for fewer, matrix libraries add in another order, and last bits change
TIMEOUT = 30  # seconds without an answer after which a download is given up


class MissingWeights(Exception):
    """Weights that are not on this machine and cannot be downloaded. The message says how to get them."""


class Space(ABC):
    """Pictures (B, 3, H, W) in [-1, 1] -> features (B, dim) float32, on the same device.

    Args:
        config: its `clip` and `eval` groups are read.
        clip: the evaluation's CLIP, on the device that computes.
    """

    name: str  # metrics refer to it
    statistics: str  # how files of reference statistics in it are called: a metric's name
    dim: int
    protocol: str  # weights and input, in words
    checksum: str  # of the weights: sha256's first 8 digits
    keeps_features = False  # whether references need each picture's features, not only their moments

    @abstractmethod
    def __init__(self, config: EasyDict, clip: FrozenClip): ...

    def __call__(self, images: Tensor) -> Tensor:
        with torch.no_grad(), full_float32():
            return self.features(padded(images))[: len(images)]

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """What __call__ answers, of LEAST pictures or more."""

    def also(self, features: Tensor, captions: Sequence[str] | None) -> dict[str, Tensor]:
        """What else metrics read, by name: made from what __call__ answered, or from the pictures' captions."""
        return {}


class ClipSpace(Space):
    """CLIP's image embedding, not normalised."""

    name = "clip"
    keeps_features = True

    def __init__(self, config: EasyDict, clip: FrozenClip):
        self.clip, self.dim = clip, clip.embedding_dim
        digest = hashlib.sha256()
        for weight in clip.clip.visual.state_dict().values():
            digest.update(weight.cpu().contiguous().numpy().tobytes())
        unlike = clip.unlike_openai(image=True)
        digest.update(unlike.encode())
        self.checksum = digest.hexdigest()[:8]
        self.protocol = f"CLIP image embedding, {clip.preprocess} input" + (f", {unlike}" if unlike else "")
        # Which CLIP is the user's choice: statistics for several lie side by side.
        self.statistics = f"fd_clip-{clip.preprocess}-{self.checksum}"

    def features(self, images: Tensor) -> Tensor:
        return self.clip.image(images)[1]


class InceptionSpace(Space):
    """The standard one: TensorFlow's Inception of 2015, its resize and pooling, as torch-fidelity rebuilds them."""

    name, statistics, dim = "inception", "fid", 2048
    keeps_features = True

    def __init__(self, config: EasyDict, clip: FrozenClip):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        key = "eval.inception_weights"
        path, self.checksum, note = find_weights(config.eval.inception_weights, URL_INCEPTION_V3, key)
        weights = io.BytesIO()  # torch-fidelity would run what a pickle asks for, and reads no safetensors
        torch.save(checkpoint.read(path), weights)
        weights.seek(0)
        with building(path, key):
            self.extractor = FeatureExtractorInceptionV3(
                "inception-v3-compat", [str(self.dim)], feature_extractor_weights_path=weights
            ).to(clip.mean.device)
        self.protocol = f"torch-fidelity inception-v3-compat 2048{note}"

    def features(self, images: Tensor) -> Tensor:
        levels = images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)  # as if read from a PNG
        return self.extractor(levels)[0]

    def also(self, features: Tensor, captions: Sequence[str] | None) -> dict[str, Tensor]:
        """The 1,008 logits, without their bias as the Inception score has them since its first program."""
        with torch.no_grad(), full_float32():
            return {"inception_logits": features @ self.extractor.fc.weight.T}


class ReleasedInceptionSpace(Space):
    """The papers': torchvision's ImageNet Inception v3 up to its last pooling, fed as their code feeds it."""

    name, statistics, dim = "inception_released", "fid_released", 2048

    def __init__(self, config: EasyDict, clip: FrozenClip):
        from torchvision.models import Inception_V3_Weights, inception_v3

        key, url = "eval.inception_released_weights", Inception_V3_Weights.IMAGENET1K_V1.url
        path, self.checksum, note = find_weights(config.eval.inception_released_weights, url, key)
        weights = checkpoint.read(path)
        with building(path, key):
            network = inception_v3(weights=None, aux_logits=True, transform_input=False, init_weights=False)
            network.load_state_dict(weights)
        network.fc = nn.Identity()  # what is left ends in the pooling
        self.network = network.eval().requires_grad_(False).to(clip.mean.device)
        self.protocol = f"torchvision ImageNet Inception v3, GALIP's input{note}"

    def features(self, images: Tensor) -> Tensor:
        return self.network(released_inception_input(images))


class DamsmSpace(Space):
    """DAMSM's codes of pictures, and its sentences of their captions, by the pair of encoders of `text.weights`."""

    name, statistics, dim = "damsm", "damsm", 2 * HIDDEN

    def __init__(self, config: EasyDict, clip: FrozenClip):
        settings, place = config.text, clip.mean.device
        if settings.weights is None:
            raise MissingWeights("text.weights names no file of DAMSM's encoders (pretrain.sh makes one)")
        with torch.random.fork_rng(devices=[]):
            folder, seed = Path(config.data.dir), config.train.seed
            self.text = load_damsm(settings.weights, settings.vocabulary, folder, settings.words, seed).eval().to(place)
            self.image = load_damsm_image(settings.weights, clip).eval().to(place)
        digest = hashlib.sha256(self.text.identity["checksum"].encode())
        for weight in self.image.kept().values():
            digest.update(weight.cpu().contiguous().numpy().tobytes())
        self.checksum = digest.hexdigest()[:8]
        self.protocol = f"DAMSM of {settings.weights}"

    def features(self, images: Tensor) -> Tensor:
        return self.image(images)[1]

    def also(self, features: Tensor, captions: Sequence[str] | None) -> dict[str, Tensor]:
        """The captions' sentences (B, 256)."""
        if captions is None:
            return {}
        self.text.check(captions, lambda _: "a caption")
        with torch.no_grad(), full_float32():
            return {"damsm_sentences": self.text.encode(self.text.tokenize(captions))}


SPACES = {space.name: space for space in (ClipSpace, InceptionSpace, ReleasedInceptionSpace, DamsmSpace)}


def padded(rows: Tensor, least: int = LEAST) -> Tensor:
    """The last row repeated up to `least` rows, so that a row's result does not depend on the size of its batch."""
    return torch.cat([rows, rows[-1:].expand(max(0, least - len(rows)), *rows.shape[1:])])


def released_inception_input(images: Tensor) -> Tensor:
    """Images (B, 3, H, W), clamped to [-1, 1] here -> what GALIP's code gives to Inception (B, 3, 299, 299)."""
    size = (INCEPTION_SIDE, INCEPTION_SIDE)
    images = F.interpolate(images.clamp(-1, 1) * 0.5 + 0.5, size, mode="bilinear", align_corners=False)
    mean, std = devices.send(torch.tensor([IMAGENET_MEAN, IMAGENET_STD]), images.device)[:, :, None, None]
    return images * (std / 0.5) + (mean - 0.5) / 0.5


def find_weights(named: str | None, url: str, key: str) -> tuple[Path, str, str]:
    """A weights file: the one that setting `key` names, else the one at `url`, downloaded once.

    Returns:
        path, sha256's first 8 digits, and what the protocol must say of a file that is not the published one.

    Raises:
        MissingWeights: it is not there, and where no file was named it cannot be downloaded.
    """
    kept = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    path = Path(named) if named else kept
    published = path_digits(url)
    reason = f"no file {full(path)} ({key})"
    if not named:
        with distributed.first_process_first():
            if not path.is_file() and distributed.rank() == 0:
                reason = _download(url, path)
    if not path.is_file():
        place = f"{kept}, or anywhere and set {key} to it"
        raise MissingWeights(f"{reason}; download {url} (sha256 begins {published}) to {place}")
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return path, checksum, "" if checksum == published else f", with other weights than the published {published}"


def path_digits(url: str) -> str:
    """The digits of its sha256 that PyTorch puts at the end of a weights file's name."""
    return Path(url).stem.rpartition("-")[2]


def _download(url: str, path: Path) -> str:
    """Download, complete or not at all; the reason where that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path_digits(url))
    except (OSError, RuntimeError) as error:  # no connection or a full disk; another file than was asked for
        return f"no {path}, and its download failed ({first_line(error)})"
    finally:
        socket.setdefaulttimeout(waiting)
    return ""


@contextmanager
def building(path: Path, key: str) -> Iterator[None]:
    """Build a network from a weights file: leaves random states alone, names a file of something else."""
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{key}: {path} does not hold this Inception's weights ({first_line(error)})") from None


@contextmanager
def full_float32() -> Iterator[None]:
    """Convolutions without TensorFloat-32, which GPUs otherwise use: scores do not depend on the device."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
