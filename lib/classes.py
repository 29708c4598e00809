"""Class sets: class names in index order. The class set is a property of the data."""

import re

IGNORE_INDEX = 255
MAX_CLASSES = IGNORE_INDEX  # labels are uint8, and 255 is the ignore index

NYUV2_13 = (
    "bed", "books", "ceiling", "chair", "floor", "furniture", "objects",
    "picture", "sofa", "table", "tv", "wall", "window",
)  # fmt: skip

# spelt as published by Gupta, Arbelaez and Malik, CVPR 2013
NYUV2_40 = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture",
    "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes",
    "ceiling", "books", "refridgerator", "television", "paper", "towel", "shower curtain", "box",
    "whiteboard", "person", "night stand", "toilet", "sink", "lamp", "bathtub", "bag", "otherstructure",
    "otherfurniture", "otherprop",
)  # fmt: skip


def check_same_classes(
    classes: tuple[str, ...], others: tuple[str, ...], whose: str, whose_others: str
) -> None:
    """Raise a ValueError if two class sets differ.

    The message contains the first class that differs or, for sets of different length, both lengths and last
    classes. `whose` and `whose_others` denote the owners of the sets, such as "the network" and "the data".
    """
    if tuple(classes) == tuple(others):  # either may be a list
        return
    if len(classes) != len(others):
        summary, other_summary = (f"{len(names)} (the last is {names[-1]!r})" for names in (classes, others))
    else:
        index = next(
            index for index, pair in enumerate(zip(classes, others, strict=True)) if pair[0] != pair[1]
        )
        summary, other_summary = (f"{names[index]!r} as class {index}" for names in (classes, others))
    raise ValueError(
        f"classes: {whose} has {summary}, {whose_others} has {other_summary}; use what has the same classes"
    )


def escape_html(text: str) -> str:
    """Escape HTML tags in untrusted text, such as names of classes, runs or images."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def escape_markdown(text: str) -> str:
    """Escape HTML tags in Markdown with untrusted text.

    `&` is kept in code spans, which show `&amp;` as it is. `<` is escaped even there, because backticks in a
    name can end a code span.
    """
    return re.sub("`[^`\n]+`", lambda code: code[0].replace("&amp;", "&"), escape_html(text))
