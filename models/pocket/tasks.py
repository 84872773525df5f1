"""The pocket model's tasks: a generator of prompts with one right answer each.

Standard library only.  Every task is a function from a random source to a
prompt and its canonical answer.  Prompts come in a few phrasings; the answer
never depends on the phrasing.

The held-out split is by content, not by wording: the numbers, the quoted
words or the story's subject of a prompt decide on which side it falls, in
whatever order and phrasing they stand.  So if "What is 23 + 45?" is held out,
then so is "Add 45 and 23.", and training sees neither.
"""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from .stories import HEROES, PLACES, tell

_HELD_OUT_SHARE = 16  # one prompt content in so many is held out
_VOWELS = "aeiou"
_CONSONANTS = "bcdfghjklmnpqrstvwxyz"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"

REAL_WORDS: tuple[str, ...] = tuple(
    """apple banana cherry orange lemon grape melon peach berry strawberry carrot potato tomato
    onion pepper bread butter cheese honey sugar coffee water river ocean mountain valley forest
    desert island bridge castle tower village garden window kitchen table chair lantern candle
    mirror basket bottle ladder hammer needle button blanket pillow letter paper pencil book
    library school teacher student doctor farmer sailor painter baker singer king queen prince
    dragon wizard giant monster pirate rabbit turtle monkey tiger lion elephant giraffe kangaroo
    dolphin whale shark eagle parrot penguin spider butterfly cricket summer winter spring autumn
    morning evening midnight thunder lightning rainbow snowflake cloud storm sunshine planet comet
    rocket engine train bicycle airplane computer keyboard network server memory program token
    loom weave thread cotton silver golden purple yellow green happy little hello world
    mississippi bookkeeper committee balloon coffee pepper assess level radar bubble""".split()
)

# Each hero and place is in one of these stories, so each of their words is too.
_STORY_WORDS = {
    word
    for hero, place in zip(HEROES, PLACES, strict=True)
    for word in re.findall("[A-Za-z]+", tell(hero.name, place.name))
}
_KNOWN_WORDS = tuple(sorted({*REAL_WORDS, *_STORY_WORDS}))
_SUMS = (
    "What is {a} + {b}?",
    "What is {a}+{b}?",
    "What is {a} plus {b}?",
    "Calculate {a} + {b}.",
    "Add {a} and {b}.",
    "{a} + {b} =",
    "{a} + {b}",
    "{a}+{b}",
)
_DIFFERENCES = (
    "What is {a} - {b}?",
    "What is {a}-{b}?",
    "What is {a} minus {b}?",
    "Calculate {a} - {b}.",
    "Subtract {b} from {a}.",
    "{a} - {b} =",
    "{a} - {b}",
    "{a}-{b}",
)
_COLORS = ("red", "blue", "green", "yellow", "black", "white", "purple", "orange", "grey", "pink")
_FOODS = ("bread", "honey", "soup", "rice", "plums", "cheese", "apples", "nuts", "cake", "fish")


@dataclass(frozen=True, slots=True)
class Example:
    """One exchange: what the user writes and the only right reply."""

    task: str
    prompt: str
    answer: str


def _pick(rng: random.Random, items: tuple[str, ...] | str) -> str:
    return items[int(rng.random() * len(items))]


def _between(rng: random.Random, low: int, high: int) -> int:
    """Uniform over low..high, both ends included (faster than randint)."""
    return low + int(rng.random() * (high - low + 1))


def made_up_word(rng: random.Random, low: int, high: int) -> str:
    """A word of low..high lower-case letters, most often one that can be spoken."""
    length = _between(rng, low, high)
    if rng.random() < 0.25:
        # Any letters at all, from a small set at times so that letters repeat.
        letters = _LETTERS if rng.random() < 0.5 else rng.sample(_LETTERS, 4)
        return "".join(letters[int(rng.random() * len(letters))] for _ in range(length))
    out: list[str] = []
    vowel = rng.random() < 0.35
    while len(out) < length:
        out.append(_pick(rng, _VOWELS if vowel else _CONSONANTS))
        # Double vowels and clusters of consonants are rarer than plain changes.
        vowel = not vowel if rng.random() < 0.85 else vowel
    return "".join(out)


def _word(rng: random.Random, low: int, high: int) -> str:
    if rng.random() < 0.15:
        word = _pick(rng, REAL_WORDS)
        if low <= len(word) <= high:
            return word
    return made_up_word(rng, low, high)


def _number(rng: random.Random, digits: int) -> int:
    return _between(rng, 10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


def _addition(digits: int) -> Callable[[random.Random], tuple[str, str]]:
    """Sums of two numbers of so many digits; 0 stands for one to three, mixed."""

    def make(rng: random.Random) -> tuple[str, str]:
        a = _number(rng, digits or _between(rng, 1, 3))
        b = _number(rng, digits or _between(rng, 1, 3))
        return _pick(rng, _SUMS).format(a=a, b=b), str(a + b)

    return make


def _subtraction(digits: int) -> Callable[[random.Random], tuple[str, str]]:
    """Differences, as for _addition; the result is negative as often as not."""

    def make(rng: random.Random) -> tuple[str, str]:
        a = _number(rng, digits or _between(rng, 1, 3))
        b = _number(rng, digits or _between(rng, 1, 3))
        return _pick(rng, _DIFFERENCES).format(a=a, b=b), str(a - b)

    return make


def _sorting(rng: random.Random) -> tuple[str, str]:
    """Two to seven numbers into ascending order; duplicates stay.

    Most lists hold numbers from 0 to 99, one in five from 0 to 999.
    """
    limit = 99 if rng.random() < 0.8 else 999
    numbers = [_between(rng, 0, limit) for _ in range(_between(rng, 2, 7))]
    listed = ", ".join(map(str, numbers))
    kind = _between(rng, 0, 3)
    if kind == 0:
        prompt = f"Sort these numbers: {listed}"
    elif kind == 1:
        prompt = f"Sort {listed} from smallest to largest."
    elif kind == 2:
        prompt = f"Put these numbers in order: {listed}."
    else:
        prompt = f"Sort: {' '.join(map(str, numbers))}"
    return prompt, ", ".join(map(str, sorted(numbers)))


def _copying(rng: random.Random) -> tuple[str, str]:
    """One to six words, a sentence of real ones, digits, or words and numbers mixed."""
    shape = rng.random()
    if shape < 0.55:
        parts = [_word(rng, 2, 9) for _ in range(_between(rng, 1, 6))]
        if rng.random() < 0.1:
            parts = [part.capitalize() for part in parts]
    elif shape < 0.7:
        parts = [_pick(rng, _KNOWN_WORDS) for _ in range(_between(rng, 2, 9))]
        if rng.random() < 0.5:
            parts = [parts[0].capitalize(), *parts[1:-1], parts[-1] + "."]
    elif shape < 0.85:
        parts = [str(_between(rng, 0, 9)) for _ in range(_between(rng, 2, 10))]
    else:
        parts = [
            _word(rng, 2, 6) if rng.random() < 0.5 else str(_between(rng, 0, 99))
            for _ in range(_between(rng, 2, 6))
        ]
    text = " ".join(parts)
    kind = _between(rng, 0, 3)
    if kind == 0:
        prompt = f'Copy this: "{text}"'
    elif kind == 1:
        prompt = f'Repeat exactly: "{text}"'
    elif kind == 2:
        prompt = f'Say "{text}" again.'
    else:
        prompt = f'Repeat after me: "{text}"'
    return prompt, text


def _reversing(rng: random.Random) -> tuple[str, str]:
    """One word of two to ten letters, written backwards."""
    word = _word(rng, 2, 10)
    kind = _between(rng, 0, 3)
    if kind == 0:
        prompt = f'Reverse the word "{word}".'
    elif kind == 1:
        prompt = f'Write "{word}" backwards.'
    elif kind == 2:
        prompt = f'Spell "{word}" backwards.'
    else:
        prompt = f'What is "{word}" in reverse?'
    return prompt, word[::-1]


def _counting(rng: random.Random) -> tuple[str, str]:
    """How many letters a word has, or how often one letter is in it."""
    word = _word(rng, 2, 12)
    kind = _between(rng, 0, 4)
    if kind == 0:
        return f'How many letters are in "{word}"?', str(len(word))
    if kind == 1:
        return f'Count the letters in "{word}".', str(len(word))
    letter = _pick(rng, word) if rng.random() < 0.8 else _pick(rng, _LETTERS)
    if kind == 2:
        return f'How many times is "{letter}" in "{word}"?', str(word.count(letter))
    if kind == 3:
        return f'Count the letter "{letter}" in "{word}".', str(word.count(letter))
    return f'How often does "{letter}" appear in "{word}"?', str(word.count(letter))


def _keys(rng: random.Random, count: int) -> list[str]:
    """Distinct words; in one table of four all are capitalized, like names."""
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[_word(rng, 3, 7)] = None
    return [key.capitalize() for key in keys] if rng.random() < 0.25 else list(keys)


def _rows(rng: random.Random) -> int:
    draw = rng.random()
    if draw < 0.85:
        return _between(rng, 3, 8)
    return _between(rng, 9, 16) if draw < 0.97 else _between(rng, 17, 40)


def _lookup(rng: random.Random) -> tuple[str, str]:
    """A question about one row of a made-up table given in the prompt.

    Most tables have three to eight rows, some up to sixteen, a few up to forty.
    """
    rows = _rows(rng)
    keys = _keys(rng, rows)
    asked = int(rng.random() * rows)
    kind = _between(rng, 0, 4)
    if kind == 0:
        values = [str(_between(rng, 0, 99)) for _ in keys]
        table = "\n".join(f'"{key}" = {value}' for key, value in zip(keys, values, strict=True))
        return f'Table:\n{table}\nWhat is the value of "{keys[asked]}"?', values[asked]
    if kind == 1:
        values = [str(_between(rng, 0, 99)) for _ in keys]
        table = ", ".join(f'"{key}": {value}' for key, value in zip(keys, values, strict=True))
        return f'Prices: {table}. How much is "{keys[asked]}"?', values[asked]
    if kind == 2:
        values = [_pick(rng, _COLORS) for _ in keys]
        facts = " ".join(f'"{key}" is {value}.' for key, value in zip(keys, values, strict=True))
        return f'{facts} What color is "{keys[asked]}"?', values[asked]
    if kind == 3:
        values = [_pick(rng, _FOODS) for _ in keys]
        facts = " ".join(f'"{key}" likes {value}.' for key, value in zip(keys, values, strict=True))
        return f'{facts} What does "{keys[asked]}" like?', values[asked]
    values = _keys(rng, rows)
    facts = " ".join(
        f'"{key}" lives in "{value}".' for key, value in zip(keys, values, strict=True)
    )
    return f'{facts} Where does "{keys[asked]}" live?', values[asked]


def _stories(rng: random.Random) -> tuple[str, str]:
    """A story from its hero and its place; see stories.py."""
    hero = HEROES[int(rng.random() * len(HEROES))].name
    place = PLACES[int(rng.random() * len(PLACES))].name
    kind = _between(rng, 0, 3)
    if kind == 0:
        prompt = f"Tell a story about {hero} and the {place}."
    elif kind == 1:
        prompt = f"Tell me a short story about {hero} and the {place}."
    elif kind == 2:
        prompt = f"Write a story about {hero} and the {place}."
    else:
        prompt = f"Please tell a story about {hero} and the {place}."
    return prompt, tell(hero, place)


_MAKERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "addition": _addition(0),
    "addition2": _addition(2),
    "addition3": _addition(3),
    "subtraction": _subtraction(0),
    "subtraction2": _subtraction(2),
    "subtraction3": _subtraction(3),
    "sorting": _sorting,
    "copying": _copying,
    "reversing": _reversing,
    "counting": _counting,
    "lookup": _lookup,
    "stories": _stories,
}

TASKS: tuple[str, ...] = tuple(_MAKERS)
"""All task names.

``addition2`` and ``subtraction2`` have two numbers of exactly two digits,
``addition3`` and ``subtraction3`` of exactly three; ``addition`` and
``subtraction`` mix one to three digits.  Differences may be negative.
"""

_CONTENT = re.compile(r'\d+|"[^"]*"|about [^.?!]+')


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the held-out side; a pure function of its content."""
    content = "|".join(sorted(_CONTENT.findall(prompt))) or prompt
    digest = hashlib.blake2b(content.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % _HELD_OUT_SHARE == 0


def sample(task: str, rng: random.Random) -> Example:
    """Draw one example of a task, from either side of the split.

    Raises KeyError for an unknown task.
    """
    prompt, answer = _MAKERS[task](rng)
    return Example(task, prompt, answer)


def training(task: str, rng: random.Random) -> Example:
    """Draw one example that is not held out."""
    while True:
        example = sample(task, rng)
        if not is_held_out(example.prompt):
            return example


def held_out(task: str, count: int, seed: int = 0) -> list[Example]:
    """Return count held-out examples with distinct prompts, the same for the same seed.

    Raises ValueError where the task has too few distinct held-out prompts.
    """
    rng = random.Random(f"{task}/{seed}")
    found: dict[str, Example] = {}
    for _ in range(2000 * count):
        if len(found) == count:
            break
        example = sample(task, rng)
        if is_held_out(example.prompt):
            found.setdefault(example.prompt, example)
    if len(found) < count:
        raise ValueError(f"only {len(found)} distinct held-out prompts of {task} were found")
    return list(found.values())
