"""How each parameter group updates its parameters, read from its settings before a step."""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from efsgd.arguments import number_of
from efsgd.blocks import Elementwise
from efsgd.error_feedback import descend_
from efsgd.sgd import sgd_

__all__ = ["Rule", "Rules", "rules_of"]


@dataclass(frozen=True)
class Rule:
    """How a group updates its parameters. Made before anything is sent, so that it can be refused.

    Attributes:
        function: updates parameters and momenta.
        options: of `function`.
        keeps_momentum: whether momenta, where there are any, are updated with the parameters.
        writes_gradients: whether `function` is given gradients in place of parameters.
    """

    function: Elementwise
    options: Mapping[str, Any]
    keeps_momentum: bool = True
    writes_gradients: bool = False

    @property
    def kind(self) -> Hashable:
        """The same for rules that differ in their numbers only."""
        flags = ((k, "a number" if type(v) is float else v) for k, v in self.options.items())
        return self.function, tuple(flags)


#: The rules of parameter groups, by the groups' ids.
Rules: TypeAlias = Mapping[int, Rule]


def rules_of(groups: Iterable[Mapping[str, Any]]) -> Rules:
    """SGD's rules, in each group's momentum form.

    Raises:
        TypeError: a setting is not a number.
        ValueError: it is not finite.
        NotImplementedError: `differentiable`, which goes another way, of one worker only.
    """
    rules = {}
    for group in groups:
        if group["differentiable"]:
            raise NotImplementedError(
                "differentiable=True: a step cannot be differentiated through communication "
                "between workers. Use one worker, or torch.optim.SGD."
            )
        options: dict[str, Any] = {name: number_of(group, name) for name in ("lr", "momentum")}
        options["weight_decay"] = number_of(group, "weight_decay") or None
        foreach = group["foreach"]
        on_cpu = all(parameter.is_cpu for parameter in group["params"])
        options |= {"maximize": group["maximize"], "together": not on_cpu}
        if foreach is not None:
            options["together"] = foreach
        function: Elementwise = descend_
        if group["momentum_form"] == "sgd":
            function = sgd_
            options |= {name: group[name] for name in ("nesterov", "foreach", "fused")}
            options["dampening"] = number_of(group, "dampening")
            options["together"] = options["together"] or bool(group["fused"])
        if group["max_grad_norm"] is not None:
            options["clip"] = 1.0
        # In the paper's form m is kept up to date even while λ is 0, as line 12 has it.
        keeps_momentum = group["momentum_form"] == "paper" or group["momentum"] != 0
        rules[id(group)] = Rule(function, options, keeps_momentum)
    return rules
