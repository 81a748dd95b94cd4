"""Log-likelihoods of continuations: equal to a plain loop, to lm_eval on an exported model, and independent of batching."""

import json

import pytest
import torch

from layerwise.errors import BadInput
from layerwise.evaluate.choice import log_likelihoods, multiple_choice
from layerwise.evaluate.language import language_modeling
from layerwise.models.hf import export_hf
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.train.loop import train
from layerwise.train.spec import TrainSpec


@pytest.fixture(scope="module")
def model(text):
    data = preset("decoder")
    data["stack"] |= {"depth": 2, "width": 32}
    made = build(model_spec(data | {"embedding": {"vocab": text.vocab}}), 0)
    train(made, text, TrainSpec("causal-lm", steps=30, batch=8))
    return made.eval()


def test_equal_to_a_plain_loop_whatever_the_batch(model):
    pairs = [([1, 2, 3], [4, 5]), ([7], [8, 9, 10, 11]), ([5, 6, 7, 8, 9], [2])]
    for batch in (1, 3):
        made = log_likelihoods(model, pairs, batch=batch)
        for (context, continuation), (score, greedy) in zip(pairs, made, strict=True):
            with torch.no_grad():
                logits = model({"input_ids": torch.tensor([[*context, *continuation]])}).logits[0].log_softmax(-1)
            rows = logits[len(context) - 1 : -1]
            assert score == pytest.approx(sum(rows[i, t].item() for i, t in enumerate(continuation)), abs=1e-4)
            assert greedy == (rows.argmax(-1).tolist() == continuation)


def test_bad_questions_are_named(model, text, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"context": "a", "choices": ["b"], "answer": 0}\n{"context": "a", "choices": ["b"], "answer": 3}\n')
    with pytest.raises(BadInput, match="line 2"):
        multiple_choice(model, text, file=str(path))
    with pytest.raises(BadInput, match="cannot be read"):
        multiple_choice(model, text, file=str(tmp_path / "none"))
    for at in (0, 1):
        pairs = [([1], [2]), ([1], [2])]
        pairs[at] = ([1], [])
        with pytest.raises(BadInput, match=f"pair {at}"):
            log_likelihoods(model, pairs)


@pytest.mark.slow
def test_lm_eval_finds_the_same_on_the_export(model, text, tmp_path):
    """A local task of lm_eval on the exported checkpoint: log-likelihood of every choice, and the text's as a whole."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    questions = [
        {"context": f"Verse {i}: the {a}", "choices": [" leaps over the wall", f" {b}", " and"], "answer": i % 3}
        for i, (a, b) in enumerate((a, b) for a in ("fox", "crow") for b in ("flies", "runs over", "in vain"))
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(json.dumps(q) for q in questions))
    folder = export_hf(model, tmp_path / "model", tokenizer=text.tokenizer, max_length=64)
    (tmp_path / "tasks").mkdir()
    task = {
        "task": "verses", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_target": "{{answer}}", "doc_to_choice": "{{choices}}",
        "target_delimiter": "", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    (tmp_path / "tasks" / "verses.yaml").write_text(json.dumps(task))
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    result = lm_eval.simple_evaluate(theirs, tasks=["verses"], task_manager=manager, bootstrap_iters=0)
    ours = multiple_choice(model, text, file=str(file))
    assert ours.metrics["accuracy"] == pytest.approx(result["results"]["verses"]["acc,none"])
    assert ours.metrics["accuracy_normalized"] == pytest.approx(result["results"]["verses"]["acc_norm,none"])
    samples = sorted(result["samples"]["verses"], key=lambda s: s["doc_id"])
    gold = [float(s["filtered_resps"][s["doc"]["answer"]][0]) for s in samples]
    assert ours.metrics["gold_log_likelihood"] == pytest.approx(sum(gold) / len(gold), abs=1e-4)

    # The validation split, token by token, is what language modeling measures.
    rows = text.validation.batch(torch.arange(len(text.validation)))["input_ids"]
    pairs = [(r[:1].tolist(), r[1:].tolist()) for r in rows]
    scores = [s for s, _ in theirs._loglikelihood_tokens([(("", ""), *pair) for pair in pairs], disable_tqdm=True)]
    assert [s for s, _ in log_likelihoods(model, pairs)] == pytest.approx(scores, abs=1e-3)
    mean = -sum(scores) / (len(rows) * (rows.shape[1] - 1))
    assert language_modeling(model, text).metrics["val_loss"] == pytest.approx(mean, abs=1e-4)
