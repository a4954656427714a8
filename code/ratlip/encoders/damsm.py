"""DAMSM's text encoder (AttnGAN, Xu et al. 2018, arXiv 1711.10485) and the vocabulary that it belongs to."""

import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ratlip import checkpoint
from ratlip import device as devices
from ratlip.errors import UserError
from ratlip.paths import full
from ratlip.released.weights import fill, need, tensors

END = "<end>"  # word 0, which fills captions up; no caption holds it
PUBLISHED = ("captions_DAMSM.pickle", "captions.pickle")  # vocabularies in the data folders of DF-GAN and of AttnGAN
EMBEDDING, HIDDEN, DROPOUT = 300, 128, 0.5  # word vectors, the LSTM in each direction
BELONG = (
    "an encoder and its vocabulary are one pair: pretrain.sh writes both in one file; of the published ones "
    "text_encoder200.pth (birds) and text_encoder100.pth (COCO) each have the captions.pickle of AttnGAN's data for "
    "that set, which DF-GAN's data call captions_DAMSM.pickle; one made anew from the captions fits none of them"
)


def words_of(text: str) -> list[str]:
    """The words of a caption as AttnGAN and DF-GAN take them: lower case, letters, digits and underscores, of which
    those outside ASCII are then left out ("café" -> "caf")."""
    found = re.findall(r"\w+", text.replace("\ufffd\ufffd", " ").lower())
    return [word for word in (token.encode("ascii", "ignore").decode() for token in found) if word]


class Vocabulary:
    """The words that an encoder knows, by number.

    Args:
        words: word 0 is `END`.
        source: the file it is from, for messages.
    """

    def __init__(self, words: Sequence[str], source: str = "the vocabulary"):
        self.words, self.source = list(words), source
        self.numbers = {word: number for number, word in enumerate(self.words) if number}

    @classmethod
    def of(cls, captions: Iterable[str]) -> "Vocabulary":
        """A new one of all words of the captions, numbered from 1 as they come."""
        return cls([END, *dict.fromkeys(word for caption in captions for word in words_of(caption))])

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        """A published captions.pickle: [training captions, test captions, {number: word}, {word: number}].

        Raises:
            UserError: no such file, or none of these.
        """
        content = checkpoint.read_pickle(path)
        words = content[2] if isinstance(content, list | tuple) and len(content) > 2 else None
        if not isinstance(words, dict) or set(words) != set(range(len(words))) or len(words) < 2:
            raise UserError(f"{path}: no vocabulary: expected a list with captions and {{number: word}}, from 0 on")
        if not all(isinstance(word, str) for word in words.values()):
            raise UserError(f"{path}: no vocabulary: not all its words are texts")
        return cls([words[number] for number in range(len(words))], str(path))

    def __len__(self) -> int:
        return len(self.words)

    def __call__(self, caption: str) -> list[int]:
        """Numbers of the caption's words; those that are not known are left out."""
        return [self.numbers[word] for word in words_of(caption) if word in self.numbers]


def drawn(numbers: Sequence[int], count: int, random: np.random.RandomState) -> list[int]:
    """So many of them, in their order, drawn as AttnGAN and DF-GAN draw them (count <= len(numbers))."""
    places = list(range(len(numbers)))
    random.shuffle(places)
    return [numbers[place] for place in sorted(places[:count])]


class DamsmText(nn.Module):
    """Embedding, dropout and a bidirectional LSTM over a caption's words.

    The published programs draw other words of a long caption at each visit; here one cut is drawn for each seed and
    caption, and kept, so that sentences can be computed once.

    Args:
        words: of a longer caption so many words are read.
        seed: of which they are.
    """

    embedding_dim = 2 * HIDDEN

    def __init__(self, vocabulary: Vocabulary, words: int = 18, seed: int = 0):
        super().__init__()
        self.vocabulary, self.words, self.seed = vocabulary, words, seed
        self.encoder = nn.Embedding(len(vocabulary), EMBEDDING)  # these two names are those of the published files
        self.rnn = nn.LSTM(EMBEDDING, HIDDEN, batch_first=True, bidirectional=True)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)

    @property
    def limit(self) -> str:
        """How long a caption it reads, in words."""
        return f"{self.words} words that text.words lets DAMSM read"

    @cached_property
    def identity(self) -> dict:
        """Which encoder this is: the size of its vocabulary, and a checksum of that and of the weights."""
        digest = hashlib.sha256("\n".join(self.vocabulary.words).encode(errors="surrogatepass"))
        for key, value in sorted(self.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.cpu().contiguous().numpy())
        return {"encoder": "damsm", "vocabulary": len(self.vocabulary), "checksum": digest.hexdigest()}

    def add_to(self, digest) -> None:
        """Add all that its sentences depend on, besides the captions, to a hash of hashlib."""
        digest.update(f"{self.identity} {self.words} {self.seed}".encode())

    def tokenize(self, captions: Sequence[str], whole: bool = False) -> Tensor:
        """Captions -> numbers of their known words (B, T), int64, 0 after the end; T is the longest one's length.
        Without `whole` at most `words` of each."""
        rows = [self._cut(caption) for caption in captions] if not whole else list(map(self.vocabulary, captions))
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for row, numbers in zip(tokens, rows, strict=True):
            row[: len(numbers)] = torch.tensor(numbers)
        return tokens

    def _cut(self, caption: str) -> list[int]:
        numbers = self.vocabulary(caption)
        if len(numbers) <= self.words:
            return numbers
        own = zlib.crc32(caption.encode(errors="surrogatepass"))
        return drawn(numbers, self.words, np.random.RandomState([self.seed % 2**32, own]))

    def cut(self, captions: Sequence[str], whole: bool = False) -> list[int]:
        """Numbers of the captions of which `tokenize` leaves something out for their length."""
        return [n for n, caption in enumerate(captions) if not whole and len(self.vocabulary(caption)) > self.words]

    def check(self, captions: Sequence[str], place: Callable[[int], str]) -> None:
        """Raise a UserError where a caption has no known word; `place` says where caption n is."""
        unknown = [number for number, caption in enumerate(captions) if not self.vocabulary(caption)]
        if unknown:
            more = f" ({len(unknown):,} such captions)" if len(unknown) > 1 else ""
            raise UserError(
                f"{place(unknown[0])}: {captions[unknown[0]]!r} has no word that {self.vocabulary.source} knows{more}; "
                "mend it, or take text.encoder=clip, which reads any"
            )

    def encode(self, tokens: Tensor) -> Tensor:
        """Token ids of `tokenize` -> sentences (B, 256), on the encoder's device."""
        return self.text(devices.send(tokens, self.encoder.weight.device))[0]

    def text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, T), 0 after the end, each with a word at least -> sentences (B, 256), words (B, 256, T).

        A sentence is the last state of the forward direction and of the backward one, which begins at the caption's
        last word; words are the states at each, zero after the end.
        """
        real = tokens.ne(0)
        lengths, count = real.sum(1, keepdim=True), tokens.shape[1]
        embedded = F.dropout(self.encoder(tokens), DROPOUT, self.training)  # (B, T, 300)
        # Packed sequences want lengths that the host knows, for which it would wait. So: captions that begin together
        # for the forward direction, and captions that end together for the backward one.
        places = torch.arange(count, device=tokens.device)
        late, early = ((places + sign * (count - lengths)) % count for sign in (-1, 1))  # (B, T)
        states, _ = self.rnn(torch.cat([embedded, embedded.take_along_dim(late[:, :, None], 1)]))  # (2 B, T, 256)
        forward, backward = states[: len(tokens), :, :HIDDEN], states[len(tokens) :, :, HIDDEN:]
        backward = backward.take_along_dim(early[:, :, None], 1)
        last = forward.take_along_dim(lengths[:, :, None] - 1, 1)[:, 0]
        words = torch.cat([forward, backward], dim=2) * real[:, :, None]  # (B, T, 256)
        return torch.cat([last, backward[:, 0]], dim=1), words.transpose(1, 2)


def load_damsm(weights: str | None, vocabulary: str | None, data: Path, words: int = 18, seed: int = 0) -> DamsmText:
    """A pretrained text encoder, frozen, on the CPU.

    Args:
        weights: a file of pretrain.sh, which holds the vocabulary too; or a published text_encoder*.pth.
        vocabulary: its captions.pickle. None: that of `weights`, else the one in the folder `data`.
        words, seed: as DamsmText takes them.

    Raises:
        UserError: a missing file, something else, or two that do not belong together.
    """
    if weights is None or not Path(weights).is_file():
        missing = f"no file {full(weights)} (text.weights)" if weights else "text.weights names no file"
        raise UserError(f"text.encoder=damsm: {missing}; {BELONG}; text.encoder=clip needs none")
    content = checkpoint.read(weights)
    if "vocabulary" in content:
        if vocabulary is not None:
            raise UserError(f"text.vocabulary: {weights} holds its own vocabulary; leave {vocabulary} out")
        known, content = Vocabulary(content["vocabulary"], str(weights)), content["text"]
    else:
        known = Vocabulary.read(_vocabulary_file(vocabulary, data, weights))
    content = tensors(str(weights), content)
    count = len(need(content, "encoder.weight", str(weights), 2))
    if count != len(known):
        raise UserError(
            f"text.weights: {weights} knows {count:,} words, and text.vocabulary: {known.source} has {len(known):,}: "
            f"they do not belong together; {BELONG}"
        )
    encoder = DamsmText(known, words, seed)
    fill(encoder, content, str, str(weights), re.compile("(?!)"))
    return encoder.requires_grad_(False)


def _vocabulary_file(named: str | None, data: Path, weights: str) -> Path:
    places = [Path(named)] if named else [data / name for name in PUBLISHED]
    for place in places:
        if place.is_file():
            return place
    looked = " or ".join(str(full(place)) for place in places)
    raise UserError(
        f"text.encoder=damsm: no file {looked} (text.vocabulary) for the encoder {weights}; {BELONG}; "
        "text.encoder=clip needs none"
    )


def require_same(encoder: DamsmText, then: Mapping, what: str) -> None:
    """Refuse another encoder than the one whose `identity` the checkpoint `what` has stored."""
    if then.get("checksum") != encoder.identity["checksum"]:
        sizes = f"of {then.get('vocabulary')} words, here {len(encoder.vocabulary)}"
        raise UserError(
            f"{what} was trained with another text encoder or vocabulary ({sizes}): set text.weights and "
            "text.vocabulary to that pair"
        )
