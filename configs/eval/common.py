"""What the configs of all benchmarks share."""

from ml_collections import ConfigDict


def get_config(benchmark: str) -> ConfigDict:
    """A benchmark's config; its own fields follow in its file."""
    config = ConfigDict({"benchmark": benchmark})
    config.seed = 0  # of intervals and of what is drawn
    config.batch = 8  # clips that are answered together
    config.questions = 1  # of a clip, at most, answered together
    config.limit = 0  # clips (of a fold), pairs or questions; 0 for all
    config.description_tokens = 200  # longest description that a class is inferred from, or that a describer gives
    config.data = ConfigDict({"root": ""})  # folder of the data set, as it is published
    # For --model=openai:URL#NAME. Frames are what the server is sent, squashed to squares as FaVChat sees them.
    config.server = ConfigDict({"frames": 16, "size": 448, "parallel": 8, **_client()})
    config.judge = judge()
    config.second_judge = judge()  # to see how far two judges agree
    return config


def judge() -> ConfigDict:
    """A language model that scores answers; none where `model` is empty."""
    return ConfigDict(
        {
            "url": "https://api.openai.com/v1",
            "model": "",
            "cache": "runs/judge.jsonl",  # replies that are kept, so that no question is paid for twice
            "parallel": 8,
            "attempts": 3,  # at a reply that is the JSON asked for
            "json_mode": True,  # ask the server for JSON; some know no such option
            "price_in": 0.0,  # of a million tokens, for the cost in the result
            "price_out": 0.0,
            **_client(),
        }
    )


def _client() -> dict:
    # The name, not the key: a config is written into each result.
    return {"timeout": 120.0, "retries": 5, "key_variable": "OPENAI_API_KEY"}
