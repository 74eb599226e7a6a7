"""Text as word numbers: the help topics of Python itself, and WikiText-2."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from examples.data.files import require_files

UNKNOWN = "<unk>"
END = "<eos>"
TRAIN_FILE, TEST_FILE = "wiki.train.tokens", "wiki.test.tokens"


@dataclass(frozen=True)
class Corpus:
    """A text, divided into a training and a test part.

    Attributes:
        vocabulary: the words, by number.
        train: word numbers, int64 [words].
        test: word numbers, int64 [words].
    """

    vocabulary: tuple[str, ...]
    train: Tensor
    test: Tensor


@cache
def load_topics(vocabulary_size: int = 500, test_fraction: float = 0.1) -> Corpus:
    """The English text of `pydoc_data.topics`, which comes with Python and varies with its version.

    The topics are concatenated in alphabetical order and the tail is held out. Paragraphs that
    occur in several topics are kept once, so the test part repeats nothing of the training part.
    Words are lower-cased, punctuation marks are words of their own, and a paragraph ends with
    "<eos>". All but the most frequent words of the training part become "<unk>".

    Args:
        vocabulary_size: number of words, "<unk>" included.
        test_fraction: size of the tail, as a fraction of all words.
    """
    text = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = dict.fromkeys(part.strip() for part in re.split(r"\n\s*\n", text))
    words = [word for part in paragraphs for word in [*_words(part), END]]
    split = round(len(words) * (1 - test_fraction))
    return _number(words[:split], words[split:], vocabulary_size)


def _words(paragraph: str) -> list[str]:
    """Words, numbers and punctuation marks; lines that only underline or frame are dropped."""
    without_rules = re.sub(r"[-*=~^+|]{3,}", " ", paragraph.lower())
    return re.findall(r"[^\W\d]\w*|\d+|[^\w\s]", without_rules)


def load_wikitext2(directory: Path) -> Corpus:
    """Reads WikiText-2's word-level files, lower-cased, with every word of the training part.

    Args:
        directory: where wiki.train.tokens and wiki.test.tokens lie.

    Raises:
        FileNotFoundError: a file is missing; the message names those expected.
        ValueError: a file is empty.
    """
    require_files(directory, (TRAIN_FILE, TEST_FILE), "WikiText-2's word-level version")
    train, test = (_read_tokens(directory / name) for name in (TRAIN_FILE, TEST_FILE))
    return _number(train, test, vocabulary_size=None)


def _read_tokens(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").lower().splitlines()
    words = [word for line in lines for word in [*line.split(), END]]
    if len(words) == len(lines):
        raise ValueError(f"{path} has no words: is it the file of WikiText-2, unpacked?")
    return words


def _number(train: list[str], test: list[str], vocabulary_size: int | None) -> Corpus:
    """Numbers the words by falling frequency in the training part; ties go by first occurrence."""
    counts = Counter(train)
    counts.pop(UNKNOWN, None)
    limit = None if vocabulary_size is None else vocabulary_size - 1
    vocabulary = (UNKNOWN, *(word for word, _ in counts.most_common(limit)))
    number = {word: index for index, word in enumerate(vocabulary)}

    def encode(words: Iterable[str]) -> Tensor:
        return torch.tensor([number.get(word, 0) for word in words])

    return Corpus(vocabulary, encode(train), encode(test))


def streams(words: Tensor, count: int) -> Tensor:
    """Cuts a text into contiguous streams of equal length; the remainder is dropped.

    Args:
        words: word numbers [words].
        count: number of streams.

    Returns:
        Word numbers [time, count].
    """
    length = len(words) // count
    if length < 2:
        raise ValueError(
            f"{len(words)} words make {count} streams of {length}, which must be at least 2: "
            "use fewer workers or a smaller --batch-size"
        )
    return words[: length * count].view(count, length).t().contiguous()


def windows(columns: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Successive windows of streams, each with the words that follow; the last may be shorter.

    Args:
        columns: word numbers [time, streams].
        length: words per window and stream.

    Yields:
        Inputs and targets, each [at most length, streams].
    """
    last = len(columns) - 1
    for start in range(0, last, length):
        stop = min(start + length, last)
        yield columns[start:stop], columns[start + 1 : stop + 1]
