"""Trace readers: what is read, what is scaled, what is refused."""

import numpy as np
import pytest

from actors.errors import InvalidRequest
from app.simulate.case import Options, case
from app.simulate.oracle import demand
from app.simulate.run import Bounds
from app.simulate.tables import Model
from app.simulate.trace_files import Sampling, read

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def azure(path, rows=("2023-11-16 18:17:03.9799600,4808,10", "2023-11-16 18:17:05.0319600,3180,8")):
    file = path / "trace.csv"
    file.write_text(AZURE + "".join(f"{row}\n" for row in rows))
    return str(file)


def servegen(path, rates=((0, 2.0), (600, 4.0), (1200, 0.0), (1800, 2.0))):
    for client, pattern in enumerate(("Gamma", "Weibull")):
        rows = [f"{at},{rate},1.2,{pattern if rate else ''},0.8,1\n" for at, rate in rates]
        (path / f"chunk-{client}-trace.csv").write_text("".join(rows))
    return str(path)


def test_azure_rows_are_requests_in_order(tmp_path):
    trace = read(azure(tmp_path), Sampling())
    assert trace.arrive_s.tolist() == pytest.approx([0.0, 1.052])
    assert trace.prompt_tokens.tolist() == [4808, 3180]
    assert trace.output_tokens.tolist() == [10, 8]


def test_more_load_repeats_azures_requests_nearby(tmp_path):
    trace = read(azure(tmp_path), Sampling(times=10.0, seed=1))
    assert len(trace) == 20
    assert sorted(trace.prompt_tokens.tolist()) == [3180] * 10 + [4808] * 10
    assert trace.arrive_s.max() <= 1.6


def test_servegen_rates_are_followed_between_the_middles_of_windows_and_clients_are_tenants(tmp_path):
    trace = read(servegen(tmp_path, rates=((0, 2.0), (600, 4.0), (1200, 4.0), (1800, 1.0))), Sampling(seed=2))
    assert trace.tenants == 2
    assert trace.duration_s == 2400.0
    rates = trace.rate_rps(100.0)
    assert rates[[0, 11, 23]].tolist() == pytest.approx([4.0, 8.0, 2.0], rel=0.15)
    assert rates[5:7].mean() == pytest.approx(6.0, rel=0.15)


def test_compression_changes_how_fast_rates_change_and_not_the_rates(tmp_path):
    folder = servegen(tmp_path, rates=((0, 2.0), (600, 2.0), (1200, 4.0), (1800, 4.0)))
    trace = read(folder, Sampling(seed=2, compression=4.0))
    assert trace.duration_s == 600.0
    assert trace.rate_rps(200.0)[[0, 2]].tolist() == pytest.approx([4.0, 8.0], rel=0.15)


def test_a_seed_gives_the_same_requests_again_and_another_one_others(tmp_path):
    folder = servegen(tmp_path)
    first, again, other = (read(folder, Sampling(seed=seed)) for seed in (7, 7, 8))
    assert np.array_equal(first.arrive_s, again.arrive_s)
    assert not np.array_equal(first.arrive_s, other.arrive_s)


def test_the_load_is_scaled_to_the_demand_that_is_asked_for(tmp_path):
    options = Options(
        source=servegen(tmp_path),
        model=Model(max_sequences=16),
        bounds=Bounds(max_replicas=20),
        mean_demand=5.0,
    )
    made = case(options, seed=0)
    assert float(demand(made.trace, made.model).mean()) == pytest.approx(5.0, rel=0.1)
    assert 1 <= made.bounds.first_replicas <= 20


def test_the_built_in_episode_is_llmds_staged_load():
    trace = read("llmd", Sampling())
    assert len(trace) == 12_480
    assert trace.duration_s == 2430.0
    assert trace.prompt_tokens.mean() == pytest.approx(4000, rel=0.01)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("other.csv", "a,b\n1,2\n", "columns must be TIMESTAMP"),
        ("empty.csv", AZURE, "no requests"),
        ("bad.csv", AZURE + "yesterday,1,2\n", "yesterday"),
    ],
)
def test_a_file_of_another_format_is_refused_by_name(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidRequest, match=says):
        read(str(tmp_path / name), Sampling())


def test_what_is_no_trace_is_refused(tmp_path):
    with pytest.raises(InvalidRequest, match="no trace"):
        read(str(tmp_path / "nothing"), Sampling())
    with pytest.raises(InvalidRequest, match=r"\*-trace.csv"):
        read(str(tmp_path), Sampling())
    (tmp_path / "a-trace.csv").write_text("1,2\n")
    with pytest.raises(InvalidRequest, match="a row must be"):
        read(str(tmp_path), Sampling())
