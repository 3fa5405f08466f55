"""Generation: logits equal the dense reference's, and the text does not depend on the ranks."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dense import DenseGPT
from distributed import run_distributed
from parity import MODEL, OLMO2, case, load, relative_error, weights
from runs import command, overrides, train_on_ranks, write_corpus
from waiting import LIMIT_S

from megatsp.axes import Axes
from megatsp.data.tokenizer import ByteTokenizer
from megatsp.model.parallelize import build_model
from megatsp.schema import AXES, ModelConfig
from megatsp.training.generate import generate, next_token_logits

MODELS = {
    "tied": replace(MODEL, vocab_size=257),
    "untied": replace(
        MODEL, vocab_size=257, untie_embeddings_and_output_weights=True, no_rope_freq=2, **OLMO2
    ),
}
LENGTHS = (1, 2, 7, 16, 33)
IDS = torch.randint(0, 257, (40,), generator=torch.Generator().manual_seed(3)).tolist()
TEXTS = [("harbour", 0.0, 20), ("", 0.0, 12), ("a\n", 1.0, 20)]  # prompt, temperature, context


def logits_and_texts(
    model: ModelConfig, state: dict[str, torch.Tensor], parallel: dict
) -> tuple[list[torch.Tensor], list[str]]:
    """On a rank: the logits after IDS cut to each of LENGTHS, and the continuations of TEXTS."""
    case_ = replace(case(**parallel), model=model)
    axes = Axes.build(case_.parallel, torch.device("cpu"))
    gpt = build_model(case_.config(), axes)
    load(gpt, state)
    logits = [next_token_logits(gpt, axes, IDS[:length]) for length in LENGTHS]
    texts = [
        generate(gpt, axes, ByteTokenizer(), prompt, 6, temperature, seed=5, context=context)
        for prompt, temperature, context in TEXTS
    ]
    return logits, texts


MESHES = [
    ("tied", [dict(tsp=1), dict(tsp=2), dict(tsp=4), dict(tsp=2, dp_shard=2)]),
    ("tied", [dict(tp=2, dp_shard=2), dict(tp=2, cp=2)]),
    ("tied", [dict(tsp=2, kv_exchange="ulysses"), dict(tsp=2, cp=2, kv_exchange="hierarchical")]),
    ("untied", [dict(tsp=1), dict(tsp=2, tsp_layout="owner"), dict(dp_shard=3)]),
    ("untied", [dict(tsp=1), dict(tsp=2, cp=2, fsdp_over_cp=True), dict(dp_replicate=2, tsp=2)]),
]


@pytest.mark.parametrize(("name", "meshes"), MESHES)
def test_logits_and_text_do_not_depend_on_the_ranks(name, meshes):
    model = MODELS[name]
    dense = DenseGPT(model)
    dense.load_state_dict(weights(model))
    with torch.no_grad():
        expected = [dense(torch.tensor([IDS[:length]]))[0, -1] for length in LENGTHS]
    texts = []
    for parallel in meshes:
        ranks = math.prod(size for key, size in parallel.items() if key in AXES)
        parallel = {"dp_shard": 1, **parallel}
        results = run_distributed(logits_and_texts, ranks, model, weights(model), parallel)
        for logits, _ in results:
            for found, wanted in zip(logits, expected, strict=True):
                assert found.dtype == torch.float32 and relative_error(found, wanted) < 1e-5
        texts += [text for _, text in results]
    assert all(text == texts[0] for text in texts)


def stop_at_eod(state: dict[str, torch.Tensor]) -> str:
    """On a rank: what a model generates that likes the end of a document best."""
    case_ = replace(case(tsp=1), model=MODELS["untied"])
    axes = Axes.build(case_.parallel, torch.device("cpu"))
    gpt = build_model(case_.config(), axes)
    load(gpt, state)
    return generate(gpt, axes, ByteTokenizer(), "abc", 12, temperature=0, seed=5, context=20)


def test_generation_ends_with_the_document():
    state = {**weights(MODELS["untied"])}
    with torch.no_grad():
        dense = DenseGPT(MODELS["untied"])
        dense.load_state_dict(state)
        last = dense.model(torch.tensor([ByteTokenizer().encode("abc")]))[0, -1]
    head = state["lm_head.weight"].clone()
    head[ByteTokenizer().eod] = 100 * last  # the largest logit by far
    assert run_distributed(stop_at_eod, 1, {**state, "lm_head.weight": head})[0] == "abc"


def test_the_command_continues_a_runs_text_on_any_number_of_ranks(tmp_path: Path):
    write_corpus(tmp_path / "corpus")
    train_on_ranks(1, overrides(tmp_path / "corpus", tmp_path, "trainer.train_iters=20"))
    asked = ["generate", str(tmp_path / "run"), "--prompt", "the ", "--tokens", "8", "--temperature", "0"]
    jobs = [command(*asked, "--nproc", nproc) for nproc in "12"]
    printed = [job.communicate(timeout=LIMIT_S) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], printed
    assert printed[0] == printed[1] and printed[0][1] == ""
    assert printed[0][0].startswith("the ") and len(printed[0][0]) > len("the \n")
