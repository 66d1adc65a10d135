"""What a model's name says of it where a reader sees it."""

from __future__ import annotations

import pytest

from medcot_utils.models.embedded import describe_model, find_hub_address


@pytest.mark.parametrize("there", [True, False])
def test_a_local_model_is_described_without_its_path(there, tmp_path):
    folder = tmp_path / "llama"
    if there:
        folder.mkdir()
    assert describe_model(str(folder)) == "llama (a local folder)"
    assert find_hub_address(str(folder)) is None
    assert describe_model("me/llama") == find_hub_address("me/llama") == "me/llama"
