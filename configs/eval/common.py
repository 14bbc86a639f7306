"""Defines the settings that all benchmarks share."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(benchmark: str) -> ConfigDict:
    """Returns the common part of a benchmark's config; the benchmark's file adds its own fields."""
    config = ConfigDict({"benchmark": benchmark})
    config.seed = 0  # of confidence intervals and random draws
    config.batch = 8  # clips answered in one batch
    config.questions = 1  # most questions per clip that are answered together
    config.limit = 0  # number of clips (per fold), pairs or questions; 0 for all
    config.description_tokens = 200  # most tokens of a description for class inference or by a describer
    config.data = ConfigDict({"root": ""})  # folder of the data set in its published layout
    # Whether the facial encoder reads the face of each clip, which is found and followed, or whole frames, and how
    # faces are found. None: as the checkpoint was trained.
    config.data.face_crop = placeholder(bool)
    config.data.detector = placeholder(str)  # centerface, or scrfd with its file in detector_model
    config.data.detector_model = placeholder(str)
    config.data.smallest_face = placeholder(float)  # of the picture's shorter side; smaller faces count as none
    config.data.align_faces = placeholder(bool)  # whether the crop turns with the line between the eyes
    # For --model=openai:URL#NAME. The server receives the frames squashed to squares, as FaVChat sees them.
    config.server = ConfigDict({"frames": 16, "size": 448, "parallel": 8, **_client()})
    config.judge = judge()
    config.second_judge = judge()  # to measure the agreement of two judges
    return config


def judge() -> ConfigDict:
    """Returns the settings of a language model that scores answers; an empty `model` means no judge."""
    return ConfigDict(
        {
            "url": "https://api.openai.com/v1",
            "model": "",
            "cache": "runs/judge.jsonl",  # stored replies, so that no question is paid for twice
            "parallel": 8,
            "attempts": 3,  # to get a reply in the requested JSON
            "json_mode": True,  # ask the server for JSON; some servers lack this option
            "price_in": 0.0,  # per million tokens, for the cost in the result
            "price_out": 0.0,
            **_client(),
        }
    )


def _client() -> dict:
    # The name of the variable, not the key, since each result contains its config.
    return {"timeout": 120.0, "retries": 5, "key_variable": "OPENAI_API_KEY"}
