"""Data-Efficient GRPO, starting from the cold start (FaVChat v2): LoRA and the adapters learn from rewards.

python -m favchat_jax.train --config=configs/grpo.py
python -m favchat_jax.train --config=configs/grpo.py --config.rl.data_efficient=False --workdir=runs/tiny-v1/grpo-plain
python -m favchat_jax.train --config=configs/grpo.py:recipe=published --workdir=DIR    (the authors' public code)
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = ""):
    recipe, argument = common.split_recipe(argument)
    config = common.get_config("grpo", argument)
    # The paper's: AdamW with a cosine, its rate, weight decay and clipping.
    config.optimizer.learning_rate = 1e-6
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 5.0
    config.optimizer.warmup = 0.03  # a choice
    config.optimizer.floor = 0.0
    config.batch = 1  # samples per iteration
    # A token of a response reads all weights. Each device reads its share; `fsdp` would gather them for every token.
    config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": -1})
    config.steps = 10_000  # iterations
    config.checkpoint_every = 100
    config.rl = ConfigDict(
        {
            "group": 8,  # G, responses per sample
            "beta": 0.04,  # weight of the KL penalty
            "clip": 0.2,  # a choice: the usual value
            "updates": 1,  # per batch of responses
            "max_new_tokens": 768,  # of a response
            "temperature": 1.0,
            "top_p": 1.0,
            # Import path and weight of each reward; you can add your own.
            "rewards": {
                "facial": {"path": "favchat_jax.rl.rewards:facial", "weight": 1.0},
                "form": {"path": "favchat_jax.rl.rewards:form", "weight": 1.0},
            },
            # Draw responses with a merged copy of the language model, which is faster but takes its memory again.
            "merged_rollouts": config.preset != "paper",
            "shuffled_frames": False,  # also respond to shuffled frames, which the temporal reward needs
            "prompt": "description",  # or question: each question of a clip, with a request to think first
            "data_efficient": True,  # False: plain GRPO over shuffled epochs
            "utility": "scale_free",  # or published: judgement and objective of the authors' code
            "pool": {
                "smoothing": 0.8,
                "tau_remove": 0.2,
                "tau_keep": 0.8,
                "discovery": 2,  # a choice: visits before a sample is judged
                "rest": 5,  # a choice: iterations for which a cooling sample rests
                "published_baseline": 0.0,  # of the published weights; there a value head that no loss trains
            },
            "split": "train",
            "samples": 10_000,  # the split's first samples that show a face and have all targets
            "heldout_split": "heldout",
            "heldout_samples": 64,
            "measure_every": 100,  # iterations
        }
    )
    if config.preset == "tiny":
        config.optimizer.name = "adamw"
        config.optimizer.learning_rate = 2e-4
        config.batch = 8
        config.steps = 100
        config.checkpoint_every = 25
        config.rl.max_new_tokens = 72
        config.rl.samples = 400
        config.rl.measure_every = 5
    if recipe == "published":
        _as_published(config)
    return config


def _as_published(config: ConfigDict) -> None:
    """Sets everything that differs in the authors' public code (github.com/heavenhellchen/FaVChat)."""
    config.optimizer.warmup = 0.0
    config.batch = 4  # one on each of four GPUs
    if config.preset != "tiny":
        config.steps = 2_500  # one epoch
    config.rl.update({"top_p": 0.95, "shuffled_frames": True, "prompt": "question", "utility": "published"})
    for name in ("facial", "form", "temporal", "length"):
        config.rl.rewards[name] = ConfigDict({"path": f"favchat_jax.rl.published:{name}", "weight": 1.0})
    # Room for the request to think. The embedded language model spells its words out.
    config.data.prompt_length = max(config.data.prompt_length, 192 if config.preset == "tiny" else 128)
    if config.preset == "tiny":
        config.data.buckets = (*config.data.buckets, 256)
