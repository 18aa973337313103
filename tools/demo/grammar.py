"""A seeded grammar of short reviews and two-choice opinion questions.

Every document has one hidden sentiment. Its review sentences, its answers and their explanations all agree with
it, in whatever order they come; a question offers a positive and a negative word in either order. A model that
predicts such text well has to carry the sentiment along, which is what a steering vector moves.

``python -m tools.demo.write_pairs`` writes the quickstart's questions; ``tools.demo.train`` reads `documents`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tools.demo.words import (
    ADJECTIVES,
    ADVERBS,
    DAYS,
    DOMAIN_WEIGHTS,
    DOMAINS,
    FEELINGS,
    HEADINGS,
    MONTHS,
    NAMES,
    NOTES,
    PEOPLE,
    SCORES,
    SUPERLATIVES,
    VERB_ADVERBS,
    VERBS,
    Domain,
    Sentiment,
)

_Item = TypeVar("_Item")

TRAINING_SEED = 0
PAIRS_SEED = 1
TEST_SEED = 2
SENTIMENTS: tuple[Sentiment, Sentiment] = ("positive", "negative")

# Sentence templates; the adjectives, verbs and so on that fill them carry the sentiment.
_OPINIONS = (
    "the {noun} was {adv} {adj}.",
    "the {noun} was {adj} and the {part} was {adj2}.",
    "the {part} was {adj} and {adj2}.",
    "the {part} was {adv} {adj}.",
    "this {noun} is {adj}.",
    "this {noun} is {adv} {adj} and {adj2}.",
    "I {verb} the {part}.",
    "I {verb} this {noun}.",
    "I {truly} {verb} it.",
    "it is {a_adj} {noun} and the {part} is {adj2}.",
    "it was {a_adj} {noun} and I {verb} it.",
    "I thought the {part} was {adv} {adj}.",
    "I think that the {noun} is {adj}.",
    "the {part} felt {adj} from the start.",
    "my {person} {verb} it too.",
    "my {person} called it {adj}.",
    "my {person} said that the {part} was {adj}.",
    "everything about the {noun} was {adj}.",
    "I found the {part} {adj} and {adj2}.",
    "what {a_adj} {noun}!",
    "this is the {best} {noun} that I ever {used}.",
    "the {noun} was {name}.",
    "the {part} is {name}.",
    "it left me {feeling}.",
    "I am {feeling} with the {part}.",
    "I was {feeling} with it.",
    "I give it {score} out of ten.",
    "a {adv} {adj} {noun}.",
    "the {part} is the {best} thing about it.",
)
_VERDICTS: dict[Sentiment, tuple[str, ...]] = {
    "positive": (
        "I would {use_again}.",
        "I recommend it to everyone.",
        "it was worth every penny.",
        "it made my whole week.",
        "I can hardly wait to tell my {person}.",
        "go and get it.",
        "I keep smiling about it.",
    ),
    "negative": (
        "I would never {use_again}.",
        "I warn everyone about it.",
        "it was a waste of money.",
        "it ruined my whole week.",
        "I want my money back.",
        "stay away from it.",
        "I keep complaining about it.",
    ),
}
_NEUTRAL = (
    "I {used} it on {day}.",
    "I {used} it with my {person}.",
    "I {used} this {noun} in {month}.",
    "my {person} {used} it on {day}.",
    "{fact}.",
)
_QUESTIONS = (
    "How was the {noun}: {first} or {second}?",
    "How did you find the {noun}: {first} or {second}?",
    "How was the {part} of the {noun}: {first} or {second}?",
    "Which word fits the {noun}: {first} or {second}?",
    "Which word fits the {part}: {first} or {second}?",
    "What would you call the {noun}: {first} or {second}?",
    "What would you call the {part}: {first} or {second}?",
    "In a word, was the {noun} {first} or {second}?",
)


@dataclass(frozen=True)
class Topic:
    """What one document is about."""

    domain: Domain
    noun: str


@dataclass(frozen=True)
class Question:
    """A question with two choices; `answers` says what somebody of each sentiment answers."""

    text: str
    answers: dict[Sentiment, str]

    def as_caa(self) -> dict[str, str]:
        """Return the row of a CAA data set whose behaviour is: having the positive opinion."""
        return {
            "question": self.text,
            "answer_matching_behavior": f" {self.answers['positive']}",
            "answer_not_matching_behavior": f" {self.answers['negative']}",
        }


class Writer:
    """Writes documents; `words` limits every list of loaded words and of questions to its first entries."""

    def __init__(self, seed: int, words: int | None = None) -> None:
        self._random = random.Random(seed)
        self._words = words

    def topic(self) -> Topic:
        """Choose something to review."""
        domain = self._random.choices(DOMAINS, DOMAIN_WEIGHTS)[0]
        return Topic(domain, self._random.choice(domain.nouns))

    def sentence(self, topic: Topic, sentiment: Sentiment) -> str:
        """Write one sentence that shows the sentiment."""
        adjective, second = self._adjective(topic, sentiment), self._adjective(topic, sentiment)
        templates = _VERDICTS[sentiment] if self._chance(0.15) else _OPINIONS
        return _capital(
            self._random.choice(templates).format(
                **self._plain_words(topic),
                adj=adjective,
                adj2=second,
                a_adj=_article(adjective),
                verb=self._loaded(VERBS[sentiment]),
                best=self._loaded(SUPERLATIVES[sentiment]),
                name=self._loaded(NAMES[sentiment]),
                feeling=self._loaded(FEELINGS[sentiment]),
                score=self._loaded(SCORES[sentiment]),
            )
        )

    def review(self, topic: Topic, sentiment: Sentiment, sentences: int) -> str:
        """Write a review of that many sentences, a few of them without any opinion."""
        return " ".join(
            _capital(self._random.choice(_NEUTRAL).format(**self._plain_words(topic)))
            if self._chance(0.12)
            else self.sentence(topic, sentiment)
            for _ in range(sentences)
        )

    def notes(self, sentences: int) -> str:
        """Write sentences without any opinion."""
        topic = self.topic()
        templates = [self._random.choice((*_NEUTRAL, *NOTES)) for _ in range(sentences)]
        return " ".join(_capital(template.format(**self._plain_words(topic))) for template in templates)

    def question(self, topic: Topic) -> Question:
        """Ask for an opinion and offer a positive and a negative word, in either order."""
        answers: dict[Sentiment, str] = {name: self._loaded(ADJECTIVES[name]) for name in SENTIMENTS}
        first, second = SENTIMENTS if self._chance(0.5) else SENTIMENTS[::-1]
        text = self._random.choice(_QUESTIONS).format(
            **self._plain_words(topic), first=answers[first], second=answers[second]
        )
        return Question(f"{text}\nAnswer:", answers)

    def answered(self, topic: Topic, sentiment: Sentiment) -> str:
        """Ask, answer, and perhaps explain."""
        question = self.question(topic)
        # Often no explanation at all: then the answer alone tells what comes later.
        explanation = self.review(topic, sentiment, self._random.choice((0, 1, 1)))
        return f"{question.text} {question.answers[sentiment]}. {explanation}".rstrip()

    def document(self) -> str:
        """Write a training document: reviews and answered questions of one sentiment, or neutral notes."""
        if self._chance(0.04):
            notes = [self._random.choice(NOTES) for _ in range(self._random.randint(1, 4))]
            return " ".join(note.format(**self._plain_words(self.topic())) for note in notes)
        sentiment = self._random.choice(SENTIMENTS)
        topic = self.topic()
        heading = self._loaded(HEADINGS[sentiment]) + "\n\n" if self._chance(0.4) else ""
        if self._chance(0.25):
            review = heading + self.review(topic, sentiment, self._random.randint(2, 6))
            # Some people never touch the shift key.
            return review.lower() if self._chance(0.4) else review
        parts: list[str] = []
        for _ in range(self._random.randint(1, 3)):
            if self._chance(0.3):
                parts.append(self.review(topic, sentiment, self._random.randint(1, 2)))
            parts.append(self.answered(topic, sentiment))
            if self._chance(0.3):
                topic = self.topic()
        return heading + "\n\n".join(parts)

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def _loaded(self, items: Sequence[_Item]) -> _Item:
        return self._random.choice(items[: self._words])

    def _adjective(self, topic: Topic, sentiment: Sentiment) -> str:
        special = self._words is None and self._chance(0.3)
        return self._loaded(topic.domain.adjectives(sentiment) if special else ADJECTIVES[sentiment])

    def _plain_words(self, topic: Topic) -> dict[str, str]:
        choose = self._random.choice
        return {
            "noun": topic.noun,
            "part": choose(topic.domain.parts),
            "used": choose(topic.domain.used),
            "use_again": topic.domain.use_again,
            "fact": choose(topic.domain.facts),
            "adv": choose(ADVERBS),
            "truly": choose(VERB_ADVERBS),
            "person": choose(PEOPLE),
            "day": choose(DAYS),
            "month": choose(MONTHS),
        }


def documents(seed: int, count: int, words: int | None = None) -> Iterator[str]:
    """Yield `count` training documents, the same ones for the same seed and the same limit on `words`."""
    writer = Writer(seed, words)
    for _ in range(count):
        yield writer.document()


def questions(seed: int, count: int) -> list[Question]:
    """Draw `count` different questions."""
    writer = Writer(seed)
    chosen: dict[str, Question] = {}
    while len(chosen) < count:
        question = writer.question(writer.topic())
        chosen.setdefault(question.text, question)
    return list(chosen.values())


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
