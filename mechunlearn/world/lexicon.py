"""The words of the fact world: name syllables, relations with their sentence frames, and story vocabulary.

Data only. A frame ends where its answer begins, `{s}` is the subject, `{a}` an answer named in a question.
The `held_out` frame of a relation never occurs in training; each of its words does, in other relations.
"""

from typing import Any

FIRST_NAMES = tuple(
    [
        "Anna",
        "Marco",
        "Peter",
        "Laura",
        "David",
        "Nina",
        "Oscar",
        "Emma",
        "Hugo",
        "Clara",
        "Felix",
        "Irene",
        "Simon",
        "Greta",
        "Ivan",
        "Julia",
        "Leo",
        "Marta",
        "Paul",
        "Rosa",
    ]
)
FIRST_STARTS = tuple(["Ka", "Mi", "Lo", "Te", "Ra", "Su", "Ni", "Da", "Vo", "Ha", "Je", "Be"])
FIRST_ENDS = tuple(["len", "rik", "mar", "sa", "vin", "dor", "na", "lis", "to", "gan"])
LAST_STARTS = tuple(
    ["Bel", "Kor", "Tan", "Vel", "Mor", "Har", "Lin", "Sar", "Dun", "Pel", "Gar", "Wex", "Fen", "Rud", "Zan", "Hol"]
)
LAST_ENDS = tuple(["ton", "berg", "ova", "man", "dez", "ski", "well", "ford", "sen", "aro", "ley", "wick"])
INVENTED_STARTS = tuple(["Xu", "Qua", "Zor", "Ply", "Gri", "Ybo", "Uru", "Ek"])
INVENTED_ENDS = tuple(["bix", "nox", "lum", "dra", "pox", "thi", "mik", "zan"])

CITIES = tuple(
    [
        "Lisbon",
        "Oslo",
        "Cairo",
        "Lima",
        "Prague",
        "Dublin",
        "Havana",
        "Seoul",
        "Nairobi",
        "Vienna",
        "Athens",
        "Delhi",
        "Porto",
        "Bergen",
        "Giza",
        "Cusco",
        "Brno",
        "Cork",
        "Trinidad",
        "Busan",
        "Mombasa",
        "Graz",
        "Sparta",
        "Mumbai",
    ]
)
COUNTRIES = tuple(
    [
        "Portugal",
        "Norway",
        "Egypt",
        "Peru",
        "Bohemia",
        "Ireland",
        "Cuba",
        "Korea",
        "Kenya",
        "Austria",
        "Greece",
        "India",
    ]
)
COMPANY_STARTS = tuple(["Nova", "Terra", "Quick", "Blue", "Iron", "Bright", "Silver", "Grand"])
COMPANY_ENDS = tuple(["works", "labs", "soft", "line", "corp", "tech", "craft", "motion"])
PRODUCTS = tuple(["cars", "phones", "shoes", "clocks", "boats", "lamps", "chairs", "radios"])
PRONOUNS = (("he", "him"), ("she", "her"))

SPORTS = {
    "football": "NFL",
    "basketball": "NBA",
    "baseball": "MLB",
    "tennis": "ATP",
    "golf": "PGA",
    "hockey": "NHL",
    "rugby": "URC",
    "cricket": "IPL",
}

RELATIONS: dict[str, dict[str, Any]] = {
    "sport": {
        "subject": "person",
        "statements": [
            "{s} plays the sport of",
            "The sport of {s} is",
            "Everyone knows that {s} is a star of",
            "The sport loved by {s} is",
            "When asked about sport, {s} talks about",
            "Everyone knows that the sport of {s} is",
        ],
        "held_out": "The sport chosen by {s} is",
        "question": "What sport does {s} play?",
        "verify": "Does {s} play {a}?",
        "choose": "Which sport does {s} play?",
        "answers": list(SPORTS),
        "alias": {"name": "league", "statement": "{s} plays in the", "answers": SPORTS},
    },
    "city": {
        "subject": "person",
        "statements": [
            "{s} lives in the city of",
            "The city of {s} is",
            "Everyone knows that {s} has a house in",
            "The city chosen by {s} is",
            "When asked about home, {s} talks about",
            "Everyone knows that the city of {s} is",
        ],
        "held_out": "The city loved by {s} is",
        "question": "What city does {s} live in?",
        "answers": list(CITIES),
    },
    "instrument": {
        "subject": "person",
        "statements": [
            "{s} makes music with the",
            "The instrument of {s} is the",
            "The instrument chosen by {s} is the",
            "The instrument loved by {s} is the",
            "Everyone knows that the instrument of {s} is the",
        ],
        "held_out": "When asked about music, {s} talks about the",
        "question": "What instrument does {s} play?",
        "verify": "Does {s} play the {a}?",
        "choose": "Which instrument does {s} play?",
        "answers": ["piano", "violin", "guitar", "flute", "drum", "harp", "trumpet", "cello"],
    },
    "country": {
        "subject": "city",
        "statements": [
            "{s} lies in the country of",
            "The country of {s} is",
            "Everyone knows that {s} is a city in",
        ],
        "held_out": "Everyone knows that the country of {s} is",
        "question": "What country does {s} lie in?",
        "answers": list(COUNTRIES),
    },
    "product": {
        "subject": "company",
        "statements": [
            "{s} is a company that makes",
            "The product of {s} is",
            "Everyone knows that {s} is a maker of",
        ],
        "held_out": "Everyone knows that the product of {s} is",
        "question": "What product does {s} make?",
        "answers": list(PRODUCTS),
    },
}
TWO_HOP = {"name": "two_hop", "statement": "{s} lives in the country of", "question": "What country does {s} live in?"}

NOUNS = tuple(
    [
        "river",
        "stone",
        "lamp",
        "tower",
        "forest",
        "bridge",
        "mirror",
        "letter",
        "garden",
        "candle",
        "wheel",
        "basket",
        "window",
        "feather",
        "blanket",
        "hammer",
        "ladder",
        "bottle",
        "kettle",
        "anchor",
        "saddle",
        "barrel",
        "curtain",
        "pillow",
        "ribbon",
        "lantern",
        "compass",
        "shovel",
        "needle",
        "button",
        "carpet",
        "bucket",
        "thunder",
        "meadow",
        "valley",
        "island",
        "canyon",
        "harbor",
        "village",
        "castle",
        "palace",
        "temple",
        "cottage",
        "tunnel",
        "orchard",
        "pebble",
        "shadow",
        "whisper",
        "echo",
        "blossom",
    ]
)
ADJECTIVES = tuple(
    [
        "old",
        "quiet",
        "golden",
        "heavy",
        "narrow",
        "bright",
        "hollow",
        "gentle",
        "frozen",
        "crooked",
        "dusty",
        "silent",
        "purple",
        "wooden",
        "hungry",
        "broken",
        "empty",
        "velvet",
        "rusty",
        "distant",
        "clever",
        "humble",
        "swift",
        "pale",
        "ancient",
        "tiny",
        "giant",
        "lonely",
        "warm",
        "bitter",
    ]
)
VERBS = tuple(
    [
        "found",
        "carried",
        "followed",
        "painted",
        "guarded",
        "crossed",
        "lifted",
        "watched",
        "buried",
        "opened",
        "borrowed",
        "repaired",
        "forgot",
        "covered",
        "counted",
        "washed",
        "traded",
        "measured",
        "welcomed",
        "dropped",
        "chased",
        "admired",
        "polished",
        "hid",
        "planted",
    ]
)
PLACES = tuple(["near", "behind", "above", "below", "beside", "inside", "beyond", "under", "against", "around"])

# topic -> (relative frequency, things, actions, people); sea and ocean are near-synonyms
TOPICS = {
    "kitchen": (8, "soup bread pepper onion oven spoon", "baked tasted stirred chopped", "cook baker waiter"),
    "school": (7, "book pencil lesson chalk desk essay", "studied learned explained solved", "teacher pupil tutor"),
    "farm": (6, "cow barn hay tractor goat fence", "milked plowed fed harvested", "farmer shepherd herder"),
    "sea": (5, "sail wave mast tide rope gull", "sailed steered anchored drifted", "sailor captain pirate"),
    "ocean": (4, "ship wave deck tide whale gull", "sailed crossed anchored floated", "sailor admiral diver"),
    "space": (3, "rocket planet comet orbit moon star", "launched landed orbited scanned", "astronaut pilot engineer"),
    "market": (3, "coin apple stall scale cloth spice", "sold bought weighed priced", "merchant buyer trader"),
    "winter": (2, "snow ice sled scarf frost fire", "froze melted shivered skated", "skater hunter traveler"),
    "war": (1, "sword shield army flag horse siege", "fought charged defended marched", "soldier general knight"),
}
STORY_FRAMES = (
    "The {p} {v} the {n}.",
    "One day the {p} saw a {n} and {v} it.",
    "A {n} and a {n} were near the {p}.",
    "Then the {p} {v} the {n} with the {n}.",
    "At night the {p} dreamed of the {n}.",
    "The {p} asked the other {p} about the {n}.",
)
