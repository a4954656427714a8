"""Configuration files of DF-GAN and RAT-GAN; tests/test_config.py has GALIP's and RATLIP's."""

import pytest
import yaml

from ratlip import config
from ratlip.errors import UserError
from ratlip.published import translate

DFGAN = """
CONFIG_NAME: 'bird'
dataset_name: 'birds'
data_dir: '../data/birds'
imsize: 256
ch_size: 3
z_dim: 100
cond_dim: 256
manual_seed: 7
max_epoch: 1301
batch_size: 16
truncation: True
trunc_rate: 0.7
sample_times: 10
npz_path: '../data/birds/npz/bird_val256.npz'
checkpoint: '../saved_models/state_epoch_1220.pth'
example_captions: './example_captions/birds.txt'
TEXT: {WORDS_NUM: 17, EMBEDDING_DIM: 256, CAPTIONS_PER_IMAGE: 10, DAMSM_NAME: '../data/birds/text_encoder200.pth'}
"""
RATGAN = """
CONFIG_NAME: 'coco'
DATASET_NAME: 'coco'
DATA_DIR: '../data/coco'
TRAIN: {NF: 32, BATCH_SIZE: 24, MAX_EPOCH: 121, GENERATOR_LR: 0.0002}
TREE: {BRANCH_NUM: 1, BASE_SIZE: 128}
TEXT: {EMBEDDING_DIM: 256, CAPTIONS_PER_IMAGE: 5, DAMSM_NAME: '../data/coco/text_encoder100.pth'}
"""


@pytest.fixture
def load(tmp_path, capsys):
    """load(text): the resolved configuration, and what was printed."""

    def load(text: str, *words: str):
        path = tmp_path / "theirs.yml"
        path.write_text(text)
        return config.load(path, words), capsys.readouterr().out

    return load


def test_dfgans_file(load):
    loaded, printed = load(DFGAN)
    assert (loaded.model.name, loaded.data.layout, loaded.data.dir) == ("dfgan", "bird", "../data/birds")
    assert (loaded.model.imsize, loaded.model.nf, loaded.model.z_dim, loaded.model.noise_scale) == (256, 32, 100, 0.7)
    assert (loaded.train.seed, loaded.train.max_epoch, loaded.train.batch_size) == (7, 1300, 16)
    text = (loaded.text.encoder, loaded.text.weights, loaded.text.words)
    assert text == ("damsm", "../data/birds/text_encoder200.pth", 17)
    assert (loaded.eval.sample_times, loaded.eval.released_npz) == (10, "../data/birds/npz/bird_val256.npz")
    assert loaded.model.shipped == "../saved_models/state_epoch_1220.pth"
    assert "read as a released DF-GAN configuration" in printed
    dropped = "ch_size, cond_dim, example_captions, TEXT.EMBEDDING_DIM, TEXT.CAPTIONS_PER_IMAGE"
    assert printed.strip().endswith(f"no longer of meaning: {dropped}")
    assert load(DFGAN, "train.batch_size=8")[0].train.batch_size == 8


def test_dfgans_file_without_truncation(load):
    assert load(DFGAN.replace("truncation: True", "truncation: False"))[0].model.noise_scale == 0
    assert load(DFGAN.replace("truncation: True\ntrunc_rate: 0.7\n", ""))[0].model.noise_scale == 0.88


def test_dfgans_faces_are_not_cropped(load):
    """Where the file's name for itself says so, pictures are resized to the side itself."""
    assert load(DFGAN)[0].data.enlarge == 76 / 64
    loaded, _ = load(DFGAN.replace("'bird'", "'CelebA'").replace("'birds'", "'CelebA'"))
    assert (loaded.data.layout, loaded.data.enlarge) == ("face", 1.0)


def test_ratgans_file(load):
    loaded, printed = load(RATGAN)
    assert (loaded.model.name, loaded.data.layout, loaded.data.dir) == ("ratgan", "coco", "../data/coco")
    assert (loaded.model.imsize, loaded.model.nf) == (128, 32)
    assert (loaded.train.max_epoch, loaded.train.batch_size, loaded.train.lr_g) == (121, 24, 1e-4)
    assert (loaded.text.encoder, loaded.text.weights) == ("damsm", "../data/coco/text_encoder100.pth")
    assert "read as a released RAT-GAN configuration" in printed
    dropped = "TRAIN.GENERATOR_LR, TREE.BRANCH_NUM, TEXT.EMBEDDING_DIM, TEXT.CAPTIONS_PER_IMAGE"
    assert printed.strip().endswith(f"no longer of meaning: {dropped}")


def test_files_are_meant_from_the_code_folder(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "data/birds").mkdir(parents=True)
    (tmp_path / "data/birds/text_encoder200.pth").touch()
    settings = translate(yaml.safe_load(DFGAN), tmp_path).settings
    assert settings["data.dir"] == str(tmp_path / "data/birds")
    assert settings["text.weights"] == str(tmp_path / "data/birds/text_encoder200.pth")
    assert settings["model.shipped"] == "../saved_models/state_epoch_1220.pth"  # is in neither place


@pytest.mark.parametrize(
    ("text", "system"),
    [
        ("dataset_name: birds", "ratlip"),
        ("dataset_name: birds\nCONFIG_NAME: my_GALIP", "galip"),
        ("dataset_name: birds\nclip4trn: {type: ViT-B/32}\nTEXT: {CAPTIONS_PER_IMAGE: 10}", "ratlip"),
        ("dataset_name: birds\nTEXT: {CAPTIONS_PER_IMAGE: 10}", "dfgan"),
        ("TRAIN: {NF: 64}\nTREE: {BASE_SIZE: 256}", "ratgan"),
        ("TRAIN: {FLAG: true}\nTREE: {BRANCH_NUM: 3, BASE_SIZE: 64}", None),  # AttnGAN's
        ("train: {seed: 3}", None),
        ("{}", None),
        ("1: 2", None),
    ],
)
def test_which_system_a_file_is_of(text, system, tmp_path):
    found = translate(yaml.safe_load(text), tmp_path)
    assert (found and found.system) == system


def test_what_is_wrong_is_named(load):
    for change, message in (
        ("batch_size: many", "train.batch_size must be of type int, not 'many'"),
        ("max_epoch: soon", "train.max_epoch must be of type int, not 'soon'"),
        ("TEXT: {WORDS_NUM: no}", "text.words must be of type int, not False"),
    ):
        with pytest.raises(UserError, match=message):
            load(f"dataset_name: birds\nTEXT: {{CAPTIONS_PER_IMAGE: 10}}\n{change}\n")
