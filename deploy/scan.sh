#!/bin/sh
# Known vulnerabilities in an image: make scan IMAGE=NAME. Fails on one in a Python package that deploy/audit.toml does
# not excuse, on one in a Debian package for which Debian has a fix, and when the lists cannot be read. pip-audit asks
# PyPI, debsecan asks Debian's security tracker.
set -eu
image=$1 programs=$2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

inside() {
  program=$1
  shift
  docker run --rm --network none --entrypoint "$program" "$image" "$@"
}
inside python -c 'from importlib.metadata import distributions
print(*sorted({f"{one.name}=={one.version}" for one in distributions()}), sep="\n")' >"$folder/python.txt"
inside cat /var/lib/dpkg/status >"$folder/debian.txt"
suite=$(inside cat /etc/os-release | sed -n 's/^VERSION_CODENAME=//p')

excused=$("$programs/python" -m deploy.audit --options)
# shellcheck disable=SC2086 # several words, none of them quoted
"$programs/pip-audit" --strict --no-deps --disable-pip --requirement "$folder/python.txt" $excused
debsecan --suite "$suite" --status "$folder/debian.txt" --only-fixed >"$folder/found.txt"
cat "$folder/found.txt"
test ! -s "$folder/found.txt"
