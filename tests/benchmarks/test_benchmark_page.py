"""The page of the benchmarks, made of invented results."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import local, network, report
from benchmarks.candidates import Candidate, compared
from benchmarks.growth import LARGE, SMALL


def result(benchmark: str, settings: dict[str, Any], **found: Any) -> dict[str, Any]:
    machine = {"processor": "a processor", "cores": 2, "threads": 1, "torch": "2.13.0"}
    machine["environment"] = {}
    return {
        "benchmark": benchmark,
        "command": f"python -m benchmarks.{benchmark}",
        "date": "2026-01-01",
        "commit": "abcdef",
        "machine": machine,
        "settings": {"left_out": [], **settings},
        **found,
    }


def launch(listed: Sequence[Candidate], **found: Any) -> dict[str, Any]:
    """Invented samples: 1 ms for the first, then 2, 3, ... ms; the second round is a slow one."""
    samples = {
        candidate.name: [1e-3 * (number + 1) * speed for speed in (1.0, 2.0, 1.0)]
        for number, candidate in enumerate(listed)
    }
    return {"candidates": list(map(asdict, listed)), "samples": samples, **found}


def some_results() -> list[dict[str, Any]]:
    listed = compared([1, 4], None, compiled=True, epfml=True)
    probes = network.link_probes("1gbit")
    on_network = [network.FLOOR, *probes, network.BASELINE, *listed]
    sent = {c.name: 1000 for c in listed if c.kind == "efsgd"}
    message = Candidate("all-reduce", nbytes=(2048, 4096))
    growing = [
        {"workers": w, "messages": {"a model": [2048, 4096]}, **launch([SMALL, message, LARGE])}
        for w in (2, 4)
    ]
    ranks = [
        {
            "rank": r,
            "bytes_sent": 1000 * r,
            "messages": [400 * r, 600 * r],
            "step": [0.2, 0.3],
            "orthogonalization": [0.1, 0.1],
        }
        for r in (1, 2)
    ]
    multiples = [
        {"candidate": asdict(Candidate("sgd-loop")), "peak": 1.25, "kept": 1.0, "resident": 1.27}
    ]
    two = {"workload": "resnet18", "workers": 2, "rate": "1gbit", "rounds": 3}
    return [
        result("network", two, launches=[launch(on_network, bytes_sent=sent)]),
        result(
            "local",
            {"workload": "lstm", "device": "cpu", "left_out": ["this, because of that."]},
            launches=[launch([*local.ALWAYS, *listed])],
        ),
        result("memory", {"workload": "resnet18"}, multiples=multiples),
        result("growth", {"what": "workers", "rate": "1gbit"}, launches=growing),
        result("growth", {"what": "ranks", "workload": "resnet18"}, ranks=ranks),
    ]


def test_the_page_shows_all_results(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    for number, content in enumerate(some_results()):
        (folder / f"{number}.json").write_text(json.dumps(content))
    text = report.render(report.load(folder), tmp_path / "images")
    # The floor has 1 ms, the two probes 2 and 3, SGD 4, ours at rank 1 then 5: 3 and 4 ms above it.
    assert "| SGD under DDP | 3 (3 to 4.5) | 1× (1 to 1) | 44.7 |" in text
    assert "| efsgd, rank 1, SGD's momentum | 4 (4 to 6) | 0.75× (0.75 to 0.75) | 0.001 |" in text
    assert "| SGD(foreach=False) | 1.25× | 1.00× | 1.27× |" in text
    assert "| a model | 4 |" in text
    assert "Left out: this, because of that." in text
    for name in ("network", "local", "memory", "growth"):
        assert f"`python -m benchmarks.{name}`, 2026-01-01, commit abcdef" in text
    images = {path.name for path in (tmp_path / "images").iterdir()}
    assert images == {line.split("images/")[1][:-1] for line in text.splitlines() if "![" in line}
    assert len(images) == 6
    assert "benchmark-rates.png" in images


def test_a_page_without_results_says_how_to_get_them(tmp_path: Path) -> None:
    text = report.render([], tmp_path)
    assert "make bench" in text
    assert "## On" not in text
