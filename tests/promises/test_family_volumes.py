"""What the whole family sends, to the byte: counted from the buffers of steps."""

from pathlib import Path

import pytest

from benchmarks.volumes import MIB, ROWS, STEPS_PER_EPOCH, Row, counted

PAGE = Path(__file__).parents[2] / "docs" / "volumes.md"
PARAMETERS = {"resnet18": 11_173_962, "lstm": 28_949_319}

# Bytes per step, worked out from the shapes of the two models by each method's definition.
BYTES = {
    ("resnet18", "SGD"): 4 * 11_173_962,
    ("resnet18", "PowerSGD, rank 1"): 4 * 45_935,
    ("resnet18", "PowerSGD, rank 2"): 4 * 82_260,
    ("resnet18", "PowerSGD, rank 4"): 4 * 154_910,
    ("resnet18", "PowerSGD, rank 7"): 4 * 263_885,
    ("resnet18", "Random Block, rank 7's"): 1_055_540,
    ("resnet18", "Random K, rank 7's"): 1_055_540,
    ("resnet18", "Random Block, rank 2's"): 329_040,
    ("resnet18", "Random K, rank 2's"): 329_040,
    ("resnet18", "Sign+Norm"): 1_396_996,
    ("resnet18", "Top K, 1/32"): 1_396_752,
    ("resnet18", "Top K, 1/136"): 328_608,
    ("resnet18", "Top K, 1/244"): 183_272,
    ("resnet18", "Spectral Atomo, rank 2"): 4_940_168,
    ("resnet18", "Spectral Atomo, rank 1"): 2_470_084,
    ("resnet18", "Signum"): 1_396_748,
    ("resnet18", "PowerSGD in half steps, rank 1"): 111_090,
    ("resnet18", "PowerSGD in half steps, rank 2"): 183_740,
    ("lstm", "SGD"): 4 * 28_949_319,
    ("lstm", "PowerSGD, rank 1"): 4 * 93_488,
    ("lstm", "PowerSGD, rank 2"): 4 * 142_507,
    ("lstm", "PowerSGD, rank 4"): 4 * 240_545,
    ("lstm", "Signum"): 3_618_668,
}
# Ratios to SGD, to the first digit after the point; LQ-SGD's have its scales in them.
RATIOS = {
    "LQ-SGD, rank 1, 8 bits": 596.5,
    "LQ-SGD, rank 2, 8 bits": 401.7,
    "LQ-SGD, rank 4, 8 bits": 243.0,
    "LQ-SGD, rank 7, 8 bits": 152.6,
    "LQ-SGD, rank 1, 4 bits": 787.3,
    "LQ-SGD, rank 2, 4 bits": 596.5,
    "LQ-SGD, rank 4, 4 bits": 401.7,
    "LQ-SGD, rank 7, 4 bits": 269.7,
    "PowerSGD+, rank 1, every 50 steps": 41.5,
    "PowerSGD+, rank 1, every 100 steps": 70.9,
    "PowerSGD+, rank 1, every 200 steps": 109.8,
    "PowerSGD+, rank 1, every 500 steps": 163.7,
    "PowerSGD+, rank 1, every 1000 steps": 195.7,
    "PowerSGD+, rank 2, every 50 steps": 36.6,
    "PowerSGD+, rank 2, every 200 steps": 81.0,
    "PowerSGD+, rank 2, every 1000 steps": 119.6,
    "PowerSGD+, rank 4, every 50 steps": 29.6,
    "PowerSGD+, rank 4, every 200 steps": 53.0,
    "PowerSGD+, rank 4, every 1000 steps": 67.3,
}


def label(row: Row) -> str:
    return f"{row.workload}, {row.label}"


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_what_is_sent_is_what_was_worked_out_and_what_is_published(row: Row) -> None:
    sent = counted(row)
    expected = BYTES.get((row.workload, row.label))
    ratio = 4 * PARAMETERS[row.workload] / sent
    if expected is None:
        assert f"{ratio:.1f}" == f"{RATIOS[row.label]:.1f}"
    else:
        assert sent == expected
    for figure in filter(None, row.published.split(", ")):
        if figure.endswith("x"):
            assert f"{ratio:.0f}x" == figure
        else:
            assert f"{STEPS_PER_EPOCH[row.workload] * sent / MIB:.0f} MB" == figure
    assert f"| {row.label} | {sent:,.0f} |" in PAGE.read_text()


def test_every_figure_belongs_to_a_row() -> None:
    rows = {(row.workload, row.label) for row in ROWS}
    assert len(rows) == len(ROWS)
    assert BYTES.keys() | {("resnet18", name) for name in RATIOS} == rows
