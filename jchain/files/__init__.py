"""Files of banks, critics, and results, written atomically. Nothing is pickled or imported."""

from jchain.files.arrays import FORMAT, checksum, read_arrays, write_arrays
from jchain.files.atomic import sync, write_atomically, write_json
from jchain.files.banks import read_bank, write_bank
from jchain.files.modules import (
    FAMILIES,
    HUB,
    decode_groups,
    decode_module,
    encode_groups,
    encode_module,
)

__all__ = [
    "FAMILIES",
    "FORMAT",
    "HUB",
    "checksum",
    "decode_groups",
    "decode_module",
    "encode_groups",
    "encode_module",
    "read_arrays",
    "read_bank",
    "sync",
    "write_arrays",
    "write_atomically",
    "write_bank",
    "write_json",
]
