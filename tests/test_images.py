"""Real array_record sets, made here from scikit-learn's digits without TensorFlow or network."""

import io
import json
import shutil
import socket
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

import jchain as jc
from jchain import images
from jchain.__main__ import main

tfds = pytest.importorskip("tensorflow_datasets")
from PIL import Image  # noqa: E402

SIZES = {"train": 1200, "test": 300}


def encode(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    file.seek(0)
    return file


class _Digits(tfds.core.GeneratorBasedBuilder):
    """Images of eight by eight pixels in one channel."""

    VERSION = tfds.core.Version("1.0.0")
    SHAPE, CHANNELS, KEYS, SPLITS = (8, 8), 1, ("image", "label"), ("train", "test")

    def _info(self):
        shape = (*self.SHAPE, self.CHANNELS)
        features = {
            "image": tfds.features.Image(shape=shape),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=self.KEYS
        )

    def _split_generators(self, manager):
        return {name: self._generate_examples(name) for name in self.SPLITS}

    def _generate_examples(self, name):
        digits = load_digits()
        start = 0 if name == "train" else SIZES["train"]
        for i in range(start, start + SIZES[name]):
            yield (
                i,
                {"image": encode(self.draw(i, digits.images[i])), "label": int(digits.target[i])},
            )

    def draw(self, i, image):
        return (15 * image).astype(np.uint8)


class TinyDigits(_Digits):
    pass


class UnsplitDigits(_Digits):
    SPLITS = ("train",)


class UnlabeledDigits(_Digits):
    KEYS = None


class MixedDigits(_Digits):
    """A data set in which one image is wider than the others."""

    SHAPE = (None, None)

    def draw(self, i, image):
        return np.pad((15 * image).astype(np.uint8), ((0, 0), (0, int(i == 700))))


class ColoredDigits(_Digits):
    """Images with the shape of cifar10."""

    SHAPE, CHANNELS = (32, 32), 3

    def draw(self, i, image):
        return np.repeat(
            np.kron((15 * image).astype(np.uint8), np.ones((4, 4), np.uint8))[..., None], 3, axis=2
        )


SETS = {
    "tiny_digits": TinyDigits,
    "unsplit_digits": UnsplitDigits,
    "unlabeled_digits": UnlabeledDigits,
}
SETS |= {"mixed_digits": MixedDigits, "colored_digits": ColoredDigits}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sets")
    for builder in SETS.values():
        builder(data_dir=path, file_format="array_record").download_and_prepare()
    return path


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_set_is_read_as_it_was_written(folder):
    digits = load_digits()
    found = images.read("tiny_digits", folder)
    assert found.num_classes == 10
    order = np.lexsort(found.train[0].reshape(len(found.train[0]), -1).T)
    wanted = (15 * digits.images[: SIZES["train"]]).astype(np.uint8).reshape(-1, 64)
    np.testing.assert_array_equal(
        found.train[0].reshape(-1, 64)[order], wanted[np.lexsort(wanted.T)]
    )
    np.testing.assert_array_equal(np.bincount(found.test[1]), np.bincount(digits.target[1200:1500]))
    assert images.read("unsplit_digits", folder).test is None


def test_image_sets_keep_their_test_split_and_standardize_channels(folder):
    data = jc.data.load("colored_digits", data_dir=folder)
    assert [len(getattr(data, name).x) for name in jc.data.SPLITS] == [706, 282, 212, 300]
    assert data.train.x.shape[1:] == (32, 32, 3)
    np.testing.assert_allclose(data.train.x.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(data.train.x.std(axis=(0, 1, 2)), 1, atol=1e-5)
    # The whole test split, in its order, and standardized like the others.
    found = images.read("colored_digits", folder)
    np.testing.assert_array_equal(data.test.y, found.test[1])
    scale = np.asarray(data.test.x)[:, :, :, 0].std() / found.test[0][..., 0].std()
    mean = np.asarray(data.test.x)[..., 0].mean() - scale * found.test[0][..., 0].mean()
    np.testing.assert_allclose(data.test.x[..., 0], scale * found.test[0][..., 0] + mean, atol=1e-4)
    whole = jc.data.load("unsplit_digits", data_dir=folder)
    assert [len(getattr(whole, name).x) for name in jc.data.SPLITS] == [600, 240, 180, 180]


def test_image_splits_of_given_sizes_are_even_samples(folder):
    sizes = (100, 40, 30, 50)
    data = jc.data.load("tiny_digits", data_dir=folder, sizes=sizes)
    for name, size in zip(jc.data.SPLITS, sizes, strict=True):
        labels = np.asarray(getattr(data, name).y)
        assert len(labels) == size
        assert np.bincount(labels, minlength=10).min() >= size // 10 - 2
    with pytest.raises(
        ValueError, match=r"sizes of train, search, select, test .* got \[1000, 40, 30, 50\]"
    ):
        jc.data.load("tiny_digits", data_dir=folder, sizes=(1000, 40, 30, 50))


@pytest.mark.parametrize(
    ("name", "error", "expected"),
    [
        (
            "cifar10",
            FileNotFoundError,
            r"cifar10 is not prepared in .*: run jchain prepare cifar10 --data-dir",
        ),
        ("cifar11", ValueError, "unknown data set 'cifar11': did you mean .*cifar10"),
        ("qqq", ValueError, "unknown data set 'qqq': expected .* as mnist"),
        ("unlabeled_digits", ValueError, "to have images and labels, got features image, label"),
        (
            "mixed_digits",
            ValueError,
            r"images of one size in mixed_digits, got \[8, 8, 1\], \[8, 9, 1\]",
        ),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_unreadable_sets_are_refused_without_the_network(folder, name, error, expected):
    with pytest.raises(error, match=expected):
        images.read(name, folder)


def test_damaged_files_raise_a_clear_error(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "sets")
    (path,) = (tmp_path / "sets").glob("tiny_digits/*/*train*")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:30_000] + bytes(64) + whole[30_064:], b""):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match=r"split train of tiny_digits"):
            images.read("tiny_digits", tmp_path / "sets")


def rename_set(folder, place, change):
    """Copy a prepared set under a name that has no code, with another features.json."""
    shutil.copytree(folder / "tiny_digits", place / "foreign_digits")
    (version,) = (place / "foreign_digits").iterdir()
    info = json.loads((version / "dataset_info.json").read_text())
    (version / "dataset_info.json").write_text(json.dumps(info | {"name": "foreign_digits"}))
    for path in version.glob("tiny_digits-*"):
        path.rename(version / path.name.replace("tiny", "foreign"))
    features = version / "features.json"
    features.write_text(change(features.read_text()))


def name_class(text):
    return text.replace("tensorflow_datasets.core.features.image_feature.Image", "hostile.Image")


def name_class_in_the_old_format(text):
    old = {"type": "hostile.Image", "content": {}}
    return json.dumps({"jsonFeature": {"json": json.dumps({"image": old})}})


@pytest.mark.parametrize("change", [name_class, name_class_in_the_old_format])
def test_a_prepared_set_imports_no_module(folder, tmp_path, monkeypatch, change):
    (tmp_path / "hostile.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    rename_set(folder, tmp_path / "sets", change)
    with pytest.raises(ValueError, match=r"features that tensorflow-datasets defines in .*hostile"):
        images.read("foreign_digits", tmp_path / "sets")
    assert "hostile" not in sys.modules


def test_a_prepared_set_without_code_is_read(folder, tmp_path):
    rename_set(folder, tmp_path, lambda text: text)
    found, expected = images.read("foreign_digits", tmp_path), images.read("tiny_digits", folder)
    np.testing.assert_array_equal(found.train[0], expected.train[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("huggingface:mnist", "expected the name of a data set, such as mnist"),
        ("../mnist", "expected the name of a data set"),
        ("mnist/data_dir=x", "expected the name of a data set"),
        ("mnist:9.9.9", "cannot read mnist:9.9.9|not prepared"),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_other_names_reach_no_network(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        images.read(name, tmp_path)


def test_a_folder_without_permission_is_refused(folder, monkeypatch):
    monkeypatch.setattr("os.access", lambda *args: False)
    with pytest.raises(PermissionError, match="cannot read the data folder"):
        images.read("tiny_digits", folder)


def test_missing_library_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[data\]"'):
        images.read("cifar10")


SMALL = [
    "--num-layers",
    "3",
    "--depth",
    "2",
    "--num-steps",
    "2",
    "--budget",
    "60",
    "--search",
    "random",
    "--channels",
    "4",
]


@pytest.mark.slow
def test_the_command_line_searches_a_prepared_set(folder, tmp_path, capsys):
    sizes = "60,40,30,20"
    options = [
        "--data",
        "colored_digits",
        "--data-dir",
        str(folder),
        "--sizes",
        sizes,
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["search", *options, *SMALL]) == 0
    bank = jc.Bank.load(tmp_path / "out" / "bank.safetensors")
    assert [(group.module.depth, group.tokens) for group in bank.layers] == [
        (1, (0,)),
        (2, (1,)),
        (3, (2,)),
    ]
    assert [type(group.module).__name__ for group in bank.heads] == ["PoolHead", "ConvHead"]
    assert bank.embed(jnp.zeros((1, 32, 32, 3))).shape == (1, 16, 16, 4)
    # The location of the set is read from the result.
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "out"), "--split", "test"]) == 0
    assert capsys.readouterr().out.startswith("loss ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["search", "--data", "tiny_digits", "--layer", "dense"],
            "--layer conv for images and only for images, got dense",
        ),
        (
            ["search", "--data", "wine", "--layer", "conv"],
            "--layer conv for images and only for images, got conv for data of shape [13]",
        ),
        (["search", "--data", "cifar10"], "run jchain prepare cifar10 --data-dir"),
        (
            ["search", "--data", "tiny_digits", "--sizes", "5,5"],
            "expected sizes of train, search, select, test",
        ),
        (["prepare", "cifar11"], "did you mean"),
    ],
)
def test_command_line_rejects_unsuitable_image_sets(folder, tmp_path, capsys, options, message):
    more = [] if options[0] == "prepare" else ["--out", str(tmp_path / "out"), *SMALL]
    assert main([*options, "--data-dir", str(folder), *more]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_prepared_sets_are_unchanged(folder):
    (path,) = folder.glob("tiny_digits/*")
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    assert images.prepare("tiny_digits", folder) == path
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before
