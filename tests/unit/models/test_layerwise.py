"""The loss of a model that memory does not hold: layer by layer, each layer read once, and the loaded model's own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES

from medcot_utils.config import load_config
from medcot_utils.models import layerwise
from medcot_utils.models.embedded import find_model_source
from medcot_utils.models.layerwise import (
    LayerwiseError,
    base_16bit_losses,
    describe_16bit_base,
    layerwise_losses,
    unquantized_losses,
)
from medcot_utils.models.losses import row_losses
from medcot_utils.models.merging import load_unquantized

pytestmark = pytest.mark.model

TINY = "embedded:tiny-random-llama"


@pytest.fixture(scope="module")
def rows():
    from datasets import Dataset

    torch.manual_seed(1)
    texts = [torch.randint(5, 1000, (length,)).tolist() for length in (70, 37, 80, 5, 90)]
    return Dataset.from_list(
        [{"id": i, "input_ids": ids, "labels": [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]} for i, ids in enumerate(texts)]
    )


@pytest.fixture
def reads(monkeypatch):
    """How often each weight was read from its file."""
    from accelerate.utils import OffloadedWeightsLoader

    found, read = Counter(), OffloadedWeightsLoader.__getitem__
    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", lambda self, name: found.update([name]) or read(self, name))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_layer_by_layer_is_the_loaded_models(family, rows, reads, tmp_path):
    FAMILIES[family].make(tmp_path)
    whole = row_losses(load_unquantized(tmp_path, "float32")[0], rows, 2, "base")
    found = layerwise_losses(tmp_path, "float32", rows, 2, "base")
    assert [record | {"nll": 0} for record in found] == [record | {"nll": 0} for record in whole]
    assert [record["nll"] for record in found] == pytest.approx([record["nll"] for record in whole], rel=1e-5)
    assert set(reads.values()) == {1}, "five rows in batches of two, and every weight is read once"


def test_only_one_layers_weights_are_in_memory(rows, monkeypatch):
    held, whole = [], layerwise._in_pieces
    opened = []

    def watched(forward, size, bar):
        def run(*args, **kwargs):
            layers = opened[0].get_decoder().layers
            held.append([all(p.device.type != "meta" for p in layer.parameters()) for layer in layers])
            return forward(*args, **kwargs)

        return whole(run, size, bar)

    open_model = layerwise._open_model
    monkeypatch.setattr(layerwise, "_open_model", lambda *a: opened.append((made := open_model(*a))[0]) or made)
    monkeypatch.setattr(layerwise, "_in_pieces", watched)
    layerwise_losses(Path(find_model_source(TINY)), "float32", rows, 2, "base")
    assert held == [[True, False]] * 3 + [[False, True]] * 3
    assert not any(p.device.type != "meta" for p in opened[0].get_decoder().layers.parameters())


def test_rows_that_memory_does_not_hold_go_in_groups(rows, reads, monkeypatch):
    folder = Path(find_model_source(TINY))
    together = layerwise_losses(folder, "float32", rows, 2, "base")
    reads.clear()
    layer = "model.layers.1.mlp.up_proj.weight"
    monkeypatch.setattr(layerwise, "_split_into_groups", lambda *arguments: [[4, 2], [0, 1], [3]])
    apart = layerwise_losses(folder, "float32", rows, 2, "base")
    assert reads[layer] == 3, "once for each group"
    assert [record["id"] for record in apart] == ["0", "1", "2", "3", "4"]
    assert [record["nll"] for record in apart] == pytest.approx([record["nll"] for record in together], rel=1e-5)


def test_a_group_takes_half_of_the_free_memory(monkeypatch):
    from types import SimpleNamespace

    from transformers import AutoConfig

    model = SimpleNamespace(config=AutoConfig.from_pretrained(find_model_source(TINY)), dtype=torch.float32)
    row = layerwise._COPIES * 64 * 4 * 100  # bytes of the hidden states of 100 tokens
    monkeypatch.setattr(layerwise, "virtual_memory", lambda: SimpleNamespace(available=2 * 3 * row))
    assert layerwise._split_into_groups([50, 100, 100, 50, 10], model, "cpu") == [[1, 2, 0], [3, 4]]
    monkeypatch.setattr(layerwise, "virtual_memory", lambda: SimpleNamespace(available=1))
    assert layerwise._split_into_groups([50, 100], model, "cpu") == [[1], [0]]


def test_a_layer_that_gives_more_than_hidden_states_is_joined():
    from tqdm import tqdm

    seen = []

    def layer(hidden, mask, positions=None, cache=None):
        seen.append((tuple(hidden.shape), tuple(mask["full"].shape), tuple(positions[0].shape), cache))
        return hidden + mask["full"], None

    hidden, mask = torch.arange(10.0).view(5, 2), torch.arange(10.0).view(5, 2)
    forward = layerwise._in_pieces(layer, 2, tqdm(disable=True))
    joined, more = forward(hidden, {"full": mask}, positions=(torch.zeros(1, 2),), cache=None)
    assert torch.equal(joined, hidden + mask) and more is None
    assert seen == [((size, 2), (size, 2), (1, 2), None) for size in (2, 2, 1)], "what is one for all stays whole"


@pytest.mark.parametrize("fits", [True, False])
def test_a_model_that_does_not_fit_goes_layer_by_layer(rows, monkeypatch, fits):
    asked = []
    monkeypatch.setattr(layerwise, "fits_in_memory", lambda weights: asked.append(weights) or fits)
    spoilt = "layerwise_losses" if fits else "load_unquantized"
    monkeypatch.setattr(layerwise, spoilt, lambda *arguments: pytest.fail("the other way"))
    found = unquantized_losses(TINY, None, "float32", rows, 4, "base_16bit")
    parameters = load_unquantized(find_model_source(TINY), "float32")[0].num_parameters()
    assert asked == [4 * parameters]
    assert {record["model"] for record in found} == {"base_16bit"} and len(found) == len(rows)


def test_the_16_bit_base_computes_in_the_runs_own_dtype(rows, monkeypatch):
    seen = []
    monkeypatch.setattr(layerwise, "unquantized_losses", lambda *arguments: seen.append(arguments))
    base_16bit_losses(load_config("smoke", ["model.dtype=bfloat16", "training.per_device_eval_batch_size=3"]), rows)
    assert seen == [(TINY, None, "bfloat16", rows, 3, "base_16bit")]


def test_the_16_bit_base_of_the_demo_is_told_to_be_unpacked():
    assert "Q4_1" in describe_16bit_base(load_config("demo")) and "Q4_1" not in describe_16bit_base(load_config("article"))


def test_weights_stored_in_another_form_are_one_clear_error(rows, tmp_path):
    import shutil

    folder = Path(shutil.copytree(find_model_source(TINY), tmp_path / "base"))
    weights = load_file(folder / "model.safetensors")
    fused = {name: weight for name, weight in weights.items() if "layers.1.self_attn.q" not in name}
    save_file(fused, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LayerwiseError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight of base/ is not stored in the form"):
        layerwise_losses(folder, "float32", rows, 2, "base")
