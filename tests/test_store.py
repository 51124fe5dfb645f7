"""The model store: what goes in comes out, and which version ``MODEL=name`` serves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from model import promotions
from model.artifact import CARD, CONFIG, FILES, ONNX, ONNX_INT8, Artifact, save_reference, seal
from model.comparison import compare, difference_interval
from model.config import ModelConfig
from tests import live, toy
from tests.golden import SHIPPED_NAME, TYPICAL
from tests.live import environment, serve
from train import readme
from train.metrics import accuracy_interval

IMAGES = 1000
Versions = dict[str, Artifact]


def figures(hits: int, count: int = IMAGES) -> dict[str, Any]:
    share = hits / count
    interval = list(accuracy_interval(hits, count))
    per_class = dict.fromkeys(toy.CLASSES, share)
    return {"images": count, "accuracy": share, "accuracy_95": interval, "ece": 0.01, "per_class": per_class}


def variant(artifact: Artifact, path: Path, hits: int, **card: Any) -> Artifact:
    """Another version: a copy of ``artifact`` whose card claims that ``hits`` of ``IMAGES`` were right."""
    shutil.copytree(artifact.path, path)
    metrics = {runtime: figures(hits) for runtime in ("torch", "onnx", "onnx-int8")}
    return seal(path, {**artifact.card, "metrics": metrics, **card})


def python(home: Path, *arguments: object, **options: Any) -> str:
    """Run Python with the model store in ``home``, and return everything it prints."""
    done = live.python(home, *arguments, **options)
    return done.stdout + done.stderr


def store(home: Path, *arguments: object, code: int = 0) -> str:
    return toy.run("model.store", *arguments, code=code, env=environment(home))


def call(home: Path, expression: str) -> str:
    """What ``expression`` evaluates to with ``store`` imported, as printed."""
    return python(home, "-c", f"from model import store; print({expression})").strip()


@pytest.fixture(scope="module")
def versions(toy_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Versions:
    """``a``, and ``b``, which is better."""
    folder = tmp_path_factory.mktemp("versions")
    return {name: variant(toy_artifact, folder / name, hits) for name, hits in (("a", 900), ("b", 910))}


@pytest.fixture(scope="module")
def filled(versions: Versions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with both versions; tests must not change it."""
    home = tmp_path_factory.mktemp("filled")
    assert store(home, "import", versions["a"].path) == f"{tag(versions['a'])}\n"
    assert f"`make promote MODEL={tag(versions['b'])}`" in store(home, "import", versions["b"].path)
    return home


@pytest.fixture
def home(filled: Path, tmp_path: Path) -> Path:
    """The test's own copy of ``filled``."""
    return shutil.copytree(filled, tmp_path / "home")


def tag(artifact: Artifact) -> str:
    return f"toy:{artifact.version}"


def served(home: Path) -> str:
    """The version that ``list`` marks as served."""
    (line,) = [line for line in store(home, "list").splitlines() if line.startswith("*  ")]
    return line.split()[1]


class TestPutAndGet:
    def test_a_version_with_the_content_of_another_is_refused(self, home: Path, versions: Versions) -> None:
        a, b = (home / "models/toy" / versions[name].version for name in ("a", "b"))
        for file in versions["a"].path.iterdir():
            shutil.copyfile(a / file.name, b / file.name)
        said = python(home, "-c", f"from model import store; store.get('{tag(versions['b'])}')", code=1)
        assert f"StoreError: {tag(versions['b'])} in the model store holds {tag(versions['a'])}" in said

    def test_a_stored_model_comes_back_verified_with_its_metadata(
        self, filled: Path, versions: Versions, tmp_path: Path
    ) -> None:
        home = shutil.copytree(filled, tmp_path / "home")
        assert store(home, "import", versions["a"].path).strip() == tag(versions["a"])
        assert call(home, "store.get(store.resolve('toy')).config.classes") == str(toy.CLASSES)
        shown = call(home, f"store.bentoml.models.get({tag(versions['a'])!r}).info.metadata")
        assert "data_sha256" in shown
        assert "onnxruntime" in shown

    def test_an_altered_file_in_the_store_is_refused(self, home: Path, versions: Versions) -> None:
        stored = home / "models" / "toy" / versions["a"].version / FILES[ONNX]
        stored.write_bytes(stored.read_bytes()[:-1] + b"!")
        assert FILES[ONNX] in store(home, "compare", "toy", tag(versions["b"]), code=1)

    def test_an_own_model_takes_precedence_over_a_shipped_one_of_the_same_name(
        self, toy_artifact: Artifact, tmp_path: Path
    ) -> None:
        copied = shutil.copytree(toy_artifact.path, tmp_path / "own")
        ModelConfig.load(copied / CONFIG).model_copy(update={"name": SHIPPED_NAME}).save(copied / CONFIG)
        own = seal(copied, {})
        store(tmp_path / "home", "import", copied)
        assert call(tmp_path / "home", f"store.resolve({SHIPPED_NAME!r})") == f"{SHIPPED_NAME}:{own.version}"

    def test_an_unknown_model_is_refused_with_a_list_of_the_known_ones(self, tmp_path: Path) -> None:
        expression = "store.resolve('nope:1')"
        shown = python(tmp_path, "-c", f"from model import store; {expression}", code=1)
        assert "'nope:1' is not in the model store; it holds " in shown
        for artifact in readme.shipped():
            assert f"{artifact.config.name}:{artifact.version}" in shown

    def test_every_shipped_model_is_available_by_name(self, tmp_path: Path) -> None:
        for artifact in readme.shipped():
            name = artifact.config.name
            assert call(tmp_path / name, f"store.resolve({name!r})") == f"{name}:{artifact.version}"


class TestPromotions:
    def test_only_a_promotion_changes_what_is_served(self, home: Path, versions: Versions) -> None:
        a, b = tag(versions["a"]), tag(versions["b"])
        assert served(home) == a
        assert b in store(home, "promote", b[:-4])
        assert served(home) == call(home, "store.resolve('toy')") == b
        assert a in store(home, "rollback", "toy")
        assert call(home, "store.resolve('toy')") == a
        assert "no earlier promotion" in store(home, "rollback", "toy", code=1)
        history = [line.split()[2:] for line in store(home, "list").splitlines() if "->" in line]
        va, vb = versions["a"].version, versions["b"].version
        assert history == [
            ["promote", "toy", "-", "->", va],
            ["promote", "toy", va, "->", vb],
            ["rollback", "toy", vb, "->", va],
        ]

    def test_models_of_others_in_the_store_are_left_alone(self, home: Path, versions: Versions) -> None:
        create = "import bentoml\nwith bentoml.models.create('churn', metadata={'metrics': [0.9]}): pass"
        python(home, "-c", create)
        assert (home / "models" / "churn").is_dir()
        shown = store(home, "list")
        assert tag(versions["a"]) in shown
        assert "churn" not in shown
        (version,) = (path.name for path in (home / "models" / "churn").iterdir() if path.is_dir())
        refused = store(home, "promote", f"churn:{version}", "--force", code=1)
        assert refused == f"error: churn:{version} has no card.json; expected a classifier\n"

    def test_a_store_without_a_history_serves_its_newest_version(self, home: Path, versions: Versions) -> None:
        (home / "models" / "toy" / promotions.FILE).unlink()
        assert call(home, "store.resolve('toy')") == tag(versions["b"])
        store(home, "promote", tag(versions["a"]), "--force")
        assert tag(versions["b"]) in store(home, "rollback", "toy")

    def test_a_bento_serves_the_version_it_was_built_with(self, home: Path, versions: Versions) -> None:
        python(home, "-m", "bentoml", "build", MODEL="toy")
        store(home, "promote", tag(versions["b"]))
        (bento,) = (path.parent for path in (home / "bentos").rglob("bento.yaml"))
        code = "from model import store; print(store.resolve('toy'), store.packed())"
        assert python(home, "-c", code, cwd=bento / "src").split() == [tag(versions["a"])] * 2
        served = python(home, "-c", "import service; print(service.deployment.tag)", cwd=bento / "src")
        assert served.strip() == tag(versions["a"]), "nor whoever serves it without an image"
        assert {"name": "MODEL", "value": tag(versions["a"]), "stage": "all"} in yaml.safe_load(
            (bento / "bento.yaml").read_text()
        )["envs"], "whoever starts an image of it need not know"

    def test_a_promoted_version_missing_from_the_store_is_named(self, home: Path, versions: Versions) -> None:
        shutil.rmtree(home / "models" / "toy" / versions["a"].version)
        shown = python(home, "-c", "import service", code=1, MODEL="toy")
        assert (
            shown.strip()
            .splitlines()[-1]
            .startswith(f"error: MODEL='toy': 'toy' ({tag(versions['a'])}) is not in the model store; it holds ")
        )
        assert tag(versions["b"]) in store(home, "promote", tag(versions["b"]))

    @pytest.mark.parametrize("content", ["", "[{}]", "{"])
    def test_an_unreadable_history_is_one_clear_line(self, content: str, home: Path) -> None:
        (home / "models" / "toy" / promotions.FILE).write_text(content)
        shown = store(home, "list", code=1)
        assert shown.startswith("error: ")
        assert shown.endswith("promotions.json is not a history of promotions\n")

    def test_rollbacks_step_back_and_promotions_go_forward_from_there(self, tmp_path: Path) -> None:
        for step in ("a", "b", "c", None, None, "d"):
            before = promotions.stack(promotions.read(tmp_path))
            if step is None:
                promotions.append(tmp_path, "rollback", before[-2])
            else:
                promotions.append(tmp_path, "promote", step)
        history = promotions.read(tmp_path)
        assert [(entry.before, entry.after) for entry in history] == [
            *((None, "a"), ("a", "b"), ("b", "c")),
            *(("c", "b"), ("b", "a"), ("a", "d")),
        ]
        assert promotions.stack(history) == ["a", "d"]
        assert [path.name for path in tmp_path.iterdir()] == [promotions.FILE]

    def test_a_reader_sees_the_history_before_or_after_a_promotion(self, tmp_path: Path) -> None:
        promotions.append(tmp_path, "promote", "a")
        before = (tmp_path / promotions.FILE).read_bytes()
        with (tmp_path / promotions.FILE).open("rb") as reader:
            promotions.append(tmp_path, "promote", "b")
            assert reader.read() == before

    def test_a_server_keeps_its_version_and_the_next_start_serves_the_promoted_one(
        self, home: Path, versions: Versions
    ) -> None:
        a, b = tag(versions["a"]), tag(versions["b"])
        with serve("embedded", home, MODEL="toy", WORKERS=1) as url:
            store(home, "promote", b)
            assert f"toy:{version_of(url)}" == a
        with serve("embedded", home, MODEL="toy", WORKERS=1) as url:
            shutil.rmtree(home / "models" / b.replace(":", "/"))
            assert f"toy:{version_of(url)}" == b


def version_of(url: str) -> str:
    return str(requests.get(f"{url}/model", timeout=30).json()["version"])


def worse(artifact: Artifact, path: Path) -> Artifact:
    return variant(artifact, path, 850)


def unmeasured(artifact: Artifact, path: Path) -> Artifact:
    return variant(artifact, path, 0, metrics={})


def other_classes(artifact: Artifact, path: Path) -> Artifact:
    variant(artifact, path, 950)
    ModelConfig.load(path / CONFIG).model_copy(update={"classes": ("disc", "frame", "dots")}).save(path / CONFIG)
    return seal(path, json.loads((path / CARD).read_text()))


def wrong_reference(artifact: Artifact, path: Path) -> Artifact:
    """Sealed, so that every hash is right, but its reference images do not match the reference outputs."""
    variant(artifact, path, 950)
    full, quantised = (artifact.reference(runtime) for runtime in (ONNX, ONNX_INT8))
    save_reference(path, full._replace(images=255 - full.images), quantised)
    return seal(path, artifact.card)


def no_graph(artifact: Artifact, path: Path) -> Artifact:
    variant(artifact, path, 950)
    (path / FILES[ONNX]).write_bytes(b"no graph")
    return seal(path, artifact.card)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (worse, "onnx-int8 loses accuracy, -5.00 points"),
        (unmeasured, "its card has no figures"),
        (other_classes, "its classes are not those of toy:"),
        (wrong_reference, "it fails its verification: runtime 'onnx' differs from the reference outputs"),
        (no_graph, "it fails its verification: "),
    ],
)
def test_objections_to_a_promotion_stop_it_unless_forced(
    make: Callable[[Artifact, Path], Artifact], reason: str, home: Path, versions: Versions, tmp_path: Path
) -> None:
    bad = tag(make(versions["a"], tmp_path / "bad"))
    store(home, "import", tmp_path / "bad")
    shown = store(home, "promote", bad, code=1)
    assert shown.startswith(f"error: {bad} is not promoted: ")
    assert reason in shown
    assert shown.count("\n") == 1
    assert served(home) == tag(versions["a"])
    store(home, "promote", bad, "--force")
    assert served(home) == bad


def test_a_version_without_int8_is_promoted_by_the_figures_it_has(
    home: Path, versions: Versions, tmp_path: Path
) -> None:
    lean = variant(versions["b"], tmp_path / "lean", 0, metrics={ONNX: figures(910)})
    (lean.path / FILES[ONNX_INT8]).unlink()
    lean = seal(lean.path, {key: value for key, value in lean.card.items() if key != "files"})
    store(home, "import", lean.path)
    store(home, "promote", tag(lean))
    assert served(home) == tag(lean)
    (line,) = [line for line in store(home, "list").splitlines() if tag(lean) in line]
    assert line.split()[4:8] == ["91.00%", "-", "1,000", "1.00%"]
    (recall,) = [line for line in store(home, "compare", tag(versions["a"]), tag(lean)).splitlines() if "frame" in line]
    assert recall.split() == ["frame", "onnx", "90.00%", "91.00%", "+1.00", "points"]


@pytest.mark.parametrize(
    "command",
    [
        ("model.store", "import", "model/pretrained"),
        ("client", TYPICAL, "--local"),
    ],
)
def test_commands_without_make_use_makes_store_and_send_no_statistics(
    command: tuple[object, ...], tmp_path: Path
) -> None:
    checkout, user = tmp_path / "checkout", tmp_path / "user"
    for name in ("client", "model", "serving"):
        shutil.copytree(toy.ROOT / name, checkout / name)
    shutil.copy(toy.ROOT / "settings.py", checkout)
    # Usage statistics are printed instead of sent; sending would create an identity in the store.
    env = environment(tmp_path, HOME=user, __BENTOML_DEBUG_USAGE=True)
    del env["BENTOML_HOME"], env["BENTOML_DO_NOT_TRACK"]
    subprocess.run([sys.executable, "-m", *map(str, command)], cwd=checkout, env=env, check=True, timeout=300)
    assert (checkout / ".bentoml" / "models" / SHIPPED_NAME).is_dir()
    assert not (checkout / ".bentoml" / "client_id").exists()
    assert not user.exists()


class TestComparison:
    def test_the_interval_of_a_difference_matches_the_publication(self) -> None:
        """56/70 against 48/80: table II of Newcombe (1998), method 10."""
        assert difference_interval(figures(48, 80), figures(56, 70)) == pytest.approx((0.0524, 0.3339), abs=1e-4)

    def test_figures_are_compared_side_by_side(self, filled: Path, versions: Versions) -> None:
        lines = store(filled, "compare", "toy", tag(versions["b"])).splitlines()
        (accuracy,) = [line for line in lines if line.startswith("accuracy onnx-int8")]
        assert "90.00% (87.98% to 91.71%)" in accuracy
        assert "91.00% (89.07% to 92.62%)" in accuracy
        assert accuracy.endswith("+1.00 points (-1.58 to +3.59), not significant")
        assert any(line.startswith("frame onnx-int8") and line.endswith("+1.00 points") for line in lines)
        assert any(line.startswith("model.int8.onnx") and line.endswith("+0.00 MB") for line in lines)
        assert "Both were measured on the same test images (equal data_sha256)." in lines

    def test_of_a_thousand_classes_those_that_changed_most_are_compared(self, versions: Versions) -> None:
        names = tuple(f"kind {number}" for number in range(1000))
        recalls = [dict.fromkeys(names, 0.5), dict.fromkeys(names[:-1], 0.5) | {"kind 7": 0.1, "kind 8": 0.75}]
        many = [
            replace(
                versions["a"],
                config=versions["a"].config.model_copy(update={"classes": names}),
                card={**versions["a"].card, "metrics": {ONNX_INT8: {**figures(900), "per_class": recall}}},
            )
            for recall in recalls
        ]
        lines = [" ".join(line.split()) for line in compare(*many).splitlines()]
        title = lines.index("the 20 of 1,000 classes that changed most:")
        assert lines[title + 1] == "kind 7 onnx-int8 50.00% 10.00% -40.00 points"
        assert lines[title + 2] == "kind 8 onnx-int8 50.00% 75.00% +25.00 points"
        assert [line.startswith("kind") for line in lines].count(True) == 20

    def test_a_comparison_notes_different_data(self, home: Path, versions: Versions, tmp_path: Path) -> None:
        training = {**versions["a"].card["training"], "data_sha256": "0" * 64}
        other = variant(versions["a"], tmp_path / "other", 990, training=training)
        store(home, "import", other.path)
        shown = store(home, "compare", "toy", tag(other))
        assert "NOT measured on the same data" in shown
        assert "+9.00 points (+7.10 to +11.07), significant" in shown

    def test_a_loss_may_be_significant_too(self, versions: Versions) -> None:
        a = versions["a"]
        worse = replace(a, card={**a.card, "metrics": {ONNX_INT8: figures(850)}})
        (accuracy,) = [line for line in compare(a, worse).splitlines() if line.startswith("accuracy onnx-int8")]
        assert accuracy.endswith("-5.00 points (-7.90 to -2.10), significant")

    def test_a_version_without_figures_is_named(self, versions: Versions) -> None:
        unmeasured = replace(versions["a"], card={**versions["a"].card, "metrics": {}})
        assert "B was not measured: make evaluate." in compare(versions["a"], unmeasured).splitlines()
