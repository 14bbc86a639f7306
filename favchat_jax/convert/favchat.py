"""Table of all FaVChat weights except the language model, with their names in an exported `visual.safetensors`.

Published parts keep their published names: UMT and its norm (`vision_encoder.`, `vision_layernorm.`), FaceXFormer's
encoder (`backbone.0.`) and, without granularity fusion, its own fusion (`linear_c.`, `linear_fuse.`). The names of the
two Q-Formers and their projections follow `general_` or `facial_` (`general_qformer.bert.`, `facial_query_tokens`,
`general_mistral_proj.`). FaVChat's own parts:

| name | part |
|---|---|
| `fusion.step_{i}.{query,key,value,out,skip}`, `.{query_norm,value_norm}` | v1: line i of Eq. 2, counted from 1 |
| `fusion.mlp_{i}.{norm,in,out,skip}` | v2: the MLP from block i of the facial encoder to W_i, counted from 0 |
| `fusion.ca2_{i}.{visual,text}.*`, as in `step_{i}`, `.linear` | v2: the module of CA2 that reads W_i |
| `fuse_proj` | without fusion or CA2: FaceXFormer's fused map to the general encoder's width |
| `{general,facial}_mlp.{norm,in,out}` | v2: the MLP after a stream's projection |
| `adapter.{general,facial}_norm`, `.gate_{in,out}`, `.{general,facial}_{in,out}` | v1, Eq. 3: gate and experts |
| `adapter.{general,facial}.{norm,tokens,words,score}` | v2: a stream's weight adapter |
| `adapter.weights` | without mixture or weight adapters: the two scalars |
"""

from favchat_jax.checkpoints.table import Row, Table, linear, norm, prefixed
from favchat_jax.convert import facexformer, qformer, umt

STREAMS = ("general", "facial")
STEP = ("query", "key", "value", "out", "skip"), ("query_norm", "value_norm")  # linear layers and norms


def _stream(name: str) -> tuple[Row, ...]:
    qformer_rows = prefixed(qformer.ROWS, published=f"{name}_", path=f"{name}_qformer/")
    proj, mlp = linear(f"{name}_mistral_proj", f"{name}_proj"), _own(f"{name}_mlp", ("in", "out"), ("norm",))
    return *qformer_rows, *proj, *mlp, *_own(f"adapter/{name}", ("tokens", "words", "score"), ("norm",))


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
        *_own("fusion/step_{i}", *STEP),
        *_own("fusion/mlp_{i}", ("in", "out", "skip"), ("norm",)),
        *_own("fusion/ca2_{i}/visual", *STEP),
        *linear("fusion.ca2_{i}.linear", "fusion/ca2_{i}/linear"),
        *_own("fusion/ca2_{i}/text", *STEP),
        *linear("fuse_proj", "fuse_proj"),
        *_own(
            "adapter",
            ("gate_in", "gate_out", "general_in", "general_out", "facial_in", "facial_out"),
            ("general_norm", "facial_norm"),
        ),
        Row("adapter.weights", "adapter/weights"),
    ),
    hint="config.json contradicts the weights",
)
