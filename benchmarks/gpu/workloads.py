"""What the GPU kit times and benchmarks/roofline.py predicts: numbers of tasks, dtypes, sizes."""

from dataclasses import dataclass, field

ELEMENTS = 25_000_000  # P of the workloads that no model is behind
TASKS = (2, 4, 8, 16, 32, 64)
DTYPES = {"float32": 4, "bfloat16": 2}  # bytes of an element

# (K, dtype, P) of the first timings, the most decisive first: registers, two tasks, 16 bits, staged rows, few elements.
SIZES = (
    (8, "float32", ELEMENTS),
    (2, "float32", ELEMENTS),
    (8, "bfloat16", 4 * ELEMENTS),
    (32, "float32", ELEMENTS),
    (8, "float32", 1_000_000),
)
SOLVES = (8, 40, 128)  # tasks of a Gram matrix

MODEL_TASKS = 4
MODEL_DTYPE = "bfloat16"


def resnet50() -> list[int]:
    """Elements of each parameter of a ResNet-50 without its last layer: 23.5M."""
    sizes, channels = [64 * 3 * 49, 64, 64], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(channels * width, width), (9 * width * width, width), (4 * width * width, 4 * width)]
            if block == 0:
                convolutions.append((channels * 4 * width, 4 * width))
            sizes += [size for weight, norm in convolutions for size in (weight, norm, norm)]
            channels = 4 * width
    return sizes


def vit_b() -> list[int]:
    """A ViT-B's twelve blocks: 85M."""
    norm, attention, mlp = (768, 768), (768 * 2304, 2304, 768 * 768, 768), (768 * 3072, 3072, 3072 * 768, 768)
    return [*norm, *attention, *norm, *mlp] * 12


MODELS = {  # elements of each shared parameter
    "ResNet-50": resnet50(),
    "ViT-B": vit_b(),
    "Llama block": [4096 * 4096] * 4 + [4096 * 11008] * 3 + [4096] * 2,
}


@dataclass(frozen=True)
class Setting:
    """Where the measurements run, and on how much."""

    device: str
    elements: int  # P of workloads that no model is behind
    copied: int  # elements of the copy that gives the bandwidth
    checked: int  # P of the smoke
    many: int  # tensors, where one launch should not do
    width: int  # of the layers that are trained
    tasks: tuple[int, ...] = TASKS
    sizes: tuple[tuple[int, str, int], ...] = SIZES
    solves: tuple[int, ...] = SOLVES
    models: dict[str, list[int]] = field(default_factory=lambda: MODELS)


GPU = Setting("cuda", elements=ELEMENTS, copied=2**28, checked=70_000, many=3000, width=1024)
DRY = Setting(  # everything that runs without a GPU, in seconds
    "cpu",
    elements=2000,
    copied=1000,
    checked=3000,
    many=40,
    width=8,
    tasks=(2, 32),
    sizes=((8, "float32", 2000), (2, "bfloat16", 3000)),
    solves=(3, 8),
    models={"tiny": [30, 4, 1]},
)
