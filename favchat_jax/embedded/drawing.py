"""Draws the embedded data's pictures: descriptions of faces and moving shapes, and the canvas for them.

A head is an ellipsoid that reaches one unit to each side. In the picture x points right, y down and z to the viewer;
"left" is the viewer's left. Every part of a face (`face_parts`) is a polygon on the ellipsoid. Its corners turn with
the head, in one computation for all frames. A frame is a list of filled polygons, drawn at twice the size and averaged.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

SIZE = 128
FRAMES = 16
CANVAS = 2 * SIZE  # drawn at twice the size, then averaged down
SUBPIXEL = 4  # fractional bits of polygon corners
TEXTURE_UNIT = 80  # pixels of the skin texture per head unit

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Look:
    """Holds the constant properties of a face clip: the person, the scene and the camera. Colours are RGB."""

    hair: Color
    long_hair: bool
    fringe: int  # 0 straight, 1 parted on the left, 2 parted on the right, 3 pointed
    skin: Color
    eyes: Color
    glasses: Color | None
    glasses_round: bool
    hat: Color | None
    hat_brim: bool
    beard: str  # none, goatee, mustache
    mole: str  # none, left, right
    earring: str  # none, left, right
    scar: str  # none, left, right
    earring_color: Color
    mole_at: tuple[float, float]  # position on the right cheek in head units; mirrored for the left
    scar_at: tuple[float, float]
    face_width: float
    jaw: float  # width of the jaw as a share of the cheeks' width
    eye_distance: float  # distance of each eye from the middle
    eye_size: float
    nose: float  # width
    brow_width: float
    mouth_height: float
    lips: Color
    clothes: Color
    background: UInt8[np.ndarray, "H W 3"]  # at the canvas' size
    light: tuple[float, float]  # strength from the right, from above
    scale: float  # canvas pixels per head unit
    center: tuple[float, float]  # in canvas pixels


@dataclass(frozen=True)
class Motion:
    """Holds the changing properties of a face clip of T frames, in radians: yaw > 0 turns right, pitch > 0 nods."""

    yaw: Float[np.ndarray, " T"]
    pitch: Float[np.ndarray, " T"]
    roll: Float[np.ndarray, " T"]
    eyes_open: Float[np.ndarray, " T"]  # 0 closed, 1 open
    mouth_open: Float[np.ndarray, " T"]  # 0 the expression's own mouth, 1 wide open
    emotion: str  # neutral, happy, sadness, surprise, anger

    def at(self, t: int) -> "Motion":
        """Returns the motion of frame `t` only."""
        courses = (self.yaw, self.pitch, self.roll, self.eyes_open, self.mouth_open)
        return Motion(*(course[t : t + 1] for course in courses), self.emotion)


@dataclass(frozen=True)
class Shapes:
    """Describes a general clip: equal shapes that move in one direction. Lengths are shares of the frame."""

    shape: str  # circle, square, triangle, star
    color: Color
    middle: Float[np.ndarray, "N 2"]  # centres halfway through the clip
    step: tuple[float, float]  # movement per frame
    radius: float
    spin: float  # radians over the clip
    background: UInt8[np.ndarray, "H W 3"]


def mix(a: Color, b: Color, share: float) -> Color:
    """Mixes two colours: 0 gives `a`, 1 gives `b`."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def shade(color: Color, factor: float) -> Color:
    """Makes a colour darker (factor < 1) or lighter (factor > 1)."""
    return tuple(min(255, round(x * factor)) for x in color)


def ellipse(x: float, y: float, rx: float, ry: float, n: int = 16) -> Float[np.ndarray, "P 2"]:
    """Returns the corners of an ellipse with centre (x, y)."""
    angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], -1)


def smooth(points, closed: bool = True) -> Float[np.ndarray, "P 2"]:
    """Smooths a polygon by cutting its corners twice (Chaikin's curve); the ends of an open line stay in place."""
    points = np.asarray(points, np.float64)
    for _ in range(2):
        following = np.roll(points, -1, axis=0)
        cut = np.stack([0.75 * points + 0.25 * following, 0.25 * points + 0.75 * following], 1).reshape(-1, 2)
        points = cut if closed else np.concatenate([points[:1], cut[:-2], points[-1:]])
    return points


def surface(points: Float[np.ndarray, "*T P 2"]) -> Float[np.ndarray, "*T P 3"]:
    """Projects points on the front of the face onto the ellipsoid."""
    x, y = points[..., 0], points[..., 1]
    z = 0.9 * np.sqrt(np.clip(1 - (x / 1.1) ** 2 - (y / 1.55) ** 2, 0, None))
    return np.stack([x, y, z], -1)


def flat(points: Float[np.ndarray, "P 2"], z: float) -> Float[np.ndarray, "P 3"]:
    """Places points at the same depth."""
    return np.concatenate([points, np.full((len(points), 1), z)], -1)


def fixed(pixels: Float[np.ndarray, "*T P 2"]) -> Int[np.ndarray, "*T P 2"]:
    """Converts pixels to fixed-point corners, so that cv2 draws with subpixel precision."""
    return np.round(pixels * (1 << SUBPIXEL)).astype(np.int32)


@dataclass(frozen=True)
class Polygon:
    """One part of the picture in every frame: a filled polygon, or a line if it has a thickness."""

    corners: Int[np.ndarray, "T P 2"]
    color: Color
    thickness: int = 0  # canvas pixels
    closed: bool = True
    visible: Bool[np.ndarray, " T"] | None = None  # None: in every frame

    def draw(self, canvas: UInt8[np.ndarray, "H W 3"], t: int) -> None:
        """Paints frame `t`."""
        if self.visible is not None and not self.visible[t]:
            return
        if self.thickness:
            cv2.polylines(
                canvas, [self.corners[t]], self.closed, self.color, self.thickness, cv2.LINE_AA, shift=SUBPIXEL
            )
        else:
            cv2.fillPoly(canvas, [self.corners[t]], self.color, cv2.LINE_AA, shift=SUBPIXEL)


@dataclass(frozen=True)
class Texture:
    """A picture that follows the head, seen through the polygon `corners`."""

    picture: UInt8[np.ndarray, "H W 3"]
    corners: Int[np.ndarray, "T P 2"]
    anchors: Float[np.ndarray, "3 2"]  # three points of the picture
    targets: Float[np.ndarray, "T 3 2"]  # their positions in each frame

    def draw(self, canvas: UInt8[np.ndarray, "H W 3"], t: int) -> None:
        """Paints frame `t`."""
        turn = cv2.getAffineTransform(self.anchors, self.targets[t])
        warped = cv2.warpAffine(self.picture, turn, (CANVAS, CANVAS), borderMode=cv2.BORDER_REPLICATE)
        mask = np.zeros((CANVAS, CANVAS), np.uint8)
        cv2.fillPoly(mask, [self.corners[t]], 255, shift=SUBPIXEL)
        cv2.copyTo(warped, mask, canvas)


class Head:
    """Projects points on a head to canvas pixels for every frame, and collects the picture's parts, back to front."""

    def __init__(self, look: Look, motion: Motion):
        self.look, self.motion = look, motion
        self.parts: list[Polygon | Texture] = []

    def place(self, points: Float[np.ndarray, "*T P 3"]) -> Float[np.ndarray, "T P 2"]:
        """Turns points by yaw, then pitch, then roll, and projects them. Points without T apply to every frame."""
        yaw, pitch, roll = (a[:, None] for a in (self.motion.yaw, self.motion.pitch, self.motion.roll))
        x, y, z = np.moveaxis(points, -1, 0)
        x, z = x * np.cos(yaw) + z * np.sin(yaw), z * np.cos(yaw) - x * np.sin(yaw)
        y = y * np.cos(pitch) + (z + 0.25) * np.sin(pitch)
        return self._film(x, y, roll)

    def outline(self, points: Float[np.ndarray, "P 2"]) -> Float[np.ndarray, "T P 2"]:
        """Places the silhouette of head or hair; its width stays as the head turns, only the jaw moves along."""
        yaw, pitch, roll = (a[:, None] for a in (self.motion.yaw, self.motion.pitch, self.motion.roll))
        x, y = points[:, 0], points[:, 1]
        low = np.clip((y + 0.1) / 1.3, 0, 1)
        x = x * (1 - 0.12 * np.abs(np.sin(yaw))) + 0.42 * low * np.sin(yaw)
        y = y * (1 - 0.1 * np.abs(np.sin(pitch))) + (0.25 + 0.3 * low) * np.sin(pitch)
        return self._film(x, y, roll)

    def still(self, points: Float[np.ndarray, "P 2"]) -> Float[np.ndarray, "T P 2"]:
        """Places parts that do not move with the head."""
        return self._film(points[:, 0], points[:, 1], np.zeros((len(self.motion.yaw), 1)))

    def _film(self, x, y, roll) -> Float[np.ndarray, "T P 2"]:
        x, y = x * np.cos(roll) - y * np.sin(roll), x * np.sin(roll) + y * np.cos(roll)
        return np.stack([x * self.look.face_width, y], -1) * self.look.scale + np.asarray(self.look.center)

    def fill(self, pixels: Float[np.ndarray, "T P 2"], color: Color, visible=None) -> None:
        """Adds a filled polygon; `visible` [T] selects its frames."""
        self.parts.append(Polygon(fixed(pixels), color, visible=visible))

    def face(self, points: Float[np.ndarray, "*T P 2"], color: Color, visible=None) -> None:
        """Adds a filled polygon on the front of the face."""
        self.fill(self.place(surface(points)), color, visible)

    def line(self, points: Float[np.ndarray, "*T P 2"], color: Color, width: float, closed=False, visible=None) -> None:
        """Adds a line on the front of the face, `width` head units thick."""
        thickness = max(1, round(width * self.look.scale))
        self.parts.append(Polygon(fixed(self.place(surface(points))), color, thickness, closed, visible))

    def texture(self, picture: UInt8[np.ndarray, "H W 3"], outline: Float[np.ndarray, "T P 2"]) -> None:
        """Adds a picture of the face's front, clipped to `outline`."""
        corners = np.array([[-0.5, 0.0], [0.5, 0.0], [0.0, 0.6]])
        anchors = (corners * TEXTURE_UNIT + CANVAS / 2).astype(np.float32)
        targets = self.place(surface(corners)).astype(np.float32)
        self.parts.append(Texture(picture, fixed(outline), anchors, targets))

    def frames(self) -> UInt8[np.ndarray, "T h w 3"]:
        """Paints all parts over the background: RGB frames of SIZE x SIZE pixels."""
        painted = []
        for t in range(len(self.motion.yaw)):
            canvas = self.look.background.copy()
            for part in self.parts:
                part.draw(canvas, t)
            painted.append(cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA))
        return np.stack(painted)


def draw_shapes(scene: Shapes, frames: int = FRAMES) -> UInt8[np.ndarray, "T h w 3"]:
    """Draws one general clip: RGB frames of SIZE x SIZE pixels."""
    corners = {"circle": 24, "square": 4, "triangle": 3, "star": 10}[scene.shape]
    radius = scene.radius * np.where(np.arange(corners) % 2, 0.45 if scene.shape == "star" else 1.0, 1.0)
    upright = -np.pi / 2 + (np.pi / 4 if scene.shape == "square" else 0)
    painted = []
    for t in range(frames):
        canvas = scene.background.copy()
        angle = np.linspace(0, 2 * np.pi, corners, endpoint=False) + upright + scene.spin * t / frames
        outline = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
        for center in scene.middle + np.asarray(scene.step) * (t - (frames - 1) / 2):
            cv2.fillPoly(canvas, [fixed((center + outline) * CANVAS)], scene.color, cv2.LINE_AA, shift=SUBPIXEL)
        painted.append(cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA))
    return np.stack(painted)
