"""Draws the parts of a face, from the hair behind the head to the earring in front. Lengths are in head units.

Features are bold, since an expression must be readable in a head that is 45 pixels high. Face detectors respond to dark
brows and to soft shading of the skin at the eye sockets, the cheeks and the bridge of the nose.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from favchat_jax.embedded.drawing import (
    CANVAS,
    TEXTURE_UNIT,
    Head,
    Look,
    Motion,
    ellipse,
    flat,
    mix,
    shade,
    smooth,
    surface,
)

SIDES = {"left": -1, "right": 1}
DARK = (25, 18, 14)


@dataclass(frozen=True)
class Expression:
    """Describes how an expression differs from a face with straight brows and mouth, in head units."""

    inner: float = 0.0  # shift of the brow's inner end; positive is lower
    outer: float = 0.0  # shift of the brow's outer end; positive is lower
    arch: float = 0.0  # shift of the brow's middle; positive is higher
    lids: float = 0.9  # opening of the eyes, as a share of open ones
    slant: float = 0.0  # slant of the eyes; positive lowers the outer corner
    width: float = 0.34  # half the width of the mouth
    corners: float = 0.0  # curve of the mouth; positive lifts its corners
    upper: float = 0.0  # opening of the mouth above its middle line
    lower: float = 0.0  # opening of the mouth below its middle line
    teeth: str = "none"  # none, top, both


EXPRESSIONS = {
    "neutral": Expression(arch=0.03),
    "happy": Expression(
        inner=-0.04, arch=0.08, lids=0.75, width=0.48, corners=0.23, upper=-0.02, lower=0.27, teeth="top"
    ),
    "sadness": Expression(inner=-0.17, outer=0.12, lids=0.62, slant=0.05, width=0.36, corners=-0.2),
    "surprise": Expression(inner=-0.14, outer=-0.1, arch=0.12, lids=1.2, width=0.2, upper=0.15, lower=0.18),
    "anger": Expression(
        inner=0.15, outer=-0.12, lids=0.66, slant=-0.04, width=0.42, corners=-0.1, upper=0.09, lower=0.1, teeth="both"
    ),
}


def draw_face(look: Look, motion: Motion) -> UInt8[np.ndarray, "T h w 3"]:
    """Draws one face clip: RGB frames of `drawing.SIZE` pixels a side."""
    head = Head(look, motion)
    expression = EXPRESSIONS[motion.emotion]
    _body(head)
    head.texture(_skin(look), head.outline(_silhouette(look)))
    for side in SIDES.values():
        _eye(head, side, expression)
        _brow(head, side, expression)
    _nose(head)
    _beard(head)
    _mouth(head, expression)
    _marks(head)
    _hair(head)
    for side in SIDES.values():
        _ear(head, side, side * motion.yaw < 0.35)  # the far ear stays behind the head
    if look.glasses:
        _glasses(head)
    if look.hat:
        _hat(head)
    _earring(head)
    return head.frames()


def _silhouette(look: Look, grow: float = 1.0) -> Float[np.ndarray, "P 2"]:
    """Returns the head's outline from the front, clockwise from the crown; it narrows to the chin."""
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x, y = np.sin(angle), -np.cos(angle)
    narrow = np.where(y > 0, 1 - (1 - look.jaw) * y**2, 1)
    return np.stack([grow * x * narrow, grow * np.where(y > 0, 1.25, 1.2) * y], -1)


def _crown(look: Look, grow: float, below: float) -> Float[np.ndarray, "P 2"]:
    """Returns the part of the silhouette above y = `below`, from left over the crown to right."""
    points = _silhouette(look, grow)
    points = points[points[:, 1] < below]
    return points[np.argsort(np.arctan2(points[:, 0], -points[:, 1]))]


def _skin(look: Look) -> UInt8[np.ndarray, "H W 3"]:
    """Paints the skin of the face from the front with soft light and shadow, in a small picture that is enlarged."""
    side, unit = CANVAS // 4, TEXTURE_UNIT / 4
    y, x = np.mgrid[0:side, 0:side] / unit - side / unit / 2

    def blob(cx, cy, rx, ry):
        return np.exp(-(((x - cx) / rx) ** 2) - ((y - cy) / ry) ** 2)

    light = 1.0 + 0.16 * np.clip(look.light[0] * x - 0.5 * look.light[1] * y, -1, 1)
    light -= 0.25 * np.clip(x**2 + (y / 1.3) ** 2 - 0.45, 0, 0.8)
    for sign in (-1, 1):
        light -= 0.42 * blob(sign * look.eye_distance, -0.26, 0.34, 0.27)  # eye socket
        light += 0.18 * blob(sign * 0.48, 0.32, 0.32, 0.22)  # cheek
        light -= 0.1 * blob(sign * 0.17, 0.12, 0.08, 0.25)  # side of the nose
    light += 0.2 * blob(0, 0.0, 0.11, 0.4) + 0.1 * blob(0, -0.75, 0.6, 0.25)  # bridge of the nose, forehead
    light -= 0.14 * blob(0, 0.45, 0.22, 0.07) + 0.12 * blob(0, look.mouth_height + 0.24, 0.25, 0.07)
    rosy = 0.12 * (blob(-0.55, 0.38, 0.22, 0.2) + blob(0.55, 0.38, 0.22, 0.2))[..., None]
    color = np.asarray(look.skin) * light[..., None] * (1 - rosy * np.array([0, 0.8, 0.7]))
    return cv2.resize(np.clip(color, 0, 255).astype(np.uint8), (CANVAS, CANVAS), interpolation=cv2.INTER_LINEAR)


def _body(head: Head) -> None:
    """Draws everything behind the face: back hair, neck, clothes, ears."""
    look = head.look
    if look.long_hair:
        right = [[0.5, -1.38], [1.05, -1.0], [1.24, -0.4], [1.3, 0.4], [1.36, 1.1], [1.2, 1.75]]
        back = np.array([*right, *([-x, y] for x, y in reversed(right))])
        head.fill(head.outline(smooth(back)), shade(look.hair, 0.72))
    neck = np.array([[-0.5, 0.6], [0.5, 0.6], [0.55, 2.0], [-0.55, 2.0]])
    head.fill(head.still(neck), shade(look.skin, 0.72))
    chest = np.array([[-2.2, 2.4], [-1.8, 1.6], [-0.6, 1.36], [0, 1.6], [0.6, 1.36], [1.8, 1.6], [2.2, 2.4]])
    head.fill(head.still(chest), look.clothes)
    if not look.long_hair:
        head.fill(head.outline(_crown(look, 1.1, 0.2)), shade(look.hair, 0.85))
    for side in SIDES.values():
        _ear(head, side, None)


def _ear(head: Head, side: int, visible: Bool[np.ndarray, " T"] | None) -> None:
    outer, inner = ellipse(side * 1.04, 0.08, 0.14, 0.26), ellipse(side * 1.06, 0.06, 0.07, 0.15)
    for points, light in ((outer, 0.86), (inner, 0.66)):
        head.fill(head.place(flat(points, -0.05)), shade(head.look.skin, light), visible)


def _eye(head: Head, side: int, expression: Expression) -> None:
    """Draws an open eye with its iris and highlight, or only the lashes of a closed one."""
    look, motion = head.look, head.motion
    x, y, rx = side * look.eye_distance, -0.12, 0.23
    height = 0.14 * look.eye_size * expression.lids * motion.eyes_open[:, None]
    closed = motion.eyes_open < 0.25
    u = np.linspace(-1, 1, 9)
    arc = np.sqrt(1 - 0.98 * u**2)
    level = y + side * expression.slant * u
    upper = np.stack(np.broadcast_arrays(x + rx * u, level - height * arc), -1)
    lower = np.stack(np.broadcast_arrays(x + rx * u, level + 0.8 * height * arc), -1)
    white = np.concatenate([upper, lower[:, ::-1]], 1)
    lash = mix(look.hair, (20, 14, 12), 0.75)
    rim = np.array([x, y]) + (white - [x, y]) * [1.15, 1.5]
    head.face(rim, mix(shade(look.skin, 0.45), lash, 0.4), ~closed)
    head.face(white, mix((232, 230, 228), look.skin, 0.35), ~closed)
    for radius, color in ((0.14, shade(look.eyes, 0.4)), (0.115, look.eyes), (0.05, (12, 10, 12))):  # rim, iris, pupil
        disc = np.broadcast_to(ellipse(x, y, radius, radius, 14), (len(height), 14, 2)).copy()
        reach = height * np.sqrt(1 - 0.98 * np.clip((disc[..., 0] - x) / rx, -1, 1) ** 2)
        disc[..., 1] = np.clip(disc[..., 1], y - reach, y + 0.8 * reach)  # clipped by the lids
        head.face(disc, color, ~closed)
    head.face(ellipse(x + 0.04, y - 0.04, 0.025, 0.025, 8), (255, 255, 255), motion.eyes_open * expression.lids > 0.5)
    head.line(upper, lash, 0.045, visible=~closed)
    head.line(np.stack([x + rx * u, y + 0.03 + 0.05 * arc], -1), lash, 0.055, visible=closed)


def _brow(head: Head, side: int, expression: Expression) -> None:
    u = np.linspace(0, 1, 6)  # from the nose outwards
    x = side * (head.look.eye_distance - 0.24 + 0.52 * u)
    y = -0.43 + expression.inner * (1 - u) + expression.outer * u - expression.arch * np.sin(np.pi * u)
    width = head.look.brow_width * (1 - 0.45 * u)
    points = np.concatenate([np.stack([x, y - width], -1), np.stack([x, y + width], -1)[::-1]])
    head.face(points, mix(shade(head.look.hair, 0.6), DARK, 0.7))


def _nose(head: Head) -> None:
    look = head.look
    side = np.array([[0.06, 0.02], [0.1, 0.2], [0.17, 0.36], [0.1, 0.42]]) * [look.nose, 1]
    head.line(side, shade(look.skin, 0.75), 0.035)
    for sign in (-1, 1):
        head.face(ellipse(sign * 0.1 * look.nose, 0.41, 0.055, 0.035, 10), shade(look.skin, 0.37))


def _beard(head: Head) -> None:
    look, m = head.look, head.look.mouth_height
    color = mix(shade(look.hair, 0.7), (40, 28, 22), 0.6)  # darker than the hair: a blonde goatee shows on tan skin
    if look.beard == "goatee":
        right = [[0.4, m + 0.06], [0.36, m + 0.34], [0.2, 1.2]]
        chin = [*([-x, y] for x, y in right), *reversed(right), [0.2, m + 0.22], [-0.2, m + 0.22]]
        head.face(np.array(chin), color)
    if look.beard == "mustache":
        upper = [[0, m - 0.22], [0.22, m - 0.23], [0.42, m - 0.1], [0.5, m + 0.02]]
        right = np.array([*upper, [0.3, m - 0.03], [0, m - 0.08]])
        head.face(np.concatenate([right, right[::-1] * [-1, 1]]), color)


def _mouth(head: Head, expression: Expression) -> None:
    """Draws the lips, the dark gap between them, and the teeth that the expression shows."""
    look = head.look
    opening = head.motion.mouth_open[:, None]
    u = np.linspace(-1, 1, 13)
    arc = np.sqrt(1 - u**2)
    x = expression.width * (1 - 0.12 * opening) * u
    middle = look.mouth_height + expression.corners * (0.45 - u**2)
    up = (expression.upper + 0.04 * opening) * arc
    down = (expression.lower + 0.26 * opening) * arc
    x, middle, up, down = np.broadcast_arrays(x, middle, up, down)
    lip = 0.06 * (1 - u**4) + 0.02

    def band(top, bottom):
        return np.concatenate([np.stack([x, top], -1), np.stack([x, bottom], -1)[:, ::-1]], 1)

    head.face(band(middle - up - lip, middle + down + 1.2 * lip), look.lips)
    gap = np.maximum(up + down, 0.045)  # closed lips still show a dark line
    head.face(band(middle - up, middle - up + gap), (62, 14, 18))
    if expression.teeth == "both":
        head.face(band(middle - 0.8 * up, middle - 0.8 * up + np.minimum(0.16 * arc, gap)), (245, 242, 232))
        head.line(np.stack([0.9 * x, middle], -1), (90, 50, 50), 0.025)
    elif expression.teeth == "top":
        head.face(band(middle - up, middle - up + 0.13 * arc), (248, 246, 240))


def _marks(head: Head) -> None:
    """Draws the mole as a dark dot and the scar as a slanted line, each 1-3 pixels wide in a picture of 64 x 64."""
    look = head.look
    if look.mole != "none":
        x, y = look.mole_at
        head.face(ellipse(SIDES[look.mole] * x, y, 0.058, 0.058), (38, 18, 14))
    if look.scar != "none":
        (x, y), side = look.scar_at, SIDES[look.scar]
        color = (238, 176, 160) if sum(look.skin) < 400 else (176, 52, 60)
        head.line(np.array([[side * (x + 0.1), y - 0.14], [side * (x - 0.08), y + 0.14]]), color, 0.055)


# The hairline of each `Look.fringe`, from right to left.
HAIRLINES = (
    [[0.93, -0.05], [0.86, -0.5], [0.6, -0.74], [0, -0.76], [-0.6, -0.74], [-0.86, -0.5], [-0.93, -0.05]],
    [[0.93, -0.05], [0.9, -0.5], [0.5, -0.72], [-0.2, -0.86], [-0.4, -1.0], [-0.86, -0.6], [-0.93, -0.05]],
    [[0.93, -0.05], [0.86, -0.6], [0.4, -1.0], [0.2, -0.86], [-0.5, -0.72], [-0.9, -0.5], [-0.93, -0.05]],
    [[0.93, -0.05], [0.82, -0.6], [0.45, -0.95], [0, -0.72], [-0.45, -0.95], [-0.82, -0.6], [-0.93, -0.05]],
)


def _hair(head: Head) -> None:
    """Draws the hair over the forehead and its gloss, and the locks beside the face if the hair is long."""
    look = head.look
    hairline = surface(smooth(HAIRLINES[look.fringe], closed=False))
    head.fill(np.concatenate([head.outline(_crown(look, 1.13, 0.12)), head.place(hairline)], 1), look.hair)
    gloss = np.concatenate([ellipse(0, 0, 0.95, 1.2, 24)[14:19], ellipse(0, 0, 0.85, 1.1, 24)[14:19][::-1]])
    head.fill(head.outline(gloss), mix(look.hair, (255, 255, 255), 0.16))
    if look.long_hair:
        lock = [[0.96, -0.75], [1.2, -0.4], [1.32, 0.4], [1.36, 1.3], [1.05, 1.5], [0.98, 0.5], [0.92, -0.1]]
        for side in SIDES.values():
            head.fill(head.outline(smooth(lock) * [side, 1]), look.hair)


def _rim(look: Look, side: int) -> Float[np.ndarray, "P 2"]:
    """Returns the rim of one lens of the glasses."""
    x = side * (look.eye_distance + 0.01)
    if look.glasses_round:
        return ellipse(x, -0.12, 0.3, 0.25, 20)
    return np.array([[x - 0.3, -0.33], [x + 0.3, -0.33], [x + 0.26, 0.1], [x - 0.26, 0.1]])


def _glasses(head: Head) -> None:
    look = head.look
    for side in SIDES.values():
        head.line(_rim(look, side), look.glasses, 0.05, closed=True)
        head.line(np.array([[side * (look.eye_distance + 0.3), -0.2], [side * 1.02, -0.14]]), look.glasses, 0.05)
    gap = look.eye_distance - 0.28
    head.line(np.array([[-gap, -0.2], [0, -0.24], [gap, -0.2]]), look.glasses, 0.04)


def _hat(head: Head) -> None:
    look = head.look
    edge = np.array([[0.98, -0.66], [0.6, -0.72], [0, -0.74], [-0.6, -0.72], [-0.98, -0.66]])
    head.fill(np.concatenate([head.outline(_crown(look, 1.2, -0.72)), head.place(surface(edge))], 1), look.hat)
    head.face(np.concatenate([edge, edge[::-1] - [0, 0.17]]), shade(look.hat, 0.6))
    if look.hat_brim:
        brim = np.array([[-1.3, -0.72], [-0.7, -0.82], [0.7, -0.82], [1.3, -0.72], [0.7, -0.62], [-0.7, -0.62]])
        head.face(brim, shade(look.hat, 0.8))


def _earring(head: Head) -> None:
    look = head.look
    if look.earring == "none":
        return
    side = SIDES[look.earring]
    rim = (0.085, (30, 22, 20))  # separates the earring from fair hair
    for radius, color in (rim, (0.062, look.earring_color)):
        drop = ellipse(side * 1.09, 0.4, radius, radius * 1.15)
        head.fill(head.place(flat(drop, -0.05)), color, side * head.motion.yaw < 0.35)
