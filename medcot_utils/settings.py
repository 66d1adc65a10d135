"""The sections of RunConfig: every setting with its type, bounds, default and meaning."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from medcot_utils.token_shapes import name_look

_ADDED_LATER = {"added_later": True}


def added_later(default: Any, **rules: Any) -> Any:
    """Return the field of a setting that runs of earlier versions do not know.

    The default must keep the old behavior: while the setting stands at it, no fingerprint changes, and no finished run
    is redone. `rules` are those of `pydantic.Field`."""
    return Field(default, json_schema_extra=_ADDED_LATER, **rules)


def is_added_later(field: FieldInfo) -> bool:
    """Return whether a setting was declared with `added_later`."""
    return field.json_schema_extra == _ADDED_LATER


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


# One name without brackets is a list of one. Not for lora.target_modules, where PEFT takes a text for a pattern.
Names = Annotated[tuple[str, ...], BeforeValidator(_as_list)]


class Section(BaseModel):
    """A part of the configuration: frozen, without unknown names, and with no on or off where a number belongs."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would take true for 1, and YAML reads yes and on as true: training.max_steps=yes would train one step.
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise PydanticCustomError("switch", "Expected a value, not true or false")
        return value

    def fingerprinted(self) -> dict[str, Any]:
        """Return the settings that fingerprints are made of, JSON-ready: all but those added later that stand at their
        default, and sections that hold nothing else."""
        values = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Section):
                values[name] = value.fingerprinted()
            if values[name] == {} or (is_added_later(field) and value == field.get_default(call_default_factory=True)):
                del values[name]
        return values


class ModelSettings(Section):
    name: str = Field(description="Hub id, local folder, or embedded:smollm2-135m-instruct / embedded:tiny-random-llama")
    revision: str | None = Field(None, description="commit of the Hub repository; null: its newest, or a local folder")
    quantized_name: str | None = Field(
        None, description="pre-quantized 4-bit copy that is loaded instead, unless engine is transformers; null: no copy"
    )
    quantized_revision: str | None = Field(None, description="commit of the pre-quantized copy; null: its newest")
    engine: Literal["auto", "unsloth", "transformers"] = Field(
        "auto", description="what loads and trains the model; auto: unsloth if it is installed and there is a CUDA GPU"
    )
    load_in_4bit: bool = Field(
        True, description="store the weights of the base in 4 bits (nf4), as QLoRA does: less memory, at the cost of rounding"
    )
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto", description="type of the activations; auto: bfloat16 on GPUs that have it, float16 on others, float32 on a CPU"
    )
    max_seq_length: int = Field(2048, ge=64, description="tokens of prompt and completion together")
    gpu_memory_gib: float | None = Field(
        None, gt=0, description="use no more of the GPU: rehearse a T4 with 14.5 on a larger one; null: all of it"
    )


class PromptSettings(Section):
    newline_after_think: bool = Field(
        True, description="end the inference prompt as the training text continues: `<think>\\n`, not `<think>`"
    )


class ColumnNames(Section):
    question: str = Field("Question", description="column of your data with the question")
    complex_cot: str = Field("Complex_CoT", description="column of your data with the chain of thought")
    response: str = Field("Response", description="column of your data with the final answer")


class DatasetSettings(Section):
    name: str = Field(description="`shipped` or a data set on the Hub")
    subset: str | None = Field(None, description="configuration of the data set on the Hub, such as en; null: its default")
    revision: str | None = Field(None, description="commit of the data set; null: its newest, whose rows may change")
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="digest of the data set's one file, checked after download; null: unchecked"
    )
    path: str | None = Field(None, description="a local json, jsonl, csv, or parquet file, used instead of name; null: name")
    columns: ColumnNames = ColumnNames()
    num_rows: int | None = Field(
        None, ge=1, description="training rows; null: all that are not held out, or those that a `split` column marks train"
    )
    held_out_rows: int = Field(ge=1, description="rows kept out of training; the most, if a `split` column chooses them")
    shuffle: bool = Field(False, description="shuffle with the seed before the split")
    loss_on: Literal["full", "completion"] = Field("completion", description="full: the loss includes the prompt")
    overlong: Literal["drop", "truncate", "error"] = Field("drop", description="rows longer than model.max_seq_length")
    repeats: Literal["report", "drop"] = Field("drop", description="training rows that repeat a held-out question")
    near_repeat_similarity: float = Field(85, ge=50, le=100, description="rapidfuzz ratio at which a question counts as a repeat")
    ngram_overlap: float = Field(
        0.5, gt=0, le=1, description="share of a question's 8-word sequences in a row that makes a repeat"
    )


class LoraSettings(Section):
    r: int = Field(16, ge=1, description="rank of the two small matrices beside each weight")
    lora_alpha: int = Field(16, ge=1, description="scale of the correction, which is lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="share of the adapter's inputs that is dropped while training")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="biases that are trained too")
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="the projections that get an adapter; one text without brackets is a pattern",
    )
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) instead (rank-stabilized LoRA)")
    use_gradient_checkpointing: Literal["unsloth"] | bool = Field(
        "unsloth", description="compute activations twice to save memory; unsloth: keep some of them in RAM"
    )
    random_state: int = Field(3407, ge=-(2**63), lt=2**64, description="seed of the matrices A, as torch takes it")


class TrainingSettings(Section):
    per_device_train_batch_size: int = Field(2, ge=1, description="rows of a micro-batch")
    gradient_accumulation_steps: int = Field(4, ge=1, description="micro-batches before each optimizer step")
    per_device_eval_batch_size: int = Field(4, ge=1, description="rows at once for a held-out loss")
    warmup_steps: int = Field(5, ge=0, description="optimizer steps until learning_rate is reached")
    max_steps: int = Field(60, description="optimizer steps; -1 trains num_train_epochs instead")
    num_train_epochs: float = Field(1, gt=0, description="passes over the rows, if max_steps is -1")
    learning_rate: float = Field(2e-4, gt=0, description="the highest learning rate")
    optim: str = Field("adamw_8bit", description="the optimizer, as transformers names it")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of the optimizer")
    lr_scheduler_type: str = Field("linear", description="how the learning rate falls, as transformers names it")
    logging_steps: int = Field(10, ge=1, description="optimizer steps between two logged losses")
    save_steps: int = Field(20, ge=1, description="optimizer steps between two checkpoints")
    save_total_limit: int = Field(2, ge=1, description="checkpoints that are kept")
    eval_steps: int | None = Field(
        None, ge=1, description="optimizer steps between two held-out losses during training; null: no such losses"
    )
    eval_rows: int = Field(8, ge=1, description="held-out rows that the loss during training is taken on")
    batch_plan: Literal["auto", "as_set"] = Field(
        "auto", description="auto: on a GPU, divide the effective batch as its memory allows; as_set: as the settings say"
    )
    padding: Literal["auto", "padded", "padding_free"] = Field("auto", description="how rows of unequal length share a batch")
    num_processes: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description="GPUs to train on, one process each. auto: all of one kind that divide the effective batch",
    )
    max_hours: float | None = Field(
        None,
        gt=0,
        description="hours of a session: the series pauses before they end, training with a checkpoint, answers and "
        "multiple choice after a batch, else between two notebooks; the next call resumes; null: no end",
    )

    @property
    def effective_batch_size(self) -> int:
        """Rows per optimizer step, however many processes and micro-batches share them."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @model_validator(mode="after")
    def _steps(self) -> TrainingSettings:
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"training.max_steps is {self.max_steps}: expected a number of steps, or -1 for whole epochs")
        if self.num_processes != "auto" and self.effective_batch_size % self.num_processes:
            raise ValueError(
                f"training.num_processes is {self.num_processes}: the effective batch of {self.effective_batch_size} rows does "
                f"not divide by that. Choose a divisor, or change training.gradient_accumulation_steps"
            )
        return self


class GenerationSettings(Section):
    max_new_tokens: int = Field(1200, ge=1, description="the longest answer, in tokens")
    do_sample: bool = Field(False, description="sample the one question of notebook 02; scored answers: evaluation.n_samples")
    temperature: float = Field(0.6, gt=0, description="temperature of sampled answers: lower is closer to greedy")
    top_p: float = Field(0.95, gt=0, le=1, description="sampled answers take the likeliest tokens that share this probability")
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="questions answered at once; auto: as many as the GPU's memory holds"
    )
    cache_implementation: Literal["auto", "static", "dynamic"] = Field(
        "auto", description="static: slots of one size and compiled steps; dynamic: batches whose cache grows; auto: the faster"
    )


class EvaluationSettings(Section):
    num_questions: int = Field(20, ge=1, description="held-out questions that both models answer")
    answer_tokens: int | None = added_later(
        None,
        ge=1,
        description="tokens of the answer after thinking that was cut or never closed is closed for the model (forced closing); "
        "null: no forced closing",
    )
    n_samples: int = Field(
        0, ge=0, description="sampled answers a question (temperature, top_p of generation) beside the greedy one"
    )
    mcq_tasks: Names = Field(("shipped",), description="shipped, medqa, medmcqa, pubmedqa, or a local .jsonl file")
    mcq_limit: int | None = Field(None, ge=1, description="questions per task, spread over the specialties; null: all")
    mcq_max_new_tokens: int = Field(1200, ge=1, description="the longest answer to a multiple-choice question, in tokens")
    base_16bit_loss: bool = added_later(
        False,
        description="also take the held-out loss of the 16-bit base, which shows what rounding to 4 bits had cost; layer by "
        "layer if the GPUs cannot hold it",
    )
    measure_merged: bool = added_later(
        False, description="measure the merged model in notebook 07: answers, and loss on all held-out rows"
    )
    merged_questions: int | None = added_later(
        None,
        ge=0,
        description="questions that the merged model answers. null: none if the machine has GPUs that cannot hold that model, "
        "else all; a machine without a GPU asks all",
    )
    embedding_model: str | None = Field(
        None,
        description="a sentence-transformers model (folder or Hub id): also compares answers with references by meaning; "
        "null: not by meaning",
    )
    confidence_level: float = Field(0.95, gt=0.5, lt=1, description="confidence level of all intervals and tests")
    n_resamples: int = Field(5000, ge=200, description="bootstrap resamples")


class ExportSettings(Section):
    dtype: Literal["float16", "bfloat16"] = Field("float16", description="type of the merged model's weights")
    merge_into: Literal["base_16bit", "dequantized_4bit"] = added_later(
        "base_16bit",
        description="weights that the adapter is added to: the 16-bit base, or the 4-bit weights it was trained with, rounding "
        "included",
    )
    logits_tolerance: float = Field(
        0.02, gt=0, description="largest allowed mean absolute difference of log-probabilities (float16; bfloat16: 8 times that)"
    )
    check_prompts: int = Field(3, ge=1, description="prompts whose first greedy tokens are compared after a merge")
    check_rows: int = Field(
        8, ge=1, description="held-out rows on which the losses of the merged and the trained model are compared"
    )
    check_new_tokens: int = Field(32, ge=1, description="greedy tokens that are compared for each of these prompts")
    gguf: Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m"] | None = Field(
        None, description="also write the merged model as a GGUF file of this type, for llama.cpp and Ollama; null: no such file"
    )

    @field_validator("gguf", mode="before")
    @classmethod
    def _as_llama_cpp_writes_it(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value  # Q4_K_M is what llama.cpp's own lists say


class HubSettings(Section):
    repo_id: str | None = Field(
        None, pattern=r"^([\w.-]+/)?[\w.-]+$", description="user/name of the repository to push to; null: nothing is pushed"
    )
    layout: Literal["one", "separate"] = Field(
        "one", description="one: merged model at the root, adapter/ and gguf/ below; separate: NAME-lora, NAME-merged, NAME-gguf"
    )
    private: bool = Field(True, description="false: everybody can see it")
    artifacts: Annotated[tuple[Literal["adapter", "merged", "gguf"], ...], BeforeValidator(_as_list)] = Field(
        ("adapter", "merged", "gguf"), min_length=1, description="artifacts that are pushed; gguf only if the run has one"
    )
    tag: str | None = Field(
        None, pattern=r"^[\w.-]+$", description="tag that a verified push sets; null: run- and a digest of what was pushed"
    )
    patience_seconds: float = Field(
        300, ge=0, description="how long one request is repeated while the Hub is busy, failing, or out of reach"
    )
    language: str | None = added_later(
        None,
        pattern=r"^[a-z]{2,3}(-[A-Za-z0-9]+)*$",
        description="the data's language as the model card names it (en, zh, pt-BR); null: as the data set or its script says",
    )
    verify_all: bool = Field(False, description="true: download every byte of a push again, not only both ends of large files")

    def addresses(self, names: Iterable[str], repo_id: str) -> dict[str, str]:
        """Return {artifact: the repository it goes to}, as the layout says."""
        suffixes = {"adapter": "-lora", "merged": "-merged", "gguf": "-gguf"}
        return {name: repo_id + (suffixes[name] if self.layout == "separate" else "") for name in names}


class TrackingSettings(Section):
    backend: Literal["auto", "wandb", "trackio", "tensorboard", "none"] = Field(
        "auto", description="auto: wandb if there is a key for it, else trackio if it is installed, else none"
    )
    project: str = Field("medcot", min_length=1, description="the tracker's project")
    job_type: str = Field("training", description="W&B's job type")
    entity: str | None = Field(None, description="W&B team or user; null: the key's own")
    mode: Literal["auto", "online", "offline"] = Field(
        "auto", description="W&B: online needs a key, and notebook 01 fails without one; auto: offline without one"
    )


_SECRET_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,31}")
# Beside `name_look`: what is cut off, or has no prefix.
_LIKE_A_SECRET = re.compile(r"hf_[A-Za-z0-9]{16,}|KGAT_.+|wandb_v\d_.+|[0-9a-fA-F]{32,}")


class SecretsSettings(Section):
    """Names under which secrets are looked for, first one first; never the secrets."""

    huggingface: tuple[str, ...] = Field(
        ("HF_TOKEN", "HUGGINGFACE_TOKEN"), description="names to look for the Hugging Face token under, in this order"
    )
    wandb: tuple[str, ...] = Field(("WANDB_API_KEY", "wandb"), description="names to look for the W&B key under, in this order")

    @field_validator("*", mode="before")
    @classmethod
    def _names_only(cls, value: Any, info: ValidationInfo) -> Any:
        names = _as_list(value)
        good = isinstance(names, list | tuple) and all(isinstance(name, str) and _is_name(name) for name in names)
        if not good or not names:  # what was given may be a secret, so it is not repeated
            raise ValueError(
                f"secrets.{info.field_name} takes the names of secrets (as in [HF_TOKEN]), and the given value is not one. If it "
                f"was the secret itself, put it into the environment or the platform's secret store"
            )
        return tuple(names)


def _is_name(text: str) -> bool:
    return bool(_SECRET_NAME.fullmatch(text)) and not _LIKE_A_SECRET.fullmatch(text) and not name_look(text)
