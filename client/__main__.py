"""Classify files, folders and globs, with a running service or in this process.

    python -m client photos 'more/**/*.jpg' cat.png          # a table, from the service at http://localhost:3000
    python -m client photos --out verdicts.csv               # or .jsonl, or .parquet
    python -m client photos --out verdicts.csv --resume      # continue after Ctrl-C, a kill or an outage
    python -m client photos --local                          # in this process; or --local MODEL

The output has one row per image, in the order of the arguments and, within a folder, by path; a broken image is a row
with an error. Answers are saved to OUT.part at once, which becomes OUT at the end. A folder contributes its files with
the suffix of a known format, and so do folders that links in it lead to; a file named on its own is always taken.

The environment variable CLASSIFIER_API_KEY holds the API key, if the service requires one. With --local, the settings
of the service apply: MODEL, RUNTIME and so on.

Exit status: 0 all classified; 1 some images were not, and their rows say why; 2 it could not start or finish;
130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from client import formats, journal
from client.errors import ClientError
from client.images import batches, find, read
from client.remote import Remote
from client.rows import Classify, Row, columns, row

SOME_FAILED, COULD_NOT_WORK, INTERRUPTED = 1, 2, 130
ABORT_GRACE_SECONDS = 2.0
"""Seconds left to the requests in flight when another has failed for good."""


def backend(options: argparse.Namespace) -> Classify:
    """What classifies: the service, or this process."""
    if options.local is None:
        return Remote(options.url, options.patience, options.prediction_set, options.cacert)
    from client.local import Local  # needs the service's classes, which a client on another machine does without

    return Local(options.local, options.prediction_set)


def classified(classify: Classify, batch: dict[str, Path], wanted: tuple[str, ...]) -> list[Row]:
    """The rows of a batch; a file that cannot be read is not sent."""
    contents = [read(path) for path in batch.values()]
    images = [content for content in contents if isinstance(content, bytes)]
    replies = iter(classify(images) if images else ())
    return [
        row(name, next(replies) if isinstance(content, bytes) else content, wanted)
        for name, content in zip(batch, contents, strict=True)
    ]


def in_flight(
    classify: Classify, todo: Iterator[dict[str, Path]], wanted: tuple[str, ...], most: int
) -> Generator[list[Row], None, None]:
    """The rows of each batch as it comes back; ``most`` batches are in flight, and as many wait, still unread."""
    pool = ThreadPoolExecutor(most)
    running: set[Future[list[Row]]] = set()
    try:
        for batch in todo:
            running.add(pool.submit(classified, classify, batch, wanted))
            if len(running) == 2 * most:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from _results(done, running)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from _results(done, running)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _results(done: Iterable[Future[list[Row]]], others: Iterable[Future[list[Row]]]) -> Iterator[list[Row]]:
    """Rows of the batches in ``done``. If one failed: those of ``others`` that are answered within
    ``ABORT_GRACE_SECONDS``, then raise its error.

    An API key is charged for what was answered, which would otherwise be lost with what failed.
    """
    failed = [future for future in done if future.exception()]
    yield from (future.result() for future in done if future not in failed)
    if failed:
        sent = [future for future in others if not future.cancel()]
        answered, _ = wait(sent, timeout=ABORT_GRACE_SECONDS)
        yield from (future.result() for future in answered if not future.exception())
        failed[0].result()


def run(options: argparse.Namespace) -> int:
    """Classify, write, and return the exit status."""
    images = find(options.images)
    wanted = columns(options.prediction_set is not None, options.probabilities)
    asked = {"columns": list(wanted), "prediction_set": options.prediction_set}
    with journal.opened(options.out, options.resume, asked) as kept:
        todo = {name: path for name, path in images.items() if name not in kept}
        with (
            tqdm(total=len(images), initial=len(images) - len(todo), unit="image", disable=None) as bar,
            closing(in_flight(backend(options), batches(todo, options.batch), wanted, options.in_flight)) as answers,
        ):
            for rows in answers:
                kept.add(rows)
                bar.update(len(rows))
        if options.out:
            formats.write(options.out, wanted, kept.rows(images))
            journal.beside(options.out).unlink()
        else:
            print(formats.table(wanted, kept.rows(images)), flush=True)
        return conclude(len(images), kept.failures(images))


def conclude(count: int, failed: int) -> int:
    print(f"{count} images, {failed} of them not classified", file=sys.stderr)
    return SOME_FAILED if failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m client", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", metavar="PATH", help="file, folder or pattern")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"{', '.join(formats.WRITERS)}; default: a table")
    parser.add_argument("--resume", action="store_true", help="go on where the run for FILE stopped")
    parser.add_argument("--prediction-set", type=float, metavar="LEVEL", help="the classes that hold the true one")
    parser.add_argument("--probabilities", action="store_true", help="of every class, in the order of GET /model")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", default="http://localhost:3000", help="of the service (%(default)s)")
    where.add_argument("--local", nargs="?", const="", metavar="MODEL", help="NAME or NAME:VERSION; after the PATHs")
    parser.add_argument("--cacert", type=Path, metavar="FILE", help="certificates to trust, for HTTPS")
    parser.add_argument("--batch", type=_positive, default=64, metavar="N", help="images in a request (%(default)s)")
    parser.add_argument("--in-flight", type=_positive, default=4, metavar="N", help="requests at a time (%(default)s)")
    parser.add_argument(
        "--patience", type=float, default=300, metavar="SECONDS", help="for which a batch is tried again (%(default)s)"
    )
    options = parser.parse_args()
    if options.resume and not options.out:
        parser.error("--resume needs --out")
    if options.prediction_set is not None and not 0 < options.prediction_set < 1:
        parser.error(f"--prediction-set {options.prediction_set}: expected a number between 0 and 1")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number above 0")
    return int(text)


def main() -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may hold characters that the encoding lacks
    options = parse_arguments()
    try:
        if options.out:
            formats.check(options.out)
        return run(options)
    except KeyboardInterrupt:
        _stop("interrupted" + _continuation(options), INTERRUPTED)
    except (ClientError, OSError) as error:
        _stop(f"error: {error}{_continuation(options)}", COULD_NOT_WORK)


def _stop(reason: str, status: int) -> NoReturn:
    """Exit at once: a normal exit waits for the threads, and they for replies that nobody will read."""
    print(reason, file=sys.stderr, flush=True)
    os._exit(status)


def _continuation(options: argparse.Namespace) -> str:
    begun = options.out and journal.beside(options.out).exists()
    return "; --resume goes on from what has been answered" if begun else ""


if __name__ == "__main__":
    sys.exit(main())
