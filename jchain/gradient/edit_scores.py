"""What the gradient of a chain says about its edits: the predicted change of loss of each swap, insertion and deletion.

One forward pass and one backward pass of a few vector-Jacobian products along the chain, and each candidate layer once at each
slot, instead of the rest of the chain behind each candidate. At slot `t` the chain holds layer `f_t`, which reads `h_t`; a
candidate `f_b` changes the activations behind it by `f_b(h_t) - f_t(h_t)`, and the outputs, to first order, by the Jacobian of
all that follows applied to that.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Bool, Float, Int, Shaped
from jchain.engine.backend import find_backend, jit_for_problem
from jchain.engine.layer_calls import apply_token
from jchain.engine.plans import choose_chunk
from jchain.gradient import weight_space
from jchain.gradient.joint_moves import JointMoves, join, keep_best
from jchain.gradient.linearize import (
    ChainLike,
    ForwardPass,
    Slot,
    all_members,
    check_chain,
    flatten_rows,
    forward_pass,
    keeps_gradient,
    map_layers,
    scan_backward,
)
from jchain.gradient.loss_predictor import (
    LossPredictor,
    compute_head_vjps,
    has_classes,
    make_loss_predictor,
)
from jchain.groups import LayerGroup
from jchain.problem import Problem
from jchain.pytree import is_concrete

KINDS = ("linearized", "activations", "weights", "nearest")
# Examples on which joint moves are predicted, at most.
_MAX_ROWS = 128


class EditScores(NamedTuple):
    """Predicted change of loss of each edit of a chain, price of layers included; nan where nothing can be said."""

    swap: Float[
        Array, "L N"
    ]  # [L, N], of layer b in place of the one at slot t: 0 for itself, nan where there is none
    insert: Float[
        Array, "L N"
    ]  # [L, N], of layer b before slot t: nan behind the head and where the chain is full
    delete: Float[
        Array, "L"
    ]  # [L], nan where there is no layer, or none to spare (`Problem.min_layers`)
    head: Float[Array, "K"]  # [K], of the other heads, exact
    loss: Float[Array, ""]  # of the chain itself
    layer_calls: Int[Array, ""]  # what they cost

    @property
    def flat(self) -> Float[Array, "M"]:
        """In the order of the rows of `jchain.chain.neighbors`."""
        last = self.swap.shape[0] - 1
        return jnp.concatenate(
            [
                self.swap[:last].T.reshape(-1),
                self.head,
                self.insert[:last].T.reshape(-1),
                self.delete[:last],
            ]
        )


def swap_scores(
    problem: Problem, chain: ChainLike, kind: str = "linearized"
) -> Float[Array, "L N"]:
    """Predicted change of loss of putting layer `b` at slot `t`: `score_edits(...).swap`."""
    return score_edits(problem, chain, kind).swap


def score_edits(
    problem: Problem,
    chain: ChainLike,
    kind: str = "linearized",
    *,
    learning_rate: float = 1e-2,
    num_products: int | None = None,
) -> EditScores:
    """Predicted change of loss of every chain that is one edit away.

    Kinds, with `R` vector-Jacobian products along the chain:

    - `"linearized"`: the loss of the outputs plus their first-order change. `R` is the number of outputs of an example, where
      there are no more than 64, and 17 where there are; or `num_products`. With fewer products than outputs: of a softmax over
      the classes of one label, what the likeliest other classes have more than it, one by one, and the rest of them as one
      (for `C` classes `C - 1` products are all). Of other losses the second order in the outputs (Gauss-Newton), with its
      Hessian in expectation over samples: labels drawn from the softmax where the loss is cross-entropy (Fisher), else random
      signs (Hutchinson), of which each takes two products.
    - `"activations"`: first order in activations, `<dL/dh_{t+1}, f_b(h_t) - f_t(h_t)>`. `R = 1`.
    - `"weights"`: first order in weights, `<dL/dW_t, W_b - W_t>`, for swaps of layers that share a module; nan for others.
    - `"nearest"`: likewise plus `|W_b - W_t|^2 / (2 learning_rate)`: ranks layers by their distance to the weights after a
      step of gradient descent, `W_t - learning_rate dL/dW_t`.

    The cost for a chain of `D` layers is `(2 + R) D` layer calls and, of the first two kinds, `N` for each of the `D` slots
    and, where the chain is not full, `N` more; of the last two `4 D`. Works under `jit` and `vmap`; under a `vmap` one chain
    after another.

    Nothing is known (nan) of an edit whose layer gives activations that are not finite, of those before a layer through which
    the gradient vanishes exactly (one that rounds, say), and of all where the loss of the chain itself is not finite.

    Args:
      problem: bank, split, loss.
      chain: tokens, `[L]`; checked where it is not traced.
      kind: one of the above.
      learning_rate: of `"nearest"`.
      num_products: of `"linearized"`, at most.

    Raises:
      ValueError: `chain` is no chain of this bank, the kind is none, activations (or weights, where the kind needs their
        gradient) are not floating-point, a layer or head cannot be differentiated, a number is not positive, or the products
        are too few.
    """
    chain = _check(problem, chain, kind, num_products)
    if is_concrete(learning_rate) and not learning_rate > 0:
        raise ValueError(f"expected a positive learning_rate, got {learning_rate}")
    return _score(
        problem,
        chain,
        jnp.asarray(learning_rate, jnp.float32),
        all_members(problem.bank),
        kind=kind,
        num_products=num_products,
        backend=find_backend(problem, chain),
    )[0]


def weight_gradients(problem: Problem, chain: ChainLike) -> Float[Array, "L W"]:
    """The gradient of the loss by the weights of the layer at each slot, for four layer calls for each layer.

    Returns:
      `[L, W]`, the leaves of a layer's params flattened one behind the other; nan where the chain has no layer.

    Raises:
      ValueError: the layers are of several modules, or as `score_edits`.
    """
    chain = _check(problem, chain, "weights")
    weight_space.only_group(problem.bank)
    return _find_weight_gradients(problem.without_names(), chain)


@jax.jit
def _find_weight_gradients(problem: Problem, chain: Array) -> Array:
    _check_gradients(problem, "weights")
    return weight_space.flatten_gradients(problem, chain, forward_pass(problem, chain))


def score_moves(
    problem: Problem,
    chain: ChainLike,
    *,
    num_best: int = 4,
    num_pairs: int = 16,
    members: tuple[Int[Array, "_"], ...] | None = None,
    num_products: int | None = None,
) -> tuple[EditScores, JointMoves]:
    """Linearized scores, and joint moves made of the best swaps of each slot, for no layer call more.

    Args:
      problem: as for `score_edits`.
      chain: likewise.
      num_best: swaps of each slot that joint moves are made of, at most N.
      num_pairs: pairs that are returned, at most `(L num_best)^2`.
      members: for each group of the bank's layers, the places of those to be scored; all when None. Others are nan.
      num_products: likewise.

    Raises:
      ValueError: a number is not positive or too large, or as `score_edits`.
    """
    chain = _check(problem, chain, "linearized", num_products)
    if (
        not 1 <= num_best <= problem.bank.num_layers
        or not 1 <= num_pairs <= (chain.size * num_best) ** 2
    ):
        raise ValueError(
            f"expected num_best in 1..{problem.bank.num_layers} and num_pairs in 1..{(chain.size * num_best) ** 2}, got "
            f"{num_best} and {num_pairs}"
        )
    if members is None:
        members = all_members(problem.bank)
    _check_members(problem, members)
    scores, joint = _score(
        problem,
        chain,
        jnp.float32(1.0),
        members,
        kind="linearized",
        num_products=num_products,
        num_best=num_best,
        num_pairs=num_pairs,
        backend=find_backend(problem, chain),
    )
    assert joint is not None  # num_best is at least 1
    return scores, joint


def _check_members(problem: Problem, members: tuple[Array, ...]) -> None:
    sizes = [len(group.tokens) for group in problem.bank.layers]
    if len(members) != len(sizes) or any(jnp.ndim(rows) != 1 for rows in members):
        raise ValueError(
            f"expected places [n] for each of {len(sizes)} groups of layers, got {len(members)} arrays"
        )
    for size, rows in zip(sizes, members, strict=True):
        if is_concrete(rows) and np.size(rows) and not (np.min(rows) >= 0 and np.max(rows) < size):
            raise ValueError(
                f"expected places in 0..{size - 1}, got {np.min(rows)}..{np.max(rows)}"
            )


def choose_products(problem: Problem) -> int | None:
    """`num_products` of a search, which wants many chains scored: of a softmax over classes the likeliest besides the label,
    and the rest as one."""
    outputs = jax.eval_shape(
        lambda x: problem.bank.heads[0].apply(0, problem.bank.embed(x)), problem.data.x
    )
    return 2 if has_classes(problem, outputs) else None


def _check(problem: Problem, chain: ChainLike, kind: str, num_products: int | None = None) -> Array:
    if num_products is not None and num_products < 1:
        raise ValueError(f"expected num_products of at least 1, got {num_products}")
    if kind not in KINDS:
        raise ValueError(f"expected a kind of {', '.join(KINDS)}, got {kind!r}")
    return check_chain(problem, chain)


def _check_gradients(problem: Problem, kind: str) -> None:
    """When a program is traced: it takes longer than to run one."""
    bank = problem.bank
    hidden = jax.eval_shape(bank.embed, problem.data.x)
    if not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise ValueError(
            f"expected floating-point activations, which have a gradient, got {hidden.dtype}"
        )
    for groups, is_by_weights in (
        (bank.layers, kind in ("weights", "nearest")),
        (bank.heads, False),
    ):
        for group in groups:
            _check_gradient(group, hidden, is_by_weights)


def _check_gradient(group: LayerGroup, hidden: jax.ShapeDtypeStruct, is_by_weights: bool) -> None:
    name = type(group.module).__name__
    if is_by_weights:
        for leaf in jax.tree.leaves(group.params):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ValueError(
                    f"layer {name}: expected floating-point weights, which have a gradient, got {leaf.dtype}"
                )
    try:
        jax.eval_shape(lambda h: jax.vjp(partial(group.apply, 0), h)[1](group.apply(0, h)), hidden)
    except Exception as error:  # whatever a user's module raises
        raise ValueError(f"{name} cannot be differentiated: {str(error).splitlines()[0]}") from None


@jit_for_problem(static_argnames=("kind", "num_products", "num_best", "num_pairs", "backend"))
def _score(
    problem: Problem,
    chain: Int[Array, "L"],
    learning_rate: Float[Array, ""],
    members: tuple[Int[Array, "_"], ...],
    *,
    kind: str,
    num_products: int | None,
    num_best: int = 0,
    num_pairs: int = 0,
    backend: str,
) -> tuple[EditScores, JointMoves | None]:
    _check_gradients(problem, kind)

    # A plain vmap would apply each layer with gathered weights, and compute both sides of each branch.
    @jax.custom_batching.sequential_vmap
    def score(
        problem: Problem, chain: Array, learning_rate: Array, members: tuple[Array, ...]
    ) -> tuple[EditScores, JointMoves | None]:
        if kind in ("weights", "nearest"):
            rate = learning_rate if kind == "nearest" else None
            return _score_by_weights(problem, chain, rate), None
        static = _Static(kind, num_products, num_best, num_pairs, backend)
        return _score_by_outputs(problem, chain, members, static)

    return score(problem, chain, learning_rate, members)


class _Static(NamedTuple):
    """The static arguments of `_score`."""

    kind: str
    num_products: int | None
    num_best: int  # 0 for no joint moves
    num_pairs: int
    backend: str


class _Carry(NamedTuple):
    """The backward pass after a slot."""

    vjps: Float[Array, "R B ..."]  # [R, B, ...F], at the output of the slot
    is_known: Bool[Array, ""]  # False once a layer has lost the gradient


class _SlotScores(NamedTuple):
    """Scores of the edits of one slot, without layer penalties."""

    swap: Float[Array, "*L N"]
    insert: Float[Array, "*L N"]
    delete: Float[Array, "*L"]
    best: tuple[Array, Array] | None  # of `keep_best`; None if no joint moves are wanted


def _score_by_weights(
    problem: Problem, chain: Int[Array, "L"], learning_rate: Float[Array, ""] | None
) -> EditScores:
    forward = forward_pass(problem, chain)
    swap = weight_space.score_swaps(problem, chain, forward, learning_rate)
    unknown = jnp.full_like(swap, jnp.nan)
    parts = (swap, unknown, unknown[:, 0])
    return add_layer_penalty(problem, chain, forward, parts, 4 * forward.length)


def _score_by_outputs(
    problem: Problem,
    chain: Int[Array, "L"],
    members: tuple[Int[Array, "_"], ...],
    static: _Static,
) -> tuple[EditScores, JointMoves | None]:
    forward = forward_pass(problem, chain)
    predictor, vjps = compute_head_vjps(problem, chain, forward, static.kind, static.num_products)
    # Samples stand for a mean over all examples, so none may be left out.
    stride = 1 if predictor.is_sampled else -(-problem.data.x.shape[0] // _MAX_ROWS)
    rows = slice(None, None, stride)
    step_fn = partial(_score_slot, problem, forward.length, members, predictor, rows, static)
    num_slots = jnp.minimum(forward.length + 1, problem.max_layers)
    last = _Carry(vjps, jnp.array(True))
    swap, insert, delete, best = scan_backward(step_fn, last, chain, forward, num_slots)
    num_scored = sum(places.shape[0] for places in members)
    calls = num_scored * num_slots + (2 + predictor.num_products) * forward.length
    joint = None
    if best is not None:
        predict_fn = predictor.predict_fn
        if not predictor.is_sampled:
            outputs = apply_token(
                problem.bank.heads, chain[forward.length], forward.hidden[forward.length][rows]
            )
            predict_fn = make_loss_predictor(
                problem.take(rows), outputs, static.kind, static.num_products
            ).predict_fn
        joint = join(problem, chain, *best, predict_fn, static.num_pairs)
    return add_layer_penalty(problem, chain, forward, (swap, insert, delete), calls), joint


def _score_slot(
    problem: Problem,
    length: Int[Array, ""],
    members: tuple[Int[Array, "_"], ...],
    predictor: LossPredictor,
    rows: slice,
    static: _Static,
    carry: _Carry,
    slot: Slot,
) -> tuple[_Carry, _SlotScores]:
    """Score the edits of one slot, and pull the vjps back through its layer."""
    bank, predict_fn = problem.bank, predictor.predict_fn
    vjps, is_known = carry
    is_layer = slot.place < length
    before = jax.lax.cond(
        is_layer, partial(_pull_back, bank.layers, slot.token, slot.before), lambda v: v, vjps
    )
    is_known_before = is_known & keeps_gradient(before, vjps)

    def score(made: Array) -> tuple[Array, Array, Array | None]:
        change = _dot(vjps, made - slot.after)
        kept = change[rows] if static.num_best else None
        return predict_fn(change), predict_fn(_dot(before, made - slot.before)), kept

    chunk = choose_chunk(bank.num_layers, slot.before, static.backend)
    swap, insert, change = map_layers(score, bank, members, slot.before, chunk)
    own = jnp.where(is_layer, slot.token, bank.num_layers)
    swap = jnp.where(is_layer & is_known, swap, jnp.nan)
    best = None
    if change is not None:
        best = keep_best(problem, swap.at[own].set(jnp.nan), change, static.num_best)
    insert = jnp.where((length < problem.max_layers) & is_known_before, insert, jnp.nan)
    delete = predict_fn(_dot(vjps, slot.before - slot.after))
    delete = jnp.where(is_layer & is_known, delete, jnp.nan)
    scores = _SlotScores(swap.at[own].set(0.0), insert, delete, best)
    return _Carry(before, is_known_before), scores


def add_layer_penalty(
    problem: Problem,
    chain: Array,
    forward: ForwardPass,
    scores: tuple[Array, Array, Array],
    layer_calls: Array,
) -> EditScores:
    """Scores of swaps, insertions and deletions with the price of layers, and nan where nothing is known."""
    num_layers = problem.bank.num_layers
    swap, insert, delete = scores
    cost = jnp.broadcast_to(problem.layer_cost, (num_layers,))
    own = cost[jnp.clip(chain, 0, num_layers - 1)]
    head = (forward.heads - forward.loss).at[chain[forward.length] - num_layers].set(0.0)
    delete = jnp.where(forward.length > problem.min_layers, delete, jnp.nan)
    parts = swap + cost[None] - own[:, None], insert + cost[None], delete - own, head
    is_known = jnp.isfinite(forward.loss)
    parts = (jnp.where(jnp.isfinite(part) & is_known, part, jnp.nan) for part in parts)
    return EditScores(*parts, forward.loss + problem.layer_penalty(chain), layer_calls)


def _pull_back(
    groups: tuple[LayerGroup, ...], token: Array, hidden: Array, rows: Float[Array, "R B ..."]
) -> Float[Array, "R B ..."]:
    """The vjps at the input of a layer, from those at its output."""
    vjp_fn = jax.vjp(partial(apply_token, groups, token), hidden)[1]
    return jax.vmap(lambda row: vjp_fn(row)[0])(rows)


def _dot(rows: Float[Array, "R B ..."], change: Shaped[Array, "B ..."]) -> Float[Array, "B R"]:
    num_rows, num_examples = rows.shape[:2]
    return jnp.einsum(
        "rbf,bf->br",
        rows.reshape(num_rows, num_examples, -1),
        flatten_rows(change),
        preferred_element_type=jnp.promote_types(jnp.float32, rows.dtype),
    )
