"""What the GPU kit times and benchmarks/roofline.py predicts: numbers of tasks, dtypes, sizes."""

ELEMENTS = 25_000_000  # P of the workloads that no model is behind
TASKS = (2, 4, 8, 16, 32, 64)
DTYPES = {"float32": 4, "bfloat16": 2}  # bytes of an element

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
