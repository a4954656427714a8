"""Configuration: defaults, overrides, and messages for everything that can be wrong in a file or word."""

import re
from contextlib import suppress

import pytest
import yaml

from ratlip import config
from ratlip.errors import UserError
from ratlip.paths import ROOT, full


@pytest.fixture
def write(tmp_path):
    def write(text: str):
        path = tmp_path / "mine.yml"
        path.write_text(text)
        return path

    return write


def test_every_shipped_configuration_loads():
    for path in config.DEFAULT.parent.glob("*.yml"):
        assert config.load(path).name == path.stem


def test_published_bird_settings():
    bird = config.load(config.DEFAULT.parent / "bird.yml")
    assert (bird.model.imsize, bird.model.nf, bird.model.z_dim) == (256, 64, 100)
    assert (bird.train.lr_g, bird.train.lr_d, bird.train.sim_w) == (1e-4, 4e-4, 4.0)
    assert (bird.train.beta1, bird.train.beta2) == (0.0, 0.9)
    assert (bird.train.batch_size, bird.train.max_epoch, bird.train.seed) == (64, 1500, 100)
    assert (bird.log.test_interval, bird.eval.sample_times) == (20, 12)


def test_words_are_stronger_than_the_file_and_the_file_than_the_defaults(write):
    path = write("train: {batch_size: 8, lr_g: 1e-3}\nmodel:\n  rat: {state: independent}\n")
    loaded = config.load(path, ["train.batch_size=32", "eval.metrics=[fd_clip]", "clip.feature_blocks=[0, 2]"])
    assert loaded.train.batch_size == 32
    assert loaded.train.lr_g == 1e-3
    assert loaded.model.rat.state == "independent" and loaded.model.rat.scope == "mapper"
    assert list(loaded.eval.metrics) == ["fd_clip"] and list(loaded.clip.feature_blocks) == [0, 2]


def test_the_saved_copy_loads_to_the_same(write, tmp_path):
    first = config.load(write("train: {seed: 3}"), ["clip.feature_blocks=[0, 1]"])
    second = config.load(write(config.dump(first)))
    assert config.settings_of(first) == config.settings_of(second)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {batchsize: 8}", "unknown key 'train.batchsize'; did you mean 'train.batch_size'"),
        ("batch_size: 8", "unknown key 'batch_size'; did you mean 'train.batch_size'"),
        ("xyzzy: 8", "unknown key 'xyzzy'; cfg/default.yml lists all keys"),
        ("train: {batch_size: many}", "train.batch_size must be of type int, not 'many'"),
        ("train: {batch_size: true}", "train.batch_size must be of type int, not True"),
        ("train: {batch_size: 0}", "train.batch_size must be a number of at least 2, not 0"),
        ("train: {lr_g: fast}", "train.lr_g must be of type float, not 'fast'"),
        ("train: {lr_g: .nan}", "train.lr_g must be a number of at least 0.0, not nan"),
        ("train: {ema: 1.0}", "train.ema must be at least 0 and below 1, not 1.0"),
        ("model: {imsize: 100}", "model.imsize must be 4 * 2^k"),
        ("model: {nf: 20}", "model.nf must be a multiple of 16"),
        ("model: {rat: {state: both}}", "model.rat.state must be one of shared, independent"),
        ("data: {flip: 1}", "data.flip must be of type bool, not 1"),
        ("train: null", "unknown key 'train'"),
        ("train: {batch_size: 8", "line 1: not valid YAML"),
        ("- a list", "holds a list"),
    ],
)
def test_what_is_wrong_is_named(write, text, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        config.load(write(text))
    assert "mine.yml" in str(caught.value)


def test_a_released_flat_file_runs_unchanged(write, capsys):
    path = write(
        "CONFIG_NAME: 'GALIP'\ndataset_name: 'birds'\ndata_dir: '../data/birds'\nimsize: 256\nz_dim: 100\n"
        "cond_dim: 512\nmanual_seed: 100\ncuda: True\nclip4trn: {src: clip, type: ViT-B/32}\n"
        "clip4text: {src: clip, type: ViT-B/32}\nstate_epoch: 1\nmax_epoch: 1500\nbatch_size: 32\nnf: 64\n"
        "lr_g: 0.0001\nlr_d: 0.0004\nsim_w: 4.0\ntest_interval: 20\nsample_times: 12\nnpz_path: x.npz\n"
    )
    loaded = config.load(path, ["train.max_epoch=3"])
    assert (loaded.model.name, loaded.data.layout, loaded.data.dir) == ("galip", "bird", "../data/birds")
    assert (loaded.model.imsize, loaded.model.nf, loaded.clip.weights) == (256, 64, "ViT-B/32")
    assert (loaded.train.batch_size, loaded.train.max_epoch, loaded.train.device) == (32, 3, "auto")
    assert loaded.eval.released_npz == "x.npz"
    (line,) = capsys.readouterr().out.splitlines()
    assert "read as a released GALIP" in line and line.endswith("cond_dim, clip4text, state_epoch")
    with pytest.raises(UserError, match="train.batch_size must be of type int, not 'many'"):
        config.load(write("dataset_name: birds\nbatch_size: many"))
    with pytest.raises(UserError, match="data.layout must be one of .*, not 'cifar'"):
        config.load(write("dataset_name: CIFAR"))


def test_a_released_folder_is_meant_from_the_code_folder(write, tmp_path, monkeypatch):
    path = write("dataset_name: birds\ndata_dir: ../data/birds\n")
    monkeypatch.setattr(config, "ROOT", tmp_path / "here")
    assert full(config.load(path).data.dir) == tmp_path / "data/birds"
    (tmp_path / "here/code").mkdir(parents=True)
    (tmp_path / "here/data/birds").mkdir(parents=True)
    assert full(config.load(path).data.dir) == tmp_path / "here/data/birds"
    (tmp_path / "data/birds").mkdir(parents=True)
    assert full(config.load(path).data.dir) == tmp_path / "data/birds"  # a folder as it stands


def test_image_sizes(write):
    accepted = []
    for size in range(1, 1025):
        with suppress(UserError):
            accepted.append(config.load(write(""), [f"model.imsize={size}"]).model.imsize)
    assert accepted == [8, 16, 32, 64, 128, 224, 256, 512, 1024]


def test_wrong_words_and_files(write):
    with pytest.raises(UserError, match="expected key=value"):
        config.load(write(""), ["train.batch_size"])
    with pytest.raises(UserError, match="'train.seeds=1': unknown key 'train.seeds'; did you mean 'train.seed'"):
        config.load(write(""), ["train.seeds=1"])
    with pytest.raises(UserError, match=rf"no configuration file {ROOT}/cfg/brid.yml; cfg/ has bird.yml"):
        config.load("cfg/brid.yml")


def test_default_file_comments_every_key():
    for line in config.DEFAULT.read_text().splitlines():
        key, _, rest = line.partition(":")
        has_value = rest.split("#")[0].strip()
        assert not has_value or "#" in rest or key.strip() == "beta2", line
    assert yaml.safe_load(config.DEFAULT.read_text())
