"""Coverage-guided fuzzing of the decoder and the request parser, with atheris (libFuzzer).

    make fuzz           both, FUZZ_SECONDS each
        make fuzz-corpus    minimise what was found into tests/fuzz/corpus
        python -m tests.fuzz decoder FILE    replay one input

Coverage is measured in Python code only: ours, Pillow's and the multipart parser's. It guides the fuzzer through every
branch of ``model.headers`` and ``serving.requests``. OpenCV, libjpeg-turbo, libpng, libtiff and libwebp are not
instrumented: they only see what the mutations happen to produce (their authors fuzz them on OSS-Fuzz). Most mutations
repair PNG checksums, because few inputs would get past them otherwise. Images that kill their decoder are kept in
runs/fuzz/contained: the sandbox contains the damage, but they deserve a look.
"""

from __future__ import annotations

import random
import struct
import sys
import zlib
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["model", "serving", "multipart", "PIL"]):
    from tests.fuzz.targets import TARGETS

from tests import seeds

PNG = b"\x89PNG\r\n\x1a\n"


def repair(data: bytes) -> bytes:
    """A PNG with the correct checksum after every chunk; any other data unchanged."""
    if not data.startswith(PNG):
        return data
    repaired = bytearray(data)
    at = len(PNG)
    while at + 12 <= len(data):
        end = at + 8 + struct.unpack_from(">I", data, at)[0]
        if end + 4 > len(data):
            break
        struct.pack_into(">I", repaired, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(repaired)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    mutated = atheris.Mutate(data, len(data))
    if random.Random(seed).random() < 0.9:
        mutated = repair(mutated)
    return mutated[:max_size]


def plant(target: str) -> None:
    """Write the seeds into the folder that the fuzzer extends."""
    corpus = Path("runs/fuzz") / target
    corpus.mkdir(parents=True, exist_ok=True)
    images = seeds.images()
    if target == "decoder":
        contents = images
    else:
        contents = {name: f"{kind}\n".encode() + body for name, (kind, body) in seeds.bodies(images["jpeg"]).items()}
    for name, content in contents.items():
        (corpus / name).write_bytes(content)


def main() -> None:
    _, target, *options = sys.argv
    program = f"{sys.executable} -m tests.fuzz {target}"  # libFuzzer restarts itself to merge
    plant(target)
    limits = ["-max_len=8192", "-timeout=120", "-artifact_prefix=runs/fuzz/"]
    atheris.Setup([program, *limits, *options], TARGETS[target], custom_mutator=mutate)
    atheris.Fuzz()


main()
