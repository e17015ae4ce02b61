"""Gradient shapes of known architectures, from their dimensions alone."""

from math import prod


def resnet50():
    """161 tensors, 25.6 M elements."""
    shapes = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs, 1, 1), (width,), (width,)]
            shapes += [(width, width, 3, 3), (width,), (width,)]
            shapes += [(4 * width, width, 1, 1), (4 * width,), (4 * width,)]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2():
    """148 tensors, 124.4 M elements."""
    d = 768
    shapes = [(50257, d), (1024, d)]
    for _ in range(12):
        shapes += [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,)]
        shapes += [(d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [*shapes, (d,), (d,)]


def one_large():
    """One tensor of 32 M elements."""
    return [(1 << 25,)]


def many_small():
    """1000 tensors of 1024 elements."""
    return [(1024,)] * 1000


SHAPES = {"resnet50": resnet50, "gpt2": gpt2, "one 32M": one_large, "1000 x 1K": many_small}


def elements(shapes):
    return sum(prod(shape) for shape in shapes)
