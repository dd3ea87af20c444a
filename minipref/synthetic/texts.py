"""Prompts, and answers to them with given flaws.

Each kind of prompt has a task, a function that draws a prompt from `rng`. It returns the prompt and a function
answer(rng, flaws) -> text.

What is unusual here:
- Except for "cut", no flaw is visible in the answer alone: the same text is correct for another prompt. Length and word
  counts therefore predict little (`tests/test_synthetic.py` checks this), and a model must compare answer and prompt.
- On average a cut answer has as many words as a complete one.
- Only `random.Random.random()` is called: Python guarantees its sequence for a given seed, but not that of the other
  methods. The order of the calls determines the dataset.
"""

import tomllib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from random import Random

WORDS = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
FACTS: dict[str, list[str]] = WORDS["facts"]              # by topic
CATEGORIES: dict[str, list[str]] = WORDS["categories"]    # the members of each
WORLDS: list[dict] = WORDS["worlds"]                      # subjects of passages
TOPICS = list(FACTS)
NOUNS = [noun for category in ("animal", "bird", "tool", "instrument", "vehicle", "garment", "fruit")
         for noun in CATEGORIES[category] if noun[0] not in "aeiou"]   # nouns with the article "a"

Task = tuple[str, Callable[[Random, Collection[str]], str]]            # the result of a task


def pick(rng: Random, items: Sequence):
    """One of `items`, each equally likely."""
    return items[int(rng.random() * len(items))]


def some(rng: Random, items: Sequence, count: int) -> list:
    """`count` different items in random order."""
    left = list(items)
    return [left.pop(int(rng.random() * len(left))) for _ in range(count)]


def between(rng: Random, low: int, high: int) -> int:
    """A whole number from `low` to `high`, both included."""
    return low + int(rng.random() * (high - low + 1))


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def lay_out(rng: Random, clauses: list[str], count: int, cut: bool, form: str = "prose", opener: str = "") -> str:
    """An answer of the first `count` clauses as a "list", as "prose" or as "one" sentence.

    A cut answer stops within its last clause. In half of the cases that is clause `count + 1`, so cut answers are not
    shorter on average. `clauses` must therefore have at least `count + 1` items.
    """
    count += cut and rng.random() < 0.5
    texts = clauses[:count]
    if cut:
        words = texts[-1].split(" ")
        texts[-1] = " ".join(words[: between(rng, 2, len(words) - 1)])
    if form == "one":
        body = capital(pick(rng, WORDS["joints"]).join([", ".join(texts[:-1]), texts[-1]]))
    elif form == "list":
        marker = pick(rng, WORDS["markers"])
        body = ".\n".join(marker.format(number) + capital(text) for number, text in enumerate(texts, 1))
    else:
        body = ". ".join(capital(text) for text in [texts[0], *(pick(rng, WORDS["links"]) + t for t in texts[1:])])
    if opener:
        opener += "\n" if form == "list" else " "
    return opener + body + ("" if cut else ".")


# --- topics: list, prose, brief, detail -------------------------------------------------------------------------------

LAYOUTS = {"list": ("list", 3), "prose": ("prose", 3), "brief": ("one", 2), "detail": ("prose", 4)}   # form, clauses
CONFUSED = {"list": "prose", "prose": "list", "brief": "detail", "detail": "brief"}   # the flaws "form" and "amount"
NEIGHBOURS = 10     # related topics are adjacent; closer topics than this could fit the prompt


def topic_task(rng: Random, kind: str) -> Task:
    """A request to write about a topic: as a list, in prose, in one sentence, or in detail."""
    topic = pick(rng, TOPICS)
    prompt = pick(rng, WORDS["requests"][kind]).format(t=topic)
    if rng.random() < 0.5:
        prompt += " " + pick(rng, WORDS["purposes"]).format(pick(rng, WORDS["audiences"]))
    return prompt, partial(answer_topic, kind=kind, topic=topic)


def answer_topic(rng: Random, flaws: Collection[str], kind: str, topic: str) -> str:
    if "off" in flaws:
        away = between(rng, NEIGHBOURS, len(TOPICS) - NEIGHBOURS)
        topic = TOPICS[(TOPICS.index(topic) + away) % len(TOPICS)]
    form, count = LAYOUTS[CONFUSED[kind] if "form" in flaws or "amount" in flaws else kind]
    opener = pick(rng, WORDS["openers"]).format(t=topic) if form != "one" and rng.random() < 0.3 else ""
    return lay_out(rng, some(rng, FACTS[topic], count + 1), count, "cut" in flaws, form, opener)


# --- passage ----------------------------------------------------------------------------------------------------------

def passage_task(rng: Random) -> Task:
    """A passage of three facts (owners, places, ...) and a question about one of them."""
    world = pick(rng, WORLDS)
    facts = draw_facts(rng, world)
    said = " ".join(capital(pick(rng, world["say"]).format(*fact)) + "." for fact in facts)
    asked = between(rng, 0, 2)
    question = capital(pick(rng, world["ask"]).format(facts[asked][0]))
    prompt = pick(rng, WORDS["passages"]).format(said=said, question=question)
    return prompt, partial(answer_passage, world=world, facts=facts, asked=asked)


def draw_facts(rng: Random, world: dict) -> list[tuple[str, str]]:
    """Three (subject, object) pairs."""
    return list(zip(*(some(rng, WORDS["things"][world[part]], 3) for part in ("subjects", "objects"))))


def answer_passage(rng: Random, flaws: Collection[str], world: dict, facts: list[tuple[str, str]], asked: int) -> str:
    """The requested fact, then another. A wrong answer swaps the objects of two facts or invents one."""
    if "off" in flaws:
        world = pick(rng, [other for other in WORLDS if other is not world])
        facts = draw_facts(rng, world)
    elif "wrong" in flaws:
        facts, other = list(facts), (asked + between(rng, 1, 2)) % 3
        (subject, right), (its_subject, wrong) = facts[asked], facts[other]
        if rng.random() < 0.5:
            facts[other] = its_subject, right
        else:
            known = [known for _, known in facts]
            wrong = pick(rng, [thing for thing in WORDS["things"][world["objects"]] if thing not in known])
        facts[asked] = subject, wrong
    ordered = [facts[asked], *some(rng, facts[:asked] + facts[asked + 1:], 2)]
    return lay_out(rng, [pick(rng, world["say"]).format(*fact) for fact in ordered], 2, "cut" in flaws)


# --- choice -----------------------------------------------------------------------------------------------------------

def choice_task(rng: Random) -> Task:
    """Four things, and the question which of them belongs to a category."""
    things = draw_things(rng, list(CATEGORIES))
    category = things[0][0]
    *shown, last = (thing for _, thing in some(rng, things, 4))
    prompt = pick(rng, WORDS["choices"]).format(c=category, a=with_article(category),
                                                things=", ".join(shown) + " or " + last)
    return prompt, partial(answer_choice, things=things)


def draw_things(rng: Random, categories: list[str]) -> list[tuple[str, str]]:
    """Four (category, thing) pairs of different categories; the first is the correct answer."""
    return [(category, pick(rng, CATEGORIES[category])) for category in some(rng, categories, 4)]


def answer_choice(rng: Random, flaws: Collection[str], things: list[tuple[str, str]]) -> str:
    """Names the requested thing (a wrong answer: another one), then the categories of some others."""
    if "off" in flaws:
        things = draw_things(rng, [name for name in CATEGORIES if name not in dict(things)])
    (category, thing), *others = [things[0], *some(rng, things[1:], 3)]
    if "wrong" in flaws:
        thing = others.pop()[1]
    clauses = [pick(rng, WORDS["chosen"]).format(c=category, thing=thing)]
    clauses += [pick(rng, WORDS["remaining"]).format(a=with_article(name), thing=other) for name, other in others[:2]]
    return lay_out(rng, clauses, 2, "cut" in flaws)


# --- word -------------------------------------------------------------------------------------------------------------

def word_task(rng: Random) -> Task:
    """An instruction to write something with a given word in it."""
    word = pick(rng, NOUNS)
    return pick(rng, WORDS["word_requests"]).format(w=word), partial(answer_word, word=word)


def answer_word(rng: Random, flaws: Collection[str], word: str) -> str:
    """Scenes with a noun each; the first has the given word, or in a wrong answer another word."""
    nouns = some(rng, [noun for noun in NOUNS if noun != word], 3)
    if "wrong" not in flaws:
        nouns[0] = word
    clauses = [scene.format(noun) for scene, noun in zip(some(rng, WORDS["scenes"], 3), nouns)]
    return lay_out(rng, clauses, 2, "cut" in flaws)
