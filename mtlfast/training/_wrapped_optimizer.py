"""`WrappedOptimizer`, the base class of optimizers that add something to another optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch.optim import Optimizer

from mtlfast._arguments import is_no_instance


class WrappedOptimizer(Optimizer):
    """A torch Optimizer that passes everything on to the optimizer that it wraps.

    The wrapped optimizer keeps the parameter groups, the state, the hooks and every attribute that a user, a scheduler
    or a GradScaler sets. The wrapper keeps its own fields and replacements of its own methods: a scheduler replaces
    `step` by a function that calls the wrapper's `step`, which must not become the wrapped optimizer's.

    `Optimizer.__init__` is not called, because it would make groups, state and hooks of the wrapper's own.

    Args:
        optimizer: the optimizer to wrap.
        fields: the subclass's own fields, by name. The subclass declares them with an annotation and no value. They are
            what pickle and deepcopy keep beside the wrapped optimizer.

    Raises:
        TypeError: `optimizer` is not a torch Optimizer.
    """

    _optim: Optimizer

    def __init__(self, optimizer: Optimizer, **fields: object) -> None:
        if not isinstance(optimizer, Optimizer):
            wrong = is_no_instance(optimizer, Optimizer, "torch.optim.Optimizer", "model.parameters()")
            raise TypeError(f"{type(self).__name__}: optimizer {wrong}")
        self.__setstate__({"_optim": optimizer, **fields})

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._optim

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Calls `step` of the wrapped optimizer with the same arguments, and returns what it returns."""
        return self._optim.step(*args, **kwargs)

    def _step_with_scaler(
        self, closure: Callable[[], float] | None = None, *, grad_scaler: object = None, **kwargs: Any
    ) -> Any:
        """`step` with the parameter by which a GradScaler sees that an optimizer takes the scaler itself."""
        return self._optim.step(closure, grad_scaler=grad_scaler, **kwargs)  # type: ignore[call-overload]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Calls `zero_grad` of the wrapped optimizer."""
        self._optim.zero_grad(set_to_none=set_to_none)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the wrapped optimizer."""
        return self._optim.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self._optim.param_groups = param_groups

    @property
    def state(self) -> Any:
        """The state of the wrapped optimizer."""
        return self._optim.state

    @state.setter
    def state(self, state: Any) -> None:
        self._optim.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the wrapped optimizer."""
        return self._optim.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self._optim.defaults = defaults

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the wrapped optimizer, so that one saved without this wrapper can be loaded with it."""
        return self._optim.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of the wrapped optimizer."""
        self._optim.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group to the wrapped optimizer."""
        self._optim.add_param_group(param_group)

    def __getattr__(self, name: str) -> Any:
        # The methods of Optimizer that register hooks find the wrapped optimizer's dicts of hooks here.
        if name.startswith("__") or "_optim" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._optim, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_own(name):
            object.__setattr__(self, name, value)
        else:
            setattr(self._optim, name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_own(name):
            object.__delattr__(self, name)
        else:
            delattr(self._optim, name)

    def _is_own(self, name: str) -> bool:
        """Whether the wrapper keeps an attribute: a field, or what its class defines and Optimizer does not."""
        if name in self.__dict__ or name.startswith("__"):
            return True
        defined = getattr(type(self), name, None)
        return defined is not None and defined is not getattr(Optimizer, name, None)

    def __getstate__(self) -> dict[str, Any]:
        # Without replaced methods, which torch's optimizers do not pickle either.
        return {name: value for name, value in self.__dict__.items() if not hasattr(type(self), name)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "grad_scaler" in inspect.signature(self._optim.step).parameters:
            self.__dict__["step"] = MethodType(type(self)._step_with_scaler, self)
