"""All weights of a FaVChat but its language model's, as an exported `visual.safetensors` names them.

Published parts keep their published names: UMT and its norm (`vision_encoder.`, `vision_layernorm.`), FaceXFormer's
encoder (`backbone.0.`) and, without granularity fusion, its own (`linear_c.`, `linear_fuse.`). The two Q-Formers and
their projections have theirs behind `general_` and `facial_` (`general_qformer.bert.`, `facial_query_tokens`,
`general_mistral_proj.`). FaVChat's own parts:

| name | part |
|---|---|
| `fusion.step_{i}.{query,key,value,out,skip}`, `.{query_norm,value_norm}` | line i of Eq. 2, counted from 1 |
| `fuse_proj` | without granularity fusion: FaceXFormer's fused map to the general encoder's width |
| `adapter.{general,facial}_norm`, `.gate_{in,out}`, `.{general,facial}_{in,out}` | Eq. 3: gate and experts |
| `adapter.weights` | without the mixture: the two scalars |
"""

from favchat_jax.convert import facexformer, qformer, umt
from favchat_jax.convert.table import Row, Table, linear, norm, prefixed

STREAMS = ("general", "facial")


def _stream(name: str) -> tuple[Row, ...]:
    qformer_rows = prefixed(qformer.ROWS, published=f"{name}_", path=f"{name}_qformer/")
    return *qformer_rows, *linear(f"{name}_mistral_proj", f"{name}_proj")


def _own(part: str, linears: tuple[str, ...], norms: tuple[str, ...]) -> tuple[Row, ...]:
    published = part.replace("/", ".")
    layers = (linear(f"{published}.{name}", f"{part}/{name}") for name in linears)
    return *(row for rows in layers for row in rows), *(
        row for name in norms for row in norm(f"{published}.{name}", f"{part}/{name}")
    )


TABLE = Table(
    "FaVChat's visual part",
    (
        *umt.ROWS,
        *facexformer.ENCODER,
        *facexformer.FUSE,
        *(row for name in STREAMS for row in _stream(name)),
        *_own("fusion/step_{i}", ("query", "key", "value", "out", "skip"), ("query_norm", "value_norm")),
        *linear("fuse_proj", "fuse_proj"),
        *_own(
            "adapter",
            ("gate_in", "gate_out", "general_in", "general_out", "facial_in", "facial_out"),
            ("general_norm", "facial_norm"),
        ),
        Row("adapter.weights", "adapter/weights"),
    ),
    mend="config.json contradicts the weights",
)
