"""The basis of an entropy-coded pack for training and shared-basis serving: fitted by components, stored in 8 bits."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict

from ..core.engine import Engine
from ..core.fit_options import SIZE_OPTIONS
from ..core.options import to_int
from ..core.subspace import Subspace
from ..errors import OptionError
from ..pack import manifest
from ..pack.manifest import FitInfo
from ..pack.pack import Pack
from .collection import Collection, ReadCollection
from .component_fit import FittedCollection, fit_components
from .options import Execution, Target

DTYPE = "int8"
"""Storage of the components, and of coefficients that are added to the basis as a pack of its own."""


def check_basis(basis: int | None, target: Target, shapes: Mapping[str, tuple[int, int]]) -> int | None:
    """Return the number of components of the basis; None for no basis.

    Args:
        basis: The option of `fit`.
        target: Target of the fit.
        shapes: (out, in) of each module, by name in the subspace.

    Raises:
        OptionError: The number is out of range, or the pack of the fit is a basis already.
    """
    if basis is None:
        return None
    basis = to_int("basis", basis)
    largest = max(max(shape) for shape in shapes.values())
    if not 1 <= basis <= largest:
        raise OptionError(
            f"basis={basis}: the number of components per side must be from 1 to {largest}, the largest dimension of a "
            "module. Remove basis for a pack without a basis for training."
        )
    if not target.is_coded:
        fits_by_components = target.purpose in ("training", "serving")
        raise OptionError(
            f"basis={basis} adds a basis to an entropy-coded pack, and the adapters of this pack are coefficients in a "
            "basis already. Remove basis (--basis)"
            + (
                f", or remove purpose={target.purpose!r} (--for {target.purpose})."
                if fits_by_components
                else "; or fit without a dtype, and with max_error, max_bytes or ratio."
            )
        )
    return basis


def fit_basis(
    sources: ReadCollection, collection: Collection, n_components: int, execution: Execution, engine: Engine
) -> Pack:
    """Fit a basis to a collection, and return it as a pack without adapters. Its note says how well it fits them.

    Args:
        sources: Base model and excluded modules.
        collection: The adapters.
        n_components: Maximum number of components per side and module.
        execution: Device and solver.
        engine: Open engine that runs one job per module.
    """
    sizes = {**dict.fromkeys(SIZE_OPTIONS), "n_components": n_components}
    fitted = fit_components(collection, Target.of(sizes, "delta", None, (DTYPE, None), None, None), execution, engine)
    subspace = Subspace(fitted.modules)
    basis = Pack(
        subspace,
        manifest.describe(subspace, fitted.storage),
        {},
        FitInfo(
            **asdict(fitted.options),
            auto=False,
            solver="iterative" if fitted.by_iteration else "exact",
            excluded_modules=sorted(sources.excluded_modules),
        ),
        base_model=sources.base_model,
        revision=sources.revision,
        coefficient_dtype=fitted.coefficient_storage.name,
    )
    basis.notes.append(_note(basis, fitted, collection))
    basis.seconds.update({"basis": sum(fitted.seconds.values())})
    return basis


def _note(basis: Pack, fitted: FittedCollection, collection: Collection) -> str:
    errors = sorted(fitted.encoded[name].error.delta_error for name in collection.weights)
    accuracy = ""
    if errors:
        median = statistics.median(errors)
        accuracy = f" Adapters have errors of {errors[0]:.3f} to {errors[-1]:.3f} on it (median {median:.3f})."
    return (
        f"The basis for training and shared-basis serving takes {basis.info.stored_bytes:,} bytes: at most "
        f"{fitted.options.n_components} components per side, in {DTYPE}.{accuracy}"
    )
