"""Pins an overlay to one image, by digest: python deploy/k8s/pin.py production NAME@sha256:DIGEST

What was tested, scanned and signed is then what runs; a tag can be moved. `check` in place of an overlay only validates
the image's name.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

TEXT = """\
# The image of this overlay. `make k8s-pin` writes a digest here.
apiVersion: kustomize.config.k8s.io/v1alpha1
kind: Component
images:
  - name: classifier
    newName: {name}
    digest: {digest}
"""


def main(overlay: str, image: str) -> None:
    parts = re.fullmatch(r"(\w[\w./:-]*)@(sha256:[0-9a-f]{64})", image)  # a leading - would be an option
    file = Path(__file__).parent / "overlays" / overlay / "image/kustomization.yaml"
    if not parts:
        raise SystemExit(f"error: IMAGE={image!r}; expected NAME@sha256:DIGEST")
    if overlay == "check":
        return
    if not file.exists():
        raise SystemExit(f"error: OVERLAY={overlay!r}; expected one of deploy/k8s/overlays")
    file.write_text(TEXT.format(name=parts[1], digest=parts[2]))


if __name__ == "__main__":
    main(*sys.argv[1:])
