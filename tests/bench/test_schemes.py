"""Specs, sweeps and the cases they make: what is read, what is refused and how that is said."""

import pytest

from megatsp.bench.schemes import baseline, make_cases, parse_schemes, parse_sweep

TINY = ["trainer.seq_length=64", "trainer.micro_batch_size=1", "trainer.global_batch_size=2"]


def test_a_spec_is_a_preset_and_its_own_settings():
    plain, tuned = parse_schemes(["tsp", "tp_cp:tp=4,trainer.recompute_granularity=full"])
    assert (plain.label, plain.name, plain.overrides) == ("tsp", "tsp", ())
    assert tuned.name == "tp_cp" and tuned.label == "tp_cp:tp=4,trainer.recompute_granularity=full"
    assert tuned.overrides == ("parallel.tp=4", "trainer.recompute_granularity=full")


def test_a_reference_is_a_scheme_of_one_process():
    (scheme,) = parse_schemes(["plain"], references=["plain"])
    one, two = make_cases(TINY, [scheme], [], [1, 2])
    assert scheme.is_reference and not one.refused and "--world 1" in two.refused


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fsdp-cp", "unknown scheme 'fsdp-cp'; did you mean fsdp_cp"),
        ("plain", r"unknown scheme 'plain'.*schemes: cp, "),
        ("tsp:", "'' is no key=value; write tsp:key=value,key=value"),
        ("tsp:mlp_buckets", "'mlp_buckets' is no key=value"),
        ("tsp:mlp_bucket=2", "unknown key parallel.mlp_bucket; did you mean parallel.mlp_buckets"),
        ("tsp:trainer.dtpye=bf16", "did you mean trainer.dtype"),
        ("tsp:launch.nproc=2", "the same for all schemes, which do the same work"),
    ],
)
def test_a_wrong_spec_names_the_right_one(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_schemes([spec])


def test_a_spec_stands_once():
    with pytest.raises(ValueError, match="tsp is given twice"):
        parse_schemes(["tsp", "cp", "tsp"])


@pytest.mark.parametrize(
    ("specs", "expected"),
    [(["cp", "owner:mlp_buckets=4", "tsp"], "owner:mlp_buckets=4"), (["tp", "cp"], "tp")],
)
def test_the_baseline_is_the_first_tsp_scheme_or_the_first(specs, expected):
    assert baseline(parse_schemes(specs)).label == expected


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("seq_length=1024,4096", "trainer.seq_length", ("1024", "4096")),
        ("trainer.dtype=fp32, bf16", "trainer.dtype", ("fp32", "bf16")),
        ("name=a", "name", ("a",)),  # also the end of optimizer.name, but whole as it is
        ("model=gpt_tiny,gpt_125m", "model", ("gpt_tiny", "gpt_125m")),
        ("path=a,b", "data.path", ("a", "b")),
        ("rotary_scaling.factor=1,2", "model.rotary_scaling.factor", ("1", "2")),
    ],
)
def test_a_swept_key_may_be_its_last_component(text, key, values):
    sweep = parse_sweep(text)
    assert (sweep.key, sweep.values) == (key, values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seq_length", "write KEY=V1,V2"),
        ("=1,2", "write KEY=V1,V2"),
        ("seq_length=1,,2", "write KEY=V1,V2"),
        ("seq_length=1,1", "a value is given twice"),
        ("seq_lenght=1,2", "unknown key seq_lenght; did you mean seq_length"),
        ("trainer.seq_lenght=1", "did you mean trainer.seq_length"),
        ("model.rotary_scaling=1", "unknown key"),
        ("parallel=tsp,cp", "unknown key"),
    ],
)
def test_a_wrong_sweep_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_sweep(text)


def test_cases_are_the_product_in_the_tables_order():
    schemes = parse_schemes(["tsp", "tp:trainer.dtype=bf16"])
    sweeps = [parse_sweep("seq_length=64,128"), parse_sweep("num_layers=1,2")]
    cases = make_cases([*TINY, "trainer.dtype=fp32"], schemes, sweeps, [1, 2])
    assert len(cases) == 16 and not any(case.refused for case in cases)
    first, last = cases[0], cases[-1]
    assert first.point == {"trainer.seq_length": "64", "model.num_layers": "1"}
    assert (first.world_size, first.scheme.label, first.config.parallel.tsp) == (1, "tsp", 1)
    assert (last.world_size, last.scheme.label, last.config.parallel.tp) == (2, "tp:trainer.dtype=bf16", 2)
    assert last.config.trainer.seq_length == 128 and last.config.trainer.dtype == "bf16"  # its own, last


def test_what_cannot_run_at_these_sizes_is_said_in_its_case():
    cases = make_cases([*TINY, "launch.nproc=2"], parse_schemes(["tsp", "tsp:tsp=3", "tp"]), [], [])
    assert [case.world_size for case in cases] == [2, 2, 2]
    assert [bool(case.refused) for case in cases] == [False, True, False]
    assert "parallel" in cases[1].refused and "3" in cases[1].refused


@pytest.mark.parametrize(
    ("overrides", "sweeps", "message"),
    [
        (["trainer.seq_lenght=2"], [], "did you mean trainer.seq_length"),
        (["parallel=tsp"], [], "schemes choose the preset; use --schemes"),
        ([], ["seq_length=short"], "expected a whole number"),
        ([], ["seq_length=64", "trainer.seq_length=128"], "trainer.seq_length is swept twice"),
        ([], ["model=gpt_tinny"], "did you mean gpt_tiny"),
    ],
)
def test_what_is_no_configuration_is_an_error(overrides, sweeps, message):
    with pytest.raises(ValueError, match=message):
        make_cases([*TINY, *overrides], parse_schemes(["tsp"]), [parse_sweep(s) for s in sweeps], [1])
