"""Projections that read the same input, joined into one product."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from medcot_utils.models.joined_projections import JoinedLinear, join_projections

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(params=["llama", "qwen2 with biases"])
def model(request):
    torch.manual_seed(0)
    if request.param == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval()
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS)).eval()


def test_joined_projections_give_the_same_logits(model):
    tokens = torch.randint(0, 64, (2, 7))
    joined = join_projections(copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(joined(tokens).logits, model(tokens).logits)


def test_joined_projections_take_no_more_memory(model):
    held = {id(parameter.untyped_storage()): parameter.untyped_storage().nbytes() for parameter in model.parameters()}
    join_projections(model)
    storages = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes() for parameter in model.parameters()}
    assert sum(storages.values()) == sum(held.values())


def test_a_layer_has_one_product_per_input(model):
    calls = []
    join_projections(model)

    def count(graph, _):
        calls.append(sum(node.target is torch._C._nn.linear for node in graph.graph.nodes))
        return graph.forward

    layer = model.model.layers[0]
    hidden = torch.randn(2, 7, 32)
    places = model.model.rotary_emb(hidden, torch.arange(7)[None])
    with torch.no_grad():
        compiled = torch.compile(lambda hidden: layer(hidden, position_embeddings=places), backend=count)(hidden)
        torch.testing.assert_close(compiled, layer(hidden, position_embeddings=places))
    assert calls == [4]  # query, key, and value; output; gate and up; down


def test_a_projection_that_is_not_plain_stays(model):
    attention = model.model.layers[0].self_attn
    attention.k_proj = torch.nn.Sequential(attention.k_proj)
    join_projections(model)
    assert type(attention.q_proj) is torch.nn.Linear and type(attention.v_proj) is torch.nn.Linear
    assert isinstance(model.model.layers[1].self_attn.q_proj, JoinedLinear)


def test_another_input_is_not_given_the_joined_products_of_the_last(model):
    attention = join_projections(model).model.layers[0].self_attn
    first, second = torch.randn(2, 32), torch.randn(2, 32)
    with torch.no_grad():
        attention.q_proj(first)
        found = attention.k_proj(second)
        expected = torch.nn.functional.linear(second, attention.k_proj.weight, attention.k_proj.bias)
    torch.testing.assert_close(found, expected)
