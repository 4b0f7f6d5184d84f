"""The remote replicas of one loaded version, alone or beside the instances on workers.

Rules: there is one replica for each server that has the version, wanted or gone again as `RemoteModels` decides; all
have the tensors of the served signature, which their servers must show, so none needs a translation. Whoever unloads
the version closes them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from gateway.backends.interface import Replica, Traits
from gateway.backends.remote import RemoteReplica
from gateway.backends.remote_server import RemoteServer
from gateway.core.batchability import SignatureTensor
from gateway.core.request import InputTensor
from gateway.loading import LoadedModel

Tensors = Sequence[SignatureTensor]
Sample = Sequence[InputTensor | None]


class Wanted(NamedTuple):
    """A replica that should be: equal ones need not be made anew."""

    server: RemoteServer
    model: str
    """The model's name there."""
    version: str
    """The version to ask for; empty: whichever the server chooses."""
    traits: Traits

    def replica(self, inputs: Tensors, outputs: Tensors) -> RemoteReplica:
        return RemoteReplica(self.server, self.model, self.version, inputs, outputs, self.traits, self.server.name)


class RemoteSide:
    """The remote replicas that there are now."""

    def __init__(self) -> None:
        self.replicas: dict[Wanted, RemoteReplica] = {}

    async def close(self) -> None:
        replicas, self.replicas = list(self.replicas.values()), {}
        await asyncio.gather(*[replica.close() for replica in replicas])

    def __repr__(self) -> str:
        return f"<RemoteSide replicas={len(self.replicas)}>"


class RemoteLoaded:
    """Fits `loading.LoadedModel`: a version that only remote servers have."""

    def __init__(self, side: RemoteSide, inputs: Tensors, outputs: Tensors) -> None:
        self.side = side
        self.inputs = inputs
        self.outputs = outputs

    @property
    def replicas(self) -> Sequence[Replica]:
        return list(self.side.replicas.values())

    def set_warm_up(self, batches: Sequence[Sample], /) -> None:
        """The first of `batches` is what a server runs before it takes part again."""
        for replica in self.side.replicas.values():
            replica.set_warm_up(batches[0] if batches else None)

    async def unload(self) -> None:
        await self.side.close()


class MixedLoaded:
    """Fits `loading.LoadedModel`: instances on workers, which define the signature, and remote servers beside them."""

    def __init__(self, local: LoadedModel, side: RemoteSide, most_rows: int = 0) -> None:
        """`most_rows`: what all of the servers that were heard of take at once; 0: they do not say."""
        self.local = local
        self.side = side
        self.most_rows = most_rows

    @property
    def replicas(self) -> Sequence[Replica]:
        return [*self.local.replicas, *self.side.replicas.values()]

    @property
    def inputs(self) -> Tensors:
        return self.local.inputs

    @property
    def outputs(self) -> Tensors:
        return self.local.outputs

    def set_warm_up(self, batches: Sequence[Sample], /) -> None:
        self.local.set_warm_up(batches)

    async def unload(self) -> None:
        await asyncio.gather(self.local.unload(), self.side.close())
