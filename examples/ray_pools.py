"""Streams over several processes or machines: a pool per Ray actor, and no stream dies with it.

    python examples/ray_pools.py --replicas 2 --streams 12 --ticks 200

A router sends each stream's tokens to the actor that holds it. Every few ticks it fetches the
states of all streams, and it keeps the tokens since then. When an actor dies, the router starts
another, restores the dead one's streams there, and replays those tokens: callers notice a pause,
nothing else. In the middle of the demonstration one actor is killed, and all outputs are compared
with those of a pool in this process.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import torch
from torch import Tensor, nn

import continual_mha as co

EMBED_DIM = 64


class Replica:
    """A pool in an actor; streams have the pool's own numbers here."""

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        capacity: int,
        token_shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        torch.set_num_threads(1)
        self._pool = co.StreamPool(make_model(), capacity, token_shape, dtype=dtype)
        self._open: set[int] = set()

    def open(self, state: bytes | None) -> int:
        """Begin a stream, or go on with a stored one."""
        if state is None:
            stream = self._pool.open()
        else:
            stream = self._pool.restore(co.states_from_bytes(state))
        self._open.add(stream)
        return stream

    def close(self, stream: int) -> None:
        """End a stream."""
        self._pool.close(stream)
        self._open.discard(stream)

    def tick(self, tokens: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Take a token of each of these streams; the outputs of those that are ready."""
        for stream, token in tokens.items():
            self._pool.push(stream, token)
        return {stream: row.cpu() for stream, row in self._pool.tick().items()}

    def export(self) -> dict[int, bytes]:
        """The states of all streams."""
        return {s: co.states_to_bytes(self._pool.export(s)) for s in self._open}

    def progress(self) -> str:
        """One line on how it goes."""
        return self._pool.progress()


class _Stream:
    """Where a stream is, its last stored state, and its tokens since."""

    def __init__(self, replica: int, local: int) -> None:
        self.replica = replica
        self.local = local
        self.state: bytes | None = None
        self.since: list[Tensor] = []


class Router:
    """Streams over several replicas, by numbers of its own.

    Args:
        make_model: makes a replica's model, the same in every one.
        replicas: how many.
        capacity: slots of each.
        token_shape: shape of one stream's token.
        dtype: of the tokens.
        export_every: ticks between exports. More of them cost time; fewer cost memory for tokens,
            and a longer replay after a loss.
        resources: of each actor, as ``ray.remote`` takes them, such as ``num_gpus``.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        replicas: int,
        capacity: int,
        token_shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        export_every: int = 32,
        **resources: float,
    ) -> None:
        self._arguments = (make_model, capacity, token_shape, dtype)
        self._token_shape, self._dtype = tuple(token_shape), dtype
        self._actor = ray.remote(**(resources or {"num_cpus": 1}))(Replica)
        self.replicas = [self._start() for _ in range(replicas)]
        self.losses = 0
        self._capacity = capacity
        self._export_every = export_every
        self._streams: dict[int, _Stream] = {}
        self._next_id = 0
        self._ticks = 0

    def _start(self) -> ray.actor.ActorHandle:
        return self._actor.remote(*self._arguments)

    def open(self) -> int:
        """Begin a stream on the replica that has the fewest.

        Raises:
            PoolFull: all replicas are full.
        """
        used = [0] * len(self.replicas)
        for stream in self._streams.values():
            used[stream.replica] += 1
        index = min(range(len(used)), key=used.__getitem__)
        if used[index] == self._capacity:
            raise co.PoolFull(f"all {len(used)} replicas of {self._capacity} slots are full")
        try:
            local = ray.get(self.replicas[index].open.remote(None))
        except ray.exceptions.RayActorError:
            self._recover(index)
            local = ray.get(self.replicas[index].open.remote(None))
        number, self._next_id = self._next_id, self._next_id + 1
        self._streams[number] = _Stream(index, local)
        return number

    def close(self, number: int) -> None:
        """End a stream."""
        stream = self._streams.pop(number)
        try:
            ray.get(self.replicas[stream.replica].close.remote(stream.local))
        except ray.exceptions.RayActorError:
            self._recover(stream.replica)

    def tick(self, tokens: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Take one token of each of these streams; the outputs of those that are ready.

        Raises:
            KeyError: there is no such stream.
            ValueError: a token is none that replicas take; none of these was taken then.
        """
        taking = {number: self._streams[number] for number in tokens}
        for number, token in tokens.items():  # what a replica refused would be replayed for ever
            if token.shape != self._token_shape or token.dtype != self._dtype:
                raise ValueError(
                    f"a token must be {self._dtype} of the shape {self._token_shape}, but stream "
                    f"{number} got {token.dtype} of {tuple(token.shape)}"
                )
        shares: dict[int, dict[int, Tensor]] = {}
        for number, stream in taking.items():
            stream.since.append(tokens[number])
            shares.setdefault(stream.replica, {})[stream.local] = tokens[number]
        answers = {i: self.replicas[i].tick.remote(share) for i, share in shares.items()}
        outputs: dict[int, Tensor] = {}
        for index, answer in answers.items():
            try:
                rows = ray.get(answer)
            except ray.exceptions.RayActorError:
                last = self._recover(index)
                outputs.update({n: row for n, row in last.items() if n in tokens})
                continue
            names = {s.local: n for n, s in self._streams.items() if s.replica == index}
            outputs.update({names[local]: row for local, row in rows.items()})
        self._ticks += 1
        if self._ticks % self._export_every == 0:
            self.export()
        return outputs

    def export(self) -> None:
        """Fetch the states of all streams, and forget the tokens that led to them."""
        answers = [replica.export.remote() for replica in self.replicas]
        for index, answer in enumerate(answers):
            try:
                states = ray.get(answer)
            except ray.exceptions.RayActorError:
                self._recover(index)
                continue
            for stream in self._streams.values():
                if stream.replica == index:
                    stream.state, stream.since = states[stream.local], []

    def _recover(self, index: int) -> dict[int, Tensor]:
        """Put another replica in the place of a lost one; its streams' last outputs."""
        self.losses += 1
        replica = self.replicas[index] = self._start()
        lost = {n: s for n, s in self._streams.items() if s.replica == index}
        for stream in lost.values():
            stream.local = ray.get(replica.open.remote(stream.state))
        last: dict[int, Tensor] = {}
        for step in range(max((len(s.since) for s in lost.values()), default=0)):
            due = {n: s for n, s in lost.items() if step < len(s.since)}
            rows = ray.get(replica.tick.remote({s.local: s.since[step] for s in due.values()}))
            last.update({n: rows[s.local] for n, s in due.items() if s.local in rows})
        return last

    def progress(self) -> str:
        """A line for each replica."""
        lines = ray.get([replica.progress.remote() for replica in self.replicas])
        return "\n".join(f"replica {i}: {line}" for i, line in enumerate(lines))


class Model(nn.Module):
    """Two attentions in a row, with a residual: enough to show it."""

    def __init__(self, embed_dim: int = EMBED_DIM, sequence_len: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            co.SingleOutputMultiheadAttention(embed_dim, 4, sequence_len=sequence_len)
            for _ in range(2)
        )
        self.requires_grad_(False)

    def forward_step(self, x: Tensor) -> Tensor:
        """One token ``(N, E)`` of each stream."""
        for layer in self.layers:
            x = x + layer.forward_step(x)
        return x


def run(router: Router, streams: int, ticks: int, kill_at: int) -> float:
    """Feed streams that pause now and then, kill a replica, and return the largest difference."""
    pool = co.StreamPool(Model(), streams, (EMBED_DIM,))
    numbers = [(router.open(), pool.open()) for _ in range(streams)]
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    for tick in range(ticks):
        if tick == kill_at:
            print("killing replica 0", flush=True)
            ray.kill(router.replicas[0])
        due = [pair for pair in numbers if torch.rand((), generator=generator) < 0.8]
        tokens = torch.randn(len(due), EMBED_DIM, generator=generator)
        for (_, local), token in zip(due, tokens, strict=True):
            pool.push(local, token)
        expected = pool.tick()
        outputs = router.tick({n: token for (n, _), token in zip(due, tokens, strict=True)})
        for number, local in due:
            if (number in outputs) != (local in expected):
                raise RuntimeError(f"stream {number} answered out of turn")
            if number in outputs:
                worst = max(worst, float((outputs[number] - expected[local]).abs().max()))
        if tick % max(1, ticks // 5) == 0:
            print(f"tick {tick}\n{router.progress()}", flush=True)
    return worst


def main() -> None:
    """The demonstration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--streams", type=int, default=12)
    parser.add_argument("--ticks", type=int, default=200)
    options = parser.parse_args()
    ray.init(num_cpus=options.replicas, include_dashboard=False, log_to_driver=False)
    try:
        started = time.perf_counter()
        capacity = -(-options.streams // options.replicas)
        router = Router(Model, options.replicas, capacity, (EMBED_DIM,))
        worst = run(router, options.streams, options.ticks, options.ticks // 2)
        print(f"{options.ticks} ticks in {time.perf_counter() - started:.1f} s")
        print(f"replicas lost and replaced: {router.losses}")
        print(f"largest difference from a pool in one process: {worst:.1e}")
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
