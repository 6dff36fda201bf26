"""A tape of operations with what each keeps for its derivative, and the memory of running it backwards.

Sizes are bytes a token: every tensor of a language model but its parameters has one row a token.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

#: Bytes of a float32.
WIDE = 4


@dataclass(eq=False)
class Tensor:
    """A tensor of `width` numbers a token; two are the same only if they are one object."""

    width: float
    itemsize: int

    @property
    def bytes(self) -> float:
        """Bytes a token."""
        return self.width * self.itemsize


@dataclass(eq=False)
class Op:
    """One differentiable operation.

    Attributes:
        inputs: tensors that a gradient flows back to.
        output: what it computes.
        saves: tensors that its derivative needs.
        scratch: bytes that its backward pass needs beside the gradients.
        part: the part of the model that it belongs to.
    """

    inputs: list[Tensor]
    output: Tensor
    saves: list[Tensor]
    scratch: float
    part: str


@dataclass
class Tape:
    """Operations in the order of the forward pass.

    Attributes:
        itemsize: bytes of what matrix products read and write: 2 under bfloat16 autocast, else 4.
        part: the part of the model that operations recorded from now on belong to.
        kernels: norms are fused kernels.
        ops: what was recorded since `cut`.
    """

    itemsize: int
    part: str = ""
    kernels: bool = False
    ops: list[Op] = field(default_factory=list)

    def cut(self) -> list[Op]:
        """What was recorded since the last cut."""
        ops, self.ops = self.ops, []
        return ops

    def record(
        self, inputs: Sequence[Tensor], output: Tensor, saves: Sequence[Tensor] = (), scratch: float = 0
    ) -> Tensor:
        """Append an operation and return its output."""
        self.ops.append(Op(list(inputs), output, list(saves), scratch, self.part))
        return output

    def cast(self, x: Tensor, itemsize: int) -> Tensor:
        """`x` in another precision; the same tensor if it has that one."""
        return x if x.itemsize == itemsize else self.record([x], Tensor(x.width, itemsize))

    def linear(self, x: Tensor, width: int) -> Tensor:
        """`W x`: autocast casts x once for each product, and the product keeps what it read."""
        x = self.cast(x, self.itemsize)
        return self.record([x], Tensor(width, self.itemsize), [x])

    def norm(self, z: Tensor, groups: int, itemsize: int) -> Tensor:
        """A norm with its alpha."""
        if not self.kernels:
            n = self.normalise(z, groups)
            return self.scale(n, n.width, itemsize)
        kept = z if z.itemsize <= itemsize else Tensor(z.width, itemsize)
        return self.record([z], Tensor(z.width, itemsize), [kept, Tensor(groups, WIDE)])

    def residual_norm(self, z: Tensor, x: Tensor, kept: Tensor, normed: bool, post: bool) -> Tensor:
        """`x + alpha * norm(z)` in one kernel, with a post-norm or without; `kept` is what is kept of x."""
        saves = [z] if normed or post else []
        if normed:
            saves.append(Tensor(1, WIDE))
        if post:
            saves += [kept, Tensor(1, WIDE)]
        return self.record([z, x], Tensor(x.width, x.itemsize), saves)

    def skip(self, z: Tensor) -> Tensor:
        """The same z without its norm, of which the statistic is left: `mean(z^2)`."""
        wide = self.cast(z, WIDE)
        self.record([wide], Tensor(1, WIDE), [wide], scratch=wide.bytes)
        return z

    def normalise(self, z: Tensor, groups: int = 1) -> Tensor:
        """`z * r`, r = rsqrt(mean(z^2) + eps)` of each group, float32."""
        z = self.cast(z, WIDE)
        square = self.record([z], Tensor(z.width, WIDE), [z], scratch=2 * z.bytes)
        r = Tensor(groups, WIDE)
        self.record([square], r, [r])
        return self.record([z, r], Tensor(z.width, WIDE), [z, r], scratch=z.bytes)

    def scale(self, n: Tensor, width: float, itemsize: int) -> Tensor:
        """`alpha * n`, or of a part of n that is `width` wide, in float32 and then cast."""
        return self.cast(self.record([n], Tensor(width, WIDE), [n], scratch=width * WIDE), itemsize)

    def rope(self, x: Tensor) -> Tensor:
        """Rotated queries or keys: linear in x, so x is not kept."""
        return self.record([x], Tensor(x.width, x.itemsize), scratch=2 * x.width * WIDE)

    def add(self, branch: Tensor, stream: Tensor) -> Tensor:
        """`c * stream + branch`."""
        return self.record([stream, branch], Tensor(stream.width, max(stream.itemsize, branch.itemsize)))

    def silu(self, x: Tensor) -> Tensor:
        """`x * sigmoid(x)`."""
        return self.record([x], Tensor(x.width, x.itemsize), [x])

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """`a * b`."""
        return self.record([a, b], Tensor(a.width, a.itemsize), [a, b])

    def attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int, context: int, fused: bool) -> Tensor:
        """`softmax(q k^T / sqrt(D)) v`."""
        out = Tensor(q.width, self.itemsize)
        if fused:
            return self.record([q, k, v], out, [q, k, v, out, Tensor(heads, WIDE)])
        # torch's unfused path works in float32, with k and v repeated to all heads
        weights = Tensor(heads * context, WIDE)
        repeated = [Tensor(q.width, WIDE) for _ in range(3)]
        return self.record([q, k, v], out, [*repeated, weights], scratch=2 * weights.bytes)

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """`-log softmax(logits)[target]`, float32; keeps log softmax and the int64 targets."""
        logits = self.cast(logits, WIDE)
        log_probabilities = Tensor(logits.width, WIDE)
        self.record([logits], log_probabilities, [log_probabilities])
        return self.record([log_probabilities], Tensor(0, WIDE), [Tensor(1, 8)])

    def logsumexp_squared(self, logits: Tensor, loss: Tensor) -> None:
        """The z-loss added to `loss`; keeps the logits."""
        logits = self.cast(logits, WIDE)
        self.record([logits], loss, [logits, Tensor(1, WIDE)], scratch=logits.bytes)


def kept(ops: Iterable[Op]) -> dict[Tensor, str]:
    """The tensors that the derivatives of these operations need, each once, with the part that keeps it first."""
    found: dict[Tensor, str] = {}
    for op in ops:
        for tensor in op.saves:
            found.setdefault(tensor, op.part)
    return found


class Backward:
    """Bytes a token that are held while operations run backwards.

    Args:
        held: tensors that are there whatever the operations keep, e.g. the inputs of checkpointed blocks.

    Attributes:
        saved: what is kept at the moment, gradients not counted.
        peak: the most since it was last set to 0.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        self._uses: Counter[Tensor] = Counter()
        self._gradients: dict[Tensor, float] = {}
        self.saved = self.peak = 0.0
        self._keep(held)

    def forward(self, ops: Iterable[Op]) -> None:
        """Keep what the derivatives of these operations need."""
        for op in ops:
            self._keep(op.saves)
        self.peak = max(self.peak, self.saved)

    def backward(self, ops: Sequence[Op]) -> None:
        """Run them backwards: gradients come and go, and what an operation kept is let go after it."""
        for op in reversed(ops):
            incoming = self._gradients.pop(op.output, 0.0)
            # a gradient that is there already is added to, after the new one was computed
            fresh = incoming + op.scratch + sum(tensor.bytes for tensor in op.inputs)
            self.peak = max(self.peak, self.saved + sum(self._gradients.values()) + fresh)
            self._gradients |= {tensor: tensor.bytes for tensor in op.inputs}
            self.release(op.saves)

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Let go of one use of each tensor."""
        for tensor in tensors:
            self._uses[tensor] -= 1
            if not self._uses[tensor]:
                self.saved -= tensor.bytes

    def _keep(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if not self._uses[tensor]:
                self.saved += tensor.bytes
            self._uses[tensor] += 1
