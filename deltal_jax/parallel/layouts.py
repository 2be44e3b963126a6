"""The sizes of the mesh where nobody gives them: `mesh.auto`."""

import dataclasses
from collections.abc import Callable, Iterator

from deltal_jax.errors import UserError

#: The part of a device's memory that an estimate may fill: the compiler needs some, too.
USABLE = 0.9


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the mesh's axes."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    def __str__(self) -> str:
        sizes = dataclasses.asdict(self).items()
        return " × ".join(f"{name} {size}" for name, size in sizes if size > 1) or "data 1"


def layouts(devices: int, heads: int) -> Iterator[Layout]:
    """All that multiply to `devices`, with a tensor axis that divides `heads`, in the order in
    which they are wanted: what crosses devices least comes first.

    Whole copies on "data" cross them once an update, parameters over "fsdp" in each layer, and
    activations over "tensor" twice a layer; "context" moves the tokens of rows in each layer, and
    is worth that only where a row has no room.
    """
    for context in _divisors(devices):
        for tensor in _divisors(devices // context):
            if heads % tensor:
                continue
            rows = devices // context // tensor
            for fsdp in _divisors(rows):
                yield Layout(rows // fsdp, fsdp, tensor, context)


def choose_layout(
    devices: int, memory: int | None, heads: int, needed: Callable[[Layout], int]
) -> tuple[Layout, str]:
    """The first of `layouts` that takes at most `USABLE` of a device's `memory`, in bytes; and why,
    in one line. `needed` estimates the bytes that a layout takes on each device.

    Where the memory is not known (None), parameters are split over all devices: nothing is held
    twice. Raises UserError where no layout fits.
    """
    if memory is None:
        layout = Layout(fsdp=devices)
        return layout, f"mesh.auto: {layout}, as the memory of the devices is not known"
    free = int(memory * USABLE)
    before: tuple[Layout, int] | None = None
    for layout in layouts(devices, heads):
        takes = needed(layout)
        if takes <= free:
            said = f"mesh.auto: {layout}: takes about {_gib(takes)} of {_gib(memory)} GiB a device"
            if before is not None:
                said = f"{said}, where {before[0]} would take {_gib(before[1])}"
            return layout, said
        if before is None or takes < before[1]:
            before = layout, takes
    assert before is not None
    raise UserError(
        f"mesh.auto: no layout of {devices} devices of {_gib(memory)} GiB holds the run: "
        f"{before[0]} takes the least, about {_gib(before[1])} of {_gib(free)} GiB; use more "
        "devices, model.remat=layer, fewer rollout.slots, or shorter rows"
    )


def _divisors(number: int) -> list[int]:
    return [x for x in range(1, number + 1) if number % x == 0]


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g}"
