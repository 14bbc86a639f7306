"""Configuration of FaVChat in PyTorch: Mistral's fields and the sizes of the visual parts."""

from transformers import MistralConfig


class FaVChatConfig(MistralConfig):
    """FaVChat's configuration: the fields of `MistralConfig` for the language model, and those below.

    The defaults are the paper's.

    Args:
        variant: v1 (gated mixture) or v2 (the question guides CA2, Q-Formers and weight adapters).
        ablation: none, no_face, no_granularity or no_moe (the paper's Table 6).
        frames: number of frames sampled from a clip.
        image_size: side of a frame in pixels.
        prompt_length: number of question tokens that a Q-Former reads; longer questions are cut on the left.
        umt: general encoder: width, heads, patch, layers_run, and the frames of its position table (side, number).
        no_face_taps: in `no_face`, the general encoder's blocks (1-based) that replace the facial encoder's.
        facexformer: facial encoder: width of its first stage, depths, heads, window, patch.
        fusion: heads of Eq. 2 or CA2, and whether each step adds its query (False is the printed equation).
        qformer: both Q-Formers: width, depth, heads, mlp, queries, extra_queries, vocabulary, dropout, prompt.
        adapter: hidden width of v1's gate and experts, and of v2's weight adapters and MLPs after the Q-Formers.
    """

    model_type = "favchat"

    def __init__(
        self,
        variant="v1",
        ablation="none",
        frames=16,
        image_size=224,
        prompt_length=64,
        umt=None,
        no_face_taps=(6, 12, 18, 23),
        facexformer=None,
        fusion=None,
        qformer=None,
        adapter=None,
        **mistral,
    ):
        self.variant, self.ablation = variant, ablation
        self.frames, self.image_size, self.prompt_length = frames, image_size, prompt_length
        self.umt = {"width": 1024, "heads": 16, "patch": 16, "layers_run": 23}
        self.umt |= {"checkpoint_size": 224, "checkpoint_frames": 4, **(umt or {})}
        self.no_face_taps = list(no_face_taps)
        self.facexformer = {"width": 128, "depths": [2, 2, 18, 2], "heads": [4, 8, 16, 32], "window": 7, "patch": 4}
        self.facexformer |= facexformer or {}
        self.fusion = {"heads": 16, "residual": True, **(fusion or {})}
        self.qformer = {"width": 768, "depth": 12, "heads": 12, "mlp": 3072, "queries": 32, "extra_queries": 64}
        self.qformer |= {"vocabulary": 30523, "dropout": 0.1, "prompt": True, **(qformer or {})}
        self.adapter = {"hidden": 1024, **(adapter or {})}
        super().__init__(**mistral)
