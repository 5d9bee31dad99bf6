"""The kernel benchmark runs every form, and its limits are what one would compute by hand."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import kernels, training_kernels
from benchmarks.engines.roofline import Best, Limits

LIMITS = Limits("12:00", reads={4 << 30: 1e9}, torch={"bfloat16": 1e9, "int8": 2e9})


def test_every_form(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernels.roofline, "measure", lambda folder, threads: LIMITS)
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    words = ["--shape", "0.1b", "--rows", "1", "3", "--matrices", "o", "--mebibytes", "1", "--seconds", "0", "--threads", "1"]
    outcome = kernels.run(parser.parse_args(words))
    cases = outcome.numbers["cases"]
    assert [(case["form"], case["rows"]) for case in cases] == [(form, rows) for form in kernels.FORMS for rows in (1, 3)]
    for case in cases:
        assert (case["outputs"], case["inputs"]) == (576, 576)
        assert case["microseconds"] > 0
        assert case["torch_over_ours"] > 0
    assert "int4" in capsys.readouterr().err
    assert "bf16" in outcome.headline


def test_every_kernel_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits("12:00", torch={"float32": 1e9})
    monkeypatch.setattr(training_kernels.roofline, "measure", lambda folder, threads: limits)
    parser = argparse.ArgumentParser()
    training_kernels.add_arguments(parser)
    outcome = training_kernels.run(parser.parse_args(["--shape", "0.1b", "--rows", "40", "--seconds", "0", "--threads", "1"]))
    cases = outcome.numbers["cases"]
    assert [case["rows"] for case in cases] == [1, 8, 32, *[40] * 7]
    for case in cases:
        assert case["microseconds"] > 0
        assert case["torch_over_ours"] > 0
        assert case.get("of_limit", 0.0) == pytest.approx(case.get("gflop_s", 0.0), abs=0.06)  # of 1 GFLOP/s
    assert "attention, backward" in outcome.headline


def test_limits_and_sizes() -> None:
    sizes = {form: kernels.weight_bytes(kernels._random(form, 64, 256)) for form in kernels.FORMS}
    assert sizes == {"bf16": 32768, "int8": 16384 + 256, "fp8": 16384 + 256, "int4": 8192 + 64 * 2 * 5}
    case = {"form": "int8", "rows": 4, "outputs": 10, "inputs": 100, "weight_bytes": 1000}
    case |= {"microseconds": 10.0, "torch_microseconds": 5.0}
    found = kernels._reached(case, Best((LIMITS,)))
    assert found == {"torch_over_ours": 0.5, "limit_microseconds": 4.0, "of_limit": 0.4}  # arithmetic takes longest
    assert "of_limit" not in kernels._reached(case, Best(()))


def test_it_is_listed() -> None:
    from benchmarks.__main__ import NAMES

    assert {"kernels"} <= set(NAMES)
    assert Path(kernels.__file__).name == "kernels.py"
