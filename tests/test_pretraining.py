"""DAMSM pretraining: the released step, runs from beginning to end, and what they leave behind."""

import json
import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from easydict import EasyDict
from helpers import assert_refused, family_fixtures, fixture_picture, relative_error, released_weights
from test_gpu import NeverWait

from ratlip import checkpoint, config
from ratlip.data.layouts import read_classes
from ratlip.data.loader import Batch
from ratlip.encoders import damsm
from ratlip.encoders.clip_towers import load_clip
from ratlip.encoders.damsm import DamsmText, Vocabulary, load_damsm
from ratlip.encoders.damsm_image import DamsmInception, load_damsm_image
from ratlip.errors import UserError
from ratlip.pretraining import Pretraining, learning_rate, prepare, pretraining_step, restore, save

SETTINGS = EasyDict(lr=0.002, clip_grad=0.25)
SMALL = ("damsm.image_encoder=clip", "damsm.max_epoch=2", "damsm.batch_size=4", "log.test_interval=1")


@pytest.fixture(scope="module")
def released() -> tuple[Pretraining, Batch]:
    """Both encoders with the fixtures' weights in float64, and the fixtures' batch."""
    text, image = DamsmText(Vocabulary([str(number) for number in range(5450)])), DamsmInception()
    text.load_state_dict(released_weights("damsm.text"))
    image.load_state_dict({**image.state_dict(), **released_weights("damsm.image")})
    tokens = torch.from_numpy(np.random.RandomState(zlib.crc32(b"developers:input.tokens")).randint(1, 5450, (3, 7)))
    tokens[1, 5:], tokens[2, 2:] = 0, 0
    classes, rows = torch.tensor([4, 9, 4]), torch.arange(3)
    t = Pretraining(SETTINGS, 0, text.double().train(), image.double().train(), tokens, classes, "fp32", 5)
    return t, Batch(fixture_picture("real256", 3, 256).double(), rows, rows)


def test_a_step_is_the_released_one(released, monkeypatch):
    monkeypatch.setattr(damsm, "DROPOUT", 0.0)
    answers, (t, batch) = family_fixtures("attngan"), released
    norms = []

    def note(*_) -> None:
        names = (t.text.encoder, t.image.emb_features, t.image.emb_cnn_code)
        norms.extend([*(module.weight.grad.norm() for module in names), t.image.emb_cnn_code.bias.grad.norm()])

    t.optimizer.register_step_pre_hook(note)
    before = t.image.Mixed_5b.branch1x1.bn.running_mean.clone(), t.image.Mixed_5b.branch1x1.conv.weight.clone()
    logged = pretraining_step(t, batch)
    found = torch.stack([logged[f"loss_damsm/{name}"] for name in ("w0", "w1", "s0", "s1")])
    assert relative_error(found, answers["pretrain.loss"]) < 1e-5
    for value, expected in zip([logged["gradient_norm/text"], *norms], answers["pretrain.grad"], strict=True):
        assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert not torch.equal(t.image.Mixed_5b.branch1x1.bn.running_mean, before[0])  # the trunk's statistics move alone
    assert torch.equal(t.image.Mixed_5b.branch1x1.conv.weight, before[1])


def test_a_step_that_is_not_finite_changes_nothing(released):
    t, batch = released

    def state() -> list[torch.Tensor]:
        moments = [value for own in t.optimizer.state.values() for value in own.values()]
        return [value.clone() for value in (*t.text.state_dict().values(), *t.image.state_dict().values(), *moments)]

    before = state()
    broken = batch.images.clone()
    broken[1, 0, 5, 5] = torch.nan
    bad_steps = int(t.guard.bad_steps)
    assert int(pretraining_step(t, batch._replace(images=broken))["bad_steps"]) == bad_steps + 1
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))


def test_the_rate_falls_114_times_and_moments_begin_anew(small_pretraining):
    rates = [learning_rate(0.002, epoch) for epoch in range(200)]
    assert rates[1] == 0.002 * 0.98 and rates[113] > 0.0002 > rates[114] == rates[199]
    t, batch = small_pretraining
    for step, count in enumerate([1, 2, 3, 1, 2]):
        logged = pretraining_step(t, batch)
        assert float(logged["learning_rate/damsm"]) == pytest.approx(0.002 * 0.98 ** (step // 3))
        assert {int(own["step"]) for own in t.optimizer.state.values()} == {count}


def test_no_host_waits_in_a_step(small_pretraining):
    t, batch = small_pretraining
    pretraining_step(t, batch)
    with NeverWait():
        logged = pretraining_step(t, batch)
    assert all(torch.isfinite(value) for value in logged.values())


@pytest.fixture
def words(data_words, demo_folder):
    """words(*more): a small pretraining on the small CLIP."""
    return lambda *more: data_words(demo_folder, *SMALL, *more)


@pytest.fixture
def small_pretraining(words) -> tuple[Pretraining, Batch]:
    path, *overrides = words()
    t, _, batches, loader, _ = prepare(config.load(path, overrides))
    batches.epoch = 0
    return t, next(iter(loader))


def newest(tmp_path: Path) -> Path:
    return max((tmp_path / "saved/damsm/mine").iterdir(), key=lambda folder: folder.stat().st_mtime_ns)


def test_a_run_leaves_a_pair_that_is_read_as_it_is(words, call, clip_file, tmp_path):
    result = call("pretrain.py", *words())
    assert result.returncode == 0, result.stderr
    assert "12 training images" in result.stdout and "r_at_1" in result.stdout
    pair = newest(tmp_path) / "best.pth"
    assert f"text.encoder=damsm text.weights={pair}" in result.stdout
    (logs,) = (tmp_path / "logs/damsm/mine").iterdir()
    scores = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in scores] == [0, 1, 2] and len(list((logs / "grids").iterdir())) >= 2
    content = checkpoint.read(pair)
    best = min(scores, key=lambda line: line["loss"])
    assert content["scores"]["best"]["loss"] == best["loss"] and content["epoch"] == best["epoch"]

    encoder, clip = load_damsm(str(pair), None, tmp_path), load_clip(str(clip_file))
    text = encoder.vocabulary.words[1:4]
    assert encoder.encode(encoder.tokenize([" ".join(text)])).shape == (1, 256)
    assert load_damsm_image(str(pair), clip)(torch.zeros(1, 3, 64, 64))[0].shape == (1, 256, 4, 4)
    assert_refused(
        call("sample.py", words()[0], "a red star", "--checkpoint", pair), "best.pth holds no generator", "pretrain.sh"
    )


def test_a_generator_reads_the_pair(words, call, tmp_path):
    """Pretrained, trained, gone on with, drawn and scored; and not with another pair."""
    assert call("pretrain.py", *words("damsm.max_epoch=1")).returncode == 0
    pair, (path, *more) = newest(tmp_path) / "best.pth", words("model.name=dfgan")
    unread = ("model.d_channels", "clip.feature_blocks", "damsm", "eval.metrics")
    more = [word for word in more if not word.startswith(unread)] + ["eval.metrics=[clip_score]", "model.imsize=32"]
    damsm_words = ("text.encoder=damsm", f"text.weights={pair}")
    for script, own in (
        ("train.py", [*more, *damsm_words]),
        ("train.py", [*more, "train.resume=auto", "train.max_epoch=2"]),
        ("test.py", [*more, *damsm_words]),
        ("sample.py", [*more, *damsm_words, "a small red star", "--n", 1, "--out", tmp_path / "drawn"]),
    ):
        result = call(script, path, *own)
        assert result.returncode == 0, (script, result.stderr)
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 1

    content = checkpoint.read(pair)
    content["text"]["rnn.bias_hh_l0"] += 0.1
    checkpoint.save(content, tmp_path / "other.pth")
    asked = (*more, "text.encoder=damsm", f"text.weights={tmp_path}/other.pth")
    assert_refused(call("test.py", path, *asked), "was trained with another text encoder or vocabulary")
    unknown = call("sample.py", path, *more, *damsm_words, "xylophone", "--n", 1)
    assert_refused(unknown, "caption 1: 'xylophone' has no word that", "best.pth knows")


def test_a_stopped_run_goes_on_as_if_it_had_not_been(words, call, tmp_path):
    whole = call("pretrain.py", *words("run=whole"))
    first = call("pretrain.py", *words("run=parts", "damsm.max_epoch=1"))
    again = call("pretrain.py", *words("run=parts", "train.resume=auto"))
    assert whole.returncode == first.returncode == again.returncode == 0, again.stderr
    assert "going on from" in again.stdout
    ends = [checkpoint.read(tmp_path / f"saved/damsm/mine/{name}/state_epoch_002.pth") for name in ("whole", "parts")]
    for part in ("text", "image"):
        assert all(torch.equal(value, ends[1][part][key]) for key, value in ends[0][part].items())
    assert ends[0]["scores"]["end"]["loss"] == ends[1]["scores"]["end"]["loss"]


def test_in_the_midst_of_an_epoch_too(words, tmp_path):
    path, *overrides = words()

    def begin() -> tuple[Pretraining, list[Batch]]:
        t, _, batches, loader, _ = prepare(config.load(path, overrides))
        batches.epoch = 0
        return t, list(loader)

    t, batches = begin()
    for batch in batches[:2]:
        pretraining_step(t, batch)
    save(t, config.load(path, overrides), {}, tmp_path / "two.pth")
    pretraining_step(t, batches[2])
    other, _ = begin()
    restore(other, checkpoint.read(tmp_path / "two.pth"), place=True)
    pretraining_step(other, batches[2])
    for name, network in t.networks.items():
        assert all(torch.equal(v, other.networks[name].state_dict()[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (("damsm.image_encoder=inception", "eval.inception_released_weights=nothing.pth"),
         ("nothing.pth", "inception_v3_google", "damsm.image_encoder=clip")),
        (("damsm.batch_size=13",), ("damsm.batch_size: 13", "12 training images")),
        (("damsm.image_encoder=resnet",), ("damsm.image_encoder must be one of inception, clip",)),
    ],
)  # fmt: skip
def test_mistakes_are_named(words, call, more, parts):
    assert_refused(call("pretrain.py", *words(*more)), *parts)


def test_what_does_not_belong_to_a_run_is_refused(small_pretraining, tmp_path):
    t, _ = small_pretraining
    save(t, config.load("cfg/demo.yml"), {}, tmp_path / "some.pth")
    content = checkpoint.read(tmp_path / "some.pth")
    for changed, part in (
        ({"vocabulary": ["<end>", "a"]}, "other words than these captions"),
        ({"epoch_steps": 4}, "an epoch has 3 steps now"),
        ({"image": {**content["image"], "fc": 1}}, "damsm.image_encoder is not the checkpoint's"),
    ):
        with pytest.raises(UserError, match=part):
            restore(t, {**content, **changed}, place=True)
    with pytest.raises(UserError, match="none of pretrain.sh"):
        restore(t, {"format": checkpoint.FORMAT}, place=True)


def test_a_caption_without_words_is_named(words, call, demo_folder, tmp_path):
    shutil.copytree(demo_folder, tmp_path / "own")
    (tmp_path / "own/text/train/3.txt").write_text("a star\n...\n")
    assert_refused(call("pretrain.py", *words(f"data.dir={tmp_path}/own")), "train/3.png, caption 2", "'...'")


@pytest.mark.parametrize("kind", [list, np.array, tuple])
def test_classes_of_pictures(kind, tmp_path):
    (tmp_path / "train").mkdir()
    assert read_classes("bird", tmp_path, "train") == {} == read_classes("folder", tmp_path, "train")
    (tmp_path / "train/filenames.pickle").write_bytes(pickle.dumps(["1/a", "1/b", "2/a"]))
    path = tmp_path / "train/class_info.pickle"
    path.write_bytes(pickle.dumps(kind([7, 7, 9]), protocol=2))
    assert read_classes("bird", tmp_path, "train") == {"1/a": 7, "1/b": 7, "2/a": 9}
    for wrong in ([7, 9], ["x", "y", "z"], 3):
        path.write_bytes(pickle.dumps(wrong))
        with pytest.raises(UserError, match="class_info.pickle: expected a class"):
            read_classes("bird", tmp_path, "train")
