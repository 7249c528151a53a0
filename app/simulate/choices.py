"""The policies by name, as the command line and the benchmarks choose them.

A family is a law with one knob; a curve of attainment against cost turns the knob. `settings` lists its positions,
the law as it comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from actors.errors import InvalidRequest
from actors.policies.autoscaling import ScalingConfig
from app.simulate.baselines import Knative, LlmD, Ray, RaySettings
from app.simulate.case import Case
from app.simulate.policies import Policy, Shoal, Static

Factory = Callable[[Case], Policy]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One position of a family's knob."""

    name: str
    make: Factory


def shoal(case: Case, target: float = 0.99) -> Policy:
    """Our law; its slack is the TTFT SLO less what an idle replica takes."""
    m = case.model
    idle_s = m.itl_base_s + float(case.trace.prompt_tokens.mean()) / m.prefill_tokens_per_s
    config = ScalingConfig(
        min_replicas=case.bounds.min_replicas,
        max_replicas=case.bounds.max_replicas,
        slack_s=max(m.ttft_slo_s - idle_s, m.ttft_slo_s / 10.0),
        slo_target=target,
        expected_start_up_s=m.start_up_s,
    )
    return Shoal(config, case.bounds.first_replicas)


def ray_tuned(case: Case, utilization: float = 0.8) -> Policy:
    """Ray's law set up for this pool: a share of c* as target, quick up, one start-up times three down."""
    m = case.model
    mean_tokens = float((case.trace.prompt_tokens + case.trace.output_tokens).mean())
    width = min(m.max_sequences, m.kv_tokens / mean_tokens)
    return Ray(
        "ray-tuned",
        RaySettings(
            target_ongoing_requests=utilization * width,
            look_back_period_s=10.0,
            metrics_interval_s=1.0,
            upscale_delay_s=2.0,
            downscale_delay_s=max(180.0, 3.0 * m.start_up_s),
        ),
    )


def _shoal(target: float) -> Factory:
    return lambda case: shoal(case, target)


def _ray(utilization: float) -> Factory:
    return lambda case: ray_tuned(case, utilization)


def _knative(utilization: float) -> Factory:
    return lambda _: Knative(utilization)


def _llmd(up: float) -> Factory:
    return lambda _: LlmD(up, up * 0.4 / 0.55)


def _static(replicas: int) -> Factory:
    return lambda _: Static(replicas)


FAMILIES: Mapping[str, list[Setting]] = {
    "shoal": [Setting(name=f"shoal {x:g}", make=_shoal(x)) for x in (0.99, 0.9, 0.95, 0.97, 0.995, 0.999)],
    "static": [Setting(name=f"static {n}", make=_static(n)) for n in range(1, 65)],
    "ray": [Setting(name="ray", make=lambda _: Ray("ray", RaySettings()))],
    "ray-tuned": [Setting(name=f"ray-tuned {x:g}", make=_ray(x)) for x in (0.8, 0.5, 0.6, 0.7, 0.9, 1.0)],
    "knative": [Setting(name=f"knative {x:g}", make=_knative(x)) for x in (0.7, 0.5, 0.6, 0.8, 0.9, 1.0)],
    "llm-d": [Setting(name=f"llm-d {x:g}", make=_llmd(x)) for x in (0.55, 0.2, 0.3, 0.4, 0.7, 0.9)],
}


def family(name: str) -> list[Setting]:
    """The settings of a family.

    Raises:
        InvalidRequest: there is none of this name.
    """
    if name not in FAMILIES:
        raise InvalidRequest(f"no policy {name!r}: choose from {', '.join([*FAMILIES, 'all'])}")
    return FAMILIES[name]
