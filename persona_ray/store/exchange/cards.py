"""README.md files as the Hugging Face hub reads them: a YAML header, then what is inside, in numbers. The licence is its owner's to say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from persona_ray.spec import Reduced, digest_of
from persona_ray.store.exchange.result import role_vectors
from persona_ray.store.reader import StoreReader

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
LICENSE_HINT = "# license: the owner's choice; see https://huggingface.co/docs/hub/repositories-licenses"
MAX_SHOWN_LAYERS = 12


def vectors_card(store: StoreReader, reduced: Reduced, sign: str) -> str:
    """Of the safetensors of a result."""
    tags = ["persona-ray", "assistant-axis", "activation-steering", "interpretability"]
    place, best = _best(reduced)
    num_roles = len(role_vectors(reduced))
    facts = {
        "rows that the result was made from": f"{int(reduced.attributes.get('num_rows', 0)):,}",
        "which rows count": reduced.attributes.get("filter", "not recorded"),
        "archetypes with a role vector": f"{num_roles:,}",
        "layers": shown_layers(reduced.layers),
        "hidden size": store.hidden_size,
        "best layer": f"{best} ({reduced.attributes.get('best_layer_reason', 'not recorded')})",
        f"cos(PC1, axis) at layer {reduced.layers[place]}": f"{float(reduced.cos_pc1_axis_L[place]):.4f}",
        "result": f"`{reduced.name}`",
        "state of the store it was made from": f"`{reduced.attributes.get('ledger_digest', 'not recorded')}`",
        **provenance(store),
    }
    return f"""{header({**base_model(store), "library_name": "safetensors", "tags": tags})}
# Assistant Axis of {store.identity["model_id"]}

Directions in the residual stream after each decoder block, float32, shape [layers, hidden]; row i belongs to the i-th entry of the
metadata's `layers`. {sign[0].upper()}{sign[1:]}.

```python
import json
from safetensors import safe_open
with safe_open("axis.safetensors", "np") as file:
    axis = file.get_tensor("axis")[json.loads(file.metadata()["layers"]).index({reduced.layers[place]})]
```

`axis.safetensors`: `axis`, `default_vector`, `cos_pc1_axis`; `role_vectors.safetensors`: one tensor for each archetype;
`pca.safetensors`: `pc_1` to `pc_{reduced.pca_components_LKD.shape[1]}`, unit vectors, and `explained_variance_ratio`.
{table(facts)}"""


def header(fields: Mapping[str, Any]) -> str:
    """The YAML block, with a line where the licence belongs."""
    return f"---\n{LICENSE_HINT}\n{yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True)}---\n"


def table(facts: Mapping[str, Any]) -> str:
    """Two columns."""
    lines = [f"| {name} | {str(value).replace('|', '/')} |" for name, value in facts.items()]
    return "\n".join(["", "| | |", "|---|---|", *lines, ""])


def provenance(store: StoreReader) -> dict[str, Any]:
    """Where it came from. A folder's path says more about its owner than about the data, so only a bucket's URL is named."""
    identity = store.identity
    origin = {"store": store.url} if "://" in store.url else {}
    return {
        "job": store.job.get("name", "not named"),
        **origin,
        "model": f"{identity['model_id']}, revision {identity['model_revision'] or 'not recorded'}",
        "model dtype, attention": f"{identity['dtype']}, {identity['attention']}",
        "tokens that were pooled": identity["span_rule"],
        "stored as": identity["store_dtype"],
        "identity": f"`{identity_digest(store)}`",
    }


def identity_digest(store: StoreReader) -> str:
    """SHA-256 of everything that makes the store one experiment."""
    return digest_of(store.identity)


def shown_layers(layers: Sequence[int]) -> str:
    """All of a few; of many the ends."""
    if len(layers) <= MAX_SHOWN_LAYERS:
        return ", ".join(map(str, layers))
    return f"{len(layers)} from {layers[0]} to {layers[-1]}"


def base_model(store: StoreReader) -> dict[str, Any]:
    """The hub takes a name of its own only: a folder's path is none."""
    model_id = str(store.identity["model_id"])
    return {"base_model": model_id} if HUB_NAME.fullmatch(model_id) else {}


def _best(reduced: Reduced) -> tuple[int, Any]:
    """Place and name of the layer to speak of: the best one if it is there, else the middle one."""
    best = reduced.attributes.get("best_layer")
    return (reduced.layers.index(best) if best in reduced.layers else len(reduced.layers) // 2), best
