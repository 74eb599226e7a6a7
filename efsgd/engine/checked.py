"""What parameter groups say, checked once, and again whenever they say something else."""

from typing import Any

from efsgd.engine.consistency import digest_of
from efsgd.engine.parameters import PER_PARAMETER, Groups
from efsgd.engine.update import Method, Rules


class CheckedGroups:
    """The rules that parameter groups were last found to say.

    `digest` is of their settings, which must be equal on all workers.
    """

    def __init__(self, method: Method) -> None:
        self._method, self.digest = method, 0
        self._said: list[dict[str, Any]] = []
        self._rules: Rules = {}

    def rules(self, groups: Groups) -> Rules:
        """How the groups are to be updated; raises where they say what cannot be done."""
        said, is_known = [], len(groups) == len(self._rules)
        for group in groups:
            is_known = is_known and id(group) in self._rules
            own: dict[str, Any] = {}
            for name, value in group.items():
                if value is None or isinstance(value, int | float | str):
                    # 1, 1.0 and True are equal, and not all of them are ranks.
                    own[name] = value.__class__, value
                elif name not in ("params", "param_names", PER_PARAMETER):
                    is_known = False  # it may change in place
            own["params"], own[PER_PARAMETER] = (
                len(group["params"]),
                repr(group.get(PER_PARAMETER)),
            )
            own["step"] = None  # the one that changes by itself
            said.append(own)
        if not is_known or said != self._said:
            self._method.validate(groups)
            self._rules, self._said = self._method.rules(groups), said
            self.digest = digest_of(groups, self._method)
        return self._rules
