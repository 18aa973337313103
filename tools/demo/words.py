"""The vocabulary of the demonstration grammar: plain data, in our own wording."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Sentiment = Literal["positive", "negative"]


@dataclass(frozen=True)
class Domain:
    """A kind of thing that can be reviewed."""

    nouns: tuple[str, ...]
    parts: tuple[str, ...]
    used: tuple[str, ...]
    use_again: str
    praise: tuple[str, ...]
    blame: tuple[str, ...]
    facts: tuple[str, ...]

    def adjectives(self, sentiment: Sentiment) -> tuple[str, ...]:
        """The adjectives that only this kind of thing attracts."""
        return self.praise if sentiment == "positive" else self.blame


def _split(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(","))


FILM = Domain(
    nouns=_split(
        "film, movie, drama, comedy, thriller, documentary, western, musical, cartoon, sequel, mystery, romance"
    ),
    parts=_split(
        "plot, script, acting, ending, soundtrack, dialogue, story, cast, pacing, opening scene, camera work, "
        "humour, main character, direction, last act, music"
    ),
    used=_split("watched, saw, rented"),
    use_again="watch it again",
    praise=_split("moving, gripping, funny, touching, thrilling, heartfelt, inspired, witty, tender, uplifting"),
    blame=_split("predictable, confusing, bland, wooden, shallow, tiresome, lifeless, boring, muddled, sluggish"),
    facts=_split(
        "it runs for about two hours, it is set in a small town, it is based on an old play, "
        "it opened in the spring, it was filmed near a lake, the story takes place over one summer"
    ),
)
PRODUCT = Domain(
    nouns=_split(
        "kettle, lamp, backpack, chair, phone, camera, blender, toaster, keyboard, jacket, tent, bicycle, watch, "
        "speaker, umbrella, desk, mattress, printer, radio, heater, tablet, suitcase"
    ),
    parts=_split(
        "handle, battery, design, finish, manual, packaging, motor, switch, fabric, colour, material, cable, "
        "build quality, frame, surface, size"
    ),
    used=_split("bought, ordered, tried"),
    use_again="buy it again",
    praise=_split("sturdy, reliable, comfortable, durable, handy, sleek, powerful, practical, solid, smooth"),
    blame=_split("flimsy, unreliable, uncomfortable, fragile, useless, clunky, cheap, faulty, crooked, wobbly"),
    facts=_split(
        "it arrived in a brown box, it comes in three colours, it weighs about two pounds, "
        "it was made last year, it stands next to my door, it came with a spare part"
    ),
)
BOOK = Domain(
    nouns=_split("book, novel, memoir, guide, biography, cookbook, magazine"),
    parts=_split("writing, story, first chapter, last chapter, style, plot, cover, language, hero, topic"),
    used=_split("read, borrowed, finished"),
    use_again="read it again",
    praise=_split("absorbing, wise, vivid, insightful, poetic, lively, warm, engaging"),
    blame=_split("dry, rambling, dreary, repetitive, clumsy, stale, pompous, monotonous"),
    facts=_split(
        "it has about two hundred pages, it came out last year, it is set by the sea, "
        "it has twelve chapters, it was written in the winter, it lies on my desk"
    ),
)
PLACE = Domain(
    nouns=_split("hotel, restaurant, cafe, museum, theatre, bakery, gym, campsite"),
    parts=_split("service, staff, food, room, garden, location, view, menu, breakfast, lighting, furniture, tour"),
    used=_split("visited, booked, found"),
    use_again="go there again",
    praise=_split("friendly, welcoming, cosy, spotless, peaceful, generous, tasty, cheerful"),
    blame=_split("rude, dirty, gloomy, cramped, stuffy, noisy, grim, filthy"),
    facts=_split(
        "it opens at nine, it is near the station, it stands next to a bridge, "
        "it has two floors, it is five minutes from the park, it was built long ago"
    ),
)
DOMAINS: tuple[Domain, ...] = (FILM, PRODUCT, BOOK, PLACE)
DOMAIN_WEIGHTS: tuple[int, ...] = (5, 4, 2, 2)

ADJECTIVES: dict[Sentiment, tuple[str, ...]] = {
    "positive": _split(
        "wonderful, excellent, superb, delightful, brilliant, lovely, charming, great, fantastic, terrific, "
        "splendid, marvellous, impressive, outstanding, beautiful, perfect, amazing, clever, pleasant, elegant, "
        "refreshing, memorable, remarkable, fabulous, good, first-rate"
    ),
    "negative": _split(
        "terrible, awful, dreadful, horrible, poor, bad, dull, disappointing, weak, tedious, ugly, annoying, "
        "lousy, mediocre, miserable, hopeless, sloppy, painful, unpleasant, shoddy, pathetic, forgettable, "
        "appalling, ridiculous, abysmal, second-rate"
    ),
}
VERBS: dict[Sentiment, tuple[str, ...]] = {
    "positive": _split("loved, enjoyed, adored, admired, liked, appreciated, treasured"),
    "negative": _split("hated, disliked, regretted, loathed, despised, detested, resented"),
}
SUPERLATIVES: dict[Sentiment, tuple[str, ...]] = {
    "positive": _split("best, finest, loveliest, nicest, greatest"),
    "negative": _split("worst, weakest, dullest, poorest, ugliest"),
}
FEELINGS: dict[Sentiment, tuple[str, ...]] = {
    "positive": _split("happy, pleased, delighted, thrilled, satisfied"),
    "negative": _split("unhappy, annoyed, disappointed, angry, upset, frustrated"),
}
NAMES: dict[Sentiment, tuple[str, ...]] = {
    "positive": _split("a joy, a treat, a pleasure, a triumph, a gem, a success, a treasure, a delight"),
    "negative": _split("a mess, a chore, a bore, a failure, a letdown, a disaster, a nuisance, a mistake"),
}
SCORES: dict[Sentiment, tuple[str, ...]] = {
    "positive": _split("eight, nine, ten"),
    "negative": _split("one, two, three"),
}
HEADINGS: dict[Sentiment, tuple[str, ...]] = {
    "positive": _split("Five stars., Thumbs up., Good news!, Happy customer."),
    "negative": _split("One star., Thumbs down., Bad news!, Unhappy customer."),
}
ADVERBS = _split("really, truly, absolutely, simply, very, quite, so, rather")
VERB_ADVERBS = _split("really, truly, absolutely, simply")
PEOPLE = _split("sister, brother, mother, father, cousin, neighbour, friend, wife, husband, daughter, son, aunt, uncle")
DAYS = _split("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = _split("January, March, April, June, August, October, December")
NOTES = _split(
    "The shop opens at nine on {day}., My {person} lives near the station., The train leaves at ten on {day}., "
    "We had soup and bread for dinner on {day}., The meeting was moved to {day}., "
    "It rained for two days in {month}., The library is next to the park., "
    "My {person} painted the door in {month}., There are twelve chairs in the room., "
    "The bus stops near the bridge., I called my {person} on {day}., The parcel was sent in {month}."
)
