"""Inputs of FaVChat in PyTorch: the conversation's tokens and the Q-Formers' prompt."""

import warnings

import torch
from tokenizers import Tokenizer


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
        ids = _encoded(self._prompt_engine, question.strip())
        cut = max(len(ids) - room, 0)
        if cut:
            text = f"the Q-Formers miss the first {cut} tokens of this question, ask a shorter one: {question}"
            warnings.warn(text, stacklevel=2)
        ids = [*self._start, *ids[cut:], *self._end]
        padded = torch.tensor(ids + [self._pad] * (self.prompt_length - len(ids)))
        return padded, torch.arange(self.prompt_length) < len(ids)

    def text(self, tokens):
        """Decodes generated tokens up to the first `</s>`."""
        tokens = tokens.tolist()
        if self.tokenizer.eos_token_id in tokens:
            tokens = tokens[: tokens.index(self.tokenizer.eos_token_id)]
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _ids(self, text):
        return _encoded(self._engine, self._space + text.strip())


def _encoded(engine, text):
    try:
        return engine.encode(text, add_special_tokens=False).ids
    except TypeError:  # half of a surrogate pair
        raise ValueError(f"{ascii(text.strip())} is not text in UTF-8: write it in UTF-8") from None


def _detached(tokenizer):
    """Copies the tokenizer's engine, so that later changes of its settings have no effect here."""
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy
