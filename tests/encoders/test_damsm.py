"""DAMSM's text encoder and vocabulary against the released numbers, its files, and what scores and generators read."""

import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY_RUN, relative_error, released_weights
from torch import nn

from ratlip import build, config, drawing
from ratlip.data.captions import CaptionTable, embed
from ratlip.data.inventory import usable_items
from ratlip.encoders import damsm
from ratlip.encoders.damsm import DamsmText, Vocabulary, drawn, load_damsm, words_of
from ratlip.errors import UserError
from ratlip.evaluation import Evaluator, Scorer
from ratlip.sampling import embed_captions
from ratlip.text import read_captions

COLOURS = ["red", "green", "blue", "a", "bird", "with", "wings"]


@pytest.fixture(scope="module")
def dfgan() -> dict[str, np.ndarray]:
    return dict(np.load(ROOT / "tests/data/dfgan/fixtures.npz"))


@pytest.fixture(scope="module")
def attngan() -> dict[str, np.ndarray]:
    return dict(np.load(ROOT / "tests/data/attngan/fixtures.npz"))


def write_vocabulary(path: Path, words: list[str]) -> Path:
    """A captions.pickle of these words, as AttnGAN and DF-GAN write it."""
    content = [[[1, 2]], [[1]], dict(enumerate(words)), {word: number for number, word in enumerate(words)}]
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, Path]:
    """A text encoder's file of the time, not zipped, with the fixtures' weights, and a vocabulary of its size."""
    folder = tmp_path_factory.mktemp("damsm")
    weights = folder / "text_encoder200.pth"
    torch.save(released_weights("damsm.text"), weights, _use_new_zipfile_serialization=False)
    words = ["<end>", *(f"word{number}" for number in range(1, 5450))]
    return weights, write_vocabulary(folder / "captions.pickle", words)


@pytest.fixture
def small(tmp_path) -> Path:
    """A small encoder and its vocabulary in one file."""
    torch.manual_seed(3)
    words = ["<end>", *COLOURS]
    path = tmp_path / "pair.pth"
    torch.save({"vocabulary": words, "text": DamsmText(Vocabulary(words)).state_dict()}, path)
    return path


@torch.no_grad()
def test_published_files_answer_as_released(published, dfgan, attngan):
    encoder = load_damsm(str(published[0]), str(published[1]), Path("nowhere"))
    ids = torch.from_numpy(dfgan["txt.ids"].astype(np.int64))
    sentences, words = encoder.text(ids)
    assert words.shape == (5, 256, 18) and not encoder.training
    assert relative_error(sentences, dfgan["txt.sent"]) < 1e-5
    assert relative_error(torch.cat([words[:, :16], words[:, 128:144]], dim=1), dfgan["txt.words"]) < 1e-5
    assert torch.equal(words[1, :, 7:], torch.zeros(256, 11))
    for row, length in enumerate([18, 7, 7, 1, 12]):  # none depends on its neighbours
        assert relative_error(encoder.text(ids[row : row + 1, :length])[1], words[row : row + 1, :, :length]) < 1e-5
    assert torch.equal(encoder.tokenize(["word2999 unheard word1329"]), ids[:1, :2])

    random = np.random.RandomState(zlib.crc32(b"developers:input.tokens"))
    tokens = torch.from_numpy(random.randint(1, 5450, (3, 7)))
    for row, length in enumerate([7, 5, 2]):
        tokens[row, length:] = 0
    sentences, words = encoder.double().text(tokens)
    assert relative_error(sentences, attngan["text.sent"]) < 1e-6
    assert relative_error(words, attngan["text.words"]) < 1e-6


def rows(ids: np.ndarray) -> list[list[int]]:
    return [row[row >= 0].tolist() for row in ids]


def test_words_numbers_and_cuts_are_the_released_ones(dfgan):
    def captions(files: np.ndarray) -> list[str]:
        """Of each file the first three captions with a word."""
        read = [[line for line in read_captions(file.encode()) if words_of(line)][:3] for file in files.tolist()]
        return [caption for own in read for caption in own]

    train, test = captions(dfgan["tok.train"]), captions(dfgan["tok.test"])
    vocabulary = Vocabulary.of([*train, *test])
    assert vocabulary.words == dfgan["tok.words"].tolist()
    assert [vocabulary(caption) for caption in train] == rows(dfgan["tok.train.ids"])
    assert [vocabulary(caption) for caption in test] == rows(dfgan["tok.test.ids"])
    asked = [line for line in dfgan["tok.sample"].item().split("\n") if words_of(line)]
    assert [vocabulary(line) for line in asked] == rows(dfgan["tok.sample.ids"])
    random = np.random.RandomState(int(dfgan["tok.cut.seed"]))
    assert drawn(range(101, 126), 18, random) == dfgan["tok.cut.ids"].tolist()
    sentence = "The bird's wing isn't blue-grey, 3 cafés"
    assert words_of(sentence) == ["the", "bird", "s", "wing", "isn", "t", "blue", "grey", "3", "cafs"]


def test_a_vocabulary_of_python_2(tmp_path):
    """Byte strings, read as Latin-1; and nothing but plain containers."""
    path = tmp_path / "captions.pickle"
    words = b"(K\x00U\x05<end>K\x01U\x04caf\xe9u"
    path.write_bytes(b"\x80\x02](]]}" + words + b"}(U\x05<end>K\x00U\x04caf\xe9K\x01ue.")
    assert Vocabulary.read(path).words == ["<end>", "café"]
    path.write_bytes(pickle.dumps([[], [], {0: "<end>", 1: Path("run")}, {}]))
    with pytest.raises(UserError, match=r"captions.pickle: no pickle of plain .* refused: it asks for pathlib"):
        Vocabulary.read(path)


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", pickle.dumps({}), pickle.dumps([1, 2]), pickle.dumps([[], [], {0: "a", 2: "b"}, {}]),
                pickle.dumps([[], [], {0: "<end>", 1: 5}, {}]), pickle.dumps([[], [], {0: "<end>"}, {}])]
)  # fmt: skip
def test_what_is_no_vocabulary_is_named(tmp_path, content):
    (tmp_path / "captions.pickle").write_bytes(content)
    with pytest.raises(UserError, match=r"captions.pickle: no "):
        Vocabulary.read(tmp_path / "captions.pickle")


def test_wrong_and_missing_pairs_are_named(published, small, tmp_path):
    weights, vocabulary = map(str, published)
    other = str(write_vocabulary(tmp_path / "other.pickle", ["<end>", "a", "b"]))
    image = tmp_path / "image_encoder200.pth"
    torch.save({"emb_features.weight": torch.zeros(256, 768, 1, 1)}, image)
    incomplete = tmp_path / "incomplete.pth"
    torch.save({"encoder.weight": torch.zeros(3, 300)}, incomplete)
    cases = {
        (None, None): ("text.weights names no file", "pretrain.sh", "text.encoder=clip"),
        ("nothing.pth", None): ("nothing.pth (text.weights)", "captions_DAMSM.pickle", "text.encoder=clip"),
        (weights, None): ("captions_DAMSM.pickle or ", weights, "text.encoder=clip"),
        (weights, "nothing.pickle"): ("nothing.pickle (text.vocabulary)", "text.encoder=clip"),
        (weights, other): (weights, "5,450", other, "has 3", "do not belong together", "text_encoder200.pth (birds)"),
        (str(image), vocabulary): (str(image), "no encoder.weight"),
        (str(incomplete), other): (str(incomplete), "no rnn.weight_ih_l0"),
        (str(small), other): ("holds its own vocabulary", other),
    }
    for asked, parts in cases.items():
        with pytest.raises(UserError) as caught:
            load_damsm(*asked, tmp_path)
        assert all(part in str(caught.value) for part in parts), (asked, str(caught.value))
    write_vocabulary(tmp_path / "captions.pickle", ["<end>", *(f"word{number}" for number in range(1, 5450))])
    assert load_damsm(weights, None, tmp_path).vocabulary.source == str(tmp_path / "captions.pickle")


def test_a_long_caption_keeps_its_cut(small):
    encoder, other = (load_damsm(str(small), None, Path("."), words=4, seed=seed) for seed in (1, 2))
    texts = ["a red bird", *(f"{a} bird with {b} wings a {c}" for a in COLOURS for b in COLOURS for c in COLOURS)]
    tokens, whole = encoder.tokenize(texts), encoder.tokenize(texts, whole=True)
    assert tokens.shape[1] == 4 and whole.shape[1] == 7
    assert encoder.cut(texts) == list(range(1, len(texts))) and encoder.cut(texts, whole=True) == []
    assert torch.equal(tokens, encoder.tokenize(texts)) and torch.equal(tokens[5:6], encoder.tokenize(texts[5:6]))
    assert not torch.equal(tokens, other.tokenize(texts))
    assert encoder.tokenize(["red green unheard blue"]).tolist() == [[1, 2, 3]]
    kept = torch.zeros(7)  # how often each place of a caption is kept: all as often
    for text, row in zip(texts[1:], tokens[1:], strict=True):
        if len(set(text.split())) == 7:
            kept[[encoder.vocabulary(text).index(number) for number in row.tolist()]] += 1
    assert kept.sum() > 0 and (kept / kept.sum() * 7 - 1).abs().max() < 0.6


def test_the_cache_tells_encoders_vocabularies_and_cuts_apart(small, small_clip, tmp_path):
    table, cache = CaptionTable([["a red bird", "a blue bird with green wings"], ["a green bird"]]), tmp_path / "cache"
    pairs = [load_damsm(str(small), None, tmp_path, words, seed) for words, seed in ((18, 0), (4, 0), (4, 1))]
    renamed = load_damsm(str(small), None, tmp_path)
    renamed.vocabulary = Vocabulary(["<end>", *reversed(COLOURS)])
    moved = load_damsm(str(small), None, tmp_path)
    with torch.no_grad():
        moved.rnn.bias_hh_l0[0] += 1
    for count, encoder in enumerate([*pairs, renamed, moved, small_clip], 1):
        found = embed(table, encoder, cache)
        assert found.shape == (3, encoder.embedding_dim) and len(list(cache.iterdir())) == count
        assert torch.equal(found, embed(table, encoder, cache)) and torch.equal(found, embed(table, encoder))
        expected = encoder.encode(encoder.tokenize(table.texts[2:]))
        assert relative_error(found[2:], expected) < 1e-5
    embed(table, pairs[1])
    assert table.cut == [1]


def test_a_caption_without_a_known_word_is_named(small, data_words, demo_folder, tmp_path):
    encoder = load_damsm(str(small), None, tmp_path)
    items = usable_items(config.load(*_split(data_words(demo_folder))), "test")
    table = CaptionTable([item.captions for item in items])
    table.texts[4] = "un oiseau"
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(UserError, match=rf"{items[1].image}, caption 2: 'un oiseau' has no word that .*pair.pth"):
            embed(table, encoder, cache, items)
    with pytest.raises(UserError, match="caption 2: '!' has no word"):
        embed_captions(encoder, ["a red bird", "!"])
    order = drawing.given(["a red bird", "un oiseau"], 1, 0)
    with pytest.raises(UserError, match=r"caption 2: 'un oiseau' has no word .*text.encoder=clip"):
        drawing.check_captions(order, encoder)
    drawing.check_captions(
        drawing.given([" ".join(COLOURS * 5)], 1, 0), encoder
    )  # read whole, as DF-GAN's sampler does


def _split(words: list[str]) -> tuple[str, list[str]]:
    return words[0], words[1:]


class Echo(nn.Module):
    """A generator that paints its sentence's first numbers, and keeps what it was given."""

    noise_dim, sizes = 2, [16]

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, noise: torch.Tensor, sentence: torch.Tensor) -> torch.Tensor:
        self.seen.append(sentence)
        return sentence[:, :3, None, None].expand(-1, -1, 16, 16)


def test_damsm_conditions_and_clip_judges(demo_folder, data_words, tmp_path):
    made = config.load(*_split(data_words(demo_folder, "eval.metrics=[clip_score]", *TINY_RUN)))
    items = usable_items(made, "test")
    clip = build.clip_of(made)
    assert build.text_encoder_of(made, clip) is clip
    vocabulary = Vocabulary.of(caption for item in items for caption in item.captions)
    torch.manual_seed(0)
    torch.save({"vocabulary": vocabulary.words, "text": DamsmText(vocabulary).state_dict()}, tmp_path / "p.pth")
    made.text.update(encoder="damsm", weights=str(tmp_path / "p.pth"), words=5)
    made.train.seed = 4
    encoder = build.text_encoder_of(made, clip)
    assert (encoder.words, encoder.seed) == (5, 4)
    generator = Echo()
    evaluator = Evaluator(Scorer(made, clip, items), items, encoder=encoder)
    score = evaluator(generator)["clip_score"]
    first = [item.captions[0] for item in items]
    sentences = encoder.encode(encoder.tokenize(first))
    assert relative_error(generator.seen[0][: len(items)], sentences) < 1e-5
    with torch.no_grad():
        seen = clip.image(generator(None, sentences).clamp(-1, 1))[1]
        expected = torch.cosine_similarity(seen, clip.encode(clip.tokenize(first))).mean()
    assert score == pytest.approx(100 * float(expected), abs=1e-3)

    order = drawing.given(first[:2], 1, 0)
    record = drawing.record_of(order, generator, clip, encoder, "fp32")
    assert record["text"] == repr(encoder.identity) and "text" not in drawing.record_of(
        order, generator, clip, clip, "fp32"
    )
    folder, _ = drawing.claim(tmp_path / "pictures", record)
    assert drawing.draw_into(folder, order, generator, encoder, "fp32", 4) is None
    assert relative_error(generator.seen[-1][:2], encoder.encode(encoder.tokenize(first[:2], whole=True))) < 1e-5


def test_another_encoder_than_a_checkpoint_was_trained_with(small, tmp_path):
    encoder = load_damsm(str(small), None, tmp_path)
    damsm.require_same(encoder, encoder.identity, "x.pth")
    with pytest.raises(UserError, match="x.pth was trained with another text encoder .*of 9 words, here 8"):
        damsm.require_same(encoder, {**encoder.identity, "vocabulary": 9, "checksum": "0"}, "x.pth")
