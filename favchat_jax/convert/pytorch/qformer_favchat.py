"""Granularity fusion (Eq. 2), the Q-Former and the mixtures (Eq. 3) in PyTorch; all read the encoders' tokens.

v2's replacements of fusion and mixture are in `guidance_favchat.py`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .encoders_favchat import attention, sinusoid_table


class CrossAttentionStep(nn.Module):
    """One line of Eq. 2, or half a CA2: facial features [B, L, D] query the features fused so far [B, S, d].

    With `residual` it is a pre-norm block that adds its projected query; without, it is the printed equation.
    """

    def __init__(self, query_width, width, heads, residual):
        super().__init__()
        self.heads, self.residual = heads, residual
        self.query = nn.Linear(query_width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        if residual:
            self.query_norm = nn.LayerNorm(query_width, eps=1e-6)
            self.value_norm = nn.LayerNorm(width, eps=1e-6)
            self.out = nn.Linear(width, width)
            self.skip = nn.Linear(query_width, width)

    def forward(self, queries, values, mask=None):
        if self.residual:
            queries, values = self.query_norm(queries), self.value_norm(values)
        attended = attention(self.query(queries), self.key(values), self.value(values), self.heads, mask)
        return self.skip(queries) + self.out(attended) if self.residual else attended


class GranularityFusion(nn.Module):
    """Eq. 2 over all granularities, frame by frame: e_g [B, T, S, d] and e_i [B, T, L_i, D_i] to [B, T, L_N, d]."""

    def __init__(self, facial_widths, width, heads, residual):
        super().__init__()
        for i, facial_width in enumerate(facial_widths, start=1):
            self.add_module(f"step_{i}", CrossAttentionStep(facial_width, width, heads, residual))

    def forward(self, general, granularities):
        fused = general.flatten(0, 1)
        for step, facial in zip(self.children(), granularities, strict=True):
            fused = step(facial.flatten(0, 1), fused)
        return fused.unflatten(0, general.shape[:2])


def add_positions(tokens):
    """Adds position encodings and joins the frames: [B, T, L, D] to [B, T*L, D].

    One half of the channels encodes the frame's number, the other the position within the frame, both as sinusoids.
    """
    _, frames, places, width = tokens.shape
    time = sinusoid_table(frames, width // 2)[:, None].expand(frames, places, -1)
    place = sinusoid_table(places, width - width // 2).expand(frames, places, -1)
    return (tokens + torch.cat([time, place], dim=-1).to(tokens)).flatten(1, 2)


class Residual(nn.Module):
    """The end of a post-norm branch: linear, dropout, addition and norm."""

    def __init__(self, hidden, width, dropout):
        super().__init__()
        self.dense = nn.Linear(hidden, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, branch, trunk):
        return self.LayerNorm(self.dropout(self.dense(branch)) + trunk)


class QFormerAttention(nn.Module):
    """Self-attention within each question's tokens, or cross-attention to `context`; attention has no dropout."""

    def __init__(self, width, context_width, heads, dropout):
        super().__init__()
        self.heads = heads
        self.self = nn.ModuleDict(
            {
                "query": nn.Linear(width, width),
                "key": nn.Linear(context_width, width),
                "value": nn.Linear(context_width, width),
            }
        )
        self.output = Residual(width, width, dropout)

    def forward(self, tokens, context, mask=None):
        query, key, value = self.self["query"](tokens), self.self["key"](context), self.self["value"](context)
        return self.output(attention(query, key, value, self.heads, mask), tokens)


class QFormerLayer(nn.Module):
    """One layer: shared self-attention, cross-attention of the queries, and separate MLPs for queries and prompt."""

    def __init__(self, sizes, visual_width, cross):
        super().__init__()
        width, heads, mlp, dropout = (sizes[name] for name in ("width", "heads", "mlp", "dropout"))
        self.attention = QFormerAttention(width, width, heads, dropout)
        if cross:
            self.crossattention = QFormerAttention(width, visual_width, heads, dropout)
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(width, mlp)})
        self.output_query = Residual(mlp, width, dropout)
        if sizes["prompt"]:
            self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, mlp)})
            self.output = Residual(mlp, width, dropout)

    def forward(self, tokens, count, visual, mask, visual_mask):
        """Maps `tokens` [B*Q, N+P, D], `count` = N queries followed by the prompt, to the same shape.

        `visual` are the tokens that the queries read: [B, S, E] of each clip, or [B*Q, S, E] of each question.
        """
        tokens = self.attention(tokens, tokens, mask)
        queries, text = tokens[:, :count], tokens[:, count:]
        if hasattr(self, "crossattention"):
            # All questions of a clip share one attention, so that its keys and values exist once.
            folded = queries.reshape(len(visual), -1, queries.shape[-1])
            queries = self.crossattention(folded, visual, visual_mask).view_as(queries)
        queries = self.output_query(F.gelu(self.intermediate_query["dense"](queries)), queries)
        if text.shape[1]:
            text = self.output(F.gelu(self.intermediate["dense"](text)), text)
        return torch.cat([queries, text], dim=1)


class QFormer(nn.Module):
    """BLIP-2's BERT as in VideoChat2; the caller holds the learned queries."""

    def __init__(self, sizes, visual_width):
        super().__init__()
        width = sizes["width"]
        embeddings = {"LayerNorm": nn.LayerNorm(width, eps=1e-12)}
        if sizes["prompt"]:
            embeddings["word_embeddings"] = nn.Embedding(sizes["vocabulary"], width)
            embeddings["position_embeddings"] = nn.Embedding(512, width)
        layers = nn.ModuleList(QFormerLayer(sizes, visual_width, i % 2 == 0) for i in range(sizes["depth"]))
        self.bert = nn.ModuleDict(
            {"embeddings": nn.ModuleDict(embeddings), "encoder": nn.ModuleDict({"layer": layers})}
        )
        self.dropout = nn.Dropout(sizes["dropout"])
        self.prompt = sizes["prompt"]

    def embed_prompt(self, prompt_ids):
        """Returns the normed word plus position embeddings of prompts [B*Q, P], before dropout and the first layer."""
        embeddings, places = self.bert["embeddings"], torch.arange(prompt_ids.shape[1], device=prompt_ids.device)
        words = embeddings["word_embeddings"](prompt_ids) + embeddings["position_embeddings"](places)
        return embeddings["LayerNorm"](words)

    def forward(self, queries, visual, prompt_ids, prompt_mask, visual_mask=None):
        """Reads clips with Q questions each.

        Args:
            queries: [N, D], the learned queries.
            visual: [B, S, E] tokens of each clip, or [B*Q, S, E] of each question.
            prompt_ids: [B*Q, P] word pieces of each question, padded on the right.
            prompt_mask: [B*Q, P], True at word pieces.
            visual_mask: [B*Q, S], True at the tokens that each question reads.

        Returns:
            [B*Q, N, D], the queries' outputs.
        """
        count, questions = len(queries), len(prompt_ids)
        tokens, mask = self.bert["embeddings"]["LayerNorm"](queries).expand(questions, -1, -1), None
        if self.prompt:
            tokens = torch.cat([tokens, self.embed_prompt(prompt_ids)], dim=1)
            mask = torch.cat([prompt_mask.new_ones(questions, count), prompt_mask], dim=1)[:, None, None]
        if visual_mask is not None:
            visual_mask = visual_mask[:, None, None]
        tokens = self.dropout(tokens)
        for layer in self.bert["encoder"]["layer"]:
            tokens = layer(tokens, count, visual, mask, visual_mask)
        return tokens[:, :count]


class GatedMixture(nn.Module):
    """Eq. 3: each visual token is a weighted sum of two experts, one per stream; the gate sees both streams."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate_in, self.gate_out = nn.Linear(2 * width, hidden), nn.Linear(hidden, 2)
        for stream in ("general", "facial"):
            self.add_module(f"{stream}_norm", nn.LayerNorm(width, eps=1e-6))
            self.add_module(f"{stream}_in", nn.Linear(width, hidden))
            self.add_module(f"{stream}_out", nn.Linear(hidden, width))

    def forward(self, general, facial):
        """Mixes the streams [..., N, D]; returns the mixed tokens and the streams' weights [..., N, 2]."""
        general_normed, facial_normed = self.general_norm(general), self.facial_norm(facial)
        gate = F.gelu(self.gate_in(torch.cat([general_normed, facial_normed], dim=-1)), approximate="tanh")
        weights = self.gate_out(gate).float().softmax(-1)
        general = general + self.general_out(F.gelu(self.general_in(general_normed), approximate="tanh"))
        facial = facial + self.facial_out(F.gelu(self.facial_in(facial_normed), approximate="tanh"))
        shares = weights.to(general.dtype)
        return shares[..., :1] * general + shares[..., 1:] * facial, weights


class ScalarMixture(nn.Module):
    """Ablation `no_moe` of either variant: a sum of the two streams, weighted by two learned scalars."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, general, facial):
        mixed = self.weights[0] * general + self.weights[1] * facial
        return mixed, self.weights.expand(*general.shape[:-1], 2)
