"""Says where the embedded model is asked about a clip unlike all that it has learned from."""

from favchat_jax.config import Config
from favchat_jax.data.video import open_video
from favchat_jax.embedded.drawing import SIZE


def unlike_training(config: Config, video: str) -> str | None:
    """Returns a warning if the model has seen rendered faces only and the video has another size than theirs."""
    if config.data.name.partition("/")[0] != "rendered_faces":
        return None
    with open_video(video, video) as (_, stream):
        if (stream.width, stream.height) == (SIZE, SIZE):
            return None
    return "this model has seen rendered faces only, so its answers about other videos mean nothing"
