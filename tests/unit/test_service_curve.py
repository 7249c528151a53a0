"""The pure timing model."""

from __future__ import annotations

import pytest

from actors.engines.service_curve import ServiceCurve


def test_the_default_curve_is_the_measured_one() -> None:
    curve = ServiceCurve()
    assert curve.itl_s(0) == pytest.approx(0.0065)
    assert curve.itl_s(64) == pytest.approx(0.0065 + 64 * 0.000062)


def test_a_step_adds_the_prefill_of_what_was_admitted() -> None:
    curve = ServiceCurve(itl_base_s=0.01, itl_per_sequence_s=0.001, prefill_tokens_per_s=1000)
    assert curve.step_s(5, 0) == pytest.approx(0.015)
    assert curve.step_s(5, 200) == pytest.approx(0.215)


def test_prefill_can_be_free() -> None:
    assert ServiceCurve(prefill_tokens_per_s=None).prefill_s(1_000_000) == 0.0


def test_a_request_is_its_prefill_and_a_step_per_token() -> None:
    curve = ServiceCurve(itl_base_s=0.01, itl_per_sequence_s=0.0, prefill_tokens_per_s=1000)
    assert curve.request_s(prompt_tokens=100, output_tokens=20, running=8) == pytest.approx(0.1 + 0.2)


def test_a_fixed_service_time_ignores_tokens_and_batch() -> None:
    curve = ServiceCurve(fixed_service_s=0.1)
    assert curve.request_s(prompt_tokens=9999, output_tokens=9999, running=64) == 0.1
