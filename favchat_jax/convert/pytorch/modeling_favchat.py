"""FaVChat in PyTorch, from a clip and a question to an answer.

    frames --> UMT --------------------------> e_g --> general Q-Former --> linear --+
          |                                     |                                     +--> mixture --> Mistral
          +--> FaceXFormer --> e_1..e_N --> fusion --> facial Q-Former --> linear ----+

Both Q-Formers read the question. In v2 fusion (CA2, without e_g) and mixture (weight adapters) also read it, and an MLP
follows each linear layer.

Modules have the names of the published weights, and the language model is transformers' Mistral. So the state dict is
the union of the exported `llm/` and `visual.safetensors`.
"""

import torch
from torch import nn
from transformers import MistralForCausalLM

from .configuration_favchat import FaVChatConfig
from .encoders_favchat import UMT, FaceXFormerEncoder, ProjectedMaps
from .guidance_favchat import PromptGuidedFusion, TokenMLP, WeightAdapters
from .processing_favchat import FaVChatProcessor
from .qformer_favchat import GatedMixture, GranularityFusion, QFormer, ScalarMixture, add_positions

# Published input normalisation of both encoders (ImageNet).
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


class FaVChatForConditionalGeneration(MistralForCausalLM):
    """Mistral with visual input: a clip's visual tokens replace the negative `input_ids`.

    Encoders and fusion run once per clip. Rows n*Q .. n*Q + Q - 1 of `input_ids` and `prompt_ids` are Q questions about
    clip n.
    """

    config_class = FaVChatConfig

    def __init__(self, config):
        super().__init__(config)
        if config.variant not in ("v1", "v2"):
            raise ValueError(f"variant={config.variant} is unknown: choose v1 or v2")
        if config.variant == "v2" and not config.qformer["prompt"]:
            raise ValueError("qformer.prompt=False leaves v2 without the question that guides it: choose variant=v1")
        width, hidden = config.umt["width"], config.hidden_size
        face, taps = config.facexformer, []
        widths = [face["width"] * 2**i for i in range(len(face["depths"]))]
        if config.ablation == "no_face":
            taps = config.no_face_taps
            widths = [width] * len(taps)
        else:
            self.backbone = FaceXFormerEncoder(**face)
        self.vision_encoder = nn.ModuleDict({"encoder": UMT(**config.umt, taps=taps)})
        self.vision_layernorm = nn.LayerNorm(width, eps=1e-12)
        if config.ablation == "no_granularity":  # FaceXFormer's own fusion replaces ours
            self.linear_c = ProjectedMaps(widths)
            self.linear_fuse = nn.Conv2d(256 * len(widths), 256, kernel_size=1, bias=False)
            self.fuse_proj = nn.Linear(256, width)
            self.fusion = None
        elif config.variant == "v1":
            self.fusion = GranularityFusion(widths, width, **config.fusion)
        else:
            self.fusion = PromptGuidedFusion(widths, width, config.qformer["width"], **config.fusion)
        for stream in ("general", "facial"):
            self._add_stream(stream, config.qformer, width)
        if config.ablation == "no_moe":
            self.adapter = ScalarMixture()
        elif config.variant == "v1":
            self.adapter = GatedMixture(hidden, **config.adapter)
        else:
            self.adapter = WeightAdapters(hidden, config.qformer["width"], **config.adapter)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """Loads like transformers, but raises ValueError for weights that are missing or do not belong to the model."""
        folder = pretrained_model_name_or_path
        model, loading = super().from_pretrained(folder, *args, output_loading_info=True, **kwargs)
        for verb, names in (("lack", loading["missing_keys"]), ("also hold", loading["unexpected_keys"])):
            if names:
                named = f"variant={model.config.variant}, ablation={model.config.ablation}"
                wrong = min(names) + (f" and {len(names) - 1} more weights" if len(names) > 1 else "")
                raise ValueError(f"{folder}: config.json says {named}, but its files {verb} {wrong}: export it again")
        return (model, loading) if output_loading_info else model

    def _add_stream(self, stream, sizes, visual_width):
        for name, count in (("query_tokens", sizes["queries"]), ("extra_query_tokens", sizes["extra_queries"])):
            if count:
                self.register_parameter(f"{stream}_{name}", nn.Parameter(torch.zeros(1, count, sizes["width"])))
        self.add_module(f"{stream}_qformer", QFormer(sizes, visual_width))
        self.add_module(f"{stream}_mistral_proj", nn.Linear(sizes["width"], self.config.hidden_size))
        if self.config.variant == "v2":
            self.add_module(f"{stream}_mlp", TokenMLP(self.config.hidden_size, **self.config.adapter))

    def encode(self, frames):
        """Runs both encoders and v1's fusion: uint8 frames [B, T, H, W, C] to general and facial tokens [B, S or F, D].

        Frames of six channels hold the face behind the whole picture. In v2 the facial tokens are a list for CA2, one
        tensor per block.
        """
        batch, time = frames.shape[:2]
        mean, std = (torch.tensor(channels, device=frames.device) for channels in (PIXEL_MEAN, PIXEL_STD))
        dtype = self.vision_layernorm.weight.dtype
        x, faces = (((part.float() / 255 - mean) / std).to(dtype) for part in (frames[..., :3], frames[..., -3:]))
        general, blocks = self.vision_encoder["encoder"](x)
        general = self.vision_layernorm(general)
        if self.config.ablation == "no_face":
            granularities = [block.unflatten(1, (time, -1)) for block in blocks]
        else:
            maps = self.backbone(faces.flatten(0, 1))
            granularities = [m.flatten(1, 2).unflatten(0, (batch, time)) for m in maps]
        if isinstance(self.fusion, PromptGuidedFusion):
            return general, self.fusion.read_blocks(granularities)
        if self.fusion is None:
            facial = self.fuse_proj(self.linear_fuse(self.linear_c(maps)).permute(0, 2, 3, 1))
            facial = facial.flatten(1, 2).unflatten(0, (batch, time))
        else:
            facial = self.fusion(general.unflatten(1, (time, -1)), granularities)
        return general, add_positions(facial)

    def visual_tokens(self, features, prompt_ids, prompt_mask):
        """Returns the visual tokens for each question [B*Q, N, D] and the streams' weights in them [B*Q, N, 2]."""
        general, facial = features
        prompt_mask, facial_mask = prompt_mask.bool(), None
        if isinstance(self.fusion, PromptGuidedFusion):
            words = self.facial_qformer.embed_prompt(prompt_ids)
            facial, facial_mask = self.fusion(facial, words, prompt_mask), prompt_mask
        general = self._read("general", general, prompt_ids, prompt_mask)
        facial = self._read("facial", facial, prompt_ids, prompt_mask, facial_mask)
        if not isinstance(self.adapter, WeightAdapters):
            return self.adapter(general, facial)
        prompts = [qformer.embed_prompt(prompt_ids) for qformer in (self.general_qformer, self.facial_qformer)]
        return self.adapter(general, facial, prompts, prompt_mask)

    def _read(self, stream, visual, prompt_ids, prompt_mask, visual_mask=None):
        queries = [getattr(self, f"{stream}_{name}", None) for name in ("query_tokens", "extra_query_tokens")]
        queries = torch.cat([tokens[0] for tokens in queries if tokens is not None])
        tokens = getattr(self, f"{stream}_qformer")(queries, visual, prompt_ids, prompt_mask, visual_mask)
        tokens = getattr(self, f"{stream}_mistral_proj")(tokens)
        return getattr(self, f"{stream}_mlp")(tokens) if self.config.variant == "v2" else tokens

    def embed(self, input_ids, visual):
        """Embeds sequences to [B*Q, L, D]; the n-th negative id of a sequence becomes its n-th visual token."""
        placeholder = input_ids < 0
        nth = (placeholder.cumsum(-1) - 1).clamp(0, visual.shape[1] - 1)
        placed = visual.gather(1, nth[..., None].expand(-1, -1, visual.shape[-1]))
        words = self.get_input_embeddings()(input_ids.clamp(min=0))
        return torch.where(placeholder[..., None], placed.to(words.dtype), words)

    def forward(self, input_ids=None, *, frames=None, prompt_ids=None, prompt_mask=None, inputs_embeds=None, **kwargs):
        """Runs `MistralForCausalLM.forward`; `frames` add clips to the text.

        Args:
            input_ids: [B*Q, L], negative at the positions of visual tokens.
            frames: [B, T, H, W, 3] uint8, RGB, or six channels with the face behind the whole picture.
            prompt_ids: [B*Q, P], the question for the Q-Formers, padded on the right.
            prompt_mask: [B*Q, P], True at word pieces.
            inputs_embeds: embedded sequences instead of `input_ids`.
            kwargs: Mistral's other arguments: attention_mask, labels, past_key_values, ...
        """
        if frames is not None:
            visual, _ = self.visual_tokens(self.encode(frames), prompt_ids, prompt_mask)
            input_ids, inputs_embeds = None, self.embed(input_ids, visual)
        return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)

    @torch.no_grad()
    def generate(self, inputs=None, *, frames=None, prompt_ids=None, prompt_mask=None, **kwargs):
        """Runs transformers' `generate`; with `frames` (see `forward`) it returns only the new tokens [B*Q, n].

        Pad sequences of different lengths on the left, and pass an `attention_mask`.
        """
        if frames is None:
            return super().generate(inputs, **kwargs)
        input_ids = kwargs.pop("input_ids", inputs)
        visual, _ = self.visual_tokens(self.encode(frames), prompt_ids, prompt_mask)
        return super().generate(inputs_embeds=self.embed(input_ids, visual), **kwargs)

    @property
    def processor(self):
        """The processor, read from the model's folder at the first use."""
        if "_processor" not in self.__dict__:
            # The folder's code is running already: without the argument, transformers asks again whether it may.
            self._processor = FaVChatProcessor.from_pretrained(self.config.name_or_path, trust_remote_code=True)
        return self._processor

    def answer(self, video, question, turns=(), max_new_tokens=64, **kwargs):
        """Answers a question about a video, as a text.

        Args:
            video: path of a video file, its bytes, a PIL image, or an array of frames [T, H, W, 3] uint8, RGB.
            question: the question.
            turns: earlier (question, answer) pairs.
            max_new_tokens: longest answer in tokens.
            kwargs: the processor's `face_crop` and `face`, and arguments of transformers' `generate`, greedy by
                default.
        """
        faces = {name: kwargs.pop(name) for name in ("face_crop", "face") if name in kwargs}
        inputs = self.processor(videos=[video], text=[question], turns=turns, answer=max_new_tokens, **faces)
        inputs = inputs.to(self.device)
        written = self.generate(**inputs, max_new_tokens=max_new_tokens, **{"do_sample": False, **kwargs})
        return self.processor.text(written[0])
