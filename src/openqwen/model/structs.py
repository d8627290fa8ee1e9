"""The structures that Python fills for the compiled kernels: those of native/layers.h.

The fields have the same names, order and types as in C++, where they are described.
"""

from ctypes import Structure, c_double, c_int64, c_uint64

# An address, 0 where there is none. Not c_void_p: ctypes refuses to copy structures with pointers,
# and modules that keep one are copied with copy.deepcopy.
Address = c_uint64

ROTATIONS = 3  # of a query in Dual Chunk Attention

# Values of LinearCall.transform.
NO_TRANSFORM, RMS_NORM, SWIGLU = 0, 1, 2


class LinearCall(Structure):
    """One packed matrix, and what happens to its input on the way in."""

    _fields_ = [
        ("packed", Address),
        ("bias", Address),
        ("norm", Address),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("bits", c_int64),
        ("transform", c_int64),
        ("eps", c_double),
    ]


class LayerCall(Structure):
    """Addresses of the `LinearCall` of each matrix of a layer."""

    _fields_ = [("qkv", Address), ("o", Address), ("gate_up", Address), ("down", Address)]


class PagedCall(Structure):
    """What all layers of one forward call over a paged cache have in common."""

    _fields_ = [
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("width", c_int64),
        ("slots", c_int64),
        ("pages", c_int64),
        ("sequences", c_int64),
        ("rows", c_int64),
        ("table_width", c_int64),
        ("tables", Address),
        ("totals", Address),
        ("counts", Address),
        ("chunk_lens", Address),
        ("key_cos", Address),
        ("key_sin", Address),
        ("query_cos", Address * ROTATIONS),
        ("query_sin", Address * ROTATIONS),
        ("keys", Address),
        ("values", Address),
        ("key_scales", Address),
        ("value_scales", Address),
        ("key_bias", Address),
        ("bias_bases", Address),
        ("bias_steps", Address),
    ]
