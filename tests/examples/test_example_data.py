"""The examples' readers of data, on small files in the real formats, and on the built-in data."""

from pathlib import Path

import pytest
import torch

from examples.data import cifar10, digits, text
from examples.data.images import crop_and_flip, training_batches


def write_cifar10(directory: Path, records: int = 3) -> dict[str, torch.Tensor]:
    """Six files in CIFAR-10's binary format: a byte of label, 3072 bytes of image per record."""
    generator = torch.Generator().manual_seed(0)
    written = {}
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        content = torch.randint(256, (records, 3073), generator=generator, dtype=torch.uint8)
        content[:, 0] %= 10
        (directory / name).write_bytes(bytes(content.flatten().tolist()))
        written[name] = content
    return written


def test_cifar10_is_read_from_its_binary_files(tmp_path: Path) -> None:
    written = write_cifar10(tmp_path)
    data = cifar10.load(tmp_path)
    assert data.train_images.shape == (15, 3, 32, 32)
    assert data.test_labels.tolist() == written["test_batch.bin"][:, 0].tolist()
    second = written["data_batch_2.bin"][1]
    assert data.train_labels[4] == second[0]
    # Rows of 32 red bytes, then green, then blue.
    assert data.train_images[4, 1, 2, 3] == second[1 + 1024 + 2 * 32 + 3]
    normalized = data.normalize(data.train_images)
    assert normalized.mean((0, 2, 3)).abs().max() < 1e-5  # sums of some thousand float32 numbers
    assert (normalized.std((0, 2, 3)) - 1).abs().max() < 1e-3  # n against n - 1 of 15,360


def test_bad_cifar10_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data_batch_1\.bin.*test_batch\.bin"):
        cifar10.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        cifar10.load(tmp_path / "nowhere")
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(bytes(3072))
    with pytest.raises(ValueError, match=r"data_batch_3\.bin has 3072 bytes.*3073"):
        cifar10.load(tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(bytes([77]) + bytes(3072))
    with pytest.raises(ValueError, match="label 77"):
        cifar10.load(tmp_path)


def test_wikitext2_is_read_from_its_token_files(tmp_path: Path) -> None:
    (tmp_path / "wiki.train.tokens").write_text(" \n = A Title = \n \n The cat <unk> the Cat . \n")
    (tmp_path / "wiki.test.tokens").write_text(" the dog \n")
    corpus = text.load_wikitext2(tmp_path)
    words = [corpus.vocabulary[i] for i in corpus.train]
    assert " ".join(words) == "<eos> = a title = <eos> <eos> the cat <unk> the cat . <eos>"
    assert [corpus.vocabulary[i] for i in corpus.test] == ["the", "<unk>", "<eos>"]
    (tmp_path / "wiki.test.tokens").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks wiki\.test\.tokens"):
        text.load_wikitext2(tmp_path)


def test_the_digits_are_all_there() -> None:
    data = digits.load()
    assert data.train_images.shape == (1200, 1, 8, 8)
    assert data.test_images.shape == (597, 1, 8, 8)
    assert data.train_labels.unique().tolist() == list(range(10))
    assert data.train_images.max() == 16


def test_the_topics_are_english_text_with_a_held_out_tail() -> None:
    corpus = text.load_topics(vocabulary_size=500)
    assert len(corpus.vocabulary) == 500
    assert len(corpus.train) > 50_000
    assert corpus.train.max() < 500
    assert {"the", "python", "is"} <= set(corpus.vocabulary)
    share = len(corpus.test) / (len(corpus.test) + len(corpus.train))
    assert share == pytest.approx(0.1, abs=0.001)
    known = (corpus.train != 0).float().mean()
    assert known > 0.7  # most of the text is made of frequent words


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_workers_share_out_an_epoch_without_overlap(world_size: int) -> None:
    data = digits.load()
    seen = []
    for worker in range(world_size):
        batches = list(training_batches(data, 32, worker, world_size, seed=1, epoch=2))
        assert len(batches) == 1200 // world_size // 32
        seen += [image.flatten() for images, _ in batches for image in images]
    # The digits hold few or no duplicates, so that images tell places apart.
    distinct = {bytes(image.tolist()) for image in seen}
    assert len(distinct) == len(seen)


def test_streams_and_windows_cover_the_text_in_order() -> None:
    columns = text.streams(torch.arange(23), 2)
    assert columns.T.tolist() == [list(range(11)), list(range(11, 22))]
    parts = list(text.windows(columns, 4))
    assert [len(inputs) for inputs, _ in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([inputs for inputs, _ in parts]), columns[:-1])
    assert torch.equal(torch.cat([targets for _, targets in parts]), columns[1:])
    with pytest.raises(ValueError, match="fewer workers"):
        text.streams(torch.arange(5), 3)


def test_augmentation_moves_and_mirrors_whole_images() -> None:
    images = torch.arange(2 * 25).reshape(2, 1, 5, 5)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(crop_and_flip(images, 0, False, generator), images)
    for moved in (crop_and_flip(images, 1, True, generator) for _ in range(20)):
        for before, after in zip(images[:, 0], moved[:, 0], strict=True):
            center = after[1:4, 1:4]
            windows = before.unfold(0, 3, 1).unfold(1, 3, 1).reshape(-1, 3, 3)
            assert any(torch.equal(center, w) or torch.equal(center, w.flip(1)) for w in windows)
