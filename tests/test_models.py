"""Models: maps of equal shape, weights from the generator alone, masked pooling, and the ridge."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from statsmodels.api import GLS

from ctsma import ridge
from ctsma.arms import validated
from ctsma.common import InputError
from ctsma.distillation import Settings
from ctsma.models import build, masked_mean
from ctsma.ridge import (
    ALPHAS,
    N_CALIBRATED,
    apply_ridge,
    correlation_within,
    ct_features,
    fit_ridge,
    ridge_features,
)
from kneesim.difficulty import ridge_estimates

SHAPES = {"mr": (2, 2, 12, 48, 48), "ct": (2, 2, 12, 24, 24), "ct+cortex": (2, 3, 12, 24, 24)}


def outputs(arm_input, seed=0):
    network = build(arm_input, "compact", torch.Generator().manual_seed(seed)).eval()
    with torch.no_grad():
        return network(torch.rand(SHAPES[arm_input], generator=torch.Generator().manual_seed(1)))


def test_teacher_and_students_have_maps_on_one_grid():
    results = [outputs(arm_input) for arm_input in SHAPES]
    shapes = [[features.shape for features in maps] for _, maps in results]
    assert shapes[0] == shapes[1] == shapes[2]
    assert shapes[0][0][2:] == (12, 12, 12)  # the published L1 needs no adapter
    assert all(prediction.shape == (2, 4) for prediction, _ in results)


@pytest.mark.parametrize("arm_input", SHAPES)
def test_one_seed_gives_the_same_bits_and_leaves_the_global_generator_alone(arm_input):
    before = torch.get_rng_state()
    first, again, other = outputs(arm_input), outputs(arm_input), outputs(arm_input, seed=1)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(before, torch.get_rng_state())


def test_a_generator_moves_on_between_networks():
    generator = torch.Generator().manual_seed(0)
    one, two = (build("ct", "compact", generator).state_dict()["head.weight"] for _ in range(2))
    assert not torch.equal(one, two)


def test_the_published_networks_have_the_published_layout():
    for arm_input, first in (("mr", torch.nn.Conv3d), ("ct", torch.nn.ConvTranspose3d)):
        with torch.device("meta"):  # shapes alone: the 46 million weights are not drawn
            network = build(arm_input, "paper", torch.Generator())
        assert network.edge == {"mr": 64, "ct": 16}[arm_input]
        assert any(isinstance(m, first) and m.in_channels == 2 for m in network.stem.modules())
        assert [layer.out_features for layer in network.head] == [61, 4]
        prediction, maps = network(torch.zeros((1, 3, 12, 24, 24), device="meta"))
        assert prediction.shape == (1, 4)
        assert [m.shape[1] for m in maps] == [64, 256, 512, 1024, 2048]
        assert maps[0].shape[2:] == (32, 16, 16)


def test_masked_mean_counts_the_region_only():
    features, mask = torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 4, 4, 4)
    features[0, 0, 0], features[0, 0, 1], mask[:, :, :2] = 3.0, 7.0, 1.0
    # A thousandth of weight everywhere keeps an empty mask from dividing by zero
    assert masked_mean(features, mask).item() == pytest.approx(3 + 4 * 0.001 / 1.002, rel=1e-5)
    assert masked_mean(features, torch.zeros_like(mask)).item() == pytest.approx(5.0)


def test_a_compact_prediction_is_the_mean_of_its_class_activation_maps():
    network = build("ct+cortex", "compact", torch.Generator().manual_seed(0)).eval()
    x = torch.rand(SHAPES["ct+cortex"], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        prediction, maps = network(x)
        cam = network.class_activation_maps(maps[-1])
    torch.testing.assert_close(prediction, masked_mean(cam, x[:, 1:2]))


def test_an_unknown_size_of_network_is_refused():
    with pytest.raises(InputError, match="size"):
        validated(Settings, "settings", {"size": "huge"})


def random_patches(n=24):
    rng = np.random.default_rng(0)
    ct = rng.normal(400, 100, (n, 12, 24, 24)) * rng.uniform(0.5, 1.5, (n, 1, 1, 1))
    voi = np.ones((n, 12, 48, 48), bool)
    voi[:, :, :6] = False
    return ct, voi, rng


def test_ct_features_do_not_depend_on_voxels_outside_the_region():
    ct, voi, _ = random_patches(4)
    changed = ct.copy()
    changed[:, :, :3] = 1000
    same = np.isclose(ct_features(ct, voi), ct_features(changed, voi)).all(0)
    assert same[:14].all()  # intensities and share; the band filters reach over the edge
    assert np.isfinite(ct_features(ct, np.zeros_like(voi))).all()


def test_the_ridge_is_the_one_of_scikit_learn():
    ct, voi, rng = random_patches()
    features = ridge_features(ct, voi, rng.uniform(1000, 1500, len(ct)))
    np.testing.assert_array_equal(features[:, :-N_CALIBRATED], ct_features(ct, voi))
    targets = features[:, [0, 1]] / 100 + rng.normal(0, 1, (len(ct), 2))
    subjects = np.repeat([f"s{k}" for k in range(len(ct) // 3)], 3)
    train = subjects != "s0"
    pipeline, grid = make_pipeline(StandardScaler(), Ridge()), {"ridge__alpha": ALPHAS}
    search = GridSearchCV(pipeline, grid, cv=GroupKFold(5), scoring="neg_mean_squared_error")
    expected = np.column_stack(
        [
            search.fit(features[train], target[train], groups=subjects[train]).predict(features)
            for target in targets.T
        ]
    )
    weights, *correlations = fit_ridge(features[train], targets[train], subjects[train])
    assert np.all(correlations == np.zeros((2, 2)))
    np.testing.assert_allclose(apply_ridge(weights, features, -np.inf, np.inf), expected, rtol=1e-8)
    low, high = targets[train].min(0), targets[train].max(0)
    limited = ridge_estimates(features[train], targets[train], subjects[train], features)
    np.testing.assert_allclose(limited, expected.clip(low, high), rtol=1e-8)


def test_the_knee_level_ridge_is_generalised_least_squares():
    rng, knees = np.random.default_rng(0), np.repeat(np.arange(12), [1, 2, 3, 6] * 3)
    x = rng.normal(size=(len(knees), 3))
    y = x @ [1.0, -2.0, 0.5] + rng.normal(size=12)[knees] + rng.normal(size=len(knees))
    rho = 0.4
    covariance = rho * (knees[:, None] == knees) + (1 - rho) * np.eye(len(knees))
    expected = GLS(y, np.column_stack([np.ones(len(x)), x]), sigma=covariance).fit().params
    found = ridge._gls_ridge(x, y[:, None], knees, rho, np.array([1e-9]))
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-6)


def test_rho_is_chosen_where_patches_of_a_knee_share_an_error():
    rng, knees = np.random.default_rng(1), np.repeat(np.arange(60), 10)
    x = rng.normal(size=(600, 5)) + rng.normal(size=(60, 5))[knees]
    signal = x @ rng.normal(size=(5, 2))
    shared = signal + 3 * rng.normal(size=(60, 2))[knees] + rng.normal(size=(600, 2))
    found = fit_ridge(x, shared, knees, knees)
    assert (found.rho > 0).all()
    # 9 of 10 parts of the variance; 60 knees leave an SE of 0.02
    np.testing.assert_allclose(found.error_correlation, 0.9, atol=0.06)
    truth = np.linalg.lstsq(x, signal, rcond=None)[0]
    independent = fit_ridge(x, shared, knees).weights[1:] - truth
    assert np.linalg.norm(found.weights[1:] - truth) < 0.7 * np.linalg.norm(independent)
    alone = [fit_ridge(x[::10], shared[::10], knees[::10], own) for own in (None, knees[::10])]
    assert all(np.array_equal(a, b) for a, b in zip(*alone, strict=True))
    assert not alone[1].rho.any()


def test_the_correlation_within_knees_is_that_of_the_analysis_of_variance():
    errors = np.array([[1.0], [3.0], [5.0], [9.0], [4.0], [4.0]])
    # knees of two: within (2 + 8 + 0) / 3, between 2 ((2 - 13/3)^2 + (7 - 13/3)^2 + 1/9) / 2
    within, between = 10 / 3, 49 / 9 + 64 / 9 + 1 / 9
    expected = (between - within) / (between + within)
    found = correlation_within(errors, np.array([0, 0, 1, 1, 2, 2]))
    assert found == pytest.approx(expected)
    rng, knees = np.random.default_rng(0), np.repeat(np.arange(4000), [1, 2, 5, 9] * 1000)
    shared = np.sqrt([0.0, 0.3, 0.7]) * rng.normal(size=(4000, 3))[knees]
    errors = shared + np.sqrt([1.0, 0.7, 0.3]) * rng.normal(size=(len(knees), 3))
    # 4000 knees: SE about 0.01
    np.testing.assert_allclose(correlation_within(errors, knees), [0, 0.3, 0.7], atol=0.04)
    assert correlation_within(errors, np.arange(len(errors))).max() == 0
