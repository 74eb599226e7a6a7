"""The networks of the Accordion paper (arXiv 2010.16248), as shapes of their parameters.

They are variants for images of 32×32 pixels: the first convolution is 3×3 at stride 1. All settings
that the paper does not give are those of its code, https://github.com/uw-mad-dash/Accordion.
"""

from collections.abc import Callable, Iterator

import torch

from examples.models import CifarResNet18

Shape = tuple[int, ...]


def shapes_of_network(network: str, classes: int) -> list[Shape]:
    """Shapes of all parameters of a network, weights as [outputs, inputs, ...].

    Args:
        network: a key of `NETWORKS`.
        classes: number of classes.

    Example:
        >>> shapes_of_network("DenseNet", classes=100)[:3]
        [(24, 3, 3, 3), (24,), (24,)]
    """
    return list(NETWORKS[network](classes))


def _resnet(classes: int) -> Iterator[Shape]:
    with torch.device("meta"):
        model = CifarResNet18(classes)
    yield from (tuple(parameter.shape) for parameter in model.parameters())


def _vgg(classes: int, width: int = 512) -> Iterator[Shape]:
    """VGG-19 with batch norms: 16 convolutions and 3 linear layers, all of them with biases."""
    inputs = 3
    for outputs, layers in ((64, 2), (128, 2), (256, 4), (width, 8)):
        for _ in range(layers):
            yield from _convolution(inputs, outputs, 3)
            inputs = outputs
    for outputs in (width, width, classes):
        yield from _linear(width, outputs)


def _senet(classes: int, squeeze: int = 16) -> Iterator[Shape]:
    """ResNet-18 with squeeze and excitation (arXiv 1709.01507), its convolutions with biases."""
    inputs = 64
    yield from _convolution(3, inputs, 3)
    # The last stage has 516 channels in the paper's code, and in its figures; 512 are usual.
    for outputs in (64, 128, 256, 516):
        for _ in range(2):
            yield from _convolution(inputs, outputs, 3)
            yield from _convolution(outputs, outputs, 3)
            if inputs != outputs:
                yield from _convolution(inputs, outputs, 1)
            yield from _linear(outputs, outputs // squeeze)
            yield from _linear(outputs // squeeze, outputs)
            inputs = outputs
    yield from _linear(inputs, classes)


def _densenet(classes: int, growth: int = 12) -> Iterator[Shape]:
    """DenseNet-121 (arXiv 1608.06993) of a smaller growth; what halves comes between its stages."""
    channels = 2 * growth
    yield (channels, 3, 3, 3)
    for stage, layers in enumerate((6, 12, 24, 16)):
        if stage > 0:
            yield from _norm(channels)
            yield (channels // 2, channels, 1, 1)
            channels //= 2
        for _ in range(layers):
            yield from _norm(channels)
            yield (4 * growth, channels, 1, 1)
            yield from _norm(4 * growth)
            yield (growth, 4 * growth, 3, 3)
            channels += growth
    yield from _norm(channels)
    yield from _linear(channels, classes)


def _norm(channels: int) -> tuple[Shape, ...]:
    return (channels,), (channels,)


def _linear(inputs: int, outputs: int) -> tuple[Shape, ...]:
    return (outputs, inputs), (outputs,)


def _convolution(inputs: int, outputs: int, size: int) -> tuple[Shape, ...]:
    """A convolution with a bias, and a batch norm."""
    return (outputs, inputs, size, size), (outputs,), *_norm(outputs)


#: Each makes the shapes for a number of classes.
NETWORKS: dict[str, Callable[[int], Iterator[Shape]]] = {
    "ResNet-18": _resnet,
    "VGG-19bn": _vgg,
    "SENet": _senet,
    "DenseNet": _densenet,
}
