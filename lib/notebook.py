"""What notebooks need of IPython: parameters that are checked, progress bars, small figures."""

import ast
import difflib
import io
import typing

from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm


def check_parameters() -> dict[str, object]:
    """Check the notebook's parameters; call it in the cell after them.

    papermill only logs a name that the notebook does not declare and goes on with the default, turns
    `-p resume false` into the text 'false', and reads the YAML number 1e-4 as text.

    Returns:
        The values in force, by name, of everything that the notebook declares as `name: type = value`.

    Raises:
        ValueError: names that are not declared, values of another type than declared; all at once.
    """
    namespace = getattr(get_ipython(), "user_ns", {})
    annotate = namespace.get("__annotate__") or (lambda form: {})  # from Python 3.14 on
    declared = namespace["__annotations__"] if "__annotations__" in namespace else annotate(1)
    # In holds the cells that ran, the one papermill injected among them; under nbval it is empty
    injected = ["", *(source for source in namespace.get("In", []) if source.startswith("# Parameters\n"))]
    given = [line.targets[0].id for line in ast.parse(injected[-1]).body if isinstance(line, ast.Assign)]
    problems = [_unknown(name, declared) for name in given if name not in declared]
    problems += [_mistyped(name, namespace[name], kind) for name, kind in declared.items()]
    if any(problems):
        raise ValueError("\n".join(problem for problem in problems if problem))
    return {name: namespace[name] for name in declared}


def _unknown(name: str, declared: dict[str, type]) -> str:
    close = difflib.get_close_matches(name, declared, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{name}: no such parameter, {hint}there are: {', '.join(declared)}"


def _mistyped(name: str, value: object, declared: type) -> str | None:
    kinds = typing.get_args(declared) or (declared,)
    if type(value) in kinds or (type(value) is int and float in kinds):
        return None
    expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
    hint = ""
    if isinstance(value, str) and float in kinds:
        hint = "; in YAML write 0.0001, because 1e-4 is read as text"
    elif isinstance(value, str) and (bool in kinds or type(None) in kinds):
        hint = "; papermill knows True, False and None with a capital only"
    elif str in kinds and value is not None:
        hint = f"; papermill's -p reads 001 as a number, -r as text: `-r {name} 001`"
    return f"{name}: found {value!r}, expected {expected}{hint}"


class _Bar(tqdm):
    """A tqdm bar whose last state stays in a saved notebook (that of tqdm.auto reopens at 0 %)."""

    handle = None

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        text = {"text/plain": msg or str(self)}
        if self.handle is None:
            self.handle = display(text, raw=True, display_id=True)
        else:
            self.handle.update(text, raw=True)


def progress_bar(label: str, total: int, initial: int = 0, disable: bool = False) -> tqdm:
    """A bar for notebooks and terminals; call its `update()`, in the end its `close()`."""
    options = {"desc": label, "total": total, "initial": initial, "mininterval": 0.5, "ncols": 100, "ascii": False}
    if not disable and getattr(get_ipython(), "kernel", None) is not None:
        return _Bar(file=io.StringIO(), **options)  # a closing tqdm ends the line of its file
    return tqdm(disable=disable or None, **options)  # None: silent where there is no terminal


def show_small_figures() -> None:
    """Let the running notebook keep its figures as PNGs of 256 colours, a third of their size."""
    get_ipython().display_formatter.formatters["image/png"].for_type(Figure, small_png)


def small_png(figure: Figure) -> bytes:
    """A PNG of 256 colours, chosen by an octree, which keeps those that are rare; its page stays white."""
    picture, reduced = io.BytesIO(), io.BytesIO()
    figure.savefig(picture, format="png", bbox_inches="tight")
    image = Image.open(picture).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)
    palette, page = image.getpalette(), image.getpixel((0, 0))  # a mean of what is nearly white
    palette[3 * page : 3 * page + 3] = 255, 255, 255
    image.putpalette(palette)
    image.save(reduced, "PNG", optimize=True)
    return reduced.getvalue()
