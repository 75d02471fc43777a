"""Networks: maps that meet, weights from the generator alone, masked pooling, the super-resolution target."""

import pytest
import torch

from ctsma.cohort import InputFault
from ctsma.networks import WIDTHS, Unfolded, build, build_detail_head, masked_mean, unshuffle

INPUTS = {"teacher": (2, 2, 12, 48, 48), "student": (2, 2, 12, 24, 24)}


def outputs(role, size="compact", seed=0):
    network = build(role, size, torch.Generator().manual_seed(seed)).eval()
    with torch.no_grad():
        return network(torch.rand(INPUTS[role], generator=torch.Generator().manual_seed(1)))


def test_teacher_and_student_meet_on_one_grid():
    (taught, teacher), (learned, student) = (outputs(role) for role in INPUTS)
    assert [m.shape for m in teacher] == [m.shape for m in student]
    assert teacher[0].shape[2:] == (12, 12, 12)  # published L1 applies without an adapter
    assert taught.shape == learned.shape == (2, 4)


@pytest.mark.parametrize("role", INPUTS)
def test_one_seed_gives_the_same_bits_and_leaves_the_global_stream_alone(role):
    before = torch.get_rng_state()
    first, again, other = outputs(role), outputs(role), outputs(role, seed=1)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(before, torch.get_rng_state())


def test_a_generator_moves_on_between_networks():
    generator = torch.Generator().manual_seed(0)
    one, two = (build("student", "compact", generator).state_dict()["head.weight"] for _ in range(2))
    assert not torch.equal(one, two)


def test_the_published_networks_have_the_published_layout():
    for role, first in (("teacher", torch.nn.Conv3d), ("student", torch.nn.ConvTranspose3d)):
        with torch.device("meta"):  # shapes alone: nobody waits for 46 million weights
            network = build(role, "paper", torch.Generator())
        assert network.edge == {"teacher": 64, "student": 16}[role]
        assert sum(isinstance(m, first) and m.in_channels == 2 for m in network.stem.modules()) >= 1
        assert [layer.out_features for layer in network.head] == [61, 4]
        x = torch.zeros((1, 2, 12, 24, 24), device="meta")
        prediction, maps = network(x)
        assert prediction.shape == (1, 4)
        assert [m.shape[1] for m in maps] == [64, 256, 512, 1024, 2048]
        assert maps[0].shape[2:] == (32, 16, 16)


def test_masked_mean_counts_the_region_only():
    features, mask = torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 4, 4, 4)
    features[0, 0, 0], features[0, 0, 1], mask[:, :, :2] = 3.0, 7.0, 1.0
    # A thousandth of weight everywhere keeps an empty mask from dividing by zero: 3 + 4 x 0.001 / 1.002
    assert masked_mean(features, mask).item() == pytest.approx(3 + 4 * 0.001 / 1.002, rel=1e-5)
    assert masked_mean(features, torch.zeros_like(mask)).item() == pytest.approx(5.0)


def test_a_compact_prediction_is_the_mean_of_its_local_evidence():
    network = build("student", "compact", torch.Generator().manual_seed(0), ruler=True).eval()
    x = torch.rand((2, 3, 12, 24, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        prediction, maps = network(x)
        evidence = network.evidence(maps[-1])
    torch.testing.assert_close(prediction, masked_mean(evidence, x[:, 1:2]))


def test_unshuffle_puts_the_four_fine_pixels_under_each_coarse_one():
    fine = torch.arange(2 * 12 * 48 * 48.0).reshape(2, 12, 48, 48)
    coarse = unshuffle(fine)
    assert coarse.shape == (2, 4, 12, 24, 24)
    assert coarse[1, :, 3, 5, 7].tolist() == fine[1, 3, 10:12, 14:16].flatten().tolist()
    head = build_detail_head("compact", torch.Generator())
    assert head(torch.zeros(2, WIDTHS[0], 12, 12, 12)).shape == coarse.shape
    assert torch.equal(Unfolded()(coarse), fine[:, None])


@pytest.mark.parametrize(("arguments", "said"), [(("pupil", "compact"), "role"), (("student", "huge"), "size")])
def test_unknown_networks_are_refused(arguments, said):
    with pytest.raises(InputFault, match=said):
        build(*arguments, torch.Generator())
    with pytest.raises(InputFault, match="does not fit"):
        build_detail_head("paper", torch.Generator())
