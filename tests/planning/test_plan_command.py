"""`python -m efsgd.plan`: what it prints, and what it says of bad input."""

import json
from pathlib import Path
from typing import Any

import pytest

from efsgd.plan import duration, main, rate

PASSES = ["--forward", "10ms", "--backward", "20ms"]
NETWORK = ["--workers", "4", "--bandwidth", "10mbit", "--latency", "1ms"]


@pytest.fixture
def compute(tmp_path: Path) -> list[str]:
    """Nothing needs to be measured."""
    names = ["SGD", "PowerSGD(rank=2)", "TopK(density=0.01)", "SignNorm()"]
    names += ["UniformQuantized(bits=8)", "LQSGD(rank=4, bits=8)"]
    file = tmp_path / "compute.json"
    file.write_text(json.dumps(dict.fromkeys(names, 0.001)))
    return ["--compute", str(file), "--ranks", "2"]


@pytest.fixture
def shapes(tmp_path: Path) -> list[str]:
    file = tmp_path / "shapes.json"
    file.write_text("[[256, 128], [256]]")
    return ["--shapes", str(file)]


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_table_and_advice(
    compute: list[str], shapes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*shapes, *PASSES, *NETWORK, *compute]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("33,024 parameters in 2 tensors, gradients of 132 kB; 4 workers")
    assert [line.split("  ")[0] for line in lines[3:5]] == ["DDP and SGD", "PowerSGD(rank=2)"]
    assert lines[-1].startswith("Use PowerSGD(rank=2).")


def test_json_is_what_another_plan_may_begin_with(
    compute: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", "tests.planning.made_model:module"]
    main([*model, *PASSES, *NETWORK, *compute, "--json"])
    printed = capsys.readouterr().out
    found: dict[str, Any] = json.loads(printed)
    assert found["parameters"] == 16 * 8 + 8 and found["gradient_bytes"] == 4 * 136
    assert found["link"] == {
        "workers": 4,
        "latency": 0.001,
        "bandwidth": 1.25e6,
        "algorithm": "ring",
    }
    (tmp_path / "plan.json").write_text(printed)
    main([*model, *PASSES, *NETWORK, "--ranks", "2", "--compute", str(tmp_path / "plan.json")])
    assert found["advice"] in capsys.readouterr().out


def test_a_model_with_a_loss_needs_no_times(
    compute: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--model", "tests.planning.made_model:with_loss", *NETWORK, *compute, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["forward"] > 0 and found["backward"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PASSES, *NETWORK, "--workers", "1"], "--workers: '1' must be an integer of at least 2"),
        ([*PASSES, *NETWORK, "--bandwidth", "0gbit"], "above 0 with one of the units bit, kbit"),
        ([*PASSES, *NETWORK, "--bandwidth", "1"], "as 1gbit"),
        ([*PASSES, *NETWORK, "--latency", "-1ms"], "expected one argument"),
        ([*PASSES, *NETWORK, "--latency", "1h"], "of at least 0 with one of the units us, ms, s"),
        ([*PASSES, *NETWORK, "--forward", "nan"], "--forward: 'nan' must be a number"),
        ([*PASSES, *NETWORK, "--ranks", "0"], "--ranks: '0' must be an integer of at least 1"),
        ([*NETWORK], "Invalid forward: None. Must be a finite number of at least 0. It is in sec"),
        ([*PASSES], "or give workers, bandwidth and latency"),
        ([*PASSES, *NETWORK, "--compute", "no.json"], "must be a file that --json has written"),
    ],
)
def test_bad_numbers(
    arguments: list[str], message: str, shapes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in failure([*shapes, *arguments], capsys)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (["--shapes", "resnet19"], "must be one of resnet18, lstm, gpt2, or a JSON file"),
        (["--model", "no.such:thing"], "cannot load 'no.such:thing'"),
        (["--model", "tests.planning.made_model"], "Give it as package.module:function"),
        (["--model", "tests.planning.made_model:number"], "returned int. It must return a module"),
        ([], "one of the arguments --model --shapes is required"),
    ],
)
def test_bad_models(what: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in failure([*what, *PASSES, *NETWORK], capsys)


@pytest.mark.parametrize("content", ['{"a": 1}', "[[1, -2]]", "[]", "no"])
def test_files_without_shapes(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shapes.json").write_text(content)
    given = ["--shapes", str(tmp_path / "shapes.json"), *PASSES, *NETWORK]
    assert "shape" in failure(given, capsys)


def test_units() -> None:
    assert duration("250us") == 250e-6 and duration("1.5s") == 1.5 and duration("0ms") == 0
    assert rate("1gbit") == 125e6 and rate("2.5 Gbit") == 312.5e6
