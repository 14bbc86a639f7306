"""Converts decoded frames to 8-bit RGB of standard dynamic range: colour matrix, size and tone mapping of HDR."""

from __future__ import annotations

import functools

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc, Interpolation, VideoReformatter
from jaxtyping import Float, UInt8, UInt16

# The matrices that swscale converts from, by FFmpeg's AVColorSpace. The nearest stands in for BT.2020 with constant
# luminance (10). Frames with another one are taken for untagged.
MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}
READABLE = {0, 2, *MATRICES} - {10}  # the tags that swscale reads by itself; 0 is RGB, and 2 untagged
HD = (1280, 577)  # columns or lines from which an untagged frame has BT.709's colours, as players assume
HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)  # PQ and HLG
WHITE, PEAK = 203.0, 1000.0  # cd/m2: an HDR picture's diffuse white (ITU-R BT.2408), and the brightest light mapped
FROM_BT2020 = np.array(  # linear light of BT.2020's primaries to BT.709's (ITU-R BT.2087)
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)  # of BT.2020's primaries
M1, M2, C1, C2, C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128  # of PQ (SMPTE ST 2084)


def to_rgb(
    reformatter: VideoReformatter, frame: av.VideoFrame, width: int, height: int, interpolation: Interpolation
) -> UInt8[np.ndarray, "height width 3"]:
    """Returns a frame as RGB of the given size.

    Untagged frames have BT.601's colours below HD and BT.709's from there on. HDR is mapped to standard range.
    """
    hdr, matrix = is_hdr(frame), matrix_of(frame)
    picture = reformatter.reformat(
        frame,
        width,
        height,
        "rgb48le" if hdr else "rgb24",
        src_colorspace=matrix,
        dst_colorspace=matrix,
        interpolation=interpolation,
        threads=1,
    ).to_ndarray()
    return tone_mapped(picture, frame.color_trc, frame.color_primaries) if hdr else picture


def is_hdr(frame: av.VideoFrame) -> bool:
    """Returns whether a frame has high dynamic range, by its tag."""
    return frame.color_trc in HDR


def matrix_of(frame: av.VideoFrame) -> Colorspace | None:
    """Returns the matrix with which a frame is converted to RGB, or None for RGB."""
    if frame.format.is_rgb:
        return None
    high = frame.width >= HD[0] or frame.height >= HD[1]
    return MATRICES.get(int(frame.colorspace), Colorspace.ITU709 if high else Colorspace.ITU601)


def tone_mapped(signal: UInt16[np.ndarray, "H W 3"], transfer: int, primaries: int) -> UInt8[np.ndarray, "H W 3"]:
    """Maps a PQ or HLG picture to standard range: ITU-R BT.2390's curve on the largest component, for 203 cd/m2.

    Args:
        signal: RGB, full range.
        transfer: `ColorTrc.SMPTE2084` (PQ) or `ColorTrc.ARIB_STD_B67` (HLG, for a display of 1000 cd/m2).
        primaries: FFmpeg's AVColorPrimaries; BT.709's stay, all others are taken for BT.2020's.
    """
    light = _light_table(transfer)[signal]
    if transfer == ColorTrc.ARIB_STD_B67:  # the light of the scene; the display's is brighter where it is bright
        light = PEAK * light * (light @ LUMINANCE)[..., None] ** 0.2
    brightest = light.max(axis=-1, keepdims=True)
    steps, mapped = _curve()
    light *= np.interp(brightest, steps, mapped).astype(np.float32) / np.maximum(brightest, 1e-6)
    if primaries != ColorPrimaries.BT709:
        light = light @ FROM_BT2020.T
    return np.rint(255 * (light / WHITE).clip(0, 1) ** (1 / 2.4)).astype(np.uint8)  # for a display of BT.1886


@functools.cache
def _light_table(transfer: int) -> Float[np.ndarray, " 65536"]:
    """Returns the light of every 16-bit signal: in cd/m2 for PQ, as a share of the scene's largest for HLG."""
    signal = np.arange(65536) / 65535
    if transfer == ColorTrc.SMPTE2084:
        return _pq_light(signal).astype(np.float32)
    a, b, c = 0.17883277, 0.28466892, 0.55991073  # ITU-R BT.2100, table 5
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12).astype(np.float32)


def _pq_light(signal: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Returns the light in cd/m2 of PQ signals from 0 to 1."""
    root = signal ** (1 / M2)
    return 10000 * (np.maximum(root - C1, 0) / (C2 - C3 * root)) ** (1 / M1)


def _pq_signal(light: float) -> float:
    power = (light / 10000) ** M1
    return ((C1 + C2 * power) / (1 + C3 * power)) ** M2


@functools.cache
def _curve() -> tuple[Float[np.ndarray, " 1024"], Float[np.ndarray, " 1024"]]:
    """Returns BT.2390's roll-off (section 5.4.1) as light before and after, in cd/m2, up to PEAK and over it."""
    share = np.linspace(0, 1, 1023)  # of the PQ signal of PEAK
    peak = _pq_signal(PEAK)
    top = _pq_signal(WHITE) / peak
    knee = 1.5 * top - 0.5
    t = (share - knee) / (1 - knee)
    rolled = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * top
    before, after = _pq_light(share * peak), _pq_light(np.where(share < knee, share, rolled) * peak)
    return np.append(before, 10000.0), np.append(after, WHITE)
