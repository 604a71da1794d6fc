import numpy as np

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
