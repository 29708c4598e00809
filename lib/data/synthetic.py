"""The built-in synthetic scenes: procedural rooms, ray-cast to RGB, depth and labels.

A room consists of boxes, so the first hit of each ray is exact. Colours overlap between classes, and
pictures, screens and windows are flat, so neither RGB nor depth is sufficient. Lengths are in metres. The x
axis points right and the y axis up, and the floor is at y = 0. A part is a box (class, centre, half size,
colour, texture). A piece of furniture consists of parts around its own origin, with the back towards -z, and
a footprint (width, depth).
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from scipy.spatial.transform import Rotation

from lib.classes import IGNORE_INDEX, NYUV2_13
from lib.data.samples import Split, resize_stack

TRAIN_COUNT, TEST_COUNT, VIEWS_PER_ROOM = 400, 100, 2
NATIVE_SIZE = (96, 128)
VIEW_DTYPE = np.dtype(
    [("image", "u1", (*NATIVE_SIZE, 3)), ("depth", "u2", NATIVE_SIZE), ("label", "u1", NATIVE_SIZE)]
)
FOCAL_RATIO = 518.9 / 640  # NYUv2's Kinect: focal length over image width
FOCAL_BASELINE = 43.5  # focal length (pixels) times baseline (metres) of the Kinect

WOOD = [(122, 84, 52), (152, 108, 68), (92, 62, 42), (186, 146, 104), (70, 46, 34)]
PALE = [(226, 221, 206), (206, 205, 200), (192, 182, 162), (232, 228, 232), (172, 186, 190)]
DARK = [(42, 42, 47), (62, 57, 52), (32, 36, 52), (84, 84, 90), (24, 22, 24)]
VIVID = [(162, 52, 46), (52, 82, 142), (62, 122, 72), (204, 164, 62), (142, 82, 132)]
MUTED = [(186, 198, 172), (172, 190, 206), (216, 192, 152), (202, 172, 162), (160, 160, 150)]
SKY = [(214, 226, 240), (236, 236, 226), (120, 150, 120), (40, 44, 60), (196, 186, 164)]

# cells per metre (across, up), ranges of brightness and hue among cells, half-width of the dark joint (cells)
TEXTURES = {
    "plain": (1.0, 1.0, 0.05, 0.0, 0.0),
    "planks": (7.0, 0.9, 0.30, 0.0, 0.05),
    "tiles": (3.0, 3.0, 0.12, 0.0, 0.04),
    "fabric": (45.0, 45.0, 0.20, 0.04, 0.0),
    "doors": (1.7, 1.1, 0.06, 0.0, 0.025),
    "spines": (28.0, 0.01, 0.40, 0.7, 0.10),
    "patches": (9.0, 7.0, 0.50, 0.6, 0.0),
    "panes": (1.6, 1.4, 0.25, 0.10, 0.06),
}


def open_synthetic(split: str, seed: int = 0) -> Split:
    """Open the images of a split, which are rendered when they are read.

    Images of the same seed and name have the same pixels. Any split other than `test` is the training split.
    """
    ids = np.arange(TEST_COUNT) + TRAIN_COUNT if split == "test" else np.arange(TRAIN_COUNT)
    rooms = ids // VIEWS_PER_ROOM
    names = np.char.mod("%06d", ids + rooms)  # leaves a gap in the ids after each room

    def read(positions: np.ndarray, size: tuple[int, int] | None) -> list[dict[str, np.ndarray]]:
        render = partial(render_scene, seed, size=NATIVE_SIZE)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            views = np.array(list(pool.map(render, ids[positions].tolist())), VIEW_DTYPE)
        return [{kind: resize_stack(views[kind], size or NATIVE_SIZE) for kind in VIEW_DTYPE.names}]

    return Split(names, NYUV2_13, read, np.char.mod("room_%04d", rooms), validation="blocks")


def render_scene(seed: int, index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Render image number `index` at `size` (height, width).

    Returns:
        `(H, W, 3)` uint8 RGB, `(H, W)` uint16 depth in mm, 0 = missing, and `(H, W)` uint8 class indices,
        255 = unlabelled.
    """
    rng = np.random.default_rng((seed, 0, index // VIEWS_PER_ROOM))
    room = rng.uniform((2.8, 2.3, 3.0), (4.8, 2.8, 5.4))
    boxes = _pack(_walls(rng, room) + _furniture(rng, room))
    rng = np.random.default_rng((seed, 1, index))
    origin, rays = _choose_view(rng, room, boxes, size)
    hit = _cast_rays(origin, rays, boxes)
    image = _expose(rng, _shade(rng, origin, rays, boxes, room, hit).reshape(*size, 3))
    label = boxes["label"][hit["box"]].reshape(size)
    depth = _measure(rng, hit["depth"].reshape(size), label, hit["cosine"].reshape(size))
    return image, depth, _annotate(rng, label, hit["box"].reshape(size))


def _pick(rng: np.random.Generator, choices):
    return choices[rng.integers(len(choices))]


def _legs(name, width, depth, height, radius, colour) -> list:
    corners = [(x * (width / 2 - radius), z * (depth / 2 - radius)) for x in (-1, 1) for z in (-1, 1)]
    return [(name, (x, height / 2, z), (radius, height / 2, radius), colour, "plain") for x, z in corners]


def _clutter(rng, width, depth, height, max_count) -> list:
    """Return up to `max_count` objects and books on a surface."""
    parts = []
    for _ in range(rng.integers(max_count + 1)):
        (x, z), half = (
            rng.uniform(-0.4, 0.4, 2) * (width, depth),
            rng.uniform((0.06, 0.07, 0.06), (0.28, 0.32, 0.2)),
        )
        class_and_texture = ("objects", _pick(rng, ("plain", "fabric", "patches")))
        if rng.random() < 0.08:
            class_and_texture = ("books", "spines")
            half = half * (0.6, 0.3, 1)
        colour = _pick(rng, VIVID + PALE + DARK + WOOD + MUTED)
        parts.append((class_and_texture[0], (x, height + half[1], z), half, colour, class_and_texture[1]))
    return parts


def _bed(rng):
    (width, height), frame = rng.uniform((1.0, 0.42), (1.9, 0.6)), _pick(rng, WOOD + PALE + DARK)
    linen, pillow = _pick(rng, PALE + VIVID + MUTED + DARK), _pick(rng, PALE + VIVID)
    return [
        ("bed", (0, 0.14, 0), (width / 2, 0.14, 1.0), frame, "plain"),
        ("bed", (0, 0.14 + height / 2, 0.02), (width / 2 - 0.03, height / 2 - 0.14, 0.97), linen, "fabric"),
        ("bed", (0, 0.5, -0.98), (width / 2, 0.5, 0.03), frame, "planks"),
        *(
            ("objects", (x * width, height + 0.07, -0.7), (width / 5, 0.08, 0.2), pillow, "fabric")
            for x in (-0.2, 0.2)
        ),
        *_clutter(rng, width, 1.2, height, 4),
    ], (width, 2.0)


def _sofa(rng):
    width, fabric = rng.uniform(1.2, 2.3), (_pick(rng, DARK + VIVID + PALE + WOOD + MUTED), "fabric")
    return [
        ("sofa", (0, 0.21, 0), (width / 2, 0.21, 0.42), *fabric),
        ("sofa", (0, 0.45, -0.34), (width / 2, 0.42, 0.1), *fabric),
        *(("sofa", (x * width, 0.31, 0), (0.09, 0.31, 0.43), *fabric) for x in (-0.5, 0.5)),
        *_clutter(rng, width * 0.8, 0.4, 0.42, 4),
    ], (width + 0.2, 0.9)


def _chair(rng):
    width, colour = rng.uniform(0.4, 0.5), _pick(rng, WOOD + DARK + VIVID + PALE)
    back = _pick(rng, ("plain", "planks", "fabric"))
    return [
        ("chair", (0, 0.45, 0), (width / 2, 0.03, width / 2), colour, "plain"),
        ("chair", (0, 0.7, -width / 2), (width / 2, 0.24, 0.025), colour, back),
        *_legs("chair", width, width, 0.42, 0.022, colour),
    ], (width, width)


def _table(rng):
    (width, depth, height), colour = (
        rng.uniform((0.9, 0.6, 0.4), (1.9, 1.0, 0.78)),
        _pick(rng, WOOD + PALE + DARK),
    )
    return [
        ("table", (0, height, 0), (width / 2, 0.04, depth / 2), colour, _pick(rng, ("plain", "planks"))),
        *_legs("table", width, depth, height, 0.04, colour),
        *_clutter(rng, width, depth, height + 0.04, 6),
    ], (width, depth)


def _cupboard(rng):
    (width, depth, height), colour = (
        rng.uniform((0.6, 0.35, 0.6), (1.8, 0.6, 2.1)),
        _pick(rng, WOOD + PALE + DARK),
    )
    parts = [("furniture", (0, height / 2, 0), (width / 2, height / 2, depth / 2), colour, "doors")]
    if height < 1 and rng.random() < 0.5:
        parts.append(("tv", (0, height + 0.35, 0), (0.5, 0.3, 0.03), _pick(rng, DARK), "plain"))
    return parts + _clutter(rng, width, depth, height, 6), (width, depth)


def _shelf(rng):
    width, height, wood = (
        rng.uniform(0.8, 1.7),
        rng.uniform(1.2, 2.1),
        (_pick(rng, WOOD + PALE + DARK), "plain"),
    )
    parts = [("furniture", (0, height / 2, -0.13), (width / 2, height / 2, 0.02), *wood)]
    parts += [("furniture", (x * width, height / 2, 0), (0.03, height / 2, 0.16), *wood) for x in (-0.5, 0.5)]
    for level in np.arange(0.05, height, 0.4):
        parts.append(("furniture", (0, level, 0), (width / 2, 0.02, 0.16), *wood))
        extent, colour = rng.uniform(0.1, 0.4) * width, _pick(rng, VIVID + PALE + WOOD + DARK)
        books = ("books", (extent - width / 2, level + 0.14, 0.02), (extent, 0.12, 0.1), colour, "spines")
        parts += [books] if rng.random() < 0.3 else _clutter(rng, width * 0.8, 0.2, level + 0.02, 4)
    return parts, (width, 0.34)


def _pile(rng):
    return _clutter(rng, 0.7, 0.7, 0.0, 7), (0.7, 0.7)


# types of room: furniture along the walls, furniture in the middle
ROOM_TYPES = [
    ([_bed, _cupboard, _shelf, _cupboard, _table, _pile, _pile], [_chair, _pile, _pile]),
    ([_bed, _sofa, _cupboard, _shelf, _bed, _cupboard, _pile], [_table, _chair, _pile, _pile]),
    ([_sofa, _cupboard, _shelf, _sofa, _cupboard, _pile], [_table, _chair, _pile, _pile]),
    ([_cupboard, _cupboard, _cupboard, _table, _cupboard, _sofa], [_table, _chair, _chair, _chair, _pile]),
    ([_table, _shelf, _sofa, _table, _cupboard, _pile], [_chair, _chair, _table, _pile]),
]


def _wall_items(rng, span, room_height) -> list:
    """Return the window and pictures on a wall, in the wall's frame: x along the wall, z into the room."""
    parts, blocked = [], (0.0, -1.0)
    if rng.random() < 0.5:
        half, x = rng.uniform((0.4, 0.4, 0.02), (0.9, 0.65, 0.02)), rng.uniform(-0.25, 0.25) * span
        parts.append(
            ("window", (x, min(1.5, room_height - half[1] - 0.15), 0.01), half, _pick(rng, SKY), "panes")
        )
        blocked = x, half[0] + 0.35
    for x in rng.permutation(np.linspace(-0.36, 0.36, 5))[: rng.integers(4)] * span:
        half, colour = (
            rng.uniform((0.18, 0.18, 0.01), (0.42, 0.42, 0.02)),
            _pick(rng, VIVID + PALE + MUTED + DARK),
        )
        if abs(x - blocked[0]) > blocked[1]:
            parts.append(
                ("picture", (x, rng.uniform(1.4, 1.7), 0.01), half, colour, _pick(rng, ("patches", "fabric")))
            )
    return parts


def _wall_pose(room, side: int) -> tuple[float, np.ndarray, float]:
    """Return the yaw, the midpoint (x, z) and the length of one of the four walls."""
    yaw = side * np.pi / 2
    return yaw, -room[[0, 2]] / 2 * (np.sin(yaw), np.cos(yaw)), room[2 * (side % 2)]


def _walls(rng, room) -> list:
    """Return floor, ceiling and walls as thick boxes around the room, with the windows and pictures."""
    width, height, depth = room
    floor = _pick(rng, WOOD + WOOD + PALE + DARK + MUTED), _pick(rng, ("planks", "fabric", "tiles"))
    wall = _pick(rng, PALE + MUTED + WOOD[3:4]), _pick(rng, ("plain", "plain", "fabric"))
    parts = [
        (("floor", (0, -0.1, 0), (width, 0.1, depth), *floor), 0.0, (0, 0)),
        (("ceiling", (0, height + 0.1, 0), (width, 0.1, depth), _pick(rng, PALE), "plain"), 0.0, (0, 0)),
    ]
    for side in range(4):
        yaw, position, span = _wall_pose(room, side)
        wall_box = ("wall", (0, height / 2, -0.1), (span, height, 0.1), *wall)
        parts += [(part, yaw, position) for part in (wall_box, *_wall_items(rng, span, height))]
    return parts


def _furniture(rng, room) -> list:
    """Return the furniture of a random type of room.

    A piece is omitted if eight random positions are all occupied.
    """
    wall_builders, free_builders = _pick(rng, ROOM_TYPES)
    placed, parts = [], []
    for build in wall_builders + free_builders:
        piece, footprint = build(rng)
        for _ in range(8):
            if build in wall_builders:
                yaw, position, span = _wall_pose(room, rng.integers(4))
                offset = rng.uniform(-0.5, 0.5) * max(span - footprint[0], 0)
                scale = 1 - (footprint[1] / 2 + 0.05) / np.abs(position).max()
                position = position * scale + offset * np.array((np.cos(yaw), -np.sin(yaw)))
            else:
                yaw, position = rng.uniform(0, 2 * np.pi), rng.uniform(-0.35, 0.35, 2) * room[[0, 2]]
            extent = np.abs(((np.cos(yaw), np.sin(yaw)), (-np.sin(yaw), np.cos(yaw)))) @ footprint / 2
            if all((np.abs(position - other) > extent + size).any() for other, size in placed):
                placed.append((position, extent))
                parts += [(part, yaw, position) for part in piece]
                break
    return parts


def _pack(parts: list) -> dict[str, np.ndarray]:
    """Convert K tuples (part, yaw, position) to arrays: `centre` and `half` `(K, 3)`, `colour` in 0..1."""
    names, centres, halves, colours, textures = zip(*(part for part, _, _ in parts), strict=True)
    yaw, position = np.array([yaw for _, yaw, _ in parts]), np.array([position for _, _, position in parts])
    centre = _rotate(np.array(centres, float), -yaw)
    centre[:, [0, 2]] += position
    return {
        "label": np.array([NYUV2_13.index(name) for name in names], np.uint8),
        "centre": centre,
        "half": np.array(halves),
        "yaw": yaw,
        "colour": np.array(colours) / 255,
        "texture": np.array([TEXTURES[name] for name in textures]),
    }


def _rotate(vectors: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """Rotate `(..., 3)` vectors from the world frame to box frames with `(...)` yaw (back with `-yaw`)."""
    x, y, z = np.moveaxis(vectors, -1, 0)
    return np.stack(
        np.broadcast_arrays(np.cos(yaw) * x - np.sin(yaw) * z, y, np.sin(yaw) * x + np.cos(yaw) * z), -1
    )


def _choose_view(rng, room, boxes, size) -> tuple[np.ndarray, np.ndarray]:
    """Choose a standing person's view across the room.

    Returns:
        The `(3,)` origin and `(P, 3)` rays, which extend 1 m along the optical axis.
    """
    for _ in range(50):
        origin = rng.uniform((-0.46, 0, -0.46), (0.46, 0, 0.46)) * room + (0, rng.uniform(1.2, 1.7), 0)
        direction = rng.uniform((-0.3, 0, -0.3), (0.3, 0, 0.3)) * room - origin
        clear = np.abs(_rotate(origin - boxes["centre"], boxes["yaw"])) > boxes["half"] + 0.3
        if np.hypot(direction[0], direction[2]) > 0.4 * min(room[0], room[2]) and clear.any(1).all():
            break
    angles = rng.normal((0.23, 0), (0.1, 0.03))
    rotation = Rotation.from_euler("zxy", (-angles[1], angles[0], np.arctan2(direction[0], direction[2])))
    row, column = np.mgrid[: size[0], : size[1]] + 0.5
    pixels = np.stack((column - size[1] / 2, size[0] / 2 - row, np.full(size, FOCAL_RATIO * size[1])), -1)
    return origin, rotation.apply(pixels.reshape(-1, 3) / (FOCAL_RATIO * size[1]))


def _cast_rays(origin, rays, boxes) -> dict[str, np.ndarray]:
    """Find the first hit of each ray by the slab test.

    `point` and the face (`axis`, `side`) are in the box's frame. `cosine` is that of the angle of incidence.
    """
    start, half = _rotate(origin - boxes["centre"], boxes["yaw"]), boxes["half"]
    near = (-start - half).T[..., None].astype(np.float32)
    far = (-start + half).T[..., None].astype(np.float32)
    cos, sin = (
        np.cos(boxes["yaw"], dtype=np.float32)[:, None],
        np.sin(boxes["yaw"], dtype=np.float32)[:, None],
    )
    x, y, z = rays.T.astype(np.float32)
    box = np.empty(len(rays), int)
    for chunk in np.array_split(np.arange(len(rays)), max(1, len(rays) // 512)):  # chunks fit in the cache
        rotated = cos * x[chunk] - sin * z[chunk], y[None, chunk], sin * x[chunk] + cos * z[chunk]
        inverse = 1 / (np.stack(np.broadcast_arrays(*rotated)) + np.float32(1e-9))
        first, second = near * inverse, far * inverse
        enter = np.minimum(first, second).max(0, initial=np.float32(0.02))
        leave = np.maximum(first, second).min(0)
        box[chunk] = np.where(enter < leave, enter, np.float32(np.inf)).argmin(0)
    direction = _rotate(rays, boxes["yaw"][box]) + 1e-9
    slabs = (-start[box] - np.sign(direction) * half[box]) / direction
    axis, depth = slabs.argmax(1, keepdims=True), slabs.max(1)
    normal_component = np.take_along_axis(direction, axis, 1)[:, 0]
    return {
        "box": box,
        "depth": depth,
        "point": start[box] + depth[:, None] * direction,
        "axis": axis,
        "side": -np.sign(normal_component),
        "cosine": np.abs(normal_component) / np.linalg.norm(rays, axis=1),
    }


def _hash(*keys: np.ndarray) -> np.ndarray:
    """Hash integer keys to a reproducible number in [0, 1)."""
    mixed = np.uint32(0)
    for key in keys:
        mixed = (mixed ^ np.asarray(key).astype(np.int64).astype(np.uint32)) * np.uint32(2654435761)
        mixed = mixed ^ (mixed >> np.uint32(15))
    return mixed / 2**32


def _shade(rng, origin, rays, boxes, room, hit) -> np.ndarray:
    """Return `(P, 3)` surface colours under a lamp near the ceiling, darker in the corners of the room."""
    box, axis = hit["box"], hit["axis"]
    across, up, brightness, hue, joint = boxes["texture"][box].T
    u = np.take_along_axis(hit["point"], np.where(axis == 0, 2, 0), 1)[:, 0] * across
    v = np.take_along_axis(hit["point"], np.where(axis == 1, 2, 1), 1)[:, 0] * up
    cell = np.floor(u), np.floor(v), box
    colour = boxes["colour"][box] * (1 + brightness * (_hash(*cell) - 0.5))[:, None]
    colour = colour + hue[:, None] * (np.stack([_hash(*cell, channel) for channel in range(3)], 1) - 0.5)
    edge = np.minimum(np.minimum(u - cell[0], cell[0] + 1 - u), np.minimum(v - cell[1], cell[1] + 1 - v))
    colour = np.where((edge < joint)[:, None], colour * 0.5, colour)

    point = origin + hit["depth"][:, None] * rays
    to_lamp = (0, room[1] - 0.3, 0) + rng.uniform(-0.25, 0.25, 3) * room * (1, 0, 1) - point
    distance = np.linalg.norm(to_lamp, axis=1)
    facing = np.take_along_axis(_rotate(to_lamp, boxes["yaw"][box]), axis, 1)[:, 0] * hit["side"] / distance
    ambient = rng.uniform(0.35, 0.6)
    light = ambient + (1.1 - ambient) * np.clip(facing, 0, None) * 4 / (2 + distance**2 / 3)
    corner_distance = np.sort(np.minimum(room / 2 - np.abs(point - (0, room[1] / 2, 0)), 0.5), 1)[:, 1]
    is_window = boxes["label"][box] == NYUV2_13.index("window")
    light = np.where(is_window, 1.0, light * (0.72 + 0.28 * np.clip(corner_distance / 0.5, 0, 1)))
    return np.clip(colour, 0.01, 1.2) * light[:, None]


def _expose(rng, colour) -> np.ndarray:
    """Apply exposure, white balance, vignetting and sensor noise, and convert to uint8."""
    row, column = np.mgrid[-1 : 1 : colour.shape[0] * 1j, -1 : 1 : colour.shape[1] * 1j]
    gain = rng.uniform(0.75, 1.25) * (1 + rng.normal(0, 0.06, 3))
    exposed = colour * gain * (1 - 0.12 * (row**2 + column**2))[..., None]
    return (255 * np.clip(exposed + rng.normal(0, rng.uniform(0.003, 0.012), colour.shape), 0, 1)).astype(
        np.uint8
    )


def _measure(rng, depth, label, cosine) -> np.ndarray:
    """Simulate Kinect depth in mm, 0 = missing, with noise and quantisation of the disparity."""
    disparity = np.round(8 * (FOCAL_BASELINE / depth + rng.normal(0, 0.06, depth.shape))) / 8
    padded = np.pad(depth, ((0, 0), (0, 2)), "edge")
    shadow = depth - np.minimum(padded[:, 1:-1], padded[:, 2:]) > 0.35  # shadow of the projector
    glass = np.isin(label, [NYUV2_13.index("window"), NYUV2_13.index("tv")]) & (rng.random() < 0.5)
    missing = (
        shadow | (cosine < 0.1) | glass & (rng.random(depth.shape) < 0.8) | (rng.random(depth.shape) < 0.004)
    )
    return np.where(missing, 0, np.rint(1000 * (FOCAL_BASELINE / disparity.clip(1)).clip(0.4, 10))).astype(
        np.uint16
    )


def _annotate(rng, label, box) -> np.ndarray:
    """Imitate manual labels: the image border, slivers along boundaries and some objects are unlabelled."""
    edge = (box != np.roll(box, 1, 0)) | (box != np.roll(box, 1, 1))
    imprecise = rng.random((8, 8))[np.ix_(*(np.arange(count) * 8 // count for count in label.shape))] < 0.6
    skipped = (rng.random(box.max() + 1) < 0.1)[box] & (label == NYUV2_13.index("objects"))
    annotated = np.where((edge & imprecise) | skipped, IGNORE_INDEX, label).astype(np.uint8)
    border = max(1, round(0.03 * len(label)))
    return np.pad(annotated[border:-border, border:-border], border, constant_values=IGNORE_INDEX)
