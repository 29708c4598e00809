"""Check the parameters of the running notebook."""

import ast
import re
import typing

from IPython import get_ipython

from lib.options import check_options, explain_unknown

NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?", re.IGNORECASE)


def check_parameters() -> dict[str, object]:
    """Check the notebook's parameters and return them.

    Call this function in the cell after the parameters. It is needed because papermill only logs names that
    the notebook does not declare and uses the defaults, passes `-p resume false` as the text 'false', and
    reads the YAML number 1e-4 as text.

    Returns:
        The current values of all variables that the notebook declares as `name: type = value`, by name.

    Raises:
        ValueError: if a name is not declared, a value does not have the declared type, or `lib.options` does
            not allow it. The message lists all problems.
    """
    namespace = getattr(get_ipython(), "user_ns", {})
    annotate = namespace.get("__annotate__") or (lambda _format: {})  # Python 3.14 or later
    declared = namespace["__annotations__"] if "__annotations__" in namespace else annotate(1)
    # `In` lists the executed cells, including the one that papermill injected; under nbval it is empty
    injected = ["", *(source for source in namespace.get("In", []) if source.startswith("# Parameters\n"))]
    assigned = [node.targets[0].id for node in ast.parse(injected[-1]).body if isinstance(node, ast.Assign)]
    problems = [explain_unknown(name, declared) for name in assigned if name not in declared]
    problems += [
        _type_error(name, namespace[name], annotation) or _value_error(name, namespace[name])
        for name, annotation in declared.items()
    ]
    if any(problems):
        raise ValueError("\n".join(problem for problem in problems if problem))
    return {name: namespace[name] for name in declared}


def _value_error(name: str, value: object) -> str | None:
    try:
        check_options(**{name: value})
    except ValueError as error:
        return str(error)
    return None


def _type_error(name: str, value: object, annotation: type) -> str | None:
    types = typing.get_args(annotation) or (annotation,)
    if type(value) in types or (type(value) is int and float in types):
        return None
    expected = " or ".join("None" if cls is type(None) else cls.__name__ for cls in types)
    hint = ""
    if isinstance(value, str) and float in types and NUMBER.fullmatch(value):
        hint = "; in YAML write 0.0001, because 1e-4 is read as text"
    elif isinstance(value, str) and (bool in types or type(None) in types):
        hint = "; papermill knows True, False and None with a capital only"
    elif str in types and value is not None:
        hint = f"; papermill's -p reads 001 as a number, -r as text: `-r {name} 001`"
    return f"{name}: found {value!r}, expected {expected}{hint}"
