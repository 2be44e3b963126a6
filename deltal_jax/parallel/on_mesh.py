"""Functions that are compiled where their mesh is known."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh


class OnMesh:
    """`jax.jit(function)`, called and lowered where the mesh, if there is one, is known to what
    splits by it: kernels of attention, and `sharding.constrain`.

    With `layout` what it gives lies on the mesh as `layout` says of its first argument, and it is
    compiled once for each structure of that. What the compiler chose for itself could be another
    layout, or the same by another name, for which all that takes it would be compiled anew.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        mesh: Mesh | None,
        layout: Callable[[Any], Any] | None = None,
        **options: Any,
    ):
        self._function, self._mesh, self._layout = function, mesh, layout
        self._options = options
        self._compiled: dict[Any, Any] = {}

    def __call__(self, first: Any, *others: Any) -> Any:
        with self._known():
            return self._of(first)(first, *others)

    def lower(self, first: Any, *others: Any) -> jax.stages.Lowered:
        """The same program for arguments that may be shapes, not yet compiled."""
        with self._known():
            return self._of(first).lower(first, *others)

    def eval_shape(self, first: Any, *others: Any) -> Any:
        """Shapes of what it gives."""
        with self._known():
            return self._of(first).eval_shape(first, *others)

    def _known(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _of(self, first: Any) -> Any:
        kind = None if self._layout is None else jax.tree.structure(first)
        if kind not in self._compiled:
            options = dict(self._options)
            if self._layout is not None:
                options["out_shardings"] = self._layout(first)
            self._compiled[kind] = jax.jit(self._function, **options)
        return self._compiled[kind]
