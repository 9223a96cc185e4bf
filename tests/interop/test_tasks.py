"""Multiple-choice tasks: our log-likelihoods and right answers against a plain reference in `transformers`.

The reference follows the rules of lm-evaluation-harness, zero-shot, one pair at a time:

- a query that asks a question (a line begins with `Question:`) is completed by `\\nAnswer:`;
- context and choice are joined by a space; white space at the context's end counts as the continuation's;
- continuation tokens: those of the whole text behind as many as the context alone has; no special tokens;
- too long: cut at the left to the model's positions and one more, since the last token is only predicted;
- accuracy: the highest sum wins; normalised: the highest sum over the characters of the choice. Of equal ones the first.
"""

import json

import pytest
import torch
from conftest import MODELS, TASKS, load_in_transformers
from tokenizers import Tokenizer

MODEL = MODELS / "stories260k"
TOLERANCE = 1e-4


def read_rows(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def pairs_of(row):
    """The (context, continuation) texts of a row."""
    if "context_options" in row:
        return [(context, row["continuation"]) for context in row["context_options"]]
    query = row["query"]
    stripped = query.rstrip()
    if any(line.startswith("Question:") for line in stripped.split("\n")) and not stripped.endswith("Answer:"):
        query = stripped + "\nAnswer:"
    return [(query, choice) for choice in row["choices"]]


class Reference:
    def __init__(self, folder):
        self.model = load_in_transformers(folder)
        self.positions = self.model.config.max_position_embeddings
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.longest = 0

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def log_likelihood(self, context, continuation):
        whole = self.encode(context + " " + continuation)
        before = self.encode(context.rstrip())
        after = whole[len(before) :]
        tokens = before + after
        self.longest = max(self.longest, len(tokens))
        tokens = tokens[-(self.positions + 1) :]
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([tokens[:-1]])).logits[0].double()
        predictions = torch.log_softmax(logits, dim=-1)[-len(after) :]
        return sum(float(row[token]) for row, token in zip(predictions, after, strict=True))


def first_highest(values):
    return max(range(len(values)), key=values.__getitem__)


@pytest.fixture(scope="module")
def expected():
    """By task: each choice's log-likelihood, and right answers, plain and by character."""
    reference = Reference(MODEL)
    tasks = {}
    for file in TASKS:
        sums, correct, by_character = [], 0, 0
        for row in read_rows(file):
            own = [reference.log_likelihood(*pair) for pair in pairs_of(row)]
            sums += own
            correct += first_highest(own) == row["gold"]
            if "choices" in row:
                scores = [value / len(choice) for value, choice in zip(own, row["choices"], strict=True)]
                by_character += first_highest(scores) == row["gold"]
        tasks[file.stem] = (sums, correct, by_character if "choices" in row else None)
    assert reference.longest > reference.positions + 1, "some text must be too long for the model"
    return tasks


@pytest.mark.parametrize(("workers", "pass_tokens"), [(1, 2048), (1, 1), (2, 700)])
def test_choices_are_as_likely_as_in_transformers(espalier, expected, workers, pass_tokens):
    results = espalier.tasks(MODEL, TASKS, workers, pass_tokens)
    assert [result["task"] for result in results] == list(expected)
    for result in results:
        sums, correct, by_character = expected[result["task"]]
        assert result["log_likelihoods"] == pytest.approx(sums, abs=TOLERANCE)
        assert result["log_likelihood"] == pytest.approx(sum(sums), abs=TOLERANCE * len(sums))
        assert result["correct"] == correct
        assert result.get("correct_normalized") == by_character
        assert result["accuracy"] == correct / result["count"]


def test_a_limit_asks_the_first_rows_alone(espalier, expected):
    for result in espalier.tasks(MODEL, TASKS, limit=2):
        ours = result["log_likelihoods"]
        assert result["count"] == 2
        assert ours == pytest.approx(expected[result["task"]][0][: len(ours)], abs=TOLERANCE)
