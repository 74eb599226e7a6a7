"""The networks of the examples: two of the PowerSGD paper, and a small one for 8×8 digits."""

import torch
from torch import Tensor, nn

LSTMState = tuple[Tensor, Tensor]


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the resolution at stride 1; a BatchNorm supplies the bias."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, which is a 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _convolution(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                _convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.bn1(self.conv1(images)).relu()
        hidden = self.bn2(self.conv2(hidden))
        return (hidden + self.shortcut(images)).relu()


class CifarResNet18(nn.Module):
    """ResNet18 for 32×32 images: 11,173,962 parameters in 62 tensors with 10 classes.

    The first convolution is 3×3 at stride 1 and no pooling follows it, as is usual for CIFAR.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = _convolution(3, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(ResidualBlock(64, 64, 1), ResidualBlock(64, 64, 1))
        self.layer2 = nn.Sequential(ResidualBlock(64, 128, 2), ResidualBlock(128, 128, 1))
        self.layer3 = nn.Sequential(ResidualBlock(128, 256, 2), ResidualBlock(256, 256, 1))
        self.layer4 = nn.Sequential(ResidualBlock(256, 512, 2), ResidualBlock(512, 512, 1))
        self.linear = nn.Linear(512, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images [batch, 3, 32, 32] to logits [batch, classes]."""
        hidden = self.bn1(self.conv1(images)).relu()
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        return self.linear(hidden.mean(dim=(2, 3)))


class DigitsCNN(nn.Module):
    """Three convolutions and a linear layer for 8×8 gray images.

    Args:
        classes: number of classes.
        width: channels of the first convolution; the next two have twice and four times as many.
    """

    def __init__(self, classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.conv1 = _convolution(1, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, 2 * width, 3, stride=2)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = _convolution(2 * width, 4 * width, 3, stride=2)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.linear = nn.Linear(4 * width * 2 * 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images [batch, 1, 8, 8] to logits [batch, classes]."""
        hidden = self.bn1(self.conv1(images)).relu()
        hidden = self.bn2(self.conv2(hidden)).relu()
        hidden = self.bn3(self.conv3(hidden)).relu()
        return self.linear(hidden.flatten(start_dim=1))


class LSTMLanguageModel(nn.Module):
    """An LSTM language model whose decoder shares its weight with the encoder.

    With 28,869 words, 650 dimensions and 3 layers, as in the PowerSGD paper, it has
    28,949,319 parameters.

    Args:
        vocabulary: number of words.
        embedding: dimensions of a word.
        hidden: dimensions of the LSTM's state; must equal `embedding`.
        layers: number of LSTM layers.
        dropout: probability, applied to the words, between layers and to the output.
    """

    def __init__(
        self, vocabulary: int, embedding: int, hidden: int, layers: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if embedding != hidden:
            raise ValueError(
                f"embedding={embedding} and hidden={hidden} were given, but the decoder shares "
                "the encoder's weight, so the two must be equal: choose one size for both"
            )
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.Embedding(vocabulary, embedding)
        # A single layer has nothing between layers, and torch warns about dropout there.
        between = dropout if layers > 1 else 0.0
        self.lstm = nn.LSTM(embedding, hidden, layers, dropout=between)
        self.decoder = nn.Linear(hidden, vocabulary)
        self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, words: Tensor, state: LSTMState | None = None) -> tuple[Tensor, LSTMState]:
        """Predicts the next word at every position.

        Args:
            words: word numbers [time, streams].
            state: hidden and cell state, each [layers, streams, hidden]; zeros if None.

        Returns:
            Logits [time, streams, vocabulary], and the state after the last position.
        """
        outputs, state = self.lstm(self.dropout(self.encoder(words)), state)
        return self.decoder(self.dropout(outputs)), state


class GPTLanguageModel(nn.Module):
    """A small GPT: pre-norm blocks, learned positions, and a decoder that is the encoder's table.

    Args:
        vocabulary: number of words.
        width: dimensions of a word.
        layers: number of blocks.
        heads: of attention in each; they divide `width`.
        window: largest number of words that it looks at.
        dropout: probability, applied to the words and within the blocks.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        layers: int,
        heads: int,
        window: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.position_table = nn.Embedding(window, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout, "gelu", norm_first=True, bias=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.table.weight, std=0.02)
        nn.init.normal_(self.position_table.weight, std=0.02)

    def forward(self, words: Tensor, state: LSTMState | None = None) -> tuple[Tensor, LSTMState]:
        """Predicts the next word at every position, from those before it in the window.

        Args:
            words: word numbers [time, streams].
            state: ignored: nothing is carried from window to window.

        Returns:
            Logits [time, streams, vocabulary], and an empty state.
        """
        time = len(words)
        hidden = self.table(words) + self.position_table.weight[:time, None]
        hidden = self.dropout(hidden)
        later = torch.full((time, time), -torch.inf, device=words.device).triu(1)
        for block in self.blocks:
            hidden = block(hidden, src_mask=later, is_causal=True)
        nothing = hidden.new_empty(0)
        return self.norm(hidden) @ self.table.weight.T, (nothing, nothing)
