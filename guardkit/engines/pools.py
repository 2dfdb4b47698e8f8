"""Pools of actors of Ray, each holding a part of the work (an editor, an encoder, ...), and the stand-ins that ask them in its place.

A stand-in waits for its answer, so that every worker has one call of a part under way; a desk before the pool hands calls to actors that are
free, and lets the others wait. So nothing piles up before a slow part. Arguments and results travel as bytes, so that arrays arrive as they
would be here, and can be written to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from guardkit.checks import check_mapping, check_number, check_whole
from guardkit.engines.base import sending
from guardkit.schema import InputError

# of each role: what a stand-in says itself, and what is done in the pool
_PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "editor": (("name", "config"), ("edit",)),
    "encoder": (
        ("name", "batch_size", "dim", "fingerprint", "config", "preprocessing"),
        ("encode_preprocessed", "encode_images", "encode_texts"),
    ),
    "instructor": (("name",), ("instruct",)),
    "verifier": (("name", "config"), ("verify",)),
}
_SMALL_BYTES = 64 << 10
_SIZES = {"workers": 1, "cpus": 1, "gpus": 0}  # with what holds where nothing is said


def checked_pools(pools: Mapping[str, Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """{role: {workers, cpus, gpus}}, complete.

    Raises:
        InputError: an unknown role or setting, or a value out of range.
    """
    check_mapping("engine.pools", pools, "{ROLE: {workers: 1, cpus: 1, gpus: 0}}")
    found = {}
    for role, given in dict(pools or {}).items():
        if role not in _PARTS or not isinstance(given, Mapping) or not set(given) <= set(_SIZES):
            raise InputError(
                f"engine.pools must be {{ROLE: {{workers: 1, cpus: 1, gpus: 0}}}} with the roles {', '.join(_PARTS)}, got {role}: {given!r}"
            )
        sizes = _SIZES | dict(given)
        check_whole(f"engine.pools.{role}.workers", sizes["workers"], 1)
        check_number(f"engine.pools.{role}.cpus", sizes["cpus"], "[0, inf)")
        check_number(f"engine.pools.{role}.gpus", sizes["gpus"], "[0, inf)")
        found[role] = sizes
    return found


@contextmanager
def pool(ray: Any, role: str, part: Any, sizes: Mapping[str, Any], retries: int) -> Iterator[StandIn]:
    """A stand-in for a part, and the actors that work for it, for the time of the block.

    Args:
        ray: the package.
        role: of the part.
        part: is pickled.
        sizes: workers, and the cpus and gpus that each asks Ray for.
        retries: how often a call is begun again whose actor ended.
    """
    import torch

    with sending("ray"):
        data = ray.cloudpickle.dumps(part)
    # what is small travels with the call: of a reference Ray warns that an actor cannot begin anew without what it leads to
    kept = data if len(data) < _SMALL_BYTES else ray.put(data)
    # Ray begins an actor that ended anew, and its call with it
    limits = {"max_restarts": -1, "max_task_retries": retries}
    holder = ray.remote(_Holder).options(num_cpus=sizes["cpus"], num_gpus=sizes["gpus"], **limits)
    actors = [holder.remote(kept, torch.get_num_threads()) for _ in range(sizes["workers"])]
    desk = ray.remote(_Desk).options(num_cpus=0, **limits).remote(actors)
    try:
        yield StandIn(role, part, desk, retries)
    finally:
        for actor in [desk, *actors]:
            ray.kill(actor)


class StandIn:
    """Takes the place of a part: says what the part is, and lets the pool do its work.

    Args:
        role: of the part.
        part: what is asked of it, and neither said nor done in the pool, is done here: an encoder's way to prepare images.
        desk: of the pool.
        retries: for messages.
    """

    def __init__(self, role: str, part: Any, desk: Any, retries: int) -> None:
        facts, methods = _PARTS[role]
        self._role, self._desk, self._retries = role, desk, retries
        self._facts = {name: getattr(part, name) for name in facts}
        self._methods = [name for name in methods if callable(getattr(part, name, None))]
        self._part = part if role == "encoder" else None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is made of its pickle, nothing is there yet
            raise AttributeError(name)
        if name in self._facts:
            return self._facts[name]
        if name in self._methods:
            return partial(self._ask, name)
        if self._part is None or name in _PARTS[self._role][1]:
            raise AttributeError(f"the stand-in for the {self._role} has no {name}")
        return getattr(self._part, name)

    def _ask(self, method: str, *given: Any, **named: Any) -> Any:
        import ray

        # a reference in a list is not followed by the desk: what is sent goes straight to the actor
        sent = [ray.put(ray.cloudpickle.dumps((given, named)))]
        done, said = ray.get(self._desk.call.remote(method, sent))
        if done:
            return ray.cloudpickle.loads(said)
        raise InputError(said.format(pool=f"engine.pools.{self._role}", times=self._retries + 1))


class _Desk:
    """Hands calls to actors that are free."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._free: asyncio.Queue[Any] = asyncio.Queue()
        for actor in actors:
            self._free.put_nowait(actor)

    async def call(self, method: str, sent: list[Any]) -> tuple[bool, Any]:
        """Whether it was done, and what came of it; else a sentence."""
        import ray

        actor = await self._free.get()
        try:
            done: tuple[bool, Any] = await actor.call.remote(method, sent)
        except ray.exceptions.RayActorError as error:
            why = " ".join(str(error).split())[-200:].replace("{", "(").replace("}", ")")
            return False, (
                f"an actor of {{pool}} could not begin, or ended {{times}} times at the same call ({why}); what was done stays: see Ray's "
                "logs, give it more memory or smaller batches, and run the same command again"
            )
        finally:
            self._free.put_nowait(actor)
        return done


class _Holder:
    """Holds a part."""

    def __init__(self, part: bytes, n_threads: int) -> None:
        import ray
        import torch

        torch.set_num_threads(n_threads)
        self._part = ray.cloudpickle.loads(part)

    def call(self, method: str, sent: list[Any]) -> tuple[bool, Any]:
        """See `_Desk`; a user's mistake is a sentence."""
        import ray

        given, named = ray.cloudpickle.loads(ray.get(sent[0]))
        try:
            return True, ray.cloudpickle.dumps(getattr(self._part, method)(*given, **named))
        except InputError as error:
            return False, str(error).replace("{", "{{").replace("}", "}}")
