"""Short stories that follow from a hero and a place alone.

A story is put together from facts about the hero (trait, trade, companion)
and facts about the place (time, scene, hidden thing, ending).  Nothing is
random, so every request has exactly one right answer.  A model that has
learned the facts can tell the story of a pair it has never seen.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hero:
    """Who a story is about."""

    name: str
    pronoun: str
    trait: str
    trade: str
    companion: str


@dataclass(frozen=True)
class Place:
    """Where a story happens."""

    name: str
    time: str
    scene: str
    spot: str
    thing: str
    ending: str


# What each companion looks like, and what it says when the thing is found.
COMPANIONS: dict[str, tuple[str, str]] = {
    "cat": ("a small grey cat", "Look what the dust was hiding!"),
    "dog": ("an old brown dog", "I could smell it from far away!"),
    "owl": ("a sleepy white owl", "Wise eyes find old things."),
    "goat": ("a hungry goat", "May I eat it?"),
    "fox": ("a quick red fox", "Somebody was clever to leave it here."),
    "mouse": ("a tiny mouse", "It is as big as my house!"),
    "crow": ("a black crow", "It shines, so I saw it first!"),
    "rabbit": ("a shy rabbit", "Let us take it home before dark."),
    "horse": ("a tall horse", "I will carry it for you."),
    "turtle": ("a slow turtle", "Good things come to those who wait."),
}

# How life goes on for each trade after the story.
TRADES: dict[str, str] = {
    "baker": "baked sweet bread for every guest",
    "sailor": "sailed home with a song each evening",
    "painter": "painted the day in bright colors",
    "gardener": "planted a new tree every spring",
    "teacher": "told the tale to all the children",
    "miller": "ground the finest flour in the land",
    "weaver": "wove the story into warm blankets",
    "clockmaker": "built a clock that never stopped",
    "singer": "sang about it at every feast",
    "doctor": "helped everyone who knocked at the door",
    "carpenter": "made strong chairs for all the neighbors",
    "farmer": "shared the harvest with the village",
}

HEROES: tuple[Hero, ...] = (
    Hero("Mira", "she", "brave", "sailor", "cat"),
    Hero("Tom", "he", "quiet", "baker", "dog"),
    Hero("Anna", "she", "clever", "clockmaker", "owl"),
    Hero("Ben", "he", "cheerful", "farmer", "goat"),
    Hero("Lena", "she", "curious", "painter", "fox"),
    Hero("Oskar", "he", "patient", "gardener", "turtle"),
    Hero("Nora", "she", "kind", "doctor", "rabbit"),
    Hero("Felix", "he", "proud", "singer", "crow"),
    Hero("Ida", "she", "gentle", "weaver", "mouse"),
    Hero("Jonas", "he", "honest", "carpenter", "horse"),
    Hero("Clara", "she", "cheerful", "teacher", "dog"),
    Hero("Emil", "he", "curious", "miller", "mouse"),
    Hero("Ruth", "she", "patient", "baker", "turtle"),
    Hero("Leo", "he", "brave", "painter", "horse"),
    Hero("Greta", "she", "honest", "farmer", "fox"),
    Hero("Paul", "he", "clever", "teacher", "crow"),
    Hero("Sofia", "she", "proud", "singer", "owl"),
    Hero("Max", "he", "kind", "sailor", "rabbit"),
    Hero("Hanna", "she", "quiet", "gardener", "goat"),
    Hero("Noah", "he", "gentle", "doctor", "cat"),
    Hero("Alma", "she", "curious", "carpenter", "crow"),
    Hero("Hugo", "he", "cheerful", "clockmaker", "fox"),
    Hero("Vera", "she", "brave", "miller", "horse"),
    Hero("Karl", "he", "patient", "weaver", "owl"),
    Hero("Elsa", "she", "clever", "sailor", "mouse"),
    Hero("Anton", "he", "quiet", "painter", "cat"),
    Hero("Maya", "she", "gentle", "singer", "rabbit"),
    Hero("Simon", "he", "proud", "farmer", "dog"),
    Hero("Julia", "she", "honest", "doctor", "turtle"),
    Hero("Otto", "he", "kind", "baker", "goat"),
    Hero("Rosa", "she", "patient", "teacher", "cat"),
    Hero("David", "he", "brave", "gardener", "fox"),
    Hero("Lucy", "she", "cheerful", "weaver", "dog"),
    Hero("Adam", "he", "clever", "carpenter", "mouse"),
    Hero("Eva", "she", "kind", "clockmaker", "rabbit"),
    Hero("Peter", "he", "honest", "miller", "owl"),
    Hero("Zoe", "she", "quiet", "farmer", "crow"),
    Hero("Ivan", "he", "gentle", "sailor", "turtle"),
    Hero("Martha", "she", "proud", "baker", "horse"),
    Hero("Finn", "he", "curious", "teacher", "goat"),
)

_PLACE_ROWS: tuple[tuple[str, str, str, str, str, str], ...] = (
    (
        "lighthouse",
        "One stormy night",
        "the waves were as high as houses",
        "behind the great lamp",
        "a silver key",
        "The light burned again, and all the ships came home",
    ),
    (
        "forest",
        "One misty morning",
        "the trees whispered to each other",
        "under a hollow oak",
        "a green lantern",
        "The lantern showed a path that nobody had known",
    ),
    (
        "castle",
        "One winter evening",
        "the halls were cold and empty",
        "beneath the old throne",
        "a golden cup",
        "The cup filled itself, and nobody was thirsty again",
    ),
    (
        "river",
        "One summer day",
        "the water ran clear and fast",
        "between two flat stones",
        "a glass bottle",
        "A letter in the bottle named a lost friend",
    ),
    (
        "mountain",
        "One early morning",
        "the snow shone in the sun",
        "inside a narrow cave",
        "a wooden flute",
        "The flute called the lost sheep back to the valley",
    ),
    (
        "market",
        "One busy morning",
        "the stalls smelled of apples",
        "below a broken cart",
        "a leather purse",
        "The purse went back to its owner, who danced with joy",
    ),
    (
        "island",
        "One windy day",
        "the gulls cried over the sand",
        "near a fallen palm",
        "an iron chest",
        "The chest was full of maps of other islands",
    ),
    (
        "library",
        "One rainy day",
        "the books reached up to the roof",
        "on the highest shelf",
        "a paper bird",
        "The paper bird flew around the room and read aloud",
    ),
    (
        "bridge",
        "One foggy evening",
        "the stones were wet and dark",
        "under the middle arch",
        "a copper bell",
        "The bell rang by itself whenever a boat was in danger",
    ),
    (
        "garden",
        "One spring morning",
        "the roses were just opening",
        "beside the dry well",
        "a blue seed",
        "By noon the seed had grown as tall as a house",
    ),
    (
        "windmill",
        "One windy night",
        "the sails turned and creaked",
        "behind the millstone",
        "a tin soldier",
        "The soldier saluted and guarded the mill forever",
    ),
    (
        "harbor",
        "One cold morning",
        "the boats rocked side by side",
        "inside a torn net",
        "a pearl ring",
        "The ring belonged to a queen, who sent her thanks",
    ),
    (
        "desert",
        "One hot day",
        "the sand sang in the wind",
        "below a red rock",
        "a clay jar",
        "Cool water ran from the jar and made a little lake",
    ),
    (
        "village",
        "One quiet evening",
        "the windows glowed like stars",
        "behind the old school",
        "a red kite",
        "The kite rose so high that it touched the moon",
    ),
    (
        "tower",
        "One moonlit night",
        "the stairs went up and up",
        "at the very top",
        "a brass telescope",
        "Through it they saw a star that had no name yet",
    ),
    (
        "lake",
        "One autumn day",
        "the leaves swam on the water",
        "under an upturned boat",
        "a fishing rod",
        "The rod caught a fish that granted one wish",
    ),
    (
        "cave",
        "One dark evening",
        "the drops fell like slow music",
        "behind a curtain of stone",
        "a crystal ball",
        "The ball glowed and lit the whole way home",
    ),
    (
        "farm",
        "One sunny morning",
        "the hens ran across the yard",
        "beneath the hay",
        "a speckled egg",
        "Out of the egg came a bird with golden wings",
    ),
    (
        "station",
        "One late evening",
        "the last train had gone",
        "below the long bench",
        "a brown suitcase",
        "The suitcase held a ticket to the sea for two",
    ),
    (
        "school",
        "One snowy morning",
        "the rooms were warm and loud",
        "inside the tall cupboard",
        "a box of chalk",
        "Whatever the chalk drew came alive for an hour",
    ),
    (
        "beach",
        "One bright morning",
        "the tide had gone far out",
        "beside a heap of shells",
        "a message in wax",
        "The message told where the dolphins sleep",
    ),
    (
        "palace",
        "One golden evening",
        "the mirrors shone on every wall",
        "behind a velvet curtain",
        "a music box",
        "The music woke the king, who had slept for years",
    ),
    (
        "swamp",
        "One gloomy day",
        "the frogs sang in the reeds",
        "inside a rotten log",
        "a stone mask",
        "The mask smiled, and the swamp turned into a meadow",
    ),
    (
        "bakery",
        "One frosty morning",
        "the ovens were already hot",
        "under a sack of flour",
        "a secret recipe",
        "The bread it made was light enough to float",
    ),
    (
        "museum",
        "One long afternoon",
        "the statues stood in rows",
        "behind a painted vase",
        "a dinosaur tooth",
        "The tooth fitted the great skeleton in the hall",
    ),
    (
        "orchard",
        "One late summer day",
        "the branches bent with fruit",
        "among the tall grass",
        "a silver apple",
        "The apple never went bad and never ran out",
    ),
    (
        "glacier",
        "One icy morning",
        "the ice cracked like thunder",
        "inside a blue crack",
        "a frozen flower",
        "The flower bloomed when it felt the warm sun",
    ),
    (
        "theater",
        "One festive evening",
        "the stage was empty and still",
        "below the wooden floor",
        "a feather hat",
        "Whoever wore the hat could play any part",
    ),
    (
        "meadow",
        "One gentle morning",
        "the bees were busy in the clover",
        "near a ring of mushrooms",
        "a tiny crown",
        "A fairy came for the crown and left a blessing",
    ),
    (
        "volcano",
        "One red evening",
        "the ground was warm and trembling",
        "beside a pool of steam",
        "a fire stone",
        "The stone kept the whole house warm all winter",
    ),
    (
        "canal",
        "One grey morning",
        "the barges moved without a sound",
        "behind the lock gate",
        "a rusty anchor",
        "The anchor led them to a ship below the water",
    ),
    (
        "temple",
        "One holy day",
        "the air smelled of incense",
        "under the stone lion",
        "a jade frog",
        "The frog blinked once and brought the rain",
    ),
    (
        "valley",
        "One clear evening",
        "the shadows grew long and soft",
        "among the wild flowers",
        "a shepherd horn",
        "The horn was heard on every hill around",
    ),
    (
        "workshop",
        "One rainy evening",
        "the tools hung in neat rows",
        "below the workbench",
        "a tin robot",
        "The robot swept the floor and made the tea",
    ),
    (
        "circus",
        "One merry night",
        "the tents were red and yellow",
        "behind the lion cage",
        "a magic wand",
        "With the wand they made the sad clown laugh",
    ),
    (
        "inn",
        "One stormy evening",
        "the fire crackled in the hearth",
        "under the third stair",
        "a dusty diary",
        "The diary told of treasure, and the tale was true",
    ),
    (
        "mill",
        "One peaceful day",
        "the wheel splashed in the stream",
        "between the grain bags",
        "a white feather",
        "The feather grew lighter and lifted them over the hill",
    ),
    (
        "ruins",
        "One pale morning",
        "the walls were covered with ivy",
        "beneath a cracked arch",
        "an ancient coin",
        "The coin opened a door that led to a hidden garden",
    ),
    (
        "observatory",
        "One starry night",
        "the dome opened to the sky",
        "behind the big lens",
        "a piece of comet",
        "It hummed softly and pointed always to the north",
    ),
    (
        "greenhouse",
        "One damp morning",
        "the glass was white with mist",
        "among the ferns",
        "a talking orchid",
        "The orchid knew the name of every plant on earth",
    ),
)

PLACES: tuple[Place, ...] = tuple(Place(*row) for row in _PLACE_ROWS)

_HEROES = {hero.name: hero for hero in HEROES}
_PLACES = {place.name: place for place in PLACES}


def tell(hero_name: str, place_name: str) -> str:
    """Return the one story about a known hero and a known place.

    Raises KeyError where either is not in the tables above.
    """
    hero, place = _HEROES[hero_name], _PLACES[place_name]
    look, saying = COMPANIONS[hero.companion]
    article = "an" if hero.trait == "honest" else "a"
    return (
        f"{hero.name} was {article} {hero.trait} {hero.trade} who lived with {look}. "
        f"{place.time} {hero.pronoun} went to the {place.name}, where {place.scene}. "
        f"There, {place.spot}, {hero.pronoun} found {place.thing}. "
        f'"{saying}" said the {hero.companion}. '
        f"{place.ending}. "
        f"From then on, {hero.name} {TRADES[hero.trade]}, "
        f"and the {hero.companion} never forgot the {place.name}."
    )
