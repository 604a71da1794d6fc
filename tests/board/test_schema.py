import re
from pathlib import Path

import numpy as np
import pytest

import lightning_optkit
from lightning_optkit.board import schema, tags


def test_arrays_survive_the_round_trip():
    nodes = np.array([[-1.0, 2.5, np.nan], [0.0, 1.0, 2.0]])
    weights = np.array([[0.25, 0.75, 0.0], [0.5, 0.25, 0.25]])
    payload = schema.quadrature_array(nodes, weights)
    summary = schema.array_summary("optkit-hessian/quadrature", payload)
    again = type(summary).FromString(summary.SerializeToString())
    decoded = schema.decode_array(again)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded[..., 1], weights.astype(np.float32))
    np.testing.assert_array_equal(decoded[0, :2, 0], [-1.0, 2.5])
    assert decoded[0, 2].tolist() == [0.0, 0.0]  # padding: weight 0, never NaN


def test_metadata_names_plugin_version_and_class():
    value = schema.array_summary("a/b", np.zeros((1, 1, 2), np.float32)).value[0]
    assert value.metadata.plugin_data.plugin_name == schema.PLUGIN_NAME
    assert value.metadata.plugin_data.content == schema.VERSION
    assert value.metadata.data_class == schema.DATA_CLASS_TENSOR


def test_tags_are_unique_snake_case_with_one_slash():
    names = [tag.name for tag in tags.HESSIAN_SCALARS]
    assert len(set(names)) == len(names)
    for name in names:
        assert tags.tag(tags.HESSIAN, name).count("/") == 1
        assert name == name.lower().replace("-", "_").replace(" ", "_")


ROOT = Path(lightning_optkit.__file__).parents[1]


def test_the_readme_the_topics_and_the_exports_name_the_same_callbacks():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("## What you get")[1].split("\n\n")[1]
    of_readme = {
        name for row in table.splitlines() if "server |" in row or "vener |" in row
        for name in re.findall(r"\[`(\w+)`\]", row)
    }  # fmt: skip
    of_topics = {name for topic in tags.TOPICS for name in topic.callbacks}
    files = {path.stem for path in (ROOT / "lightning_optkit" / "callbacks").glob("[!_]*.py")}
    of_exports = {
        name for name, source in lightning_optkit._EXPORTS.items()
        if source.startswith("lightning_optkit.callbacks.") and name in of_topics | of_readme
    }  # fmt: skip
    assert of_readme == of_topics == of_exports
    assert len(of_topics) == len(files)


def test_topics_and_their_tags_are_unique():
    names = [topic.name for topic in tags.TOPICS]
    assert len(set(names)) == len(names)
    for topic in tags.TOPICS:
        of_topic = [tag.name for tag in topic.scalars]
        assert len(set(of_topic)) == len(of_topic)
        assert not any(other.startswith(f"{topic.name}-") for other in names)


@pytest.mark.parametrize("kind", schema.ARRAYS, ids=lambda kind: kind.name)
def test_each_kind_of_array_takes_its_shapes_and_no_other(kind):
    def made(shape):
        sizes = [3 if isinstance(size, str) else size for size in shape]
        return np.full(sizes, b"a" if kind.is_text else 1, object if kind.is_text else np.float32)

    for shape in kind.shapes:
        assert schema.check_array(kind.name, made(shape)) is None
        assert "should have shape" in schema.check_array(kind.name, made((*shape, 1, 1)))
        for i, size in enumerate(shape):
            if not isinstance(size, str):
                other = made((*shape[:i], 7, *shape[i + 1 :]))
                assert "should have shape" in schema.check_array(kind.name, other)
