"""csrc/index where a C++ compiler was when the package was installed, or None: then the references run."""

try:
    from megatron_mm.data import _index
except ImportError:
    _index = None

TOKEN_BYTES = (2, 4, 8)
"""Sizes of ids that csrc/index reads; those of other sizes, in shards that were adopted, are read by the references."""
VERSION = 5
"""The version of the functions that this package calls, as bindings.cpp counts them."""

if _index is not None and getattr(_index, "VERSION", 1) != VERSION:
    raise ImportError(
        "megatron_mm/data/_index was built from other sources than those beside it: run `make setup`, or "
        "`python setup.py build_ext --inplace`."
    )
