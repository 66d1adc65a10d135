"""What leaves a run: the report, the model card, the merged model and the check that it is the right one."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from medcot_utils import platforms
from medcot_utils.config import load_config
from medcot_utils.evaluation import METRICS, compare, format_interval, verdict
from medcot_utils.export import (
    ExportError,
    export_disk_gib,
    model_card,
    require_agreement,
    save_adapter,
    save_merged,
    verify_export,
)
from medcot_utils.platforms import GIB, PlatformError
from medcot_utils.report import build_report
from medcot_utils.run import Run, RunError

CONFIG = load_config("smoke")
ATTACK = '<script>alert("x")</script> see <img src="https://evil.example/x.png"> & "quoted"'
QUESTIONS = [{"id": "article", "scored": False, "specialty": "the article's question", "Question": "Which?", "Response": "This."}]
QUESTIONS += [
    {"id": f"q{i}", "scored": True, "specialty": "cardiology", "Question": f"Which valve, {i} < 9?", "Response": "The mitral."}
    for i in range(4)
]
QUESTIONS = [question | {"Complex_CoT": "The murmur is systolic."} for question in QUESTIONS]
CHECK = {
    "tolerance": 0.05,
    "ok": True,
    "pairs": [
        {"a": "merged", "b": "16-bit base + adapter", "mean_logprob_difference": 0.00123, "same_greedy": 3, "prompts": 3},
        {"a": "merged", "b": "4-bit base + adapter", "mean_logprob_difference": 0.234, "same_greedy": 1, "prompts": 3},
    ],
    "held_out_loss": {"merged": 1.8123, "4-bit base + adapter": 1.9456},
    "held_out_rows": 8,
    "files": [],
}


def answer(question, answer_text, closed):
    return {
        "id": question["id"],
        "prompt": question["Question"],
        "thinking": "so & so",
        "answer": answer_text,
        "completion": answer_text,
        "well_formed": closed,
        "finished": closed,
        "closed": int(closed),
        "thinking_tokens": 7,
        "answer_tokens": 5,
        "completion_tokens": 13,
        "seconds": 0.1,
    }


def fill(run, repeats=()):
    """A run's artifacts up to the comparison and the export check, written as the notebooks write them, without a model."""
    from datasets import Dataset

    rows = Dataset.from_list([{"id": "t1", "Question": "a", "input_ids": [0, 9, 40, 41], "labels": [-100, -100, 40, 41]}])
    run.write("questions", QUESTIONS)
    base = [answer(question, "", False) for question in QUESTIONS]
    tuned = [answer(question, ATTACK, True) for question in QUESTIONS]
    run.write("base_answers", base)
    run.write("train_rows", rows)
    run.write("held_out_rows", rows)
    run.write("data_report", {"repeats": list(repeats), "repeats_dropped": True})
    run.write("plan", {"rows": 117, "effective_batch": 4, "steps": 6, "trainable_parameters": 32768, "total_parameters": 10**9})
    run.write("adapter", lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"0" * 1000))
    run.write("training_log", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2, "eval_loss": 1.75}])
    held_out = [
        {"model": label, "id": f"h{i}", "nll": 10.0 * loss, "tokens": 10}
        for label, loss in (("base", 2.0), ("tuned", 1.5))
        for i in range(4)
    ]
    run.write("held_out_loss", held_out)
    run.write("tuned_answers", tuned)
    metrics = compare(base[1:], tuned[1:], ["The mitral."] * 4, held_out, run.config.evaluation, run.config.seed)
    run.write("metrics", {"n_questions": 4, "metrics": metrics})
    run.write("merged", lambda folder: (folder / "model.safetensors").write_bytes(b"0"))
    run.write("export_check", CHECK)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fill(Run.create(tmp_path_factory.mktemp("report") / "run", CONFIG))


# --- report --------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """The tags of a page, and every address that a browser would fetch for it."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "srcset", "href", "data", "action", "poster")]

    def handle_data(self, text):
        self.text += text


@pytest.fixture(scope="module")
def page(run):
    return build_report(run)


def test_model_text_is_escaped_in_the_report(page):
    assert "&lt;script&gt;" in page and "<script" not in page
    seen = Tags(page)
    assert "script" not in seen.tags
    assert seen.tags.count("img") == 2, "the two figures, and no picture out of an answer"
    assert seen.text.count(ATTACK) == len(QUESTIONS), "the reader sees the answer as the model wrote it"
    assert "Which valve, 0 < 9?" in seen.text


def test_the_report_opens_without_a_network(page):
    seen = Tags(page)
    assert len(seen.addresses) >= 2 + len(QUESTIONS)
    assert [a for a in seen.addresses if not a.startswith(("data:image/png;base64,", "#"))] == []
    assert re.findall(r"(?:url\(|@import)\s*[\"']?[^\s)]{0,40}", page) == []


def test_the_report_shows_every_metric_and_every_question(page, run):
    seen, metrics = Tags(page), run.read("metrics")["metrics"]
    for name, metric in metrics.items():
        assert METRICS[name][0] in seen.text
        assert format_interval(metric["difference"]) in seen.text and verdict(name, metric) in seen.text
    assert all(f'<article id="{question["id"]}">' in page for question in QUESTIONS)
    assert seen.text.count("shown, not scored") == 1
    assert "No training row repeats a held-out question" in seen.text


def test_repeated_questions_are_listed_in_report_and_card(tmp_path):
    repeat = {"train_id": "case-9", "question_id": "q1", "similarity": 91.5, "exact": False}
    repeated = fill(Run.create(tmp_path / "run", CONFIG), [repeat])
    page = Tags(build_report(repeated)).text
    assert "case-9 repeats q1 (similarity 91.5)" in page and "No training row repeats" not in page
    assert "1 training rows repeat a held-out question and were left out" in model_card(repeated)


def test_a_report_without_its_inputs_names_the_notebook(tmp_path):
    with pytest.raises(RunError, match="06_comparison"):
        build_report(Run.create(tmp_path / "run", CONFIG))


# --- model card ----------------------------------------------------------------------------------------------------


def test_the_card_has_the_measured_numbers_the_licence_and_the_limits(run):
    from huggingface_hub import ModelCard

    text = model_card(run)
    card = ModelCard(text)
    assert card.data.license == "apache-2.0" and card.data.language == "en"
    assert "Not for clinical use" in card.text and "Apache-2.0" in card.text
    for name, metric in run.read("metrics")["metrics"].items():
        cells = " | ".join(format_interval(metric[side]) for side in ("base", "tuned", "difference"))
        assert f"| {METRICS[name][0]} | {cells} | {verdict(name, metric)} |" in card.text
    assert "2.00 [2.00, 2.00] | 1.50 [1.50, 1.50] | -0.50 [-0.50, -0.50] | fell, better" in card.text
    assert "the rest on 4 held-out questions" in card.text and "95 % bootstrap" in card.text and "117 training rows" in card.text
    assert "0.0012" in card.text and "3 of 3 prompts" in card.text
    assert "1.81 nats per token, that of the 4-bit base + adapter 1.95" in card.text and "1 of 3 prompts" in card.text
    assert str(run.path) not in text


def test_an_embedded_base_is_no_hub_address_in_the_cards_data(run):
    from huggingface_hub import ModelCard

    data = ModelCard(model_card(run)).data.to_dict()
    assert "base_model" not in data and "datasets" not in data


# --- merge ---------------------------------------------------------------------------------------------------------


def test_the_disk_for_a_merge_is_two_bytes_a_parameter_and_the_adapter_and_a_tenth(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"0" * 1000)
    (tmp_path / "sub" / "b").write_bytes(b"0" * 500)
    assert export_disk_gib(tmp_path, 10**6) == pytest.approx(1.1 * 2_001_500 / GIB)
    assert 16 < export_disk_gib(tmp_path, 8_030_261_248) < 17


def test_a_merge_that_does_not_fit_is_refused_before_anything_is_loaded(run, tmp_path, monkeypatch):
    small = fill(Run.create(tmp_path / "run", CONFIG))
    small.write("adapter", lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"1" * 1000))
    monkeypatch.setattr(platforms, "disk_free_gib", lambda folder: 2.0)
    engine = SimpleNamespace(merge=lambda *arguments: pytest.fail("merged although the disk is too small"))
    with pytest.raises(PlatformError, match=r"2\.05 GiB needed where run/ lies, 2\.00 GiB free"):
        save_merged(engine, small)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(engine, run) with a real adapter whose matrices B are not zero, merged by `save_merged`."""
    import torch

    from medcot_utils.engines import get_engine

    engine = get_engine(CONFIG.model)
    run = fill(Run.create(tmp_path_factory.mktemp("export") / "run", CONFIG))
    model, tokenizer = engine.load(CONFIG.model)
    tuned = engine.add_lora(model, CONFIG.lora)
    torch.manual_seed(2)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    run.write("adapter", lambda folder: save_adapter(tuned, tokenizer, CONFIG, folder))
    merged = save_merged(engine, run)
    assert (merged / "model.safetensors").stat().st_size > 10_000
    return engine, run


@pytest.mark.model
def test_the_saved_adapter_names_its_base_and_no_folder_of_this_machine(exported):
    adapter = exported[1].require("adapter")
    text = (adapter / "adapter_config.json").read_text(encoding="utf-8")
    assert '"base_model_name_or_path": "embedded:tiny-random-llama"' in text
    assert not (adapter / "README.md").exists()


@pytest.mark.model
def test_the_right_merge_agrees_with_base_and_adapter(exported):
    engine, run = exported
    check = verify_export(engine, run)
    require_agreement(check)
    exact, trained, both_adapters = check["pairs"]
    assert (both_adapters["a"], both_adapters["b"]) == ("16-bit base + adapter", "4-bit base + adapter")
    assert check["ok"] and exact["same_greedy"] == exact["prompts"] == CONFIG.export.check_prompts
    assert exact["mean_logprob_difference"] < 1e-3
    assert trained["b"] == "4-bit base + adapter" and trained["mean_logprob_difference"] > exact["mean_logprob_difference"]
    losses = check["held_out_loss"]
    assert losses["merged"] == pytest.approx(losses["4-bit base + adapter"], abs=0.5)
    assert {"adapter/adapter_model.safetensors", "merged/model.safetensors"} <= {file["file"] for file in check["files"]}


@pytest.mark.model
def test_a_merge_that_left_the_adapter_out_is_told(exported):
    from medcot_utils.engines.merging import load_base

    engine, run = exported

    def base_alone(folder):
        base, tokenizer = load_base(CONFIG.model, "float16")
        base.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    run.write("merged", base_alone)
    check = verify_export(engine, run)
    assert not check["ok"]
    with pytest.raises(ExportError, match="differs from the 16-bit base"):
        require_agreement(check)


def test_a_check_that_is_not_ok_is_an_error_with_its_numbers():
    require_agreement(CHECK)
    exact, trained = CHECK["pairs"]
    wrong = [exact | {"mean_logprob_difference": 0.81, "same_greedy": 1}, trained]
    with pytest.raises(ExportError, match=r"0\.81 \(allowed 0\.05\), same greedy answer on 1 of 3 prompts"):
        require_agreement(CHECK | {"ok": False, "pairs": wrong})
