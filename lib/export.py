"""Export a trained network to an ONNX file that runs without torch and this project.

The ONNX model maps the images of an RGB-D camera to class indices.
"""

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn
from torch.nn.functional import interpolate

from lib.batches import encode_inputs
from lib.data import Samples
from lib.data.synthetic import render_scene
from lib.evaluation import predict
from lib.files import write_atomically
from lib.model import SegmentationDepthNet

MIN_AGREEMENT = 0.999  # minimum share of pixels with the same class from ONNX and `evaluate`
SCENE_SIZE = 427, 561  # odd, so that it is no multiple of the working size


class CameraNet(nn.Module):
    """The computation of `evaluate` for one image, in operations that ONNX supports for dynamic sizes."""

    def __init__(self, model: SegmentationDepthNet) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, image: torch.Tensor, depth: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict the class and its softmax probability for each pixel.

        Args:
            image: `(1, H, W, 3)` uint8 RGB.
            depth: `(1, H, W)` uint16 millimetres, 0 = missing; None if the network takes no depth.

        Returns:
            `(1, H, W)` uint8 labels and `(1, H, W)` float32 confidence.
        """
        config = self.model.config
        small_depth = None if depth is None else resize_depth(depth, config.size)
        inputs = encode_inputs(resize_image(image, config.size), small_depth, config)
        scores = interpolate(self.model(inputs).logits, image.shape[1:3], mode="bilinear")
        highest, label = scores.max(1)
        return label.byte(), 1 / (scores - highest[:, None]).exp().sum(1)


def _scale(length: int, count: int) -> torch.Tensor:
    """Return the number of input pixels per output pixel as a float64 tensor.

    The exporter would turn a Python number into a constant for the size of its example.
    """
    return torch.scalar_tensor(length, dtype=torch.float64) / count


def resize_image(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize `(1, H, W, 3)` to `(1, h, w, 3)` float32, like `resize_image` of the samples.

    The values are the same, except for means that end in .5.
    """
    pixels = image[0].permute(2, 0, 1).float()
    scale_y, scale_x = (_scale(length, count) for length, count in zip(pixels.shape[1:], size, strict=True))
    enlarged = interpolate(pixels[None], size, mode="bilinear")[0].round()
    shrinks = (scale_y >= 1) & (scale_x >= 1)
    resized = torch.where(shrinks, _shrink(pixels, size, scale_y, scale_x), enlarged)
    return resized.permute(1, 2, 0)[None]


def _shrink(pixels: torch.Tensor, size: tuple[int, int], *scales: torch.Tensor) -> torch.Tensor:
    """Resize `(3, H, W)` by area means, as two matrix products.

    The matrices contain the overlap of each input pixel (columns) with each output pixel (rows).
    """
    overlaps = []
    for length, count, scale in zip(pixels.shape[1:], size, scales, strict=True):
        in_start, out_start = torch.arange(length), scale * torch.arange(count)[:, None]
        overlap = torch.minimum(out_start + scale, in_start + 1) - torch.maximum(out_start, in_start)
        overlaps.append(torch.where(overlap > 1e-3, overlap, 0.0).float())  # cv2's threshold
    means = overlaps[0] @ pixels @ overlaps[1].T * (1 / (scales[0] * scales[1])).float()
    is_halving = (scales[0] == 2) & (scales[1] == 2)  # when halving, cv2 rounds x.5 up, else to even
    return torch.where(is_halving, (means + 0.5).floor(), means.round())


def resize_depth(depth: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize `(1, H, W)` to `(1, h, w)` float32, with exactly the values of `resize_nearest`."""
    rows, columns = (
        (2 * torch.arange(count) + 1) * torch.scalar_tensor(length, dtype=torch.int64) // (2 * count)
        for length, count in zip(depth.shape[1:3], size, strict=True)
    )
    return depth.to(torch.int32)[:, rows][:, :, columns].float()  # few operations support uint16


def export_onnx(model: SegmentationDepthNet, path: Path | str) -> float:
    """Export a network as an ONNX model for images of any size.

    Inputs: `image`, `(1, H, W, 3)` uint8 RGB, and, if the network takes depth, `depth`, `(1, H, W)` uint16
    millimetres, 0 = missing. Outputs: `labels`, `(1, H, W)` uint8, and `confidence`, `(1, H, W)` float32.
    Metadata: `classes`, a JSON list.

    Returns:
        Share of the pixels of a built-in synthetic scene that get the same class from ONNX and `evaluate`.

    Raises:
        ValueError: if this share is below 99.9 %. No file is written.
    """
    model = deepcopy(model).cpu().eval()
    onnx_bytes = _convert(model)
    image, depth, _ = render_scene(0, 0, SCENE_SIZE)
    samples = Samples(np.array(["scene"]), image[None], depth[None], classes=model.config.classes)
    session = onnxruntime.InferenceSession(onnx_bytes)
    labels, _ = session.run(
        None, {model_input.name: getattr(samples, model_input.name) for model_input in session.get_inputs()}
    )
    agreement = float((labels == next(predict(model, samples)).labels).mean())
    if agreement < MIN_AGREEMENT:
        versions = f"onnxruntime {onnxruntime.__version__} and torch {torch.__version__}"
        raise ValueError(
            f"{path}: not written; {versions} agree on {100 * agreement:.2f} % of the pixels, "
            f"expected {100 * MIN_AGREEMENT:.1f} %"
        )
    write_atomically(Path(path).expanduser(), lambda file: file.write(onnx_bytes))
    return agreement


def _convert(model: SegmentationDepthNet) -> bytes:
    dynamic_dims = {"image": {1: torch.export.Dim("height"), 2: torch.export.Dim("width")}}
    dynamic_dims["depth"] = dict.fromkeys((1, 2), torch.export.Dim.AUTO)  # inferred: same as the image
    example_inputs = {"image": torch.zeros(1, 60, 80, 3, dtype=torch.uint8)}
    if model.config.inputs != "rgb":
        example_inputs["depth"] = torch.zeros(1, 60, 80, dtype=torch.uint16)
    program = torch.onnx.export(
        CameraNet(model).eval(), kwargs=example_inputs, dynamo=True, verbose=False,
        input_names=list(example_inputs), output_names=["labels", "confidence"],
        dynamic_shapes={name: dynamic_dims[name] for name in example_inputs},
    )  # fmt: skip
    program.model.metadata_props["classes"] = json.dumps(model.config.classes)
    return program.model_proto.SerializeToString()
