"""Model FLOPs of a token, counted by hand."""

from dataclasses import replace

import torch

from megatsp.schema import ModelConfig
from megatsp.training.flops import attended_pairs, flops, flops_per_token, peak_tflops

MODEL = ModelConfig(
    num_layers=3, hidden_size=10, ffn_hidden_size=7, num_attention_heads=4, num_query_groups=2, kv_channels=6,
    vocab_size=11,
)  # fmt: skip
# q and o: 10 x 24; k and v: 10 x 12; gate, up and down: 10 x 7; two gains of 10; a last gain of 10.
PARAMETERS_WITHOUT_EMBEDDING = 3 * (2 * 240 + 2 * 120 + 3 * 70 + 20) + 10


def test_tied():
    # Scores and mixed values: 2 products x 2 FLOPs x 6 channels x 4 heads x T/2 keys; backward twice more.
    attention = 3 * (2 * 2 * 6 * 4 * 32 / 2) * 3
    assert flops_per_token(MODEL, 32) == 6 * (PARAMETERS_WITHOUT_EMBEDDING + 110) + attention


def test_an_embedding_that_is_only_looked_up_is_not_counted():
    untied = replace(MODEL, untie_embeddings_and_output_weights=True)
    assert flops_per_token(untied, 32) == flops_per_token(MODEL, 32)


def test_documents_cost_their_own_pairs_alone():
    first = torch.tensor([[0, 0, 0, 3, 4, 4], [0, 0, 0, 0, 0, 0]])
    assert attended_pairs(first) == (1 + 2 + 3 + 1 + 1 + 2) + 21
    assert attended_pairs(first[0]) == 10
    parameters = 6 * 12 * (PARAMETERS_WITHOUT_EMBEDDING + 110)
    assert flops(MODEL, 12, 31) == parameters + 31 * 3 * (2 * 2 * 6 * 4) * 3
    assert flops(MODEL, 32, 32 * 16) == 32 * flops_per_token(MODEL, 32)


def test_peak_is_that_of_the_named_gpu(monkeypatch):
    assert peak_tflops(torch.device("cpu")) is None
    for name, peak in (("AMD Instinct MI300X", 1307.0), ("NVIDIA H200", 989.0), ("Fancy 1", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_tflops(torch.device("cuda")) == peak
