"""The engines: the embedded tiny model, 4-bit loading on a CPU, fresh LoRA matrices, the merge, and gradients after inference."""

from __future__ import annotations

import gc
import importlib.util
import types
import weakref

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from medcot_utils.config import load_config
from medcot_utils.errors import PlatformError
from medcot_utils.models import embedded, transformers_engine
from medcot_utils.models.engine import get_engine, get_local_rank
from medcot_utils.models.merging import MergeError, load_base, load_unquantized, merge
from medcot_utils.run.files import sha256_of

pytestmark = pytest.mark.model

CONFIG = load_config("smoke")
TINY = "embedded:tiny-random-llama"
PROJECTIONS = CONFIG.lora.target_modules


@pytest.fixture(scope="module")
def engine():
    return get_engine(CONFIG.model)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def token_ids(model, columns=24):
    generator = torch.Generator().manual_seed(7)
    return torch.randint(5, model.config.vocab_size, (2, columns), generator=generator)


# --- the embedded model --------------------------------------------------------------------------------------------


def test_a_cached_model_is_made_once(own_cache):
    calls = []

    def make(folder):
        calls.append(folder)
        folder.mkdir(exist_ok=True)
        (folder / "weights").write_text("w")

    first, second = embedded._cached("thing", make), embedded._cached("thing", make)
    assert first == second == own_cache / "thing"
    assert len(calls) == 1
    assert calls[0] != first, "it must be made beside and renamed, not made in place"
    assert [path.name for path in own_cache.iterdir()] == ["thing"]


def test_a_maker_that_raises_leaves_nothing_and_is_called_again(own_cache):
    def fail(folder):
        folder.mkdir(exist_ok=True)
        (folder / "half").write_text("half")
        raise RuntimeError("killed in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        embedded._cached("thing", fail)
    assert list(own_cache.iterdir()) == []
    made = embedded._cached("thing", lambda folder: folder.mkdir(exist_ok=True))
    assert made.is_dir() and list(made.iterdir()) == []


def test_what_another_process_made_meanwhile_is_taken(own_cache):
    def make(folder):
        folder.mkdir(exist_ok=True)
        (own_cache / "thing").mkdir()
        (own_cache / "thing" / "theirs").write_text("first")

    # The rename onto a folder that is not empty fails with an OSError, and theirs is as good.
    assert (embedded._cached("thing", make) / "theirs").read_text() == "first"
    assert [path.name for path in own_cache.iterdir()] == ["thing"]


def test_the_tiny_model_is_the_same_when_made_twice(tmp_path, monkeypatch):
    made = []
    for name in ("one", "two"):
        monkeypatch.setenv("MEDCOT_CACHE", str(tmp_path / name))
        torch.manual_seed(len(made))  # the caller's random state must not matter
        made.append(embedded.find_model_source(TINY))
    assert made[0] != made[1]
    assert sha256_of(tmp_path / "one")[0] == sha256_of(tmp_path / "two")[0]
    assert len(list((tmp_path / "one").glob("*/model.safetensors"))) == 1


def test_the_tiny_tokenizer_has_one_bos_and_whole_think_tags(engine):
    _, tokenizer = engine.load(CONFIG.model)
    ids = tokenizer("<think>\nx</think>")["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert tokenizer.convert_tokens_to_ids("<think>") in ids and tokenizer.convert_tokens_to_ids("</think>") in ids
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_an_unknown_embedded_model_is_named_with_the_known_ones():
    with pytest.raises(PlatformError, match=r"embedded:nope.*smollm2-135m-instruct or embedded:tiny-random-llama"):
        embedded.find_model_source("embedded:nope")


def test_a_hub_name_is_left_as_it_is():
    assert embedded.find_model_source("someone/some-model") == "someone/some-model"


@pytest.mark.skipif(
    torch.cuda.is_available() and importlib.util.find_spec("unsloth") is not None, reason="unsloth can run on this machine"
)
def test_unsloth_where_it_cannot_run_is_refused_with_the_way_out():
    with pytest.raises(PlatformError, match=r"unsloth: .*model\.engine=transformers"):
        get_engine(load_config("smoke", ["model.engine=unsloth"]).model)


# --- loading and LoRA ----------------------------------------------------------------------------------------------


def test_every_projection_is_in_4_bits_on_the_cpu(engine):
    model, _ = engine.load(CONFIG.model)
    quantized = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    assert len(quantized) == len(PROJECTIONS) * model.config.num_hidden_layers
    assert {layer.weight.dtype for layer in quantized.values()} == {torch.uint8}
    assert {layer.weight.quant_state.quant_type for layer in quantized.values()} == {"nf4"}
    assert all(layer.weight.quant_state.nested for layer in quantized.values()), "double quantization is asked for"
    assert torch.isfinite(model(token_ids(model)).logits).all()


def test_without_4_bit_nothing_is_quantized(engine):
    model, _ = engine.load(load_config("smoke", ["model.load_in_4bit=false"]).model)
    assert not any(isinstance(layer, Linear4bit) for layer in model.modules())
    assert model.dtype == torch.float32


@pytest.mark.parametrize("in_4bit", [True, False])
def test_a_fresh_lora_trains_only_its_matrices_and_keeps_logits(engine, in_4bit):
    model, _ = engine.load(load_config("smoke", [f"model.load_in_4bit={in_4bit}"]).model)
    ids = token_ids(model)
    with torch.no_grad():
        before = model.eval()(ids).logits
        tuned = engine.add_lora(model, CONFIG.lora).eval()
        after = tuned(ids).logits
    trainable = {name: weight for name, weight in tuned.named_parameters() if weight.requires_grad}
    assert len(trainable) == 2 * len(PROJECTIONS) * model.config.num_hidden_layers
    assert all("lora_A" in name or "lora_B" in name for name in trainable)
    assert all(not weight.any() for name, weight in trainable.items() if "lora_B" in name)
    assert all(weight.any() for name, weight in trainable.items() if "lora_A" in name)
    assert torch.equal(before, after)


def test_random_state_decides_the_matrices_a(engine):
    def matrices_a(state):
        torch.manual_seed(state + 100)
        model = engine.add_lora(engine.load(CONFIG.model)[0], load_config("smoke", [f"lora.random_state={state}"]).lora)
        return torch.cat([weight.flatten() for name, weight in model.named_parameters() if "lora_A" in name])

    assert torch.equal(matrices_a(1), matrices_a(1))
    assert not torch.equal(matrices_a(1), matrices_a(2))


# --- merge ---------------------------------------------------------------------------------------------------------


def test_the_merge_adds_to_the_16_bit_base_not_the_4_bit_one(engine, tmp_path):
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM

    model, _ = engine.load(CONFIG.model)
    packed = model.get_submodule("model.layers.1.mlp.up_proj").weight
    quantized = dequantize_4bit(packed.data, packed.quant_state).float()
    tuned = engine.add_lora(model, load_config("smoke", ["lora.r=4", "lora.lora_alpha=8"]).lora)
    torch.manual_seed(1)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    tuned.save_pretrained(tmp_path / "adapter")
    merge(CONFIG.model, tmp_path / "adapter", tmp_path / "merged", "float16")

    base = load_base(CONFIG.model, "float16")[0].get_parameter("model.layers.1.mlp.up_proj.weight").float()
    merged_model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged_model.dtype == torch.float16
    merged = merged_model.get_parameter("model.layers.1.mlp.up_proj.weight").float()
    layer = tuned.base_model.model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        delta = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight) * 8 / 4

    assert torch.equal(layer.base_layer.weight, quantized), "on a CPU training unpacks the weights once, to the same values"
    assert delta.abs().mean() > 1e-3, "a delta of nothing would prove nothing"
    rounding = 2**-10 * (base.abs() + delta.abs()).max()
    assert (merged - (base + delta)).abs().max() <= rounding
    assert (merged - (quantized + delta)).abs().max() > 2 * rounding


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_merge_equals_pefts_in_float32_and_splits_its_files(monkeypatch, tmp_path, use_rslora):
    import huggingface_hub
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    base, tokenizer = load_base(CONFIG.model, "float32")
    for name, module in base.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")):
            module.bias = torch.nn.Parameter(torch.randn(module.out_features))
    base.config.attention_bias = True
    source = tmp_path / "base"
    base.save_pretrained(source)
    tokenizer.save_pretrained(source)
    settings = load_config("smoke", [f"model.name={source}"]).model
    split = huggingface_hub.split_torch_state_dict_into_shards
    monkeypatch.setattr(
        huggingface_hub,
        "split_torch_state_dict_into_shards",
        lambda shapes, max_shard_size: split(shapes, max_shard_size="200KB"),
    )

    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], use_rslora=use_rslora, bias="all", init_lora_weights=False
    )
    tuned = get_peft_model(base, lora)
    for name, weight in tuned.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(weight)
    tuned.save_pretrained(tmp_path / "adapter")
    merge(settings, tmp_path / "adapter", tmp_path / "merged", "float32")

    expected = tuned.merge_and_unload().state_dict()
    files = list((tmp_path / "merged").glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) > 1
    assert expected.keys() == found.keys()
    worst = max(float((found[name] - weight).abs().max()) for name, weight in expected.items())
    assert worst <= 1e-6
    reloaded = load_unquantized(tmp_path / "merged", "float32")[0].state_dict()
    assert all(torch.equal(reloaded[name], weight) for name, weight in found.items())


def test_another_models_adapter_is_refused_by_its_layer(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3))
    get_peft_model(other, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        MergeError, match=r"changes model\.layers\.2\.self_attn\.q_proj\.weight, which embedded:tiny-random-llama"
    ):
        merge(CONFIG.model, tmp_path / "adapter", tmp_path / "merged", "float16")
    assert not (tmp_path / "merged").exists()


def test_a_merge_requires_safetensors_and_a_lora_adapter(tmp_path):
    from peft import LoraConfig, get_peft_model

    base, _ = load_base(CONFIG.model, "float32")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], use_dora=True)).save_pretrained(tmp_path / "dora")
    with pytest.raises(MergeError, match="dora/ is more than plain LoRA of one rank"):
        merge(CONFIG.model, tmp_path / "dora", tmp_path / "merged", "float16")

    (tmp_path / "empty").mkdir()
    base.config.save_pretrained(tmp_path / "empty")
    settings = load_config("smoke", [f"model.name={tmp_path / 'empty'}"]).model
    with pytest.raises(MergeError, match="there is no safetensors file in empty/"):
        merge(settings, tmp_path / "dora", tmp_path / "merged", "float16")


# --- 4-bit weights on a CPU ----------------------------------------------------------------------------------------

on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the 4-bit layers are fast as they are")


def layers_in_4_bits(model):
    return [layer for layer in model.modules() if isinstance(layer, Linear4bit)]


def packed_layers(model):
    return [layer for layer in layers_in_4_bits(model) if getattr(layer.weight.quant_state, "packing_format_for_cpu", False)]


def assert_gradients_reach_the_first_layer(model):
    model.train()
    ids = token_ids(model)
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {n: w.grad for n, w in model.named_parameters() if ".layers.0." in n and "lora_B" in n}
    assert len(gradients) == len(PROJECTIONS)
    missing = [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]
    assert missing == []
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@on_the_cpu
def test_for_inference_computes_with_the_4_bit_values(engine):
    model = engine.load(CONFIG.model)[0].eval()
    with torch.inference_mode():
        expected = model(token_ids(model)).logits
        model = engine.for_inference(model)
        assert layers_in_4_bits(model) == [] and model.config._attn_implementation == "grouped_decode"
        assert torch.allclose(model(token_ids(model)).logits, expected, atol=1e-4)


@on_the_cpu
def test_for_inference_keeps_the_adapter_and_its_switch(engine):
    tuned = engine.add_lora(engine.load(CONFIG.model)[0], CONFIG.lora).eval()
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)

    def both(model):
        with torch.inference_mode():
            with model.disable_adapter():
                base = model(token_ids(model)).logits
            return base, model(token_ids(model)).logits

    base, with_adapter = both(tuned)
    same_base, same_adapter = both(engine.for_inference(tuned))
    assert layers_in_4_bits(tuned) == [] and not torch.allclose(base, with_adapter, atol=1e-2)
    assert torch.allclose(base, same_base, atol=1e-4) and torch.allclose(with_adapter, same_adapter, atol=1e-4)


@on_the_cpu
def test_a_model_too_large_for_main_memory_stays_in_4_bits(engine, monkeypatch):
    memory = types.SimpleNamespace(available=1e5)
    monkeypatch.setattr(transformers_engine.psutil, "virtual_memory", lambda: memory)
    assert layers_in_4_bits(engine.for_inference(engine.load(CONFIG.model)[0]))


def test_training_after_inference_still_has_gradients(engine):
    model = engine.for_inference(engine.load(CONFIG.model)[0])
    with torch.inference_mode():
        model(token_ids(model))
    assert_gradients_reach_the_first_layer(engine.add_lora(model, CONFIG.lora))


def test_an_evaluation_before_training_keeps_the_gradients(engine):
    tuned = engine.add_lora(engine.load(CONFIG.model)[0], CONFIG.lora)
    tuned.eval()
    with torch.inference_mode():
        tuned(token_ids(tuned))
    assert packed_layers(tuned) == []
    assert_gradients_reach_the_first_layer(tuned)


# --- memory --------------------------------------------------------------------------------------------------------


def test_a_deleted_models_memory_is_freed_before_the_next_load(engine):
    class Wrapped:  # as accelerate and PEFT wrap a model: what is wrapped knows its wrapper
        def __init__(self):
            self.forward = lambda: self

    gc.collect()
    gc.disable()
    try:
        model = Wrapped()
        still_there = weakref.ref(model)
        del model
        assert still_there() is not None
        engine.load(CONFIG.model)
        assert still_there() is None
    finally:
        gc.enable()


# --- one of several processes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "rank"), [(None, 0), ("", 0), ("1", 1)])
def test_the_local_rank_is_that_of_torchrun(value, rank, monkeypatch):
    if value is None:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
    else:
        monkeypatch.setenv("LOCAL_RANK", value)
    assert get_local_rank() == rank


@pytest.mark.parametrize("value", ["2", "7", "one", "-1"])
def test_a_local_rank_without_a_gpu_is_one_error(value, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(PlatformError, match=rf"LOCAL_RANK is {value}, but 2 GPUs can be seen.*--nproc-per-node 2"):
        get_engine(CONFIG.model)


@pytest.mark.parametrize(("padding", "said"), [("auto", ""), ("padded", ""), ("padding_free", "training.padding=padding_free")])
def test_padding_that_transformers_cannot_do_is_said(engine, padding, said, capsys):
    model, _ = engine.load(CONFIG.model)
    settings = load_config("smoke", [f"training.padding={padding}"]).training
    made = [transformers_engine.trainer_arguments(training, model) for training in (settings, CONFIG.training)]
    assert made[0] == made[1]
    assert capsys.readouterr().out.startswith(said) and (said or not capsys.readouterr().out)
