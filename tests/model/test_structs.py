"""The structures of the C++ boundary: Python and C++ agree on every field."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from openqwen.model import kernels, structs
from openqwen.model.kernels import native

NUMBERS = {ctypes.c_int64: "int64_t", ctypes.c_double: "double"}


def assertions(structure):
    """What C++ must say of this structure if both are the same."""
    name = f"openqwen::{structure.__name__}"
    yield f"sizeof({name}) == {ctypes.sizeof(structure)}"
    for field, kind in structure._fields_:
        place, declared = getattr(structure, field), f"decltype({name}::{field})"
        yield f"offsetof({name}, {field}) == {place.offset}"
        yield f"sizeof({name}::{field}) == {place.size}"
        if kind in NUMBERS:
            yield f"std::is_same_v<{declared}, {NUMBERS[kind]}>"
        else:
            yield f"std::is_pointer_v<std::remove_all_extents_t<{declared}>>"


@pytest.mark.skipif(kernels.library() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("wrong", [False, True])
def test_python_and_cpp_lay_the_structures_out_alike(wrong, tmp_path):
    header = Path(kernels.__file__).parent / "native" / "layers.h"
    checks = [
        check
        for structure in (structs.LinearCall, structs.LayerCall, structs.PagedCall)
        for check in assertions(structure)
    ]
    if wrong:  # the test itself would see a field that moved
        checks.append("offsetof(openqwen::PagedCall, keys) == 8")
    names = {"NO_TRANSFORM": "kNoTransform", "RMS_NORM": "kRmsNorm", "SWIGLU": "kSwiglu"}
    names["ROTATIONS"] = "kRotations"
    checks += [f"{getattr(structs, ours)} == openqwen::{theirs}" for ours, theirs in names.items()]
    lines = ["#include <cstddef>", "#include <type_traits>", f'#include "{header}"']
    lines += [f"static_assert({check});" for check in checks]
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join(lines))
    command = [*native._compiler(), "-std=c++17", "-fsyntax-only", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode != 0) == wrong, done.stderr
