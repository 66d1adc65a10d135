"""RunConfig: the profiles, the article's numbers, overrides, and what each bad input is answered with."""

from __future__ import annotations

import re

import pytest
from pydantic import ValidationError

from medcot_utils.config import (
    PROFILES,
    ConfigError,
    config_from_dict,
    load_config,
    overrides_of,
    profile_needs,
    read_profile,
    setting_names,
    show_value,
)

ARTICLE = {
    "model.name": "unsloth/DeepSeek-R1-Distill-Llama-8B",
    "model.revision": "736e4a6391593d33a1f019f23bc23f91cf56b830",
    "model.load_in_4bit": True,
    "model.max_seq_length": 2048,
    "prompt.newline_after_think": False,
    "dataset.name": "FreedomIntelligence/medical-o1-reasoning-SFT",
    "dataset.subset": "en",
    "dataset.revision": "fc2c9e8a37b38f38da6d449564a8c350b244aef4",
    "dataset.num_rows": 500,
    "dataset.shuffle": False,
    "dataset.loss_on": "full",
    "lora.r": 16,
    "lora.lora_alpha": 16,
    "lora.lora_dropout": 0,
    "lora.bias": "none",
    "lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "lora.use_rslora": False,
    "lora.use_gradient_checkpointing": "unsloth",
    "lora.random_state": 3407,
    "training.per_device_train_batch_size": 2,
    "training.gradient_accumulation_steps": 4,
    "training.warmup_steps": 5,
    "training.max_steps": 60,
    "training.learning_rate": 2e-4,
    "training.logging_steps": 10,
    "training.optim": "adamw_8bit",
    "training.weight_decay": 0.01,
    "training.lr_scheduler_type": "linear",
    "generation.max_new_tokens": 1200,
    "seed": 3407,
}


TOKENS = ["hf_" + "aB" * 17, "KGAT_" + "0a" * 16, "sk-ant-api03-" + "aB1" * 31, "ghp_" + "aB1" * 12, "AKIAIOSFODNN7EXAMPLE"]


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize(
    ("pair", "where"),
    [
        ("tracking.entity={}", "--set tracking.entity holds"),
        ("training.max_steps={}", "--set training.max_steps holds"),
        ("evaluation.mcq_tasks=[shipped, {}", "--set evaluation.mcq_tasks holds"),
        ("no.setting={}", "--set holds"),
        ("{}=1", "--set holds"),
        ("{}", "--set holds"),
        ("secrets.wandb={}", "--set secrets.wandb holds"),
    ],
)
def test_a_token_in_a_setting_is_refused_and_not_repeated(pair, where, token):
    with pytest.raises(ConfigError, match=f"^{re.escape(where)} what looks like a.*environment or the platform's") as caught:
        load_config("smoke", [pair.format(token)])
    assert token[8:] not in str(caught.value) and token[8:] not in str(caught.value.args)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda values, token: values["tracking"].update(entity=token), "setting tracking.entity holds"),
        (lambda values, token: values["evaluation"].update(mcq_tasks=["shipped", token]), "setting evaluation.mcq_tasks holds"),
        (lambda values, token: values["hub"].update({token: 1}), "setting hub holds"),
        (lambda values, token: values.update({token: 1}), "the name of a setting holds"),
    ],
)
def test_a_token_in_a_configuration_is_refused_and_not_repeated(change, where):
    values = load_config("smoke").model_dump(mode="json")
    change(values, TOKENS[0])
    with pytest.raises(ConfigError, match=f"^{where} what looks like a Hugging Face token") as caught:
        config_from_dict(values)
    assert TOKENS[0][8:] not in str(caught.value)


def test_a_token_in_a_profile_names_profile_and_setting(monkeypatch, tmp_path):
    (tmp_path / "smoke.yaml").write_text(f"needs: {{}}\ntracking: {{entity: {TOKENS[0]}}}\n")
    monkeypatch.setattr("medcot_utils.config.PROFILES_DIR", tmp_path)
    with pytest.raises(ConfigError, match=r"^profile smoke: setting tracking\.entity holds what looks like") as caught:
        load_config("smoke")
    assert TOKENS[0][8:] not in str(caught.value)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_loads_under_its_own_name(profile):
    assert load_config(profile).profile == profile


@pytest.mark.parametrize(("name", "value"), ARTICLE.items())
def test_article_profile_has_the_articles_number(name, value):
    assert load_config("article").get(name) == value


def test_recommended_changes_only_the_articles_named_flaws():
    changed = {name.partition("=")[0] for name in _differences("article", "recommended")}
    assert {"prompt.newline_after_think", "dataset.loss_on", "dataset.overlong", "dataset.repeats"} <= changed
    assert not {name for name in changed if name.startswith(("model.", "lora."))}


def _differences(one: str, other: str) -> list[str]:
    first, second = load_config(one), load_config(other)
    return [name for name in setting_names() if name != "profile" and first.get(name) != second.get(name)]


def test_small_is_recommended_on_a_smaller_model_with_less_to_do():
    changed = {name.rpartition(".")[0] for name in _differences("recommended", "small")}
    assert changed == {"model", "dataset", "training", "evaluation"}
    small = load_config("small")
    assert (small.model.revision, small.model.quantized_name, small.model.quantized_revision) == (None, None, None)
    assert small.model.load_in_4bit and small.dataset.revision == load_config("article").dataset.revision


def test_full_profile_trains_on_all_rows_for_one_epoch():
    config = load_config("full")
    assert (config.dataset.num_rows, config.training.max_steps, config.training.num_train_epochs) == (None, -1, 1)
    assert config.model == load_config("article").model


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.max_steps=10", 10),
        ("training.learning_rate=2e-4", 0.0002),
        ("training.learning_rate=1.5E-3", 0.0015),
        ("lora.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("lora.use_gradient_checkpointing=unsloth", "unsloth"),
        ("lora.use_gradient_checkpointing=no", False),
        ("dataset.num_rows=null", None),
        ("dataset.num_rows=", None),
        ("dataset.path=a=b.csv", "a=b.csv"),
        ("dataset.columns.complex_cot=reasoning", "reasoning"),
        ("model.revision='1234567e8'", "1234567e8"),
        ("generation.batch_size=auto", "auto"),
        ("generation.batch_size=3", 3),
        ("training.max_hours=11.5", 11.5),
        ("training.max_hours=null", None),
        ("training.num_processes=2", 2),
        ("training.num_processes=auto", "auto"),
        (" seed =7", 7),
        ("hub.tag=1.0", "1.0"),
        ("hub.tag=2025-11-25", "2025-11-25"),
        ("hub.tag=null", None),
        ("hub.tag='null'", "null"),
        ("model.revision=7e12345", "7e12345"),
        ("model.revision=0012", "0012"),
        ("dataset.revision=true", "true"),
        ("dataset.path=/data/case #2: final.csv", "/data/case #2: final.csv"),
        ("dataset.columns.question=# of days?", "# of days?"),
        ("dataset.columns.question=[Frage]", "[Frage]"),
        ("dataset.columns.question=*star & {brace}", "*star & {brace}"),
        ("dataset.columns.question='Frage '", "Frage "),
        ("dataset.columns.question='Who' or 'what'", "'Who' or 'what'"),
        ('dataset.columns.question="a\u2028b"', "a\u2028b"),
        ('dataset.columns.question="\\ud83d\\ude00"', "😀"),
        ("tracking.project=off", "off"),
        ("tracking.backend=none", "none"),
        ("evaluation.mcq_tasks=[shipped, 2025.jsonl, 1e5.jsonl]", ["shipped", "2025.jsonl", "1e5.jsonl"]),
        ("evaluation.mcq_tasks=own #2.jsonl", ["own #2.jsonl"]),
        ("evaluation.mcq_tasks=[]", []),
        ("lora.target_modules=[1, true]", ["1", "true"]),
        ("hub.artifacts=adapter", ["adapter"]),
        ("secrets.huggingface=MY_TOKEN", ["MY_TOKEN"]),
        ("training.max_steps=010", 10),
        ("training.max_steps=1_000", 1000),
        ("training.max_steps=1e2", 100),
    ],
)
def test_override_is_read_with_its_type(override, value):
    config = load_config("smoke", [override])
    assert config.get(override.partition("=")[0].strip()) == value


def test_nested_override_leaves_the_other_columns_alone():
    columns = load_config("smoke", ["dataset.columns.question=q"]).dataset.columns
    assert (columns.question, columns.complex_cot, columns.response) == ("q", "Complex_CoT", "Response")


def test_the_last_of_two_overrides_wins():
    assert load_config("smoke", ["seed=1", "seed=2"]).seed == 2


def test_overrides_do_not_leak_into_the_next_configuration():
    before = load_config("smoke")
    load_config("smoke", ["dataset.columns.question=q", "training.max_steps=99"])
    assert load_config("smoke") == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rat=1", r"unknown setting 'training\.learning_rat'; did you mean training\.learning_rate\?"),
        ("dataset.columns.questoin=x", r"did you mean dataset\.columns\.question\?"),
        ("temperature=1", r"did you mean generation\.temperature\?"),
        ("lr=1", r"did you mean training\.learning_rate\?"),
        ("training.lr=1", r"did you mean training\.learning_rate\?"),
        ("lora.rank=8", r"did you mean lora\.r\?"),
        ("xyzzy.plugh=1", r"unknown setting 'xyzzy\.plugh'; `medcot settings` lists them all"),
        ("profile=demo", r"profile is not a setting: choose it with --profile"),
        ("training.max_steps", r"--set training\.max_steps: expected NAME=VALUE"),
        ("seed=[1", r"--set seed: '\[1' is not a YAML value"),
        ("dataset.num_rows=many", r"setting dataset\.num_rows is 'many': input should be a valid integer.*, or null$"),
        ("dataset.num_rows=None", r"--set dataset\.num_rows is None: expected a number, or null\. For no value, write null"),
        ("dataset.path=None", r"--set dataset\.path is None: expected a text, or null\. For no value, write null"),
        ("export.gguf=q9", r"setting export\.gguf is 'q9': .*or 'q3_k_m', or null$"),
        (
            "training.max_steps=None",
            r"setting training\.max_steps is 'None': input should be a valid integer[^;]*string as an integer$",
        ),
        ("training.max_steps=yes", r"setting training\.max_steps is True: expected a value, not true or false"),
        ("training.max_steps=", r"setting training\.max_steps is null: input should be a valid integer"),
        ("training.max_steps=0", r"training\.max_steps is 0: expected a number of steps, or -1"),
        ("training.learning_rate=.inf", r"setting training\.learning_rate is inf: input should be a finite number"),
        ("generation.temperature=0", r"setting generation\.temperature is 0: input should be greater than 0"),
        ("export.dtype=int8", r"setting export\.dtype is 'int8': input should be 'float16' or 'bfloat16'"),
        ("generation.batch_size=true", r"setting generation\.batch_size is True: expected a value, not true or false"),
        ("generation.batch_size=0", r"setting generation\.batch_size.* is 0: input should be greater than or equal to 1"),
        ("generation.batch_size=-1", r"setting generation\.batch_size.* is -1: input should be greater than or equal to 1"),
        ("generation.batch_size=many", r"setting generation\.batch_size.* is 'many': .*input should be 'auto'"),
        ("training.max_hours=0", r"setting training\.max_hours is 0: input should be greater than 0"),
        ("training.num_processes=0", r"setting training\.num_processes is 0: input should be greater than or equal to 1"),
        ("training.num_processes=all", r"setting training\.num_processes is 'all': .*input should be 'auto'"),
        ("training.batch_plan=manual", r"setting training\.batch_plan is 'manual': input should be 'auto' or 'as_set'"),
        ("training.max_hours=1:30", r"setting training\.max_hours is '1:30': input should be a valid number"),
        ("model.name=", r"setting model\.name is null: input should be a valid string"),
        ("tracking.mode=off", r"setting tracking\.mode is 'off': input should be 'auto', 'online' or 'offline'"),
        ("evaluation.mcq_tasks=null", r"setting evaluation\.mcq_tasks is null: input should be a valid tuple"),
        ("evaluation.mcq_tasks=[shipped", r"--set evaluation\.mcq_tasks: '\[shipped' is not a list"),
        ("seed=-1", r"setting seed is -1: input should be greater than or equal to 0"),
        ("seed=4294967296", r"setting seed is 4294967296: input should be less than"),
        ("lora.random_state=20000000000000000000", r"setting lora\.random_state is 2\d+: input should be less than"),
        ("lora.target_modules=q_proj", r"setting lora\.target_modules is 'q_proj': input should be a valid tuple"),
    ],
)
def test_bad_override_is_named_with_what_was_expected(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config("smoke", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", ["training.max_steps=4", ["training.max_steps=4"], ("training.max_steps=4",)])
def test_one_override_may_be_given_without_its_list(given):
    assert load_config("smoke", given).training.max_steps == 4  # papermill -p OVERRIDES training.max_steps=4


@pytest.mark.parametrize("given", [4, None, {"training.max_steps": 4}, [4], 0.5])
def test_overrides_that_are_no_texts_are_refused(given):
    with pytest.raises(ConfigError, match=r'OVERRIDES .*expected a list of "section.setting=value" texts'):
        load_config("smoke", given)


@pytest.mark.parametrize("profile", [3, None, 1.5])
def test_a_profile_that_is_no_text_is_unknown(profile):
    with pytest.raises(ConfigError, match=f"unknown profile {profile!r}: expected one of smoke, demo"):
        load_config(profile)


@pytest.mark.parametrize(
    "override",
    [
        f"{name}={value}"
        for name, value in (
            ("generation.batch_size", 0),
            ("generation.batch_size", -1),
            ("generation.batch_size", "many"),
            ("lora.use_gradient_checkpointing", "maybe"),
        )
    ],
)
def test_a_union_setting_is_refused_once_under_its_own_name(override):
    name = override.partition("=")[0]
    with pytest.raises(ConfigError) as caught:
        load_config("smoke", [override])
    assert str(caught.value).startswith(f"setting {name} is ") and str(caught.value).count("setting ") == 1
    assert "literal" not in str(caught.value) and "constrained" not in str(caught.value)


@pytest.mark.parametrize(
    ("processes", "allowed"), [(1, True), (2, True), (3, False), (4, True), (5, False), (8, True), (16, False)]
)
def test_processes_must_divide_the_effective_batch_evenly(processes, allowed):
    override = f"training.num_processes={processes}"
    if allowed:
        assert load_config("article", [override]).training.effective_batch_size == 8
        return
    expected = rf"training\.num_processes is {processes}: the effective batch of 8 rows does not divide"
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config("article", [override])
    assert "training.gradient_accumulation_steps" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("profile", "message"), [("artcle", "did you mean article"), ("zzz", "smoke, demo, small, article")])
def test_unknown_profile_is_answered_with_the_known_ones(profile, message):
    with pytest.raises(ConfigError, match=message):
        load_config(profile)


def test_more_questions_than_held_out_rows_are_refused():
    with pytest.raises(ConfigError, match=r"evaluation\.num_questions is 51, more than dataset\.held_out_rows \(50\)"):
        load_config("article", ["evaluation.num_questions=51"])
    assert load_config("article", ["evaluation.num_questions=50"]).evaluation.num_questions == 50


def test_a_stored_configuration_names_every_wrong_setting():
    values = load_config("smoke").model_dump(mode="json")
    values["training"]["learning_rte"] = 1
    del values["dataset"]["held_out_rows"]
    with pytest.raises(ConfigError) as caught:
        config_from_dict(values)
    assert "unknown setting 'training.learning_rte'; did you mean training.learning_rate?" in str(caught.value)
    assert "setting dataset.held_out_rows is missing" in str(caught.value)


def test_configuration_is_frozen_in_every_section():
    config = load_config("smoke")
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.training.max_steps = 1


def test_configuration_survives_its_json():
    config = load_config("article", ["lora.target_modules=[q_proj]"])
    assert config_from_dict(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("override", "changes"),
    [("training.max_steps=7", True), ("lora.r=4", True), ("lora.random_state=1", False), ("generation.batch_size=9", False)],
)
def test_digest_changes_only_with_the_named_settings(override, changes):
    named = ("training", "lora.r")
    assert (load_config("smoke", [override]).digest(named) != load_config("smoke").digest(named)) is changes


def test_digest_is_independent_of_the_order_of_names():
    config = load_config("smoke")
    assert config.digest(["lora", "seed"]) == config.digest(["seed", "lora"])
    assert config.digest(["lora"]) != config.digest(["seed"])


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_as_it_stands_has_no_overrides(profile):
    assert overrides_of(load_config(profile)) == []


def test_overrides_of_make_the_same_configuration_again():
    given = [
        "training.learning_rate=1e-05",
        "dataset.num_rows=null",
        "dataset.path='/data/é 😀: #1.csv'",
        'dataset.columns.question="[a\u2028b #1"',
        "dataset.columns.response=null",
        "evaluation.mcq_tasks=[1.0.jsonl, a\u2028b.jsonl]",
        "hub.tag=1e5",
        "lora.target_modules=[q_proj]",
        "lora.use_gradient_checkpointing=true",
        "model.revision='1234567e8'",
        "model.dtype=bfloat16",
    ]
    config = load_config("smoke", given)
    pairs = overrides_of(config)
    assert {pair.partition("=")[0] for pair in pairs} == {pair.partition("=")[0] for pair in given}
    assert load_config("smoke", pairs) == config


@pytest.mark.parametrize(
    ("override", "pins"),
    [
        ("model.name=me/other-8b", ["model.revision", "model.quantized_name", "model.quantized_revision"]),
        ("dataset.name=me/other-data", ["dataset.subset", "dataset.revision"]),
    ],
)
def test_another_model_or_data_set_drops_the_profiles_pins(override, pins):
    config = load_config("article", [override])
    assert [config.get(pin) for pin in pins] == [None] * len(pins)
    assert load_config("article", [override, f"{pins[0]}=mine"]).get(pins[0]) == "mine"


@pytest.mark.parametrize("name", ["model.name", "dataset.name"])
def test_the_profiles_own_name_given_again_keeps_its_pins(name):
    article = load_config("article")
    assert load_config("article", [f"{name}={article.get(name)}"]) == article


@pytest.mark.parametrize("extra", [[], [f"model.revision={ARTICLE['model.revision']}"], ["model.revision=other"]])
def test_overrides_of_another_model_keep_its_revision(extra):
    config = load_config("article", ["model.name=me/mirror", *extra])
    assert load_config("article", overrides_of(config)) == config


# --- what a profile needs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_says_what_it_needs(profile):
    needs = profile_needs(profile)
    assert needs.memory_gib > 0 and needs.expect
    assert (needs.gpu_gib is not None) == ("unsloth" in needs.packages) == (profile not in ("smoke", "demo"))
    assert "needs" not in read_profile(profile)


@pytest.mark.parametrize(
    ("override", "setting", "value"),
    [
        ("evaluation.mcq_tasks=own.jsonl", "evaluation.mcq_tasks", ["own.jsonl"]),
        ("hub.artifacts=adapter", "hub.artifacts", ["adapter"]),
        ("secrets.wandb=MY_KEY", "secrets.wandb", ["MY_KEY"]),
    ],
)
def test_one_value_is_taken_as_a_list_of_one(override, setting, value):
    assert load_config("smoke", [override]).get(setting) == value


@pytest.mark.parametrize("typed", ["null", "true", "0.002", "500", "embedded:smollm2-135m-instruct"])
def test_a_value_is_shown_as_a_user_types_it(typed):
    names = {"null": "dataset.num_rows", "true": "dataset.shuffle", "0.002": "training.learning_rate", "500": "dataset.num_rows"}
    name = names.get(typed, "model.name")
    assert show_value(load_config("demo", [f"{name}={typed}"]).get(name)) == typed
