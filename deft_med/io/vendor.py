"""Raw data of scanners: recognised, never parsed, and sent to the converter that its maker's format has.

The converters are those of github.com/ismrmrd; each writes the MRD file that `deft_med.io.mrd` reads.
"""

from __future__ import annotations

import struct

SIEMENS = "Siemens raw data (twix): convert it with siemens_to_ismrmrd (-z 2 for its second measurement)"
GE = "a GE P-file: convert it with ge_to_ismrmrd"
PHILIPS = "Philips raw data: convert it with philips_to_ismrmrd"
BUFFERS = (b"Config\0", b"Dicom\0", b"Meas\0", b"MeasYaps\0", b"Phoenix\0", b"Spice\0")  # of a twix header, syngo VB
# endings that say something only where the bytes say nothing
ENDINGS = {".dat": SIEMENS, ".7": GE, ".raw": PHILIPS, ".lab": PHILIPS, ".data": PHILIPS, ".list": PHILIPS, ".sin": PHILIPS}


def by_content(head: bytes) -> str:
    """What raw data a file's first bytes (64 or more) show, with its converter, or ""."""
    if len(head) < 64:
        return ""
    first, second = struct.unpack_from("<II", head)
    if first >= 32 and 1 <= second <= 64 and head[8:].startswith(BUFFERS):
        return SIEMENS  # VB: length of the header, number of its buffers, the first one's name
    offset, length = struct.unpack_from("<QQ", head, 16)
    if first == 0 and 1 <= second <= 64 and offset % 512 == 0 and 512 <= offset <= 2**20 and 0 < length < 2**48:
        return SIEMENS  # VD and later: a superfile's table of measurements, each at a multiple of 512 bytes
    if head[34:44] in (b"GE_MED_NMR", b"INVALIDNMR"):
        return GE  # the logo in the header's pool
    if head.lstrip(b"# =\t\r\n").startswith(b"DATA DESCRIPTION FILE"):
        return PHILIPS  # the text beside .data
    return ""


def by_ending(suffix: str) -> str:
    """What raw data a file of unknown bytes may be, by its name's ending, or ""."""
    return ENDINGS.get(suffix.lower(), "")
