"""Cluster profiles: what is read, what is refused, what becomes effective, here and in bash."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatsp.cluster.profiles import (
    Expected,
    Profile,
    Variable,
    apply,
    export_lines,
    load_profile,
    profile_names,
)

ROOT = Path(__file__).parents[2]
GOOD = """\
about: ours
variables:
  NCCL_DEBUG: {value: WARN, why: says why}
expected: {gemm_tflops: 500, ranks_per_node: 4, source: measured}
"""


@pytest.mark.parametrize("name", ["mi300x_roce", "h100_infiniband", "ethernet", "cpu"])
def test_shipped_profiles_load_with_a_reason_for_each_variable(name: str) -> None:
    profile = load_profile(name)

    assert name in profile_names()
    assert profile.variables
    assert all(len(variable.why.split()) > 5 for variable in profile.variables)


def test_expected_speeds_of_mi300x_are_those_of_the_reference() -> None:
    expected = load_profile("mi300x_roce").expected

    assert replace(expected, source="") == Expected(550.0, 315.0, 45.0, 8)
    assert "published" in expected.source
    assert load_profile("ethernet").expected == Expected()  # not known


def test_a_profile_of_the_users_own_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "ours.yaml").write_text(GOOD)

    profile = load_profile(str(tmp_path / "ours.yaml"))

    assert profile.variables == (Variable("NCCL_DEBUG", "WARN", "says why"),)
    assert profile.expected == Expected(gemm_tflops=500.0, ranks_per_node=4, source="measured")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mi300", r"unknown profile mi300; did you mean mi300x_roce\? \(profiles: none, cpu, .*path to"),
        ("./absent.yaml", "no profile absent.yaml; shipped ones: none, cpu"),
        ("absent.yaml", "no profile absent.yaml"),
    ],
)
def test_unknown_profile(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_profile(name)


VARIABLES = "about: ours\nvariables:\n  "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "expected a mapping with about, variables, expected"),
        ("variables: {}", "about is missing"),
        ("about: 3", "about: expected text"),
        ("about: [", "cannot be read"),
        ("about: a\nabout: b", "about stands there twice"),
        ("about: a\nvariabels: {}", r"unknown key variabels; did you mean variables\?"),
        ("about: a\nvariables: [A]", "variables: expected a mapping"),
        (f"{VARIABLES}A: x", r"variables\.A: expected a mapping with value, why"),
        (f"{VARIABLES}A: {{value: x}}", r"variables\.A\.why is missing"),
        (f"{VARIABLES}A: {{why: x}}", r"variables\.A\.value is missing"),
        (f"{VARIABLES}A: {{value: x, why: ' '}}", r"variables\.A\.why: expected text"),
        (f"{VARIABLES}A: {{value: 3, why: x}}", r"variables\.A\.value: expected text; quote it: '3'"),
        (f'{VARIABLES}A: {{value: "a\\nb", why: x}}', r"variables\.A\.value: expected one line of printable"),
        (f'{VARIABLES}A: {{value: a, why: "\\e[0m"}}', r"variables\.A\.why: expected printable"),
        (f"{VARIABLES}A-B: {{value: x, why: y}}", r"variables\.A-B: a variable's name has letters"),
        (f"{VARIABLES}A: {{value: x, why: y, wy: z}}", r"unknown key variables\.A\.wy; did you mean why\?"),
        (f"{VARIABLES}RANK: {{value: '0', why: y}}", r"variables\.RANK is set for each rank"),
        (
            "about: a\nexpected: {gemm_tflop: 3}",
            r"unknown key expected\.gemm_tflop; did you mean gemm_tflops\?",
        ),
        ("about: a\nexpected: {gemm_tflops: fast}", r"expected\.gemm_tflops=fast: expected a number >= 0"),
        ("about: a\nexpected: {gemm_tflops: -1}", r"expected\.gemm_tflops=-1: expected a number >= 0"),
        ("about: a\nexpected: {gemm_tflops: .nan}", r"expected\.gemm_tflops=nan"),
        ("about: a\nexpected: {ranks_per_node: 8.0}", r"ranks_per_node=8\.0: expected a whole number >= 0"),
        ("about: a\nexpected: {gemm_tflops: 3}", r"expected\.source is missing"),
    ],
)
def test_what_a_file_may_not_say(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)

    with pytest.raises(ValueError, match=message) as caught:
        load_profile(str(file))

    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "HF_TOKEN", "My_Secret", "DB_PASSWORD", "apikey", "TOKENS", "SSH_KEY2"]
)
def test_secrets_are_refused_and_not_shown(name: str, tmp_path: Path) -> None:
    (tmp_path / "ours.yaml").write_text(f"{VARIABLES}{name}: {{value: hunter2, why: to log in}}")

    with pytest.raises(ValueError, match="looks like a secret") as caught:
        load_profile(str(tmp_path / "ours.yaml"))

    assert "hunter2" not in str(caught.value)


def test_a_name_that_only_resembles_a_secret_is_taken(tmp_path: Path) -> None:
    text = f"{VARIABLES}TOKENIZERS_PARALLELISM: {{value: 'false', why: 'no threads'}}"
    (tmp_path / "ours.yaml").write_text(text)

    assert load_profile(str(tmp_path / "ours.yaml")).variables[0].name == "TOKENIZERS_PARALLELISM"


OURS = Profile("ours", "", (Variable("A", "1", "x"), Variable("B", "2", "x"), Variable("C", "3", "x")))


def test_the_users_own_value_wins_also_an_empty_one() -> None:
    environ = {"A": "9", "B": "", "PATH": "/bin"}

    lines = apply(OURS, environ)

    assert environ == {"A": "9", "B": "", "C": "3", "PATH": "/bin"}
    assert lines == [
        "A=9 (your own; profile ours has 1)",
        "B= (your own; profile ours has 2)",
        "C=3 (profile ours)",
    ]
    assert apply(OURS, environ) == lines, "a rank whose launcher applied it says the same"


def test_none_sets_nothing() -> None:
    environ: dict[str, str] = {}

    assert apply(load_profile("none"), environ) == []
    assert not environ
    assert export_lines(load_profile("none")) == []


VALUES = [
    "3", "", "a b  c", '"x"', "it's", "'", "''a b''", "$HOME", "${HOME}", "`id`", "$(id)", "a\\b\\", "}",
    "{a}", "!x", "#x", "~", "*", "a;b&c|d", "ü", "\\$x", "-n", "${A:-}}",
]  # fmt: skip


def bash(lines: list[str], environment: dict[str, str]) -> str:
    """What the variables are after these lines, one a line."""
    script = "\n".join(["set -eu", *lines, *(f'printf "%s\\n" "$V{i}"' for i in range(len(VALUES)))])
    return subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_bash_reads_back_every_value() -> None:
    variables = tuple(Variable(f"V{i}", value, "why: $x `y` # z") for i, value in enumerate(VALUES))
    lines = export_lines(Profile("ours", "", variables))
    home = {"PATH": os.environ["PATH"], "HOME": "/nowhere"}

    assert bash(lines, home).split("\n")[:-1] == VALUES
    kept = bash(lines, home | {f"V{i}": "" if i % 2 else "own $x" for i in range(len(VALUES))})
    assert kept.split("\n")[:-1] == ["" if i % 2 else "own $x" for i in range(len(VALUES))]


def test_a_line_says_why() -> None:
    assert export_lines(OURS)[0] == 'export A="${A-1}"  # x'


def test_what_clusters_need_is_loaded_without_torch_or_matplotlib() -> None:
    code = (
        "import sys; from megatsp.cluster import draw, mesh, profiles, start; profiles.load_profile('cpu'); "
        "sys.exit(bool({'torch', 'matplotlib'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
