"""Which of a model's tensors are trained: selectors, a budget, and the trained part as a separate pytree.

A tensor is one layer of a stacked parameter, or a parameter that is not stacked. Only the trained part is passed to an
optimizer, so frozen tensors have no optimizer state.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from jaxid.checkpoints.tensors import Leaves, flatten, unflatten
from jaxid.checks import check_seed
from jaxid.errors import InputError
from jaxid.nn.inputs import AnyArray
from jaxid.nn.layers import Learning, Recompute, Stackable
from jaxid.nn.network import Network

GROUPS = (
    "vision-mlp",
    "vision-attention",
    "vision-norms",
    "vision-embedding",
    "projector",
    "lm-mlp",
    "lm-attention",
    "lm-norms",
    "lm-embedding",
    "lm-head",
)
"""Kinds of tensors; the selectors are these, "all" and "random"."""

STACKS = ("layers", "global_layers", "crossing")
"""Parts of a network whose parameters have a leading layer axis; a tower's global layers come after its others."""

Trained = dict[str, AnyArray]
"""Trained tensors by the path of their parameter, only the trained rows of stacked ones; float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor that may be trained.

    Attributes:
        path: path of the parameter, joined by dots.
        row: its layer in a stacked parameter; None if it is not stacked.
        size: number of elements.
        group: one of `GROUPS`.
        depth: index of its block, counted over all stacks of its part of the network; -1 outside blocks.
    """

    path: str
    row: int | None
    size: int
    group: str
    depth: int

    @property
    def name(self) -> str:
        """Its name in lists of tensors."""
        return self.path if self.row is None else f"{self.path}[{self.row}]"


def group_of(path: str, *, tied: bool) -> str:
    """The kind of the parameter at a path; `tied` says whether the embedding is also the head."""
    first, *_ = parts = path.split(".")
    norm = any("norm" in part for part in parts)
    if first == "decoder":
        if norm:
            return "lm-norms"
        if "mlp" in parts:
            return "lm-mlp"
        if "attention" in parts or "crossing" in parts:
            return "lm-attention"
        return "lm-head" if parts[-1] == "unembedding" or tied else "lm-embedding"
    if first != "tower" or parts[1].startswith("merge"):
        return "projector"
    if norm:
        return "vision-norms"
    if not any(part in STACKS for part in parts):
        return "vision-embedding"
    return "vision-attention" if any(part.startswith("attention") for part in parts) else "vision-mlp"


def tensors(parameters: PyTree, *, tied: bool) -> list[Tensor]:
    """All tensors of a network, from its parameters or their shapes."""
    flat = flatten(parameters)
    lengths: dict[str, int] = {}
    for path, leaf in flat.items():
        for stack in ("tower.layers.", "tower.global_layers."):
            if path.startswith(stack):
                lengths[stack] = leaf.shape[0]
    found = []
    for path, leaf in flat.items():
        group = group_of(path, tied=tied)
        size = int(np.prod(leaf.shape))
        if not any(part in STACKS for part in path.split(".")):
            found.append(Tensor(path=path, row=None, size=size, group=group, depth=-1))
            continue
        before = lengths["tower.layers."] if path.startswith("tower.global_layers.") else 0
        rows = leaf.shape[0]
        found += [Tensor(path=path, row=row, size=size // rows, group=group, depth=before + row) for row in range(rows)]
    return found


def choose(
    every: Sequence[Tensor],
    selectors: Sequence[str],
    *,
    budget: float,
    vision_blocks: int | None = 6,
    seed: int = 0,
    among: Callable[[Tensor], bool] = lambda _: True,
) -> tuple[Tensor, ...]:
    """Fills a budget with the selected tensors, the largest first ([ID] arXiv 2601.12626, fine-tuning).

    Args:
        every: all tensors of the network.
        selectors: kinds of tensors; "all"; or "random", tensors of all kinds in a random order.
        budget: the largest share of all parameters that may be trained.
        vision_blocks: number of the tower's last blocks that may be trained; None for all.
        seed: seed for "random".
        among: whether a tensor may be trained at all.

    Returns:
        The tensors, in the network's order.

    Raises:
        InputError: for an unknown selector or a budget out of range, or if none of them fits the budget.
    """
    known = (*GROUPS, "all", "random")
    unknown = sorted(set(selectors) - set(known))
    if unknown or not selectors:
        raise InputError(f"selectors {unknown or 'are missing'}: give one or more of {', '.join(known)}.")
    if not 0 < budget <= 1:
        raise InputError(f"the budget is a share of all parameters, above 0 and at most 1, not {budget}.")
    if vision_blocks is not None and vision_blocks < 0:
        raise InputError(f"vision_blocks counts the tower's last blocks: 0 or more, not {vision_blocks}.")
    check_seed(seed)
    room = budget * sum(tensor.size for tensor in every)
    depth = 1 + max((tensor.depth for tensor in every if tensor.group.startswith("vision")), default=-1)
    first = 0 if vision_blocks is None else depth - vision_blocks
    wanted = [tensor for tensor in every if among(tensor)]
    if not {"all", "random"} & set(selectors):
        wanted = [
            tensor
            for tensor in wanted
            if tensor.group in selectors
            and (not tensor.group.startswith("vision") or tensor.depth < 0 or tensor.depth >= first)
        ]
    if "random" in selectors:
        order = [wanted[row] for row in np.random.default_rng(seed).permutation(len(wanted))]
    else:
        order = sorted(wanted, key=lambda tensor: (-tensor.size, -tensor.depth, tensor.path))
    chosen: set[Tensor] = set()
    for tensor in order:
        if tensor.size <= room:
            chosen.add(tensor)
            room -= tensor.size
    if not chosen:
        smallest = min((tensor.size for tensor in wanted), default=None)
        reason = "the network has none of that kind" if smallest is None else f"the smallest has {smallest} elements"
        raise InputError(
            f"no tensor of {', '.join(selectors)} fits {budget:.2%} of {sum(tensor.size for tensor in every)} "
            f"parameters: {reason}; give a larger budget or other selectors."
        )
    return tuple(tensor for tensor in every if tensor in chosen)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which rows of which parameters are trained; hashable, so that it can be static under jit.

    Attributes:
        rows: pairs of a parameter's path and its trained rows, or None if it is trained whole.
    """

    rows: tuple[tuple[str, tuple[int, ...] | None], ...]

    @classmethod
    def of(cls, chosen: Sequence[Tensor]) -> "Selection":
        """The selection of the given tensors."""
        found: dict[str, tuple[int, ...] | None] = {}
        for tensor in chosen:
            found[tensor.path] = None if tensor.row is None else (*(found.get(tensor.path) or ()), tensor.row)
        return cls(tuple(sorted(found.items())))

    def split(self, parameters: PyTree) -> Trained:
        """The trained tensors as float32 copies, whatever the model's dtype.

        Raises:
            InputError: for a parameter or a row that the network does not have.
        """
        flat = self._checked(parameters)
        return {
            path: jnp.array(flat[path] if rows is None else jnp.take(flat[path], np.array(rows), axis=0), jnp.float32)
            for path, rows in self.rows
        }

    def merge(self, parameters: PyTree, trained: Mapping[str, PyTree]) -> PyTree:
        """The parameters with the trained tensors in place, in the parameters' dtype."""
        flat = self._checked(parameters)
        for path, rows in self.rows:
            leaf, new = flat[path], jnp.asarray(trained[path], flat[path].dtype)
            if rows is None or rows == tuple(range(leaf.shape[0])):
                flat[path] = new
            elif rows == tuple(range(rows[0], rows[-1] + 1)):  # the usual case; cheaper to differentiate than a scatter
                flat[path] = jnp.concatenate([leaf[: rows[0]], new, leaf[rows[-1] + 1 :]])
            else:
                flat[path] = leaf.at[np.array(rows)].set(new)
        return unflatten(flat)

    def _checked(self, parameters: PyTree) -> Leaves:
        """The network's parameters by path, after checking that all selected rows exist."""
        flat = dict(flatten(parameters))
        for path, rows in self.rows:
            if path not in flat:
                raise InputError(f"the network has no parameter {path}.")
            wrong = [row for row in rows or () if not 0 <= row < flat[path].shape[0]]
            if wrong:
                raise InputError(f"{path} has rows 0..{flat[path].shape[0] - 1}, not {wrong[0]}.")
        return flat

    def lowest(self, prefix: str) -> int | None:
        """The first trained row among the stacked parameters with a prefix; None if there is none."""
        found = [min(rows) for path, rows in self.rows if rows is not None and path.startswith(prefix)]
        return min(found, default=None)


def for_learning(
    definition: nnx.GraphDef[Network], parameters: PyTree, selection: Selection, *, recompute: Recompute
) -> nnx.GraphDef[Network]:
    """The network's definition, in which every stack knows which of its layers are trained.

    Blocks before the first trained tensor get no backward pass.

    Args:
        definition: definition of the network.
        parameters: its parameters, or their shapes.
        selection: the tensors that are trained.
        recompute: what the backward pass recomputes instead of storing.
    """
    network = nnx.merge(definition, nnx.State(parameters))
    paths = [path for path, _ in selection.rows]

    def learning(layers: Stackable, prefix: str, *, before: bool) -> None:
        count = jax.tree.leaves(nnx.state(layers))[0].shape[0]
        lowest = selection.lowest(prefix)
        frozen = 0 if before else count if lowest is None else lowest
        layers.learning = Learning(frozen=frozen, trained=lowest is not None, recompute=recompute)

    within = ("tower.layers.", "tower.global_layers.", "tower.post_norm.", "tower.after", "tower.merge")
    entry = any(path.startswith("tower.") and not path.startswith(within) for path in paths)
    learning(network.tower.layers, "tower.layers.", before=entry)
    if hasattr(network.tower, "global_layers"):
        local = entry or any(path.startswith(("tower.layers.", "tower.post_norm.", "tower.after")) for path in paths)
        learning(network.tower.global_layers, "tower.global_layers.", before=local)
    outside = any(not path.startswith(("decoder.layers.", "decoder.norm.", "decoder.unembedding")) for path in paths)
    learning(network.decoder.layers, "decoder.layers.", before=outside)
    return nnx.graphdef(network)
