"""csrc/index where a C++ compiler was when the package was installed, or None: then the references run."""

try:
    from megatron_mm.data import _index
except ImportError:
    _index = None

VERSION = 4
"""The version of the functions that this package calls, as bindings.cpp counts them."""

if _index is not None and getattr(_index, "VERSION", 1) != VERSION:
    raise ImportError(
        "megatron_mm/data/_index was built from other sources than those beside it: run `make setup`, or "
        "`python setup.py build_ext --inplace`."
    )
