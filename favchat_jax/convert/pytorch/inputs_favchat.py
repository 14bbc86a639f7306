"""Inputs of FaVChat in PyTorch: a video's sampled frames, the conversation's tokens, the Q-Formers' prompt."""

import io
import os

import numpy as np
import torch
from tokenizers import Tokenizer

try:
    import av
    from av.video.reformatter import Interpolation, VideoReformatter
except ImportError:  # PyAV is only needed to read a video
    av = None


SMALLEST_SIDE = 8  # pixels; swscale's chroma filters fail below this, and such pictures show nothing


def frame_indices(total, frames):
    """Returns the middle frame of each of `frames` equal intervals of `total`; a short video repeats its last frame."""
    taken = min(total, frames)
    edges = [int(i * (total / taken)) for i in range(taken)] + [total]
    indices = [(begin + end - 1) // 2 for begin, end in zip(edges[:-1], edges[1:], strict=True)]
    return indices + indices[-1:] * (frames - taken)


def read_frames(video, frames, size):
    """Reads sampled frames of a video (path or bytes), upright, RGB, squashed: uint8 [frames, size, size, 3].

    The first pass counts the frames by their packets; the second decodes up to the last sampled frame. A frame that
    cannot be decoded is replaced by the one before it.

    Raises:
        ValueError: no frame can be decoded, or the picture is too small.
    """
    if av is None:
        raise ImportError("reading a video needs PyAV: pip install 'av>=18', or pass the frames as an array")
    with _open(video) as container:
        packets = [packet for packet in _packets(container) if packet.size and not packet.is_discard]
        times = [packet.pts for packet in packets]
    if not times:
        raise ValueError(f"{_name(video)} holds no video frames (only sound, or nothing): give a video file")
    # Packets come in decoding order, and their times give the display order; frames of raw streams have no times.
    numbers = None if None in times else {time: number for number, time in enumerate(sorted(times))}
    wanted = frame_indices(len(times), frames)
    found, resize, reformatter = {}, None, VideoReformatter()
    with _open(video) as container:
        for count, frame in enumerate(_decoded(container)):
            number = count if numbers is None else numbers.get(frame.pts)
            if min(frame.width, frame.height) < SMALLEST_SIDE:
                small, limit = f"{frame.width}x{frame.height}", f"{SMALLEST_SIDE}x{SMALLEST_SIDE}"
                raise ValueError(f"{_name(video)} is {small} pixels: give a video of at least {limit}")
            if number in wanted and number not in found:
                resize = resize or _upright(frame, size, reformatter)
                found[number] = resize(frame)
            if len(found) == len(set(wanted)):
                break
    if not found:
        raise ValueError(f"no frame of {_name(video)} can be decoded, so the file is damaged: give an intact file")
    return torch.from_numpy(np.stack([found[_nearest(found, number)] for number in wanted]))


def _nearest(found, number):
    before = [other for other in found if other <= number]
    return max(before) if before else min(found)


def _name(video):
    return "the video" if isinstance(video, bytes) else os.fspath(video)


def _open(video):
    try:
        # "file:" keeps a colon in a name from being read as a protocol; the white list keeps playlists off the network.
        source = io.BytesIO(video) if isinstance(video, bytes) else f"file:{os.fspath(video)}"
        # PyAV 18 cannot open a file whose metadata are not UTF-8 without this; PyAV 19 can, and has no such argument.
        lenient = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
        return av.open(source, options={"protocol_whitelist": "file"}, **lenient)
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"{_name(video)} cannot be read as a video ({error.strerror}): give a video file") from error


def _packets(container):
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:  # a cover picture is not a video
            break
    else:
        return
    try:
        yield from container.demux(stream)
    except av.error.InvalidDataError:
        return  # a truncated file: its first part is still usable


def _decoded(container):
    for packet in _packets(container):
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:  # a damaged part: the frames around it may still be usable
            continue


def _upright(frame, size, reformatter):
    """Returns a function that turns each decoded frame of the clip of `frame` into an upright square."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    matrix = [1, 0, 0, 0, 1] if matrix is None else np.frombuffer(matrix, np.int32).tolist()
    x_axis, y_axis = (matrix[0], matrix[1]), (matrix[3], matrix[4])
    turned = abs(x_axis[1]) > abs(x_axis[0])
    if turned:
        x_axis, y_axis = y_axis, x_axis
    across, down = (-1 if x_axis[0] < 0 else 1), (-1 if y_axis[1] < 0 else 1)

    def resize(frame):
        # Full chroma resolution keeps small coloured detail.
        same = (frame.width, frame.height) == (size, size)
        how = Interpolation.BICUBIC if same else Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT
        picture = reformatter.reformat(frame, size, size, "rgb24", interpolation=how, threads=1).to_ndarray()
        return (picture.swapaxes(0, 1) if turned else picture)[::down, ::across]

    return resize


class Prompts:
    """Tokenises VideoChat2-Mistral's conversation, and the question for the Q-Formers.

        <s> [INST] <Video> (visual tokens) </Video> [/INST] [INST] question [/INST] answer </s> [INST] question ...

    Every part is tokenised separately; visual tokens have the id -1.

    Args:
        tokenizer: the language model's transformers fast tokenizer, with bos and eos tokens.
        prompt_tokenizer: the Q-Formers' tokenizer.
        visual_tokens: number of visual tokens of a clip.
        prompt_length: number of question tokens that a Q-Former reads.
        longest: longest conversation in tokens, including the answer.
    """

    def __init__(self, tokenizer, prompt_tokenizer, visual_tokens, prompt_length, longest):
        self.tokenizer, self.visual_tokens = tokenizer, visual_tokens
        self.prompt_length, self.longest = prompt_length, longest
        self._engine, self._prompt_engine = _detached(tokenizer), _detached(prompt_tokenizer)
        # Some tokenizers add the space before the first word themselves.
        first = self._engine.encode("a", add_special_tokens=False).tokens[0]
        self._space = "" if first[:1] in ("▁", "Ġ") else " "
        # The template may use special tokens ([INST] is one in Mistral v0.3); text from users must not.
        words = ("[INST]", "[/INST]", "<Video>", "</Video>", "<Image>", "</Image>")
        self._words = {word: self._ids(word) for word in words}
        self._engine.encode_special_tokens = self._prompt_engine.encode_special_tokens = True
        self._start = [] if prompt_tokenizer.cls_token_id is None else [prompt_tokenizer.cls_token_id]
        self._end = [] if prompt_tokenizer.sep_token_id is None else [prompt_tokenizer.sep_token_id]
        self._pad = prompt_tokenizer.pad_token_id or 0

    def conversation(self, turns, question, frames, answer=0):
        """Returns the token ids [L] up to the start of the answer; a clip of one frame is an `<Image>`.

        Raises:
            ValueError: the conversation and an answer of `answer` tokens exceed the language model's context.
        """
        begin, end, words = "[INST]", "[/INST]", self._words
        kind = "Image" if frames == 1 else "Video"
        ids = [self.tokenizer.bos_token_id, *words[begin], *words[f"<{kind}>"], *[-1] * self.visual_tokens]
        ids += words[f"</{kind}>"] + words[end]
        for asked, answered in turns:
            ids += words[begin] + self._ids(asked) + words[end] + self._ids(answered) + [self.tokenizer.eos_token_id]
        ids += words[begin] + self._ids(question) + words[end]
        if len(ids) + answer > self.longest:
            needed = f"{len(ids)} tokens and the answer's {answer}"
            raise ValueError(f"the conversation needs {needed}, over the limit of {self.longest}: shorten the text")
        return torch.tensor(ids)

    def for_qformer(self, question):
        """Returns the question's token ids [P], cut on the left and padded on the right, and their mask."""
        room = self.prompt_length - len(self._start) - len(self._end)
        ids = self._prompt_engine.encode(question.strip(), add_special_tokens=False).ids
        ids = [*self._start, *ids[max(len(ids) - room, 0) :], *self._end]
        padded = torch.tensor(ids + [self._pad] * (self.prompt_length - len(ids)))
        return padded, torch.arange(self.prompt_length) < len(ids)

    def text(self, tokens):
        """Decodes generated tokens up to the first `</s>`."""
        tokens = tokens.tolist()
        if self.tokenizer.eos_token_id in tokens:
            tokens = tokens[: tokens.index(self.tokenizer.eos_token_id)]
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _ids(self, text):
        return self._engine.encode(self._space + text.strip(), add_special_tokens=False).ids


def _detached(tokenizer):
    """Copies the tokenizer's engine, so that later changes of its settings have no effect here."""
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy
