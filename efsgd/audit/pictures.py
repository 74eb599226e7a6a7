"""Images beside each other."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def save_images(path: str | Path, rows: Mapping[str, Tensor]) -> None:
    """Draws rows of images [images, 1 or 3, height, width] with values from 0 to 1."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib, which is not installed: pip install matplotlib"
        ) from error
    count = max(len(images) for images in rows.values())
    if any(images.ndim != 4 or images.shape[1] not in (1, 3) for images in rows.values()):
        shapes = [list(images.shape) for images in rows.values()]
        raise ValueError(
            f"Invalid samples: of shapes {shapes}. Pictures are drawn of [images, 1 or 3, height, "
            "width]. Use `found` for others."
        )
    figure, grid = pyplot.subplots(
        len(rows), count, figsize=(count, len(rows)), squeeze=False,
        gridspec_kw={"wspace": 0.05, "hspace": 0.05},
    )  # fmt: skip
    for axes_of_row, (name, images) in zip(grid, rows.items(), strict=True):
        for axes in axes_of_row:
            axes.axis("off")
        for axes, image in zip(axes_of_row, images, strict=False):
            axes.imshow(
                image.cpu().clamp(0, 1).permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1
            )
        axes_of_row[0].text(
            -0.1, 0.5, name, transform=axes_of_row[0].transAxes, ha="right", va="center", fontsize=8
        )
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
