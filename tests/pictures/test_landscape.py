import jax
import numpy as np

from vitssl.pictures import landscape

PARAMS = {
    "a": np.array([[0.3, -0.2], [1.0, 2.0]], np.float32),
    "b": np.ones(3, np.float32),
}


def square(tree):
    return sum(
        float((np.asarray(p, np.float64) ** 2).sum()) for p in jax.tree.leaves(tree)
    )


def test_directions_have_length_one_in_every_tensor_and_come_from_the_seed():
    first, second = landscape.directions(PARAMS, 3)
    for tree in (first, second):
        for name, tensor in tree.items():
            assert tensor.shape == PARAMS[name].shape
            np.testing.assert_allclose(np.linalg.norm(tensor), 1.0, rtol=1e-5)
    assert abs((first["a"] * second["a"]).sum()) < 0.999
    again, _ = landscape.directions(PARAMS, 3)
    other, _ = landscape.directions(PARAMS, 4)
    np.testing.assert_array_equal(first["a"], again["a"])
    assert (first["a"] != other["a"]).any()


def test_the_plane_of_a_quadratic_is_the_formula():
    offsets, losses = landscape.plane(square, PARAMS, points=5, span=2.0, seed=1)
    np.testing.assert_allclose(offsets, [-2, -1, 0, 1, 2])
    first, second = landscape.directions(PARAMS, 1)

    def dot(u, v):
        return sum(float((u[k] * v[k]).sum()) for k in u)

    for i, a in enumerate(offsets):
        for j, b in enumerate(offsets):
            want = (
                square(PARAMS) + 2 * a * dot(PARAMS, first) + a * a * dot(first, first)
            )
            want += 2 * b * dot(PARAMS, second) + b * b * dot(second, second)
            want += 2 * a * b * dot(first, second)
            np.testing.assert_allclose(losses[i, j], want, rtol=1e-5)
    assert losses[2, 2] == square(PARAMS)


def test_the_lines_are_the_cuts_through_the_solution():
    offsets = np.linspace(-1, 1, 5)
    losses = np.arange(25.0).reshape(5, 5)
    losses[0, 0] = np.inf
    figure = landscape.landscape(offsets, losses)
    chart = next(a for a in figure.axes if a.get_xlabel() == "distance")
    np.testing.assert_array_equal(chart.lines[0].get_ydata(), losses[:, 2])
    np.testing.assert_array_equal(chart.lines[1].get_ydata(), losses[2])
