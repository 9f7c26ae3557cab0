"""What all pictures share: colours, markers, style, and how a picture is written."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from alignkit.files import replaced_file

# The colours of Okabe and Ito for readers who do not see all colours, two of them changed.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F3C8D",
    "#4D4D4D",
)
MARKERS = "os^DvPX*"
LINES = ("-", "--", "-.", (0, (1, 1.2)))
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.dpi": 110,
    "text.parse_math": False,  # labels and samples are shown as they are, with their $
}
KL_AXIS = "KL to the base model, nats per completion"


def save_picture(figure: Figure, file: Path) -> None:
    """Write a figure as PNG and close it. ResourceError where the disk refuses."""
    with replaced_file(file) as temporary:
        figure.savefig(temporary, bbox_inches="tight", format="png")
        _shrink(temporary)
    plt.close(figure)


def _shrink(file: Path) -> None:
    """Reduce a picture to 256 colours: a third of the size, and it looks the same."""
    with Image.open(file) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(file, "PNG", optimize=True)
