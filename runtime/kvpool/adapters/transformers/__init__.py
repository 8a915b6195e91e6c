"""A pool behind `transformers`: match, load into the `Cache`, generate the rest, store.

    cache = TransformersCache(pool, model)
    with cache.session(**inputs, tenant="acme") as session:
        output = model.generate(**session.inputs, max_new_tokens=200)
        session.store(output)

or in one call: `cache.generate(**inputs, tenant="acme", max_new_tokens=200)`.
"""

from kvpool.adapters.transformers.cache import TransformersCache
from kvpool.adapters.transformers.session import Session

__all__ = ["Session", "TransformersCache"]
