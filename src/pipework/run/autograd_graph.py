"""The graph that autograd has made of some tensors: who uses which parameter, and where it ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, final

from torch import Tensor
from torch.autograd.graph import GradientEdge


@final
class Graph:
    """All that led to some tensors, or to edges of the graph."""

    def __init__(self, outputs: Sequence[Tensor | GradientEdge]) -> None:
        ends = (x.node if isinstance(x, GradientEdge) else x.grad_fn for x in outputs)
        self._users: dict[Any, list[Any]] = {end: [None] for end in ends if end is not None}
        nodes = list(self._users)
        while nodes:
            node = nodes.pop()
            for after, _ in node.next_functions:
                if after is None:
                    continue
                if after not in self._users:
                    self._users[after] = []
                    nodes.append(after)
                self._users[after].append(node)

    def __contains__(self, node: Any) -> bool:
        return node in self._users

    def leaves(self) -> Iterator[Tensor]:
        """The tensors that gradients are added to."""
        return (node.variable for node in self._users if hasattr(node, "variable"))

    @property
    def has_reentrant_checkpoints(self) -> bool:
        """Whether a part of it is made anew in the backward, which then must not be asked for single gradients."""
        return any(node.name() == _REENTRANT for node in self._users)

    def uses(self) -> Counter[int]:
        """How often each leaf, by its id, is used.

        Where it is transposed or, by autocast, cast, it is the users of what comes of that who count. One that is cast
        and used in other ways too, or in a second autocast region, has its gradients added up in two dtypes: it counts
        as none.
        """
        return Counter({id(node.variable): self._count(node) for node in self._users if hasattr(node, "variable")})

    def _count(self, node: Any) -> int:
        names = ["" if user is None else user.name() for user in self._users[node]]
        if _CAST in names and len(names) > 1:
            return 0
        return sum(
            self._count(user) if name in (_CAST, _TRANSPOSED) else 1
            for user, name in zip(self._users[node], names, strict=True)
        )


_CAST, _TRANSPOSED, _REENTRANT = "ToCopyBackward0", "TBackward0", "CheckpointFunctionBackward"
