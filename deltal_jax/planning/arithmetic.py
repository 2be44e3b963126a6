"""Work of a step counted from the architecture alone: what is useful of it, and what is done."""

from collections.abc import Iterable

from deltal_jax.model.architecture import Architecture, matrix_size, window_of

#: Products of T × T × d that attention takes in the forward pass: scores, and values.
FORWARD = 2
#: In the backward pass, where scores are kept: of keys, queries, values and the mass.
BACKWARD = 4
#: By kernel: they compute the scores anew; splash does so twice, once for the gradient of the
#: queries and once for that of keys and values.
BACKWARD_DONE = {"splash": 7, "cudnn": 5, "xla": 4}


def matrix_flops(arch: Architecture, tokens: float) -> float:
    """Of the layers' matrix products with so many tokens, once."""
    return 2.0 * tokens * arch.layers * matrix_size(arch)


def head_flops(arch: Architecture, tokens: float) -> float:
    """Of the logits of so many tokens, once."""
    return 2.0 * tokens * arch.d_model * arch.vocab


def product_flops(arch: Architecture, lengths: Iterable[int]) -> float:
    """Of one product of T × T × d in all heads and layers, for sequences of these lengths: only the
    pairs that causality and windows leave."""
    window, local = window_of(arch), sum(arch.local_layers)
    pairs = 0.0
    for length in lengths:
        whole = length * (length + 1) / 2
        near = min(window or length, length)
        windowed = whole - (length - near) * (length - near + 1) / 2
        pairs += (arch.layers - local) * whole + local * windowed
    return 2.0 * arch.heads * arch.head_dim * pairs


def useful_flops(arch: Architecture, lengths: Iterable[int], trained: float) -> float:
    """Of the gradient of sequences of these lengths, of whose tokens so many are trained: 6 · N ·
    tokens and attention; no recomputation, no padding. Of frozen matrices 4 · N: they have no
    gradient of their own."""
    lengths = list(lengths)
    passes = 3 if arch.lora is None else 2
    matrices = passes * (matrix_flops(arch, sum(lengths)) + head_flops(arch, trained))
    return matrices + (FORWARD + BACKWARD) * product_flops(arch, lengths)


def attention_anew(arch: Architecture) -> int:
    """How often the backward pass of a layer takes its attention once more."""
    return int(arch.remat in ("layer", "offload"))


def gradient_flops(arch: Architecture, rows: int, width: int, trained: float) -> float:
    """What the program of a micro-batch does: padding, the layers' forward pass anew where they are
    recomputed (but for the last product of each, which no gradient needs), that of the head always,
    and the kernel's own recomputation."""
    passes = 3 if arch.lora is None else 2
    anew = int(arch.remat in ("layer", "attention", "offload"))
    last = arch.d_model * arch.d_ff / matrix_size(arch)
    products = FORWARD * (1 + attention_anew(arch)) + BACKWARD_DONE[arch.attention]
    attention = products * product_flops(arch, [width]) * rows
    if arch.attention == "xla":  # takes the pairs that the mask leaves out, too
        attention = products * 2.0 * arch.layers * arch.heads * arch.head_dim * width**2 * rows
    head = (passes + 1) * head_flops(arch, trained)
    return (passes + anew * (1 - last)) * matrix_flops(arch, rows * width) + head + attention


def forward_flops(arch: Architecture, rows: int, width: int, trained: float) -> float:
    """What the log-probabilities of a micro-batch take."""
    attention = FORWARD * product_flops(arch, [width]) * rows
    return matrix_flops(arch, rows * width) + head_flops(arch, trained) + attention


def decoding_flops(arch: Architecture, slots: int, window: int) -> float:
    """Of one more token in every slot, with a cache of so many."""
    attention = 4.0 * arch.layers * arch.heads * arch.head_dim * slots * window
    return matrix_flops(arch, slots) + head_flops(arch, slots) + attention
