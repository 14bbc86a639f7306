"""The processor of FaVChat in PyTorch: videos and questions in, the model's inputs out, and its tokens back as text."""

import importlib.util
import io
import os

import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import cached_file

from .faces_favchat import load_detector
from .inputs_favchat import Prompts
from .video_favchat import Finder, read_frames


class FaVChatProcessor(ProcessorMixin):
    """Prepares the arguments of the model's `generate`, and reads its answers.

        inputs = processor(videos="clip.mp4", text="What color is the hair?")
        print(processor.text(model.generate(**inputs, max_new_tokens=64)[0]))

    Args:
        tokenizer: the language model's.
        prompt_tokenizer: the Q-Formers'.
        frames: number of frames sampled from a clip.
        image_size: side of a frame in pixels.
        visual_tokens: number of visual tokens of a clip.
        prompt_length: number of question tokens that a Q-Former reads.
        longest: longest conversation in tokens, including the answer.
        face_crop: whether the facial encoder reads the face, which is found and followed, or the whole frame.
        detector: finds the faces; centerface or scrfd.
        detector_model: its ONNX file; by default centerface.onnx in the model's folder.
        smallest_face: height of the smallest face that counts, as a share of the picture's shorter side.
        align_faces: whether the crop turns with the line between the eyes.
    """

    def __init__(
        self,
        tokenizer,
        prompt_tokenizer,
        frames=16,
        image_size=224,
        visual_tokens=96,
        prompt_length=64,
        longest=32768,
        face_crop=False,
        detector="centerface",
        detector_model="",
        smallest_face=0.1,
        align_faces=False,
    ):
        super().__init__(tokenizer, prompt_tokenizer)
        self.frames, self.image_size = frames, image_size
        self.face_crop, self.detector, self.detector_model = face_crop, detector, detector_model
        self.smallest_face, self.align_faces, self._loaded = smallest_face, align_faces, None
        self.visual_tokens, self.prompt_length, self.longest = visual_tokens, prompt_length, longest
        self._prompts = Prompts(tokenizer, prompt_tokenizer, visual_tokens, prompt_length, longest)

    def __call__(
        self,
        images=None,
        text=None,
        videos=None,
        audio=None,
        *,
        turns=(),
        answer=0,
        face_crop=None,
        face=None,
        **options,
    ):
        """Returns `input_ids`, `attention_mask`, `frames`, `prompt_ids` and `prompt_mask` for B questions.

        Args:
            images: still pictures instead of `videos`.
            text: a question, or B questions.
            videos: a clip, or B clips in a list. A clip is the path of a file, its bytes, a PIL image, or an array of
                frames [T, H, W, 3] uint8, RGB.
            audio: unused.
            turns: earlier (question, answer) pairs, the same for all questions.
            answer: number of tokens to leave for the answer.
            face_crop: whether the facial encoder reads the face of a video; by default as the processor is set.
            face: which face it reads, from 1, the largest and longest; it implies `face_crop`.
            options: unused; pipelines pass them.

        Raises:
            ValueError: a video or a question is missing, empty or unreadable, or a conversation is too long.
        """
        clips, questions = _listed(videos if images is None else images), _listed(text)
        if not clips or len(clips) != len(questions):
            raise ValueError(f"{len(clips)} videos and {len(questions)} questions: give one question for each video")
        if not all(question.strip() for question in questions):
            raise ValueError("the question is empty: ask something")
        cropped = face is not None or (self.face_crop if face_crop is None else face_crop)
        frames = [self._frames(clip, (face or 0) if cropped else None) for clip in clips]
        rows = [self._prompts.conversation(turns, question, len(frames[0]), answer) for question in questions]
        prompts = [self._prompts.for_qformer(question) for question in questions]
        shape, pad = (len(rows), max(map(len, rows))), self.tokenizer.pad_token_id
        input_ids = torch.full(shape, self.tokenizer.eos_token_id if pad is None else pad)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for i, row in enumerate(rows):
            input_ids[i, -len(row) :] = row
            attention_mask[i, -len(row) :] = 1
        return BatchFeature(
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "frames": torch.stack(frames),
                "prompt_ids": torch.stack([ids for ids, _ in prompts]),
                "prompt_mask": torch.stack([mask for _, mask in prompts]),
            }
        )

    def text(self, tokens):
        """Decodes the tokens of one answer up to its first `</s>`."""
        return self._prompts.text(tokens)

    def post_process_image_text_to_text(self, generated_outputs, **options):
        """Decodes sequences of tokens for transformers' pipelines; visual tokens have no text."""
        return [self._prompts.text(row[row >= 0]) for row in generated_outputs]

    def _frames(self, clip, face):
        """Reads a clip; with a face (0 for the main one), three more channels hold it."""
        if hasattr(clip, "save"):  # a PIL image is read as the file that it would be
            file = io.BytesIO()
            clip.save(file, format="png")
            clip = file.getvalue()
        if isinstance(clip, (str, bytes, os.PathLike)):
            finder = None if face is None else Finder(self._detector(), face, self.smallest_face, self.align_faces)
            return read_frames(clip, self.frames, self.image_size, finder)
        return torch.as_tensor(clip)

    def _detector(self):
        if importlib.util.find_spec("cv2") is None:
            raise ImportError("face crops need OpenCV: pip install opencv-python-headless, or pass face_crop=False")
        if self._loaded is None:
            model = self.detector_model
            if self.detector == "centerface" and not model:
                try:
                    model = cached_file(self.tokenizer.name_or_path, "centerface.onnx")
                except OSError as error:
                    raise ValueError("the folder has no face detector: name one as `detector_model`") from error
            self._loaded = load_detector(self.detector, model)
        return self._loaded


def _listed(items):
    return list(items) if isinstance(items, (list, tuple)) else [] if items is None else [items]
