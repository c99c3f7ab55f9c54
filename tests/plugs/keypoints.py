"A task: points in a picture, found as the peaks of heat maps, and scored by how many are near enough."
import torch

from noisyseg.measure.task import Task


class NearEnough:
    "The share of points within a distance, for each point and together"
    def __init__(self, names, pixels): self.names, self.pixels, self.near, self.n = names, pixels, 0, 0

    def update(self, out, y):
        peaks = out.flatten(2).argmax(2)
        found = torch.stack([peaks // out.shape[3], peaks % out.shape[3]], 2)
        self.near = self.near + ((found - y).float().norm(dim=2) <= self.pixels).sum(0)
        self.n += len(y)

    def rows(self):
        each = [('PCK of a point', name, float(v), self.n) for name, v in zip(self.names, self.near / self.n)]
        return [*each, ('PCK', '', float(self.near.sum() / self.n / len(self.near)), self.n * len(self.near))]


class Keypoints(Task):
    "`(images, points (batch, number, 2) as row and column)`"
    metric = 'PCK'

    def __init__(self, pixels=2): self.pixels = pixels

    def classes(self, out, names=None): return names or [f'point {i}' for i in range(out.shape[1])]

    def meter(self, classes, ignore_index=None): return NearEnough(classes, self.pixels)
