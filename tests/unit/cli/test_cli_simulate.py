"""`shoal simulate`: the table, the plots, and what is refused."""

import json
import sys

import pytest
from typer.testing import CliRunner

from app.cli import app

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture
def trace(tmp_path):
    """Ten minutes, a request every two seconds."""
    file = tmp_path / "steady.csv"
    rows = [f"2023-11-16 18:{at // 60:02d}:{at % 60:02d}.0000000,1000,100\n" for at in range(0, 600, 2)]
    file.write_text(AZURE + "".join(rows))
    return str(file)


def run(*arguments: str):
    return CliRunner().invoke(app, ["simulate", *arguments], env={"COLUMNS": "160"})


def test_the_table_has_a_row_for_the_oracle_and_one_per_policy(trace):
    result = run(
        trace, "--mean-demand", "2", "--policy", "shoal", "--policy", "knative", "--warm-up", "60", "--json"
    )
    assert result.exit_code == 0, result.output
    lines = json.loads(result.stdout)
    assert [line["policy"] for line in lines] == ["oracle", "shoal", "knative"]
    assert lines[0]["attainment"] >= 0.99
    assert all(line["gap_bound"] >= 1.0 for line in lines if line["attainment"] >= 0.99)


def test_static_is_the_least_pool_that_keeps_the_attainment(trace):
    def static(*options):
        result = run(trace, "--mean-demand", "2", "--policy", "static", "--warm-up", "60", "--json", *options)
        assert result.exit_code == 0, result.output
        [line] = [line for line in json.loads(result.stdout) if line["policy"].startswith("static")]
        return line["policy"], line["attainment"]

    name, attainment = static()
    assert (name, attainment >= 0.99) == ("static-2", True)
    assert static("--max-replicas", "1")[1] < 0.99


def test_plots_are_written_where_they_are_asked_for(trace, tmp_path):
    pytest.importorskip("matplotlib")
    result = run(
        trace, "--mean-demand", "2", "--policy", "knative", "--warm-up", "60", "--plots", str(tmp_path / "p")
    )
    assert result.exit_code == 0, result.output
    for name in ("replicas.svg", "attainment.svg"):
        assert (tmp_path / "p" / name).read_text().startswith("<?xml")


def test_without_matplotlib_plots_name_the_extra(trace, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(trace, "--plots", str(tmp_path / "p"))
    assert result.exit_code == 1
    assert "shoal[simulate]" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["nowhere.csv"], "no trace"), (["llmd", "--policy", "magic"], "choose from shoal, static")],
)
def test_what_is_unknown_is_refused_in_one_line(arguments, says):
    result = run(*arguments)
    assert result.exit_code == 1
    assert says in result.stderr
    assert "Traceback" not in result.output
