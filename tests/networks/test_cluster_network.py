"""Clusters of z: the nearest centre, and draws as often as the histogram says."""

import torch

from lediflow.networks.clusters import Clusters


def test_a_z_belongs_to_its_nearest_centre():
    clusters = Clusters(3, (2, 1, 1))
    clusters.centres.copy_(torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]]).view(3, 2, 1, 1))
    z = torch.tensor([[0.5, 0.4], [3.0, 0.5], [1.0, 2.6], [-9.0, -9.0]]).view(4, 2, 1, 1)
    assert clusters.assign(z).tolist() == [0, 1, 2, 0]


def test_draws_follow_the_histogram_of_each_class_and_leave_empty_clusters_out():
    clusters = Clusters(4, (1, 1, 1), classes=2)
    clusters.images.copy_(torch.tensor([[0.0, 30.0, 0.0, 10.0], [5.0, 0.0, 15.0, 0.0]]))
    u = (torch.arange(1000) + 0.5) / 1000
    zero, one = torch.zeros(1000, dtype=torch.long), torch.ones(1000, dtype=torch.long)
    assert clusters.draw(u, zero).bincount(minlength=4).tolist() == [0, 750, 0, 250]
    assert clusters.draw(u, one).bincount(minlength=4).tolist() == [250, 0, 750, 0]
    every = clusters.draw(u).bincount(minlength=4)
    torch.testing.assert_close(every / 1000, torch.tensor([5, 30, 15, 10]) / 60, atol=1e-3, rtol=0)
    edges = torch.tensor([0.0, 1 - 1e-12, 1.0])
    assert clusters.draw(edges.double(), zero[:3]).tolist() == [1, 3, 3]


def test_they_are_saved_and_loaded(tmp_path):
    clusters = Clusters(2, (1, 2, 2))
    clusters.centres.normal_()
    clusters.images.copy_(torch.tensor([[3.0, 4.0]]))
    clusters.save_pretrained(tmp_path)
    again = Clusters.from_pretrained(tmp_path)
    assert torch.equal(again.centres, clusters.centres) and torch.equal(again.images, clusters.images)
