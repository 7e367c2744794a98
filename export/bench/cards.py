"""What NVIDIA publishes of the cards that the roofline names; the one place where these figures are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A card's published peak figures.

    `bandwidth`: of its memory, bytes/s. `float32`: operations/s on CUDA cores. `float16`: operations/s of dense
    products of float16 or bfloat16 on tensor cores, which add in float32. `device`: what the driver calls it, or None
    where the driver calls other cards so too.
    """

    name: str
    bandwidth: float
    float32: float
    float16: float
    device: str | None
    source: str

    def rate(self, width: int) -> float:
        """Operations/s of products of floats of `width` bytes. Float32 does not become TF32 here."""
        return self.float16 if width == 2 else self.float32


CARDS = (
    Card("A100 SXM 80 GB", 2039e9, 19.5e12, 312e12, "NVIDIA A100-SXM4-80GB", "NVIDIA A100 datasheet"),
    Card("H100 SXM", 3350e9, 67e12, 989e12, "NVIDIA H100 80GB HBM3", "NVIDIA H100 datasheet (half its sparse figure)"),
    Card("L4", 300e9, 30.3e12, 121e12, "NVIDIA L4", "NVIDIA L4 datasheet (half its sparse figure)"),
    Card("RTX 4090", 1008e9, 82.6e12, 165.2e12, "NVIDIA GeForce RTX 4090", "NVIDIA Ada GPU architecture"),
    Card("AGX Orin 64 GB", 204.8e9, 5.3e12, 42.5e12, None,
         "Jetson AGX Orin technical brief (a quarter of its sparse INT8)"),
)  # fmt: skip


def find_card(device: str) -> Card | None:
    """The card that the driver calls `device`, or None where the table has none of that name."""
    return next((card for card in CARDS if card.device == device), None)
