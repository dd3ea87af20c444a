"""The sample task: preference rows from a seed, so that training works, and can be judged, with nothing downloaded.

A row is a prompt and two answers in the Kaggle layout. Every answer has hidden flaws, the label is drawn from a rule
that knows them, and the rule's exact probabilities come with the rows. That is what makes the sample worth having:
its best reachable log loss is known, so a training run can say how much of the way it went.

The rule. An answer's utility u is minus the weights of its flaws (`WEIGHTS`), plus `PER_WORD` for each word it has.
With d = u_A - u_B the label follows Davidson's model for comparisons with ties (Davidson 1970, JASA 65:317):

    P(A) : P(B) : P(tie)  =  exp(d/2) : exp(-d/2) : TIE

so the three logits are linear in d, and exchanging A and B exchanges P(A) and P(B).

What is unusual here:
- No flaw shows in an answer alone, but for the one that breaks off. An answer off the topic is on the topic of another
  prompt; a list is right where a list was asked for; four sentences are too many for one prompt and just right for
  another; the wrong name is the right name elsewhere. So counting words, or measuring length, finds next to nothing
  (`tests/test_sample.py` holds it to that), and reading the prompt is the way.
- An answer that breaks off has, on average, as many words as one that does not.
- Only `random.Random.random()` is drawn from: the one method whose sequence Python promises to keep for a given seed.

The code comes first, the words it draws from at the end of the file.

    python -m minipref.sample [--folder data/sample] [--rows N] [--test-rows N] [--seed N] [--test-seed N]
"""

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd

from minipref.errors import InputError
from minipref.files import write_text
from minipref.metrics import baselines

TRAIN_ROWS, TEST_ROWS, TRAIN_SEED, TEST_SEED = 45_000, 1500, 1, 2

# --- The rule ---

FLAWS = ("off", "cut", "form", "amount", "wrong")   # off the topic, cut off, not a list (or a list), too much or little
WEIGHTS = {"off": 8.0, "cut": 5.0, "form": 4.0, "amount": 4.0, "wrong": 5.0}
CHANCES = {"off": 0.30, "cut": 0.25, "form": 0.25, "amount": 0.25, "wrong": 0.30}   # of each flaw, where it can occur
PER_WORD = 0.03     # people like longer answers a little
TIE = 3.0           # the weight of a tie: with d = 0, P(tie) = 3/5


@dataclass(frozen=True)
class Kind:
    """A kind of prompt: how often it comes, which flaws its answers can have, and who writes prompt and answers."""

    share: float
    flaws: tuple[str, ...]
    task: Callable


@dataclass(frozen=True)
class SampleRows:
    """Rows, and the truth about them.

    frame: the nine Kaggle columns, all text but the three 0/1 winners; `null` turns do not occur.
    probabilities: (rows, 3) float64, the rule's P(A), P(B), P(tie), six decimals, each row summing to 1.
    flaws: `kind`, then 0/1 columns `a_off`, `b_off`, ... for each of `FLAWS`, then `a_words`, `b_words`.
    """

    frame: pd.DataFrame
    probabilities: np.ndarray
    flaws: pd.DataFrame

    @property
    def labels(self) -> np.ndarray:
        """(rows,) int64: 0 where A won, 1 where B won, 2 for a tie."""
        return self.frame[WINNERS].to_numpy().argmax(axis=1)


WINNERS = ["winner_model_a", "winner_model_b", "winner_tie"]
COLUMNS = ["id", "model_a", "model_b", "prompt", "response_a", "response_b", *WINNERS]


def utility(flaws: Collection[str], words: int) -> float:
    """What an answer is worth under the rule, in units of d."""
    return PER_WORD * words - sum(WEIGHTS[flaw] for flaw in FLAWS if flaw in flaws)


def outcome_probabilities(d: float) -> tuple[float, float, float]:
    """(P(A), P(B), P(tie)) where A is worth `d` more than B, to six decimals so that every machine agrees on them."""
    a, b = math.exp(d / 2), math.exp(-d / 2)
    a, b = (round(1e6 * share / (a + b + TIE)) for share in (a, b))
    return a / 1e6, b / 1e6, (10**6 - a - b) / 1e6


def best_log_loss(probabilities: np.ndarray, labels: np.ndarray | None = None) -> float:
    """The log loss of someone who knows the rule, in nats a row: no model can expect less.

    Without `labels` the expected one (the mean entropy of the rows' distributions), with `labels` (N,) the one
    that these labels happen to give. `probabilities` is (N, 3); a probability of 0 adds nothing to the entropy.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if labels is not None:
        return float(-np.log(p[np.arange(len(p)), labels]).mean())
    return float(-(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=1).mean())


# --- Drawing ---

def pick(rng: Random, items: Sequence):
    """One of `items`, each equally likely."""
    return items[int(rng.random() * len(items))]


def some(rng: Random, items: Sequence, count: int) -> list:
    """`count` different ones of `items`, in random order."""
    left = list(items)
    return [left.pop(int(rng.random() * len(left))) for _ in range(count)]


def between(rng: Random, low: int, high: int) -> int:
    """A whole number from `low` to `high`, both included."""
    return low + int(rng.random() * (high - low + 1))


# --- Answers: a few clauses, laid out in a form, perhaps broken off ---

@dataclass(frozen=True)
class Plan:
    """A complete answer: perhaps an opener, then `count` clauses as a "list", as "prose" or as "one" sentence."""

    form: str
    count: int
    opener: str = ""


def lay_out(rng: Random, clauses: list[str], plan: Plan, cut: bool) -> str:
    """The answer that says the first `plan.count` of `clauses`; there must be one more, which a cut answer may need.

    A cut answer stops within its last clause. Half of the time that is one clause later than a complete answer would
    have ended, so that being cut costs no words on average.
    """
    count = plan.count + (cut and rng.random() < 0.5)
    said = [clause.split(" ") for clause in clauses[:count]]
    if cut:
        said[-1] = said[-1][: between(rng, 2, len(said[-1]) - 1)]
    texts = [" ".join(words) for words in said]
    if plan.form == "one":
        joint = pick(rng, JOINTS)
        body = capital(joint.join([", ".join(texts[:-1]), texts[-1]]))
    elif plan.form == "list":
        marker = pick(rng, MARKERS)
        body = ".\n".join(marker.format(number) + capital(text) for number, text in enumerate(texts, 1))
    else:
        linked = [texts[0], *(pick(rng, LINKS) + text for text in texts[1:])]
        body = ". ".join(capital(text) for text in linked)
    opener = plan.opener + ("\n" if plan.form == "list" else " ") if plan.opener else ""
    return opener + body + ("" if cut else ".")


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- The kinds of prompt. Each task(rng) draws a prompt and returns it with answer(rng, flaws) -> text. ---

NEIGHBOURS = 10   # places in the list of topics within which an answer could pass for one on the topic


def topic_task(form: str, amount: str) -> Callable:
    """A request to write about a topic, as a list, in prose, in one sentence or at length."""
    def task(rng: Random):
        topic = pick(rng, TOPIC_NAMES)
        prompt = pick(rng, REQUESTS[form, amount]).format(t=topic)
        if rng.random() < 0.5:
            prompt += " " + pick(rng, PURPOSES).format(pick(rng, AUDIENCES))
        return prompt, lambda rng, flaws: answer(rng, topic, flaws)

    def answer(rng: Random, topic: str, flaws: Collection[str]) -> str:
        if "off" in flaws:
            topic = far_from(rng, topic)
        laid = {"list": "prose", "prose": "list"}[form] if "form" in flaws else form
        asked = {"one": "many", "many": "one"}.get(amount, amount) if "amount" in flaws else amount
        opener = pick(rng, OPENERS).format(t=topic) if asked != "one" and rng.random() < 0.3 else ""
        plan = {"one": Plan("one", 2), "many": Plan("prose", 4, opener), "any": Plan(laid, 3, opener)}[asked]
        return lay_out(rng, some(rng, FACTS[topic], plan.count + 1), plan, "cut" in flaws)

    return task


def far_from(rng: Random, topic: str) -> str:
    """Another topic, at least `NEIGHBOURS` places away: in the list of topics, related ones stand together."""
    here, count = TOPIC_NAMES.index(topic), len(TOPIC_NAMES)
    return TOPIC_NAMES[(here + between(rng, NEIGHBOURS, count - NEIGHBOURS)) % count]


def passage_task(rng: Random):
    """A short passage (who has what, what is where, ...) and a question about it."""
    world = pick(rng, WORLDS)
    facts = draw_facts(rng, world)
    said = " ".join(capital(pick(rng, world.say).format(who, what)) + "." for who, what in facts)
    asked = int(rng.random() * len(facts))
    question = capital(pick(rng, world.ask).format(facts[asked][0]))
    prompt = pick(rng, PASSAGES).format(said=said, question=question)
    return prompt, lambda rng, flaws: answer_passage(rng, world, facts, asked, flaws)


def draw_facts(rng: Random, world: "World") -> list[tuple[str, str]]:
    return list(zip(some(rng, world.who, 3), some(rng, world.what, 3)))


def answer_passage(rng: Random, world: "World", facts: list, asked: int, flaws: Collection[str]) -> str:
    """The asked fact first, then what else the passage says. A wrong answer exchanges two facts, or invents one."""
    if "off" in flaws:
        world = pick(rng, [other for other in WORLDS if other is not world])
        facts = draw_facts(rng, world)
    elif "wrong" in flaws:
        facts = list(facts)
        other = (asked + between(rng, 1, 2)) % 3
        if rng.random() < 0.5:
            (who, what), (whose, instead) = facts[asked], facts[other]
            facts[asked], facts[other] = (who, instead), (whose, what)
        else:
            known = [what for _, what in facts]
            facts[asked] = facts[asked][0], pick(rng, [what for what in world.what if what not in known])
    ordered = [facts[asked], *some(rng, facts[:asked] + facts[asked + 1:], 2)]
    return lay_out(rng, [pick(rng, world.say).format(*fact) for fact in ordered], Plan("prose", 2), "cut" in flaws)


def choice_task(rng: Random):
    """Four things, and the question which of them is of some category."""
    categories = some(rng, CATEGORY_NAMES, 4)
    things = [(category, pick(rng, CATEGORIES[category])) for category in categories]
    shown = [thing for _, thing in some(rng, things, 4)]
    prompt = pick(rng, CHOICES).format(c=categories[0], a=article(categories[0]),
                                       things=", ".join(shown[:3]) + " or " + shown[3])
    return prompt, lambda rng, flaws: answer_choice(rng, things, flaws)


def answer_choice(rng: Random, things: list[tuple[str, str]], flaws: Collection[str]) -> str:
    """Names the first thing as what was asked for (a wrong answer another one), then says what the others are."""
    if "off" in flaws:
        away = some(rng, [name for name in CATEGORY_NAMES if name not in dict(things)], 4)
        things = [(category, pick(rng, CATEGORIES[category])) for category in away]
    (category, thing), *others = [things[0], *some(rng, things[1:], 3)]
    if "wrong" in flaws:
        thing = others.pop()[1]
    clauses = [pick(rng, CHOSEN).format(c=category, thing=thing)]
    clauses += [pick(rng, REMAINING).format(c=name, a=article(name), thing=other) for name, other in others[:2]]
    return lay_out(rng, clauses, Plan("prose", 2), "cut" in flaws)


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def word_task(rng: Random):
    """The small instruction to write something with a given word in it."""
    word = pick(rng, NOUNS)
    prompt = pick(rng, WORD_REQUESTS).format(w=word)
    return prompt, lambda rng, flaws: answer_word(rng, word, flaws)


def answer_word(rng: Random, word: str, flaws: Collection[str]) -> str:
    """Scenes with a noun each, the given word in the first; a wrong answer has another word there."""
    nouns = some(rng, [noun for noun in NOUNS if noun != word], 3)
    if "wrong" not in flaws:
        nouns[0] = word
    clauses = [scene.format(noun) for scene, noun in zip(some(rng, SCENES, 3), nouns)]
    return lay_out(rng, clauses, Plan("prose", 2), "cut" in flaws)


KINDS = {
    "list": Kind(0.16, ("off", "cut", "form"), topic_task("list", "any")),
    "prose": Kind(0.16, ("off", "cut", "form"), topic_task("prose", "any")),
    "brief": Kind(0.16, ("off", "cut", "amount"), topic_task("prose", "one")),
    "detail": Kind(0.16, ("off", "cut", "amount"), topic_task("prose", "many")),
    "passage": Kind(0.16, ("off", "cut", "wrong"), passage_task),
    "choice": Kind(0.10, ("off", "cut", "wrong"), choice_task),
    "word": Kind(0.10, ("cut", "wrong"), word_task),
}


# --- Rows ---

REUSE = 0.10         # of the rows put an earlier row's prompt to two other models, as happens in real data
MULTI_TURN = 0.07    # of the rows begin with a turn of small talk


def generate(rows: int, seed: int, *, apart_from: SampleRows | None = None) -> SampleRows:
    """`rows` rows of the sample task from `seed`: equal arguments, equal rows, on every machine.

    apart_from: rows (a training set, say) of which no prompt and no id may occur again.
    Errors: InputError for fewer than one row or a negative seed.
    """
    if rows < 1:
        raise InputError(found=f"{rows} rows asked for", expected="at least 1")
    if seed < 0:
        raise InputError(found=f"seed {seed}", expected="0 or more")   # Random takes -1 for 1
    rng = Random(seed)
    avoid = set() if apart_from is None else set(apart_from.frame["prompt"])
    used_ids = set() if apart_from is None else set(apart_from.frame["id"])
    asked, records, truth, notes = [], [], [], []
    for _ in range(rows):
        if asked and rng.random() < REUSE:
            kind, turns, answer = pick(rng, asked)
        else:
            kind, turns, answer = new_prompt(rng, avoid)
            asked.append((kind, turns, answer))
        record, probabilities, note = make_row(rng, kind, turns, answer)
        while record["id"] in used_ids:
            record["id"] = new_id(rng)
        used_ids.add(record["id"])
        records.append(record)
        truth.append(probabilities)
        notes.append(note)
    return SampleRows(pd.DataFrame(records, columns=COLUMNS), np.array(truth), pd.DataFrame(notes))


def new_prompt(rng: Random, avoid: set[str]):
    """(kind, turns, answer function): the kinds come in their shares, and no prompt that is to be avoided."""
    while True:
        kind = draw_kind(rng)
        prompt, answer = KINDS[kind].task(rng)
        turns = [pick(rng, SMALL_TALK)[0], prompt] if rng.random() < MULTI_TURN else [prompt]
        if json.dumps(turns) not in avoid:
            return kind, turns, answer


def draw_kind(rng: Random) -> str:
    left = rng.random() * sum(kind.share for kind in KINDS.values())
    for name, kind in KINDS.items():
        left -= kind.share
        if left < 0:
            return name
    return name   # rounding left a crumb


def make_row(rng: Random, kind: str, turns: list[str], answer: Callable):
    """(record, probabilities, note): two answers to the prompt, and the label that the rule draws for them."""
    flaws = [draw_flaws(rng, kind) for _ in "AB"]
    replies = [answer(rng, flaw) for flaw in flaws]
    words = [len(reply.split()) for reply in replies]
    p = outcome_probabilities(utility(flaws[0], words[0]) - utility(flaws[1], words[1]))
    drawn = rng.random()
    label = 0 if drawn < p[0] else 1 if drawn < p[0] + p[1] else 2
    greetings = dict(SMALL_TALK)
    cells = [json.dumps([*(pick(rng, greetings[turn]) for turn in turns[:-1]), reply]) for reply in replies]
    winners = [int(label == k) for k in range(3)]
    record = dict(zip(COLUMNS, [new_id(rng), *some(rng, MODELS, 2), json.dumps(turns), *cells, *winners]))
    note = {"kind": kind}
    for flaw in FLAWS:
        note |= {"a_" + flaw: int(flaw in flaws[0]), "b_" + flaw: int(flaw in flaws[1])}
    return record, p, note | {"a_words": words[0], "b_words": words[1]}


def draw_flaws(rng: Random, kind: str) -> list[str]:
    """The flaws of one answer, each on its own; an answer to another prompt is neither right nor wrong on this one."""
    flaws = [flaw for flaw in KINDS[kind].flaws if rng.random() < CHANCES[flaw]]
    return [flaw for flaw in flaws if not (flaw == "wrong" and "off" in flaws)]


def new_id(rng: Random) -> str:
    """Text of up to ten digits; like the real ids, every second one does not fit in int32."""
    return str(int(rng.random() * 2**32))


# --- Files ---

def train_and_test(*, train_rows: int = TRAIN_ROWS, test_rows: int = TEST_ROWS,
                   train_seed: int = TRAIN_SEED, test_seed: int = TEST_SEED) -> tuple[SampleRows, SampleRows]:
    """Rows to train on and rows to test on, from two seeds; they share no prompt and no id.

    Errors: InputError for equal seeds, a negative seed, fewer than one row.
    """
    if train_seed == test_seed:
        raise InputError(found=f"seed {train_seed} for both training and test rows", expected="two different seeds")
    train = generate(train_rows, train_seed)
    return train, generate(test_rows, test_seed, apart_from=train)


def write_sample(folder: str | Path, *, train_rows: int = TRAIN_ROWS, test_rows: int = TEST_ROWS,
                 train_seed: int = TRAIN_SEED, test_seed: int = TEST_SEED) -> dict[str, Path]:
    """Writes `train_and_test` of the same arguments into `folder`, each file whole or not at all.

    Returns the paths: "train" is `train.csv`, labelled; "test" is `test.csv` with id, prompt, response_a, response_b
    as Kaggle gives them; "test_labelled" is the same rows with models and labels; "truth" is `truth.csv`, the rule's
    probabilities for the ids of both (id, p_a, p_b, p_tie). Equal arguments give equal bytes.
    Errors: InputError as `train_and_test`, and for a folder that cannot be written.
    """
    train, test = train_and_test(train_rows=train_rows, test_rows=test_rows, train_seed=train_seed, test_seed=test_seed)
    return write_files(folder, train, test)


def write_files(folder: str | Path, train: SampleRows, test: SampleRows) -> dict[str, Path]:
    """Writes the four files of `write_sample` and returns their paths."""
    contents = {
        "train": ("train.csv", train.frame),
        "test": ("test.csv", test.frame[["id", "prompt", "response_a", "response_b"]]),
        "test_labelled": ("test_labelled.csv", test.frame),
        "truth": ("truth.csv", pd.concat([truth_frame(train), truth_frame(test)])),
    }
    paths = {}
    for name, (file, frame) in contents.items():
        paths[name] = Path(folder) / file
        try:
            write_text(paths[name], as_csv(frame))
        except OSError as error:
            raise InputError(file=paths[name], found=error.strerror or str(error), expected="a writable file") from None
    return paths


def truth_frame(rows: SampleRows) -> pd.DataFrame:
    columns = {name: [f"{p:.6f}" for p in rows.probabilities[:, k]] for k, name in enumerate(("p_a", "p_b", "p_tie"))}
    return pd.DataFrame({"id": rows.frame["id"], **columns})


def as_csv(frame: pd.DataFrame) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(frame.columns)
    writer.writerows(frame.itertuples(index=False, name=None))
    return out.getvalue()


# --- The summary ---

def lengths(rows: SampleRows) -> np.ndarray:
    """(rows, 3): the characters of prompt, A and B, over all turns, as `metrics.baselines` takes them."""
    cells = rows.frame[["prompt", "response_a", "response_b"]]
    return cells.map(lambda cell: sum(map(len, json.loads(cell)))).to_numpy()


def summary(train: SampleRows, test: SampleRows) -> str:
    """What the sample holds and how far one can get on its test rows, as a few lines of text."""
    shares = np.bincount(train.labels, minlength=3) / len(train.labels)
    words = train.flaws[["a_words", "b_words"]].to_numpy()
    lines = [
        f"{len(train.labels):,} training rows, {len(test.labels):,} test rows; an answer has {words.mean():.0f} words",
        f"class shares in training: A {shares[0]:.3f}, B {shares[1]:.3f}, tie {shares[2]:.3f}",
        "log loss on the test rows:",
    ]
    for name, score in baselines(lengths(train), train.labels, lengths(test), test.labels).items():
        lines.append(f"  {name:<20} {score['log_loss']:.4f}")
    lines.append(f"  {'best reachable':<20} {best_log_loss(test.probabilities, test.labels):.4f}   "
                 f"(the rule itself; {best_log_loss(test.probabilities):.4f} expected)")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit codes: 0 done, 2 the arguments or the folder are wrong (one line on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m minipref.sample", description="Write the generated sample task.")
    parser.add_argument("--folder", default="data/sample", help="where the files go (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=TRAIN_ROWS, help="training rows (default: %(default)s)")
    parser.add_argument("--test-rows", type=int, default=TEST_ROWS, help="test rows (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=TRAIN_SEED, help="seed of the training rows (default: %(default)s)")
    parser.add_argument("--test-seed", type=int, default=TEST_SEED, help="seed of the test rows (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        train, test = train_and_test(train_rows=args.rows, test_rows=args.test_rows,
                                     train_seed=args.seed, test_seed=args.test_seed)
        paths = write_files(args.folder, train, test)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(summary(train, test))
    for name, path in paths.items():
        print(f"{name:<14} {path}")
    return 0


# --- The words. Invented models; everything else plain English, written for this file. ---

MODELS = ("heron-large", "heron-small", "larch-2", "larch-2-mini", "ember-chat", "tundra-7b", "tundra-13b", "quill",
          "quill-turbo", "saffron-1", "basalt-chat", "mirador")

SMALL_TALK = (   # a first turn, and what a model may say to it
    ("Hello!", ("Hello! What can I do for you?", "Hi there. How can I help?")),
    ("Can you help me?", ("Of course, what is it?", "Yes, go ahead.")),
    ("I have a question for you.", ("Please ask.", "Go ahead, I am listening.")),
    ("Good morning.", ("Good morning! What do you need?", "Good morning, how can I help?")),
    ("Are you there?", ("Yes, I am here.", "I am here, please go on.")),
    ("I need something short from you.", ("Sure, tell me more.", "All right, what is it?")),
)

MARKERS = ("- ", "* ", "{}. ", "{}) ")
JOINTS = (", and ", ", while ", ", and also ")
LINKS = ("", "", "", "also, ", "besides, ", "in addition, ")
OPENERS = ("Here is something about {t}.", "Let us look at {t}.", "Sure, this is about {t}.", "Gladly.", "Of course.")

REQUESTS = {   # (form, amount) -> ways to ask for it
    ("list", "any"): (
        "Give me a list of facts about {t}.", "Make a bullet list about {t}.", "Write bullet points about {t}.",
        "What should I know about {t}? Answer with a list.", "List some facts about {t}.",
        "Please list a few points on {t}.", "I need a numbered list about {t}.",
        "Put what you know about {t} in a list.", "Bullet points on {t}, please.",
        "Show me the main points about {t} as a list."),
    ("prose", "any"): (
        "Write a paragraph about {t}.", "Give me a short paragraph on {t}.", "Describe {t} in a paragraph.",
        "What should I know about {t}? Answer with a paragraph.", "Tell me about {t} in plain sentences.",
        "Write a short text about {t}.", "I need a paragraph about {t}.", "A paragraph on {t}, please.",
        "Put what you know about {t} in a short text.", "Describe the main points about {t} in full sentences."),
    ("prose", "one"): (
        "Tell me about {t} in one sentence.", "Sum up {t} in a single sentence.", "One sentence on {t}, please.",
        "Give me just one sentence about {t}.", "Be brief: what should I know about {t}?",
        "Briefly, what is there to say about {t}?", "I need one short sentence about {t}.",
        "What should I know about {t}? One sentence only.", "Describe {t} very briefly.",
        "Write a single sentence about {t}."),
    ("prose", "many"): (
        "Tell me about {t} in detail.", "Explain {t} at length.", "A long answer on {t}, please.",
        "Give me a detailed text about {t}.", "Be thorough: what should I know about {t}?",
        "In detail, what is there to say about {t}?", "I need a long text about {t}.",
        "What should I know about {t}? Give many details.", "Describe {t} in great detail.",
        "Write a long and detailed text about {t}."),
}
PURPOSES = ("It is for {}.", "I need it for {}.", "This is meant for {}.")
AUDIENCES = (
    "a school newsletter", "my little brother", "a quiz night", "my English class", "a blog", "a friend", "a poster",
    "my grandmother", "a club", "a talk next week", "a children's book", "my homework", "a speech", "our web page",
    "a colleague", "a training course", "a local magazine", "my students", "a radio show", "a museum sign",
)

PASSAGES = (
    "{said} {question}", "{said} Now tell me: {question}", "Read this. {said} {question}",
    "{said} My question: {question}", "{question} Here is what I know: {said}",
    "Here are some facts. {said} {question}")


@dataclass(frozen=True)
class World:
    """What a passage is about: who (or what) is told something, and how it is said and asked."""

    who: tuple[str, ...]
    what: tuple[str, ...]
    say: tuple[str, ...]
    ask: tuple[str, ...]


def listed(text: str, before: str = "") -> tuple[str, ...]:
    """The items of "a, b, c", each with `before` in front."""
    return tuple(before + item for item in text.split(", "))


PEOPLE = listed(
    "Maria, Tom, Lena, David, Anna, Peter, Sarah, John, Emma, Paul, Julia, Mark, Alice, Henry, Clara, Simon, Laura, "
    "Robert, Nina, Frank, Grace, Daniel, Helen, Martin, Rosa, Oscar, Eva, Victor, Ruth, Samuel, Diana, Walter, Irene, "
    "George, Sofia, Hugo, Marta, Adam, Olga, Felix, Joan, Carl, Monica, Leo, Vera, Philip, Betty, Max, Carmen, Eric, "
    "Amy, Kevin, Susan, Brian, Nora, Ivan, Lucy, Steve, Hannah, Ali")
GOODS = listed(
    "ladder, hammer, map, letter, camera, radio, clock, blanket, mirror, rope, basket, bicycle, suitcase, umbrella, "
    "knife, bottle, candle, ticket, wallet, notebook, broom, bucket, pillow, axe", "the ")
COLOURED = tuple(f"the {colour} {thing}"
                 for colour in listed("red, blue, green, black, white, yellow, brown")
                 for thing in listed("ball, book, bag, box, cup, hat, key, coat, lamp, pen, card, phone"))
GROUPS = listed("choir, chess club, book club, team, council, band, art class, yoga class, board, youth group, "
                "film club, garden club, dance class", "the ")
JOBS = listed("baker, doctor, teacher, lawyer, farmer, pilot, nurse, driver, cook, painter, singer, judge, soldier, "
              "writer, dentist, builder, waiter, banker", "a ")
TOWNS = listed("Paris, London, Rome, Berlin, Tokyo, Madrid, Boston, Chicago, Cairo, Moscow, Vienna, Dublin, Lisbon, "
               "Toronto, Sydney, Athens, Oslo, Prague, Seattle, Delhi")
DISHES = listed("soup, fish, salad, pizza, rice, chicken, pasta, cake, burger, steak, pie, omelet, curry, sandwich, "
                "stew, beans", "the ")
PLACES = listed(
    "in the garage, in the kitchen, under the bed, on the roof, in the garden, by the door, on the table, in the car, "
    "behind the sofa, in the cellar, on the shelf, at the office, in the drawer, near the window, in the bathroom, "
    "on the stairs, at the school, in the barn")
DAYS = listed("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday", "on ")
PRICES = tuple(f"{n} dollars" for n in (3, 4, 6, 7, 8, 9, 11, 12, 14, 15, 18, 20, 25, 30, 35, 40, 45, 60, 75, 90))
GAMES = listed("the piano, the guitar, the violin, the drums, the flute, the trumpet, the harp, the organ, chess, "
               "tennis, football, golf, hockey, basketball, baseball, cards")
WAYS = listed("by train, by bus, by car, by plane, by ship, by taxi, by bicycle, by boat, by truck, by subway, "
              "by ferry, on foot, on a horse, on a scooter")
PETS = listed("rabbit, parrot, cat, dog, turtle, snake, mouse, pony, goat, duck, lizard, fish, spider, hen, frog, "
              "hamster", "a ")

WORLDS = (
    World(PEOPLE, COLOURED,
          say=("{} has {}", "{} is holding {}", "{} owns {}"),
          ask=("what does {} have?", "which thing is with {}?")),
    World(PEOPLE, JOBS,
          say=("{} works as {}", "{} earns a living as {}", "{} became {}"),
          ask=("what is the job of {}?", "what does {} work as?")),
    World(PEOPLE, TOWNS,
          say=("{} lives in {}", "{} has a home in {}", "{} moved to {}"),
          ask=("where does {} live?", "in which city is {}?")),
    World(PEOPLE, DISHES,
          say=("{} ordered {} for lunch", "{} asked for {}", "{} will eat {}"),
          ask=("what did {} order?", "what will {} eat?")),
    World(PEOPLE, GAMES,
          say=("{} likes to play {}", "{} learned to play {}", "{} plays {} well"),
          ask=("what does {} play?", "what can {} play?")),
    World(PEOPLE, WAYS,
          say=("{} came here {}", "{} arrived {}", "{} travels {}"),
          ask=("how did {} come here?", "how does {} travel?")),
    World(PEOPLE, PETS,
          say=("{} keeps {} at home", "{} has {} as a pet", "{} takes care of {}"),
          ask=("which animal does {} keep?", "what is the pet of {}?")),
    World(GOODS, PLACES,
          say=("{} is {}", "{} was left {}", "you can find {} {}"),
          ask=("where is {}?", "in which place is {}?")),
    World(GOODS, PRICES,
          say=("{} costs {} today", "{} is sold for {}", "the price of {} is {}"),
          ask=("how much is {}?", "what is the price of {}?")),
    World(GROUPS, DAYS,
          say=("{} meets {}", "{} comes together {}", "{} has its meeting {}"),
          ask=("when does {} meet?", "on which day is {}?")),
)

CATEGORIES = {name: listed(things) for name, things in {
    "fruit": "apple, pear, banana, orange, lemon, cherry, grape, peach, plum, mango, melon, strawberry, pineapple",
    "vegetable": "carrot, onion, potato, cabbage, spinach, lettuce, broccoli, pepper, bean, garlic, celery, pumpkin",
    "animal": "horse, dog, cat, lion, tiger, wolf, bear, rabbit, elephant, monkey, goat, sheep, cow, pig, fox, deer",
    "bird": "eagle, chicken, duck, owl, crow, parrot, swan, goose, pigeon, hawk, sparrow, turkey",
    "tool": "hammer, saw, drill, shovel, axe, wrench, knife, ladder, screwdriver, rake, chisel, broom",
    "metal": "iron, gold, silver, copper, steel, zinc, lead, aluminum, nickel, tin, mercury, bronze",
    "colour": "red, blue, green, yellow, black, white, purple, brown, pink, grey",
    "country": "France, Spain, Italy, Germany, Japan, China, India, Brazil, Mexico, Canada, Egypt, Russia, Norway",
    "sport": "football, tennis, golf, hockey, swimming, boxing, baseball, basketball, rugby, skiing, cricket",
    "instrument": "piano, guitar, violin, drum, flute, trumpet, harp, organ, cello, banjo, clarinet, horn",
    "job": "doctor, teacher, lawyer, farmer, pilot, nurse, cook, judge, soldier, writer, dentist, driver, engineer",
    "drink": "water, milk, tea, coffee, wine, beer, juice, lemonade, whisky, cider, cocoa, soda",
    "vehicle": "car, bus, train, truck, ship, plane, bicycle, boat, taxi, tractor, helicopter, van",
    "garment": "shirt, coat, hat, skirt, jacket, glove, sock, dress, scarf, sweater, belt, shoe",
    "body part": "arm, leg, knee, nose, ear, finger, shoulder, neck, elbow, foot, hand, chest, stomach",
    "room": "kitchen, bathroom, bedroom, cellar, attic, hall, office, classroom, garage, library",
    "illness": "flu, cancer, asthma, diabetes, malaria, measles, pneumonia, arthritis, anemia, hepatitis",
    "planet": "Mars, Venus, Jupiter, Saturn, Neptune, Earth, Uranus",
    "language": "English, French, Spanish, German, Latin, Arabic, Greek, Portuguese, Hindi, Dutch",
    "subject": "history, biology, chemistry, physics, geography, algebra, geometry, grammar, economics, philosophy",
}.items()}
CATEGORY_NAMES = tuple(CATEGORIES)
CHOICES = (
    "Which of these is {a}: {things}?", "Find the {c} among these: {things}.", "Pick the {c}: {things}.",
    "Only one of these is {a}. Which one? {things}", "Here are four words: {things}. Which one is {a}?",
    "I am looking for {a}. Is it {things}?")
CHOSEN = (
    "the {c} here is {thing}", "of these, {thing} is the {c}", "the right {c} must be {thing}",
    "{thing} is the only {c}", "the answer is {thing}, which is the {c}")
REMAINING = (
    "the word {thing} stands for {a}", "you would call {thing} {a}", "{a} is what {thing} is",
    "among them, {a} would be {thing}")

NOUNS = tuple(noun for category in ("animal", "bird", "tool", "instrument", "vehicle", "garment", "fruit")
              for noun in CATEGORIES[category] if noun[0] not in "aeiou")   # so that "a" fits before each
WORD_REQUESTS = (
    "Write something with the word {w} in it.", "Use the word {w} in a short text.", "Put the word {w} into a text.",
    "Let a {w} appear in a short story.", "Two sentences with the word {w}, please.",
    "Make up a line in which a {w} occurs.", "Begin a small story with a {w}.", "Show me how to use the word {w}.",
    "I need an example with the word {w}.", "Write a short scene. There should be a {w} in it.",
    "Give me a text that mentions a {w}.", "Please write about a {w} you saw.")
SCENES = (
    "we found the {} behind the old barn", "a {} was standing near the gate", "my uncle sold his {} last spring",
    "nobody had seen the {} since Friday", "the children talked about the {} all day", "she drew a {} on the wall",
    "an old {} was left in the rain", "the {} reminded him of his youth", "there was no {} in the whole town",
    "he dreamed of a {} every night", "the neighbours complained about the {} again", "they took the {} to the market",
    "a {} appeared on the front page", "the story of the {} made us laugh", "her first {} came from her aunt",
    "someone had hidden the {} under a blanket", "the guide pointed at the {} and smiled",
    "you could hear the {} from the street", "we paid too much for that {}", "the {} was gone when we returned",
    "a picture of a {} hung over the desk", "the mayor gave a {} to the winner", "two men carried the {} up the hill",
    "in the morning the {} looked different", "our teacher told us about her {}", "they wrote a song about the {}",
    "the small {} belonged to the captain", "it was the biggest {} in the valley",
    "the thief wanted nothing but the {}", "the {} lay beside the road for weeks")

# A topic a line, every topic on two lines: its name, then things to say about it.
TOPICS = """
bees: bees live in a hive with one queen; a bee carries pollen between flowers; honey is made from nectar
bees: worker bees guard the nest; bees sting when the hive is in danger; a hive goes quiet in winter
horses: horses sleep standing up; a young horse is called a foal; horses eat grass and hay
horses: a rider needs a saddle and reins; a horse can gallop for miles; hooves are trimmed every few weeks
cats: cats sleep most of the day; a cat purrs when it is calm; kittens open their eyes after a week
cats: whiskers help a cat in the dark; cats hunt mice and small birds; a cat keeps its own fur clean
dogs: dogs have a very good nose; a dog wags its tail when happy; puppies need training and patience
dogs: dogs were bred from wolves; a walk every day keeps a dog fit; some dogs herd sheep or guard homes
wolves: wolves hunt together in a pack; a wolf howls to call the others; the pack raises the cubs together
wolves: wolves live in forests and cold plains; a wolf can smell prey far away; dogs descend from the wolf
sharks: sharks breathe through gills; a shark grows new teeth all its life; sharks can smell blood in water
sharks: the skeleton of a shark is soft; most sharks never bite people; fins keep the shark level in the sea
whales: whales breathe air at the surface; a whale feeds its calf with milk; whales sing to each other
whales: the blue whale is the largest animal; whales swim to warm seas to breed; thick fat keeps a whale warm
birds: birds have feathers and hollow bones; a bird builds a nest for its eggs; many birds fly south in winter
birds: chicks break out of the shell; birds sing to keep rivals away; a beak shows what a bird eats
penguins: penguins cannot fly but swim well; a penguin keeps its egg on its feet; penguins eat fish and krill
penguins: most penguins live on cold coasts; penguins huddle to stay warm; black and white feathers hide them
elephants: an elephant drinks with its trunk; elephants live in herds led by a cow; tusks are made of ivory
elephants: big ears keep an elephant cool; elephants remember places for years; a calf stays close to its mother
snakes: snakes swallow their prey whole; a snake smells with its tongue; some snakes have deadly venom
snakes: a snake sheds its skin as it grows; snakes warm up in the sun; most snakes lay eggs in warm soil
spiders: spiders have eight legs; a spider spins silk for its web; flies are caught in the sticky threads
spiders: spiders feel the web shake; few spiders are dangerous to people; young spiders drift on long threads
frogs: frogs begin life as tadpoles; a frog catches insects with its tongue; frogs lay eggs in ponds
frogs: the skin of a frog must stay wet; frogs call loudly on spring nights; long legs let a frog jump far
cows: cows give milk twice a day; a cow chews grass again and again; calves are born in spring
cows: cows have four parts in the stomach; a herd of cows needs wide fields; butter comes from the milk of cows
sheep: sheep are kept for wool and meat; a dog helps to herd the sheep; lambs are born in early spring
sheep: sheep are shorn once a year; a ram has curled horns; sheep follow each other around the field
chickens: chickens lay eggs most days; a rooster crows at sunrise; chickens scratch the ground for food
chickens: hens sleep on a high perch; foxes like to steal chickens; chicks follow the mother hen
ants: ants live in large colonies; an ant can lift many times its weight; ants leave a trail to the food
ants: the queen ant lays all the eggs; worker ants dig tunnels in the soil; soldier ants defend the nest
butterflies: a butterfly starts as a caterpillar; butterflies drink nectar from flowers; wings have tiny scales
butterflies: the caterpillar eats leaves; some butterflies fly across countries; a butterfly tastes with its feet
bread: bread is made of flour, water and yeast; the dough has to rise in a warm place; knead bread by hand
bread: bread is baked in a hot oven; a good loaf has a crisp crust; stale bread makes fine toast
cheese: cheese is made from milk; rennet turns the milk into curds; hard cheese ages for months
cheese: blue cheese contains a mould; cheese melts well on pizza; goat cheese has a sharp taste
soup: soup begins with a good stock; fry the onions before adding broth; simmer the soup over low heat
soup: beans or noodles make soup filling; salt the soup at the very end; a warm bowl of soup is good for a cold
rice: rice grows in flooded fields; rinse the rice before cooking; rice needs twice as much water
rice: brown rice keeps its outer layer; fried rice uses cooked grains; let the rice rest under the lid
pasta: pasta is cooked in salted water; fresh pasta is made with eggs; save some pasta water for the sauce
pasta: drain the pasta when it is firm; tomato sauce goes with most pasta; thin noodles cook in minutes
pizza: pizza dough needs flour and yeast; spread tomato sauce over the pizza; mozzarella goes on top of the sauce
pizza: a pizza bakes best in a very hot oven; the crust should be crisp; slice the pizza while it is hot
chocolate: chocolate comes from cocoa beans; dark chocolate has little sugar; chocolate melts near body heat
chocolate: milk chocolate tastes sweet and soft; roast the cocoa before grinding; dogs must not eat chocolate
coffee: coffee is brewed from roasted beans; coffee contains caffeine; a dark roast makes coffee bitter
coffee: grind the beans just before brewing; espresso is a small strong coffee; late coffee can spoil your sleep
tea: tea leaves are dried and rolled; green tea needs cooler water; black tea is strong and often has milk
tea: steep the tea for a few minutes; tea has less caffeine than coffee; pour tea from a warm pot
eggs: boil eggs for eight minutes; fresh eggs sink in cold water; beat the eggs with a fork
eggs: fry eggs in a little butter; egg whites turn firm when whipped; the yolk of an egg holds the fat
potatoes: potatoes grow under the ground; boil potatoes until they are soft; mash the potatoes with butter
potatoes: store potatoes in a dark place; green potatoes are not safe to eat; fried potatoes need hot oil
apples: apples grow on trees in cool lands; pick apples in the autumn; an apple has seeds in its core
apples: apple pie needs sugar and cinnamon; apples keep for months in a cellar; cider is pressed from apples
salad: wash the lettuce for the salad; dress the salad with oil and vinegar; toss the leaves just before serving
salad: nuts make a salad crunchy; add tomatoes and cucumber to the salad; cold chicken goes well in a salad
sugar: sugar comes from cane or beets; too much sugar harms your teeth; sugar gives quick energy
sugar: brown sugar holds some syrup; sugar melts into caramel; many sweet drinks are full of sugar
salt: salt brings out the taste of food; salt is taken from the sea or from mines; ice melts under salt
salt: meat is kept longer with salt; too much salt raises blood pressure; a pinch of salt helps sweet dishes
sleep: adults need about eight hours of sleep; dreams come in light sleep; a dark room helps you sleep
sleep: screens at night delay sleep; the brain sorts memories during sleep; go to bed at the same hour
dreams: dreams come while we sleep; a bad dream can wake you; most dreams are soon forgotten
dreams: write down your dreams in the morning; some people fly in their dreams; babies seem to dream a lot
memory: memory fades with age; sleep makes memory stronger; repeat a word to keep it in memory
memory: smells can wake an old memory; lists help a weak memory; the brain holds long memory in many parts
exercise: exercise makes the heart stronger; warm up before hard exercise; muscles grow after training and rest
exercise: a daily walk is good exercise; stretch when the exercise is over; running is a cheap form of exercise
diabetes: diabetes means too much sugar in the blood; insulin lowers blood sugar; patients test their blood daily
diabetes: diet and weight matter in diabetes; diabetes can harm the eyes and feet; some patients inject insulin
asthma: asthma makes it hard to breathe; an inhaler opens the airways; dust and smoke can trigger asthma
asthma: the airways swell during an attack; many children have asthma; a doctor tests how well you breathe out
headaches: stress is a cause of headaches; drink water if you have a headache; rest your eyes in a dark room
headaches: a migraine is a severe headache; a pill can relieve the pain; see a doctor if headaches come often
doctors: doctors treat sick people; a doctor studies for many years; patients tell the doctor where it hurts
doctors: a doctor listens to your heart; doctors write down the right medicine; nurses work beside doctors
vaccines: vaccines train the immune system; a vaccine is often given by injection; a sore arm is common after it
vaccines: vaccines prevent many infections; babies get their first vaccines early; some vaccines need a second dose
teeth: brush your teeth twice a day; a dentist checks teeth for decay; children lose their baby teeth
teeth: floss cleans between the teeth; sugar feeds the bacteria in the mouth; gums hold the teeth in place
skin: skin is the largest organ of the body; the sun can burn your skin; sweat cools the skin
skin: dry skin needs a cream; a rash can itch for days; a cut in the skin heals within a week
the heart: the heart pumps blood through the body; a heart attack needs help at once; smoking harms the heart
the heart: the heart has four chambers; valves keep the blood moving one way; exercise slows the resting heart
lungs: lungs take oxygen from the air; smoke damages the lungs; each lung is filled with tiny sacs
lungs: an infection of the lungs causes cough; the right lung is a bit larger; deep breaths fill the lungs
bones: bones hold up the body; calcium keeps bones hard; a broken bone needs a cast
bones: marrow inside bones makes blood; old people have weaker bones; joints connect one bone to another
allergies: allergies come from the immune system; pollen is a cause of allergies; sneezing and itching are signs
allergies: some people have food allergies; peanuts can cause a bad reaction; tests show what you are allergic to
the flu: the flu is caused by a virus; fever and aches are signs of flu; a flu shot is offered each autumn
the flu: stay in bed when you have the flu; the virus spreads by coughs; older people suffer most from flu
stress: long stress wears out the body; talk to a friend about your stress; slow breathing calms you down
stress: deadlines at work cause stress; stress can keep you awake at night; a walk outside lowers stress
vitamins: vitamins are found in fresh food; vitamin C is in oranges; sunlight helps to make vitamin D
vitamins: too few vitamins make people ill; pills can add missing vitamins; carrots are rich in vitamin A
babies: babies cry when they are hungry; a baby sleeps many hours a day; milk is all a newborn needs
babies: babies learn to crawl before walking; change the diaper of a baby often; a baby smiles at its mother
Canada: Canada has two official languages; Ottawa is the capital of Canada; winters in Canada are long and cold
Canada: Canada lies north of the United States; maple syrup comes from Canada; huge forests cover the north
Japan: Japan is a chain of islands; Tokyo is the capital of Japan; fast trains link the cities of Japan
Japan: earthquakes are common in Japan; people in Japan eat much fish and rice; Japan has an emperor
Brazil: Brazil is the largest country in South America; people in Brazil speak Portuguese; football is loved there
Brazil: the Amazon flows through Brazil; Brazil exports coffee and sugar; carnival fills the streets of Rio
Egypt: the Nile runs through Egypt; Egypt has pyramids near Cairo; most of Egypt is desert
Egypt: pharaohs ruled ancient Egypt; the Suez canal lies in Egypt; Arabic is spoken across Egypt
India: India has more than a billion people; Hindi and English are used in India; monsoon rains reach India in June
India: New Delhi is the capital of India; many people in India eat rice and lentils; tigers live in forests there
France: Paris is the capital of France; France is known for wine and cheese; the Alps lie in the east of France
France: the king of France lost his head; French trains are very fast; millions of tourists visit France
Italy: Rome is the capital of Italy; Italy is shaped like a boot; Italian food includes pasta and pizza
Italy: the Romans ruled from Italy; Venice is built on water; a volcano stands near Naples in Italy
Rome: Rome was ruled by emperors; Roman roads led to Rome; Caesar was killed in Rome by senators
Rome: Latin was spoken in ancient Rome; the army of Rome was feared; slaves did the hard work in Rome
China: China built the Great Wall; Beijing is the capital of China; tea was first grown in China
China: China makes goods for the whole world; pandas live in the bamboo forests; Chinese is written with signs
Mexico: Mexico lies south of the United States; people in Mexico speak Spanish; corn is the basis of tacos
Mexico: the Aztecs once ruled Mexico; Mexico City lies very high; beaches in Mexico draw many tourists
Australia: Australia is both a country and a continent; kangaroos live in Australia; a desert fills its middle
Australia: Sydney has a famous opera house; Australia lies between two oceans; coral reefs line the coast
Russia: Russia is the largest country by area; Moscow is the capital of Russia; Russia reaches from Europe to Asia
Russia: Russia was once ruled by tsars; winters in Siberia are bitter; oil and gas are sold by Russia
deserts: deserts get very little rain; a desert can be cold at night; cactus plants store water
deserts: camels carry goods across deserts; sand dunes move with the wind; few people live in the desert
mountains: mountains rise where plates collide; the air is thin on high mountains; snow covers the peak all year
mountains: climbers carry ropes up the mountain; rivers begin high in the mountains; a valley lies between slopes
rivers: rivers carry water to the sea; a river floods after heavy rain; boats carry goods along rivers
rivers: a dam holds back the river; fish swim up the river to breed; many old towns stand on rivers
oceans: oceans cover most of the earth; the ocean is salty and deep; tides rise and fall twice a day
oceans: ocean currents move warm water; ships cross the ocean with cargo; plastic waste drifts in the oceans
islands: islands have water on every side; some islands were made by volcanoes; ferries link islands to the coast
islands: rare animals live on remote islands; a small island is called an islet; palm trees line the beach
forests: forests give shelter to many animals; trees in the forest clean the air; fires can destroy a forest
forests: mushrooms grow on the forest floor; loggers cut trees for timber; rain forests are warm and wet
volcanoes: volcanoes throw out hot lava; ash from a volcano darkens the sky; an eruption can bury a town
volcanoes: lava cools into dark rock; soil near volcanoes is rich; some volcanoes sleep for centuries
earthquakes: earthquakes shake the ground; plates slip along a fault; strong earthquakes make buildings fall
earthquakes: a quake at sea can raise a huge wave; go under a table in an earthquake; small shocks follow later
storms: storms bring wind and heavy rain; thunder follows the flash of lightning; a storm can tear off roofs
storms: dark clouds warn of a storm; sailors fear storms at sea; stay indoors until the storm is over
fire: fire needs fuel and air; smoke from a fire is deadly; fire spreads quickly in dry grass
fire: a blanket can smother a fire; people cooked over fire long ago; call for help when a fire starts
snow: snow falls when the air is very cold; each flake of snow has six arms; children build a snowman
snow: ploughs clear snow from the roads; skiers love deep snow; snow melts in spring and fills rivers
rain: rain falls from heavy clouds; crops need rain to grow; an umbrella keeps off the rain
rain: a rainbow may follow the rain; too much rain causes floods; rain fills the lakes and wells
water: water boils at a hundred degrees; water freezes into ice; clean water is needed for life
water: rain brings fresh water; most of the body is water; a filter makes water safe to drink
the climate: climate is the weather over many years; gases from fuel warm the climate; ice melts as the climate warms
the climate: a warmer climate lifts the sea; farmers feel a change of climate first; nations sign climate treaties
the sun: the sun is a star made of gas; light from the sun takes minutes to arrive; planets circle the sun
the sun: the sun gives us light and heat; never look straight at the sun; plants grow toward the sun
the moon: the moon circles the earth in a month; the moon pulls on the tides; a full moon lights the night
the moon: men first walked on the moon in 1969; the moon has craters and dust; no air surrounds the moon
Mars: Mars is called the red planet; rovers explore the dust of Mars; a day on Mars is much like ours
Mars: Mars has two small moons; there is ice at the poles of Mars; a trip to Mars takes many months
stars: stars are huge balls of hot gas; a star shines by nuclear fusion; stars are born in clouds of dust
stars: the nearest star is our sun; stars form shapes in the night sky; big stars explode at the end
rockets: rockets burn fuel to leave the earth; a rocket drops its empty stages; satellites ride on rockets
rockets: hot gas pushes the rocket up; rockets launch near the sea; a crew sits at the top of the rocket
satellites: satellites orbit the earth; weather satellites watch the clouds; phones use satellites to find the way
satellites: solar panels power a satellite; old satellites burn up in the air; a dish receives the signal
gravity: gravity pulls things to the ground; gravity keeps planets in orbit; an apple falls because of gravity
gravity: gravity is weaker on the moon; heavy bodies have more gravity; Newton wrote a law of gravity
atoms: atoms are the parts of all matter; an atom has electrons and a nucleus; atoms join into molecules
atoms: protons carry a positive charge; splitting an atom frees energy; gold has the same atoms throughout
electricity: electricity flows through copper wires; a battery stores electricity; a shock can be deadly
electricity: power plants make electricity; a switch opens the circuit; lamps turn electricity into light
magnets: magnets attract iron and steel; every magnet has two poles; like poles push each other away
magnets: a compass needle is a magnet; motors contain strong magnets; heat can weaken a magnet
light: light travels faster than sound; a prism splits light into colours; a mirror reflects light
light: a lens bends the light; shadows form where light is blocked; plants use light to make sugar
sound: sound travels as waves in the air; sound cannot cross empty space; loud sound hurts the ears
sound: an echo is sound coming back; sound moves faster in water; a drum makes a low sound
evolution: evolution works over many generations; Darwin wrote about evolution; fossils are signs of evolution
evolution: animals adapt to where they live; genes change by chance in evolution; the fittest leave more young
dinosaurs: dinosaurs died out long ago; some dinosaurs were as tall as houses; fossils show us their bones
dinosaurs: birds descend from small dinosaurs; many dinosaurs ate only plants; a great rock from space hit the earth
plants: plants make food from sunlight; roots take water from the soil; plants give off oxygen
plants: leaves of plants contain green pigment; seeds grow into new plants; insects carry the pollen of plants
trees: trees grow a new ring each year; the bark protects the tree; leaves fall from trees in autumn
trees: tall trees give cool shade; wood from trees is used for houses; an old oak tree may live for centuries
gardens: gardens need water and sunshine; pull the weeds in your garden; compost makes the soil rich
gardens: plant the seeds of a garden in spring; snails eat leaves in the garden; a hedge keeps the wind out
roses: roses have thorns on the stem; prune the roses in late winter; red roses stand for love
roses: a rose smells sweet in summer; perfume is made from rose petals; roses like sun and rich soil
Python: Python is a popular programming language; Python code is indented in blocks; a list holds many values
Python: functions in Python start with def; Python is used for data and scripts; pip installs Python packages
Rust: Rust is a fast programming language; the Rust compiler checks ownership; each value in Rust has one owner
Rust: borrowed references keep Rust safe; cargo builds a Rust project; errors in Rust are values to match
websites: websites are written in HTML and CSS; a browser shows the website; a server sends each page
websites: good websites load quickly; links lead from one page to another; a website should work on phones
databases: databases store data in tables; a query asks the database for rows; an index makes search faster
databases: each row in a database has a key; back up the database every night; SQL is the language of databases
algorithms: an algorithm is a list of steps; sorting is a task for algorithms; a fast algorithm saves time
algorithms: binary search is a quick algorithm; some algorithms call themselves; test an algorithm on edge cases
passwords: passwords should be long; never share a password with anyone; use a new password for each account
passwords: a manager remembers your passwords; thieves guess a weak password; add a code sent to your phone
email: email arrives within seconds; write a clear subject in your email; spam fills many email accounts
email: attach the file to the email; do not click links from unknown senders; reply to the email politely
phones: phones send calls by radio; charge your phone at night; a phone takes pictures and video
phones: apps are installed on a phone; a cracked screen is common on phones; mute your phone in a meeting
computers: computers follow a program; the memory of a computer stores data; a fast processor runs the code
computers: save files on the disk of a computer; computers get hot and need a fan; type on the keyboard
robots: robots build cars in factories; a robot follows its program; sensors tell a robot where it is
robots: robots can clean the floor at home; an arm with motors moves the parts; some robots explore Mars
cameras: cameras catch light through a lens; hold the camera steady; a longer exposure blurs motion
cameras: a film camera needs no battery; zoom brings the camera closer; photos are stored on a card
cars: cars burn petrol or use batteries; check the brakes of your car; wear a belt in the car
cars: an engine turns the wheels of a car; change the oil in a car each year; old cars pollute the air
bicycles: bicycles have two wheels; put oil on the chain of a bicycle; pump up the tyres before you ride
bicycles: a helmet protects the rider; gears help a bicycle climb hills; lock your bicycle in the city
trains: trains run on steel rails; a train stops at each station; buy a ticket before the train leaves
trains: freight trains carry coal and grain; a driver sits at the front of the train; fast trains need straight track
planes: planes fly on the lift of their wings; jet engines push the plane; pilots land the plane on a runway
planes: fasten your belt on a plane; planes cruise above the clouds; a flight crosses the ocean in hours
ships: ships carry cargo across the sea; a ship floats because it pushes water aside; the captain commands
ships: an anchor holds the ship in place; sailors work on ships for months; a harbour shelters ships
bridges: bridges carry roads over rivers; a bridge must bear wind and weight; cables hold up a long bridge
bridges: arches made old bridges strong; engineers inspect the bridge; some bridges open for tall ships
houses: houses need a solid roof; bricks or wood form the walls of a house; paint the house every ten years
houses: windows let light into the house; a deep base keeps the house firm; rent is paid for a house each month
kitchens: kitchens need good light; keep the knives of the kitchen sharp; a stove is the heart of a kitchen
kitchens: clean the kitchen after cooking; pots hang near the kitchen stove; a fridge keeps food cold
money: money is used to pay for goods; banks lend money at interest; save some money each month
money: coins were the first money; prices rise when there is too much money; spend less money than you earn
taxes: taxes pay for roads and schools; the state collects taxes each year; keep receipts for your taxes
taxes: rich people pay more taxes; an income tax is taken from wages; late taxes bring a fine
banks: banks keep your savings safe; a bank lends to firms and families; interest is what the bank pays
banks: open an account at a bank; a bank can fail when loans go bad; cards from the bank need a code
budgets: a budget lists income and costs; put rent first in your budget; review the budget each month
budgets: small savings help the budget; debts can ruin any budget; a family budget needs honest numbers
stocks: stocks are shares in a company; stocks rise and fall each day; a dividend is paid on some stocks
stocks: spread your money over many stocks; brokers buy and sell stocks; stocks are risky in the short run
jobs: write a clear letter for the job; ask about pay before taking a job; a job interview needs practice
jobs: some jobs can be done from home; skills matter more than luck in jobs; unions protect people in their jobs
meetings: meetings need an agenda; start the meeting on time; invite few people to a meeting
meetings: write notes during the meeting; end with clear tasks for everyone; long meetings tire the team
teachers: teachers plan their lessons; a good teacher listens to pupils; exams are marked by the teacher
teachers: teachers explain hard ideas simply; a teacher keeps order in class; homework is set by teachers
lawyers: lawyers speak for clients in court; a lawyer reads contracts with care; the judge hears both lawyers
lawyers: lawyers charge by the hour; a will is written by a lawyer; evidence helps the lawyer win a case
farmers: farmers grow crops in their fields; a farmer rises before the sun; tractors help the farmer plough
farmers: farmers watch the weather closely; cattle are fed by the farmer; the harvest decides what farmers earn
the police: police keep the streets safe; a police officer can arrest thieves; call the police in an emergency
the police: police look for evidence after a crime; dogs help the police find drugs; police patrol in cars
courts: courts settle disputes by law; a judge leads the court; a jury sits in some courts
courts: witnesses swear to tell the court the truth; you may appeal to a higher court; lawyers argue in court
elections: elections choose a government; voters mark a ballot in elections; votes are counted in the night
elections: candidates give speeches before elections; a party may lose an election; polls try to guess the winner
democracy: democracy lets the people decide; free elections are the core of democracy; a free press guards it
democracy: a parliament speaks in a democracy; rights protect people in a democracy; Athens had an early democracy
newspapers: newspapers print the news daily; a reporter writes for the newspaper; an editor checks each story
newspapers: headlines sell newspapers; many people read newspapers online; adverts pay for the newspaper
schools: schools teach reading and maths; a school day starts early; pupils eat lunch at school
schools: the bell rings at school each hour; schools close in the summer; parents meet the teachers at school
libraries: libraries lend books for free; keep quiet in the library; a card lets you borrow from libraries
libraries: shelves in a library are sorted; librarians help you find a book; return library books on time
books: books are bound between covers; an author writes the book; a chapter is a part of a book
books: read books to learn new words; old books smell of paper; a publisher prints and sells books
poems: poems often rhyme at the end; a poem paints with few words; each line of a poem has a rhythm
poems: love is a theme of many poems; read the poem aloud twice; poets write poems in verses
stories: stories need a hero and a problem; a good story has a turning point; tell stories at bedtime
stories: the plot of a story builds up slowly; a villain makes the story tense; old stories teach a lesson
history: history tells what people did; dates help to order history; kings and wars fill old history books
history: letters are a source for history; history is written by the winners; learn from the mistakes of history
wars: wars destroy towns and lives; soldiers fight in wars; a treaty ends the war
wars: refugees flee from war; generals plan the battles of a war; some wars start over land or oil
castles: castles had thick stone walls; a moat protected the castle; knights lived in the castle
castles: a drawbridge led into the castle; kings built castles on hills; towers let guards of a castle see far
mathematics: mathematics is about numbers and shapes; a proof is needed in mathematics; algebra uses letters
mathematics: mathematics is used in physics; practice helps with mathematics; an equation has two equal sides
fractions: fractions are parts of a whole; the lower number of a fraction divides; half is a simple fraction
fractions: add fractions with equal bottoms; a cake cut in four shows fractions; a fraction can be a decimal
triangles: triangles have three sides; the angles of a triangle add up to 180; a right triangle has one square corner
triangles: all sides may be equal in a triangle; triangles make roofs stiff; half base times height is the area
probability: probability lies between zero and one; a coin has an even probability; dice are used to teach probability
probability: add the probability of separate events; rare events have low probability; insurers rely on probability
music: music has rhythm and melody; a choir makes music with voices; sad music uses minor chords
music: notes are written down in music; people dance to music; practice daily to play music well
guitars: guitars have six strings; tune the guitar before playing; chords are played on the guitar
guitars: an electric guitar needs an amplifier; change old guitar strings; the wood shapes the sound of a guitar
pianos: pianos have black and white keys; hammers strike the strings in a piano; a pedal holds the notes
pianos: a grand piano fills the hall; piano lessons start with scales; a piano must be tuned each year
films: films are shown on a big screen; a director leads the film; actors learn their lines for a film
films: music makes a film more moving; critics write about new films; the first films had no sound
paintings: paintings hang in a museum; oil paint dries slowly on a painting; a frame protects the painting
paintings: artists sign their paintings; light can fade an old painting; a portrait is a painting of a person
museums: museums show old objects; a guide leads visitors through the museum; paintings hang in many museums
museums: do not touch things in a museum; tickets to museums are cheap; school classes visit the museum
football: football is played by two teams; a football match lasts ninety minutes; the keeper guards the goal
football: kick the ball in football; fans sing at football games; a referee shows the red card
chess: chess is played on a board of squares; the queen is the strongest in chess; a pawn moves one step
chess: checkmate ends the game of chess; good chess players think ahead; a clock is used in chess matches
tennis: tennis is played with a racket; a tennis court has a net; players serve the ball in turn
tennis: tennis matches are won in sets; grass makes tennis fast; a ball out of the line is lost
swimming: swimming trains the whole body; swimming pools smell of chlorine; wear goggles when swimming
swimming: children should learn swimming early; never go swimming alone in the sea; breathe out under the water
running: running needs good shoes; start running slowly and short; a marathon is a running race of 42 kilometres
running: running makes the legs strong; rest a day after hard running; drink water during a long run
camping: camping means sleeping in a tent; bring a warm bag for camping; cook over a fire when camping
camping: put out the fire at the camp; camping is fun in dry weather; mosquitoes are a pest when camping
fishing: fishing needs a rod and a line; patience matters most in fishing; worms are used as bait
fishing: get a licence before fishing; go fishing early in the morning; nets catch more fish than hooks
weddings: weddings join two people; rings are exchanged at a wedding; the bride wears a white dress
weddings: guests bring gifts to the wedding; a cake is cut at the wedding; weddings can cost a lot of money
holidays: holidays are days without work; pack your bags for the holiday; many families spend holidays at the beach
holidays: book hotels before the holiday; bank holidays close the shops; send a card from your holidays
hotels: hotels rent rooms by the night; hotel guests leave the key at the desk; breakfast is served in the hotel
hotels: a hotel near the station is handy; maids clean the hotel rooms; good hotels are full in summer
clothes: clothes keep the body warm; wash dark clothes in cold water; cotton clothes are cool in summer
clothes: iron the clothes while damp; tailors sew clothes by hand; children grow out of their clothes
shoes: shoes protect the feet; leather shoes need polish; tie the laces of your shoes
shoes: buy shoes late in the day; wet shoes dry with newspaper inside; high heels make shoes uncomfortable
soap: soap is made from fat and lye; wash your hands with soap; soap removes grease and germs
soap: soap makes bubbles in water; a bar of soap lasts for weeks; soap stings when it gets in the eyes
glass: glass is made from melted sand; glass breaks into sharp pieces; windows are made of glass
glass: old glass can be melted again; a worker blows glass into bottles; thick glass stops noise
gold: gold is a soft yellow metal; miners dig for gold in the ground; rings are made of gold
gold: gold does not rust; banks keep bars of gold; the gold rush drew people west
iron: iron rusts in wet air; steel is made from iron; iron is melted in a furnace
iron: magnets pull on iron; blood contains some iron; smiths hammer hot iron into tools
oil: oil is pumped from deep wells; petrol is made from oil; spilled oil kills sea birds
oil: oil floats on top of water; ships bring oil across the sea; the price of oil moves the economy
coal: coal was formed from old plants; miners dig coal under the ground; burning coal pollutes the air
coal: coal drove the steam engines; power plants burn coal; black dust from coal harms the lungs
paper: paper is made from wood; recycle your old paper; paper was invented in China
paper: ink dries quickly on paper; fold the paper into a plane; thick paper is called card
insurance: insurance pays when things go wrong; you pay a premium for insurance; car insurance is required by law
insurance: read the terms of the insurance; health insurance covers doctor bills; insurers check each claim
recycling: recycling turns waste into new goods; sort glass and paper for recycling; bins for recycling have colours
recycling: recycling saves energy; dirty plastic spoils recycling; metal cans are worth recycling
traffic: traffic is heavy in the morning; lights control the traffic; buses reduce traffic in the city
traffic: accidents slow down traffic; noise from traffic disturbs sleep; leave early to avoid the traffic
cities: cities grow as people seek work; rent is high in big cities; trains and buses cross the city
cities: parks give cities some green; cities have theatres and shops; the air in cities is often dirty
villages: villages have few people; everyone knows each other in a village; a church stands in the village
villages: young people leave the village for work; fields surround most villages; the village shop sells bread
friends: friends listen to each other; a good friend keeps secrets; make friends through a hobby
friends: old friends share memories; be honest with your friends; friends help when life is hard
family: a family shares a home; family meals bring people together; grandparents tell the family stories
family: brothers and sisters fight in any family; holidays are spent with the family; children carry the family name
habits: habits form by doing things again; start a new habit with a small step; bad habits are hard to break
habits: link a habit to a fixed time; reward yourself for good habits; write down your habits each day
languages: languages have words and grammar; children learn languages with ease; some languages are dying out
languages: speak a language every day to learn it; English borrowed from other languages; signs can form a language
"""
FACTS: dict[str, list[str]] = {}
for _line in TOPICS.strip().split("\n"):
    _topic, _said = _line.split(": ")
    FACTS.setdefault(_topic, []).extend(_said.split("; "))
TOPIC_NAMES = tuple(FACTS)

if __name__ == "__main__":
    sys.exit(main())
