"""Which safetensors files of a folder are a model's weights: the index decides, not what lies beside."""

from __future__ import annotations

import json

import pytest

from medcot_utils.machine.names import OutsideError
from medcot_utils.machine.weight_files import WeightFilesError, weight_files

INDEX = "model.safetensors.index.json"


def make(folder, *names, index=None):
    for name in names:
        (folder / name).write_bytes(b"0")
    if index is not None:
        (folder / INDEX).write_text(index if isinstance(index, str) else json.dumps(index), encoding="utf-8")
    return folder


PARTS = ["model-1.safetensors", "model-2.safetensors"]
SHARDS = {"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-1.safetensors"}}


@pytest.mark.parametrize(
    ("names", "index", "expected"),
    [
        (["model.safetensors", "consolidated.safetensors"], None, ["model.safetensors"]),
        ([*PARTS, "consolidated.safetensors"], SHARDS, PARTS),
        (["model.safetensors", "model-1.safetensors"], SHARDS, ["model.safetensors"]),  # as transformers decides it
        (["consolidated.safetensors", "pytorch_model.bin"], None, []),
    ],
)  # fmt: skip
def test_only_files_that_transformers_loads_are_weights(tmp_path, names, index, expected):
    assert [file.name for file in weight_files(make(tmp_path, *names, index=index))] == expected


@pytest.mark.parametrize(
    "index",
    [
        "{", "[]", "{}", "null", "[" * 100_000, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}},
        {"weight_map": {"a": "model.bin"}},
    ],
)  # fmt: skip
def test_an_index_that_cannot_be_followed_is_one_clear_error(tmp_path, index):
    with pytest.raises(WeightFilesError, match=rf"^{INDEX} in .*/ is not an index of weights: expected a weight_map"):
        weight_files(make(tmp_path, "model-1.safetensors", index=index))


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "C:\\m.safetensors", "a\0.safetensors"])
def test_a_shard_of_another_folder_is_refused_by_name(tmp_path, name):
    with pytest.raises(OutsideError) as raised:
        weight_files(make(tmp_path, "model-1.safetensors", index={"weight_map": {"a": name}}))
    assert str(raised.value).startswith(f"{INDEX} in {tmp_path.name}/: {name!r} ")


def test_shards_that_are_links_are_read_as_in_the_hubs_cache(tmp_path):
    (tmp_path / "snapshots" / "0a").mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    folder = make(tmp_path / "snapshots" / "0a", index={"weight_map": {"a": "model-1.safetensors"}})
    make(tmp_path / "blobs", "1b")
    (folder / "model-1.safetensors").symlink_to("../../blobs/1b")
    assert weight_files(folder) == [folder / "model-1.safetensors"]


def test_a_shard_that_is_missing_is_named(tmp_path):
    with pytest.raises(WeightFilesError, match=rf"^model-2\.safetensors is missing in .*/, though {INDEX} names it"):
        weight_files(make(tmp_path, "model-1.safetensors", index=SHARDS))
