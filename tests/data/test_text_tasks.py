"""Tasks from text: the same every time, fair (only the context gives the answer away), and there to be learnt."""

import gzip
import json
import math
import random
from collections import Counter
from dataclasses import replace

import pytest

from megatron_bliss.data.text_tasks import (
    TextTaskSettings,
    choice_items,
    cloze_items,
    last_word_items,
    make_text_tasks,
    read_documents,
)

NOUNS = ["river", "garden", "window", "letter", "teacher", "morning", "kitchen", "mountain", "village", "station"]
VERBS = ["crosses", "paints", "remembers", "follows", "answers", "closes", "builds", "carries", "watches", "opens"]


def document(seed: int) -> str:
    """Sentences in which each word says much about the next: noun k is followed by verb k or k + 1."""
    generator = random.Random(seed)
    sentences = []
    for _ in range(30):
        words = ["The"]
        for _ in range(4):
            noun = generator.randrange(10)
            verb = (noun + generator.randrange(2)) % 10
            words += [NOUNS[noun], VERBS[verb], "the"]
        sentences.append(" ".join([*words, NOUNS[generator.randrange(10)]]) + ".")
    return "\n\n".join(" ".join(sentences[i : i + 6]) for i in range(0, 30, 6))


@pytest.fixture(scope="module")
def documents():
    return [document(seed) for seed in range(40)]


@pytest.fixture
def settings(tmp_path, documents):
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return TextTaskSettings([str(path)], str(tmp_path / "out"), "held")


def read(path):
    return [json.loads(line) for line in gzip.open(path)]


def test_the_record_says_what_the_files_hold(settings, tmp_path):
    record = make_text_tasks(settings)
    out = tmp_path / "out"
    assert record == json.loads((out / "held.tasks.json").read_text())
    assert list(record["tasks"]) == ["held_last_word", "held_cloze", "held_choice"]
    cloze, choice = read(out / "held_last_word.last_word.jsonl.gz"), read(out / "held_choice.choice.jsonl.gz")
    assert record["tasks"]["held_last_word"]["items"] == len(cloze) > 50 and "chance" in record["tasks"]["held_cloze"]
    assert record["tasks"]["held_choice"] | {"items": len(choice), "chance": 0.25} == record["tasks"]["held_choice"]
    assert [set(item) for item in cloze[:1] + choice[:1]] == [{"text"}, {"query", "choices", "answer"}]
    assert str(tmp_path) not in json.dumps(record) and record["sources"][0]["file"] == "held.jsonl"
    alone = make_text_tasks(replace(settings, kinds=("choice",), output=str(tmp_path / "alone")))
    assert list(alone["tasks"]) == ["held"]
    assert read(tmp_path / "alone/held.choice.jsonl.gz") == choice  # the seed of a kind does not hang on the other


def test_the_same_bytes_every_time(settings, tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_text_tasks(replace(settings, output=str(tmp_path / folder), seed=seed))
    for name in ("held_last_word.last_word.jsonl.gz", "held_cloze.choice.jsonl.gz", "held_choice.choice.jsonl.gz"):
        first, second, other = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert first == second != other


def test_choices_are_told_apart_by_their_context_only(documents, settings):
    items = choice_items(documents, replace(settings, max_items=600))
    words = {text: " ".join(text.split()) for text in documents}
    assert len(items) == 600
    for item in items:
        true = item["choices"][item["answer"]]
        home = [text for text in documents if f"{item['query']} {true}" in words[text]]
        assert home, "the true choice continues the context in a document"
        assert len({len(choice) for choice in item["choices"]}) == 1 and len(set(item["choices"])) == 4
        for wrong in set(item["choices"]) - {true}:
            assert any(wrong in words[text] for text in documents if text not in home)
    answers = Counter(item["answer"] for item in items)
    assert all(abs(answers[k] - 150) < 5 * math.sqrt(600 * 0.25 * 0.75) for k in range(4))


def accuracy(items, score) -> float:
    hits = (max(range(4), key=lambda k: score(item["query"], item["choices"][k])) == item["answer"] for item in items)
    return sum(hits) / len(items)


def test_the_right_text_teaches_it_and_frequencies_do_not(documents, settings):
    items = choice_items(documents, replace(settings, max_items=600))
    words = " ".join(document(seed) for seed in range(100, 130)).split()

    def log_probability(pairs, singles, query, choice):
        run = [query.split()[-1], *choice.split()]
        return sum(math.log((pairs[p] + 0.1) / (singles[p[0]] + 1)) for p in zip(run, run[1:], strict=False))

    def learnt(text):
        pairs, singles = Counter(zip(text, text[1:], strict=False)), Counter(text)
        return accuracy(items, lambda query, choice: log_probability(pairs, singles, query, choice))

    frequencies = Counter(words)
    by_frequency = accuracy(items, lambda _, choice: sum(math.log(frequencies[w] + 1) for w in choice.split()))
    shuffled = random.Random(0).sample(words, len(words))
    assert learnt(words) > 0.6 > 0.35 > learnt(shuffled) > 0.15
    assert 0.15 < by_frequency < 0.35


def test_cloze_words_occurred_or_are_usual(documents, settings):
    items = last_word_items(documents, replace(settings, min_words=10, max_words=30))
    assert len({item["text"] for item in items}) == len(items) <= settings.max_items
    for item in items:
        *context, answer = item["text"].split()
        assert 10 <= len(context) + 1 <= 30 and answer in NOUNS
    few = last_word_items(documents, replace(settings, min_words=10, max_words=30, max_items=20))
    assert len(few) == 20 and all(i["text"].split()[-1] in i["text"].lower().split()[:-1] for i in few)


def test_a_usual_word_need_not_have_occurred():
    unseen = ["The old man walked down to the small harbour and looked at the water."] * 3
    settings = TextTaskSettings([], "", "x", min_words=8, max_words=30)
    assert last_word_items(unseen, settings) == [{"text": unseen[0][:-1]}]
    assert last_word_items(unseen[:1], settings) == []


def test_cloze_by_choice_has_the_same_passages_and_words_of_one_length(documents, settings):
    settings = replace(settings, min_words=10, max_words=30)
    items = cloze_items(documents, settings)
    whole = {item["text"] for item in last_word_items(documents, settings)}
    assert len(items) > 50 and len({item["answer"] for item in items}) == 4
    for item in items:
        assert f"{item['query']} {item['choices'][item['answer']]}" in whole
        assert len(set(item["choices"])) == 4 and len({len(word) for word in item["choices"]}) == 1
        assert set(item["choices"]) <= {*NOUNS, *VERBS}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kinds": ("rhyme",)}, "found --kind rhyme, expected some of last_word, cloze, choice"),
        ({"name": "a.b"}, "found --name 'a.b', expected a word"),
        ({"max_items": 0}, "found --max-items 0, expected 1 or more"),
        ({"num_choices": 1}, "found --num-choices 1, expected 2 or more"),
        ({"min_words": 60}, "found --max-words 48 below --min-words 60"),
        ({"context_words": 5000}, "found no choice item in 40 documents, expected running prose"),
        ({"json_keys": ("body",)}, "held.jsonl, line 1: no key 'body', expected a document"),
        ({"inputs": ["nowhere.jsonl"]}, "no input file at nowhere.jsonl"),
    ],
)
def test_what_cannot_work_is_refused(settings, change, message):
    with pytest.raises(ValueError, match=message):
        make_text_tasks(replace(settings, **change))


def test_documents_of_a_damaged_archive_are_no_documents(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "some words"}\n' * 1000)[:-20])
    with pytest.raises(ValueError, match="damaged gzip"):
        read_documents([str(path)])
