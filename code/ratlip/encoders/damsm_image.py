"""DAMSM's image encoders: regions and a code of a picture, from Inception v3 (AttnGAN, arXiv 1711.10485) or a CLIP."""

import re
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import Inception_V3_Weights, inception_v3

from ratlip import checkpoint
from ratlip.encoders.clip_towers import FrozenClip, require_same
from ratlip.encoders.damsm import HIDDEN
from ratlip.errors import UserError
from ratlip.paths import full
from ratlip.released.weights import fill, tensors

WIDTH = 2 * HIDDEN  # of regions and codes, as of words and sentences
SIDE = 299  # pixels, of Inception's input
REGIONS = "Mixed_6e"  # whose output the regions are made from
URL = Inception_V3_Weights.IMAGENET1K_V1.url
UNUSED = re.compile(r"AuxLogits\.|fc\.")  # of torchvision's network


class DamsmImage(nn.Module):
    """What is trained of an image encoder: two linear maps from a frozen network's features.

    Args:
        channels, width: of that network's regions, and of its vector of a whole picture.
    """

    side: int  # pixels of the pictures that it is trained with

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.emb_features = nn.Conv2d(channels, WIDTH, 1, bias=False)  # named as in the published files
        self.emb_cnn_code = nn.Linear(width, WIDTH)
        for module in (self.emb_features, self.emb_cnn_code):
            nn.init.uniform_(module.weight, -0.1, 0.1)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> the frozen network's regions (B, C, h, w) and vectors (B, W)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> regions (B, 256, h, w), codes (B, 256)."""
        regions, vectors = self.features(images)
        return self.emb_features(regions), self.emb_cnn_code(vectors)

    def kept(self) -> dict[str, Tensor]:
        """What a file keeps of it."""
        return self.state_dict()


class DamsmInception(DamsmImage):
    """The published one, on torchvision's Inception v3: regions (B, 256, 17, 17).

    Its weights are frozen; in train mode its BatchNorm goes by the batch and moves its running statistics (published).
    """

    side = SIDE

    def __init__(self):
        super().__init__(768, 2048)
        trunk = inception_v3(weights=None, aux_logits=False, transform_input=False, init_weights=False)
        self.stages = [name for name, _ in trunk.named_children() if name not in ("avgpool", "dropout", "fc")]
        for name in self.stages:
            setattr(self, name, getattr(trunk, name).requires_grad_(False))

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=True)
        for name in self.stages:
            x = getattr(self, name)(x)
            if name == REGIONS:
                regions = x  # (B, 768, 17, 17)
        return regions, x.mean((2, 3))  # of (B, 2048, 8, 8)

    def load_trunk(self, path: Path) -> None:
        """Fill the frozen network from torchvision's file of Inception v3. UserError: another file."""
        content = tensors(str(path), checkpoint.read(path))
        maps = {key: value for key, value in self.state_dict().items() if key.startswith("emb_")}
        fill(self, {**content, **maps}, str, str(path), UNUSED)


class DamsmClip(DamsmImage):
    """On a CLIP's image tower: regions are its last patch tokens (B, 256, g, g), projected as its embedding is."""

    def __init__(self, clip: FrozenClip):
        super().__init__(clip.embedding_dim, clip.embedding_dim)
        self.clip, self.side = clip, clip.resolution

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.clip.regions(images)

    def kept(self) -> dict[str, Tensor]:
        """The maps alone; the CLIP is found by its settings."""
        return {key: value for key, value in self.state_dict().items() if key.startswith("emb_")}


def load_damsm_image(weights: str, clip: FrozenClip) -> DamsmImage:
    """The image encoder that was trained with a text encoder, frozen, on the CPU.

    Args:
        weights: of the text encoder: a file of pretrain.sh, which holds both; or a published text_encoder*.pth, beside
            which image_encoder*.pth lies.
        clip: the configuration's, for an encoder that was made with one.

    Raises:
        UserError: a missing file, something else, or another CLIP than it was trained with.
    """
    content = checkpoint.read(weights)
    if "vocabulary" in content:
        if then := content["clip"]:
            require_same(clip, then, weights, insist=False)
        encoder, path, content = DamsmClip(clip) if then else DamsmInception(), Path(weights), content["image"]
    else:
        path = Path(weights).with_name(Path(weights).name.replace("text_encoder", "image_encoder"))
        if path == Path(weights) or not path.is_file():
            raise UserError(
                f"no image encoder {full(path)} beside {weights}: a published pair is text_encoder*.pth and "
                "image_encoder*.pth; pretrain.sh writes both in one file"
            )
        encoder, content = DamsmInception(), checkpoint.read(path)
    content = tensors(str(path), content)
    for key, value in encoder.state_dict().items():
        if key.endswith("num_batches_tracked") or key.startswith("clip."):  # older than that; not in the file
            content.setdefault(key, value)
    fill(encoder, content, str, str(path), re.compile("(?!)"))
    return encoder.requires_grad_(False)
