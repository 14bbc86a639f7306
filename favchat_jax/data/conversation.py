"""Tokenises questions and answers: VideoChat2-Mistral's conversation, and the prompt of the Q-Former.

    <s> [INST] <Video> (visual tokens) </Video> [/INST] [INST] question [/INST] answer </s> [INST] question ...

Source: Ask-Anything, video_chat2/dataset/it_dataset_mistral.py and models/videochat_mistra/videochat2_it_mistral.py.
There are three deliberate differences: the sequence starts with the real `<s>` (there: a constant vector), `</s>`
follows the answer without a token for the space between them, and a later turn begins like the first (there: with one
more space). Every part is tokenised separately, so the loss mask is exact, and a prompt for generation is exactly the
beginning of a training sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int32
from tokenizers import Tokenizer

from favchat_jax.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VISUAL_PLACEHOLDER = -1  # token id that the model replaces by a visual token's vector


class ContextError(UserError):
    """Raised where a conversation is longer than the context; `length` is the conversation's in tokens."""

    def __init__(self, message: str, length: int):
        super().__init__(message)
        self.length = length


@dataclass(frozen=True)
class Encoded:
    """A tokenised conversation; `loss_mask` marks the tokens to be learned: answers and the `</s>` after each."""

    tokens: Int32[np.ndarray, " L"]
    loss_mask: Bool[np.ndarray, " L"]


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Loads the transformers fast tokenizer of a Hugging Face folder (`tokenizer.json`, `tokenizer_config.json`).

    Raises:
        UserError: the folder or its tokenizer.json is missing or cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"tokenizer folder {folder} does not exist: give a folder that holds a tokenizer.json")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} holds no tokenizer.json: give a Hugging Face model's folder with a tokenizer.json")
    from transformers import PreTrainedTokenizerFast  # imported here, since the loader's workers do not need it

    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(f"the tokenizer in {folder} cannot be read ({one_line(error)}): download it again") from error


class Conversation:
    """Builds token sequences for one tokenizer and one number of visual tokens; can be pickled.

    Args:
        tokenizer: a transformers fast tokenizer with `<s>` and `</s>` (bos and eos tokens).
        visual_tokens: N, the number of placeholders for a clip.
        times: whether to add VideoChat2's sentence about the number and times of the sampled frames.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, visual_tokens: int, times: bool = False):
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no bos or eos token: set both in its tokenizer_config.json")
        self.visual_tokens = visual_tokens
        self.times = times
        self.bos: int = tokenizer.bos_token_id
        self.eos: int = tokenizer.eos_token_id
        self.pad: int = self.eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._tokenizer = _detached(tokenizer)
        # Some tokenizers add the space before the first word themselves.
        first = self._tokenizer.encode("a", add_special_tokens=False).tokens[0]
        self._space = "" if first[:1] in ("▁", "Ġ") else " "
        # The template may use special tokens ([INST] is one in Mistral v0.3); text from users must not.
        words = ("[INST]", "[/INST]", "<Video>", "</Video>", "<Image>", "</Image>")
        self._words = {word: self._ids(word) for word in words}
        self._tokenizer.encode_special_tokens = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = True  # pickling loses it

    def encode(
        self,
        turns: Sequence[tuple[str, str | None]],
        frames: int,
        max_length: int,
        seconds: Float[np.ndarray, " T"] | None = None,
    ) -> Encoded:
        """Tokenises a conversation about one clip.

        Args:
            turns: (question, answer) pairs. A last answer of None makes a prompt for generation.
            frames: number of frames of the clip; a single frame is an `<Image>`.
            max_length: longest allowed sequence, including visual tokens. Text is never cut.
            seconds: times of the frames; required with `times=True`.

        Raises:
            ContextError: the conversation is longer than `max_length`.
            UserError: a question or answer is empty or holds what is no character.
        """
        pieces = [(self._opening(frames, seconds), False)]
        for number, (question, answer) in enumerate(turns):
            if answer is None and number != len(turns) - 1:
                raise ValueError("only the last answer can be left open")
            pieces += self._turn(question, answer)
        length = sum(len(ids) for ids, _ in pieces)
        if length > max_length:
            raise ContextError(self._too_long(turns, length, max_length), length)
        return Encoded(
            tokens=np.array([token for ids, _ in pieces for token in ids], np.int32),
            loss_mask=np.repeat([learned for _, learned in pieces], [len(ids) for ids, _ in pieces]),
        )

    def _opening(self, frames: int, seconds: Float[np.ndarray, " T"] | None) -> list[int]:
        kind = "Image" if frames == 1 else "Video"
        opening = [self.bos, *self._words["[INST]"], *self._words[f"<{kind}>"]]
        closing = list(self._words[f"</{kind}>"])
        if self.times and frames > 1:
            if seconds is None:
                raise ValueError("the sentence about sampling times needs the frames' seconds")
            listed = ", ".join(str(round(float(second), 1)) for second in seconds)
            closing += self._ids(f"The video contains {len(seconds)} frames sampled at {listed} seconds.")
        slot = [VISUAL_PLACEHOLDER] * self.visual_tokens
        return opening + slot + closing + self._words["[/INST]"]

    def _turn(self, question: str, answer: str | None) -> list[tuple[list[int], bool]]:
        if not question.strip():
            raise UserError("the question is empty: ask something")
        asked = self._words["[INST]"] + self._ids(question) + self._words["[/INST]"]
        if answer is None:
            return [(asked, False)]
        if not answer.strip():
            raise UserError(f"the answer to {question.strip()!r} is empty: give its text")
        return [(asked, False), ([*self._ids(answer), self.eos], True)]

    def _ids(self, text: str) -> list[int]:
        return _token_ids(self._tokenizer, self._space + text.strip())

    def _too_long(self, turns: Sequence[tuple[str, str | None]], length: int, max_length: int) -> str:
        question, answer = turns[-1]
        asked, answered = len(self._ids(question)), len(self._ids(answer)) if answer else 0
        rest, parts = length - asked - answered, f"the question is {asked} tokens long, its answer {answered}"
        if len(turns) > 1:
            earlier = sum(len(self._ids(text)) for turn in turns[:-1] for text in turn if text)
            rest, parts = rest - earlier, f"{parts}, earlier turns {earlier}"
        advice = "shorten the text" if len(turns) == 1 else "shorten the text or leave out earlier turns"
        return f"{parts}, the clip and the rest {rest}: {length} in all, over the limit of {max_length}; {advice}"


class PromptEncoder:
    """Tokenises the question for the Q-Former to a fixed length, cutting its start like BLIP-2; can be pickled.

    If the tokenizer has start and end tokens ([CLS] and [SEP] of BERT), they enclose the text. BLIP-2's added [DEC] is
    only part of the vocabulary and never written.

    Args:
        tokenizer: a transformers fast tokenizer (bert-base-uncased's at paper size).
        length: L_prompt, the number of tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, length: int):
        self.length = length
        self._tokenizer = _detached(tokenizer)
        self._tokenizer.encode_special_tokens = True
        self._start = [] if tokenizer.cls_token_id is None else [tokenizer.cls_token_id]
        self._end = [] if tokenizer.sep_token_id is None else [tokenizer.sep_token_id]
        self._pad = tokenizer.pad_token_id or 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = True  # pickling loses it

    def encode(self, question: str) -> tuple[Int32[np.ndarray, " P"], Bool[np.ndarray, " P"]]:
        """Returns token ids, padded on the right, and the mask of those that are not padding."""
        ids = [*self._start, *self._ids(question)[self.cut(question) :], *self._end]
        padded = np.full(self.length, self._pad, np.int32)
        padded[: len(ids)] = ids
        return padded, np.arange(self.length) < len(ids)

    def cut(self, question: str) -> int:
        """Returns how many tokens at the start of a question are cut off."""
        room = self.length - len(self._start) - len(self._end)
        return max(len(self._ids(question)) - room, 0)

    def check_whole(self, questions: Iterable[str]) -> None:
        """Raises UserError if the start of one of the questions is cut off."""
        for question in questions:
            if cut := self.cut(question):
                raise UserError(
                    f"data.prompt_length={self.length} cuts the first {cut} tokens off {question!r}: "
                    f"give at least {self.length + cut}"
                )

    def _ids(self, question: str) -> list[int]:
        return _token_ids(self._tokenizer, question.strip())


def _token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except TypeError:  # half of a surrogate pair: bytes of another encoding, or a damaged text
        raise UserError(f"{ascii(text.strip())} is not text in UTF-8: write it in UTF-8") from None


def _detached(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Copies the tokenizer's engine, so that later changes of its settings have no effect here."""
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy
