"""What a link may be."""

from typing import Any

import pytest

from efsgd import Identity, PowerSGD, RandomK, TopK, UniformQuantized
from efsgd.pipeline import Link
from efsgd.pipeline.ends import End
from efsgd.pipeline.link import link_of
from efsgd.pipeline.memory import split_ids

Q4 = UniformQuantized(bits=4)


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (TypeError, "Invalid compressor: PowerSGD.*TensorCompressor", {"compressor": PowerSGD(2)}),
        (TypeError, "Invalid compressor: 4", {"compressor": 4}),
        (TypeError, "Invalid compressor: <class", {"compressor": TopK}),
        (ValueError, "per.*'batch'.*sample", {"compressor": Q4, "per": "batch"}),
        (ValueError, "memory.*'EF'.*error", {"compressor": Q4, "memory": "EF"}),
        (ValueError, "memory='error'.*nothing is compressed", {"memory": "error"}),
        (
            ValueError,
            "memory='samples'.*Give a compressor",
            {"compressor": Identity(), "memory": "samples"},
        ),
        (ValueError, "reuse_mask=True needs compressor=TopK", {"reuse_mask": True}),
        (
            ValueError,
            "reuse_mask=True needs compressor=TopK",
            {"compressor": RandomK(density=0.1), "reuse_mask": True},
        ),
        (
            ValueError,
            "capacity.*0.*at least 1",
            {"compressor": Q4, "memory": "samples", "capacity": 0},
        ),
        (
            ValueError,
            "capacity.*0.5",
            {"compressor": Q4, "memory": "samples", "capacity": 0.5},
        ),
        (ValueError, "are for memory='samples'", {"compressor": Q4, "capacity": 5}),
        (
            ValueError,
            "are for memory='samples'",
            {"compressor": Q4, "memory": "error", "file": "a"},
        ),
        (
            ValueError,
            "file needs capacity",
            {"compressor": Q4, "memory": "samples", "file": "a"},
        ),
    ],
)
def test_refusals(error: type[Exception], words: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=words):
        Link(**options)


def test_nothing_is_compressed_by_default() -> None:
    assert Link().codes is None
    assert Link(Identity()).codes is None
    assert Link(Q4).codes is Q4


def test_ends_that_do_the_same_describe_it_alike() -> None:
    links = [Link(), Link(Identity())]
    assert len({End(link, 0, "sent").description for link in links}) == 1
    files = [Link(Q4, memory="samples", capacity=2, file=file) for file in ("a", "b", None)]
    assert len({End(link, 0, "sent").description for link in files}) == 1
    others = [Link(Q4), Link(Q4, memory="error"), Link(Q4, per="microbatch"), Link()]
    assert len({End(link, 0, "sent").description for link in others}) == 4


@pytest.mark.parametrize("ids", [[0, 0, 1], [0.0, 1.0], [[0, 1], [2, 3]], [True, False]], ids=str)
def test_what_names_no_samples_is_refused(ids: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid sample_ids: .* Must be integers"):
        split_ids(ids, 2)


def test_a_compressor_is_no_link() -> None:
    with pytest.raises(TypeError, match=r"write Link\(UniformQuantized\(...\)\)"):
        link_of(UniformQuantized(bits=4))  # type: ignore[arg-type]
