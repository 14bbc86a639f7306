"""The question-guided parts of v2 in PyTorch: CA2 at the facial encoder's blocks, and the weights of the streams."""

import torch
import torch.nn.functional as F
from torch import nn

from .qformer_favchat import CrossAttentionStep, add_positions


class BlockMLP(nn.ModuleDict):
    """The pre-norm MLP from a block of the facial encoder [..., D] to W_i's width, with a linear skip connection."""

    def __init__(self, block_width, width):
        super().__init__(
            {
                "norm": nn.LayerNorm(block_width, eps=1e-6),
                "in": nn.Linear(block_width, width),
                "out": nn.Linear(width, width),
                "skip": nn.Linear(block_width, width),
            }
        )

    def forward(self, features):
        normed = self["norm"](features)
        return self["skip"](normed) + self["out"](F.gelu(self["in"](normed), approximate="tanh"))


class CA2(nn.Module):
    """One module of CA2: the previous module's output queries a block's W_i, then the words query the result."""

    def __init__(self, previous_width, prompt_width, width, heads, residual):
        super().__init__()
        self.visual = CrossAttentionStep(previous_width, width, heads, residual)
        self.linear = nn.Linear(width, width)
        self.text = CrossAttentionStep(prompt_width, width, heads, residual)

    def forward(self, previous, block, prompt, prompt_mask):
        """Maps the questions' `previous` and `prompt` [B*Q, P, ...] and the clips' `block` [B, F, d] to [B*Q, P, d]."""
        # All questions of a clip share one attention, so that the block's keys and values exist once.
        folded = previous.reshape(len(block), -1, previous.shape[-1])
        read = self.linear(self.visual(folded, block)).view(*prompt.shape[:2], -1)
        return self.text(prompt, read, prompt_mask[:, None, None])


class PromptGuidedFusion(nn.Module):
    """A module of CA2 for each block of the facial encoder, over all frames of a clip."""

    def __init__(self, block_widths, width, prompt_width, heads, residual):
        super().__init__()
        for i, block_width in enumerate(block_widths):
            self.add_module(f"mlp_{i}", BlockMLP(block_width, width))
            self.add_module(f"ca2_{i}", CA2(width if i else prompt_width, prompt_width, width, heads, residual))

    def read_blocks(self, granularities):
        """Maps e_i [B, T, L_i, D_i] to W_i [B, T*L_i, d] with position encodings, once per clip."""
        return [add_positions(self.get_submodule(f"mlp_{i}")(e_i)) for i, e_i in enumerate(granularities)]

    def forward(self, blocks, prompt, prompt_mask):
        """Returns the facial features [B*Q, P, d] that the words of each question [B*Q, P, E] read from the blocks."""
        found = prompt
        for i, block in enumerate(blocks):
            found = self.get_submodule(f"ca2_{i}")(found, block, prompt, prompt_mask)
        return found


class TokenMLP(nn.ModuleDict):
    """The residual pre-norm MLP after a Q-Former's linear layer."""

    def __init__(self, width, hidden):
        super().__init__(
            {"norm": nn.LayerNorm(width, eps=1e-6), "in": nn.Linear(width, hidden), "out": nn.Linear(hidden, width)}
        )

    def forward(self, tokens):
        return tokens + self["out"](F.gelu(self["in"](self["norm"](tokens)), approximate="tanh"))


class WeightAdapter(nn.Module):
    """Scores a stream for each question, from its visual tokens [B*Q, N, D] and the words [B*Q, P, E]."""

    def __init__(self, width, prompt_width, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.tokens, self.words = nn.Linear(width, hidden), nn.Linear(prompt_width, hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(self, tokens, prompt, prompt_mask):
        known = prompt_mask[..., None].to(prompt.dtype)
        words = (prompt * known).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
        inner = self.tokens(self.norm(tokens)) + self.words(words)
        return self.score(F.gelu(inner, approximate="tanh").mean(1))[:, 0]


class WeightAdapters(nn.Module):
    """The sum of the streams, weighted by the softmax of their two scores."""

    def __init__(self, width, prompt_width, hidden):
        super().__init__()
        self.general = WeightAdapter(width, prompt_width, hidden)
        self.facial = WeightAdapter(width, prompt_width, hidden)

    def forward(self, general, facial, prompts, prompt_mask):
        """Mixes the streams' tokens [B*Q, N, D]; returns the mixture and the streams' weights [B*Q, N, 2].

        `prompts` are the words as embedded by each Q-Former.
        """
        streams = zip((self.general, self.facial), (general, facial), prompts, strict=True)
        scores = [adapter(tokens, prompt, prompt_mask) for adapter, tokens, prompt in streams]
        weights = torch.stack(scores, dim=-1).float().softmax(-1)[:, None]
        shares = weights.to(general.dtype)
        return shares[..., :1] * general + shares[..., 1:] * facial, weights.expand(*general.shape[:-1], 2)
