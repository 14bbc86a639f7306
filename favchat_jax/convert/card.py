"""Writes the texts of an export for PyTorch: its model card, the adapters' card and the packages that it needs."""

from pathlib import Path

from favchat_jax.config import Config

# Releases that the tests have passed with; PyAV 17 and older lack what reading a video needs.
REQUIREMENTS = """\
torch>=2.6,<3
transformers>=5,<6
safetensors>=0.6,<0.9
av>=18,<20
opencv-python-headless>=4.10,<6
"""


def model_card(config: Config, adapters: bool) -> str:
    """Returns the README.md of a run's export, with or without adapters."""
    model, ablation = config.model, "" if config.ablation == "none" else f", ablation {config.ablation}"
    adapter = "| `adapter/` | the same LoRA for PEFT, on the original language model (not for `llm/`) |\n" * adapters
    faces = (
        "The facial encoder reads the largest face of the clip, which is found and followed (CenterFace, MIT licence); "
        "the processor's `face=2` picks another, and `face_crop=False` shows it whole frames."
        if config.data.face_crop
        else "The facial encoder reads whole frames."
    )
    return f"""\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- video-text-to-text
---

# FaVChat {config.variant}, preset {config.preset}, {config.stage}{ablation}

A video language model for fine-grained questions about faces, trained with favchat_jax and exported to PyTorch.

It needs torch, transformers 5, for video files PyAV (`av>=18`) and for face crops OpenCV:
`pip install -r FOLDER/requirements.txt`.

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    print(model.answer("clip.mp4", "What color is the hair?"))

`answer` takes the path of a video or of a picture, or frames (uint8 [{model.frames}, {model.image_size}, \
{model.image_size}, 3], RGB), earlier turns, and what transformers' `generate` takes. {faces} The same in two steps:

    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    inputs = processor(videos="clip.mp4", text="What color is the hair?")
    print(processor.text(model.generate(**inputs, max_new_tokens=64)[0]))

| part | content |
|---|---|
| `llm/` | the language model with LoRA merged, a standard Mistral folder |
{adapter}| `visual.safetensors` | encoders, fusion, Q-Formers, mixture; published parts under their published names |
| `tokenizer.json` | the language model's tokenizer: `AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)` |
| `prompt_tokenizer/` | the tokenizer of the question that the Q-Formers read |
| `*_favchat.py` | the model and its processor |
"""


def adapter_card(base: str) -> str:
    """Returns the README.md of an export's adapters; `base` is the repository or the path of the language model."""
    repository = "" if Path(base).is_absolute() else f"base_model: {base}\n"
    return f"""\
---
library_name: peft
{repository}---

# LoRA of FaVChat's language model

`AutoPeftModelForCausalLM.from_pretrained("adapter")` puts it on its base, {base}.
If the base has another place on your machine, load it by hand:

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(BASE_FOLDER)
    model = PeftModel.from_pretrained(base, "adapter")

The folder `llm/` beside it has this LoRA merged already.
"""
