"""What outlives a controller's process: term, epoch and operator intent, in Ray's internal KV."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from actors.head import Head


class Memory:
    """The KV entries of one deployment. Every call is one round trip to Ray's GCS (about 1 ms)."""

    def __init__(self, deployment: str, head: Head) -> None:
        self._prefix, self._head = f"raymoe:{deployment}:", head

    def next_term(self) -> int:
        """A number larger than that of any earlier controller of the deployment, and nobody
        else's, though several ask at once: each term is an entry that can be made once only."""
        term = self.term() + 1
        while not self._put(f"term-{term}", "taken", overwrite=False):
            term += 1
        self._put("term", str(term))
        return term

    def term(self) -> int:
        """The term of the newest controller of the deployment."""
        term = int(self._get("term") or 0)  # of one of the newest: the others' word may be older
        while self._get(f"term-{term + 1}") is not None:
            term += 1
        return term

    def epoch(self) -> int:
        """The last epoch that any controller of the deployment has published."""
        return int(self._get("epoch") or 0)

    def keep_epoch(self, epoch: int) -> None:
        self._put("epoch", str(epoch))

    def intent(self) -> dict[str, Any] | None:
        """What operators have asked for (`actors.intent.Intent.to_dict`); None: nothing yet."""
        text = self._get("intent")
        return None if text is None else dict(json.loads(text))

    def keep_intent(self, intent: dict[str, Any]) -> None:
        self._put("intent", json.dumps(intent))

    def forget(self) -> None:
        """Removes everything: the next controller starts afresh."""
        from ray.experimental.internal_kv import _internal_kv_del

        self._head.ask(partial(_internal_kv_del, self._prefix.encode(), del_by_prefix=True))

    def _get(self, name: str) -> str | None:
        from ray.experimental.internal_kv import _internal_kv_get

        key = (self._prefix + name).encode()
        value = self._head.ask(lambda: _internal_kv_get(key))
        return None if value is None else value.decode()

    def _put(self, name: str, value: str, overwrite: bool = True) -> bool:
        """Whether it was not there before."""
        from ray.experimental.internal_kv import _internal_kv_put

        key = (self._prefix + name).encode()
        return not self._head.ask(lambda: _internal_kv_put(key, value.encode(), overwrite))
