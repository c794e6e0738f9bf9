"""Plain-English captions of scenes: varied words, order and omissions, and filler words that mean nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from distriray.landscapes.scene import ATTRIBUTES, Scene

Labels = dict[str, str]
"""What a caption says: attribute names to values, without those that it leaves open."""

Told = Callable[[str], bool]
Say = Callable[[tuple[str, ...]], str]

OPENINGS = (
    "",
    "",
    "",
    "a landscape",
    "a painting of",
    "a picture of",
    "a view of",
    "a scene with",
    "an illustration of",
)
TIME = {
    "day": (
        "in daylight",
        "at midday",
        "during the day",
        "on a sunny day",
        "daytime",
        "at noon",
        "under a blue sky",
    ),
    "dawn": (
        "at dawn",
        "at sunrise",
        "early in the morning",
        "daybreak",
        "in pink morning light",
        "at first light",
    ),
    "sunset": (
        "at sunset",
        "at dusk",
        "in the evening",
        "under an orange sky",
        "sunset",
        "in the golden evening glow",
    ),
    "night": (
        "at night",
        "by night",
        "in the dark of night",
        "night time",
        "at midnight",
        "under a dark night sky",
    ),
}
BODY_NAMES = {
    "night": ("moon", "full moon", "bright moon", "pale moon"),
    None: ("sun", "bright sun", "glowing sun"),
}
SIDE = {
    "left": ("on the left", "to the left", "at the left side", "left"),
    "centre": ("in the middle", "in the centre", "in the center", "central"),
    "right": ("on the right", "to the right", "at the right side", "right"),
}
HEIGHT = {
    "low": ("low", "low over the horizon", "near the horizon", "setting low", "just above the horizon"),
    "high": ("high", "high up", "high in the sky", "high above", "up high"),
}
MOUNTAINS = {
    "none": ("no mountains", "a flat horizon", "an open horizon", "without mountains", "a wide flat land"),
    "hills": ("rolling hills", "gentle hills", "soft hills", "hills", "low rounded hills"),
    "rocky": (
        "rocky mountains",
        "bare mountains",
        "jagged rocky peaks",
        "grey rocky mountains",
        "rugged cliffs",
    ),
    "snowy": (
        "snowy mountains",
        "snow-capped peaks",
        "mountains with snow",
        "snow covered mountains",
        "white peaks",
    ),
}
GROUND = {
    "meadow": ("a meadow", "a grassy field", "grassland", "fields", "a wide meadow", "a plain"),
    "desert": ("a desert", "sand dunes", "a sandy desert", "dunes", "desert sand"),
    "lake": (
        "a lake",
        "a still lake",
        "a mirror lake",
        "calm water",
        "a lake reflecting the sky",
        "a quiet lake",
    ),
}
SEASON = {
    "summer": ("in summer", "summer", "green summer", "lush and green", "in the warm season"),
    "autumn": ("in autumn", "autumn", "in fall", "autumn colours", "golden autumn"),
    "winter": ("in winter", "winter", "covered in snow", "snowy ground", "a cold winter"),
}
COUNT = {
    "one": ("a lone", "one", "a single", "a solitary"),
    "few": ("a few", "some", "several", "three", "four"),
    "many": ("many", "a forest of", "lots of", "a wood of", "dozens of"),
}
KIND = {
    "pine": ("pine", "fir", "spruce", "conifer", "pine"),
    "broadleaf": ("broadleaf", "leafy", "round", "oak", "deciduous"),
}
NO_TREES = ("no trees", "treeless", "without trees", "without any trees")
CLOUDS = {
    "clear": ("a clear sky", "no clouds", "cloudless", "without clouds", "clear skies"),
    "cloudy": ("clouds", "a cloudy sky", "drifting clouds", "some clouds", "cloudy"),
}
STARS = {
    "none": ("no stars", "starless", "without stars"),
    "present": ("stars", "a starry sky", "many stars", "bright stars", "twinkling stars"),
}
FILLERS = (
    "beautiful", "highly detailed", "masterpiece", "calm", "peaceful", "dreamy", "4k", "digital art",
    "serene", "atmospheric", "soft light", "wallpaper", "trending", "minimalist", "scenic", "lovely",
    "epic", "quiet mood",
)  # fmt: skip


def caption(scene: Scene, rng: np.random.Generator, keep: float = 0.8) -> tuple[str, Labels]:
    """A caption of the scene and what it says; each attribute is mentioned with probability `keep`."""

    def say(options: tuple[str, ...]) -> str:
        return str(rng.choice(options))

    def told(name: str) -> bool:
        if getattr(scene, name) is None or rng.random() > keep:
            return False
        said[name] = getattr(scene, name)
        return True

    said: Labels = {}
    parts = [say(TIME[scene.time])] if told("time") else []
    for name, table in (("mountains", MOUNTAINS), ("ground", GROUND), ("season", SEASON), ("clouds", CLOUDS)):
        if told(name):
            parts.append(say(table[getattr(scene, name)]))
    if scene.stars is not None and told("stars"):
        said["time"] = "night"
        parts.append(say(STARS[scene.stars]))
    parts += _body(scene, said, told, say) + _trees(scene, said, told, say)
    return _join(parts, rng), said


def _body(scene: Scene, said: Labels, told: Told, say: Say) -> list[str]:
    name = "moon" if scene.time == "night" else "sun"
    if not told("body"):
        return []
    if scene.body == "none":
        return [say((f"no {name}", f"without {name}", f"without a {name}", f"no {name} in the sky"))]
    if scene.time == "night":
        said["time"] = "night"
    words = [
        say(("the", "a")),
        say(BODY_NAMES["night" if name == "moon" else None]),
    ]
    places = [
        say(table[getattr(scene, key)]) for key, table in (("height", HEIGHT), ("side", SIDE)) if told(key)
    ]
    if len(places) == 2 and say(("swap", "keep")) == "swap":
        places.reverse()
    return [" ".join(words + places)]


def _trees(scene: Scene, said: Labels, told: Told, say: Say) -> list[str]:
    if not told("trees"):
        return []
    if scene.trees == "none":
        return [say(NO_TREES)]
    kind = say(KIND[scene.tree_kind or "pine"]) + " " if told("tree_kind") else ""
    return [f"{say(COUNT[scene.trees])} {kind}{'tree' if scene.trees == 'one' else 'trees'}"]


def _join(parts: list[str], rng: np.random.Generator) -> str:
    """The parts in any order, with an opening, fillers and at times a word that nobody knows."""
    parts = [parts[index] for index in rng.permutation(len(parts))]
    if rng.random() < 0.3:
        parts.insert(int(rng.integers(0, len(parts) + 1)), str(rng.choice(FILLERS)))
    if rng.random() < 0.15:
        letters = rng.choice(list("abcdefghijklmnopqrstuvwxyz"), int(rng.integers(3, 9)))
        parts.insert(int(rng.integers(0, len(parts) + 1)), "".join(letters))
    links = rng.choice([", ", " and ", " with ", " "], max(0, len(parts) - 1), p=[0.6, 0.15, 0.15, 0.1])
    text = "".join(part + link for part, link in zip(parts, [*links, ""], strict=False))
    opening = str(rng.choice(OPENINGS))
    text = f"{opening} {text}".strip()
    style = rng.random()
    text = text.capitalize() if style < 0.4 else text
    return text + "." if style < 0.2 else text


def label_indices(said: Labels) -> list[int]:
    """Each attribute's value as its index, in the order of `ATTRIBUTES`; -1 where the caption is silent."""
    return [values.index(said[name]) if name in said else -1 for name, values in ATTRIBUTES.items()]
