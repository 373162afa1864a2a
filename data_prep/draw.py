"""The arena's painter: four courts in perspective, players, officials and a scoreboard, in numpy.

A canvas is a uint8 array (HEIGHT, WIDTH, 3). Court coordinates are u ∈ [0, 1] from left to right
and v ∈ [0, 1] from the far to the near side line; `project` maps them to pixels as a broadcast
camera would.
"""

import math
from functools import lru_cache

import numpy as np

from nanosport.image import DIGITS

WIDTH, HEIGHT = 336, 224
HORIZON, GROUND = 78, 216  # pixel rows of the far and the near side line
KITS = {
    "red": (214, 32, 40),
    "blue": (36, 70, 220),
    "yellow": (246, 214, 36),
    "white": (244, 244, 244),
    "black": (22, 22, 26),
}
SKIN, INK, PAPER = (226, 178, 142), (16, 18, 22), (250, 250, 250)
FLOORS = {  # surroundings, court
    "soccer": ((38, 104, 44), (58, 142, 60)),
    "volleyball": ((28, 112, 122), (232, 156, 84)),
    "badminton": ((66, 52, 96), (22, 118, 92)),
    "table tennis": ((122, 40, 44), (140, 52, 54)),
}


def project(u: float, v: float) -> tuple[float, float]:
    """Court coordinates → pixels; the near side line is a third longer than the far one."""
    depth = 0.74 + 0.26 * v
    return WIDTH / 2 + (u - 0.5) * 0.94 * WIDTH * depth, HORIZON + (GROUND - HORIZON) * v


def rect(canvas: np.ndarray, x0: float, y0: float, x1: float, y1: float, colour) -> None:
    """Fill pixels x0 ≤ x < x1, y0 ≤ y < y1 (clipped)."""
    canvas[max(0, round(y0)) : max(0, round(y1)), max(0, round(x0)) : max(0, round(x1))] = colour


def capsule(
    canvas: np.ndarray, x0: float, y0: float, x1: float, y1: float, width: float, colour
) -> None:
    """A thick line with round ends; a disc where both ends meet."""
    r = width / 2
    left, right = max(0, int(min(x0, x1) - r)), min(WIDTH, int(max(x0, x1) + r) + 2)
    top, bottom = max(0, int(min(y0, y1) - r)), min(HEIGHT, int(max(y0, y1) + r) + 2)
    if left >= right or top >= bottom:
        return
    x = np.arange(left, right, dtype=np.float32)[None] - x0
    y = np.arange(top, bottom, dtype=np.float32)[:, None] - y0
    dx, dy = x1 - x0, y1 - y0
    along = np.clip((x * dx + y * dy) / max(dx * dx + dy * dy, 1e-6), 0, 1)
    inside = (x - along * dx) ** 2 + (y - along * dy) ** 2 <= r * r
    canvas[top:bottom, left:right][inside] = colour


def glyph(canvas: np.ndarray, digit: str, x: float, y: float, scale: int, colour) -> None:
    """A digit of 4·scale × 6·scale pixels with its top left corner at (x, y)."""
    for row, bits in enumerate(DIGITS[digit]):
        for column in range(4):
            if int(bits, 16) >> (3 - column) & 1:
                left, right = x + column * scale, x + (column + 1) * scale
                top, bottom = y + row * scale, y + (row + 1) * scale
                rect(canvas, left, top, right, bottom, colour)


def _line(canvas, u0, v0, u1, v1, width=2.0, colour=PAPER):
    capsule(canvas, *project(u0, v0), *project(u1, v1), width, colour)


def _frame(canvas, u0, v0, u1, v1, width=2.0):
    for a in ((u0, v0, u1, v0), (u1, v0, u1, v1), (u1, v1, u0, v1), (u0, v1, u0, v0)):
        _line(canvas, *a, width)


def _floor(canvas, u0, v0, u1, v1, colour):
    """A filled court rectangle, row by row because its sides are slanted."""
    for y in range(round(project(0, v0)[1]), round(project(0, v1)[1])):
        v = (y - HORIZON) / (GROUND - HORIZON)
        rect(canvas, project(u0, v)[0], y, project(u1, v)[0], y + 1, colour)


def _net(canvas, v0, v1, height, colour=(236, 236, 236)):
    """A net over the middle of the court: a slanted mesh with a tape on top."""
    (x0, y0), (x1, y1) = project(0.5, v0), project(0.5, v1)
    for k in range(6):
        lift = height * k / 5
        capsule(canvas, x0 + 3, y0 - lift, x1 - 3, y1 - lift, 3 if k == 5 else 1, colour)
    capsule(canvas, x1, y1, x1, y1 - height, 4, (70, 70, 70))
    capsule(canvas, x0, y0, x0, y0 - height, 4, (70, 70, 70))


@lru_cache(maxsize=256)
def court(sport: str, layout: int) -> np.ndarray:
    """The empty venue; `layout` fixes the crowd and the shades of floor and stand."""
    rng = np.random.default_rng([layout, 77])
    outside, inside = (np.array(c) * rng.uniform(0.88, 1.08) for c in FLOORS[sport])
    canvas = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    canvas[:] = outside.clip(0, 255)
    crowd = rng.integers(50, 110, 3) + rng.integers(-30, 45, (17, WIDTH // 4, 1))
    crowd = crowd + rng.integers(-12, 12, (17, WIDTH // 4, 3))
    canvas[:68] = np.kron(crowd.clip(0, 255), np.ones((4, 4, 1))).astype(np.uint8)
    rect(canvas, 0, 68, WIDTH, 72, (40, 44, 60))
    draw_field = {
        "soccer": _soccer_pitch,
        "volleyball": _volleyball_court,
        "badminton": _badminton_court,
        "table tennis": _table,
    }
    draw_field[sport](canvas, inside.clip(0, 255))
    canvas.setflags(write=False)
    return canvas


def _soccer_pitch(canvas: np.ndarray, grass: np.ndarray) -> None:
    for k in range(10):
        _floor(canvas, k / 10, 0, (k + 1) / 10, 1, grass * (1.06 if k % 2 else 0.94))
    _frame(canvas, 0.02, 0.02, 0.98, 0.98)
    _line(canvas, 0.5, 0.02, 0.5, 0.98)
    angles = np.linspace(0, 2 * math.pi, 25)
    ring = [(0.5 + 0.1 * math.cos(a), 0.5 + 0.2 * math.sin(a)) for a in angles]
    for a, b in zip(ring, ring[1:]):
        _line(canvas, *a, *b)
    for u0, u1, post in ((0.02, 0.16, 0.0), (0.84, 0.98, 1.0)):
        _frame(canvas, u0, 0.22, u1, 0.78)
        (xa, ya), (xb, yb) = project(post, 0.36), project(post, 0.64)
        for k in range(5):
            capsule(canvas, xa, ya - 5 * k, xb, yb - 6 * k, 1 if k < 4 else 4, PAPER)
        capsule(canvas, xa, ya, xa, ya - 20, 4, PAPER)
        capsule(canvas, xb, yb, xb, yb - 24, 4, PAPER)


def _volleyball_court(canvas: np.ndarray, floor: np.ndarray) -> None:
    _floor(canvas, 0.1, 0.08, 0.9, 0.94, floor)
    _frame(canvas, 0.1, 0.08, 0.9, 0.94, 3)
    _line(canvas, 0.36, 0.08, 0.36, 0.94)
    _line(canvas, 0.64, 0.08, 0.64, 0.94)
    _net(canvas, 0.02, 1.0, 44)


def _badminton_court(canvas: np.ndarray, floor: np.ndarray) -> None:
    _floor(canvas, 0.06, 0.04, 0.94, 0.96, floor)
    _frame(canvas, 0.12, 0.1, 0.88, 0.9)
    _frame(canvas, 0.12, 0.2, 0.88, 0.8)
    _frame(canvas, 0.18, 0.1, 0.82, 0.9)
    _frame(canvas, 0.38, 0.1, 0.62, 0.9)
    _line(canvas, 0.12, 0.5, 0.38, 0.5)
    _line(canvas, 0.62, 0.5, 0.88, 0.5)
    _net(canvas, 0.06, 0.94, 30)


def _table(canvas: np.ndarray, floor: np.ndarray) -> None:
    _floor(canvas, 0.05, 0.02, 0.95, 0.98, floor)
    (xa, ya), (xb, yb) = project(0.34, 0.8), project(0.66, 0.8)
    rect(canvas, xa + 8, ya - 26, xa + 14, ya + 8, (50, 50, 54))
    rect(canvas, xb - 14, yb - 26, xb - 8, yb + 8, (50, 50, 54))
    _floor(canvas, 0.32, 0.3, 0.68, 0.66, (24, 74, 158))
    _frame(canvas, 0.32, 0.3, 0.68, 0.66, 3)
    _line(canvas, 0.32, 0.48, 0.68, 0.48)
    _net(canvas, 0.28, 0.68, 12)


def scoreboard(canvas: np.ndarray, kits: tuple[str, str], score: tuple[int, int]) -> None:
    """Top of the picture: kit of the left team, its points, points of the right team, its kit."""
    rect(canvas, 58, 1, 278, 55, INK)
    for k in (0, 1):
        rect(canvas, 62 + 164 * k, 4, 110 + 164 * k, 52, (120, 120, 120))
        rect(canvas, 65 + 164 * k, 7, 107 + 164 * k, 49, KITS[kits[k]])
        glyph(canvas, str(score[k]), 122 + 60 * k, 4, 8, (255, 240, 120))
    rect(canvas, 163, 25, 173, 31, PAPER)


def player(canvas: np.ndarray, u: float, v: float, kit: str, stride: float) -> None:
    """A player in the wide shot, running: `stride` is the phase of the legs in radians."""
    x, y = project(u, v)
    s = 0.8 + 0.45 * v
    swing = 5 * s * math.sin(stride)
    capsule(canvas, x - 8 * s, y + 1, x + 8 * s, y + 1, 4 * s, (20, 40, 24))
    capsule(canvas, x, y - 14 * s, x - swing, y, 4 * s, INK)
    capsule(canvas, x, y - 14 * s, x + swing, y, 4 * s, INK)
    capsule(canvas, x, y - 27 * s, x + swing + 5 * s, y - 17 * s, 3.5 * s, SKIN)
    capsule(canvas, x, y - 26 * s, x, y - 15 * s, 13 * s, KITS[kit])
    capsule(canvas, x, y - 37 * s, x, y - 37 * s, 9 * s, SKIN)


def ball(canvas: np.ndarray, x: float, y: float, size: float, sport: str) -> None:
    """The ball (a shuttlecock in badminton, orange in table tennis), centre in pixels."""
    capsule(canvas, x, y, x, y, size + 2, INK)
    capsule(canvas, x, y, x, y, size, {"table tennis": (255, 150, 30)}.get(sport, PAPER))
    if sport == "badminton":
        capsule(canvas, x, y, x - size, y - size * 0.8, size * 0.5, PAPER)


def closeup(
    canvas: np.ndarray,
    sport: str,
    kit: str,
    number: int,
    height: int,
    lean: int,
    card: str,
    phase: float,
) -> None:
    """The director cuts to the scorer. `height` 0 high, 1 middle, 2 low is where the ball is
    struck; `lean` −1, 0, 1 tilts the body left, not at all, right; the official at the right holds
    `card` up (`none`: arms down)."""
    outside, inside = map(np.array, FLOORS[sport])
    canvas[56:] = inside * 0.72
    rect(canvas, 0, 56, WIDTH, 96, outside * 0.8)
    canvas[56:96:5] = outside * 0.6
    tilt, hip_x, hip_y = 0.42 * lean, 140 + 2 * math.sin(phase), 171 + 2 * math.cos(phase)

    def body(forward: float, up: float) -> tuple[float, float]:
        x = hip_x + forward * math.cos(tilt) + up * math.sin(tilt)
        return x, hip_y + forward * math.sin(tilt) - up * math.cos(tilt)

    # legs, arms and racket
    kick = 62 if height == 2 else 16
    capsule(canvas, *body(0, 0), hip_x - 22, 222, 20, INK)
    capsule(canvas, *body(0, 0), hip_x + kick, 208 if height == 2 else 222, 20, INK)
    hand = (body(34, 104), body(66, 52), body(44, 14))[height]
    capsule(canvas, *body(-14, 58), *body(-44, 30), 14, SKIN)
    capsule(canvas, *body(14, 58), *hand, 14, SKIN)
    if sport in ("badminton", "table tennis"):
        blade = (200, 60, 50) if sport == "table tennis" else (150, 210, 235)
        racket = (hand[0] + 14, hand[1] + (10 if height == 2 else -14))
        capsule(canvas, *hand, *racket, 5, INK)
        capsule(canvas, *racket, *racket, 20, blade)

    # shirt, head, number and ball
    colour, (x, y) = KITS[kit], body(0, 31)
    capsule(canvas, *body(0, 10), *body(0, 52), 54, np.array(colour) * 0.55 + 20)
    capsule(canvas, *body(0, 10), *body(0, 52), 50, colour)
    capsule(canvas, *body(0, 92), *body(0, 92), 32, SKIN)
    rect(canvas, x - 20, y - 28, x + 20, y + 28, PAPER)
    glyph(canvas, str(number), x - 16, y - 24, 8, INK)
    ball(canvas, *((hip_x + 74, 76), (hip_x + 84, 126), (hip_x + 80, 196))[height], 26, sport)
    _official(canvas, 290, card)


def _official(canvas: np.ndarray, x: int, card: str) -> None:
    capsule(canvas, x, 160, x - 10, 222, 16, INK)
    capsule(canvas, x, 160, x + 12, 222, 16, INK)
    capsule(canvas, x, 128, x, 158, 36, (150, 90, 190))
    capsule(canvas, x, 98, x, 98, 24, SKIN)
    if card == "none":
        capsule(canvas, x + 16, 124, x + 24, 168, 10, SKIN)
        capsule(canvas, x - 16, 124, x - 24, 168, 10, SKIN)
    else:
        capsule(canvas, x + 14, 124, x + 26, 88, 10, SKIN)
        rect(canvas, x - 4, 56, x + 46, 104, INK)
        rect(canvas, x - 1, 59, x + 43, 101, {"yellow": (255, 222, 0), "red": (235, 16, 24)}[card])
