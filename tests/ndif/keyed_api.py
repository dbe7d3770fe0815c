"""NDIF's API with a key database of two keys in memory, so that its own authorization runs without Postgres."""

from ndif.common.providers.postgres import PostgresProvider
from ndif.services.api.app import app  # noqa: F401 (gunicorn serves it)

KEYS = {
    "11111111-1111-4111-8111-111111111111": "trusted",
    "22222222-2222-4222-8222-222222222222": None,
}


async def fetch(query, key):
    """The rows of NDIF's query for a key: one with its tag, none for a key that is not there."""
    if str(key) not in KEYS:
        return []
    return [{"user_id": "1", "email": "reader@example.org", "user_tag": KEYS[str(key)]}]


PostgresProvider.enabled = staticmethod(lambda: True)
PostgresProvider.fetch = staticmethod(fetch)
